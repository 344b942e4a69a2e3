"""Hyper-connections on the CPU: a block of tokens is projected, normalised and collapsed while it stays in L2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from .._rows import rows, spread
from ._blocks import Block, pack, unpack
from ._gemm import DOT_DEPTH
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
from ._vectors import (
    TAGS,
    cast,
    exp,
    fma,
    lanes,
    load,
    size,
    store,
    transpose,
    vload,
    vsplat,
    vstore,
    vsum,
    where,
)

_BLOCK = 512 << 10  # bytes of streams that a task reads twice
_ROWS = 24  # tokens of a task at the most
_BOTH, _PROJECT, _COLLAPSE = 0, 1, 2
_COLUMNS = 512  # channels of a token that hc_post mixes at a time
_SPLIT = 32  # tokens of a task of hc_split_sinkhorn
_GRAIN = 1 << 17  # products worth a thread


def _tokens(lead: tuple[int, ...], tails: tuple[int, ...], *arrays: Any) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Blocks of tokens on three axes: their sizes; address, strides of tokens and of the last axes of each array."""
    for sizes, layouts in _layouts(lead, tails, *[(x.shape, strides(x)) for x in arrays]):
        pairs = zip(arrays, layouts, strict=True)
        yield sizes, [(pointer(x) + offset * x.itemsize, *own) for x, (offset, *own) in pairs]


@lru_cache(maxsize=256)
def _layouts(lead: tuple[int, ...], tails: tuple[int, ...], *arrays: tuple[Any, Any]) -> list[Any]:
    """As `_tokens`, from shapes and strides, with offsets for addresses; leading axes broadcast to `lead`."""
    leading = [spread(*array, len(lead), tail) for tail, array in zip(tails, arrays, strict=True)]
    last = [steps[-tail:] for tail, (_, steps) in zip(tails, arrays, strict=True)]
    return [(sizes, list(zip(offsets, own, last, strict=True))) for offsets, sizes, own in rows(lead, *leading)]


@jit
def _start(x, item, sizes, token):
    """Address of a token of one of `_tokens`."""
    address, steps, _ = x
    if token < sizes[2]:
        return address + token * steps[2] * item
    rest, k = divmod(token, sizes[2])
    i, j = divmod(rest, sizes[1])
    return address + (i * steps[0] + j * steps[1] + k * steps[2]) * item


def _whole(x: Any) -> Any:
    """A vector with its elements side by side."""
    return x.contiguous() if hasattr(x, "contiguous") else np.ascontiguousarray(x)


