"""The lightning indexer on the CPU: tiles of entries by heads, and the best entries so far of each query."""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._blocks import Block, pack
from ._tiles import OUTER_ROWS, OUTER_VECTORS, outer_tile
from ._vectors import (
    INT32,
    LANES,
    TAGS,
    fma,
    lanes,
    load,
    load_index,
    ordered,
    size,
    store,
    vload,
    vsplat,
    vsum,
    where,
    wide,
)

_ROWS = 96  # entries of a block
_QUERIES = 4  # that share a block
_SPLIT = 8 * _ROWS  # entries that are worth a task of their own
_LEAST = np.int64(-(2**63))


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
    sizes = tag, length, n, k, capacity, together, splits, span
    seen = (0, (0, 0)) if visible is None else (pointer(visible), strides(visible))
    parallel(
        _queries, blocks * splits, blocks * splits, TAGS[dtype_name(weights)], heads, depth, *sizes,
        pointer(q), strides(q), pointer(keys), strides(keys), pointer(weights), strides(weights),
        *seen, offset, pointer(out), strides(out), *parts,
    )  # fmt: skip
    if splits > 1:
        parallel(_merge, batch * length, *sizes, *seen, offset, pointer(out), strides(out), *parts)


@jit
def _limit(visible, steps, b, t, n):
    """How many entries a query sees."""
    return min(max(load_index(visible + (b * steps[0] + t * steps[1]) * 4, 4), 0), n) if visible != 0 else n


@jit
def _threshold(best, count, k, top, counts):
    """The k-th highest of the first `count` keys, and how many equal to it are among those k: digit by digit."""
    prefix, shift, remaining = 0, top, k
    while shift >= 0:
        flip = 128 if shift == top else 0
        counts[:] = 0
        for i in range(count):
            if shift == top or best[i] >> (shift + 8) == prefix:
                counts[((best[i] >> shift) & 255) ^ flip] += 1
        digit = 255
        while counts[digit] < remaining:
            remaining -= counts[digit]
            digit -= 1
        digit ^= flip
        prefix = (digit ^ 128) - 128 if shift == top else (prefix << 8) | digit
        shift -= 8
    return prefix, remaining


@jit
def _keep(best, places, count, k, top, counts):
    """Keep the k best in the order of their entries, which decides among equals. Returns the lowest that is kept."""
    least, equal = _threshold(best, count, k, top, counts)
    kept = 0
    for i in range(count):
        if best[i] > least or (best[i] == least and equal > 0):
            equal -= best[i] == least
            best[kept], places[kept] = best[i], places[i]
            kept += 1
    return least


@jit
def _write(out, column, places, count, k, offset):
    for i in range(k):
        store(INT32, out + i * column * 4, places[i] + offset if i < count else -1)


