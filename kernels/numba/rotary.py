"""Rotary embedding on the CPU: ``x cos + swapped x sin`` on whole vectors, the angles spread out once a position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._rotary import frequencies
from .._rows import rows, spread
from ._vectors import TAGS, cast, fma, lanes, load, load_index, size, store, vload, vstore, vswap, wide

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True)
def rotary_embedding(x: Any, cos: Any, sin: Any, inverse: bool, out: Any) -> None:
    """Positions are shared out among threads; all heads of one use its angles from cache."""
    (*lead, heads, d), r, item = out.shape, cos.shape[-1], out.itemsize
    by_row = [spread(t.shape, strides(t), len(lead), kept) for t, kept in ((x, 2), (cos, 1), (sin, 1), (out, 2))]
    *_, x_head, x_step = strides(x)
    *_, out_head, out_step = strides(out)
    same = pointer(x) == pointer(out) and strides(x) == strides(out)
    angles = [pointer(cos), pointer(sin)]
    unit = cos.itemsize
    for offsets, sizes, (x_steps, cos_steps, sin_steps, out_steps) in rows(lead if heads * d else (0,), *by_row):
        parallel(
            _rotate, sizes[0] * sizes[1] * sizes[2], TAGS[dtype_name(x)], sizes, heads, d, r, inverse, same,
            pointer(x) + offsets[0] * item, x_steps, x_head, x_step,
            angles[0] + offsets[1] * unit, cos_steps, strides(cos)[-1],
            angles[1] + offsets[2] * unit, sin_steps, strides(sin)[-1],
            pointer(out) + offsets[3] * item, out_steps, out_head, out_step,
            minimum=-(-_GRAIN // (heads * d)),
        )  # fmt: skip


@jit
def _rotate(
    start, stop, tag, sizes, heads, d, r, inverse, same,
    x, x_steps, x_head, x_step, cos, cos_steps, cos_step, sin, sin_steps, sin_step, out, out_steps, out_head, out_step,
):  # fmt: skip
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    first = d - 2 * r
    held = np.empty(4 * r * unit + 128, np.uint8)
    c = (np.int64(held.ctypes.data) + 63) & ~63
    s = c + 2 * r * unit
    whole = 2 * r - 2 * r % step if x_step == 1 and out_step == 1 else 0
    sign = cast(real, -1.0 if inverse else 1.0)
    for task in range(start, stop):
        rest, k = divmod(task, sizes[2])
        i, j = divmod(rest, sizes[1])
        at_cos = cos + (i * cos_steps[0] + j * cos_steps[1] + k * cos_steps[2]) * unit
        at_sin = sin + (i * sin_steps[0] + j * sin_steps[1] + k * sin_steps[2]) * unit
        for p in range(r):
            value = load(real, at_cos + p * cos_step * unit)
            store(real, c + 2 * p * unit, value)
            store(real, c + (2 * p + 1) * unit, value)
            value = load(real, at_sin + p * sin_step * unit) * sign
            store(real, s + 2 * p * unit, -value)
            store(real, s + (2 * p + 1) * unit, value)
        for h in range(heads):
            source = x + (i * x_steps[0] + j * x_steps[1] + k * x_steps[2] + h * x_head) * item
            target = out + (i * out_steps[0] + j * out_steps[1] + k * out_steps[2] + h * out_head) * item
            if not same:
                _copy(tag, source, x_step, target, out_step, first)
            source += first * x_step * item
            target += first * out_step * item
            for p in range(0, whole, step):
                value = vload(tag, source + p * item)
                turned = fma(vswap(value), vload(real, s + p * unit), value * vload(real, c + p * unit))
                vstore(tag, target + p * item, turned)
            for p in range(whole, 2 * r, 2):
                a, b = load(tag, source + p * x_step * item), load(tag, source + (p + 1) * x_step * item)
                cosine, sine = load(real, c + p * unit), load(real, s + (p + 1) * unit)
                store(tag, target + p * out_step * item, a * cosine - b * sine)
                store(tag, target + (p + 1) * out_step * item, a * sine + b * cosine)
    return held[0]  # keeps the scratch alive until here


@jit
def _copy(tag, source, x_step, target, out_step, count):
    item, step = size(tag), lanes(tag)
    whole = count - count % step if x_step == 1 and out_step == 1 else 0
    for p in range(0, whole, step):
        vstore(tag, target + p * item, vload(tag, source + p * item))
    for p in range(whole, count):
        store(tag, target + p * out_step * item, load(tag, source + p * x_step * item))


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
    cos, sin = out
    lead = [strides(t)[: positions.ndim] for t in (positions, cos, sin)]
    item = positions.itemsize
    for offsets, sizes, (steps, cos_steps, sin_steps) in rows(positions.shape if dim else (0,), *lead):
        parallel(
            _table, sizes[0] * sizes[1] * sizes[2], sizes, theta,
            pointer(positions) + offsets[0] * item, steps, item,
            pointer(cos) + offsets[1] * 4, cos_steps, strides(cos)[-1],
            pointer(sin) + offsets[2] * 4, sin_steps, strides(sin)[-1],
            minimum=-(-4096 // dim),
        )  # fmt: skip


@jit
def _table(
    start, stop, sizes, theta, positions, steps, item, cos, cos_steps, cos_step, sin, sin_steps, sin_step
):  # fmt: skip
    real = np.float32(0)
    for task in range(start, stop):
        rest, k = divmod(task, sizes[2])
        i, j = divmod(rest, sizes[1])
        position = np.float32(load_index(positions + (i * steps[0] + j * steps[1] + k * steps[2]) * item, item))
        to_cos = cos + (i * cos_steps[0] + j * cos_steps[1] + k * cos_steps[2]) * 4
        to_sin = sin + (i * sin_steps[0] + j * sin_steps[1] + k * sin_steps[2]) * 4
        for p in range(theta.size):
            angle = np.float64(np.float32(position * theta[p]))
            store(real, to_cos + p * cos_step * 4, np.float32(math.cos(angle)))
            store(real, to_sin + p * sin_step * 4, np.float32(math.sin(angle)))
