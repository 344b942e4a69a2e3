"""The compressors and the indexer of transformers' DeepSeek-V4: entries in its cache format, lists for masks.

What a module gives when it is called is what transformers gives, for whoever wraps or watches it; between an attention
layer, its compressor and its indexer, where nobody does, flow lists.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from flagops.errors import Unsupported

from ._binding import Binding, binding_of, heads_of
from ._cache import append, fresh_state, put, strange, take
from ._fit import kept, renamed, unfit
from ._masks import dense, first_rows
from ._numerics import rotate, rounding, stored, turned, unwrapped


@renamed
def compressor(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any,
    layer_idx: int,
) -> Any:
    """Stands for the forward of DeepseekV4HCACompressor and DeepseekV4CSACompressor."""
    entries, seen = compressed(module, hidden_states, q_residual, position_ids, cache, layer_idx)
    if seen is None or seen.is_floating_point():
        return entries, seen
    return entries, dense(seen, entries.shape[2], entries.dtype, float("-inf")).expand(entries.shape[0], -1, -1, -1)


@renamed
def indexer(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any,
    layer_idx: int,
) -> torch.Tensor:
    """Stands for DeepseekV4Indexer.forward."""
    return _indexed(module, hidden_states, q_residual, position_ids, cache, layer_idx, "somebody calls the indexer")


def _5_23(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in under the signature that transformers 5.23 had."""

    def older(
        module: Any,
        hidden_states: torch.Tensor,
        q_residual: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        layer_idx: int,
    ) -> Any:
        return forward(module, hidden_states, q_residual, position_ids, past_key_values, layer_idx)

    return older


compressor_5_23, indexer_5_23 = _5_23(compressor), _5_23(indexer)


