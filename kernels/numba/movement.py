"""Elements moved: bound by memory, and by the order in which it is met."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from ._blocks import place, walk
from ._elementwise import transfer
from ._indexed import bits_of
from ._numbers import convert
from ._routines import call, mover
from ._vectors import TAGS, load, size, store

_GRAIN = 1 << 15  # elements worth a thread
_LONG, _BYTE = np.int64(0), np.uint8(0)


@kernel(deterministic=True, batch_invariant=True)
def copy(x: Any, dtype: str, out: Any) -> None:
    """Elements moved, and brought to another dtype on the way."""
    transfer(out, x)


@kernel(deterministic=True, batch_invariant=True)
def flip(x: Any, axes: int, out: Any) -> None:
    """The way through memory turned round."""
    if 0 in x.shape:
        return
    own, kept = strides(x), max(0, len(x.shape) - axes)
    steps = (*own[:kept], *(-step for step in own[kept:]))
    transfer(out, x, steps, sum((n - 1) * step for n, step in zip(x.shape[kept:], own[kept:], strict=True)))


@kernel(deterministic=True, batch_invariant=True)
def tril(x: Any, diagonal: int, out: Any) -> None:
    """A row is moved up to the diagonal, and cleared behind it."""
    _triangle(x, diagonal + 1, True, out)


@kernel(deterministic=True, batch_invariant=True)
def triu(x: Any, diagonal: int, out: Any) -> None:
    """A row is cleared up to the diagonal, and moved behind it."""
    _triangle(x, diagonal, False, out)


def _triangle(x: Any, shift: int, lower: bool, out: Any) -> None:
    *lead, m, n = out.shape
    bits, nothing = bits_of(x), np.zeros(1, np.int64)
    shift = max(-m, min(shift, n))
    for sizes, arrays in walk(lead if m * n else (0,), (2, 2), x, out):
        parallel(
            _split, math.prod(sizes) * m, mover(bits, bits), m, n, shift, lower, x.itemsize, pointer(nothing), sizes,
            *arrays, minimum=max(1, _GRAIN // n),
        )  # fmt: skip


@jit
def _split(start, stop, move, m, n, shift, lower, item, nothing, sizes, x, out):
    for task in range(start, stop):
        batch, row = divmod(task, m)
        middle = max(0, min(n, row + shift))
        source = x[0] + (place(batch, sizes, x[1]) + row * x[2][0]) * item
        target = out[0] + (place(batch, sizes, out[1]) + row * out[2][0]) * item
        step, there = x[2][1] * item, out[2][1] * item
        kept, count = (0, middle) if lower else (middle, n - middle)
        if source != target:
            call(move, count, target + kept * there, source + kept * step, there, step, 0)
        call(move, n - count, target + (middle - kept) * there, nothing, there, 0, 0)


@kernel(deterministic=True)
def arange(start: Any, step: Any, n: int, dtype: str, out: Any) -> None:
    """Each number by its place."""
    _ramp(start, step, n, dtype, False, out)


@kernel(deterministic=True)
def linspace(start: Any, end: Any, n: int, dtype: str, out: Any) -> None:
    """Each number from the nearer end."""
    _ramp(start, end, n, dtype, True, out)


def _ramp(start: Any, other: Any, n: int, dtype: str, ends: bool, out: Any) -> None:
    tags = TAGS[dtype_name(start)], TAGS["float64" if dtype in FLOATS else "int64"], TAGS[dtype]
    parallel(
        _numbers, n, *tags, n, ends, pointer(start), pointer(other), pointer(out), strides(out)[0], minimum=_GRAIN
    )  # fmt: skip


@jit
def _numbers(begin, stop, given, real, tag, n, ends, start, other, out, out_step):
    first, last = convert(real, load(given, start)), convert(real, load(given, other))
    step, half = last, n
    if ends:
        step, half = convert(real, (last - first) / max(n - 1, 1)), (n + 1) // 2
    for i in range(begin, stop):
        value = first + step * convert(real, i) if i < half else last - step * convert(real, n - 1 - i)
        store(tag, out + i * out_step * size(tag), convert(tag, value))


_PART = 1 << 14  # elements of a mask that are counted together


@kernel(deterministic=True)
def nonzero(mask: Any, out: tuple[Any, Any]) -> None:
    """Parts are counted, then written where the ones before end."""
    places, count = out
    (n,), parts = mask.shape, -(-mask.shape[0] // _PART)
    counts, step = np.zeros(parts, np.int64), strides(mask)[0]
    listed = pointer(places), strides(places)[0], pointer(count)
    parallel(_count, parts, n, pointer(mask), step, counts, minimum=2)
    parallel(_list, max(1, parts), n, pointer(mask), step, counts, *listed, minimum=2)


@jit
def _count(start, stop, n, mask, step, counts):
    for part in range(start, stop):
        found = 0
        for i in range(part * _PART, min(n, (part + 1) * _PART)):
            found += load(_BYTE, mask + i * step) != 0
        counts[part] = found


@jit
def _list(start, stop, n, mask, step, counts, places, places_step, count):
    total = counts.sum()
    if start == 0:
        store(_LONG, count, total)
    for part in range(start, stop):
        at, unset = counts[:part].sum(), total
        unset += part * _PART - at  # as many places behind the last are this part's to clear
        for i in range(part * _PART, min(n, (part + 1) * _PART)):
            if load(_BYTE, mask + i * step) != 0:
                store(_LONG, places + 8 * at * places_step, i)
                at += 1
            else:
                store(_LONG, places + 8 * unset * places_step, -1)
                unset += 1
