"""A DeepSeek-V4 attention layer of transformers: lists of keys in place of masks, and flagops' operators."""

from __future__ import annotations

import sys
from typing import Any

import torch

from flagops.errors import Unsupported

from ._binding import NAME, binding_of, heads_of
from ._cache import beside
from ._compress import compressed
from ._fit import MODELING, kept, renamed, shown, unfit
from ._layers import unweighted
from ._masks import dense, is_lists, joined, listed, read
from ._numerics import rotate, stored
from ._quantised import is_packed, operand

OPS: frozenset[str] = frozenset(
    {"sparse_attention", "grouped_output_projection", "rotary_embedding", "compress_kv", "lightning_indexer"}
)

_COMPRESSORS = {
    "compressed_sparse_attention": "DeepseekV4CSACompressor",
    "heavily_compressed_attention": "DeepseekV4HCACompressor",
}


@renamed
def attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """Stands for DeepseekV4Attention.forward since transformers 5.24."""
    arguments = hidden_states, position_embeddings, position_ids, attention_mask, cache
    if not binding_of(module).awake:
        return type(module).forward(module, *arguments, **kwargs)
    return _attention(module, *arguments, {"kwargs": kwargs}, kwargs)


def attention_5_23(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """Stands for DeepseekV4Attention.forward of transformers 5.23, which tells the cache nothing of its arguments."""
    arguments = hidden_states, position_embeddings, position_ids, attention_mask, past_key_values
    if not binding_of(module).awake:
        return type(module).forward(module, *arguments, **kwargs)
    return _attention(module, *arguments, {}, kwargs)


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    given: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """An attention layer; the cache is `given` what transformers gives it, the attention function `kwargs`."""
    binding = binding_of(module)
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    cos, sin = position_embeddings[module.rope_layer_type]
    latent = module.q_a_norm(module.q_a_proj(hidden_states))
    kv = rotate(binding, module.kv_norm(module.kv_proj(hidden_states)).view(heads), cos, sin)
    kv = _cached(module, stored(binding, kv, 2 * cos.shape[-1]).transpose(1, 2), attention_mask, cache, given)
    wanted = binding.use("sparse_attention") is not None
    own, layer, entries, extra = kv.shape[2], None, None, None
    if module.compressor is not None:
        arguments = hidden_states, latent, position_ids, cache, module.layer_idx
        if kept(module, "compressor", _COMPRESSORS[module.layer_type]):
            entries, extra = module.compressor(*arguments)
        else:
            entries, extra = compressed(module.compressor, *arguments)
            if wanted and extra is not None and extra.is_floating_point():
                extra = listed(extra)
        layer = None if cache is None else cache.layers[module.layer_idx]
    count = 0 if entries is None else entries.shape[2]
    mask, reason = joined(attention_mask, own, extra, count, wanted)
    keys = kv if entries is None or not count else beside(layer, kv, entries, module.sliding_window)

    unrecorded = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    plain = not kept(module, "q_b_norm", "DeepseekV4UnweightedRMSNorm")
    watched = kept(module, "q_b_proj", "Linear")
    fresh = unrecorded and plain and not watched
    shared = heads_of(module)
    if shared:
        if watched:
            raise Unsupported(f"an attention layer over a mesh computes with its own rows of q_b_proj, but {watched}")
        keys, latent = shared.enter(keys), shared.enter(latent)
    q = (shared.rows(latent, module.q_b_proj) if shared else module.q_b_proj(latent)).view(heads)
    q = _head_norm(module, q, plain, fresh)
    q = rotate(binding, q, cos, sin, fresh=fresh)
    o, weights, mine = _attend(
        module,
        q.transpose(1, 2),
        keys,
        keys,
        mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=module.sliding_window,
        s_aux=module.sinks,
        reason=reason,
        **kwargs,
    )
    del q
    o = rotate(binding, o, cos, sin, inverse=True, fresh=mine and unrecorded)
    return _project(module, o), weights


def _cached(module: Any, kv: torch.Tensor, mask: Any, cache: Any, given: dict[str, Any]) -> torch.Tensor:
    """The layer's keys with those of its cache before them; as many as the mask was made for."""
    if cache is None:
        return kv
    count, at = kv.shape[2], module.layer_idx
    if mask is None:
        return cache.update(kv, kv, at, **given)[0]
    expected = cache.get_mask_sizes(count, at)[0]
    kv = cache.update(kv, kv, at, **given)[0]
    if kv.shape[2] != expected:
        raise RuntimeError(
            f"layer {at}: its cache holds {kv.shape[2] - count} keys where masks count {expected - count}; "
            "a cache of compressed layers that was cropped does not have the keys to go on with"
        )
    return kv


def _head_norm(module: Any, q: torch.Tensor, plain: bool, fresh: bool) -> torch.Tensor:
    norm = module.q_b_norm
    if not plain:
        return norm(q.transpose(1, 2)).transpose(1, 2)
    return unweighted(norm, q, out=q) if fresh else norm(q)


def _project(module: Any, o: torch.Tensor) -> torch.Tensor:
    shared = heads_of(module)
    if shared:
        watched = kept(module, "o_a_proj", "DeepseekV4GroupedLinear") or kept(module, "o_b_proj", "Linear")
        if watched:
            raise Unsupported(f"an output projection over a mesh cannot run its layers one by one, but {watched}")
        return shared.project(o)
    return projected(module, o, module.config.o_groups)


def projected(module: Any, o: torch.Tensor, groups: int) -> torch.Tensor:
    """The output projection ``[..., h, d] -> [..., n]`` by the two layers as they are, of so many groups."""
    first, second = module.o_a_proj, module.o_b_proj
    handle = binding_of(module).use("grouped_output_projection")
    if handle:
        given = [_weight(layer, o, layer is second) for layer in (first, second)]
        reason = next((found for found in given if isinstance(found, str)), None)
        if reason:
            handle.leave("grouped_output_projection", o, reason)
        else:
            (wo_a, a_scale), (wo_b, b_scale) = given
            result = handle.call("grouped_output_projection", o, wo_a, wo_b, groups, a_scale, b_scale)
            if result is not None:
                return result
    return second(first(o.reshape(*o.shape[:-2], groups, -1)).flatten(-2))


def _weight(layer: Any, o: torch.Tensor, quantised: bool) -> Any:
    """A projection's weight and its scales, None for a plain one; or why it cannot be used past the layer."""
    if is_packed(layer):
        return operand(layer, o, quantised)
    return unfit(layer, o) or (layer.weight, None)


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Any:
    """The attention function registered with transformers: query [b, h, s, d], key = value [b, 1, n, d], and a mask or
    lists of rows of the keys."""
    return _attend(module, query, key, value, attention_mask, scaling, dropout, **kwargs)[:2]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    reason: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any, bool]:
    """The heads' outputs, their probabilities where somebody asks for them, and whether flagops computed it."""
    handle = binding_of(module).use("sparse_attention")
    config = module.config
    if handle:
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            reason = "the attention probabilities are asked for"
        elif shown(module):
            reason = "a hook sees the attention probabilities"
        elif dropout:
            reason = "attention dropout"
        arguments = reason or _arguments(module, query, key, value, attention_mask, scaling)
        if isinstance(arguments, str):
            reason = arguments
            handle.leave("sparse_attention", query, reason)
        else:
            result = handle.call("sparse_attention", *arguments)
            if result is not None:
                return result, None, True
    if heads_of(module):
        raise Unsupported(f"attention over a mesh: {reason or 'no backend takes the call, see report()'}")
    from transformers import AttentionInterface

    eager = sys.modules[MODELING].eager_attention_forward
    chosen = config._attn_implementation
    function = eager if chosen == NAME else AttentionInterface().get_interface(chosen, eager)
    if is_lists(attention_mask):
        attention_mask = dense(attention_mask, key.shape[2], query.dtype)
    o, weights = function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return o, weights, False


def _arguments(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float
) -> tuple[Any, ...] | str:
    """The arguments of `flagops.sparse_attention`, or why there are none."""
    if key is not value or key.shape[1] != 1:
        return "key and value are not one shared head"
    if query.dtype != key.dtype:
        return f"query and keys mix {query.dtype} and {key.dtype}"
    lists, reason = read(mask)
    if lists is None:
        return reason or ""
    if lists is not mask and mask.shape[-1] != key.shape[2]:
        return f"a mask of shape {tuple(mask.shape)} for keys of shape {tuple(key.shape)}"
    q = query.transpose(1, 2)
    shared = heads_of(module)
    sink = (shared.sinks if shared else module.sinks).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q, key[:, 0], sink, lists.expand(q.shape[0], -1, -1), scaling
