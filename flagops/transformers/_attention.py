"""A DeepSeek-V4 attention layer of transformers: lists of keys in place of masks, and flagops' operators."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from flagops.errors import Unsupported

from ._binding import MODELING, NAME, Binding, heads_of, hooked, unfit
from ._cache import beside
from ._masks import dense, is_lists, joined, visible_indices

OPS: frozenset[str] = frozenset(
    {"sparse_attention", "grouped_output_projection", "rotary_embedding", "compress_kv", "lightning_indexer"}
)


def attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """Stands for DeepseekV4Attention.forward."""
    binding: Binding = module._flagops
    if not binding.awake:
        return type(module).forward(
            module, hidden_states, position_embeddings, position_ids, attention_mask, past_key_values, **kwargs
        )
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    cos, sin = position_embeddings[module.rope_layer_type]
    latent = module.q_a_norm(module.q_a_proj(hidden_states))
    kv = rotate(binding, module.kv_norm(module.kv_proj(hidden_states)).view(heads), cos, sin)
    if binding.official:
        kv = fake_quantize(binding, kv, module.head_dim - 2 * cos.shape[-1])
    kv = kv.transpose(1, 2)
    if past_key_values is not None:
        kv = past_key_values.update(kv, kv, module.layer_idx)[0]
    own, layer, entries, extra = kv.shape[2], None, None, None
    if module.compressor is not None:
        entries, extra = module.compressor(hidden_states, latent, position_ids, past_key_values, module.layer_idx)
        layer = None if past_key_values is None else past_key_values.layers[module.layer_idx]
    count = 0 if entries is None else entries.shape[2]
    mask, reason = joined(attention_mask, own, extra, count)
    keys = kv if entries is None or not count else beside(layer, kv, entries, module.sliding_window)

    seen = hooked(module.q_b_proj) or hooked(module.q_b_norm)
    fresh = not (seen or torch.is_grad_enabled() or torch.compiler.is_compiling())
    shared = heads_of(module)
    if shared:
        keys, latent = shared.enter(keys), shared.enter(latent)
    q = (shared.rows(latent, module.q_b_proj) if shared else module.q_b_proj(latent)).view(heads)
    q = _head_norm(module, q, fresh)
    q = rotate(binding, q, cos, sin, fresh=fresh)
    o, weights = attention_forward(
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
    o = rotate(binding, o, cos, sin, inverse=True, fresh=fresh and weights is None)
    return _project(module, binding, o), weights


def _head_norm(module: Any, q: torch.Tensor, fresh: bool) -> torch.Tensor:
    norm = module.q_b_norm
    binding: Binding | None = norm.__dict__.get("_flagops")
    handle = binding.use("rms_norm") if binding else None
    if fresh and handle and "_hf_hook" not in norm.__dict__:
        result = handle.call("rms_norm", q, None, norm.eps, handle.official, out=q)
        return type(norm).forward(norm, q) if result is None else result
    return norm(q.transpose(1, 2)).transpose(1, 2) if hooked(norm) else norm(q)


def rotate(
    binding: Binding, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False, fresh: bool = False
) -> torch.Tensor:
    """The rotary embedding of x ``[b, s, h, d]``; in place where nobody else has seen it."""
    handle = binding.use("rotary_embedding")
    if handle:
        real = torch.promote_types(x.dtype, torch.float32)
        out = x if fresh and x.is_contiguous() else None
        result = handle.call("rotary_embedding", x, cos.to(real), sin.to(real), inverse, out=out)
        if result is not None:
            return result
    return sys.modules[MODELING].apply_rotary_pos_emb(x, cos, -sin if inverse else sin, unsqueeze_dim=2)


def fake_quantize(binding: Binding, x: torch.Tensor, channels: int) -> torch.Tensor:
    """Keys as DeepSeek-V4's inference code stores them: the channels that are not rotated go through FP8. A gradient
    passes straight through."""
    handle = binding.use("rotary_embedding")
    if handle is None or not channels:
        return x
    result = handle.call("fp8_fake_quantize", x.detach()[..., :channels], math.gcd(channels, 64), True)
    if result is None:
        return x
    rounded: torch.Tensor = _Straight.apply(  # type: ignore[no-untyped-call]
        x, torch.cat([result, x.detach()[..., channels:]], -1)
    )
    return rounded


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _project(module: Any, binding: Binding, o: torch.Tensor) -> torch.Tensor:
    shared = heads_of(module)
    if shared:
        return shared.project(o)
    first, second = module.o_a_proj, module.o_b_proj
    handle = binding.use("grouped_output_projection")
    if handle:
        reason = unfit(first, o) or unfit(second, o)
        if reason:
            handle.leave("grouped_output_projection", o, reason)
        else:
            result = handle.call("grouped_output_projection", o, first.weight, second.weight, first.n_groups)
            if result is not None:
                return result
    return second(first(o.reshape(*o.shape[:2], first.n_groups, -1)).flatten(2))


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    reason: str | None = None,
    **kwargs: Any,
) -> Any:
    """The attention function registered with transformers: query [b, h, s, d], key = value [b, 1, n, d], and a mask or
    lists of rows of the keys."""
    binding: Binding | None = module.__dict__.get("_flagops")
    handle = binding.use("sparse_attention") if binding else None
    config = module.config
    if handle:
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            reason = "the attention probabilities are asked for"
        elif dropout:
            reason = "attention dropout"
        arguments = reason or _arguments(module, query, key, value, attention_mask, scaling)
        if isinstance(arguments, str):
            reason = arguments
            handle.leave("sparse_attention", query, reason)
        else:
            result = handle.call("sparse_attention", *arguments)
            if result is not None:
                return result, None
    if heads_of(module):
        raise Unsupported(f"attention over a mesh: {reason or 'no backend takes the call, see report()'}")
    from transformers import AttentionInterface

    eager = sys.modules[MODELING].eager_attention_forward
    chosen = config._attn_implementation
    function = eager if chosen == NAME else AttentionInterface().get_interface(chosen, eager)
    if is_lists(attention_mask):
        attention_mask = dense(attention_mask, key.shape[2], query.dtype)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _arguments(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[Any, ...] | str:
    """The arguments of `flagops.sparse_attention`, or why there are none."""
    if key is not value or key.shape[1] != 1:
        return "key and value are not one shared head"
    if mask is None:
        return "no mask came (is the mask function registered under the same name?)"
    if query.dtype != key.dtype:
        return f"query and keys mix {query.dtype} and {key.dtype}"
    lists = mask
    if not is_lists(mask):
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != key.shape[2]:
            return f"a mask of shape {tuple(mask.shape)} for keys of shape {tuple(key.shape)}"
        found = visible_indices(mask[:, 0])
        if found is None:
            return "the mask is more than visible or hidden"
        lists = found
    q = query.transpose(1, 2)
    shared = heads_of(module)
    sink = (shared.sinks if shared else module.sinks).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q, key[:, 0], sink, lists.expand(q.shape[0], -1, -1), scaling
