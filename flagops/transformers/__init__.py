"""`flagops.patch`: operators of a loaded DeepSeek-V4 model of Hugging Face transformers replaced, and put back.

What transformers has an interface for goes through it: the attention and the mask function of ``flagops`` are
registered with AttentionInterface and AttentionMaskInterface, the experts with ExpertsInterface, and a patched module
sees its configuration name them. Everything else is bound per instance. No dense mask is built: the mask function
gives each query's window as a list of keys, and the compressors add lists of entries. The cache keeps transformers'
own format, so that a patched and an unpatched model may take turns in one generation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from flagops import registry
from flagops.config import names
from flagops.errors import Unsupported, suggestion

from ._attention import attention_forward
from ._binding import NAME, Binding
from ._fit import MODELING, foreign, learn, misfit, stand_in, unknown, unlike
from ._handle import Handle
from ._kinds import HOMES, KINDS, LISTS, QUANTISED
from ._masks import index_mask, visible_indices
from ._moe import experts_forward
from ._quantised import EXPERTS
from ._trial import Trial

__all__ = ["NAME", "NUMERICS", "OPS", "PACKED", "Handle", "Trial", "patch", "visible_indices"]

OPS = (
    "sparse_attention",
    "grouped_output_projection",
    "compress_kv",
    "lightning_indexer",
    "rms_norm",
    "rotary_embedding",
    "hc_pre",
    "hc_post",
    "hc_head",
    "moe_gate",
    "moe_experts",
    "swiglu",
)
"""The operators of DeepSeek-V4."""
PACKED = ("fp8_matmul", "fp4_matmul")
"""Those of quantised layers, of any model; "moe_experts" is of both."""
NUMERICS = ("transformers", "official")


def patch(
    model: Any,
    ops: str | Sequence[str] = (*OPS, *PACKED),
    backend: str | Sequence[str] | None = None,
    numerics: str = "transformers",
    mesh: Any = None,
    mesh_dim: str = "tp",
    scheme: str = "auto",
    timed: bool = False,
) -> Handle:
    """Replace operators of a transformers `DeepseekV4ForCausalLM` (or a model that holds its attention layers), and of
    any model its layers on quantised weights: those of `flagops.load`, and `FP8Linear`, `FP8GroupedLinear` and
    `FP8Experts`, which transformers itself has loaded.

    ops: any of `OPS` and `PACKED`; ``"lightning_indexer"`` comes with ``"compress_kv"``.
    backend: as in every operator; None takes the best available one.
    numerics: ``"transformers"`` computes what transformers does, rounding no more than it; ``"official"`` follows
        DeepSeek's inference code where that differs: keys and compressed entries go through FP8 (in blocks of 64
        channels, but for the rotated ones), the indexer's queries and keys through a Hadamard transform and FP4, rotary
        tables stay float32, the norm of single heads is rounded step by step. These steps are taken whichever operators
        are replaced, by another backend where the named one has none for them.
    mesh: a `torch.distributed` DeviceMesh over whose dimension `mesh_dim` the heads of attention and indexer are
        divided, and the output projection by `scheme` (see `flagops.distributed`); every rank calls with the same whole
        model. Each then computes the whole model's logits, and gradients of its own shards.
    timed: also take the time of each call, which waits for a device that is not the CPU; the report shows it.

    Returns a `Handle`, also a context manager: ``disable()`` restores the model exactly, ``report()`` says what ran.
    What flagops cannot take (a mask that is more than visible or not, dropout, a recorded attention, a part that
    somebody watches or wraps) runs as before and is counted with its reason; a module whose forward or parts are not
    those that flagops knows is left alone and named. Training works; a deep copy stays patched until the same handle is
    disabled, and what is pickled is the model without the patch.

    Raises TypeError for a model that holds no DeepSeek-V4 attention and no quantised layer, ValueError for an unknown
    operator, backend or numerics, and Unsupported for a backend that cannot run here.
    """
    chosen = names(ops)
    for op in chosen:
        if op not in (*OPS, *PACKED):
            raise ValueError(f"patch: {op!r} is no operator that can be replaced{suggestion(op, (*OPS, *PACKED))}")
    if numerics not in NUMERICS:
        raise ValueError(f"patch: numerics {numerics!r} is unknown{suggestion(numerics, NUMERICS)}")
    if "lightning_indexer" in chosen and "compress_kv" not in chosen:
        raise ValueError("patch: 'lightning_indexer' reads the entries of 'compress_kv': name both")
    reasons = {name: registry.backend(name).unavailable() for name in names(backend or ())}
    if reasons and all(reasons.values()):
        raise Unsupported("patch: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    modeling = sys.modules.get(MODELING)  # not loaded: the model cannot be one of its classes
    modules = list(getattr(model, "modules", tuple)())
    layers = [m for m in modules if modeling and isinstance(m, modeling.DeepseekV4Attention)]
    quantised = any(getattr(_known_class(m), "__name__", None) in QUANTISED for m in modules)
    if not layers and not quantised:
        raise TypeError(
            f"patch: a {type(model).__name__} holds no DeepSeek-V4 attention and no quantised layer; "
            "expected a loaded transformers DeepseekV4ForCausalLM or DeepseekV4Model, or a model of `flagops.load`"
        )
    if layers:
        _register()
        learn()
    there = EXPERTS if not layers else {*OPS, *PACKED} if quantised else set(OPS)
    handle = Handle(tuple(op for op in chosen if op in there), backend, numerics, timed)
    if mesh is not None:
        from ._mesh import NEEDED, divide

        if not handle.ops >= NEEDED:
            raise ValueError(f"patch: a mesh needs the operators {', '.join(sorted(NEEDED))}")
        handle.heads = divide(layers, mesh, mesh_dim, scheme, backend)
    handle.install(list(_bindings(model, modeling, handle)))
    return handle


def _bindings(model: Any, modeling: Any, handle: Handle) -> Iterator[Binding]:
    """Everything of a model that a handle wants something of."""
    patched: set[Any] = set()
    left: set[Any] = set()  # parts of an attention layer that must run its own code
    attention = getattr(modeling, "DeepseekV4Attention", ())
    ordered = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], attention))
    for name, module in ordered:
        cls = _known_class(module)
        if cls is None or module in left:
            continue
        kind = KINDS[cls.__name__]
        if not kind.ops & handle.ops and not (handle.official and kind.numerics):
            continue
        reason = _unfit(module, cls)
        if reason:
            handle.leave_alone(name, reason)
            if cls.__name__ in LISTS:
                left.update(module.modules())
        elif kind.implementation == "attn":
            layers = [m for m in module.modules() if isinstance(m, modeling.DeepseekV4Attention)]
            if patched.issuperset(layers):
                yield Binding.of(module, kind.ops, None, "attn")
        else:
            patched.add(module)
            if cls.__name__ == "PackedExperts":  # computes what its layers hold
                left.update(part for part in module.modules() if part is not module)
            yield Binding.of(module, kind.ops, stand_in(kind, cls), kind.implementation)


def _known_class(module: Any) -> Any:
    """The class that a module is of, if there is something for it."""
    return next((cls for cls in type(module).__mro__ if HOMES.get(cls.__name__) == cls.__module__), None)


def _unfit(module: Any, cls: Any) -> str | None:
    """Why a module must run its own code, or None: what a stand-in calls must be called as flagops knows, too."""
    kind = KINDS[cls.__name__]
    reason = foreign(module, cls) if kind.forwards else None
    reason = reason or unknown(kind, cls) or misfit(module, kind) or unlike(module)
    parts = {_known_class(part) for part in module.children()} - {None} if kind.forwards else ()
    return reason or next(filter(None, (unknown(KINDS[part.__name__], part) for part in parts)), None)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    import flagops.torch_ops  # noqa: F401  (graphs of torch.compile name the operators)

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, index_mask)
    ExpertsInterface.register(NAME, experts_forward)
