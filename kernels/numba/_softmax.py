"""The online softmax of attention on the CPU: scores of a block of keys, their weights, and the values they add up.

A line of scores belongs to one query or head; `tops` and `masses` hold, for each, the maximum so far and the sum of
exp(score - maximum). Earlier sums are scaled whenever a block brings a new maximum.
"""

from __future__ import annotations

import math

import numpy as np

from flagops.backends.numba import jit

from ._blocks import get, put, shifted, vget, vput
from ._functions import exp
from ._tiles import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    OUTER_ROWS,
    OUTER_VECTORS,
    ROW_VECTORS,
    dot_row,
    dot_tile,
    outer_row,
    outer_tile,
)
from ._vectors import cast, lanes, maximum, rounded, vhighest, vsplat, vsum, wide

KEYS = 96
"""Keys of a block: with values of 512 channels they take 200 KiB in float32, which leave room beside them in L2."""
PAD = 16
"""Elements behind each row: rows a power of two apart would share few sets of a cache."""
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
def soften(tag, p, found, scale, tops, masses, sums, width, fresh):
    """The first line of scores to probabilities relative to the running maximum, in place."""
    real, step = p.tag, lanes(p.tag)
    if scale != 1:
        for j in range(0, found, step):
            vput(p, 0, j, vget(p, 0, j) * scale)
    for j in range(found, -(-found // step) * step):
        put(p, 0, j, -np.inf)
    before = get(tops, 0, 0)
    highest = vsplat(before)
    for j in range(0, found, step):
        highest = maximum(highest, vget(p, 0, j))
    after = vhighest(highest)
    put(tops, 0, 0, after)
    base = after if after > -np.inf or after != after else wide(real)  # -inf - -inf would be NaN
    total = vsplat(wide(real))
    for j in range(0, found, step):
        exact = exp(vget(p, 0, j) - base)
        total += exact
        vput(p, 0, j, rounded(tag, exact))
    fade = cast(real, 1.0 if before == base else math.exp(np.float64(before) - np.float64(base)))
    put(masses, 0, 0, get(masses, 0, 0) * fade + vsum(total))
    if not fresh and fade != 1:
        for j in range(0, width, step):
            vput(sums, 0, j, vget(sums, 0, j) * fade)


@jit
def finish(sums, seen, top, mass, width, target):
    """The first line of sums / mass into a vector; 0 where nothing was seen, NaN where every score was -inf."""
    step = lanes(sums.tag)
    if seen == 0:
        for j in range(width):
            put(target, j, 0, 0.0)
        return
    first, second = mass, 1.0
    if mass > 1e30:  # beyond float32, perhaps: divide twice by the root
        first = second = math.sqrt(mass)
    if top == -np.inf:
        first = np.nan
    for j in range(0, width, step):
        result = vget(sums, 0, j) / first / second
        if target.row == 1 and j + step <= width:
            vput(target, j, 0, result)
        else:
            vput(sums, 0, j, result)
            for c in range(j, min(j + step, width)):
                put(target, c, 0, get(sums, 0, c))
