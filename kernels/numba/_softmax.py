"""The online softmax of attention on the CPU: scores of a block of keys, their weights, and the values they add up.

A line of scores belongs to one query or head; `tops` and `masses` hold, for each, the maximum so far and the sum of
exp(score - maximum). Earlier sums are scaled whenever a block brings a new maximum.
"""

from __future__ import annotations

import math

import numpy as np

from flagops.backends.numba import jit

from ._blocks import get, put, round_up, shifted, vget, vput
from ._functions import exp
from ._tiles import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    NARROW_ROWS,
    NARROW_VECTORS,
    OUTER_ROWS,
    OUTER_VECTORS,
    ROW_VECTORS,
    dot_row,
    dot_tile,
    narrow_tile,
    narrow_turned,
    outer_row,
    outer_tile,
    outer_turned,
)
from ._vectors import below, cast, fma, higher, lanes, rounded, vhigher, vsplat, vsum, where, wide

KEYS = 96
"""Keys of a block: with values of 512 channels they take 200 KiB in float32, which leave room beside them in L2."""
PAD = 16
"""Elements behind each row: rows a power of two apart would share few sets of a cache."""
STRIP = max(OUTER_ROWS, NARROW_ROWS)
"""Rows that any tile divides."""
_FEW = 3  # rows for which one by one is faster than a tile that they do not fill


@jit
def panels(real, rows, width, keys):
    """Shapes of x, sums, scores, tops and masses for so many rows, with room for tiles that reach beyond."""
    across = max(2 * OUTER_VECTORS, ROW_VECTORS) * lanes(real)  # what a tile, or a row alone, writes past the width
    padded, ld = rows + OUTER_ROWS + DOT_ROWS, -(-width // across) * across + PAD
    return (padded, ld), (padded, ld), (padded, keys + PAD), (padded, 1), (padded, 1)


@jit
def score(x, keys, count, found, width, p):
    """p[count, found] = x[count, width] keys[found, width]^T"""
    step = lanes(x.tag)
    depth = -(-width // step) * step
    tiled = count - count % DOT_ROWS if count % DOT_ROWS < _FEW else count
    for j in range(0, found if tiled else 0, DOT_COLUMNS):
        valid = min(DOT_COLUMNS, found - j)
        for i in range(0, tiled, DOT_ROWS):
            dot_tile(shifted(x, i, 0), shifted(keys, j, 0), valid, depth, shifted(p, i, j), False)
    for i in range(tiled, count):
        for j in range(0, found, DOT_ROW_COLUMNS):
            valid = min(DOT_ROW_COLUMNS, found - j)
            dot_row(shifted(x, i, 0), shifted(keys, j, 0), valid, depth, shifted(p, i, j), False)


@jit
def add_values(p, values, count, found, width, sums, add):
    """sums[count, width] (+)= p[count, found] values[found, width]"""
    step = lanes(p.tag)
    tiled = count - count % OUTER_ROWS if count % OUTER_ROWS < _FEW else count
    for j in range(0, width if tiled else 0, OUTER_VECTORS * step):
        for i in range(0, tiled, OUTER_ROWS):
            outer_tile(shifted(p, i, 0), shifted(values, 0, j), found, shifted(sums, i, j), add)
    for i in range(tiled, count):
        for j in range(0, width, ROW_VECTORS * step):
            outer_row(shifted(p, i, 0), shifted(values, 0, j), found, shifted(sums, i, j), add)


@jit
def multiply(a, b, rows, depth, columns, c, add):
    """c[rows, columns] (+)= a[rows, depth] b[depth, columns], where tiles may reach beyond the rows and columns."""
    across, narrow = OUTER_VECTORS * lanes(c.tag), NARROW_VECTORS * lanes(c.tag)
    for j in range(0, columns, across):
        right, goal = shifted(b, 0, j), shifted(c, 0, j)
        if columns - j > narrow:
            for i in range(0, rows, OUTER_ROWS):
                outer_tile(shifted(a, i, 0), right, depth, shifted(goal, i, 0), add)
        else:
            for i in range(0, rows, NARROW_ROWS):
                narrow_tile(shifted(a, i, 0), right, depth, shifted(goal, i, 0), add)


@jit
def multiply_turned(a, b, rows, depth, columns, c, add):
    """As `multiply` with the transpose of a[depth, rows]."""
    across, narrow = OUTER_VECTORS * lanes(c.tag), NARROW_VECTORS * lanes(c.tag)
    for j in range(0, columns, across):
        right, goal = shifted(b, 0, j), shifted(c, 0, j)
        if columns - j > narrow:
            for i in range(0, rows, OUTER_ROWS):
                outer_turned(shifted(a, 0, i), right, depth, shifted(goal, i, 0), add)
        else:
            for i in range(0, rows, NARROW_ROWS):
                narrow_turned(shifted(a, 0, i), right, depth, shifted(goal, i, 0), add)


@jit
def soften(tag, p, counts, deep, scale, tops, masses, sums, width, fresh):
    """Lines of scores, of which as many count as `counts` says, to weights relative to the highest times the scale so
    far, in place; zeros from there to `deep`."""
    real, step = p.tag, lanes(p.tag)
    factor, nothing = cast(real, scale), vsplat(wide(real))
    for i in range(len(counts)):  # all lines, since what is looked for in one takes long, and in several no longer
        whole = counts[i] - counts[i] % step
        before = get(tops, i, 0)
        highest = vsplat(before)
        for j in range(0, whole, step):
            highest = higher(vget(p, i, j) * factor, highest)
        if whole < counts[i]:
            highest = higher(where(below(real, counts[i] - whole), vget(p, i, whole) * factor, -np.inf), highest)
        after = vhigher(highest)
        put(tops, i, 0, after)
        if not fresh and before != after:
            fade = exp(before - after)
            put(masses, i, 0, get(masses, i, 0) * fade)
            for j in range(0, width, step):
                vput(sums, i, j, vget(sums, i, j) * fade)
    for i in range(len(counts)):
        whole, top = counts[i] - counts[i] % step, get(tops, i, 0)
        base, total = top if top > -np.inf else wide(real), nothing  # -inf - -inf would be NaN
        for j in range(0, whole, step):
            exact = exp(fma(vget(p, i, j), factor, -base))
            total += exact
            vput(p, i, j, rounded(tag, exact))
        if whole < counts[i]:
            exact = exp(fma(vget(p, i, whole), factor, -base))
            exact = where(below(real, counts[i] - whole), exact, 0.0)
            total += exact
            vput(p, i, whole, rounded(tag, exact))
        for j in range(round_up(counts[i], step), deep, step):
            vput(p, i, j, nothing)
        put(masses, i, 0, vsum(total) if fresh else get(masses, i, 0) + vsum(total))


@jit
def finish(sums, seen, top, mass, width, target):
    """The first line of sums / mass into a vector; 0 where nothing was seen, NaN where every score was -inf."""
    real, step = sums.tag, lanes(sums.tag)
    if seen == 0:
        for j in range(width):
            put(target, j, 0, 0.0)
        return
    inverse, again = 1 / mass, 1.0
    if mass > 1e30:  # beyond float32, perhaps: by the root, twice
        inverse = again = 1 / math.sqrt(mass)
    if top == -np.inf:
        inverse = np.nan
    first, second = cast(real, inverse), cast(real, again)
    for j in range(0, width, step):
        result = vget(sums, 0, j) * first * second
        if target.row == 1 and j + step <= width:
            vput(target, j, 0, result)
        else:
            vput(sums, 0, j, result)
            for c in range(j, min(j + step, width)):
                put(target, c, 0, get(sums, 0, c))
