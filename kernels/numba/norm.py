"""Root-mean-square normalisation on the CPU: a row is read for its squares and again, from cache, for the product.

Bound by bytes: a row costs one read and one write of memory, and some four operations an element. Four sums of squares
run side by side, which hides the latency of fused multiply-adds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from ._blocks import Block, alive, get, origin, pack, put, scratch, unpack, vget, vput, walk
from ._vectors import TAGS, cast, fma, lanes, rounded, vsplat, vsum, wide

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True, batch_invariant=True)
def rms_norm(x: Any, weight: Any, eps: float, stepwise: bool, out: Any) -> None:
    """The weight is widened once for a run of rows; strided rows are gathered."""
    *lead, n = x.shape
    tag = TAGS[dtype_name(x)]
    factors = (tag, 0, 0) if weight is None else (TAGS[dtype_name(weight)], pointer(weight), strides(weight)[0])
    stepwise = stepwise and out.itemsize == 2
    for sizes, (source, target) in walk(lead if n else (0,), (1, 1), x, out):
        parallel(
            _normalise, math.prod(sizes), tag, n, sizes, source, target, factors, float(eps), stepwise,
            minimum=-(-_GRAIN // n),
        )  # fmt: skip


@jit
def _normalise(start, stop, tag, n, sizes, x, out, weight, eps, stepwise):
    real, shape = wide(tag), (1, n)
    memory, (factors, row) = scratch(real, (shape, shape))
    weights = Block(*weight)
    if weights.base != 0:
        for i in range(n):
            put(factors, 0, i, cast(real, get(weights, i, 0)))
    else:
        factors = Block(real, np.int64(0), n)
    (column,), (out_column,) = x[2], out[2]
    direct = column == 1 and out_column == 1
    for task in range(start, stop):
        source, target = origin(tag, x, sizes, task), origin(tag, out, sizes, task)
        if direct:
            here, there = Block(tag, source, n), Block(tag, target, n)
            if stepwise:
                _steps(tag, here, there, n, factors, eps)
            else:
                _row(here, there, n, factors, eps)
        else:
            pack(tag, source, (0, column), shape, row, shape)
            if stepwise:
                _steps(tag, row, row, n, factors, eps)
            else:
                _row(row, row, n, factors, eps)
            unpack(tag, row, shape, target, (0, out_column))
    return alive(memory)


@jit
def _row(x, out, n, factors, eps):
    real, step = wide(x.tag), lanes(x.tag)
    whole = n - n % step
    four = whole - whole % (4 * step)
    a = b = c = d = vsplat(real)
    for i in range(0, four, 4 * step):
        p, q = vget(x, 0, i), vget(x, 0, i + step)
        a, b = fma(p, p, a), fma(q, q, b)
        p, q = vget(x, 0, i + 2 * step), vget(x, 0, i + 3 * step)
        c, d = fma(p, p, c), fma(q, q, d)
    for i in range(four, whole, step):
        p = vget(x, 0, i)
        a = fma(p, p, a)
    total = vsum(a + b + (c + d))
    for i in range(whole, n):
        total += get(x, 0, i) * get(x, 0, i)
    root = cast(real, 1 / np.sqrt(total / cast(real, n) + cast(real, eps)))
    for i in range(0, whole, step):
        value = vget(x, 0, i) * root
        vput(out, 0, i, vget(factors, 0, i) * value if factors.base != 0 else value)
    for i in range(whole, n):
        value = get(x, 0, i) * root
        put(out, 0, i, get(factors, 0, i) * value if factors.base != 0 else value)


@jit
def _steps(tag, x, out, n, factors, eps):
    """Each step rounded to the dtype of `tag`."""
    total = 0.0
    for i in range(n):
        value = get(x, 0, i)
        total += np.float64(rounded(tag, value * value))
    mean = rounded(tag, np.float32(total / n))
    root = rounded(tag, np.float32(1 / np.sqrt(np.float64(rounded(tag, mean + np.float32(eps))))))
    for i in range(n):
        value = rounded(tag, get(x, 0, i) * root)
        if factors.base != 0:
            value *= get(factors, 0, i)
        put(out, 0, i, rounded(tag, value))
