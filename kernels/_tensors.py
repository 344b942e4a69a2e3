"""Shapes that kernels on torch tensors want, those of torch and those of Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor]


def matrix(x: Tensor) -> Tensor:
    """The last axis against all others."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def tokens(x: Tensor, lead: Sequence[int], tail: int) -> Tensor:
    """Batch axes, broadcast to `lead`, as one."""
    shape = x.shape[x.dim() - tail :]
    return x.expand(*lead, *shape).reshape(math.prod(lead), *shape)


def room(x: Tensor, lead: int) -> Tensor:
    """The output with its first `lead` axes as one: itself where it is contiguous, else new memory."""
    whole = x if x.is_contiguous() else x.new_empty(x.shape)
    return whole.view(math.prod(x.shape[:lead]), *x.shape[lead:])


def give(outs: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for out, x in zip(outs, found, strict=True):
        if not out.is_contiguous():
            out.copy_(x.view(out.shape))
