"""The router and the gated activation, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from flagops import config

from .matmul import product, tiled

Result = tuple[Tensor, Tensor]


def moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    tokens: Tensor | None,
    top_k: int,
    scale: float,
    out: Result,
) -> None:
    """A stable sort selects: the lower expert comes first among equals."""
    for rows in _blocks(x.shape[0], 20 * weight.shape[0] + 4 * x.shape[1]):
        scores = _scores(_logits(x[rows], weight))
        indices = _select(scores, bias, table, tokens if tokens is None else tokens[rows], top_k)
        out[0][rows] = _normalised(scores.gather(1, indices), scale)
        out[1][rows] = indices.int()


def _blocks(count: int, size: int) -> Iterator[slice]:
    step = max(1, config.budget() // 4 // (size + 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    real = torch.promote_types(x.dtype, torch.float32)
    if tiled(x) and weight.dtype == x.dtype:
        z = x.new_empty((x.shape[0], weight.shape[0]), dtype=real)
        product(x, weight.mT, z)
        return z
    return torch.matmul(x.to(real), weight.to(real).mT)


def _scores(z: Tensor) -> Tensor:
    """Equal logits have equal scores, wherever they stand.

    Read with a gap after each: torch's loop over dense memory ends in another loop, which rounds differently.
    """
    return functional.softplus(torch.stack((z, z), -1)[..., 0]).sqrt()


def _select(scores: Tensor, bias: Tensor | None, table: Tensor | None, tokens: Tensor | None, top_k: int) -> Tensor:
    if table is not None and tokens is not None:
        if not len(tokens):
            return tokens.new_empty((0, top_k), dtype=torch.int64)
        return table[tokens.long().clamp(0, len(table) - 1)].long().clamp(0, scores.shape[1] - 1)
    biased = scores if bias is None else scores + bias.to(scores.dtype)
    return torch.sort(biased, dim=1, descending=True, stable=True).indices[:, :top_k]


def _normalised(chosen: Tensor, scale: float) -> Tensor:
    total = chosen.sum(1, keepdim=True)
    return chosen / total.masked_fill(total == 0, 1) * scale


def moe_gate_backward(
    grad: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    tokens: Tensor | None,
    top_k: int,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Through the scores of those selected; the bias decides only who that is."""
    z = _logits(x, weight)
    scores = _scores(z)
    indices = _select(scores, bias, table, tokens, top_k)
    chosen = scores.gather(1, indices)
    total = chosen.sum(1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    g = grad[0].to(z.dtype)
    slope = scale * (g - (g * chosen).sum(1, keepdim=True) / total) / total
    logits = z.gather(1, indices)
    rise = torch.where(logits > 20, 1, torch.sigmoid(logits)) / (2 * chosen.masked_fill(chosen == 0, 1))
    slope = (slope * rise).masked_fill(chosen == 0, 0)
    grad_z = torch.zeros_like(z).scatter_add_(1, indices, slope)
    grad_x = torch.matmul(grad_z, weight.to(z.dtype)).to(x.dtype) if needs[0] else None
    grad_weight = torch.matmul(grad_z.mT, x.to(z.dtype)).to(weight.dtype) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    return grad_x, grad_weight, grad_bias, None, None


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None, out: Tensor) -> None:
    """In float32 (float64 for float64), some rows at a time."""
    lead = out.shape[:-2]
    gate, up = gate.expand(out.shape), up.expand(out.shape)
    activate(gate, up, None if weight is None else weight.expand(*lead, -1), limit, out)


def activate(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None, out: Tensor) -> None:
    """`swiglu` without broadcasting."""
    if out.dim() > 2 and out.numel() > config.budget() // 64:
        for i in range(out.shape[0]):
            activate(gate[i], up[i], None if weight is None else weight[i], limit, out[i])
        return
    real = torch.promote_types(gate.dtype, torch.float32)
    for rows in _blocks(out.shape[-2], 4 * real.itemsize * (out.numel() // max(out.shape[-2], 1))):
        g, u = (x[..., rows, :].to(real) for x in (gate, up))
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        h = functional.silu(g).mul_(u)
        if weight is not None:
            h.mul_(weight[..., rows].unsqueeze(-1))
        out[..., rows, :] = h


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """What the clamp cuts off gets no gradient; its ends do."""
    grads = slopes(grad, gate, up, weight, limit)
    return tuple(
        g.sum_to_size(x.shape).to(x.dtype) if x is not None and needed else None
        for g, x, needed in zip(grads, (gate, up, weight), needs, strict=True)
    )


def slopes(grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None) -> tuple[Tensor, ...]:
    """The gradients of gate, up and weight, wide and as broadcast."""
    real = torch.promote_types(gate.dtype, torch.float32)
    grad, g, u = grad.to(real), gate.to(real), up.to(real)
    if limit is not None:
        inside_g, inside_u = (g <= limit).to(real), (u.abs() <= limit).to(real)
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    sigma = torch.sigmoid(g)
    silu = g * sigma
    by_weight = (grad * silu * u).sum(-1)
    if weight is not None:
        grad = grad * weight.to(real).unsqueeze(-1)
    by_gate, by_up = grad * u * sigma * (1 + g * (1 - sigma)), grad * silu
    return (by_gate, by_up, by_weight) if limit is None else (by_gate * inside_g, by_up * inside_u, by_weight)
