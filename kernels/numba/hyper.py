"""Hyper-connections on the CPU: a block of tokens is projected, normalised and collapsed while it stays in L2.

`hc_pre` and `hc_post` are bound by the bytes of the streams, four times those of a hidden state: what is done with a
token happens while it is near. `hc_split_sinkhorn` is bound by operations on small matrices: a vector holds the same
entry of as many tokens as it has lanes, two vectors side by side hide latencies, and the rounds scale a factor for each
row and column rather than the entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._blocks import Block, alive, at, clear, get, of_task, pack, put, scratch, shifted, turn, unpack, vget, vput, walk
from ._gemm import DOT_DEPTH
from ._hyper_backward import hc_post_backward as hc_post_backward
from ._hyper_backward import hc_pre_backward as hc_pre_backward
from ._hyper_backward import hc_split_sinkhorn_backward as hc_split_sinkhorn_backward
from ._sinkhorn import pairs, sigmoid, sinkhorn
from ._tiles import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    DOT_WIDTH,
    OUTER_ROWS,
    OUTER_VECTORS,
    dot_row,
    dot_tile,
    outer_tile,
)
from ._vectors import TAGS, cast, fma, lanes, vsplat, vsum

_BLOCK = 512 << 10  # bytes of streams that a task reads twice
_ROWS = 24  # tokens of a task at the most
_BOTH, _PROJECT, _COLLAPSE = 0, 1, 2
_COLUMNS = 512  # channels of a token that hc_post mixes at a time
_SPLIT = 32  # tokens of a task of hc_split_sinkhorn
_GRAIN = 1 << 17  # products worth a thread


def _vector(x: Any) -> tuple[int, int]:
    return pointer(x), strides(x)[0]


@kernel(deterministic=True, batch_invariant=True)
def hc_split_sinkhorn(mix: Any, scale: Any, base: Any, mult: int, iters: int, eps: float, out: Any) -> None:
    """A vector holds one entry of as many tokens as it has lanes; the rounds scale rows and columns, not entries."""
    target = iters, eps, _vector(scale), _vector(base)
    for sizes, arrays in walk(mix.shape[:-1], (1, 1, 1, 2), mix, *out):
        tasks = -(-math.prod(sizes) // _SPLIT)
        parallel(_split, tasks, TAGS[dtype_name(mix)], sizes, mult, target, *arrays, minimum=4)


@jit
def _split(start, stop, real, sizes, n, target, mix, pre, post, comb):
    memory, (work,) = scratch(real, (_room(real, n),))
    first, last = start * _SPLIT, min(stop * _SPLIT, sizes[0] * sizes[1] * sizes[2])
    _coefficients(first, last, sizes, n, target, mix, pre, post, comb, work)
    return alive(memory)


@kernel(deterministic=True, batch_invariant=True)
def hc_pre(
    x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, out: tuple[Any, Any, Any]
) -> None:
    """The tokens of a block are read from memory once; for few tokens, streams are projected in parallel first."""
    _run(x, fn, norm_eps, (iters, eps, _vector(scale), _vector(base)), *out)


@kernel(deterministic=True, batch_invariant=True)
def hc_head(x: Any, fn: Any, base: Any, scale: Any, eps: float, norm_eps: float, out: Any) -> None:
    """As `hc_pre`, with one gate for each stream."""
    _run(x, fn, norm_eps, (0, eps, _vector(scale), _vector(base)), out, None, None)


def _run(x: Any, fn: Any, norm_eps: float, target: Any, *out: Any) -> None:
    (*lead, n, d), columns = x.shape, fn.shape[0]
    tag, real = TAGS[dtype_name(x)], TAGS[dtype_name(fn)]
    for sizes, arrays in walk(lead, (2, 1, 1, 2), x, *out):
        tokens = math.prod(sizes)
        count = max(1, min(threads(), tokens * n * d * columns // _GRAIN))
        together = min(max(_BLOCK // (n * d * x.itemsize + 1), 1), _ROWS, -(-tokens // count))
        together = -(-together // DOT_ROWS) * DOT_ROWS
        blocks = -(-tokens // together)
        parts = np.empty(n * tokens * (columns + 1) if blocks < count else 0, np.dtype(dtype_name(fn)))
        products = min(together, tokens) * n * d * columns + 1
        weights, shape = (pointer(fn), strides(fn)), (n, d, columns, together)
        everything = tag, real, sizes, shape, weights, norm_eps, target, *arrays, pointer(parts)
        if blocks < count:
            parallel(_tasks, blocks * n, _PROJECT, *everything, minimum=max(1, _GRAIN * n // products))
            parallel(_tasks, blocks, _COLLAPSE, *everything)
        else:
            parallel(_tasks, blocks, _BOTH, *everything, minimum=max(1, _GRAIN // products))


@jit
def _tasks(start, stop, phase, tag, real, sizes, shape, weights, norm_eps, target, x, y, post, comb, between):
    """Blocks of tokens from streams to results, or for few tokens in two phases with their sums `between`."""
    n, _, columns, together = shape
    tokens = sizes[0] * sizes[1] * sizes[2]
    memory, (rows, panel, sums, own, mix, gates, work) = scratch(real, (
        (together, DOT_DEPTH), (columns, DOT_DEPTH), (together + DOT_ROWS, columns + DOT_WIDTH),
        (n * together, columns + 1), (together, columns), (together, n), _room(real, n),
    ))  # fmt: skip
    parts = own if phase == _BOTH else Block(real, between, columns + 1)
    for task in range(start, stop):
        block, stream = divmod(task, n) if phase == _PROJECT else (task, 0)
        first = block * together
        last = min(first + together, tokens)
        apart = together if phase == _BOTH else tokens  # from the sums of a stream to those of the next
        near = shifted(parts, 0 if phase == _BOTH else first, 0)
        if phase != _COLLAPSE:
            for each in range(stream, stream + 1 if phase == _PROJECT else n):
                to = shifted(near, each * apart, 0)
                _sums(tag, sizes, shape, x, weights, each, first, last, rows, panel, sums, to)
        if phase != _PROJECT:
            _normalise(shape, first, last, near, apart, norm_eps, mix)
            if target[0]:
                logits, places = _packed(mix, columns, sizes, first), _packed(gates, n, sizes, first)
                _coefficients(first, last, sizes, n, target, logits, places, post, comb, work)
            else:
                _gate(last - first, n, target, mix, gates)
            _collapse(tag, sizes, shape, first, last, gates, x, y)
    return alive(memory)


@jit
def _sums(tag, sizes, shape, x, weights, stream, first, last, rows, panel, sums, to):
    """Sums of a stream of tokens first to last with the columns of fn, and behind them of their squares."""
    _, d, columns, _ = shape
    fn, fn_steps = weights
    real, step, channel = rows.tag, lanes(tag), x[2][1]
    count = last - first
    across = DOT_ROW_COLUMNS if count == 1 else DOT_COLUMNS
    for i in range(count):
        clear(real, at(to, i, 0), columns + 1)
    for begin in range(0, d, DOT_DEPTH):
        depth = min(DOT_DEPTH, d - begin)
        padded = -(-depth // step) * step
        for i in range(count):
            source = at(of_task(tag, x, sizes, first + i), stream, begin * channel)
            pack(tag, source, (0, channel), (1, depth), shifted(rows, i, 0), (1, padded))
            squares = vsplat(real)
            for c in range(0, padded, step):
                value = vget(rows, i, c)
                squares = fma(value, value, squares)
            put(to, i, columns, get(to, i, columns) + vsum(squares))
        weight = Block(real, at(Block(real, fn, fn_steps[1]), stream * d + begin, 0), fn_steps[0])
        if fn_steps[1] != 1 or padded != depth:
            pack(real, weight.base, fn_steps, (columns, depth), panel, (columns, padded))
            weight = panel
        for j in range(0, columns, across):
            valid = min(across, columns - j)
            if count == 1:
                dot_row(rows, shifted(weight, j, 0), valid, padded, shifted(sums, 0, j), begin > 0)
            else:
                for i in range(0, count, DOT_ROWS):
                    left, into = shifted(rows, i, 0), shifted(sums, i, j)
                    dot_tile(left, shifted(weight, j, 0), valid, padded, into, begin > 0)
    for i in range(count if d else 0):
        for column in range(columns):
            put(to, i, column, get(sums, i, column))


@jit
def _normalise(shape, first, last, parts, apart, norm_eps, mix):
    """The sums of all streams over the root of their mean square."""
    n, d, columns, _ = shape
    real = mix.tag
    for i in range(last - first):
        squares = real
        for stream in range(n):
            squares += get(parts, stream * apart + i, columns)
        factor = 1 / np.sqrt(squares / cast(real, max(n * d, 1)) + cast(real, norm_eps))
        for column in range(columns):
            total = real
            for stream in range(n):
                total += get(parts, stream * apart + i, column)
            put(mix, i, column, total * factor)


@jit
def _gate(count, n, target, mix, gates):
    """sigmoid(mix * scale + base) + eps"""
    _, eps, scale, base = target
    scales, bases = Block(mix.tag, *scale), Block(mix.tag, *base)
    for i in range(count):
        for j in range(n):
            logit = get(mix, i, j) * get(scales, 0, 0) + get(bases, j, 0)
            put(gates, i, j, 1 / (1 + np.exp(-np.float64(logit))) + eps)


@jit
def _collapse(tag, sizes, shape, first, last, gates, x, y):
    """The streams of each token, weighted by its gates, as one."""
    n, d, _, _ = shape
    step, channel = lanes(tag), x[2][1]
    whole = d - d % step if channel == 1 and y[2][0] == 1 else 0
    for i in range(last - first):
        streams, goal = of_task(tag, x, sizes, first + i), of_task(tag, y, sizes, first + i)
        for c in range(0, whole, step):
            total = vget(streams, 0, c) * get(gates, i, 0)
            for j in range(1, n):
                total = fma(vget(streams, j, c), get(gates, i, j), total)
            vput(goal, c, 0, total)
        for c in range(whole, d):
            value = get(streams, 0, c * channel) * get(gates, i, 0)
            for j in range(1, n):
                value = fma(get(streams, j, c * channel), get(gates, i, j), value)
            put(goal, c, 0, value)


@jit
def _packed(block, width, sizes, first):
    """As an array of `walk`: vectors of tokens one behind the other, the first of them at the block's beginning."""
    steps = sizes[1] * sizes[2] * width, sizes[2] * width, width
    return at(Block(block.tag, block.base, -width), first, 0), steps, (1,)


