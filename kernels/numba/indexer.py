"""The lightning indexer on the CPU: tiles of entries by heads, and the best entries so far of each query.

Bound by operations, heads times depth for each entry and query: a few queries share each block of entries, which stays
in a cache with their panels. Choosing costs little, since most entries are less than the lowest of the best so far;
room for more than k lets one pass of counting digits thin out many at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, threads
from flagops.registry import kernel

from ._blocks import Block, alive, get, laid, pack, put, round_up, scratch, shifted, vget
from ._tiles import OUTER_ROWS, OUTER_VECTORS, outer_tile
from ._vectors import INT32, LANES, TAGS, fma, lanes, load, ordered, size, vsplat, vsum, where, wide

_ROWS = 96  # entries of a block
_QUERIES = 4  # that share a block
_SPLIT = 8 * _ROWS  # entries that are worth a task of their own
_LEAST = np.int64(-(2**63))
_BITS = 8  # of a digit of a key
_DIGITS = 2**_BITS
_NEGATIVE = _DIGITS // 2  # the bit of a key's first digit that is its sign


@kernel(deterministic=True, batch_invariant=True, note="scores are compared as they are made; none are kept")
def lightning_indexer(q: Any, keys: Any, weights: Any, top_k: int, visible: Any, offset: int, out: Any) -> None:
    """Few queries share their entries out among the threads, and what each part chose is chosen from again."""
    (batch, length, heads, depth), n, k = q.shape, keys.shape[1], out.shape[2]
    if not batch * length * k:
        return
    tag, count, room = TAGS[dtype_name(q)], threads(), config.budget() // 2
    width = 8 if dtype_name(q) == "float64" else 4
    capacity = min(max(2 * k, k + 64), n + 1)
    each = (depth + 1) * (heads + OUTER_VECTORS * LANES) * width + 12 * capacity
    together = max(1, min(_QUERIES, (room // count - _ROWS * depth * width) // each, -(-batch * length // (4 * count))))
    blocks = batch * -(-length // together)
    splits = 1
    if blocks < 2 * count and count > 1:
        splits = max(1, min(4 * count // blocks, n // _SPLIT, room // (16 * batch * length * k)))
    span = -(-n // splits)
    parts = tuple(np.empty((batch * length if splits > 1 else 0, splits, k), kind) for kind in (np.int64, np.int32))
    shape = length, n, k, splits
    seen = (0, 0, 0) if visible is None else laid(visible)
    parallel(
        _queries, blocks * splits, blocks * splits, tag, TAGS[dtype_name(weights)], shape, heads, depth, capacity,
        together, span, laid(q), laid(keys), laid(weights), seen, offset, laid(out), *parts,
    )  # fmt: skip
    if splits > 1:
        parallel(_merge, batch * length, tag, shape, seen, offset, laid(out), *parts)


@jit
def _row(tag, x, b, t):
    """Where row [b, t] of an array begins."""
    return x[0] + (b * x[1] + t * x[2]) * size(tag)


@jit
def _limit(visible, b, t, n):
    """How many entries a query sees."""
    return min(max(np.int64(load(INT32, _row(INT32, visible, b, t))), 0), n) if visible[0] != 0 else n


@jit
def _threshold(best, count, k, top, counts):
    """The k-th highest of the first `count` keys, and how many equal to it are among those k: digit by digit."""
    prefix, shift, remaining = 0, top, k
    while shift >= 0:
        flip = _NEGATIVE if shift == top else 0
        counts[:] = 0
        for i in range(count):
            if shift == top or best[i] >> (shift + _BITS) == prefix:
                counts[((best[i] >> shift) & (_DIGITS - 1)) ^ flip] += 1
        digit = _DIGITS - 1
        while counts[digit] < remaining:
            remaining -= counts[digit]
            digit -= 1
        digit ^= flip
        prefix = (digit ^ _NEGATIVE) - _NEGATIVE if shift == top else (prefix << _BITS) | digit
        shift -= _BITS
    return prefix, remaining


@jit
def _keep(real, best, places, count, k, counts):
    """Keep the k best in the order of their entries, which decides among equals. Returns the lowest that is kept."""
    least, equal = _threshold(best, count, k, _BITS * (size(real) - 1), counts)
    kept = 0
    for i in range(count):
        if best[i] > least or (best[i] == least and equal > 0):
            equal -= best[i] == least
            best[kept], places[kept] = best[i], places[i]
            kept += 1
    return least


@jit
def _write(out, b, t, places, count, k, offset):
    target = Block(INT32, _row(INT32, out, b, t), out[3])
    for i in range(k):
        put(target, i, 0, places[i] + offset if i < count else -1)


@jit
def _score(products, weights, heads):
    """The sum over heads of the weight times what is positive of the product; a NaN stays."""
    zero, step = wide(products.tag), lanes(products.tag)
    whole, total = heads - heads % step, vsplat(zero)
    for j in range(0, whole, step):
        value = vget(products, 0, j)
        total = fma(where(value < 0, 0, value), vget(weights, 0, j), total)
    score = vsum(total)
    for j in range(whole, heads):
        scalar = get(products, 0, j)
        score += get(weights, 0, j) * (zero if scalar < 0 else scalar)
    return score


@jit
def _queries(
    start, stop, tasks, tag, weight_tag, shape, heads, depth, capacity, together, span,
    q, keys, weights, visible, offset, out, part_keys, part_places,
):  # fmt: skip
    (length, n, k, splits), real = shape, wide(tag)
    (_, _, _, head, channel), (_, _, key_row, key_channel), (_, _, _, weight) = q, keys, weights
    across = OUTER_VECTORS * lanes(tag)
    padded = round_up(heads, across)
    each = depth + 1  # rows of a query: its weights, then channels by heads
    memory, (panels, entries, sums) = scratch(
        real, ((together * each, padded), (_ROWS + OUTER_ROWS, depth), (OUTER_ROWS, padded))
    )
    best, places = np.empty((together, capacity), np.int64), np.empty((together, capacity), np.int32)
    limits, counts, least = np.empty(together, np.int64), np.empty(together, np.int64), np.empty(together, np.int64)
    histogram, everything = np.empty(_DIGITS, np.int64), np.arange(k)
    per_batch = -(-length // together)
    for task in range(start, stop):
        task = tasks - 1 - task  # the latest queries see the most
        rest, part = divmod(task, splits)
        b, first = rest // per_batch, rest % per_batch * together
        queries = min(together, length - first)
        begin, end = part * span, 0
        for i in range(queries):
            t = first + i
            limits[i] = _limit(visible, b, t, n)
            counts[i], least[i] = 0, _LEAST
            if limits[i] <= k:
                if part == 0:
                    _write(out, b, t, everything, limits[i], k, offset)
                limits[i] = 0
                continue
            limits[i] = min(limits[i], begin + span)
            end = max(end, limits[i])
            panel = shifted(panels, i * each, 0)
            pack(weight_tag, _row(weight_tag, weights, b, t), (0, weight), (1, heads), panel, (1, heads))
            channels = shifted(panel, 1, 0)
            pack(tag, _row(tag, q, b, t), (channel, head), (depth, heads), channels, (depth, padded))
        for at in range(begin, end, _ROWS):
            rows = min(_ROWS, end - at)
            pack(
                tag, _row(tag, keys, b, at), (key_row, key_channel), (rows, depth), entries, (rows + OUTER_ROWS, depth)
            )
            for i in range(queries):
                panel = shifted(panels, i * each, 0)
                for row in range(at, min(limits[i], at + rows), OUTER_ROWS):
                    for j in range(0, padded, across):
                        left, right = shifted(entries, row - at, 0), shifted(panel, 1, j)
                        outer_tile(left, right, depth, shifted(sums, 0, j), False)
                    for entry in range(row, min(limits[i], row + OUTER_ROWS)):
                        key = ordered(_score(shifted(sums, entry - row, 0), panel, heads))
                        if key > least[i]:
                            if counts[i] == capacity:
                                least[i] = _keep(real, best[i], places[i], capacity, k, histogram)
                                counts[i] = k
                                if key <= least[i]:
                                    continue
                            best[i, counts[i]], places[i, counts[i]] = key, entry
                            counts[i] += 1
        for i in range(queries):
            t = first + i
            if counts[i] > k:
                _keep(real, best[i], places[i], counts[i], k, histogram)
                counts[i] = k
            if splits > 1:
                for j in range(k):
                    part_keys[b * length + t, part, j] = best[i, j]
                    part_places[b * length + t, part, j] = places[i, j] if j < counts[i] else -1
            elif limits[i] > 0:
                _write(out, b, t, places[i], counts[i], k, offset)
    return alive(memory)


@jit
def _merge(start, stop, tag, shape, visible, offset, out, part_keys, part_places):
    """Choose again among what the parts chose, which are in the order of their entries."""
    length, n, k, splits = shape
    best, places = np.empty(splits * k, np.int64), np.empty(splits * k, np.int32)
    histogram = np.empty(_DIGITS, np.int64)
    for task in range(start, stop):
        b, t = divmod(task, length)
        if _limit(visible, b, t, n) <= k:
            continue
        count = 0
        for part in range(splits):
            for j in range(k):
                if part_places[task, part, j] < 0:
                    break
                best[count], places[count] = part_keys[task, part, j], part_places[task, part, j]
                count += 1
        _keep(wide(tag), best, places, count, k, histogram)
        _write(out, b, t, places, k, k, offset)
