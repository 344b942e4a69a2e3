"""Root-mean-square normalisation on the CPU: a row is read for its squares and again, from cache, for the product."""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._rows import rows
from ._vectors import TAGS, cast, fma, lanes, load, rounded, size, store, vload, vsplat, vstore, vsum, wide

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True, batch_invariant=True)
def rms_norm(x: Any, weight: Any, eps: float, stepwise: bool, out: Any) -> None:
    """The weight is widened once for a run of rows; strided rows are gathered."""
    (*lead, n), (*steps, column), (*to, out_column) = x.shape, strides(x), strides(out)
    tag, item = TAGS[dtype_name(x)], out.itemsize
    weights = (tag, 0, 0) if weight is None else (TAGS[dtype_name(weight)], pointer(weight), strides(weight)[0])
    stepwise = stepwise and item == 2
    for (source, target), sizes, (x_steps, out_steps) in rows(lead if n else (0,), steps, to):
        parallel(
            _normalise, sizes[0] * sizes[1] * sizes[2], tag, n, sizes, pointer(x) + source * item, x_steps, column,
            pointer(out) + target * item, out_steps, out_column, *weights, float(eps), stepwise,
            minimum=-(-_GRAIN // n),
        )  # fmt: skip


@jit
def _normalise(
    start, stop, tag, n, sizes, x, x_steps, column, out, out_steps, out_column,
    weight_tag, weight, weight_step, eps, stepwise,
):  # fmt: skip
    real = wide(tag)
    item, unit = size(tag), size(real)
    held = np.empty(2 * n * unit + 128, np.uint8)
    factors = (np.int64(held.ctypes.data) + 63) & ~63
    row = factors + n * unit
    if weight != 0:
        for i in range(n):
            value = load(weight_tag, weight + i * weight_step * size(weight_tag))
            store(real, factors + i * unit, cast(real, value))
    else:
        factors = np.int64(0)
    for task in range(start, stop):
        rest, k = divmod(task, sizes[2])
        i, j = divmod(rest, sizes[1])
        source = x + (i * x_steps[0] + j * x_steps[1] + k * x_steps[2]) * item
        target = out + (i * out_steps[0] + j * out_steps[1] + k * out_steps[2]) * item
        direct = column == 1 and out_column == 1
        if not direct:
            for c in range(n):
                store(real, row + c * unit, load(tag, source + c * column * item))
        if stepwise:
            if direct:
                _steps(tag, tag, source, target, n, factors, eps)
            else:
                _steps(tag, real, row, row, n, factors, eps)
        elif direct:
            _row(tag, source, target, n, factors, eps)
        else:
            _row(real, row, row, n, factors, eps)
        if not direct:
            for c in range(n):
                store(tag, target + c * out_column * item, load(real, row + c * unit))
    return held[0]  # keeps the scratch alive until here


@jit
def _row(tag, source, target, n, factors, eps):
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    whole = n - n % step
    four = whole - whole % (4 * step)
    a = b = c = d = vsplat(real)
    for i in range(0, four, 4 * step):
        at = source + i * item
        p, q = vload(tag, at), vload(tag, at + step * item)
        a, b = fma(p, p, a), fma(q, q, b)
        p, q = vload(tag, at + 2 * step * item), vload(tag, at + 3 * step * item)
        c, d = fma(p, p, c), fma(q, q, d)
    for i in range(four, whole, step):
        p = vload(tag, source + i * item)
        a = fma(p, p, a)
    total = vsum(a + b + (c + d))
    for i in range(whole, n):
        value = load(tag, source + i * item)
        total += value * value
    root = cast(real, 1 / np.sqrt(total / cast(real, n) + cast(real, eps)))
    factor = vsplat(root)
    for i in range(0, whole, step):
        value = vload(tag, source + i * item) * factor
        if factors != 0:
            value = vload(real, factors + i * unit) * value
        vstore(tag, target + i * item, value)
    for i in range(whole, n):
        value = load(tag, source + i * item) * root
        if factors != 0:
            value = load(real, factors + i * unit) * value
        store(tag, target + i * item, value)


@jit
def _steps(tag, kept, source, target, n, factors, eps):
    """Each step rounded to the dtype of `tag`; rows are held in that of `kept`."""
    item, unit = size(kept), size(wide(tag))
    total = 0.0
    for i in range(n):
        value = load(kept, source + i * item)
        total += np.float64(rounded(tag, value * value))
    mean = rounded(tag, np.float32(total / n))
    root = rounded(tag, np.float32(1 / np.sqrt(np.float64(rounded(tag, mean + np.float32(eps))))))
    for i in range(n):
        value = rounded(tag, load(kept, source + i * item) * root)
        if factors != 0:
            value *= load(np.float32(0), factors + i * unit)
        store(kept, target + i * item, rounded(tag, value))
