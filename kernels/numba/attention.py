"""Sparse attention on the CPU: gathered rows stay in L2 while scores and values of all heads pass over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._blocks import Block, pack
from ._tiles import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    OUTER_ROWS,
    OUTER_VECTORS,
    ROW_VECTORS,
    dot_row,
    dot_tile,
    outer_row,
    outer_tile,
)
from ._vectors import (
    TAGS,
    cast,
    exp,
    lanes,
    load,
    load_index,
    maximum,
    rounded,
    size,
    store,
    vhighest,
    vload,
    vsplat,
    vstore,
    vsum,
    wide,
)

_KEYS = 96  # rows of a block
_HEADS = 64  # heads of a task


@kernel(deterministic=True, batch_invariant=True, note="an online softmax over blocks of 96 rows")
def sparse_attention(q: Any, kv: Any, sink: Any, indices: Any, scale: float, out: Any) -> None:
    """Blocks follow the valid indices of a row alone, so the sums know neither the batch nor the threads."""
    batch, length, heads, width = q.shape
    tasks, count = batch * length, threads()
    if not tasks * heads * width:
        return
    room = config.budget() // (4 * count) // (16 * width + 1) - _KEYS
    together = min(_HEADS, heads, max(OUTER_ROWS, room))
    if tasks < count:
        together = min(together, -(-heads * tasks // (count * OUTER_ROWS)) * OUTER_ROWS)
    splits = -(-heads // together)
    parallel(
        _queries, tasks * splits, TAGS[dtype_name(q)], length, heads, width, kv.shape[1], indices.shape[2], together,
        pointer(q), strides(q), pointer(kv), strides(kv),
        *((0, 0) if sink is None else (pointer(sink), strides(sink)[0])),
        pointer(indices), strides(indices), 8 if dtype_name(indices) == "int64" else 4,
        float(scale), pointer(out), strides(out),
    )  # fmt: skip


@jit
def _queries(
    start, stop, tag, length, heads, width, rows, slots, together,
    q, q_steps, kv, kv_steps, sink, sink_step, indices, index_steps, index_size, scale, out, out_steps,
):  # fmt: skip
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    across = OUTER_VECTORS * step
    padded = together + OUTER_ROWS + DOT_ROWS
    ld = -(-width // (2 * across)) * 2 * across + 16
    ldp = _KEYS + 16
    held = np.zeros(unit * (padded * (2 * ld + ldp + 3) + (_KEYS + DOT_ROW_COLUMNS) * ld) + 128, np.uint8)
    x = (np.int64(held.ctypes.data) + 63) & ~63
    values = x + padded * ld * unit
    p = values + (_KEYS + DOT_ROW_COLUMNS) * ld * unit
    sums = p + padded * ldp * unit
    tops = sums + padded * ld * unit
    masses = tops + padded * unit
    splits = -(-heads // together)
    for task in range(start, stop):
        query, first = task // splits, task % splits * together
        b, t = divmod(query, length)
        count = min(together, heads - first)
        source = q + (b * q_steps[0] + t * q_steps[1] + first * q_steps[2]) * item
        target = out + (b * out_steps[0] + t * out_steps[1] + first * out_steps[2]) * item
        pack(tag, source, (q_steps[2], q_steps[3]), (count, width), Block(real, x, ld), (count, width))
        for i in range(count):
            store(real, tops + i * unit, cast(real, -np.inf))
            store(real, masses + i * unit, real)
        at = 0
        seen = 0
        while True:
            found = 0
            while found < _KEYS and at < slots:
                place = b * index_steps[0] + t * index_steps[1] + at * index_steps[2]
                row = load_index(indices + place * index_size, index_size)
                at += 1
                if 0 <= row < rows:
                    origin = kv + (b * kv_steps[0] + row * kv_steps[1]) * item
                    pack(
                        tag,
                        origin,
                        (0, kv_steps[2]),
                        (1, width),
                        Block(real, values + found * ld * unit, ld),
                        (1, width),
                    )
                    found += 1
            if found == 0:
                break
            _scores(tag, x, values, ld, count, found, width, p, ldp)
            for i in range(count):
                _softmax(tag, p + i * ldp * unit, found, scale, tops + i * unit, masses + i * unit,
                         sums + i * ld * unit, width, seen == 0)  # fmt: skip
            _values(tag, p, ldp, values, ld, count, found, width, sums, seen > 0)
            seen += found
        for i in range(count):
            mass = np.float64(load(real, masses + i * unit))
            top = np.float64(load(real, tops + i * unit))
            if sink != 0:
                mass += math.exp(np.float64(load(real, sink + (first + i) * sink_step * unit)) - top)
            _finish(tag, sums + i * ld * unit, seen, top, mass, width, target + i * out_steps[2] * item, out_steps[3])
    return held[0]  # keeps the scratch alive until here


@jit
def _scores(tag, x, values, ld, count, found, width, p, ldp):
    """p[heads, rows] = x[heads, d] values[rows, d]^T"""
    real = wide(tag)
    unit, step = size(real), lanes(tag)
    depth = -(-width // step) * step
    tiled = count - count % DOT_ROWS if count % DOT_ROWS < 3 else count
    for j in range(0, found if tiled else 0, DOT_COLUMNS):
        valid = min(DOT_COLUMNS, found - j)
        for i in range(0, tiled, DOT_ROWS):
            left, right, into = x + i * ld * unit, values + j * ld * unit, p + (i * ldp + j) * unit
            dot_tile(Block(real, left, ld), Block(real, right, ld), valid, depth, Block(real, into, ldp), False)
    for i in range(tiled, count):
        for j in range(0, found, DOT_ROW_COLUMNS):
            valid = min(DOT_ROW_COLUMNS, found - j)
            left, right, into = x + i * ld * unit, values + j * ld * unit, p + (i * ldp + j) * unit
            dot_row(Block(real, left, ld), Block(real, right, ld), valid, depth, Block(real, into, ldp), False)


@jit
def _values(tag, p, ldp, values, ld, count, found, width, sums, add):
    """sums[heads, d] (+)= p[heads, rows] values[rows, d]"""
    real = wide(tag)
    unit, step = size(real), lanes(tag)
    across, across_row = OUTER_VECTORS * step, ROW_VECTORS * step
    tiled = count - count % OUTER_ROWS if count % OUTER_ROWS < 3 else count
    for j in range(0, width if tiled else 0, across):
        for i in range(0, tiled, OUTER_ROWS):
            left, right, into = p + i * ldp * unit, values + j * unit, sums + (i * ld + j) * unit
            outer_tile(Block(real, left, ldp), Block(real, right, ld), found, Block(real, into, ld), add)
    for i in range(tiled, count):
        for j in range(0, width, across_row):
            left, right, into = p + i * ldp * unit, values + j * unit, sums + (i * ld + j) * unit
            outer_row(Block(real, left, ldp), Block(real, right, ld), found, Block(real, into, ld), add)


@jit
def _softmax(tag, p, found, scale, top, mass, sums, width, fresh):
    """Scores to probabilities relative to the running maximum, in place; earlier sums are scaled to a new maximum."""
    real = wide(tag)
    unit, step = size(real), lanes(tag)
    factor = vsplat(cast(real, scale))
    for j in range(0, found, step):
        vstore(real, p + j * unit, vload(real, p + j * unit) * factor)
    for j in range(found, -(-found // step) * step):
        store(real, p + j * unit, cast(real, -np.inf))
    before = load(real, top)
    highest = vsplat(before)
    for j in range(0, found, step):
        highest = maximum(highest, vload(real, p + j * unit))
    after = vhighest(highest)
    store(real, top, after)
    base = after if after > -np.inf or after != after else real
    shift = vsplat(base)
    total = vsplat(real)
    for j in range(0, found, step):
        exact = exp(vload(real, p + j * unit) - shift)
        total += exact
        vstore(real, p + j * unit, rounded(tag, exact))
    fade = cast(real, math.exp(np.float64(before) - np.float64(base)))
    store(real, mass, load(real, mass) * fade + vsum(total))
    if not fresh and fade != 1:
        factor = vsplat(fade)
        for j in range(0, width, step):
            vstore(real, sums + j * unit, vload(real, sums + j * unit) * factor)


@jit
def _finish(tag, sums, seen, top, mass, width, target, column):
    """sums / mass into the output; 0 where nothing was seen, NaN where every score was -inf."""
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    if seen == 0:
        for j in range(width):
            store(tag, target + j * column * item, real)
        return
    first, second = mass, 1.0
    if mass > 1e30:  # beyond float32, perhaps: divide twice by the root
        first = second = math.sqrt(mass)
    if top == -np.inf:
        first = np.nan
    divisor, again = vsplat(cast(real, first)), vsplat(cast(real, second))
    for j in range(0, width, step):
        result = vload(real, sums + j * unit) / divisor / again
        if column == 1 and j + step <= width:
            vstore(tag, target + j * item, result)
        else:
            vstore(real, sums + j * unit, result)
            for c in range(j, min(j + step, width)):
                store(tag, target + c * column * item, load(real, sums + c * unit))
