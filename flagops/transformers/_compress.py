"""The compressors and the indexer of transformers' DeepSeek-V4: entries in its cache format, lists for masks."""

from __future__ import annotations

import math
from typing import Any

import torch

from flagops.errors import Unsupported

from ._attention import fake_quantize, rotate
from ._binding import Binding, heads_of, unfit
from ._cache import append, fresh_state, put, take
from ._masks import first_rows


def compressor(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> Any:
    """Stands for the forward of DeepseekV4HCACompressor and DeepseekV4CSACompressor.

    Returns the entries ``[b, 1, n, d]`` and, where transformers has a mask, lists of those that each query sees.
    """
    binding: Binding = module._flagops
    layer = None if past_key_values is None else past_key_values.layers[layer_idx]
    entries = _entries(module, binding, "compressor", hidden_states, layer)
    indexer = getattr(module, "indexer", None)
    if entries is None:
        return type(module).forward(module, hidden_states, q_residual, position_ids, past_key_values, layer_idx)
    if indexer is not None:
        lists = indexer(hidden_states, q_residual, position_ids, past_key_values, layer_idx)
    elif position_ids.shape[1] == 1 or not entries.shape[1]:
        lists = None
    else:
        lists = first_rows(_seen(module, position_ids, entries), entries.shape[1])
    return entries.unsqueeze(1), lists


def indexer(
    module: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> torch.Tensor:
    """Stands for DeepseekV4Indexer.forward; entries of each query ``[b, s, k]``, -1 behind the last."""
    binding: Binding = module._flagops
    layer = None if past_key_values is None else past_key_values.layers[layer_idx]
    with torch.no_grad():
        keys = _entries(module, binding, "indexer", hidden_states, layer)
        if keys is None:
            return type(module).forward(module, hidden_states, q_residual, position_ids, past_key_values, layer_idx)
        seen = _seen(module, position_ids, keys).expand(keys.shape[0], -1)
        if keys.shape[1] <= module.index_topk:
            return first_rows(seen, keys.shape[1])
        return _select(module, binding, hidden_states, q_residual, position_ids, keys, seen)


def _select(
    module: Any,
    binding: Binding,
    hidden_states: torch.Tensor,
    latent: torch.Tensor,
    position_ids: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    shared = heads_of(module)
    q = shared.rows(latent, module.q_b_proj) if shared else module.q_b_proj(latent)
    q = q.view(*latent.shape[:2], -1, module.head_dim)
    cos, sin = module.rotary_emb(hidden_states, position_ids=position_ids, layer_type=module.rope_layer_type)
    q = rotate(binding, q, cos, sin)
    if binding.official:
        q = _turn(binding, q)
    handle = binding.use("lightning_indexer")
    if handle:
        if q.dtype == keys.dtype:
            scorer = module.scorer
            project = scorer.weights_proj
            weights = shared.rows(hidden_states, project) if shared else project(hidden_states)
            if not binding.official:  # whose weights are rounded to the dtype of the activations
                weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
            weights = weights * (scorer.softmax_scale * scorer.weights_scaling)
            if shared:
                return shared.select(q, keys, weights, module.index_topk, seen)
            found = handle.call("lightning_indexer", q, keys, weights, module.index_topk, seen, 0)
            if found is not None:
                return found
        else:
            handle.leave("lightning_indexer", q, f"queries and keys mix {q.dtype} and {keys.dtype}")
    if shared:
        raise Unsupported("the indexer over a mesh needs queries and keys of one dtype")
    scores = module.scorer(q, keys, hidden_states)
    hidden = torch.arange(keys.shape[1], device=keys.device) >= seen.unsqueeze(-1)
    chosen = scores.masked_fill(hidden, float("-inf")).topk(module.index_topk, dim=-1).indices
    return torch.where(chosen >= seen.unsqueeze(-1), -1, chosen)


def _seen(module: Any, position_ids: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """How many entries each query sees, int32 ``[b or 1, s]``: those whose windows end no later than its position."""
    closed = torch.div(position_ids + 1, module.compress_rate, rounding_mode="floor")
    return closed.clamp(0, entries.shape[1]).to(torch.int32)


def _entries(module: Any, binding: Binding, name: str, hidden_states: torch.Tensor, layer: Any) -> torch.Tensor | None:
    """All entries of a compressor after these tokens, ``[b, n, d]``; None where transformers' own code must run."""
    handle = binding.use("compress_kv")
    if handle is None:
        return None
    reason = unfit(module.kv_proj, hidden_states) or unfit(module.gate_proj, hidden_states)
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
        if binding.official:
            plain = module.head_dim - 2 * cos.shape[-1]
            new = _turn(binding, new) if name == "indexer" else fake_quantize(binding, new, plain)
        new = new.squeeze(2)
    return new if layer is None else append(layer, name, new)


def _turn(binding: Binding, x: torch.Tensor) -> torch.Tensor:
    """The indexer's queries and keys in the official numerics: a Hadamard transform, then FP4."""
    handle = binding.use("compress_kv")
    assert handle is not None
    turned = handle.call("hadamard", x, None)
    if turned is None:
        return x
    result = handle.call("fp4_fake_quantize", turned, math.gcd(x.shape[-1], 32))
    return turned if result is None else result