@kernel(deterministic=True, batch_invariant=True)
def hc_split_sinkhorn(mix: Any, scale: Any, base: Any, mult: int, iters: int, eps: float, out: Any) -> None:
    """A vector holds one entry of as many tokens as it has lanes; the rounds scale rows and columns, not entries."""
    scale, base, tag = _whole(scale), _whole(base), TAGS[dtype_name(mix)]
    for sizes, arrays in _tokens(mix.shape[:-1], (1, 1, 1, 2), mix, *out):
        tasks = -(-math.prod(sizes) // _SPLIT)
        parallel(_split, tasks, tag, sizes, mult, iters, eps, pointer(scale), pointer(base), *arrays, minimum=4)


@jit
def _split(start, stop, tag, sizes, n, iters, eps, scale, base, mix, pre, post, comb):
    held = np.empty(_work(tag, n) + 64, np.uint8)
    work = (np.int64(held.ctypes.data) + 63) & ~63
    first, last = start * _SPLIT, min(stop * _SPLIT, sizes[0] * sizes[1] * sizes[2])
    _coefficients(tag, first, last, sizes, n, iters, eps, scale, base, mix, pre, post, comb, work)
    return held[0]  # keeps the scratch alive until here


@kernel(deterministic=True, batch_invariant=True)
def hc_pre(
    x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, out: tuple[Any, Any, Any]
) -> None:
    """The tokens of a block are read from memory once; for few tokens, streams are projected in parallel first."""
    for sizes, arrays in _tokens(x.shape[:-2], (2, 1, 1, 2), x, *out):
        _run(x, fn, base, scale, iters, eps, norm_eps, sizes, *arrays)


@kernel(deterministic=True, batch_invariant=True)
def hc_head(x: Any, fn: Any, base: Any, scale: Any, eps: float, norm_eps: float, out: Any) -> None:
    """As `hc_pre`, with one gate for each stream."""
    nowhere = (0, 0, 0)
    for sizes, arrays in _tokens(x.shape[:-2], (2, 1), x, out):
        _run(x, fn, base, scale, 0, eps, norm_eps, sizes, *arrays, (0, nowhere, (0,)), (0, nowhere, (0, 0)))


def _run(
    x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, sizes: Any, *arrays: Any
) -> None:
    tokens, (n, d), columns = math.prod(sizes), x.shape[-2:], fn.shape[0]
    tag, real = TAGS[dtype_name(x)], TAGS[dtype_name(fn)]
    scale, base = _whole(scale), _whole(base)
    count = max(1, min(threads(), tokens * n * d * columns // _GRAIN))
    together = min(max(_BLOCK // (n * d * x.itemsize + 1), 1), _ROWS, -(-tokens // count))
    together = -(-together // DOT_ROWS) * DOT_ROWS
    blocks = -(-tokens // together)
    shape, weights = (n, d, columns, together), (pointer(fn), strides(fn))
    target = iters, eps, norm_eps, pointer(scale), pointer(base)
    parts = np.empty(n * tokens * (columns + 1) if blocks < count else 0, np.dtype(dtype_name(fn)))
    products = min(together, tokens) * n * d * columns + 1
    everything = tag, real, sizes, shape, weights, target, *arrays, pointer(parts)
    if blocks < count:
        parallel(_tasks, blocks * n, _PROJECT, *everything, minimum=max(1, _GRAIN * n // products))
        parallel(_tasks, blocks, _COLLAPSE, *everything)
    else:
        parallel(_tasks, blocks, _BOTH, *everything, minimum=max(1, _GRAIN // products))


@jit
def _tasks(start, stop, phase, tag, real, sizes, shape, weights, target, x, y, post, comb, parts):
    """Blocks of tokens from streams to results, or for few tokens in two phases; `parts` is what lies between."""
    n, _, columns, together = shape
    tokens = sizes[0] * sizes[1] * sizes[2]
    panels, local = _panels(real, shape), n * together * (columns + 1) * size(real)
    held = np.empty(panels + local + _small(real, shape) + 128, np.uint8)
    scratch = (np.int64(held.ctypes.data) + 63) & ~63
    work = (scratch + panels + local + 63) & ~63
    for task in range(start, stop):
        block, stream = divmod(task, n) if phase == _PROJECT else (task, 0)
        first = block * together
        last = min(first + together, tokens)
        origin, rows = (first, together) if phase == _BOTH else (0, tokens)
        into = scratch + panels if phase == _BOTH else parts
        if phase != _COLLAPSE:
            for each in range(stream, stream + 1 if phase == _PROJECT else n):
                _sums(tag, real, sizes, shape, x, weights, each, first, last, scratch, into, rows, origin)
        if phase != _PROJECT:
            _collapse(tag, real, sizes, shape, target, first, last, into, rows, origin, x, y, post, comb, work)
    return held[0]  # keeps the scratch alive until here


@jit
def _panels(real, shape):
    """Bytes that `_sums` works in: widened tokens, columns of fn, sums."""
    _, _, columns, together = shape
    return (((together + columns) * DOT_DEPTH + (together + DOT_ROWS) * (columns + DOT_WIDTH)) * size(real) + 63) & ~63


@jit
def _small(real, shape):
    """Bytes that `_collapse` works in: mix, pre, and what `_coefficients` takes."""
    n, _, columns, together = shape
    return together * (columns + n) * size(real) + _work(real, n) + 64


@jit
def _sums(tag, real, sizes, shape, x, weights, stream, first, last, scratch, parts, held, origin):
    """parts[stream, token - origin] of tokens first to last; `held` tokens lie in a stream of `parts`."""
    _, d, columns, together = shape
    (fn, fn_steps), x_steps = weights, x[2]
    item, unit, step = size(tag), size(real), lanes(tag)
    rows, ld = last - first, columns + DOT_WIDTH
    panel = scratch + together * DOT_DEPTH * unit
    sums = panel + columns * DOT_DEPTH * unit
    own = parts + (stream * held + first - origin) * (columns + 1) * unit
    across = DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
    for i in range(rows):
        for column in range(columns + 1):
            store(real, own + (i * (columns + 1) + column) * unit, real)
    for begin in range(0, d, DOT_DEPTH):
        depth = min(DOT_DEPTH, d - begin)
        padded = -(-depth // step) * step
        for i in range(rows):
            source = _start(x, item, sizes, first + i) + (stream * x_steps[0] + begin * x_steps[1]) * item
            row = scratch + i * DOT_DEPTH * unit
            pack(tag, source, (0, x_steps[1]), (1, depth), Block(real, row, DOT_DEPTH), (1, padded))
            squares = vsplat(real)
            for c in range(0, padded, step):
                value = vload(real, row + c * unit)
                squares = fma(value, value, squares)
            square = own + (i * (columns + 1) + columns) * unit
            store(real, square, load(real, square) + vsum(squares))
        weight, ldw = fn + (stream * d + begin) * fn_steps[1] * unit, fn_steps[0]
        if fn_steps[1] != 1 or padded != depth:
            pack(
                real,
                weight,
                (fn_steps[0], fn_steps[1]),
                (columns, depth),
                Block(real, panel, DOT_DEPTH),
                (columns, padded),
            )
            weight, ldw = panel, DOT_DEPTH
        for j in range(0, columns, across):
            valid, right = min(across, columns - j), weight + j * ldw * unit
            if rows == 1:
                dot_row(
                    Block(real, scratch, DOT_DEPTH),
                    Block(real, right, ldw),
                    valid,
                    padded,
                    Block(real, sums + j * unit, ld),
                    begin > 0,
                )
            else:
                for i in range(0, rows, DOT_ROWS):
                    left, into = scratch + i * DOT_DEPTH * unit, sums + (i * ld + j) * unit
                    dot_tile(
                        Block(real, left, DOT_DEPTH),
                        Block(real, right, ldw),
                        valid,
                        padded,
                        Block(real, into, ld),
                        begin > 0,
                    )
    for i in range(rows if d else 0):
        for column in range(columns):
            store(real, own + (i * (columns + 1) + column) * unit, load(real, sums + (i * ld + column) * unit))


@jit
def _collapse(tag, real, sizes, shape, target, first, last, parts, held, origin, x, y, post, comb, work):
    """From the sums of a block to its results."""
    n, d, columns, together = shape
    iters, eps, norm_eps, scale, base = target
    x_steps, y_step = x[2], y[2][0]
    item, unit, step = size(tag), size(real), lanes(tag)
    rows = last - first
    mix = work
    pre = mix + together * columns * unit
    rest = (pre + together * n * unit + 63) & ~63
    for i in range(rows):
        source = parts + (first + i - origin) * (columns + 1) * unit
        squares = real
        for stream in range(n):
            squares += load(real, source + (stream * held * (columns + 1) + columns) * unit)
        factor = 1 / np.sqrt(squares / cast(real, max(n * d, 1)) + cast(real, norm_eps))
        for column in range(columns):
            total = real
            for stream in range(n):
                total += load(real, source + (stream * held * (columns + 1) + column) * unit)
            store(real, mix + (i * columns + column) * unit, total * factor)
    if iters:
        logits, gates = _packed(mix, columns, real, sizes, first), _packed(pre, n, real, sizes, first)
        _coefficients(real, first, last, sizes, n, iters, eps, scale, base, logits, gates, post, comb, rest)
    else:
        for i in range(rows * n):
            logit = load(real, mix + i * unit) * load(real, scale) + load(real, base + i % n * unit)
            store(real, pre + i * unit, cast(real, 1 / (1 + np.exp(-np.float64(logit))) + eps))
    for i in range(rows):
        source, goal = _start(x, item, sizes, first + i), _start(y, item, sizes, first + i)
        gate = pre + i * n * unit
        whole = d - d % step if x_steps[1] == 1 and y_step == 1 else 0
        for c in range(0, whole, step):
            total = vload(tag, source + c * item) * vsplat(load(real, gate))
            for j in range(1, n):
                stream = vload(tag, source + (j * x_steps[0] + c) * item)
                total = fma(stream, vsplat(load(real, gate + j * unit)), total)
            vstore(tag, goal + c * item, total)
        for c in range(whole, d):
            value = load(tag, source + c * x_steps[1] * item) * load(real, gate)
            for j in range(1, n):
                stream = load(tag, source + (j * x_steps[0] + c * x_steps[1]) * item)
                value = fma(stream, load(real, gate + j * unit), value)
            store(tag, goal + c * y_step * item, value)


@jit
def _packed(address, width, real, sizes, first):
    """As of `_tokens`: vectors of tokens one behind the other, the first of them at the address."""
    steps = sizes[1] * sizes[2] * width, sizes[2] * width, width
    return address - first * width * size(real), steps, (1,)


@kernel(deterministic=True, batch_invariant=True)
def hc_post(y: Any, x: Any, post: Any, comb: Any, out: Any) -> None:
    """Each channel of a token is read once, the streams and the new one together, and mixed in registers."""
    n, d = out.shape[-2:]
    tag, real, least = TAGS[dtype_name(out)], TAGS[dtype_name(post)], max(1, _GRAIN // (n * d * n + 1))
    for sizes, arrays in _tokens(out.shape[:-2], (1, 2, 1, 2, 2), y, x, post, comb, out):
        parallel(_mix, math.prod(sizes), tag, real, sizes, n, d, *arrays, minimum=least)


@jit
def _mix(start, stop, tag, real, sizes, n, d, y, x, post, comb, out):
    item, unit = size(tag), size(real)
    across = OUTER_VECTORS * lanes(tag)
    ld = _COLUMNS + across
    rows = -(-n // OUTER_ROWS) * OUTER_ROWS
    held = np.empty(((n + 1 + rows) * ld + rows * (n + 1)) * unit + 64, np.uint8)
    wide_rows = (np.int64(held.ctypes.data) + 63) & ~63
    sums = wide_rows + (n + 1) * ld * unit
    weights = sums + rows * ld * unit
    for token in range(start, stop):
        gates, entries = _start(post, unit, sizes, token), _start(comb, unit, sizes, token)
        for k in range(n):
            row = weights + k * (n + 1) * unit
            store(real, row, load(real, gates + k * post[2][0] * unit))
            for j in range(n):
                entry = entries + (j * comb[2][0] + k * comb[2][1]) * unit
                store(real, row + (j + 1) * unit, load(real, entry))
        new, streams = _start(y, item, sizes, token), _start(x, item, sizes, token)
        goal = _start(out, item, sizes, token)
        for c in range(0, d, _COLUMNS):
            width = min(_COLUMNS, d - c)
            padded = -(-width // across) * across
            pack(tag, new + c * y[2][0] * item, (0, y[2][0]), (1, width), Block(real, wide_rows, ld), (1, padded))
            source = streams + c * x[2][1] * item
            pack(tag, source, (x[2][0], x[2][1]), (n, width), Block(real, wide_rows + ld * unit, ld), (n, padded))
            for j in range(0, padded, across):
                for i in range(0, n, OUTER_ROWS):
                    left, into = weights + i * (n + 1) * unit, sums + (i * ld + j) * unit
                    outer_tile(
                        Block(real, left, n + 1),
                        Block(real, wide_rows + j * unit, ld),
                        n + 1,
                        Block(real, into, ld),
                        False,
                    )
            unpack(tag, Block(real, sums, ld), (n, width), goal + c * out[2][1] * item, (out[2][0], out[2][1]))
    return held[0]  # keeps the scratch alive until here


@jit
def _work(real, n):
    """Bytes that `_coefficients` works in."""
    return (n * (n + 2) + 2 * n) * 2 * lanes(real) * size(real)


@jit
def _sigmoid(real, x):
    power = exp(-abs(x))
    return where(x < 0, power, 1) / (1 + power)


@jit
def _coefficients(real, first, last, sizes, n, iters, eps, scale, base, mix, pre, post, comb, work):
    """Tokens first to last, two vectors of them at a time, each entry of theirs side by side."""
    count, unit = lanes(real), size(real)
    vector, pair = count * unit, 2 * count * unit
    matrix, factors = work + 2 * n * pair, work + n * (n + 2) * pair
    lines = 1 if comb[2][0] == n * comb[2][1] else n
    small = vsplat(cast(real, eps))
    token = first
    while token < last:
        present = min(2 * count, last - token, sizes[2] - token % sizes[2])
        source = _start(mix, unit, sizes, token)
        _turn(real, source, mix[1][2], mix[2][0], present, n * (n + 2), work, 1, 2 * count)
        for column in range(n * (n + 2)):
            part = min(column // n, 2)
            factor, bias = vsplat(load(real, scale + part * unit)), vsplat(load(real, base + column * unit))
            for at in range(work + column * pair, work + (column + 1) * pair, vector):
                logit = fma(vload(real, at), factor, bias)
                if part == 0:
                    logit = _sigmoid(real, logit) + small
                elif part == 1:
                    logit = _sigmoid(real, logit)
                    logit += logit
                vstore(real, at, logit)
        if n == 4:
            _sinkhorn(real, matrix, 4, iters, small, factors)  # what the compiler knows, it unrolls
        else:
            _sinkhorn(real, matrix, n, iters, small, factors)
        goal, other = _start(pre, unit, sizes, token), _start(post, unit, sizes, token)
        _turn(real, work, 2 * count, 1, n, present, goal, pre[2][0], pre[1][2])
        _turn(real, work + n * pair, 2 * count, 1, n, present, other, post[2][0], post[1][2])
        width, goal = n * n // lines, _start(comb, unit, sizes, token)
        for j in range(lines):
            line = matrix + j * width * pair
            _turn(real, line, 2 * count, 1, width, present, goal + j * comb[2][0] * unit, comb[2][1], comb[1][2])
        token += present


@jit
def _turn(real, source, row, column, rows, columns, target, target_row, target_column):
    """Copy a block of any strides, where it is transposed by tiles; the last ones overlap."""
    count, unit = lanes(real), size(real)
    if column == 1 and target_row == 1 and min(rows, columns) >= count:
        for i in range(0, rows, count):
            r = min(i, rows - count)
            for j in range(0, columns, count):
                c = min(j, columns - count)
                goal = target + (r + c * target_column) * unit
                transpose(real, source + (r * row + c) * unit, row, goal, target_column)
    else:
        for r in range(rows):
            for c in range(columns):
                value = load(real, source + (r * row + c * column) * unit)
                store(real, target + (r * target_row + c * target_column) * unit, value)


@jit
def _sinkhorn(real, matrix, n, iters, small, factors):
    """Two vectors of matrices, from logits to comb; `factors` of their rows and columns are worked in."""
    vector, one = lanes(real) * size(real), vsplat(cast(real, 1.0))
    pair = 2 * vector
    columns = factors + n * pair
    _softmax(real, matrix, n, small)
    _softmax(real, matrix + vector, n, small)
    for at in range(factors, factors + 2 * n * pair, vector):
        vstore(real, at, one)
    _normalise(real, matrix, n, pair, n * pair, factors, columns, small)
    for _ in range(iters - 1):
        _normalise(real, matrix, n, n * pair, pair, columns, factors, small)
        _normalise(real, matrix, n, pair, n * pair, factors, columns, small)
    for j in range(n):
        for k in range(n):
            for at in range(0, pair, vector):
                entry = matrix + (j * n + k) * pair + at
                both = vload(real, factors + j * pair + at) * vload(real, columns + k * pair + at)
                vstore(real, entry, vload(real, entry) * both)


@jit
def _softmax(real, matrix, n, small):
    """Softmax of each row, plus eps, for one of the two vectors of an entry."""
    pair, one = 2 * lanes(real) * size(real), vsplat(cast(real, 1.0))
    for j in range(n):
        row = matrix + j * n * pair
        top = vload(real, row)
        for k in range(1, n):
            value = vload(real, row + k * pair)
            top = where(top < value, value, top)
        total = vsplat(real)
        for k in range(n):
            value = exp(vload(real, row + k * pair) - top)
            total += value
            vstore(real, row + k * pair, value)
        factor = one / total
        for k in range(n):
            vstore(real, row + k * pair, fma(vload(real, row + k * pair), factor, small))


@jit
def _normalise(real, matrix, n, across, along, others, own, small):
    """own /= own * (sums of the matrix along one axis, weighted by the factors of the other) + eps."""
    vector = lanes(real) * size(real)
    pair = 2 * vector
    for i in range(n):
        line, target = matrix + i * across, own + i * pair
        p = q = vsplat(real)
        for j in range(n):
            entry, other = line + j * along, others + j * pair
            p = fma(vload(real, entry), vload(real, other), p)
            q = fma(vload(real, entry + vector), vload(real, other + vector), q)
        factor, second = vload(real, target), vload(real, target + vector)
        vstore(real, target, factor / fma(p, factor, small))
        vstore(real, target + vector, second / fma(q, second, small))
