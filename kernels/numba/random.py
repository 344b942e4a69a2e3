"""Random numbers by counters, bound by operations: each block of four words is made where its numbers are written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flagops.reference.random import DIGITS

from flagops.arrays import FLOATS, dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from ._blocks import get, of_task, put, walk
from ._numbers import convert
from ._philox import block_of
from ._vectors import TAGS, load, size, store

_GRAIN = 1 << 10  # blocks worth a thread
_INT64, _FLOAT64 = np.int64(0), np.float64(0)
_UNIT = 2.0**-32
_TURN = 2 * math.pi
_WHOLE = np.uint64(32)


@kernel(deterministic=True)
def uniform(state: Any, n: int, low: float, high: float, dtype: str, out: Any) -> None:
    """The upper bits of a word each, of float64 of two."""
    digits, each = DIGITS[dtype], 2 if dtype == "float64" else 4
    scale, span = 2.0**-digits, float(high) - float(low)
    _run(_uniform, each, state, n, out, np.uint64((64 if each == 2 else 32) - digits), float(low), span * scale)


@kernel(deterministic=True)
def normal(state: Any, n: int, mean: float, std: float, dtype: str, out: Any) -> None:
    """Two from two words."""
    _run(_normal, 4, state, n, out, float(mean), float(std), 0.0)


@kernel(deterministic=True)
def exponential(state: Any, n: int, rate: float, dtype: str, out: Any) -> None:
    """One from a word."""
    _run(_exponential, 4, state, n, out, float(rate), 0.0, 0.0)


@kernel(deterministic=True)
def random(state: Any, n: int, low: int, count: int, dtype: str, out: Any) -> None:
    """One from two words."""
    through = TAGS["float64" if dtype in FLOATS else "int64"]
    _run(_random, 2, state, n, out, np.int64(low), np.uint64(count), through)


def _run(loop: Any, each: int, state: Any, n: int, out: Any, *numbers: Any) -> None:
    """A loop over blocks that give `each` numbers."""
    lies = pointer(out), strides(out)[0] * out.itemsize
    steps = pointer(state), strides(state)[0]
    parallel(loop, -(-n // each), TAGS[dtype_name(out)], n, *steps, *lies, *numbers, minimum=_GRAIN)


@jit
def _state(state, step):
    return load(_INT64, state), load(_INT64, state + 8 * step)


@jit
def _uniform(start, stop, tag, n, state, state_step, out, step, shift, low, scale):
    seed, offset = _state(state, state_step)
    for block in range(start, stop):
        a, b, c, d = block_of(block, seed, offset)
        if size(tag) == 8:
            words, each = (a | b << _WHOLE, c | d << _WHOLE, c, d), 2
        else:
            words, each = (a, b, c, d), 4
        for i in range(min(each, n - each * block)):
            value = low + np.float64(words[i] >> shift) * scale
            store(tag, out + (each * block + i) * step, convert(tag, value))


@jit
def _normal(start, stop, tag, n, state, state_step, out, step, mean, std, unused):
    seed, offset = _state(state, state_step)
    for block in range(start, stop):
        words = block_of(block, seed, offset)
        for i in range(min(4, n - 4 * block)):
            first, second = words[i & 2], words[(i & 2) + 1]
            radius = math.sqrt(-2.0 * math.log((np.float64(first) + 0.5) * _UNIT))
            angle = _TURN * ((np.float64(second) + 0.5) * _UNIT)
            value = mean + std * (radius * (math.sin(angle) if i & 1 else math.cos(angle)))
            store(tag, out + (4 * block + i) * step, convert(tag, value))


@jit
def _exponential(start, stop, tag, n, state, state_step, out, step, rate, unused, unused_too):
    seed, offset = _state(state, state_step)
    for block in range(start, stop):
        words = block_of(block, seed, offset)
        for i in range(min(4, n - 4 * block)):
            value = -math.log((np.float64(words[i]) + 0.5) * _UNIT) / rate
            store(tag, out + (4 * block + i) * step, convert(tag, value))


@jit
def _random(start, stop, tag, n, state, state_step, out, step, low, count, through):
    seed, offset = _state(state, state_step)
    for block in range(start, stop):
        a, b, c, d = block_of(block, seed, offset)
        words = a | b << _WHOLE, c | d << _WHOLE
        for i in range(min(2, n - 2 * block)):
            word = words[i] % count if count > 0 else words[i]
            value = convert(through, np.int64(word) + low)
            store(tag, out + (2 * block + i) * step, convert(tag, value))


@kernel(deterministic=True, batch_invariant=True)
def pick(weights: Any, draws: Any, out: Any) -> None:
    """A task for each row, whose sums are made once."""
    *lead, m = out.shape
    n, tag = weights.shape[-1], TAGS[dtype_name(weights)]
    for sizes, arrays in walk(lead if m else (0,), (1, 1, 1), weights, draws, out):
        parallel(_pick, math.prod(sizes), tag, n, m, sizes, *arrays, minimum=max(1, 4 * _GRAIN // n))


@jit
def _pick(start, stop, tag, n, m, sizes, weights, draws, out):
    sums = np.empty(n, np.float64)
    for task in range(start, stop):
        given, drawn = of_task(tag, weights, sizes, task), of_task(_FLOAT64, draws, sizes, task)
        listed, total = of_task(_INT64, out, sizes, task), 0.0
        for i in range(n):
            total += np.float64(get(given, i, 0))
            sums[i] = total
        for j in range(m):
            put(listed, j, 0, np.searchsorted(sums, get(drawn, j, 0) * total, side="right"))