@kernel(deterministic=True, batch_invariant=True)
def hc_post(y: Any, x: Any, post: Any, comb: Any, out: Any) -> None:
    """Each channel of a token is read once, the streams and the new one together, and mixed in registers."""
    n, d = out.shape[-2:]
    tag, real, least = TAGS[dtype_name(out)], TAGS[dtype_name(post)], max(1, _GRAIN // (n * d * n + 1))
    side_by_side = all(strides(each)[-1] == 1 for each in (y, x, out))
    for sizes, arrays in walk(out.shape[:-2], (1, 2, 1, 2, 2), y, x, post, comb, out):
        if n == 4 and side_by_side:
            parallel(_mix_four, math.prod(sizes), tag, real, sizes, d, *arrays, minimum=least)
        else:
            parallel(_mix, math.prod(sizes), tag, real, sizes, n, d, *arrays, minimum=least)


@jit
def _mix_four(start, stop, tag, real, sizes, d, y, x, post, comb, out):
    """Four streams, as models have, whose sums and terms fit the registers; the sums are those of `_mix`."""
    step = lanes(tag)
    memory, (weights,) = scratch(real, ((4, 5),))
    whole, zeros = d - d % step, vsplat(real)
    for token in range(start, stop):
        _weights(real, sizes, token, 4, post, comb, weights)
        new, old = of_task(tag, y, sizes, token), of_task(tag, x, sizes, token)
        goal = of_task(tag, out, sizes, token)
        for c in range(0, whole, step):
            term, first, second = vget(new, c, 0), vget(old, 0, c), vget(old, 1, c)
            third, fourth = vget(old, 2, c), vget(old, 3, c)
            for k in range(4):
                total = fma(first, get(weights, k, 1), fma(term, get(weights, k, 0), zeros))
                total = fma(third, get(weights, k, 3), fma(second, get(weights, k, 2), total))
                vput(goal, k, c, fma(fourth, get(weights, k, 4), total))
        for c in range(whole, d):
            term, first, second = get(new, c, 0), get(old, 0, c), get(old, 1, c)
            third, fourth = get(old, 2, c), get(old, 3, c)
            for k in range(4):
                total = fma(first, get(weights, k, 1), fma(term, get(weights, k, 0), real))
                total = fma(third, get(weights, k, 3), fma(second, get(weights, k, 2), total))
                put(goal, k, c, fma(fourth, get(weights, k, 4), total))
    return alive(memory)


@jit
def _weights(real, sizes, token, n, post, comb, weights):
    """What each new stream takes of the sublayer's output, and behind it of each old one."""
    gates, entries = of_task(real, post, sizes, token), of_task(real, comb, sizes, token)
    for k in range(n):
        put(weights, k, 0, get(gates, k, 0))
        for j in range(n):
            put(weights, k, j + 1, get(entries, j, k * comb[2][1]))


@jit
def _mix(start, stop, tag, real, sizes, n, d, y, x, post, comb, out):
    across = OUTER_VECTORS * lanes(tag)
    ld, padded_rows = _COLUMNS + across, -(-n // OUTER_ROWS) * OUTER_ROWS
    memory, (streams, sums, weights) = scratch(real, ((n + 1, ld), (padded_rows, ld), (padded_rows, n + 1)))
    for token in range(start, stop):
        _weights(real, sizes, token, n, post, comb, weights)
        new, old = of_task(tag, y, sizes, token), of_task(tag, x, sizes, token)
        goal = of_task(tag, out, sizes, token)
        for c in range(0, d, _COLUMNS):
            width = min(_COLUMNS, d - c)
            padded = -(-width // across) * across
            pack(tag, at(new, c, 0), (0, new.row), (1, width), streams, (1, padded))
            pack(tag, at(old, 0, c * x[2][1]), x[2], (n, width), shifted(streams, 1, 0), (n, padded))
            for j in range(0, padded, across):
                for i in range(0, n, OUTER_ROWS):
                    outer_tile(shifted(weights, i, 0), shifted(streams, 0, j), n + 1, shifted(sums, i, j), False)
            unpack(tag, sums, (n, width), at(goal, 0, c * out[2][1]), out[2])
    return alive(memory)


@jit
def _room(real, n):
    """What `_coefficients` works in: two vectors for each entry of mix, and for each factor of a row and a column."""
    return n * (n + 2) + 2 * n, 2 * lanes(real)


@jit
def _coefficients(first, last, sizes, n, target, mix, pre, post, comb, work):
    """Tokens first to last, two vectors of them at a time, each entry of theirs side by side."""
    iters, eps, scale, base = target
    real, count = work.tag, lanes(work.tag)
    pair = 2 * count
    work = pairs(work)
    scales, bases, small = Block(real, *scale), Block(real, *base), cast(real, eps)
    gates, matrix, factors = shifted(work, n, 0), shifted(work, 2 * n, 0), shifted(work, n * (n + 2), 0)
    row, column = comb[2]
    lines = 1 if row == n * column else n
    token = first
    while token < last:
        present = min(pair, last - token, sizes[2] - token % sizes[2])
        source = of_task(real, mix, sizes, token).base
        turn(real, source, (mix[1][2], mix[2][0]), (present, n * (n + 2)), work.base, (1, pair))
        for entry in range(n * (n + 2)):
            part = min(entry // n, 2)
            factor, bias = get(scales, part, 0), get(bases, entry, 0)
            for c in range(0, 2 * count, count):
                logit = fma(vget(work, entry, c), factor, bias)
                if part == 0:
                    logit = sigmoid(logit) + small
                elif part == 1:
                    logit = 2 * sigmoid(logit)
                vput(work, entry, c, logit)
        if n == 4:
            sinkhorn(matrix, 4, iters, small, factors)  # what the compiler knows, it unrolls
        elif n == 1:
            sinkhorn(matrix, 1, iters, small, factors)  # LLVM 22 unrolls for some processors as if there were two rows
        else:
            sinkhorn(matrix, n, iters, small, factors)
        goal, other = of_task(real, pre, sizes, token), of_task(real, post, sizes, token)
        turn(real, work.base, (pair, 1), (n, present), goal.base, (goal.row, pre[1][2]))
        turn(real, gates.base, (pair, 1), (n, present), other.base, (other.row, post[1][2]))
        width, goal = n * n // lines, of_task(real, comb, sizes, token)
        for j in range(lines):
            line = at(matrix, j * width, 0)
            turn(real, line, (pair, 1), (width, present), at(goal, j, 0), (column, comb[1][2]))
        token += present
