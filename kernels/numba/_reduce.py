"""One number of each row: the loop over memory of every reduction, whatever strides and dtypes.

Bound by memory. The order is the same for every layout, batch and number of threads: a row is cut into at most
`CHUNKS` chunks, of which element i goes to accumulator i % LANES; accumulators are folded by halves, then chunks in
their order. Where a row lies side by side its accumulators are the lanes of a vector. Where the rows do, a vector holds
one accumulator of many rows, and all of them stay in the cache.
"""

# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import math
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from flagops.arrays import dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides

from .. import _folds
from . import _functions, _vectors
from ._blocks import alive, at, scratch
from ._fold_bodies import BODIES, COUNT, LANES, NUMBERS, OLD, SCALAR, SECOND, SPARE, STRIDE, STRIDE_2, TILE
from ._ir import STORAGE, TAGS
from ._routines import call, mover, routine
from ._vectors import BYTE, load, store

CHUNKS = 64
_CHUNK = 4096  # elements of a chunk at least
_PIECE = 4096  # elements that are brought elsewhere at once
_ROWS = 512  # of one task
_GRAIN = 1 << 15  # elements worth a thread
_LONG = np.int64(0)


class Fold(NamedTuple):
    """A reduction: the state of no element, and its functions in `_folds`.

    indexed: the state has the index of the element too.
    """

    start: Any
    step: str
    merge: str
    finish: str = "same"
    indexed: bool = False


_WORDS: dict[str, Any] = {
    **{name: getattr(_functions, name) for name in ("exp", "log")},
    **{name: getattr(_vectors, name) for name in ("maximum", "minimum", "where", "sqrt")},
    "pow": _functions.power,
    "abs": abs,
}


@cache
def _function(name: str) -> Any:
    """A function of `_folds`, compiled, and those that it calls."""
    source = getattr(_folds, name)
    words = vars(_folds) | _WORDS
    words |= {
        name: _function(name) for name in source.__code__.co_names if hasattr(_folds, name) and name != "INFINITY"
    }
    made = FunctionType(source.__code__, words, name)
    made.__module__ = __name__
    return jit(made, source)


@cache
def _routines(fold: Fold, columns: bool, tag: str, state: str, result: str) -> list[int]:
    """The routines that step, fold and finish."""
    words: dict[str, Any] = {}
    for name, own in (("X", tag), ("S", state), ("OUT", result)):
        words |= {name: TAGS[own], f"{name}_SIZE": STORAGE[own].size}
    words["START"] = _extreme(fold.start, state)
    words |= {"step": _function(fold.step), "merge": _function(fold.merge), "finish": _function(fold.finish)}
    return [
        routine(body, "_".join((*map(str, fold), tag, state, result)), **words)
        for body in BODIES[columns, fold.indexed]
    ]


def _extreme(value: Any, dtype: str) -> Any:
    """The number of a dtype that is called "least" or "most", where there is none less or more."""
    if value not in ("least", "most"):
        return value
    if np.dtype(numpy_dtype(dtype)).kind == "i":
        info = np.iinfo(numpy_dtype(dtype))
        return int(info.min if value == "least" else info.max)
    return -math.inf if value == "least" else math.inf


# The fields of a plan; behind them the sizes of the outer axes, the last first, then the steps of x and out along them.
(
    _COLUMNS, _N, _LENGTH, _PARTS, _TOTAL, _INNER, _EACH, _LIES, _X_SIZE, _S_SIZE, _OUT_SIZE, _X_STEP, _X_INNER,
    _OUT_INNER, _BRING, _DELIVER, _STEP, _FOLD, _FINISH, _NUMBERED, _OUTER,
) = range(21)  # fmt: skip