def compressed(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any,
    layer_idx: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The entries ``[b, 1, n, d]`` and, where transformers has a mask, those that each query sees: as lists, or as
    transformers' mask where its own code runs."""
    binding = binding_of(module)
    entries = _entries(module, binding, "compressor", hidden_states, cache, layer_idx)
    if entries is None:
        cache = rounding(module, binding, cache, layer_idx)
        return type(module).forward(module, hidden_states, q_residual, position_ids, cache, layer_idx)
    if hasattr(module, "indexer"):
        arguments = hidden_states, q_residual, position_ids, cache, layer_idx
        if kept(module, "indexer", "DeepseekV4Indexer"):
            lists = module.indexer(*arguments)
        else:
            lists = _indexed(module.indexer, *arguments)
    elif position_ids.shape[1] == 1 or not entries.shape[1]:
        lists = None
    else:
        lists = first_rows(_seen(module, position_ids, entries), entries.shape[1])
    return entries.unsqueeze(1), lists


def _indexed(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any,
    layer_idx: int,
    watched: str | None = None,
) -> torch.Tensor:
    """Entries of each query ``[b, s, k]``, -1 where there is none; in transformers' order, and by its scorer, if that
    is `watched`."""
    binding = binding_of(module)
    watched = watched or kept(module, "q_b_proj", "Linear") or kept(module, "scorer", "DeepseekV4IndexerScorer")
    watched = watched or kept(module.scorer, "weights_proj", "Linear")
    with nullcontext() if watched else torch.no_grad():
        keys = _entries(module, binding, "indexer", hidden_states, cache, layer_idx)
        if keys is None:
            cache = rounding(module, binding, cache, layer_idx)
            return type(module).forward(module, hidden_states, q_residual, position_ids, cache, layer_idx)
        seen = _seen(module, position_ids, keys).expand(keys.shape[0], -1)
        if keys.shape[1] <= module.index_topk and not watched:
            return first_rows(seen, keys.shape[1])
        return _select(module, binding, hidden_states, q_residual, position_ids, keys, seen, watched)


def _select(
    module: Any,
    binding: Binding,
    hidden_states: torch.Tensor,
    latent: torch.Tensor,
    position_ids: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor,
    watched: str | None,
) -> torch.Tensor:
    shared = heads_of(module)
    if shared and watched:
        raise Unsupported(f"an indexer over a mesh cannot run its parts one by one, but {watched}")
    q = shared.rows(latent, module.q_b_proj) if shared else module.q_b_proj(latent)
    q = q.view(*latent.shape[:2], -1, module.head_dim)
    cos, sin = module.rotary_emb(hidden_states, position_ids=position_ids, layer_type=module.rope_layer_type)
    q = rotate(binding, q, cos, sin)
    handle = binding.use("lightning_indexer")
    reason = watched or (None if q.dtype == keys.dtype else f"queries and keys mix {q.dtype} and {keys.dtype}")
    if handle and reason:
        handle.leave("lightning_indexer", q, reason)
    elif handle:
        scorer = module.scorer
        project = scorer.weights_proj
        weights = shared.rows(hidden_states, project) if shared else project(hidden_states)
        if not binding.official:  # whose weights are rounded to the dtype of the activations
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        weights = weights * (scorer.softmax_scale * scorer.weights_scaling)
        turned_q = turned(binding, q)
        if shared:
            return shared.select(turned_q, keys, weights, module.index_topk, seen)
        found = handle.call("lightning_indexer", turned_q, keys, weights, module.index_topk, seen, 0)
        if found is not None:
            return found
    if shared:
        raise Unsupported(f"the indexer over a mesh: {reason or 'no backend takes the call, see report()'}")
    scores = module.scorer(q, keys, hidden_states)
    hidden = torch.arange(keys.shape[1], device=keys.device) >= seen.unsqueeze(-1)
    count = min(module.index_topk, keys.shape[1])
    chosen = scores.masked_fill(hidden, float("-inf")).topk(count, dim=-1).indices
    return torch.where(chosen >= seen.unsqueeze(-1), -1, chosen)


def _seen(module: Any, position_ids: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """How many entries each query sees, int32 ``[b or 1, s]``: those whose windows end no later than its position."""
    closed = torch.div(position_ids + 1, module.compress_rate, rounding_mode="floor")
    return closed.clamp(0, entries.shape[1]).to(torch.int32)


def _entries(
    module: Any, binding: Binding, name: str, hidden_states: torch.Tensor, cache: Any, layer_idx: int
) -> torch.Tensor | None:
    """All entries of a compressor after these tokens, ``[b, n, d]``; None where transformers' own code must run."""
    handle = binding.use("compress_kv")
    if handle is None:
        return None
    layer = None if cache is None else unwrapped(cache.layers[layer_idx])
    reason = unfit(module.kv_proj, hidden_states) or unfit(module.gate_proj, hidden_states)
    reason = reason or (None if layer is None else strange(layer, name, *hidden_states.shape[:2]))
    if reason:
        handle.leave("compress_kv", hidden_states, reason)
        return None
    real = torch.promote_types(hidden_states.dtype, torch.float32)
    m, batch = module.compress_rate, hidden_states.shape[0]
    bias = module.position_bias.to(real)
    overlap = bias.shape[1] // module.head_dim
    if layer is None:
        filled, closed = 0, 0
        states = fresh_state(batch, bias, overlap, hidden_states.device)
    else:
        closed = layer.entry_count[name]
        *known, filled = take(layer, name, batch, bias.detach(), overlap)
        states = known[0], known[1]
    result = handle.call(
        "compress_kv", hidden_states, module.kv_proj.weight, module.gate_proj.weight, bias, *states, filled
    )
    if result is None:
        return None
    new, kv_state, score_state = result
    if layer is not None:
        filled = (filled + hidden_states.shape[1]) % m
        put(layer, name, kv_state, score_state, bias.detach(), (filled, closed + new.shape[1]), hidden_states.dtype)
    if new.shape[1]:
        new = module.kv_norm(new)
        positions = (torch.arange(new.shape[1], device=new.device) + closed).unsqueeze(0) * m
        cos, sin = module.rotary_emb(new, position_ids=positions, layer_type=module.rope_layer_type)
        new = rotate(binding, new.unsqueeze(2), cos, sin)
        new = turned(binding, new) if name == "indexer" else stored(binding, new, 2 * cos.shape[-1])
        new = new.squeeze(2)
    return new if layer is None else append(layer, name, new)


def reread(
    module: Any, hidden_states: torch.Tensor, cache: Any, layer_idx: int, entries: dict[str, torch.Tensor]
) -> None:
    """Bring a compressor's part of a cache forward by tokens that it has read before.

    entries: by name, those that it had then, which transformers' own code need not compute again.
    """
    for name, part in (("compressor", module), ("indexer", getattr(module, "indexer", None))):
        if part is None or _entries(part, binding_of(part), name, hidden_states, cache, layer_idx) is not None:
            continue
        layer = cache.layers[layer_idx]
        kv, gate, _ = layer.store_compression_weights(name, part.kv_proj(hidden_states), part.gate_proj(hidden_states))
        closed, before = kv.shape[1] // part.compress_rate, layer.entry_count[name]
        if closed and hasattr(layer, "overlap_kv"):
            kv, gate = (x.unflatten(1, (closed, -1)) for x in (kv, gate))
            layer.update_overlap_state(name, kv, gate + part.position_bias, part.head_dim)
        layer.update_compressor_states(name, entries[name][:, before : before + closed])
