"""Gradients of sparse attention on the CPU: the rows of a query are gathered once, for all five products with them.

Rows are shared by queries, whose gradients must not be added at once: the queries are cut into runs, by their shape
alone, so that the bits know nothing of the threads; each run has sums of its own, which are added in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides

from ._blocks import Block, alive, at, clear, cleared, get, pack, put, round_up, shifted, unpack, vget, vput
from ._dense import matrices, row_of
from ._functions import exp
from ._gemm import empty
from ._softmax import PAD, add_values, score
from ._tiles import DOT_ROW_COLUMNS, DOT_ROWS, OUTER_ROWS, OUTER_VECTORS, outer_turned
from ._vectors import TAGS, cast, fma, lanes, load_index, maximum, size, vhighest, vsplat, vsum, wide

_RUNS = 32  # of queries, over all batches
_HEADS = 64  # that are worked on together
ALL = np.zeros((0, 0), np.uint8)


def sparse_attention_backward(
    grad: Any, q: Any, kv: Any, sink: Any, indices: Any, scale: float, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Probabilities are computed again, whole; their rounding is passed through."""
    (batch, length, heads, width), (rows, slots) = q.shape, (kv.shape[1], indices.shape[2])
    if not batch * length * heads * width * rows * slots:
        return NotImplemented
    real = "float64" if dtype_name(q) == "float64" else "float32"
    item = np.dtype(real).itemsize
    most = config.budget() // (batch * rows * width * item)
    runs = max(1, min(-(-_RUNS // batch), length, most))
    sums, sinks = np.zeros((batch * runs, rows, width), real), np.zeros((batch * runs, heads), real)
    touched, of_q = np.zeros((batch * runs, rows), np.uint8), empty(q, q.shape)
    tag = TAGS[dtype_name(q)]
    parallel(
        _run, batch * runs, tag, (length, heads, width, rows, slots, runs, min(heads, _HEADS)), float(scale),
        *((pointer(x), strides(x)) for x in (grad, q, kv)), (0, 0) if sink is None else (pointer(sink), *strides(sink)),
        (pointer(indices), strides(indices), indices.itemsize), pointer(of_q), pointer(sums), pointer(sinks), touched,
    )  # fmt: skip
    of_kv = of_sink = None
    if needs[1]:
        of_kv = empty(kv, kv.shape)
        shape, goal = (runs, (rows, width), (rows, width)), matrices(of_kv, (batch,))
        parallel(add_runs, batch * rows, tag, TAGS[real], shape, pointer(sums), goal, touched, minimum=64)
    if sink is not None and needs[2]:
        of_sink = empty(sink, sink.shape)
        shape, goal = (batch * runs, (1, heads), (1, heads)), matrices(of_sink[None], ())
        add_runs(0, 1, TAGS[dtype_name(sink)], TAGS[real], shape, pointer(sinks), goal, ALL)
    return of_q if needs[0] else None, of_kv, of_sink, None


@jit
def _run(start, stop, tag, shape, scale, grad, q, kv, sink, indices, of_q, sums, sinks, touched):
    """The gradients by a run of queries; those of `kv` and `sink` are added to the sums of the run."""
    length, heads, width, rows, slots, runs, together = shape
    real = wide(tag)
    row = round_up(width, 2 * OUTER_VECTORS * lanes(real)) + PAD
    line = round_up(slots, lanes(real)) + DOT_ROW_COLUMNS + PAD
    high = 2 * together + DOT_ROWS + OUTER_ROWS
    memory, (both, values, p, parts, total) = cleared(real, (
        (high, row), (slots + DOT_ROW_COLUMNS, row), (high, line), (OUTER_ROWS, row),
        (together + OUTER_ROWS + DOT_ROWS, row),
    ))  # fmt: skip
    read = np.empty(slots, np.int64)
    longest = -(-length // runs)
    for task in range(start, stop):
        b, run = divmod(task, runs)
        goal = shifted(Block(real, sums, width), task * rows, 0)
        for t in range(run * longest, min((run + 1) * longest, length)):
            found = _gather(tag, kv, indices, (b, t), (rows, slots, width), values, read)
            for first in range(0, heads, together):
                count = min(together, heads - first)
                target = at(Block(tag, of_q, width), (b * length + t) * heads + first, 0)
                if found == 0:
                    for i in range(count):
                        clear(tag, target + i * width * size(tag), width)
                    continue
                slopes, x, slope = both, shifted(both, count, 0), shifted(p, count, 0)
                for side, block in ((grad, slopes), (q, x)):
                    (address, (batch, token, head, channel)) = side
                    source = address + (b * batch + t * token + first * head) * size(tag)
                    pack(tag, source, (head, channel), (count, width), block, (count, width))
                score(x, values, count, found, width, p)
                score(slopes, values, count, found, width, slope)
                for i in range(count):
                    at_sink = shifted(Block(real, sink[0], sink[1]), first + i, 0)
                    place = shifted(Block(real, sinks, heads), task, first + i)
                    _soften(shifted(p, i, 0), shifted(slope, i, 0), found, scale, at_sink, sink[0] != 0, place)
                add_values(slope, values, count, found, width, total, False)
                unpack(tag, total, (count, width), target, (width, 1))
                for k in range(0, found, OUTER_ROWS):
                    for j in range(0, width, OUTER_VECTORS * lanes(real)):
                        outer_turned(shifted(p, 0, k), shifted(both, 0, j), 2 * count, shifted(parts, 0, j), False)
                    for i in range(k, min(k + OUTER_ROWS, found)):
                        _add(shifted(parts, i - k, 0), shifted(goal, read[i], 0), width)
                        touched[task, read[i]] = 1
    return alive(memory)


@jit
def _gather(tag, kv, indices, query, shape, values, read):
    """The rows of a query, one behind the other, and which they are; returns how many."""
    (b, t), (rows, slots, width) = query, shape
    index, index_steps, index_size = indices
    found = 0
    for slot in range(slots):
        place = b * index_steps[0] + t * index_steps[1] + slot * index_steps[2]
        row = load_index(index + place * index_size, index_size)
        if 0 <= row < rows:
            origin = kv[0] + (b * kv[1][0] + row * kv[1][1]) * size(tag)
            pack(tag, origin, (0, kv[1][2]), (1, width), shifted(values, found, 0), (1, width))
            read[found] = row
            found += 1
    return found


@jit
def _soften(p, slope, found, scale, sink, has_sink, of_sink):
    """A line of scores to probabilities, and the gradients of those to the gradients of the products of q and kv."""
    real, step = p.tag, lanes(p.tag)
    padded = round_up(found, step)
    factor = cast(real, scale)
    for j in range(0, padded, step):
        vput(p, 0, j, vget(p, 0, j) * factor)
    for j in range(found, padded):  # no scale turns these
        put(p, 0, j, -np.inf)
        put(slope, 0, j, 0.0)
    top = vsplat(cast(real, -np.inf))
    for j in range(0, padded, step):
        top = maximum(top, vget(p, 0, j))
    base = vhighest(top)
    if base == -np.inf:
        base = cast(real, 0.0)
    if has_sink:
        base = max(base, get(sink, 0, 0))
    mass = vsplat(real)
    for j in range(0, padded, step):
        share = exp(vget(p, 0, j) - base)
        mass += share
        vput(p, 0, j, share)
    total, idle = np.float64(vsum(mass)), 0.0
    if has_sink:
        idle = np.exp(np.float64(get(sink, 0, 0)) - np.float64(base))
        total += idle
    inverse = cast(real, 1 / total)
    mean = vsplat(real)
    for j in range(0, padded, step):
        share = vget(p, 0, j) * inverse
        mean = fma(share, vget(slope, 0, j), mean)
        vput(p, 0, j, share)
    middle = vsum(mean)
    for j in range(0, padded, step):
        vput(slope, 0, j, vget(p, 0, j) * (vget(slope, 0, j) - middle) * factor)
    if has_sink:
        put(of_sink, 0, 0, get(of_sink, 0, 0) - idle / total * middle)


@jit
def _add(part, goal, width):
    step = lanes(part.tag)
    whole = width - width % step
    for c in range(0, whole, step):
        vput(goal, 0, c, vget(goal, 0, c) + vget(part, 0, c))
    for c in range(whole, width):
        put(goal, 0, c, get(goal, 0, c) + get(part, 0, c))


@jit
def add_runs(start, stop, tag, real, shape, sums, goal, touched):
    """The sums of all runs for rows start to stop of all `matrices`, rounded; of those that a run has touched, unless
    it is `ALL`: memory that is zero because nothing has written it is not asked for."""
    runs, (held, line), (rows, width) = shape
    memory, (total,) = cleared(real, ((1, width),))
    for task in range(start, stop):
        b, row = divmod(task, rows)
        clear(real, total.base, width)
        for run in range(runs):
            if not touched.size or touched[b * runs + run, row]:
                _add(shifted(Block(real, sums, line), (b * runs + run) * held + row, 0), total, width)
        unpack(tag, total, (1, width), row_of(tag, goal, b, row), goal[2:])
    return alive(memory)
