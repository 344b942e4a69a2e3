"""transformers' eager modules as baselines, with the sizes and weights of a workload: ``--baseline transformers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flagops import arrays
from flagops.errors import Unsupported
from flagops.tools import companions
from flagops.tools.baseline import Packed

VERSION = ""
torchs = companions.load("baselines")


def load(folder: Path) -> dict[str, dict[str, Callable[..., Any]]]:
    """Its calls, by operator. Raises ModuleNotFoundError without a transformers that has DeepSeek-V4."""
    global VERSION
    try:
        import transformers
        from transformers.models.deepseek_v4 import modeling_deepseek_v4
    except ImportError as error:
        raise ModuleNotFoundError(f"--baseline transformers: {error} (pip install flagops[transformers])") from None
    VERSION = transformers.__version__
    v4 = modeling_deepseek_v4
    return {
        "rms_norm": {"transformers RMSNorm": Packed(_norm(v4), _run)},
        "hc_pre": {"transformers HyperConnection": Packed(_connection(v4), _run_connection)},
        "hc_head": {"transformers HyperHead": Packed(_head(v4), _run_tokens)},
        "moe_experts": {
            "transformers Experts": Packed(
                _experts(v4), _run_experts, _held, "activations and sums in bfloat16, no shared sum", _beyond
            )
        },
        "rotary_embedding": {"transformers apply_rotary_pos_emb": _rotary(v4)},
    }


def _with(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """A module with these tensors for its parameters, not copies."""
    for name, x in parameters.items():
        setattr(module, name, nn.Parameter(x, requires_grad=False))
    return module.eval()


def _made(kind: Callable[..., nn.Module], *args: Any, **parameters: Tensor) -> nn.Module:
    with torch.device("meta"):
        module = kind(*args)
    return _with(module, **parameters)


def _run(module: nn.Module, x: Tensor, *_: Any) -> Any:
    return module(x)


def _norm(v4: Any) -> Callable[..., nn.Module]:
    def pack(x: Tensor, weight: Tensor | None, eps: float, stepwise: bool) -> nn.Module:
        if weight is None or stepwise:
            raise Unsupported("transformers' RMSNorm has a weight, and does not round stepwise")
        return _made(v4.DeepseekV4RMSNorm, x.shape[-1], eps, weight=weight)

    return pack


def _connection(v4: Any) -> Callable[..., nn.Module]:
    def pack(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float) -> nn.Module:
        config = SimpleNamespace(
            hc_mult=x.shape[-2], hc_sinkhorn_iters=iters, hc_eps=eps, rms_norm_eps=norm_eps, hidden_size=x.shape[-1]
        )
        return _made(v4.DeepseekV4HyperConnection, config, fn=fn, base=base, scale=scale)

    return pack


def _run_connection(module: nn.Module, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    post, comb, y = module(x[None])
    return y, post, comb


def _head(v4: Any) -> Callable[..., nn.Module]:
    def pack(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> nn.Module:
        config = SimpleNamespace(hc_mult=x.shape[-2], hc_eps=eps, rms_norm_eps=norm_eps, hidden_size=x.shape[-1])
        return _made(v4.DeepseekV4HyperHead, config, hc_fn=fn, hc_base=base, hc_scale=scale)

    return pack


def _run_tokens(module: nn.Module, x: Tensor, *_: Any) -> Any:
    return module(x[None])


def _experts(v4: Any) -> Callable[..., nn.Module]:
    def pack(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, *rest: Any) -> Any:
        gate_up, down = torchs.experts_expanded(x, gate_up, down, *rest[:2])
        config = SimpleNamespace(
            num_local_experts=len(gate_up), hidden_size=x.shape[1], intermediate_size=gate_up.shape[1] // 2,
            hidden_act="silu", swiglu_limit=float("inf") if rest[2] is None else rest[2],
            _experts_implementation="eager",
        )  # fmt: skip
        return _made(v4.DeepseekV4Experts, config, gate_up_proj=gate_up, down_proj=down), indices.long()

    return pack


def _run_experts(ready: Any, x: Tensor, weights: Tensor, *_: Any) -> Any:
    module, indices = ready
    return module(x, indices, weights)


def _held(x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> list[Any]:
    """Bfloat16 products with expanded weights."""
    return [x, weights, indices, *torchs.experts_expanded(x, *rest[:4]), None, None, rest[4], None]


def _beyond(arguments: Mapping[str, Any]) -> Any:
    """It rounds to bfloat16, each time by half a unit: the sum over experts, with each of them, of what was summed; and
    before the product with ``down``, which carries it on, the activation, its product, and what comes of both.
    """
    x, weights, indices, gate_up, down = (
        arrays.as_torch(arguments[name]) for name in ("x", "weights", "indices", "gate_up", "down")
    )
    total, inner, sums = torch.zeros(x.shape), 3, indices.shape[1] + 1
    for expert in indices.unique().tolist():
        rows, slots = (indices == expert).nonzero(as_tuple=True)
        gate, up = nn.functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        h = torchs.swiglu(gate, up, weights[rows, slots], arguments["limit"], x).float()
        weight = down[expert].float()
        total.index_add_(0, rows, sums * (h @ weight.T).abs() + inner * (h.abs() @ weight.T.abs()))
    return total.numpy() * torch.finfo(torch.bfloat16).eps / 2


def _rotary(v4: Any) -> Callable[..., Any]:
    def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> Any:
        return v4.apply_rotary_pos_emb(x, cos, -sin if inverse else sin, unsqueeze_dim=-2)

    return rotary
