"""Rotary embedding on the CPU: ``x cos + swapped x sin`` on whole vectors, the angles spread out once a position.

Bound by bytes where a position has few heads, by operations (three an element) where its rows stay in cache. The sines
take the sign of the turn, and with it that of each lane, when they are spread out, so that a vector needs one product
and one fused multiply-add.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._rotary import frequencies
from ._blocks import Block, alive, at, copy, get, of_task, place, put, scratch, shifted, vget, vput, walk
from ._gemm import empty
from ._vectors import FLOAT32, TAGS, fma, lanes, load_index, vswap, wide

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True)
def rotary_embedding(x: Any, cos: Any, sin: Any, inverse: bool, out: Any) -> None:
    """Positions are shared out among threads; all heads of one use its angles from cache."""
    (*lead, heads, d), r = out.shape, cos.shape[-1]
    same = pointer(x) == pointer(out) and strides(x) == strides(out)
    for sizes, arrays in walk(lead if heads * d else (0,), (2, 1, 1, 2), x, cos, sin, out):
        parallel(
            _rotate, math.prod(sizes), TAGS[dtype_name(x)], sizes, heads, d, r, inverse, same, *arrays,
            minimum=-(-_GRAIN // (heads * d)),
        )  # fmt: skip


@jit
def _rotate(start, stop, tag, sizes, heads, d, r, inverse, same, x, cos, sin, out):
    real, step = wide(tag), lanes(tag)
    kept = d - 2 * r
    column, out_column = x[2][1], out[2][1]
    memory, (c, s) = scratch(real, ((2 * r, 1), (2 * r, 1)))
    whole = 2 * r - 2 * r % step if column == 1 and out_column == 1 else 0
    for task in range(start, stop):
        cosines = of_task(real, cos, sizes, task)
        sines = of_task(real, sin, sizes, task)
        for p in range(r):
            cosine, sine = get(cosines, p, 0), -get(sines, p, 0) if inverse else get(sines, p, 0)
            put(c, 2 * p, 0, cosine)
            put(c, 2 * p + 1, 0, cosine)
            put(s, 2 * p, 0, -sine)
            put(s, 2 * p + 1, 0, sine)
        rows, results = of_task(tag, x, sizes, task), of_task(tag, out, sizes, task)
        for h in range(heads):
            source, target = Block(tag, at(rows, h, 0), column), Block(tag, at(results, h, 0), out_column)
            if not same:
                copy(source, target, kept)
            source, target = shifted(source, kept, 0), shifted(target, kept, 0)
            for p in range(0, whole, step):
                value = vget(source, p, 0)
                vput(target, p, 0, fma(vswap(value), vget(s, p, 0), value * vget(c, p, 0)))
            for p in range(whole, 2 * r, 2):
                a, b = get(source, p, 0), get(source, p + 1, 0)
                cosine, sine = get(c, p, 0), get(s, p + 1, 0)
                put(target, p, 0, a * cosine - b * sine)
                put(target, p + 1, 0, a * sine + b * cosine)
    return alive(memory)


def rotary_embedding_backward(
    grad: Any, x: Any, cos: Any, sin: Any, inverse: bool, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    """The gradient of `x` is rotated back; angles that are trained, or more of them than rows, are for torch."""
    if any(needs[1:]) or tuple(grad.shape) != tuple(x.shape):
        return NotImplemented
    found = empty(grad, grad.shape)
    rotary_embedding(grad, cos, sin, not inverse, found)
    return found, None, None


@kernel(deterministic=True)
def yarn_table(
    positions: Any,
    dim: int,
    base: float,
    factor: float,
    original: float,
    beta_fast: float,
    beta_slow: float,
    out: Any,
) -> None:
    """Sines and cosines in float64, rounded once."""
    theta = frequencies(dim, base, factor, original, beta_fast, beta_slow)
    for sizes, arrays in walk(positions.shape if dim else (0,), (0, 1, 1), positions, *out):
        parallel(_table, math.prod(sizes), sizes, theta, positions.itemsize, *arrays, minimum=-(-4096 // dim))


@jit
def _table(start, stop, sizes, theta, item, positions, cos, sin):
    for task in range(start, stop):
        position = np.float32(load_index(positions[0] + place(task, sizes, positions[1]) * item, item))
        cosines = of_task(FLOAT32, cos, sizes, task)
        sines = of_task(FLOAT32, sin, sizes, task)
        for p in range(theta.size):
            angle = np.float64(np.float32(position * theta[p]))
            put(cosines, p, 0, np.float32(math.cos(angle)))
            put(sines, p, 0, np.float32(math.sin(angle)))
