"""What the loss of the language does not train: the indexer, whose selection has no gradient, and the router's bias.

The indexer learns to score entries as its layer attends to them, by the cross-entropy of its softmax with the attention
of all heads together, for a sample of queries; the layer itself gets no gradient of it. The bias of a router moves by a
fixed step towards experts that fewer tokens chose. Both read what enters their modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flagops import compress_kv

from .model import csa_layers


@contextmanager
def watching(model: Any) -> Iterator[dict[Any, Tensor]]:
    """What entered each CSA attention and each MoE block in the last forward, detached."""
    seen: dict[Any, Tensor] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = (args[0] if args else kwargs["hidden_states"]).detach()

    modules = [*csa_layers(model), *(layer.mlp for layer in model.model.layers)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def rotated(module: Any, x: Tensor, positions: Tensor) -> Tensor:
    """``[b, s, h, d]`` at positions ``[s]``."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    cos, sin = module.rotary_emb(x, position_ids=positions[None], layer_type="compress")
    return apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)


def entries(module: Any, x: Tensor) -> Tensor:
    """The entries ``[b, n, d]`` of a compressor or an indexer for a document from its beginning."""
    bias, rows = module.position_bias, 2 * module.compress_rate
    state = x.new_zeros(len(x), rows, bias.shape[1])
    pooled = compress_kv(
        x, module.kv_proj.weight, module.gate_proj.weight, bias, state, torch.full_like(state, float("-inf"))
    )[0]
    positions = torch.arange(pooled.shape[1]) * module.compress_rate
    return rotated(module, module.kv_norm(pooled)[:, :, None], positions)[:, :, 0]


@torch.no_grad()
def attended(attention: Any, x: Tensor, positions: Tensor) -> Tensor:
    """How a CSA layer's queries at `positions` attend to its entries, all heads together: shares ``[b, q, n]``."""
    length, compressor = x.shape[1], attention.compressor
    q = attention.q_b_proj(latents(attention, x, positions)).view(len(x), len(positions), -1, attention.head_dim)
    q = rotated(compressor, attention.q_b_norm(q), positions)
    near = attention.kv_norm(attention.kv_proj(x))[:, :, None]
    near = rotated(compressor, near, torch.arange(length))[:, :, 0]
    far = entries(compressor, x)
    back = positions[:, None] - torch.arange(length)
    visible = torch.cat([(back >= 0) & (back < attention.sliding_window), closed(compressor, far, positions)], 1)
    logits = torch.einsum("bqhd,bkd->bqhk", q, torch.cat([near, far], 1)) * attention.scaling
    logits = logits.masked_fill(~visible[None, :, None], float("-inf"))
    sinks = attention.sinks.view(1, 1, -1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., length:-1].sum(2)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)


def scored(attention: Any, x: Tensor, positions: Tensor) -> Tensor:
    """The logarithms of the shares that its indexer's scores give to the entries."""
    indexer = attention.compressor.indexer
    keys = entries(indexer, x)
    q = indexer.q_b_proj(latents(attention, x, positions)).view(len(x), len(positions), -1, indexer.head_dim)
    scores = indexer.scorer(rotated(indexer, q, positions), keys, x[:, positions])
    return scores.masked_fill(~closed(indexer, keys, positions), -1e30).log_softmax(-1)


@torch.no_grad()
def latents(attention: Any, x: Tensor, positions: Tensor) -> Tensor:
    return attention.q_a_norm(attention.q_a_proj(x[:, positions]))


def closed(module: Any, found: Tensor, positions: Tensor) -> Tensor:
    """Which entries each position sees, ``[q, n]``: those whose windows end no later."""
    return torch.arange(found.shape[1]) < ((positions + 1) // module.compress_rate)[:, None]


def index_loss(attention: Any, x: Tensor, positions: Tensor) -> Tensor:
    """The divergence of an indexer's shares from those of its layer's attention, in nats, for queries at `positions`.

    A position before the first entry has none to attend to and must not be asked for.
    """
    weights = attended(attention, x, positions)
    return (torch.special.xlogy(weights, weights) - weights * scored(attention, x, positions)).sum(-1).mean()


@torch.no_grad()
def loads(block: Any, x: Tensor, ids: Tensor) -> Tensor:
    """How many tokens each expert of a MoE block gets, ``[experts]``."""
    gate = block.gate
    if block.is_hash:
        chosen = gate.tid2eid[ids]
    else:
        scores = gate.score_fn(functional.linear(x, gate.weight)) + gate.e_score_correction_bias
        chosen = scores.topk(gate.top_k, -1).indices
    return torch.bincount(chosen.flatten(), minlength=len(gate.weight))


@torch.no_grad()
def balance(block: Any, x: Tensor, ids: Tensor, step: float) -> None:
    """Move the bias of a router that has one by `step` against what its experts got."""
    if not block.is_hash:
        got = loads(block, x, ids).float()
        block.gate.e_score_correction_bias.add_(step * (got.mean() - got).sign())
