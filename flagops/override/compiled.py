"""`torch.compile(model, backend="flagops")`: graphs whose operators are those that `flagops.enable` replaced.

Dynamo's graph runs as it was captured, above autograd. Any later form would be too late: AOTAutograd has taken
composites (`rms_norm`, `scaled_dot_product_attention`) apart, and their gradients with them, before a compiler sees
them. So results and gradients are those of eager code to the last bit. Nothing is fused: a graph saves the Python
between operators and pays for Dynamo's guards, so it is about as fast as eager code under `enable`, not as inductor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap_activation_checkpoint
from torch.utils.checkpoint import checkpoint

from . import interpose


def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of `torch.compile`, by the name ``"flagops"`` too where flagops is installed; takes no options.

    Its graphs follow the handles in force when they are called; no change of those compiles again. Raises RuntimeError
    in a call with none in force, where torch's kernels would run unnoticed.
    """
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.target in (tag_activation_checkpoint, wrap_activation_checkpoint):
                    node.target = _checkpointed
            module.recompile()
    counters["flagops"]["graphs"] += 1

    def run(*args: Any) -> Any:
        if not interpose.live:
            raise RuntimeError(
                'a graph of torch.compile(backend="flagops") was called while nothing is replaced; '
                "call it under flagops.enable()"
            )
        return graph.forward(*args)

    return run


def _checkpointed(body: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
    """What torch's own node is only when traced: run, it draws dropout anew in the backward, and the mode it enters
    has composites step aside."""
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *args, **options | {"use_reentrant": False})
