"""Hyper-connections on the CPU: a block of tokens is projected, normalised and collapsed while it stays in L2."""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._attention_simd import cast, vdiv, vexp
from ._gemm import DOT_DEPTH, TAGS, pack, unpack
from ._simd import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    DOT_WIDTH,
    OUTER_ROWS,
    OUTER_VECTORS,
    dot_row,
    dot_tile,
    fma,
    lanes,
    load,
    outer_tile,
    size,
    store,
    vadd,
    vload,
    vmax,
    vmul,
    vsplat,
    vstore,
    vsub,
    vsum,
)

_BLOCK = 512 << 10  # bytes of streams that a task reads twice
_ROWS = 24  # tokens of a task at the most
_BOTH, _PROJECT, _COLLAPSE = 0, 1, 2
_COLUMNS = 512  # channels of a token that hc_post mixes at a time


def _places(x: Any, lead: tuple[int, ...], tail: int) -> Any:
    """Where each token starts, in elements; batch axes broadcast to `lead`."""
    shape, steps = tuple(x.shape)[: x.ndim - tail], strides(x)
    result = np.zeros(lead, np.int64)
    for axis, (extent, step) in enumerate(zip(shape, steps, strict=False), len(lead) - len(shape)):
        if extent > 1:
            result += (np.arange(extent) * step).reshape(-1, *[1] * (len(lead) - axis - 1))
    return result.reshape(-1)


def _whole(x: Any) -> Any:
    """A vector with its elements side by side."""
    return x.contiguous() if hasattr(x, "contiguous") else np.ascontiguousarray(x)


