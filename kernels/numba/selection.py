"""Elements by their order, by whole numbers of the same order: a row is sorted digit by digit, and what is asked of
its first few alone is a threshold that most elements do not pass.

Sorting is bound by the places that digits lead to; choosing by reading each element once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from ._blocks import get, of_task, place, put, walk
from ._elementwise import transfer
from ._indexed import bits_of
from ._numbers import convert
from ._vectors import TAGS, load, ordered, size, store

_GRAIN = 1 << 12  # elements worth a thread
_SHORT = 32  # elements that are inserted one by one
_DIGIT = 8  # bits
_INT64, _FLOAT64, _BOOL = np.int64(0), np.float64(0), np.bool_(False)
_LAST = np.int64(2**63 - 1)


def _key_bits(dtype: str) -> int:
    """Of the whole numbers that stand for a dtype's elements."""
    return 64 if dtype in ("float64", "int64") else 32


@kernel(deterministic=True, batch_invariant=True)
def sort(x: Any, descending: bool, out: tuple[Any, Any]) -> None:
    """A task for each row, with room for its keys twice."""
    _chosen(x, x.shape[-1], descending, out)


@kernel(deterministic=True, batch_invariant=True)
def topk(x: Any, k: int, largest: bool, out: tuple[Any, Any]) -> None:
    """A task for each row, with room for a few times k keys."""
    if k:
        _chosen(x, k, largest, out)


