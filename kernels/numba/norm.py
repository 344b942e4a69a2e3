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

from ._blocks import Block, alive, at, get, of_task, pack, put, round_up, scratch, unpack, vget, vput, walk
from ._gemm import contract, empty, ones, view
from ._vectors import TAGS, cast, fma, lanes, rounded, vsplat, vsum, wide

_GRAIN = 1 << 15  # elements worth a thread
_RUNS = 32  # of rows, each with sums of its own for the gradient of the weight


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
    real = wide(tag)
    memory, (factors, row) = scratch(real, ((n, 1), (n, 1)))
    weights = Block(*weight)
    if weights.base != 0:
        for i in range(n):
            put(factors, i, 0, cast(real, get(weights, i, 0)))
    else:
        factors = Block(real, weights.base, 1)
    for task in range(start, stop):
        source, target = of_task(tag, x, sizes, task), of_task(tag, out, sizes, task)
        if source.row == 1 and target.row == 1:
            if stepwise:
                _steps(tag, source, target, n, factors, eps)
            else:
                _row(source, target, n, factors, eps)
        else:
            for i in range(n):
                put(row, i, 0, get(source, i, 0))
            if stepwise:
                _steps(tag, row, row, n, factors, eps)
            else:
                _row(row, row, n, factors, eps)
            for i in range(n):
                put(target, i, 0, get(row, i, 0))
    return alive(memory)


@jit
def _row(x, out, n, factors, eps):
    real, step = wide(x.tag), lanes(x.tag)
    whole = n - n % step
    four = whole - whole % (4 * step)
    a = b = c = d = vsplat(real)
    for i in range(0, four, 4 * step):
        p, q = vget(x, i, 0), vget(x, i + step, 0)
        a, b = fma(p, p, a), fma(q, q, b)
        p, q = vget(x, i + 2 * step, 0), vget(x, i + 3 * step, 0)
        c, d = fma(p, p, c), fma(q, q, d)
    for i in range(four, whole, step):
        p = vget(x, i, 0)
        a = fma(p, p, a)
    total = vsum(a + b + (c + d))
    for i in range(whole, n):
        total += get(x, i, 0) * get(x, i, 0)
    root = cast(real, 1 / np.sqrt(total / cast(real, n) + cast(real, eps)))
    for i in range(0, whole, step):
        value = vget(x, i, 0) * root
        vput(out, i, 0, vget(factors, i, 0) * value if factors.base != 0 else value)
    for i in range(whole, n):
        value = get(x, i, 0) * root
        put(out, i, 0, get(factors, i, 0) * value if factors.base != 0 else value)


@jit
def _steps(tag, x, out, n, factors, eps):
    """Each step rounded to the dtype of `tag`."""
    total = 0.0
    for i in range(n):
        value = get(x, i, 0)
        total += np.float64(rounded(tag, value * value))
    mean = rounded(tag, np.float32(total / n))
    root = rounded(tag, np.float32(1 / np.sqrt(np.float64(rounded(tag, mean + np.float32(eps))))))
    for i in range(n):
        value = rounded(tag, get(x, i, 0) * root)
        if factors.base != 0:
            value *= get(factors, i, 0)
        put(out, i, 0, rounded(tag, value))


def rms_norm_backward(
    grad: Any, x: Any, weight: Any, eps: float, stepwise: bool, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    """A row of both is widened once; the roundings of a stepwise call are passed through."""
    *lead, n = x.shape
    if not math.prod(x.shape):
        return NotImplemented
    tag, real = TAGS[dtype_name(x)], "float64" if dtype_name(x) == "float64" else "float32"
    factors = (tag, 0, 0) if weight is None else (TAGS[dtype_name(weight)], pointer(weight), strides(weight)[0])
    found, sums = empty(x, x.shape), []
    for sizes, arrays in walk(lead, (1, 1, 1), grad, x, found):
        rows = math.prod(sizes)
        sums.append(np.zeros((min(_RUNS, rows), n), real))
        minimum = -(-_GRAIN // (n * -(-rows // len(sums[-1]))))
        parallel(
            _slope, len(sums[-1]), tag, n, rows, len(sums[-1]), sizes, *arrays, factors, float(eps), pointer(sums[-1]),
            minimum=minimum,
        )  # fmt: skip
    of_weight = None
    if weight is not None and needs[1]:
        of_weight, parts = empty(weight, weight.shape), np.concatenate(sums)
        contract(real, ones(real, len(parts)), view(parts), view(of_weight), result=dtype_name(weight))
    return found if needs[0] else None, of_weight


@jit
def _slope(start, stop, tag, n, rows, runs, sizes, grad, x, out, weight, eps, sums):
    """The gradients of runs of rows, and what they add to that of the weight."""
    real, step = wide(tag), lanes(tag)
    padded, longest = round_up(n, step), -(-rows // runs)
    memory, (factors, slope, row, total) = scratch(real, ((1, padded), (1, padded), (1, padded), (1, padded)))
    weights = Block(*weight)
    for i in range(padded):
        put(factors, 0, i, cast(real, get(weights, i, 0)) if weights.base != 0 and i < n else cast(real, 1.0))
    for run in range(start, stop):
        for i in range(0, padded, step):
            vput(total, 0, i, vsplat(real))
        for task in range(run * longest, min((run + 1) * longest, rows)):
            for side, block in ((grad, slope), (x, row)):
                source = of_task(tag, side, sizes, task)
                pack(tag, source.base, (0, source.row), (1, n), block, (1, padded))
            squares = products = vsplat(real)
            for i in range(0, padded, step):
                value = vget(row, 0, i)
                squares = fma(value, value, squares)
                products = fma(vget(slope, 0, i) * vget(factors, 0, i), value, products)
            root = cast(real, 1 / np.sqrt(vsum(squares) / cast(real, n) + cast(real, eps)))
            inward = vsum(products) * root * root / cast(real, n)
            for i in range(0, padded, step):
                value, given = vget(row, 0, i), vget(slope, 0, i)
                vput(total, 0, i, fma(given * value, root, vget(total, 0, i)))
                vput(row, 0, i, (given * vget(factors, 0, i) - value * inward) * root)
            target = of_task(tag, out, sizes, task)
            unpack(tag, row, (1, n), target.base, (0, target.row))
        unpack(real, total, (1, n), at(Block(real, sums, n), run, 0), (0, 1))
    return alive(memory)
