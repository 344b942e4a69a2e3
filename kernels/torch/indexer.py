"""The lightning indexer on any torch device: scores of a few queries and entries, and the best so far of each query."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops import config
from flagops.registry import kernel

_SCRATCH = 64 << 20
_HIDDEN = -(2**63)


@kernel(deterministic=True)
def lightning_indexer(
    q: Tensor, keys: Tensor, weights: Tensor, top_k: int, visible: Tensor | None, offset: int, out: Tensor
) -> None:
    """Keys that order scores and then entries are unique, so that any top-k of them is exact."""
    batch, length, heads, depth = q.shape
    n, k = keys.shape[1], out.shape[2]
    if not out.numel():
        return
    entry = torch.arange(k, dtype=torch.int32, device=q.device)
    for b in range(batch):
        seen = keys.new_full((length,), n, dtype=torch.int32) if visible is None else visible[b].clamp(0, n)
        out[b] = torch.where(entry < seen.unsqueeze(1), entry + offset, -1)
        if n == k:
            continue
        if visible is None or q.device.type != "cpu":  # asking a device would wait for it
            rows, reach = None, n
        else:
            rows = (seen > k).nonzero().flatten()
            reach = int(seen.max())
        count = length if rows is None else len(rows)
        queries, entries = _tile(count, reach, k, heads, depth, q.dtype)
        for first in range(0, count, queries):
            some = slice(first, first + queries)
            chosen = some if rows is None else rows[some]
            limit = seen[chosen]
            best = _best(q[b, chosen], keys[b, :reach], weights[b, chosen], limit, k, entries)
            if rows is None:
                best = torch.where((limit > k).unsqueeze(1), best + offset, out[b, chosen])
            else:
                best += offset
            out[b, chosen] = best


def _tile(count: int, reach: int, k: int, heads: int, depth: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many queries and entries at a time: products of all heads, scores, their keys and what was kept."""
    size = 8 if dtype == torch.float64 else 4
    room = min(config.budget() // 2, _SCRATCH)
    entries = max(1, min(reach, 1024, room // 4 // (heads * size + 80 + depth * size)))
    each = entries * (2 * heads * size + 80) + 80 * k + heads * depth * size
    return max(1, min(count, (room - entries * depth * size) // each)), entries


def _best(q: Tensor, keys: Tensor, weights: Tensor, limit: Tensor, k: int, step: int) -> Tensor:
    """The k best entries of each query in ascending order; of a query that sees fewer, anything."""
    real = torch.promote_types(q.dtype, torch.float32)
    count, heads, depth = q.shape
    queries, weights = q.reshape(count * heads, depth).to(real), weights.to(real).unsqueeze(1)
    held, places = limit.new_empty((count, 0), dtype=torch.int64), limit.new_empty((count, 0), dtype=torch.int32)
    for start in range(0, keys.shape[0], step):
        some = keys[start : start + step].to(real)
        dots = torch.matmul(queries, some.mT).view(count, heads, some.shape[0]).relu_()
        scores = torch.bmm(weights, dots).squeeze(1)
        entry = torch.arange(start, start + some.shape[0], dtype=torch.int32, device=q.device).expand_as(scores)
        hidden = entry >= limit.unsqueeze(1)
        held = torch.cat([held, _ordered(scores).masked_fill_(hidden, _HIDDEN)], 1)
        places = torch.cat([places, entry], 1)
        if held.shape[1] > k:
            kept = _highest(held, k, real)
            held, places = held.gather(1, kept), places.gather(1, kept)
    return places


def _ordered(scores: Tensor) -> Tensor:
    """Scores as integers of the same order: -0 equals 0, and NaN comes before every number but after what is hidden."""
    scores = scores + 0.0
    narrow = scores.dtype == torch.float32
    bits = scores.view(torch.int32 if narrow else torch.int64)
    flipped = bits ^ ((bits >> 31 if narrow else bits >> 63) & (2**31 - 1 if narrow else 2**63 - 1))
    return flipped.masked_fill_(scores.isnan(), -(2**31) + 1 if narrow else _HIDDEN + 1).long()


def _highest(held: Tensor, k: int, real: torch.dtype) -> Tensor:
    """Positions of the k highest in ascending order, the earlier of equals."""
    if real == torch.float64:
        kept = held.sort(stable=True, dim=1, descending=True).indices[:, :k]
    else:
        place = torch.arange(held.shape[1] - 1, -1, -1, device=held.device)
        kept = (held.clamp_min(-(2**31)) * 2**32 + place).topk(k, 1, sorted=False).indices
    return kept.sort(1).values