@jit
def _queries(
    start, stop, tasks, weight_tag, heads, depth, tag, length, n, k, capacity, together, splits, span,
    q, q_steps, keys, key_steps, weights, weight_steps, visible, visible_steps, offset, out, out_steps,
    part_keys, part_places,
):  # fmt: skip
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    across = OUTER_VECTORS * step
    padded = -(-heads // across) * across
    whole = heads - heads % step
    held = np.empty(
        unit * (together * (depth + 1) * padded + (_ROWS + OUTER_ROWS) * depth + OUTER_ROWS * padded) + 64, np.uint8
    )
    panels = (np.int64(held.ctypes.data) + 63) & ~63  # of a query: its weights, then channels by heads
    block = panels + together * (depth + 1) * padded * unit
    sums = block + (_ROWS + OUTER_ROWS) * depth * unit
    best, places = np.empty((together, capacity), np.int64), np.empty((together, capacity), np.int32)
    limits, counts, least = np.empty(together, np.int64), np.empty(together, np.int64), np.empty(together, np.int64)
    histogram = np.empty(256, np.int64)
    per_batch = -(-length // together)
    for task in range(start, stop):
        task = tasks - 1 - task  # the latest queries see the most
        rest, part = divmod(task, splits)
        b, first = rest // per_batch, rest % per_batch * together
        queries = min(together, length - first)
        begin, end = part * span, 0
        for i in range(queries):
            t = first + i
            limits[i] = _limit(visible, visible_steps, b, t, n)
            counts[i], least[i] = 0, _LEAST
            target = out + (b * out_steps[0] + t * out_steps[1]) * 4
            if limits[i] <= k:
                if part == 0:
                    for j in range(k):
                        store(INT32, target + j * out_steps[2] * 4, j + offset if j < limits[i] else -1)
                limits[i] = 0
                continue
            limits[i] = min(limits[i], begin + span)
            end = max(end, limits[i])
            panel = panels + i * (depth + 1) * padded * unit
            origin = weights + (b * weight_steps[0] + t * weight_steps[1]) * size(weight_tag)
            pack(weight_tag, origin, (0, weight_steps[2]), (1, heads), Block(real, panel, padded), (1, heads))
            origin = q + (b * q_steps[0] + t * q_steps[1]) * item
            pack(
                tag,
                origin,
                (q_steps[3], q_steps[2]),
                (depth, heads),
                Block(real, panel + padded * unit, padded),
                (depth, padded),
            )
        for at in range(begin, end, _ROWS):
            rows = min(_ROWS, end - at)
            origin = keys + (b * key_steps[0] + at * key_steps[1]) * item
            pack(
                tag,
                origin,
                (key_steps[1], key_steps[2]),
                (rows, depth),
                Block(real, block, depth),
                (rows + OUTER_ROWS, depth),
            )
            for i in range(queries):
                panel = panels + i * (depth + 1) * padded * unit
                for row in range(at, min(limits[i], at + rows), OUTER_ROWS):
                    left = block + (row - at) * depth * unit
                    for j in range(0, padded, across):
                        right = panel + (padded + j) * unit
                        outer_tile(
                            Block(real, left, depth),
                            Block(real, right, padded),
                            depth,
                            Block(real, sums + j * unit, padded),
                            False,
                        )
                    for entry in range(row, min(limits[i], row + OUTER_ROWS)):
                        line = sums + (entry - row) * padded * unit
                        total = vsplat(real)
                        for j in range(0, whole, step):
                            value = vload(real, line + j * unit)
                            total = fma(where(value < 0, 0, value), vload(real, panel + j * unit), total)
                        score = vsum(total)
                        for j in range(whole, heads):
                            scalar = load(real, line + j * unit)
                            score += load(real, panel + j * unit) * (real if scalar < 0 else scalar)
                        key = ordered(score)
                        if key > least[i]:
                            if counts[i] == capacity:
                                least[i] = _keep(best[i], places[i], capacity, k, 8 * (unit - 1), histogram)
                                counts[i] = k
                                if key <= least[i]:
                                    continue
                            best[i, counts[i]], places[i, counts[i]] = key, entry
                            counts[i] += 1
        for i in range(queries):
            if counts[i] > k:
                _keep(best[i], places[i], counts[i], k, 8 * (unit - 1), histogram)
                counts[i] = k
            t = first + i
            if splits > 1:
                for j in range(k):
                    part_keys[b * length + t, part, j] = best[i, j]
                    part_places[b * length + t, part, j] = places[i, j] if j < counts[i] else -1
            elif limits[i] > 0:
                _write(out + (b * out_steps[0] + t * out_steps[1]) * 4, out_steps[2], places[i], counts[i], k, offset)
    return held[0]  # keeps the scratch alive until here


@jit
def _merge(
    start, stop, tag, length, n, k, capacity, together, splits, span,
    visible, visible_steps, offset, out, out_steps, part_keys, part_places,
):  # fmt: skip
    """Choose again among what the parts chose, which are in the order of their entries."""
    best, places = np.empty(splits * k, np.int64), np.empty(splits * k, np.int32)
    histogram = np.empty(256, np.int64)
    for task in range(start, stop):
        b, t = divmod(task, length)
        if _limit(visible, visible_steps, b, t, n) <= k:
            continue
        count = 0
        for part in range(splits):
            for j in range(k):
                if part_places[task, part, j] < 0:
                    break
                best[count], places[count] = part_keys[task, part, j], part_places[task, part, j]
                count += 1
        _keep(best, places, count, k, 8 * (size(wide(tag)) - 1), histogram)
        _write(out + (b * out_steps[0] + t * out_steps[1]) * 4, out_steps[2], places, k, k, offset)
