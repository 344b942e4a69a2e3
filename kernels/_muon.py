"""The iteration of Newton-Schulz around a step of three products, for kernels on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from flagops.reference.muon import coefficients
from torch import Tensor

from flagops import config

Step = Callable[[Tensor, float, float, float], Tensor]


def iterate(a: Tensor, steps: int, out: Tensor, step: Step) -> None:
    """Normalise the matrices, go through the steps on their smaller side, and round."""
    if not a.numel():
        return
    real = torch.promote_types(a.dtype, torch.float32)
    for part, to in _chunks(a, out, real.itemsize):
        x = (part.mT if part.shape[-2] > part.shape[-1] else part).to(real)
        top = x.abs().amax((-2, -1), keepdim=True)
        x = x / torch.where(top == 0, 1, top)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x = x / torch.where(norm == 0, 1, norm)
        for coefficient in coefficients(steps):
            x = step(x, *coefficient)
        to.copy_(x.mT if part.shape[-2] > part.shape[-1] else x)


def _chunks(a: Tensor, out: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matrices and where their results go, [some, n, m] each."""
    if a.dim() == 2:
        yield a.unsqueeze(0), out.unsqueeze(0)
    elif a.dim() > 3:
        for part, to in zip(a, out, strict=True):
            yield from _chunks(part, to, size)
    else:
        n, m = a.shape[-2:]
        some = max(1, config.budget() // 2 // (4 * n * m * size))
        yield from zip(a.split(some), out.split(some), strict=True)