def _chosen(x: Any, k: int, descending: bool, out: tuple[Any, Any]) -> None:
    *lead, n = x.shape
    dtype = dtype_name(x)
    room = n if 4 * k >= n else max(4 * k, k + 256)
    room = min(room, n)
    for sizes, arrays in walk(lead if n else (0,), (1, 1, 1), x, *out):
        parallel(
            _select, math.prod(sizes), TAGS[dtype], TAGS[bits_of(x)], _key_bits(dtype), n, k, room,
            descending, sizes, *arrays, minimum=-(-_GRAIN // n),
        )  # fmt: skip


@jit
def _key(bits, turned, value):
    """A whole number of so many bits in the order of the elements, or against it; that of NaN is the highest."""
    number = ordered(value)
    if value != value:
        number = np.int64((1 << (bits - 1)) - 1)
    return ~number if turned else number


@jit
def _select(start, stop, tag, moved, bits, n, k, room, descending, sizes, x, values, indices):
    keys, places = np.empty(room, np.int64), np.empty(room, np.int64)
    spare, spare_places = np.empty(room, np.int64), np.empty(room, np.int64)
    for task in range(start, stop):
        source = of_task(tag, x, sizes, task)
        count, limit = 0, _LAST
        for i in range(n):
            key = _key(bits, descending, get(source, i, 0))
            if count < k or key < limit:
                if count == room:
                    _order(keys, places, spare, spare_places, count, bits)
                    count, limit = k, keys[k - 1]
                    if key >= limit:
                        continue
                keys[count], places[count] = key, i
                count += 1
        _order(keys, places, spare, spare_places, count, bits)
        origin, goal = of_task(moved, x, sizes, task), of_task(moved, values, sizes, task)
        listed = of_task(_INT64, indices, sizes, task)
        for i in range(k):
            put(goal, i, 0, get(origin, places[i], 0))
            put(listed, i, 0, places[i])
    return keys[0]


@jit
def _order(keys, places, spare, spare_places, count, bits):
    """Sort keys, and what belongs to them, by the digits in which they differ; equal ones keep their order."""
    if count <= _SHORT:
        for i in range(1, count):
            key, where, j = keys[i], places[i], i
            while j > 0 and keys[j - 1] > key:
                keys[j], places[j] = keys[j - 1], places[j - 1]
                j -= 1
            keys[j], places[j] = key, where
        return
    every, some = keys[0], keys[0]
    for i in range(count):
        every &= keys[i]
        some |= keys[i]
    ends = np.empty(1 << _DIGIT, np.int64)
    mask, swapped = (1 << _DIGIT) - 1, False
    a, b, c, d = keys, places, spare, spare_places
    for shift in range(0, bits, _DIGIT):
        if ((every ^ some) >> shift) & mask == 0:
            continue
        flip = 1 << (_DIGIT - 1) if shift + _DIGIT == bits else 0  # the sign
        ends[:] = 0
        for i in range(count):
            ends[((a[i] >> shift) & mask) ^ flip] += 1
        total = 0
        for digit in range(mask + 1):
            total, ends[digit] = total + ends[digit], total
        for i in range(count):
            digit = ((a[i] >> shift) & mask) ^ flip
            c[ends[digit]], d[ends[digit]] = a[i], b[i]
            ends[digit] += 1
        a, b, c, d = c, d, a, b
        swapped = not swapped
    if swapped:
        keys[:count], places[:count] = spare[:count], spare_places[:count]


@kernel(deterministic=True, batch_invariant=True)
def searchsorted(boundaries: Any, x: Any, right: bool, out: Any) -> None:
    """Each element halves the boundaries until one place is left."""
    *lead, m = out.shape
    n, tag = boundaries.shape[-1], TAGS[dtype_name(x)]
    for sizes, arrays in walk(lead if m else (0,), (1, 1, 1), boundaries, x, out):
        parallel(_search, math.prod(sizes) * m, tag, n, m, right, sizes, *arrays, minimum=_GRAIN // 4)


@jit
def _search(start, stop, tag, n, m, right, sizes, boundaries, x, out):
    for task in range(start, stop):
        row, i = divmod(task, m)
        sides, given = of_task(tag, boundaries, sizes, row), of_task(tag, x, sizes, row)
        value, low, high = get(given, i, 0), 0, n
        while low < high:
            middle = (low + high) // 2
            side = get(sides, middle, 0)
            if not (side > value if right else side >= value):
                low = middle + 1
            else:
                high = middle
        put(of_task(_INT64, out, sizes, row), i, 0, low)


@kernel(deterministic=True, batch_invariant=True)
def isin(x: Any, values: Any, invert: bool, out: Any) -> None:
    """Each element is compared with all values, so that one reading is enough where they are few."""
    tag, k = TAGS[dtype_name(x)], values.shape[0]
    for sizes, arrays in walk(out.shape, (0, 0), x, out):
        parallel(
            _among, math.prod(sizes), tag, k, invert, pointer(values), strides(values)[0], sizes, *arrays,
            minimum=max(1, 4 * _GRAIN // max(k, 1)),
        )  # fmt: skip


@jit
def _among(start, stop, tag, k, invert, values, step, sizes, x, out):
    for task in range(start, stop):
        value, found = load(tag, x[0] + place(task, sizes, x[1]) * size(tag)), False
        for j in range(k):
            found |= load(tag, values + j * step * size(tag)) == value
        store(_BOOL, out[0] + place(task, sizes, out[1]), found != invert)


_PART = 1 << 15  # elements that are counted together


@kernel(deterministic=True)
def histc(x: Any, bins: int, least: float, most: float, out: Any) -> None:
    """Parts are counted apart, and whole numbers added."""
    (n,), dtype = x.shape, dtype_name(x)
    parts = max(1, min(-(-n // _PART), 16))
    counts = np.zeros((parts, bins), np.int64)
    parallel(_count, parts, TAGS[dtype], n, float(least), float(most), counts, pointer(x), strides(x)[0])
    total = np.empty(bins, np.int64)
    parallel(_total, bins, counts, total)
    transfer(out, total)


@jit
def _count(start, stop, tag, n, least, most, counts, x, step):
    parts, bins = counts.shape
    scale = bins / (most - least)
    for part in range(start, stop):
        for i in range(n * part // parts, n * (part + 1) // parts):
            value = convert(_FLOAT64, load(tag, x + i * step * size(tag)))
            if value >= least and value <= most:
                counts[part, min(bins - 1, np.int64((value - least) * scale))] += 1


@jit
def _total(start, stop, counts, total):
    for i in range(start, stop):
        total[i] = counts[:, i].sum()
