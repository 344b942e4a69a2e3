"""`flagops.load`: a model of transformers on the packed weights of a checkpoint, where they lie in its files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from flagops import arrays, config
from flagops.checkpoint import Refused
from flagops.checkpoint.source import Source
from flagops.errors import suggestion

from .build import Build
from .save import Saved

ACTIVATIONS = ("fp8", "none")
_OUTPUTS = ("bfloat16", "float16", "float32")


def load(
    path: Any,
    *,
    dtype: Any = "bfloat16",
    activations: str = "fp8",
    pack: bool = False,
    memory: str | int | None = None,
    backend: str | Sequence[str] | None = None,
    numerics: str = "transformers",
    mesh: Any = None,
    mesh_dim: str = "tp",
    scheme: str = "auto",
) -> Any:
    """A model of transformers for inference on the weights of a quantised checkpoint, FP4 and FP8, as they are stored.

    Tensors are mapped from the files: the process takes what it uses of them and no second copy, and no weight is
    expanded. Linear layers, experts, the grouped projection and the indexer compute with codes and scales, and the
    model is patched (`flagops.patch`); ``model.flagops`` is the handle.

    Args:
        path: a folder with safetensors and their index: DeepSeek-V4 in the official or in transformers' names, V3, R1,
            Qwen3 and other models whose FP8 weights have scales of 128 x 128 blocks.
        dtype: of what is not quantised, and of the activations: ``"bfloat16"``, ``"float16"`` or ``"float32"``. A
            tensor that is stored in another dtype is converted, which is a copy.
        activations: ``"fp8"`` multiplies as the official inference code does, activations quantised in blocks of 128,
            by powers of two where the checkpoint says ``ue8m0``; ``"none"`` leaves them in `dtype` (W8A16, W4A16). The
            bounds are those of `flagops.fp8_matmul`, `fp4_matmul` and `moe_experts`.
        pack: copy the experts of each layer into one tensor, which `moe_experts` computes in one call: memory of their
            size in place of mapped pages, and a load that reads them.
        memory: the most bytes, such as ``"24GiB"``, that the process may take with all weights, activations and caches
            aside: routed experts are then read on demand into what is left, kept by use and read ahead once they are
            chosen (``model.flagops_arena.report()``). Results have the same bits for every budget. None maps them.
        backend, numerics: as of `flagops.patch`.
        mesh: a `torch.distributed` DeviceMesh over whose dimension `mesh_dim` a DeepSeek-V4 is divided; every rank
            calls. Each maps its shards alone: heads of attention and indexer, the output projection by `scheme` (see
            `flagops.distributed`), experts and vocabulary (`flagops plan` counts them). Every rank computes the whole
            model's logits; what ranks have is added in float32, so that they differ by the order of sums alone. The
            patch remains for good, and such a model is not saved.

    ``state_dict()`` has the codes as ``weight`` and the scales as ``weight_scale_inv``, by transformers' names.
    ``save_pretrained(folder)`` writes the checkpoint's own tensors under its own names, byte for byte where nobody has
    changed them. ``model.flagops.disable()`` takes the patch back; packed layers go on computing with packed weights.
    No parameter asks for a gradient.

    Raises:
        ValueError: an option is unknown, or two experts do not fit into memory.
        Refused: (a ValueError) names tensor, file and remedy where the checkpoint is damaged, lacks a tensor, has one
            of another shape or one that the model does not know, or is of a format other than these.
        ModuleNotFoundError: transformers is not installed.
    """
    name = arrays.parse_dtype(dtype)
    if name not in _OUTPUTS:
        raise Refused(f"dtype {name}: expected {', '.join(_OUTPUTS)}")
    from flagops.transformers import NUMERICS, patch

    for option, value, known in (("activations", activations, ACTIVATIONS), ("numerics", numerics, NUMERICS)):
        if value not in known:
            raise ValueError(f"load: {option} {value!r} is unknown{suggestion(value, known)}")

    room = None if memory is None else config.size(memory)
    if pack and room is not None:
        raise ValueError(
            "load: pack copies all experts into memory, and memory= reads some of them; give one of the two"
        )
    options = getattr(torch, name), activations == "fp8", pack
    if mesh is None:
        build = Build(Source(path), *options, room)
    else:
        from flagops.distributed.projection import agreed, ranks_of

        from .ranks import Ranks

        mesh = ranks_of(mesh, mesh_dim)
        with agreed(mesh) as note:
            build = Build(Source(path), *options, room, partial(Ranks, mesh, scheme))
            note.update(checkpoint=build.source.fingerprint(), options=(*options, scheme, numerics))
        assert build.ranks is not None
        build.ranks.divide(build.model, backend)
    model = build.model
    model.save_pretrained = Saved(build.mapped, build.places, whole=mesh is None)
    model.flagops_arena = build.arena
    model.flagops = patch(model, backend=backend, numerics=numerics)
    if mesh is not None:
        model.flagops.stay("a model loaded over a mesh computes its part of the heads by this patch; load it without")
    return model
