"""Dense attention in plain torch: an online softmax over tiles; the backward computes the tiles again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from flagops.reference.sdpa import factor
from torch import Tensor

from flagops import config


@dataclass
class _Item:
    """Queries [b, r, d] over keys [b, n, d] and values [b, n, v]; row r is position r % length."""

    tensors: list[Tensor]
    """query, key, value, then results or gradients laid out like them."""
    mask: Tensor | None
    grad_mask: Tensor | None
    length: int


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    out: Tensor,
) -> None:
    """All at once where the logits fit into the byte budget, else one head after the other in tiles."""
    if not out.numel():
        return
    real, multiple = torch.promote_types(query.dtype, torch.float32), factor(scale, query.shape[-1])
    whole = out if out.is_contiguous() else out.new_empty(out.shape)
    for item in _items(query, key, value, attn_mask, None, [whole], [], real):
        for rows in _rows(item):
            item.tensors[3][:, rows] = _forward(item, rows, is_causal, multiple, real)[0].to(out.dtype)
    if whole is not out:
        out.copy_(whole)


def scaled_dot_product_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    real, multiple = torch.promote_types(query.dtype, torch.float32), factor(scale, query.shape[-1])
    lead = grad.shape[:-3]
    grads = [torch.zeros((*lead, *x.shape[-3:]), dtype=real, device=x.device) for x in (query, key, value)]
    grad_mask = None
    if attn_mask is not None and needs[3]:
        grad_mask = torch.zeros(attn_mask.shape, dtype=real, device=query.device)
    shares = [grad.contiguous(), grads[0]]
    items = _items(query, key, value, attn_mask, grad_mask, shares, grads[1:], real)
    for item in items if grad.numel() else ():
        q, k, v, g, grad_q, grad_k, grad_v = item.tensors
        for rows in _rows(item):
            result, top, mass = _forward(item, rows, is_causal, multiple, real)
            slope, x = g[:, rows].to(real), q[:, rows].to(real)
            mean = (slope * result).sum(-1, keepdim=True)
            for columns in _columns(item, rows, is_causal):
                keys, values = k[:, columns].to(real), v[:, columns].to(real)
                logits = _logits(item, x, keys, rows, columns, is_causal, multiple)
                p = (torch.exp(logits - top) / mass).masked_fill_(logits == -torch.inf, 0)
                grad_v[:, columns].add_(torch.bmm(p.mT, slope))
                p = p * torch.bmm(slope, values.mT).sub_(mean)
                if item.grad_mask is not None:
                    item.grad_mask[:, rows, columns].add_(p)
                grad_q[:, rows].add_(torch.bmm(p, keys), alpha=multiple)
                grad_k[:, columns].add_(torch.bmm(p.mT, x), alpha=multiple)
    found = [g.sum_to_size(x.shape).to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)]
    mask_part = grad_mask.to(attn_mask.dtype) if grad_mask is not None and attn_mask is not None else None
    return (*(g if needed else None for g, needed in zip(found, needs, strict=False)), mask_part)


def _items(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    by_query: list[Tensor],
    by_key: list[Tensor],
    real: torch.dtype,
) -> Iterator[_Item]:
    """The whole call as one item or an item for each head. `by_query` and `by_key` have the batch axes of the result
    and are contiguous; the gradient of a mask is summed over what the mask is shared by."""
    lead, (heads, length) = by_query[0].shape[:-3], by_query[0].shape[-3:-1]
    groups, count = key.shape[-3:-1]
    shared, batch = heads // max(groups, 1), lead.numel() * groups
    size = by_query[0].shape[:-2].numel() * length * count
    full = (*lead, heads, length, count)
    if 6 * size * real.itemsize <= config.budget() // 2:
        stacked = [
            x.expand(*lead, *x.shape[-3:]).reshape(batch, shared * length, x.shape[-1]) for x in (query, *by_query)
        ]
        rows = [x.expand(*lead, *x.shape[-3:]).reshape(batch, count, x.shape[-1]) for x in (key, value, *by_key)]
        flat = None if mask is None else mask.expand(full).reshape(batch, shared * length, count)
        whole = None
        if grad_mask is not None:
            whole = torch.zeros(full, dtype=real, device=query.device)
        tensors = [stacked[0], *rows[:2], *stacked[1:], *rows[2:]]
        flat_grad = None if whole is None else whole.view(batch, shared * length, count)
        yield _Item(tensors, flat, flat_grad, length)
        if whole is not None and grad_mask is not None:
            grad_mask += whole.sum_to_size(grad_mask.shape)
        return
    for place in itertools.product(*(range(n) for n in (*lead, heads))):
        other = (*place[:-1], place[-1] // shared)
        own = [_at(x, place) for x in (query, *by_query)]
        rows = [_at(x, other) for x in (key, value, *by_key)]
        parts = [None if x is None else _at(x, place) for x in (mask, grad_mask)]
        yield _Item([own[0], *rows[:2], *own[1:], *rows[2:]], parts[0], parts[1], length)


def _flat(x: Tensor, lead: Sequence[int], batch: int, rows: int) -> Tensor:
    return x.expand(*lead, *x.shape[-3:]).reshape(batch, rows, x.shape[-1])


def _at(x: Tensor, place: Sequence[int]) -> Tensor:
    """One matrix of a batch as a batch of one; axes of size 1 broadcast."""
    lead = x.shape[:-2]
    chosen = place[len(place) - len(lead) :]
    return x[tuple(0 if size == 1 else i for i, size in zip(chosen, lead, strict=True))].unsqueeze(0)


def _room(item: _Item) -> tuple[int, int]:
    """Rows and keys of a tile."""
    query, key = item.tensors[:2]
    elements = max(config.budget() // 64 // query.shape[0], 64)
    keys = max(1, min(key.shape[1], max(int(elements**0.5), elements // max(query.shape[1], 1))))
    return max(1, elements // keys), keys


def _rows(item: _Item) -> Iterator[slice]:
    """Tiles of rows, each within one head where there are several tiles."""
    total, (step, _) = item.tensors[0].shape[1], _room(item)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _columns(item: _Item, rows: slice, is_causal: bool) -> Iterator[slice]:
    count, (_, step) = item.tensors[1].shape[1], _room(item)
    if is_causal and rows.start // item.length == (rows.stop - 1) // item.length:
        count = min(count, (rows.stop - 1) % item.length + 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _logits(item: _Item, x: Tensor, keys: Tensor, rows: slice, columns: slice, is_causal: bool, scale: float) -> Tensor:
    logits = torch.bmm(x, keys.mT).mul_(scale)
    if item.mask is not None:
        mask = item.mask[:, rows, columns]
        logits = logits.masked_fill_(mask == 0, -torch.inf) if mask.dtype == torch.uint8 else logits.add_(mask)
    if is_causal:
        row = torch.arange(rows.start, rows.stop, device=x.device) % item.length
        column = torch.arange(columns.start, columns.stop, device=x.device)
        logits.masked_fill_(column > row.unsqueeze(1), -torch.inf)
    return logits


def _forward(
    item: _Item, rows: slice, is_causal: bool, scale: float, real: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of some rows, the maxima of their logits (0 for -inf) and the sums of their weights (1 for 0)."""
    query, key, value = item.tensors[:3]
    x = query[:, rows].to(real)
    top = x.new_full((*x.shape[:2], 1), -torch.inf)
    mass = torch.zeros_like(top)
    total = x.new_zeros((*x.shape[:2], value.shape[-1]))
    for columns in _columns(item, rows, is_causal):
        logits = _logits(item, x, key[:, columns].to(real), rows, columns, is_causal, scale)
        before, top = top, torch.maximum(top, logits.detach().amax(-1, keepdim=True))  # whatever it is, it cancels
        base = top.masked_fill(top == -torch.inf, 0)
        p = logits.sub_(base).exp_()
        fade = torch.exp(before - base)
        mass = mass * fade + p.sum(-1, keepdim=True)
        total = torch.baddbmm(total.mul_(fade), p, value[:, columns].to(real))
    unseen = top == -torch.inf
    mass = mass.masked_fill(unseen, 1)
    return (total / mass).masked_fill_(unseen, 0), top.masked_fill(unseen, 0), mass
