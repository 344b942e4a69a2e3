"""What `_reduce` calls for rows: elements into accumulators, those into states, and states into results.

The names in capitals, and `step`, `merge` and `finish`, are those of the reduction that a body is compiled for.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from flagops.backends.numba import jit

from . import _ir
from ._routines import wide_words
from ._vectors import Vector, cast, load, size, store, vstore, where

LANES = 64
TILE = 128
"""Rows whose accumulators are held at once where rows lie side by side."""
SECOND = LANES * TILE * 8
"""Bytes from accumulators to those of indices."""
_LONG = np.int64(0)


many, read, numbered = wide_words(LANES)


@intrinsic
def halves(typingctx, vector):
    """The lower lanes and the upper ones."""
    half = Vector(vector.element, vector.lanes // 2)

    def generate(context, builder, signature, arguments):
        parts = [_ir.shuffle(builder, arguments[0], arguments[0], range(i, i + half.lanes)) for i in (0, half.lanes)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(half, 2)(vector), generate  # type: ignore[attr-defined]


# What routines read besides: the addresses of the scalar, of the rows' numbers and of room for a few elements; how many
# lines or chunks there are, the bytes from one to the next, of indices too; and from which line on sums are old ones.
SCALAR, NUMBERS, SPARE, COUNT, STRIDE, STRIDE_2, OLD, FIELDS = 0, 8, 16, 24, 32, 40, 48, 7


@jit
def _copied(tag, n, x, spare):
    """The last few elements where as many may be read as there are lanes."""
    for i in range(n):
        store(tag, spare + i * size(tag), load(tag, x + i * size(tag)))
    return spare


def _along(n, acc, x, first, fresh, more):
    """n elements side by side into the accumulators of their row."""
    a = many(load(S, load(_LONG, more + SCALAR)))
    p = many(load(S, load(_LONG, more + NUMBERS)))
    s = many(cast(S, START)) if fresh else read(S, acc)
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        s = step(s, read(X, x + i * X_SIZE), p, a)
    if whole < n:
        last = read(X, _copied(X, n - whole, x + whole * X_SIZE, load(_LONG, more + SPARE)))
        s = where(numbered(whole) < n, step(s, last, p, a), s)
    vstore(S, acc, s)
    return 0


def _along_indexed(n, acc, x, first, fresh, more):
    s = many(cast(S, START)) if fresh else read(S, acc)
    k = numbered(first) if fresh else read(_LONG, acc + SECOND)
    i = numbered(first)
    whole = n - n % LANES
    for j in range(0, whole, LANES):
        s, k = step(s, k, read(X, x + j * X_SIZE), i)
        i = i + LANES
    if whole < n:
        last = read(X, _copied(X, n - whole, x + whole * X_SIZE, load(_LONG, more + SPARE)))
        better, place = step(s, k, last, i)
        s, k = where(numbered(whole) < n, better, s), where(numbered(whole) < n, place, k)
    vstore(S, acc, s)
    vstore(_LONG, acc + SECOND, k)
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
    s, k = read(S, acc), read(_LONG, acc + SECOND)
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
    a = many(load(S, load(_LONG, more + SCALAR)))
    numbers = load(_LONG, more + NUMBERS)
    stop, old = first + load(_LONG, more + COUNT), load(_LONG, more + OLD)
    for i in range(first, stop):
        line, place = acc + i % LANES * (TILE * S_SIZE), x + (i - first) * x_step
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
    stop, old = first + load(_LONG, more + COUNT), load(_LONG, more + OLD)
    for i in range(first, stop):
        line, place = acc + i % LANES * (TILE * S_SIZE), x + (i - first) * x_step
        line_2 = acc + SECOND + i % LANES * (TILE * 8)
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
            line, other = acc + r * (TILE * S_SIZE), acc + (r + half) * (TILE * S_SIZE)
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
            line, other = acc + r * (TILE * S_SIZE), acc + (r + half) * (TILE * S_SIZE)
            line_2, other_2 = acc + SECOND + r * (TILE * 8), acc + SECOND + (r + half) * (TILE * 8)
            for c in range(0, w, LANES):
                s, k = read(S, line + c * S_SIZE), read(_LONG, line_2 + c * 8)
                s, k = merge(s, k, read(S, other + c * S_SIZE), read(_LONG, other_2 + c * 8))
                vstore(S, line + c * S_SIZE, s)
                vstore(_LONG, line_2 + c * 8, k)
        half //= 2
    for c in range(w):
        store(S, state + c * S_SIZE, load(S, acc + c * S_SIZE))
        store(_LONG, state_2 + c * 8, load(_LONG, acc + SECOND + c * 8))
    return 0


def _finish(w, out, state, state_2, chunks, more):
    """The states of the chunks of w rows into their results."""
    a = many(load(S, load(_LONG, more + SCALAR)))
    numbers, stride = load(_LONG, more + NUMBERS), load(_LONG, more + STRIDE)
    for c in range(0, w, LANES):
        s = read(S, state + c * S_SIZE)
        for j in range(1, chunks):
            s = merge(s, read(S, state + j * stride + c * S_SIZE))
        vstore(OUT, out + c * OUT_SIZE, finish(s, read(S, numbers + c * S_SIZE), a))
    return 0


def _finish_indexed(w, out, state, state_2, chunks, more):
    stride, stride_2 = load(_LONG, more + STRIDE), load(_LONG, more + STRIDE_2)
    for c in range(0, w, LANES):
        s, k = read(S, state + c * S_SIZE), read(_LONG, state_2 + c * 8)
        for j in range(1, chunks):
            s, k = merge(s, k, read(S, state + j * stride + c * S_SIZE), read(_LONG, state_2 + j * stride_2 + c * 8))
        vstore(OUT, out + c * OUT_SIZE, k)
    return 0


BODIES = {
    (False, False): (_along, _fold_row, _finish),
    (False, True): (_along_indexed, _fold_row_indexed, _finish_indexed),
    (True, False): (_across, _fold_lines, _finish),
    (True, True): (_across_indexed, _fold_lines_indexed, _finish_indexed),
}
"""By whether rows lie side by side, and whether there is an index."""
