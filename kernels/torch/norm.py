"""Root-mean-square normalisation on any torch device, in pieces that stay in cache on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flagops import config
from flagops.registry import kernel


def pieces(x: Tensor, kept: int, item: int = 4) -> Iterator[tuple[slice, ...]]:
    """Slices of all but the last `kept` axes whose float32 copies stay in cache on a CPU, in the budget elsewhere."""
    limit = min(config.budget() // 4, 1 << 20 if x.device.type == "cpu" else 1 << 62)
    yield from _halves(tuple(x.shape), len(x.shape) - kept, limit // item, ())


def _halves(shape: tuple[int, ...], axes: int, limit: int, fixed: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    if len(fixed) == axes:
        yield fixed
        return
    inner = 1
    for size in shape[len(fixed) + 1 :]:
        inner *= size
    count = shape[len(fixed)]
    step = max(1, limit // max(inner, 1))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        if inner <= limit:
            yield (*fixed, part)
        else:
            yield from _halves(shape, axes, limit, (*fixed, part))


@kernel(deterministic=True, batch_invariant=False)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, stepwise: bool, out: Tensor) -> None:
    """One float32 copy of a piece, multiplied in place."""
    if not x.numel():
        return
    real = torch.promote_types(x.dtype, torch.float32)
    factor = None if weight is None else weight.to(real)
    for piece in pieces(x, 1):
        y = x[piece].to(real, copy=True)
        if stepwise and x.dtype != real:
            y = _in_steps(y, factor, eps, x.dtype)
        else:
            y.mul_(y.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
            y = y if factor is None else y.mul_(factor)
        out[piece].copy_(y)


def _in_steps(q: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    mean = q.square().to(dtype).sum(-1, keepdim=True, dtype=torch.float64).div_(q.shape[-1]).float().to(dtype)
    root = (mean.float() + eps).to(dtype).double().rsqrt_().float().to(dtype)
    y = q.mul_(root.float())
    return y if weight is None else y.to(dtype).float().mul_(weight)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, stepwise: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `x` and `weight`; the roundings of a stepwise call are passed through."""
    real = torch.promote_types(x.dtype, torch.float32)
    y, g = x.to(real), grad.to(real)
    root = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_() if x.shape[-1] else y.sum(-1, keepdim=True)
    y = y * root
    grad_x = grad_weight = None
    if weight is not None and len(needs) > 1 and needs[1]:
        grad_weight = (g * y).flatten(0, -2).sum(0) if x.dim() > 1 else g * y
        grad_weight = grad_weight.to(weight.dtype)
    if needs[0]:
        g = g if weight is None else g * weight.to(real)
        grad_x = (g - y * (g * y).mean(-1, keepdim=True)).mul_(root).to(x.dtype) if x.numel() else grad
    return grad_x, grad_weight