@lru_cache(maxsize=4096)
def _planned(
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    dtype: str,
    goal: tuple[int, ...] | None,
    out_dtype: str,
    fold: Fold,
    tags: tuple[str, str, str],
    numbered: bool,
) -> tuple[Any, int, int, int, int]:
    """What `_reduce` reads, its tasks, elements of each, rows, and chunks of each.

    goal: strides of the result, None of one whose elements lie in the order of the rows.
    """
    tag, state, result = tags
    size, out_size, n = STORAGE[dtype].size, STORAGE[out_dtype].size, shape[-1]
    total = math.prod(shape[:-1])
    x_step = steps[-1] * size if n > 1 else size
    axes = [
        (count, step * size, i) for i, (count, step) in enumerate(zip(shape[:-1], steps, strict=False)) if count != 1
    ]
    axes.sort(key=lambda axis: abs(axis[1]), reverse=True)
    if 0 < n < LANES and axes:
        axes.append(axes.pop(max(range(len(axes)), key=lambda i: axes[i][0])))
    placed = [(count, step, 0 if goal is None else goal[i] * out_size) for count, step, i in axes]
    if goal is None:
        for i in range(len(placed)):
            placed[i] = (*placed[i][:2], out_size * math.prod(axis[0] for axis in placed[i + 1 :]))
    merged: list[tuple[int, int, int]] = []
    for count, step, own in placed:
        if merged and merged[-1][1:] == (count * step, count * own):
            count *= merged.pop()[0]
        merged.append((count, step, own))
    *outer, (inner, x_inner, out_inner) = merged or [(1, 0, 0)]
    columns = n > 0 and inner >= (8 if n < LANES else LANES) and (n < LANES or x_step != size)
    parts = max(1, min(CHUNKS, -(-n // _CHUNK)))
    length = max(LANES, -(-n // parts // LANES) * LANES) if n else LANES
    parts = max(1, -(-n // length))
    each = max(1, min(_ROWS, _GRAIN // max(n, 1))) if parts == 1 else 1
    lies = dtype == tag and (x_inner if columns else x_step) == size
    plan = [columns, n, length, parts, total, inner, each, lies, STORAGE[tag].size, STORAGE[state].size]
    plan += [STORAGE[result].size, x_step, x_inner, out_inner, mover(dtype, tag), mover(result, out_dtype)]
    plan += [*_routines(fold, columns, *tags), numbered, len(outer)]
    for k in range(3):
        plan += [axis[k] for axis in reversed(outer)]
    if columns:
        groups, work = total // inner * -(-inner // TILE), min(inner, TILE) * min(n, length)
    else:
        groups, work = -(-total // each), each * min(n, length)
    return np.array(plan, np.int64), groups * parts, max(work, 1), total, parts


def reduce(
    fold: Fold,
    x: Any,
    tags: tuple[str, str, str],
    out: Any = None,
    scalar: Any = 0,
    numbers: Any = None,
    work: float = 1,
) -> Any:
    """One number of each row, the last axis of x, into `out`, or without one into an array to be `numbers` with.

    tags: dtypes in which elements are read, states are kept and results are made. numbers: of the rows.
    """
    goal = (None, tags[2]) if out is None else (strides(out), dtype_name(out))
    plan, tasks, each, rows, parts = _planned(
        tuple(x.shape), strides(x), dtype_name(x), *goal, fold, tags, numbers is not None
    )
    if out is None:
        out = np.empty(rows + LANES, numpy_dtype(tags[2]))
    if not rows:
        return out
    scalars = np.array([scalar], numpy_dtype(tags[1]))
    states = np.empty(parts * (rows + LANES) * (1 + fold.indexed) if parts > 1 else 0, np.int64)
    given = [pointer(plan), pointer(scalars), pointer(x), pointer(out)]
    given += [pointer(numbers) if numbers is not None else 0, pointer(states)]
    parallel(_reduce, tasks, *given, minimum=max(1, int(_GRAIN / work) // each))
    if parts > 1:
        parallel(_conclude, -(-rows // _ROWS), *given, minimum=4)
    return out


@jit
def _field(plan, i):
    return load(_LONG, plan + 8 * i)


@jit
def _origin(plan, row, which):
    """Bytes from the first element of x (1) or out (2) to that of a row."""
    inner, outer = _field(plan, _INNER), _field(plan, _OUTER)
    place = row % inner * _field(plan, _X_INNER if which == 1 else _OUT_INNER)
    row //= inner
    for axis in range(outer):
        count = _field(plan, _OUTER + 1 + axis)
        place += row % count * _field(plan, _OUTER + 1 + which * outer + axis)
        row //= count
    return place


@jit
def _row(plan, x, first, count, acc, room, args, state, state_2):
    """One row's elements, so many from the first."""
    step, lies, x_step = _field(plan, _STEP), _field(plan, _LIES), _field(plan, _X_STEP)
    if lies or count == 0:
        call(step, count, acc, x + first * x_step, first, 1, args)
    else:
        bring, size = _field(plan, _BRING), _field(plan, _X_SIZE)
        for i in range(first, first + count, _PIECE):
            some = min(_PIECE, first + count - i)
            call(bring, some, room, x + i * x_step, size, x_step, 0)
            call(step, some, acc, room, i, i == first, args)
    call(_field(plan, _FOLD), 1, state, acc, state_2, LANES, args)


@jit
def _lines(plan, x, rows, first, count, acc, room, args, state, state_2):
    """So many elements of rows side by side."""
    step, x_step = _field(plan, _STEP), _field(plan, _X_STEP)
    store(_LONG, args + OLD, first + LANES)
    if _field(plan, _LIES) and rows % LANES == 0:
        store(_LONG, args + COUNT, count)
        call(step, rows, acc, x + first * x_step, x_step, first, args)
    else:
        bring, size, inner = _field(plan, _BRING), _field(plan, _X_SIZE), _field(plan, _X_INNER)
        for i in range(first, first + count, _PIECE // TILE):
            some = min(_PIECE // TILE, first + count - i)
            for j in range(some):
                call(bring, rows, room + j * TILE * size, x + (i + j) * x_step, size, inner, 0)
            store(_LONG, args + COUNT, some)
            call(step, rows, acc, room, TILE * size, i, args)
    call(_field(plan, _FOLD), rows, state, acc, state_2, min(count, LANES), args)


@jit
def _deliver(plan, row, rows, out, state, state_2, args, made):
    """The results of some rows, from the states of their chunks, to where they belong."""
    padded, parts = _field(plan, _TOTAL) + LANES, _field(plan, _PARTS)
    store(_LONG, args + STRIDE, padded * _field(plan, _S_SIZE))
    store(_LONG, args + STRIDE_2, padded * 8)
    call(_field(plan, _FINISH), rows, made, state, state_2, parts, args)
    size, inner, done = _field(plan, _OUT_SIZE), _field(plan, _INNER), 0
    while done < rows:
        some = min(rows - done, inner - (row + done) % inner)
        place = out + _origin(plan, row + done, 2)
        call(_field(plan, _DELIVER), some, place, made + done * size, _field(plan, _OUT_INNER), size, 0)
        done += some


@jit
def _of_rows(plan, row, numbers, args, zeros):
    """Tell routines where the numbers of rows lie."""
    store(_LONG, args + NUMBERS, numbers + row * _field(plan, _S_SIZE) if _field(plan, _NUMBERED) else zeros)


@jit
def _reduce(start, stop, plan, scalars, x, out, numbers, states):
    memory, (sums, pieces, few, some) = scratch(
        BYTE, ((2, SECOND), (1, 8 * _PIECE), (3, 8 * LANES), (4, 8 * (_ROWS + LANES)))
    )
    acc, room, args = at(sums, 0, 0), at(pieces, 0, 0), at(few, 0, 0)
    zeros, made = at(some, 0, 0), at(some, 1, 0)
    for i in range(_ROWS + LANES):
        store(_LONG, zeros + 8 * i, _LONG)
    store(_LONG, args + SCALAR, scalars)
    store(_LONG, args + SPARE, at(few, 1, 0))
    n, length, parts, inner = _field(plan, _N), _field(plan, _LENGTH), _field(plan, _PARTS), _field(plan, _INNER)
    size, total, columns = _field(plan, _S_SIZE), _field(plan, _TOTAL), _field(plan, _COLUMNS)
    tiles, each, padded = -(-inner // TILE), _field(plan, _EACH), total + LANES
    for task in range(start, stop):
        group, part = task // parts, task % parts
        first = part * length
        count = min(length, n - first)
        if columns:
            row = group // tiles * inner + group % tiles * TILE
            rows = min(TILE, inner - group % tiles * TILE)
        else:
            row = group * each
            rows = min(each, total - row)
        state, state_2 = at(some, 2, 0), at(some, 3, 0)
        if parts > 1:
            state, state_2 = states + (part * padded + row) * size, states + (parts + part) * padded * 8 + row * 8
        if columns:
            _of_rows(plan, row, numbers, args, zeros)
            _lines(plan, x + _origin(plan, row, 1), rows, first, count, acc, room, args, state, state_2)
        else:
            for i in range(rows):
                _of_rows(plan, row + i, numbers, args, zeros)
                place = x + _origin(plan, row + i, 1)
                _row(plan, place, first, count, acc, room, args, state + i * size, state_2 + i * 8)
        if parts == 1:
            _of_rows(plan, row, numbers, args, zeros)
            _deliver(plan, row, rows, out, state, state_2, args, made)
    return alive(memory)


@jit
def _conclude(start, stop, plan, scalars, x, out, numbers, states):
    """The results of `_ROWS` rows a task, of the states of their chunks."""
    memory, (few, some) = scratch(BYTE, ((1, 8 * LANES), (2, 8 * (_ROWS + LANES))))
    args, zeros, made = at(few, 0, 0), at(some, 0, 0), at(some, 1, 0)
    for i in range(_ROWS + LANES):
        store(_LONG, zeros + 8 * i, _LONG)
    store(_LONG, args + SCALAR, scalars)
    size, total, parts = _field(plan, _S_SIZE), _field(plan, _TOTAL), _field(plan, _PARTS)
    for task in range(start, stop):
        row = task * _ROWS
        _of_rows(plan, row, numbers, args, zeros)
        second = states + parts * (total + LANES) * 8 + row * 8
        _deliver(plan, row, min(_ROWS, total - row), out, states + row * size, second, args, made)
    return alive(memory)
