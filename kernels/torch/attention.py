"""Attention over selected key-value rows: gather those of a few queries, then two batched products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flagops import config


def sparse_attention(q: Tensor, kv: Tensor, sink: Tensor | None, indices: Tensor, scale: float, out: Tensor) -> None:
    """An online softmax over blocks of indices, for as many queries at a time as the byte budget allows."""
    if not q.numel() or not kv.numel() or not indices.shape[2]:
        out.zero_()
        return
    heads, width = q.shape[2:]
    real = torch.promote_types(q.dtype, torch.float32)
    limit = min(config.budget() // 4, 32 << 20 if q.device.type == "cpu" else 1 << 62)
    per_index = (width * (real.itemsize + 2) + 4 * heads * real.itemsize + 16) + 1
    keys = max(1, min(indices.shape[2], limit // 2 // per_index))
    queries = max(1, limit // (keys * per_index + 4 * heads * width * real.itemsize))
    for b, rows in _chunks(q, queries):
        x = q[b, rows].to(real)
        slots, valid = _slots(indices[b, rows], kv.shape[1])
        top = x.new_full((x.shape[0], heads, 1), -torch.inf)
        mass = torch.zeros_like(top)
        total = torch.zeros_like(x)
        for start in range(0, slots.shape[1], keys):
            picked, present = slots[:, start : start + keys], valid[:, start : start + keys].unsqueeze(1)
            values = kv[b].index_select(0, picked.flatten()).view(*picked.shape, width).to(real)
            scores = torch.bmm(x, values.mT).mul_(scale).masked_fill_(~present, -torch.inf)
            before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
            base = top.masked_fill(top == -torch.inf, 0)
            p = scores.sub_(base).exp_()
            fade = torch.exp(before - base)
            mass = mass * fade + p.sum(-1, keepdim=True)
            p = p.to(q.dtype).to(real)
            total = torch.baddbmm(total.mul_(fade), p, values) if start else torch.bmm(p, values)
        if sink is not None:
            mass = mass.double() + torch.exp(sink.double().unsqueeze(-1) - top.double())
        root = mass.sqrt().to(real)  # divided by twice, for a mass beyond the range of float32
        total.div_(root).div_(root)
        total.masked_fill_(top == -torch.inf, torch.nan).masked_fill_(~valid.any(-1)[:, None, None], 0)
        out[b, rows].copy_(total)


def sparse_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    sink: Tensor | None,
    indices: Tensor,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `q`, `kv` and `sink`; the probabilities are computed again, their rounding is passed through."""
    heads, width = q.shape[2:]
    count = kv.shape[1]
    real = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros(q.shape, dtype=real, device=q.device)
    grad_kv = torch.zeros((q.shape[0], count + 1, width), dtype=real, device=q.device)
    grad_sink = torch.zeros(heads, dtype=real, device=q.device)
    per_query = indices.shape[2] * (3 * width + 6 * heads) + 6 * heads * width + 1
    most = max(1, config.budget() // 4 // (per_query * real.itemsize))
    near = q.device.type == "cpu"  # a device would be waited for, to know how many rows there are
    some = q.numel() and kv.numel() and indices.shape[2]
    for b, rows in _chunks(q, min(most, 128) if near else most) if some else ():
        x, g = q[b, rows].to(real), grad[b, rows].to(real)
        slots, valid = _slots(indices[b, rows], count)
        together = _together(slots, valid, kv[b], x, g) if near else None
        if together is not None:
            used, times, values = together
            absent = times == 0
        else:
            values = kv[b].index_select(0, slots.flatten()).view(*slots.shape, width).to(real)
            absent = ~valid.unsqueeze(1)
        scores = (_product(x, values.mT) * scale).masked_fill(absent, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
        if sink is not None:
            sinks = sink.to(real).unsqueeze(-1)
            top = torch.maximum(top, sinks)
            idle = torch.exp(sinks - top).masked_fill(sinks == top, 1)
        p = torch.exp(scores - top)
        if together is not None:
            p = p * times
        mass = p.sum(-1, keepdim=True)
        if sink is not None:
            mass = mass + idle
        mass = mass.masked_fill(absent.all(-1, keepdim=True), 1)
        p = (p / mass).masked_fill(absent, 0)
        slope = _product(g, values.mT).masked_fill(absent, 0)
        mean = (p * slope).sum(-1, keepdim=True)
        slope = p * (slope - mean) * scale
        if needs[0]:
            grad_q[b, rows] = _product(slope, values).masked_fill_(~valid.any(-1)[:, None, None], 0)
        if needs[1] and together is not None:
            parts = torch.addmm(p.flatten(0, 1).mT @ g.flatten(0, 1), slope.flatten(0, 1).mT, x.flatten(0, 1))
            grad_kv[b].index_add_(0, used, parts)
        elif needs[1]:
            parts = torch.baddbmm(torch.bmm(p.mT, g), slope.mT, x)
            target = torch.where(valid, slots, count).flatten()
            grad_kv[b].index_add_(0, target, parts.flatten(0, 1))
        if sink is not None and needs[2]:
            grad_sink -= (idle / mass * mean).sum((0, 2))
    return (
        grad_q.to(q.dtype) if needs[0] else None,
        grad_kv[:, :count].to(kv.dtype) if needs[1] else None,
        grad_sink.to(sink.dtype) if sink is not None and needs[2] else None,
        None,
    )


def _together(
    slots: Tensor, valid: Tensor, kv: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """For queries near each other, whose rows are mostly the same: which rows any of them reads, ``[n]``, how often
    each query reads each, ``[q, 1, n]``, and the rows, ``[1, n, d]``, in the dtype of `x`.

    None where so many are read that gathering them for each query is cheaper, by measurement with 4 to 64 heads, or
    where a row is not finite: a query that does not read it must not notice.
    """
    count, heads = len(kv), x.shape[1]
    read = torch.zeros(count + 1, dtype=torch.bool, device=kv.device)
    read[torch.where(valid, slots, count)] = True
    used = read[:count].nonzero().flatten()
    if not len(used) or len(used) * heads > slots.shape[1] * (heads + 24):
        return None
    values = kv.index_select(0, used).to(x.dtype)
    if not all(part.isfinite().all() for part in (values, x, grad)):
        return None
    place = torch.zeros(count, dtype=torch.int64, device=kv.device)
    place[used] = torch.arange(len(used), device=kv.device)
    times = torch.zeros((len(slots), len(used)), dtype=x.dtype, device=kv.device)
    return used, times.scatter_add_(1, place[slots], valid.to(x.dtype)).unsqueeze(1), values.unsqueeze(0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``[q, h, i]`` times ``[q, i, j]``, or times one matrix ``[1, i, j]`` for all queries."""
    return torch.bmm(x, y) if len(y) == len(x) else (x.flatten(0, 1) @ y[0]).view(*x.shape[:2], -1)


def _chunks(q: Tensor, queries: int) -> Iterator[tuple[int, slice]]:
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1], queries):
            yield b, slice(start, min(start + queries, q.shape[1]))


def _slots(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers, and which of them count; an absent one repeats a row of its query, so that no other is read."""
    valid = (indices >= 0) & (indices < count)
    chosen = indices.masked_fill(~valid, -1)
    return torch.where(valid, chosen, chosen.amax(-1, keepdim=True).clamp_min(0)), valid