@kernel(deterministic=True, batch_invariant=True)
def hc_split_sinkhorn(mix: Any, scale: Any, base: Any, mult: int, iters: int, eps: float, out: Any) -> None:
    """A vector holds one entry of as many tokens as it has lanes; the rounds scale rows and columns, not entries."""
    lead, tag = tuple(mix.shape)[:-1], TAGS[dtype_name(mix)]
    scale, base = _whole(scale), _whole(base)
    at = _places(mix, lead, 1)
    outs = [(pointer(x), _places(x, lead, tail), strides(x)[-tail:]) for x, tail in zip(out, (1, 1, 2), strict=True)]
    parallel(
        _split, -(-len(at) // 16), tag, len(at), mult, iters, eps, pointer(scale), pointer(base),
        pointer(mix), at, strides(mix)[-1], *outs, minimum=4,
    )  # fmt: skip


@jit
def _split(start, stop, tag, tokens, n, iters, eps, scale, base, mix, at, step, pre, post, comb):
    held = np.empty(_work(tag, n) + 64, np.uint8)
    work = (np.int64(held.ctypes.data) + 63) & ~63
    first, last = start * 16, min(stop * 16, tokens)
    _coefficients(tag, first, last, n, iters, eps, scale, base, mix, at, step, pre, post, comb, work)
    return held[0]  # keeps the scratch alive until here


@kernel(deterministic=True, batch_invariant=True)
def hc_pre(
    x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, out: tuple[Any, Any, Any]
) -> None:
    """The tokens of a block are read from memory once; for few tokens, streams are projected in parallel first."""
    y, post, comb = out
    lead = tuple(y.shape)[:-1]
    others = [(pointer(z), _places(z, lead, tail), strides(z)[-tail:]) for z, tail in ((post, 1), (comb, 2))]
    _run(x, fn, base, scale, iters, eps, norm_eps, y, *others)


@kernel(deterministic=True, batch_invariant=True)
def hc_head(x: Any, fn: Any, base: Any, scale: Any, eps: float, norm_eps: float, out: Any) -> None:
    """As `hc_pre`, with one gate for each stream."""
    nothing = np.zeros(0, np.int64)
    _run(x, fn, base, scale, 0, eps, norm_eps, out, (0, nothing, (0,)), (0, nothing, (0, 0)))


def _run(
    x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, y: Any, post: Any, comb: Any
) -> None:
    lead, (n, d), columns = tuple(y.shape)[:-1], tuple(x.shape)[-2:], fn.shape[0]
    tag, real, count = TAGS[dtype_name(x)], TAGS[dtype_name(fn)], threads()
    scale, base = _whole(scale), _whole(base)
    at = _places(x, lead, 2)
    tokens = len(at)
    if not tokens:
        return
    together = min(max(_BLOCK // (n * d * x.dtype.itemsize + 1), 1), _ROWS, -(-tokens // count))
    together = -(-together // DOT_ROWS) * DOT_ROWS
    blocks = -(-tokens // together)
    shape, streams = (n, d, columns, together), (tag, pointer(x), at, strides(x)[-2:])
    weights = pointer(fn), strides(fn)
    target = (iters, eps, norm_eps, pointer(scale), pointer(base), pointer(y), _places(y, lead, 1), strides(y)[-1])
    parts = np.empty((n, tokens, columns + 1) if blocks < count else 0, np.dtype(dtype_name(fn)))
    everything = tokens, real, shape, streams, weights, target, post, comb, pointer(parts)
    if blocks < count:
        parallel(_tasks, blocks * n, _PROJECT, *everything)
        parallel(_tasks, blocks, _COLLAPSE, *everything)
    else:
        parallel(_tasks, blocks, _BOTH, *everything)


@jit
def _tasks(start, stop, phase, tokens, real, shape, streams, weights, target, post, comb, parts):
    """Blocks of tokens from streams to results, or for few tokens in two phases; `parts` is what lies between."""
    n, _, columns, together = shape
    panels, local = _panels(real, shape), n * together * (columns + 1) * size(real)
    held = np.zeros(panels + local + _small(real, shape) + 128, np.uint8)
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
                _sums(real, shape, streams, weights, each, first, last, scratch, into, rows, origin)
        if phase != _PROJECT:
            _collapse(real, shape, streams, target, first, last, into, rows, origin, post, comb, work)
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
def _sums(real, shape, streams, weights, stream, first, last, scratch, parts, held, origin):
    """parts[stream, token - origin] of tokens first to last; `held` tokens lie in a stream of `parts`."""
    _, d, columns, together = shape
    tag, x, at, x_steps = streams
    fn, fn_steps = weights
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
            source = x + (at[first + i] + stream * x_steps[0] + begin * x_steps[1]) * item
            row = scratch + i * DOT_DEPTH * unit
            pack(tag, source, 0, x_steps[1], 1, depth, row, DOT_DEPTH, 1, padded)
            squares = vsplat(real)
            for c in range(0, padded, step):
                value = vload(real, row + c * unit)
                squares = fma(value, value, squares)
            square = own + (i * (columns + 1) + columns) * unit
            store(real, square, load(real, square) + vsum(squares))
        weight, ldw = fn + (stream * d + begin) * fn_steps[1] * unit, fn_steps[0]
        if fn_steps[1] != 1 or padded != depth:
            pack(real, weight, fn_steps[0], fn_steps[1], columns, depth, panel, DOT_DEPTH, columns, padded)
            weight, ldw = panel, DOT_DEPTH
        for j in range(0, columns, across):
            valid, right = min(across, columns - j), weight + j * ldw * unit
            if rows == 1:
                dot_row(real, scratch, DOT_DEPTH, right, ldw, valid, padded, sums + j * unit, ld, begin > 0)
            else:
                for i in range(0, rows, DOT_ROWS):
                    left, into = scratch + i * DOT_DEPTH * unit, sums + (i * ld + j) * unit
                    dot_tile(real, left, DOT_DEPTH, right, ldw, valid, padded, into, ld, begin > 0)
    for i in range(rows if d else 0):
        for column in range(columns):
            store(real, own + (i * (columns + 1) + column) * unit, load(real, sums + (i * ld + column) * unit))


@jit
def _collapse(real, shape, streams, target, first, last, parts, held, origin, post, comb, work):
    """From the sums of a block to its results."""
    n, d, columns, together = shape
    tag, x, at, x_steps = streams
    iters, eps, norm_eps, scale, base, y, y_at, y_step = target
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
        here = np.arange(first, last) - first
        gates = (pre, here * n, (1,))
        mine, other = (post[0], post[1][first:last], post[2]), (comb[0], comb[1][first:last], comb[2])
        _coefficients(real, 0, rows, n, iters, eps, scale, base, mix, here * columns, 1, gates, mine, other, rest)
    else:
        for i in range(rows * n):
            logit = load(real, mix + i * unit) * load(real, scale) + load(real, base + i % n * unit)
            store(real, pre + i * unit, cast(real, 1 / (1 + np.exp(-np.float64(logit))) + eps))
    for i in range(rows):
        source, goal, gate = x + at[first + i] * item, y + y_at[first + i] * item, pre + i * n * unit
        whole = d - d % step if x_steps[1] == 1 and y_step == 1 else 0
        for c in range(0, whole, step):
            total = vmul(vload(tag, source + c * item), vsplat(load(real, gate)))
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


@kernel(deterministic=True, batch_invariant=True)
def hc_post(y: Any, x: Any, post: Any, comb: Any, out: Any) -> None:
    """Each channel of a token is read once, the streams and the new one together, and mixed in registers."""
    lead, (n, d) = tuple(out.shape)[:-2], tuple(out.shape)[-2:]
    tokens = int(np.prod(lead))
    parts = [
        (pointer(z), _places(z, lead, tail), strides(z)[-tail:])
        for z, tail in ((y, 1), (x, 2), (post, 1), (comb, 2), (out, 2))
    ]
    least = max(1, (64 << 10) // (n * d * n + 1))
    parallel(_mix, tokens, TAGS[dtype_name(out)], TAGS[dtype_name(post)], n, d, *parts, minimum=least)


@jit
def _mix(start, stop, tag, real, n, d, y, x, post, comb, out):
    item, unit = size(tag), size(real)
    across = OUTER_VECTORS * lanes(tag)
    ld = _COLUMNS + across
    rows = -(-n // OUTER_ROWS) * OUTER_ROWS
    held = np.zeros(((n + 1 + rows) * ld + rows * (n + 1)) * unit + 64, np.uint8)
    wide_rows = (np.int64(held.ctypes.data) + 63) & ~63
    sums = wide_rows + (n + 1) * ld * unit
    weights = sums + rows * ld * unit
    for token in range(start, stop):
        for k in range(n):
            gate = post[0] + (post[1][token] + k * post[2][0]) * unit
            store(real, weights + k * (n + 1) * unit, load(real, gate))
            for j in range(n):
                entry = comb[0] + (comb[1][token] + j * comb[2][0] + k * comb[2][1]) * unit
                store(real, weights + (k * (n + 1) + j + 1) * unit, load(real, entry))
        new, streams, goal = y[0] + y[1][token] * item, x[0] + x[1][token] * item, out[0] + out[1][token] * item
        for c in range(0, d, _COLUMNS):
            width = min(_COLUMNS, d - c)
            padded = -(-width // across) * across
            pack(tag, new + c * y[2][0] * item, 0, y[2][0], 1, width, wide_rows, ld, 1, padded)
            source = streams + c * x[2][1] * item
            pack(tag, source, x[2][0], x[2][1], n, width, wide_rows + ld * unit, ld, n, padded)
            for j in range(0, padded, across):
                for i in range(0, n, OUTER_ROWS):
                    left, into = weights + i * (n + 1) * unit, sums + (i * ld + j) * unit
                    outer_tile(real, left, n + 1, wide_rows + j * unit, ld, n + 1, into, ld, False)
            unpack(tag, sums, ld, n, width, goal + c * out[2][1] * item, out[2][0], out[2][1], 0, 0)
    return held[0]  # keeps the scratch alive until here


@jit
def _work(real, n):
    """Bytes that `_coefficients` works in."""
    return (n * (n + 2) + 2 * n) * lanes(real) * size(real)


@jit
def _sigmoid(real, x):
    zero = vsplat(real)
    low = vexp(vsub(zero, vmax(vsub(zero, x), zero)))  # exp(min(x, 0))
    return vdiv(low, vadd(low, vexp(vsub(zero, vmax(x, zero)))))


@jit
def _coefficients(real, first, last, n, iters, eps, scale, base, mix, at, step, pre, post, comb, work):
    """Tokens first to last: `mix` is at[token], and each result an address, places of the tokens, and strides."""
    count = lanes(real)
    unit = size(real)
    vector = count * unit
    rows = work + n * (n + 2) * vector
    columns = rows + n * vector
    matrix = work + 2 * n * vector
    one, small = vsplat(cast(real, 1.0)), vsplat(cast(real, eps))
    for token in range(first, last, count):
        present = min(count, last - token)
        for i in range(count):
            source = mix + at[token + min(i, present - 1)] * unit
            for column in range(n * (n + 2)):
                store(real, work + column * vector + i * unit, load(real, source + column * step * unit))
        for column in range(n * (n + 2)):
            part = min(column // n, 2)
            factor, bias = vsplat(load(real, scale + part * unit)), vsplat(load(real, base + column * unit))
            logit = fma(vload(real, work + column * vector), factor, bias)
            if part == 0:
                logit = vadd(_sigmoid(real, logit), small)
            elif part == 1:
                logit = _sigmoid(real, logit)
                logit = vadd(logit, logit)
            vstore(real, work + column * vector, logit)
        _softmax(real, matrix, n, small)
        for i in range(n):
            vstore(real, rows + i * vector, one)
            vstore(real, columns + i * vector, one)
        _normalise(real, matrix, n, vector, n * vector, rows, columns, small)
        for _ in range(iters - 1):
            _normalise(real, matrix, n, n * vector, vector, columns, rows, small)
            _normalise(real, matrix, n, vector, n * vector, rows, columns, small)
        for j in range(n):
            for k in range(n):
                entry = matrix + (j * n + k) * vector
                both = vmul(vload(real, rows + j * vector), vload(real, columns + k * vector))
                vstore(real, entry, vmul(vload(real, entry), both))
        for i in range(present):
            lane = work + i * unit
            for j in range(n):
                store(real, pre[0] + (pre[1][token + i] + j * pre[2][0]) * unit, load(real, lane + j * vector))
                store(real, post[0] + (post[1][token + i] + j * post[2][0]) * unit, load(real, lane + (n + j) * vector))
                for k in range(n):
                    place = comb[1][token + i] + j * comb[2][0] + k * comb[2][1]
                    store(real, comb[0] + place * unit, load(real, lane + ((j + 2) * n + k) * vector))


@jit
def _softmax(real, matrix, n, small):
    """Softmax of each row, plus eps."""
    vector = lanes(real) * size(real)
    for j in range(n):
        row = matrix + j * n * vector
        top = vload(real, row)
        for k in range(1, n):
            top = vmax(top, vload(real, row + k * vector))
        total = vsplat(real)
        for k in range(n):
            value = vexp(vsub(vload(real, row + k * vector), top))
            total = vadd(total, value)
            vstore(real, row + k * vector, value)
        for k in range(n):
            vstore(real, row + k * vector, vadd(vdiv(vload(real, row + k * vector), total), small))


@jit
def _normalise(real, matrix, n, across, along, others, own, small):
    """own /= own * (sums of the matrix along one axis, weighted by the factors of the other) + eps."""
    vector = lanes(real) * size(real)
    for i in range(n):
        line = matrix + i * across
        total = vsplat(real)
        for j in range(n):
            total = fma(vload(real, line + j * along), vload(real, others + j * vector), total)
        factor = vload(real, own + i * vector)
        vstore(real, own + i * vector, vdiv(factor, fma(total, factor, small)))
