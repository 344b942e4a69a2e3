"""Sparse attention on the CPU: gathered rows stay in L2 while scores and values of all heads pass over them.

Bound by operations: a gathered row is read once for up to 64 heads, which share it as keys and as values. Blocks are
gathered and widened first, since tiles want rows side by side; tasks are queries, split by heads where there are few.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._attention_backward import sparse_attention_backward as sparse_attention_backward
from ._blocks import Block, alive, at, cleared, get, pack, put, shifted
from ._softmax import KEYS, add_values, finish, panels, score, soften
from ._tiles import DOT_ROW_COLUMNS, OUTER_ROWS
from ._vectors import TAGS, load_index, size, wide

_HEADS = 64  # heads of a task


@kernel(deterministic=True, batch_invariant=True, note=f"an online softmax over blocks of {KEYS} rows")
def sparse_attention(q: Any, kv: Any, sink: Any, indices: Any, scale: float, out: Any) -> None:
    """Blocks follow the valid indices of a row alone, so the sums know neither the batch nor the threads."""
    batch, length, heads, width = q.shape
    tasks, count = batch * length, threads()
    if not tasks * heads * width:
        return
    room = config.budget() // (4 * count) // (16 * width + 1) - KEYS
    together = min(_HEADS, heads, max(OUTER_ROWS, room))
    if tasks < count:
        together = min(together, -(-heads * tasks // (count * OUTER_ROWS)) * OUTER_ROWS)
    splits = -(-heads // together)
    parallel(
        _queries, tasks * splits, TAGS[dtype_name(q)],
        (length, heads, width, kv.shape[1], indices.shape[2], together), float(scale),
        *((pointer(x), strides(x)) for x in (q, kv)), (0, 0) if sink is None else (pointer(sink), strides(sink)[0]),
        (pointer(indices), strides(indices), indices.itemsize), (pointer(out), strides(out)),
    )  # fmt: skip


@jit
def _query(tag, x, b, t):
    """The heads of a query."""
    address, (batch, token, head, _) = x
    return Block(tag, address + (b * batch + t * token) * size(tag), head)


@jit
def _queries(start, stop, tag, shape, scale, q, kv, sink, indices, out):
    length, heads, width, rows, slots, together = shape
    real = wide(tag)
    wanted, (index, index_steps, index_size) = panels(real, together, width, KEYS), indices
    memory, (x, sums, p, tops, masses, values) = cleared(real, (*wanted, (KEYS + DOT_ROW_COLUMNS, wanted[0][1])))
    counts = np.empty(together, np.int64)
    channel, out_channel = q[1][3], out[1][3]
    splits = -(-heads // together)
    for task in range(start, stop):
        query, first = task // splits, task % splits * together
        b, t = divmod(query, length)
        count = min(together, heads - first)
        source, target = shifted(_query(tag, q, b, t), first, 0), shifted(_query(tag, out, b, t), first, 0)
        pack(tag, source.base, (source.row, channel), (count, width), x, (count, width))
        for i in range(count):
            put(tops, i, 0, -np.inf)
            put(masses, i, 0, 0.0)
        slot = 0
        seen = 0
        while True:
            found = 0
            while found < KEYS and slot < slots:
                place = b * index_steps[0] + t * index_steps[1] + slot * index_steps[2]
                row = load_index(index + place * index_size, index_size)
                slot += 1
                if 0 <= row < rows:
                    origin = kv[0] + (b * kv[1][0] + row * kv[1][1]) * size(tag)
                    pack(tag, origin, (0, kv[1][2]), (1, width), shifted(values, found, 0), (1, width))
                    found += 1
            if found == 0:
                break
            score(x, values, count, found, width, p)
            counts[:] = found
            soften(tag, p, counts[:count], found, scale, tops, masses, sums, width, seen == 0)
            add_values(p, values, count, found, width, sums, seen > 0)
            seen += found
        for i in range(count):
            top, mass = np.float64(get(tops, i, 0)), np.float64(get(masses, i, 0))
            if sink[0] != 0:
                mass += math.exp(np.float64(get(Block(real, *sink), first + i, 0)) - top)
            finish(shifted(sums, i, 0), seen, top, mass, width, Block(tag, at(target, i, 0), out_channel))
    return alive(memory)
