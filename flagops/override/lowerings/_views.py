"""Views that bring the axes of a call to where cards have theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..lowering import REFUSED, Pass

if TYPE_CHECKING:
    from torch import Tensor

_MOST = 64  # axes that torch takes

Dims = int | Sequence[int] | None


def axis_of(dim: int, rank: int) -> int:
    """An axis by its number from either end; tensors without axes have one of one element."""
    rank = max(rank, 1)
    if not -rank <= dim < rank:
        raise Pass(REFUSED)
    return dim % rank


def axes_of(x: Tensor, dim: Dims) -> list[int]:
    """The axes that are meant, in their order: all for none. Raises Pass for what torch refuses."""
    if x.dim() > _MOST:
        raise Pass(REFUSED)
    every = list(range(max(x.dim(), 1)))
    dims = every if dim is None else [dim] if isinstance(dim, int) else list(dim) or every
    found = sorted(axis_of(d, x.dim()) for d in dims)
    if len(set(found)) < len(found):
        raise Pass(REFUSED)
    return found


def as_rows(x: Tensor) -> Tensor:
    """A tensor of no axes as a row of one."""
    return x if x.dim() else x.unsqueeze(0)


def last(x: Tensor, dim: int) -> Tensor:
    """A view with an axis last."""
    return as_rows(x).movedim(axis_of(dim, x.dim()), -1)


def size_of(x: Tensor, dim: int) -> int:
    return as_rows(x).shape[axis_of(dim, x.dim())]
