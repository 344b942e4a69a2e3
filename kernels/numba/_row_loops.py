"""Rows of several operands and results: the loop over memory of what needs a whole row before its first result.

Bound by memory while a row stays in the second cache. `_walk_rows` brings rows that lie apart, or are of another dtype
than the routine reads, side by side; what is the same for all rows it brings once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer

from ._blocks import alive, at, scratch, walk
from ._ir import STORAGE
from ._routines import call, mover
from ._vectors import BYTE, load, store

SLOTS = 8
_SPARE = 64  # elements that are behind a row in the room that it has
_GRAIN = 1 << 15  # additions worth a thread
_LONG = np.int64(0)
# The fields of a plan, and of each slot behind them.
_N, _ROWS, _PER, _COUNT, _ROOM, _SIZES, _SLOTS = 0, 1, 2, 3, 4, 5, 8
_SIZE, _LENGTH, _STEP, _HOW, _MOVE, _OWN, _WRITTEN, _STEPS, _FIELDS = 0, 1, 2, 3, 4, 5, 6, 7, 10
_IN_PLACE, _ONCE, _APART = range(3)


class Rows(NamedTuple):
    """An array of rows, or of one number a row if `single`, and the dtype in which a routine has it.

    Rows of one element are that one repeated.

    written: whether it is a result.
    """

    array: Any
    tag: str
    written: bool = False
    single: bool = False


def rowwise(
    body: int,
    lead: Sequence[int],
    n: int,
    slots: Sequence[Rows],
    scalars: Any,
    work: float,
    per: int = 1,
    parts: Any = None,
) -> None:
    """Call ``body(n, table, room, fresh, part, scalars)`` for each row; the table has an address for each slot.

    room: for a row in the arithmetic. work: what an element costs, of an addition. per: rows of a task, of which the
    first is `fresh`; each task has a part of its own among the rows of the array `parts`.
    """
    tails = tuple([0 if x.single else 1 for x in slots])
    kinds = tuple([(dtype_name(x.array), x.tag, x.written, *_lengths(x, n)) for x in slots])
    own = (0, 0) if parts is None else (pointer(parts), parts.itemsize * parts.shape[-1])
    for sizes, places in walk(lead, tails, *[x.array for x in slots]):
        plan, tasks = _planned(n, per, tuple(sizes), kinds, tuple([tuple(place[1:]) for place in places]))
        addresses = (*[place[0] for place in places], *[0] * (SLOTS - len(slots)))
        least = max(1, int(_GRAIN / work) // max(n * per, 1))
        parallel(_walk_rows, tasks, pointer(plan), body, pointer(scalars), own, addresses, minimum=least)
        own = (own[0] + tasks * own[1], own[1])


def _lengths(x: Rows, n: int) -> tuple[int, bool]:
    """Elements of a row, and whether they are all one."""
    return (1, False) if x.single else (n, x.array.shape[-1] < n)


@lru_cache(maxsize=4096)
def _planned(n: int, per: int, sizes: tuple[int, ...], kinds: Any, steps: Any) -> tuple[Any, int]:
    """What `_walk_rows` reads, and its tasks."""
    rows, room = math.prod(sizes), 0
    fields: list[int] = []
    for (dtype, tag, written, length, repeated), (outer, last) in zip(kinds, steps, strict=True):
        own, size = STORAGE[dtype].size, STORAGE[tag].size
        step = 0 if repeated else last[0] * own if last else own
        alike = not any(s for s, count in zip(outer, sizes, strict=True) if count > 1)
        how = _IN_PLACE if dtype == tag and (step == own or length == 1) else _ONCE if alike and not written else _APART
        move = mover(tag, dtype) if written else mover(dtype, tag)
        fields += [size, length, step, how, move, room, written, *(s * own for s in outer)]
        room += -(-length * size // 64) * 64
    tasks = -(-rows // per)
    return np.array([n, rows, per, len(kinds), room, *sizes, *fields], np.int64), tasks


def tasks_of(lead: Sequence[int], slots: Sequence[Rows], per: int) -> int:
    """How many tasks `rowwise` has, each of which has a part."""
    tails = tuple([0 if x.single else 1 for x in slots])
    return sum(-(-math.prod(sizes) // per) for sizes, _ in walk(lead, tails, *[x.array for x in slots]))


@jit
def _field(plan, i):
    return load(_LONG, plan + 8 * i)


@jit
def _origin(plan, own, base, i, j, k):
    """Where a slot's row begins, of its place on three axes."""
    place = base + i * _field(plan, own + _STEPS) + j * _field(plan, own + _STEPS + 1)
    return place + k * _field(plan, own + _STEPS + 2)


@jit
def _brought(plan, own, target, source, back):
    """A slot's row to its room, or back."""
    move, length = _field(plan, own + _MOVE), _field(plan, own + _LENGTH)
    size, step = _field(plan, own + _SIZE), _field(plan, own + _STEP)
    call(move, length, target, source, step if back else size, size if back else step, 0)


@jit
def _walk_rows(start, stop, plan, body, scalars, parts, places):
    n, rows, per, slots = _field(plan, _N), _field(plan, _ROWS), _field(plan, _PER), _field(plan, _COUNT)
    inner, middle = _field(plan, _SIZES + 2), _field(plan, _SIZES + 1)
    memory, (brought, work, few) = scratch(BYTE, ((1, _field(plan, _ROOM)), (1, 8 * (n + _SPARE)), (2, 8 * SLOTS)))
    room, spare, table, steps = at(brought, 0, 0), at(work, 0, 0), at(few, 0, 0), at(few, 1, 0)
    plain = True
    for s in range(slots):
        own = _SLOTS + s * _FIELDS
        how, target = _field(plan, own + _HOW), room + _field(plan, own + _OWN)
        plain = plain and how != _APART
        store(_LONG, table + 8 * s, target)
        store(_LONG, steps + 8 * s, _field(plan, own + _STEPS + 2) if how == _IN_PLACE else 0)
        if how == _ONCE:
            _brought(plan, own, target, places[s], False)
    k, rest = start * per % inner, start * per // inner
    i, j, following = rest // middle, rest % middle, False
    for task in range(start, stop):
        first, part = task * per, parts[0] + task * parts[1]
        for row in range(first, min(first + per, rows)):
            for s in range(slots):
                own = _SLOTS + s * _FIELDS
                if following:  # to look everything up takes as long as a short row
                    store(_LONG, table + 8 * s, load(_LONG, table + 8 * s) + load(_LONG, steps + 8 * s))
                elif _field(plan, own + _HOW) == _IN_PLACE:
                    store(_LONG, table + 8 * s, _origin(plan, own, places[s], i, j, k))
                elif _field(plan, own + _HOW) == _APART and not _field(plan, own + _WRITTEN):
                    _brought(plan, own, load(_LONG, table + 8 * s), _origin(plan, own, places[s], i, j, k), False)
            call(body, n, table, spare, row == first, part, scalars)
            if not plain:
                for s in range(slots):
                    own = _SLOTS + s * _FIELDS
                    if _field(plan, own + _WRITTEN) and _field(plan, own + _HOW) == _APART:
                        _brought(plan, own, _origin(plan, own, places[s], i, j, k), load(_LONG, table + 8 * s), True)
            k, following = k + 1, plain
            if k == inner:
                k, j, following = 0, j + 1, False
            if j == middle:
                j, i = 0, i + 1
    return alive(memory)
