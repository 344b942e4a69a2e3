"""Integers of eight bits with torch's own operators: torch's product of them, or exact sums of float32."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops import config
from flagops.registry import kernel

from .._tensors import matrix
from .quantize import chunks

_LARGEST, _LEAST = 127, 2.0**-126
_EXACT = 1 << 10  # products of two codes, whose sum float32 holds


@kernel(deterministic=True, batch_invariant=True)
def int8_quantize(x: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Divided as it is defined: a product with the inverse would round otherwise."""
    codes, scale = out
    if not x.shape[-1]:
        scale.fill_(_LEAST)
    for source, (target, factor) in chunks(x, codes, scale):
        values = source.float()
        top = values.abs().amax(-1, keepdim=True)
        lost = ~top.isfinite()
        own = top.div_(_LARGEST).clamp_min_(_LEAST)
        factor.copy_(own.masked_fill(lost, torch.nan))
        made = values.div(own).round_().clamp_(-_LARGEST, _LARGEST)
        target.copy_(made.masked_fill_(lost, 0).to(torch.int8))


@kernel(deterministic=True, batch_invariant=True)
def int8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> None:
    """Every sum is exact, so that all ways to it give the same."""
    if not out.numel():
        return
    lead = out.shape[:-1]
    x, factors = (matrix(y.expand(*lead, y.shape[-1])) for y in (a, a_scale))
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    step = max(1, config.budget() // (16 * max(b.shape[0], 1)))
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        sums = _sums(x[rows], b)
        result[rows].copy_(sums.float().mul_(factors[rows]).mul_(b_scale[:, 0]))
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))


def _sums(x: Tensor, b: Tensor) -> Tensor:
    if _served(x, len(b)):
        return torch._int_mm(_dense(x), _dense(b).mT)
    sums = torch.zeros(len(x), len(b), dtype=torch.int32, device=x.device)
    for left, right in zip(x.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        sums += torch.mm(left.float(), right.float().mT).to(torch.int32)
    return sums


def _dense(x: Tensor) -> Tensor:
    """Row by row: torch's product goes by the strides of axes of one element too, which `contiguous` leaves."""
    return x.contiguous().view(-1).view(x.shape)


def _served(x: Tensor, n: int) -> bool:
    """Whether torch has the product. On a CPU it is wrong where each sum is one product; on a GPU it wants eights."""
    m, k = x.shape
    if x.device.type == "cpu":
        return k > 1
    return x.device.type == "cuda" and m > 16 and k > 0 and not (k % 8 or n % 8)
