"""One number of each row: the loop over memory of every reduction, whatever strides and dtypes.

Bound by memory. The order is the same for every layout, batch and number of threads: a row is cut into at most
`CHUNKS` chunks, of which element i goes to accumulator i % LANES; accumulators are folded by halves, then chunks in
their order. Where a row lies side by side its accumulators are the lanes of a vector. Where the rows do, a vector holds
one accumulator of many rows, and all of them stay in the cache.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import math
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flagops.arrays import dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides

from .. import _folds
from . import _functions, _ir, _vectors
from ._blocks import alive, at, scratch
from ._ir import STORAGE, TAGS, i64, storage
from ._routines import call, mover, routine
from ._vectors import BYTE, Vector, cast, load, size, store, vstore, where

LANES = 64
CHUNKS = 64
_CHUNK = 4096  # elements of a chunk at least
_TILE = 128  # rows whose accumulators are held at once where rows lie side by side
_PIECE = 4096  # elements that are brought elsewhere at once
_ROWS = 512  # of one task
_GRAIN = 1 << 15  # elements worth a thread
_LONG = np.int64(0)
_SECOND = LANES * _TILE * 8  # bytes from accumulators to those of indices


class Fold(NamedTuple):
    """A reduction: the state of no element, and its functions in `_folds`.

    indexed: the state has the index of the element too.
    """

    start: Any
    step: str
    merge: str
    finish: str = "same"
    indexed: bool = False


@intrinsic
def many(typingctx, value):
    """A number in every lane."""

    def generate(context, builder, signature, arguments):
        return _ir.splat(builder, arguments[0], LANES)

    return Vector(value, LANES)(value), generate


@intrinsic
def read(typingctx, tag, address):
    """As many elements as there are lanes."""

    def generate(context, builder, signature, arguments):
        return _ir.load(builder, tag, arguments[1], lanes=LANES)

    return Vector(storage(tag).arithmetic, LANES)(tag, types.int64), generate


@intrinsic
def numbered(typingctx, first):
    """first, first + 1, ... in the lanes."""

    def generate(context, builder, signature, arguments):
        steps = ir.Constant(ir.VectorType(i64, LANES), list(range(LANES)))
        return builder.add(_ir.splat(builder, arguments[0], LANES), steps)

    return Vector(types.int64, LANES)(types.int64), generate


@intrinsic
def halves(typingctx, vector):
    """The lower lanes and the upper ones."""
    half = Vector(vector.element, vector.lanes // 2)

    def generate(context, builder, signature, arguments):
        parts = [_ir.shuffle(builder, arguments[0], arguments[0], range(i, i + half.lanes)) for i in (0, half.lanes)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(half, 2)(vector), generate


# What routines read besides: the addresses of the scalar, of the rows' numbers and of room for a few elements; how many
# lines or chunks there are, the bytes from one to the next, of indices too; and from which line on sums are old ones.
_SCALAR, _NUMBERS, _SPARE, _COUNT, _STRIDE, _STRIDE_2, _OLD, _FIELDS = 0, 8, 16, 24, 32, 40, 48, 7


@jit
def _copied(tag, n, x, spare):
    """The last few elements where as many may be read as there are lanes."""
    for i in range(n):
        store(tag, spare + i * size(tag), load(tag, x + i * size(tag)))
    return spare


def _along(n, acc, x, first, fresh, more):
    """n elements side by side into the accumulators of their row."""
    a = many(load(S, load(_LONG, more + _SCALAR)))
    p = many(load(S, load(_LONG, more + _NUMBERS)))
    s = many(cast(S, START)) if fresh else read(S, acc)
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        s = step(s, read(X, x + i * X_SIZE), p, a)
    if whole < n:
        last = read(X, _copied(X, n - whole, x + whole * X_SIZE, load(_LONG, more + _SPARE)))
        s = where(numbered(whole) < n, step(s, last, p, a), s)
    vstore(S, acc, s)
    return 0


def _along_indexed(n, acc, x, first, fresh, more):
    s = many(cast(S, START)) if fresh else read(S, acc)
    k = numbered(first) if fresh else read(_LONG, acc + _SECOND)
    i = numbered(first)
    whole = n - n % LANES
    for j in range(0, whole, LANES):
        s, k = step(s, k, read(X, x + j * X_SIZE), i)
        i = i + LANES
    if whole < n:
        last = read(X, _copied(X, n - whole, x + whole * X_SIZE, load(_LONG, more + _SPARE)))
        better, place = step(s, k, last, i)
        s, k = where(numbered(whole) < n, better, s), where(numbered(whole) < n, place, k)
    vstore(S, acc, s)
    vstore(_LONG, acc + _SECOND, k)
    return 0


def _fold_row(n, state, acc, state_2, lines, more):
    """The accumulators of a row into its state."""
    a = halves(read(S, acc))
    b = halves(merge(a[0], a[1]))
    c = halves(merge(b[0], b[1]))
    d = halves(merge(c[0], c[1]))
    e = halves(merge(d[0], d[1]))
    f = halves(merge(e[0], e[1]))
    vstore(S, state, merge(f[0], f[1]))
    return 0


def _fold_row_indexed(n, state, acc, state_2, lines, more):
    s, k = read(S, acc), read(_LONG, acc + _SECOND)
    a, i = halves(s), halves(k)
    s2, k2 = merge(a[0], i[0], a[1], i[1])
    a2, i2 = halves(s2), halves(k2)
    s3, k3 = merge(a2[0], i2[0], a2[1], i2[1])
    a3, i3 = halves(s3), halves(k3)
    s4, k4 = merge(a3[0], i3[0], a3[1], i3[1])
    a4, i4 = halves(s4), halves(k4)
    s5, k5 = merge(a4[0], i4[0], a4[1], i4[1])
    a5, i5 = halves(s5), halves(k5)
    s6, k6 = merge(a5[0], i5[0], a5[1], i5[1])
    a6, i6 = halves(s6), halves(k6)
    s7, k7 = merge(a6[0], i6[0], a6[1], i6[1])
    vstore(S, state, s7)
    vstore(_LONG, state_2, k7)
    return 0


def _across(w, acc, x, x_step, first, more):
    """Lines of w elements, one of each row, into the accumulators of those rows."""
    a = many(load(S, load(_LONG, more + _SCALAR)))
    numbers = load(_LONG, more + _NUMBERS)
    stop, old = first + load(_LONG, more + _COUNT), load(_LONG, more + _OLD)
    for i in range(first, stop):
        line, place = acc + i % LANES * (_TILE * S_SIZE), x + (i - first) * x_step
        if i < old:
            for c in range(0, w, LANES):
                p = read(S, numbers + c * S_SIZE)
                vstore(S, line + c * S_SIZE, step(many(cast(S, START)), read(X, place + c * X_SIZE), p, a))
        else:
            for c in range(0, w, LANES):
                p = read(S, numbers + c * S_SIZE)
                vstore(S, line + c * S_SIZE, step(read(S, line + c * S_SIZE), read(X, place + c * X_SIZE), p, a))
    return 0


def _across_indexed(w, acc, x, x_step, first, more):
    stop, old = first + load(_LONG, more + _COUNT), load(_LONG, more + _OLD)
    for i in range(first, stop):
        line, place = acc + i % LANES * (_TILE * S_SIZE), x + (i - first) * x_step
        line_2 = acc + _SECOND + i % LANES * (_TILE * 8)
        for c in range(0, w, LANES):
            s = many(cast(S, START)) if i < old else read(S, line + c * S_SIZE)
            k = many(i) if i < old else read(_LONG, line_2 + c * 8)
            s, k = step(s, k, read(X, place + c * X_SIZE), many(i))
            vstore(S, line + c * S_SIZE, s)
            vstore(_LONG, line_2 + c * 8, k)
    return 0


def _fold_lines(w, state, acc, state_2, lines, more):
    """The accumulators of w rows, of which so many lines are used, into their states."""
    half = LANES // 2
    while half:
        for r in range(min(half, lines - half)):
            line, other = acc + r * (_TILE * S_SIZE), acc + (r + half) * (_TILE * S_SIZE)
            for c in range(0, w, LANES):
                s = read(S, line + c * S_SIZE)
                vstore(S, line + c * S_SIZE, merge(s, read(S, other + c * S_SIZE)))
        half //= 2
    for c in range(w):
        store(S, state + c * S_SIZE, load(S, acc + c * S_SIZE))
    return 0


def _fold_lines_indexed(w, state, acc, state_2, lines, more):
    half = LANES // 2
    while half:
        for r in range(min(half, lines - half)):
            line, other = acc + r * (_TILE * S_SIZE), acc + (r + half) * (_TILE * S_SIZE)
            line_2, other_2 = acc + _SECOND + r * (_TILE * 8), acc + _SECOND + (r + half) * (_TILE * 8)
            for c in range(0, w, LANES):
                s, k = read(S, line + c * S_SIZE), read(_LONG, line_2 + c * 8)
                s, k = merge(s, k, read(S, other + c * S_SIZE), read(_LONG, other_2 + c * 8))
                vstore(S, line + c * S_SIZE, s)
                vstore(_LONG, line_2 + c * 8, k)
        half //= 2
    for c in range(w):
        store(S, state + c * S_SIZE, load(S, acc + c * S_SIZE))
        store(_LONG, state_2 + c * 8, load(_LONG, acc + _SECOND + c * 8))
    return 0


def _finish(w, out, state, state_2, chunks, more):
    """The states of the chunks of w rows into their results."""
    a = many(load(S, load(_LONG, more + _SCALAR)))
    numbers, stride = load(_LONG, more + _NUMBERS), load(_LONG, more + _STRIDE)
    for c in range(0, w, LANES):
        s = read(S, state + c * S_SIZE)
        for j in range(1, chunks):
            s = merge(s, read(S, state + j * stride + c * S_SIZE))
        vstore(OUT, out + c * OUT_SIZE, finish(s, read(S, numbers + c * S_SIZE), a))
    return 0


def _finish_indexed(w, out, state, state_2, chunks, more):
    stride, stride_2 = load(_LONG, more + _STRIDE), load(_LONG, more + _STRIDE_2)
    for c in range(0, w, LANES):
        s, k = read(S, state + c * S_SIZE), read(_LONG, state_2 + c * 8)
        for j in range(1, chunks):
            s, k = merge(s, k, read(S, state + j * stride + c * S_SIZE), read(_LONG, state_2 + j * stride_2 + c * 8))
        vstore(OUT, out + c * OUT_SIZE, k)
    return 0


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


_BODIES = {
    (False, False): (_along, _fold_row, _finish),
    (False, True): (_along_indexed, _fold_row_indexed, _finish_indexed),
    (True, False): (_across, _fold_lines, _finish),
    (True, True): (_across_indexed, _fold_lines_indexed, _finish_indexed),
}
"""By whether rows lie side by side, and whether there is an index."""


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
        for body in _BODIES[columns, fold.indexed]
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
        groups, work = total // inner * -(-inner // _TILE), min(inner, _TILE) * min(n, length)
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
    store(_LONG, args + _OLD, first + LANES)
    if _field(plan, _LIES) and rows % LANES == 0:
        store(_LONG, args + _COUNT, count)
        call(step, rows, acc, x + first * x_step, x_step, first, args)
    else:
        bring, size, inner = _field(plan, _BRING), _field(plan, _X_SIZE), _field(plan, _X_INNER)
        for i in range(first, first + count, _PIECE // _TILE):
            some = min(_PIECE // _TILE, first + count - i)
            for j in range(some):
                call(bring, rows, room + j * _TILE * size, x + (i + j) * x_step, size, inner, 0)
            store(_LONG, args + _COUNT, some)
            call(step, rows, acc, room, _TILE * size, i, args)
    call(_field(plan, _FOLD), rows, state, acc, state_2, min(count, LANES), args)


@jit
def _deliver(plan, row, rows, out, state, state_2, args, made):
    """The results of some rows, from the states of their chunks, to where they belong."""
    padded, parts = _field(plan, _TOTAL) + LANES, _field(plan, _PARTS)
    store(_LONG, args + _STRIDE, padded * _field(plan, _S_SIZE))
    store(_LONG, args + _STRIDE_2, padded * 8)
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
    store(_LONG, args + _NUMBERS, numbers + row * _field(plan, _S_SIZE) if _field(plan, _NUMBERED) else zeros)


@jit
def _reduce(start, stop, plan, scalars, x, out, numbers, states):
    memory, (sums, pieces, few, some) = scratch(
        BYTE, ((2, _SECOND), (1, 8 * _PIECE), (3, 8 * LANES), (4, 8 * (_ROWS + LANES)))
    )
    acc, room, args = at(sums, 0, 0), at(pieces, 0, 0), at(few, 0, 0)
    zeros, made = at(some, 0, 0), at(some, 1, 0)
    for i in range(_ROWS + LANES):
        store(_LONG, zeros + 8 * i, _LONG)
    store(_LONG, args + _SCALAR, scalars)
    store(_LONG, args + _SPARE, at(few, 1, 0))
    n, length, parts, inner = _field(plan, _N), _field(plan, _LENGTH), _field(plan, _PARTS), _field(plan, _INNER)
    size, total, columns = _field(plan, _S_SIZE), _field(plan, _TOTAL), _field(plan, _COLUMNS)
    tiles, each, padded = -(-inner // _TILE), _field(plan, _EACH), total + LANES
    for task in range(start, stop):
        group, part = task // parts, task % parts
        first = part * length
        count = min(length, n - first)
        if columns:
            row = group // tiles * inner + group % tiles * _TILE
            rows = min(_TILE, inner - group % tiles * _TILE)
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
    store(_LONG, args + _SCALAR, scalars)
    size, total, parts = _field(plan, _S_SIZE), _field(plan, _TOTAL), _field(plan, _PARTS)
    for task in range(start, stop):
        row = task * _ROWS
        _of_rows(plan, row, numbers, args, zeros)
        second = states + parts * (total + LANES) * 8 + row * 8
        _deliver(plan, row, min(_ROWS, total - row), out, states + row * size, second, args, made)
    return alive(memory)
