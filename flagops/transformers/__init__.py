"""`flagops.patch`: operators of a loaded DeepSeek-V4 model of Hugging Face transformers replaced, and put back.

What transformers has an interface for goes through it: the attention and the mask function of ``flagops`` are
registered with AttentionInterface and AttentionMaskInterface, the experts with ExpertsInterface, and a patched module
sees its configuration name them. Everything else is bound per instance. No dense mask is built: the mask function
gives each query's window as a list of keys, and the compressors add lists of entries. The cache keeps transformers'
own format, so that a patched and an unpatched model may take turns in one generation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flagops import registry
from flagops.config import names
from flagops.errors import Unsupported, suggestion

from . import _attention, _compress, _layers, _moe
from ._binding import MODELING, NAME, Binding, foreign
from ._handle import Handle
from ._masks import index_mask, visible_indices

__all__ = ["NAME", "NUMERICS", "OPS", "Handle", "patch", "visible_indices"]

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
NUMERICS = ("transformers", "official")


def patch(
    model: Any,
    ops: str | Sequence[str] = OPS,
    backend: str | Sequence[str] | None = None,
    numerics: str = "transformers",
    mesh: Any = None,
    mesh_dim: str = "tp",
    scheme: str = "auto",
) -> Handle:
    """Replace operators of a transformers `DeepseekV4ForCausalLM` (or a model that holds its attention layers).

    ops: any of `OPS`; ``"lightning_indexer"`` comes with ``"compress_kv"``.
    backend: as in every operator; None takes the best available one.
    numerics: ``"transformers"`` computes what transformers does, rounding no more than it; ``"official"`` follows
        DeepSeek's inference code where that differs: keys and compressed entries go through FP8 (in blocks of 64
        channels, but for the rotated ones), the indexer's queries and keys through a Hadamard transform and FP4, rotary
        tables stay float32, the norm of single heads is rounded step by step.

    mesh: a `torch.distributed` DeviceMesh over whose dimension `mesh_dim` the heads of attention and indexer are
        divided, and the output projection by `scheme` (see `flagops.distributed`); every rank calls with the same whole
        model. Each then computes the whole model's logits, and gradients of its own shards.

    Returns a `Handle`, also a context manager: ``disable()`` restores the model exactly, ``report()`` says what ran.
    What flagops cannot take (a mask that is more than visible or not, dropout, a recorded attention) runs as before
    and is counted with its reason. Training works; a deep copy stays patched until the same handle is disabled.

    Raises TypeError for a model that holds no DeepSeek-V4 attention, ValueError for an unknown operator, backend or
    numerics, and Unsupported for a backend that cannot run here.
    """
    chosen = names(ops)
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"patch: {op!r} is no operator of DeepSeek-V4 that can be replaced{suggestion(op, OPS)}")
    if numerics not in NUMERICS:
        raise ValueError(f"patch: numerics {numerics!r} is unknown{suggestion(numerics, NUMERICS)}")
    if "lightning_indexer" in chosen and "compress_kv" not in chosen:
        raise ValueError("patch: 'lightning_indexer' reads the entries of 'compress_kv': name both")
    reasons = {name: registry.backend(name).unavailable() for name in names(backend or ())}
    if reasons and all(reasons.values()):
        raise Unsupported("patch: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    modeling = sys.modules.get(MODELING)  # not loaded: the model cannot be one of its classes
    modules = list(getattr(model, "modules", tuple)())
    if not modeling or not any(isinstance(m, modeling.DeepseekV4Attention) for m in modules):
        raise TypeError(
            f"patch: a {type(model).__name__} holds no DeepSeek-V4 attention; "
            "expected a loaded transformers DeepseekV4ForCausalLM or DeepseekV4Model"
        )
    _register()
    handle = Handle(chosen, backend, numerics)
    if mesh is not None:
        from ._mesh import NEEDED, divide

        if not handle.ops >= NEEDED:
            raise ValueError(f"patch: a mesh needs the operators {', '.join(sorted(NEEDED))}")
        layers = [m for m in modules if isinstance(m, modeling.DeepseekV4Attention)]
        handle.heads = divide(layers, mesh, mesh_dim, scheme, backend)
    handle.install(list(_bindings(model, modeling, handle)))
    return handle


def _bindings(model: Any, modeling: Any, handle: Handle) -> Iterator[Binding]:
    """Everything of a model that a handle wants something of."""
    patched: set[Any] = set()
    left: set[Any] = set()  # parts of an attention layer that must run its own code
    ordered = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], modeling.DeepseekV4Attention))
    for name, module in ordered:
        kind = next(
            (cls for cls in type(module).__mro__ if cls.__name__ in _KINDS and cls.__module__ == MODELING), None
        )
        if kind is None or module in left:
            continue
        ops, forward, implementation = _KINDS[kind.__name__]
        if not ops & handle.ops and not (handle.official and not ops):
            continue
        reason = foreign(module, kind) if forward else None
        reason = reason or _unlike(module, modeling)
        if reason:
            handle.leave_alone(name, reason)
            left.update(module.modules())
        elif implementation == "attn" and not forward:
            layers = [m for m in module.modules() if isinstance(m, modeling.DeepseekV4Attention)]
            if patched.issuperset(layers):
                yield Binding.of(module, ops, forward, implementation)
        else:
            patched.add(module)
            yield Binding.of(module, ops, forward, implementation)


def _unlike(module: Any, modeling: Any) -> str | None:
    """What a configuration asks of a module that flagops has no operator for, or None."""
    act, score = getattr(module, "act_fn", None), getattr(module, "score_fn", None)
    if act is not None and type(act) is not type(modeling.ACT2FN["silu"]):
        return f"its activation is {type(act).__name__}"
    if score is not None and type(score) is not type(modeling.ACT2FN["sqrtsoftplus"]):
        return f"its scores are {type(score).__name__}"
    return None


_Kind = tuple[frozenset[str], Callable[..., Any] | None, str | None]
_COMPRESS = frozenset({"compress_kv", "lightning_indexer"})
_KINDS: dict[str, _Kind] = {
    "DeepseekV4Attention": (_attention.OPS, _attention.attention, None),
    "DeepseekV4HCACompressor": (_COMPRESS, _compress.compressor, None),
    "DeepseekV4CSACompressor": (_COMPRESS, _compress.compressor, None),
    "DeepseekV4Indexer": (_COMPRESS, _compress.indexer, None),
    "DeepseekV4Model": (frozenset({"sparse_attention"}), None, "attn"),
    "DeepseekV4RotaryEmbedding": (frozenset(), _layers.rotary_tables, None),
    "DeepseekV4RMSNorm": (frozenset({"rms_norm"}), _layers.rms_norm, None),
    "DeepseekV4UnweightedRMSNorm": (frozenset({"rms_norm"}), _layers.unweighted_rms_norm, None),
    "DeepseekV4HyperConnection": (frozenset({"hc_pre"}), _layers.hyper_connection, None),
    "DeepseekV4HyperHead": (frozenset({"hc_head"}), _layers.hyper_head, None),
    "DeepseekV4DecoderLayer": (frozenset({"hc_post"}), _layers.decoder_layer, None),
    "DeepseekV4SparseMoeBlock": (frozenset({"moe_gate"}), _moe.moe_block, None),
    "DeepseekV4TopKRouter": (frozenset({"moe_gate"}), _moe.router, None),
    "DeepseekV4HashRouter": (frozenset({"moe_gate"}), _moe.router, None),
    "DeepseekV4Experts": (frozenset({"moe_experts"}), None, "experts"),
    "DeepseekV4MLP": (frozenset({"swiglu"}), _moe.shared_expert, None),
}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    import flagops.torch_ops  # noqa: F401  (graphs of torch.compile name the operators)

    AttentionInterface.register(NAME, _attention.attention_forward)
    AttentionMaskInterface.register(NAME, index_mask)
    ExpertsInterface.register(NAME, _moe.experts_forward)
