"""Integers of eight bits on the CPU: rows quantised as vectors of float32, and products with exact sums of 32 bits.

One row is bound by the bytes of the weights, many by operations. Vectors run along K, in which weights lie side by
side; activations are widened once for a block of rows, where two products make one sum, and weights as they are read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, threads
from flagops.registry import kernel

from ._blocks import (
    Block,
    alive,
    at,
    clear,
    get,
    laid,
    of_task,
    pack,
    put,
    round_up,
    scratch,
    shifted,
    unpack,
    vget,
    walk,
)
from ._formats import INFINITY
from ._gemm import PAIR_DEPTH, SERIAL, UNIT, _axis, _offsets, dot_rows, task_columns, view
from ._ir import QUADS
from ._numbers import convert, round_even
from ._tiles import DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_ROWS, DOT_WIDTH
from ._vectors import (
    BYTE,
    FLOAT32,
    INT32,
    TAGS,
    bits,
    from_bits,
    lanes,
    load,
    maximum,
    minimum,
    size,
    store,
    vhighest,
    vsplat,
    vstore,
)

_GRAIN = 1 << 16  # elements worth a thread
_INT8 = TAGS["int8"]
_FACTOR = TAGS["int8" if QUADS else "int16"]  # what activations are multiplied as
_STEP = 128  # elements that every factor's vectors divide
_LARGEST, _LEAST, _NAN = np.float32(127), np.float32(2.0**-126), np.float32(np.nan)
_ROWS = 64  # of a block: so many of PAIR_DEPTH stay in L2
_A, _A_SCALE, _OUT = range(3)  # of what the offsets of a row are


@kernel(deterministic=True, batch_invariant=True)
def int8_quantize(x: Any, out: tuple[Any, Any]) -> None:
    """Rows are gathered as float32, in which they are read again."""
    *lead, width = x.shape
    for sizes, rows in walk(lead, (1, 1, 1), x, *out):
        tasks = math.prod(sizes)
        parallel(_quantize, tasks, TAGS[dtype_name(x)], sizes, width, *rows, minimum=-(-_GRAIN // max(width, 1)))


@jit
def _quantize(start, stop, tag, sizes, width, x, codes, scales):
    (column,), (codes_column,) = x[2], codes[2]
    padded = round_up(width, _STEP)
    memory, (values,) = scratch(FLOAT32, ((1, padded),))
    apart, (made,) = scratch(BYTE, ((1, padded),))
    for row in range(start, stop):
        source, target = of_task(tag, x, sizes, row), of_task(BYTE, codes, sizes, row)
        pack(tag, source.base, (0, column), (1, width), values, (1, padded))
        put(of_task(FLOAT32, scales, sizes, row), 0, 0, _encode(values, padded, made))
        unpack(BYTE, made, (1, width), target.base, (0, codes_column))
    return alive(memory, apart)


@jit
def _encode(values, padded, made):
    """The codes of a row of whole vectors, and its scale; as integers NaN and infinity are above all magnitudes."""
    highest = vsplat(INT32)
    for i in range(0, padded, lanes(FLOAT32)):
        highest = maximum(highest, bits(abs(vget(values, 0, i))))
    top = np.int64(vhighest(highest))
    if top >= INFINITY:
        clear(BYTE, made.base, padded)
        return _NAN
    scale = max(from_bits(FLOAT32, top) / _LARGEST, _LEAST)
    for i in range(0, padded, lanes(FLOAT32)):
        value = minimum(maximum(round_even(vget(values, 0, i) / scale), -_LARGEST), _LARGEST)
        vstore(_INT8, at(made, 0, i), convert(_INT8, value))
    return scale


@kernel(deterministic=True, batch_invariant=True, note="sums of 32 bits, by one instruction where there is one")
def int8_matmul(a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: str, out: Any) -> None:
    """Sums of integers have no order, so that blocks may be of any size."""
    (n, k), given = b.shape, [view(x) for x in (a, a_scale, out)]
    axes = [
        (given[2].shape[-i], *(_axis(x.shape, x.strides, i)[1] for x in given))
        for i in range(len(given[2].shape), 1, -1)
    ]
    offsets = _offsets(axes)
    m = len(offsets)
    if not (m and n):
        return
    count = threads() if m * n * k > SERIAL else 1
    mc = min(m, _ROWS)
    down = -(-m // mc)
    nc = task_columns(n, down, count, UNIT)
    tasks = down * -(-n // nc)
    parallel(
        _multiply, tasks, TAGS[dtype], m, n, k, mc, nc, offsets,
        *((x.address, x.strides[-1]) for x in given), laid(b), laid(b_scale), minimum=1 if count > 1 else tasks,
    )  # fmt: skip


@jit
def _multiply(start, stop, tag, m, n, k, mc, nc, offsets, a, a_scale, out, b, b_scale):
    """Few rows read B where it lies, unless its columns are apart or its depth leaves part of a vector."""
    (base, row_step, column_step), parts = b, max(1, -(-k // PAIR_DEPTH))
    memory, (x,) = scratch(_FACTOR, ((mc + DOT_ROWS, PAIR_DEPTH),))
    further, (panel, row) = scratch(_INT8, ((DOT_ROW_COLUMNS, PAIR_DEPTH), (1, PAIR_DEPTH)))
    apart, (sums,) = scratch(INT32, ((mc + DOT_ROWS, nc + DOT_WIDTH),))
    across = -(-n // nc)
    for task in range(start, stop):
        first, column = task // across * mc, task % across * nc
        rows, columns = min(mc, m - first), min(nc, n - column)
        wide = DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
        for part in range(parts):
            depth = min(PAIR_DEPTH, k - part * PAIR_DEPTH)
            padded = round_up(depth, _STEP)
            for i in range(rows):
                source = a[0] + offsets[first + i, _A] + part * PAIR_DEPTH * a[1]
                pack(_INT8, source, (0, a[1]), (1, depth), row, (1, padded))
                for c in range(0, padded, lanes(_INT8)):
                    vstore(_FACTOR, at(x, i, c), convert(_FACTOR, vget(row, 0, c)))
            for j in range(0, columns, wide):
                valid, w = min(wide, columns - j), panel
                right = base + (column + j) * row_step + part * PAIR_DEPTH * column_step
                if column_step == 1 and depth == padded:
                    w = Block(_INT8, right, row_step)
                else:
                    pack(_INT8, right, (row_step, column_step), (valid, depth), panel, (valid, padded))
                dot_rows(x, w, rows, valid, padded, shifted(sums, 0, j), part > 0)
        _leave(tag, sums, rows, columns, column, offsets[first:], a_scale, b_scale, out)
    return alive(memory, further, apart)


@jit
def _leave(tag, sums, rows, columns, column, offsets, a_scale, b_scale, out):
    """Sums times the scales of their rows, then those of their columns."""
    (scales, scale_step, _), (target, step) = b_scale, out
    count = lanes(FLOAT32)
    whole = columns - columns % count if step == 1 and scale_step == 1 else 0
    for i in range(rows):
        factor = load(FLOAT32, a_scale[0] + offsets[i, _A_SCALE] * size(FLOAT32))
        goal = target + (offsets[i, _OUT] + column * step) * size(tag)
        for j in range(0, whole, count):
            value = convert(FLOAT32, vget(sums, i, j)) * factor
            other = Block(FLOAT32, scales + (column + j) * size(FLOAT32), 0)
            vstore(tag, goal + j * size(tag), value * vget(other, 0, 0))
        for j in range(whole, columns):
            value = convert(FLOAT32, get(sums, i, j)) * factor
            other = load(FLOAT32, scales + (column + j) * scale_step * size(FLOAT32))
            store(tag, goal + j * step * size(tag), value * other)
