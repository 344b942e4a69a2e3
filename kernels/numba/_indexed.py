"""How rows that are indexed lie: the plan that loops over picked and written places read, and what they do of one.

Axes are ordered such that rows along which the array lies closest are moved whole, wherever the indexed axis stands: a
call for rows of a table and one for elements of a row are the same loop.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, strides
from flagops.errors import OutOfRange

from .._rows import merged
from ._elementwise import _bytes
from ._vectors import load, maximum, minimum

ROWS, COUNT, ACROSS, LIMIT, AXES = 0, 1, 2, 3, 4
"""Of a plan: rows of other axes, indices, elements moved by one index, how far an index goes, axes of the rows."""
FIRST = 5  # where each operand's steps along the indices, along what one moves, and along the rows' axes begin
ASSIGN, SUM, PROD, AMAX, AMIN = range(5)


class Alarm:
    """What loops note down of an index that is out of range."""

    def __init__(self, size: int) -> None:
        self.size, self.room = size, np.zeros(2, np.int64)

    def check(self) -> None:
        """Raises OutOfRange."""
        if self.room[0]:
            raise OutOfRange(f"index {self.room[1]} is out of bounds for an axis of size {self.size}")


def bits_of(x: Any) -> str:
    """The dtype that moves an array's elements as they are."""
    return f"uint{8 * x.itemsize}"


def layout(x: Any) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    return tuple(x.shape), strides(x), dtype_name(x)


@lru_cache(maxsize=4096)
def planned(limit: int, count: int, lead: tuple[int, ...], *operands: Any) -> Any:
    """The plan for operands of the same leading axes and a last one, the result first; indices are below the limit."""
    layouts = [(shape[:-1], steps[:-1], dtype) for shape, steps, dtype in operands]
    sizes, steps = merged(lead, [_bytes(len(lead), *own) for own in layouts])
    along = [_bytes(1, shape[-1:], steps[-1:], dtype)[0] for shape, steps, dtype in operands]
    across, moved = 1, [0] * len(operands)
    if along[0] == 0 or abs(steps[0][-1]) <= abs(along[0]):
        across, moved = sizes.pop(), [own.pop() for own in steps]
    plan = [math.prod(sizes), count, across, limit, len(sizes), *reversed(sizes)]
    for walked, step, own in zip(along, moved, steps, strict=True):
        plan += [walked, step, *reversed(own)]
    return np.array(plan, np.int64)


@jit
def place(plan, operand, base, row):
    """Where an operand's row begins, and its steps along the indices and along what one of them moves."""
    axes = plan[AXES]
    own = FIRST + axes + operand * (2 + axes)
    for axis in range(axes):
        extent = plan[FIRST + axis]
        base += row % extent * plan[own + 2 + axis]
        row //= extent
    return base, plan[own], plan[own + 1]


@jit
def index_at(kind, address, limit, from_end, alarm):
    """The index of a dtype at an address, -1 if it is out of range."""
    given = np.int64(load(kind, address))
    i = given + limit if given < 0 and from_end else given
    if i < 0 or i >= limit:
        alarm[0], alarm[1] = 1, given
        return -1
    return i


@jit
def combined(tag, reduce, a, b):
    """What becomes of an element and one that meets it."""
    if reduce == SUM:
        return a + b
    if reduce == PROD:
        return a * b
    if reduce == AMAX:
        return maximum(a, b)
    return minimum(a, b)
