"""Gradients of hyper-connections on the CPU: products as in `_gemm`, the rest in two passes over the tokens.

The streams are widened once, beside their squares and their products with the gradient of the collapsed stream. A
vector then holds an entry of as many tokens as it has lanes, as in the forward, and Sinkhorn's rounds are gone through
backwards. The gradient of the streams is mixed where the product with `fn` leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides

from ._blocks import (
    Block,
    alive,
    at,
    cleared,
    get,
    of_task,
    pack,
    put,
    round_up,
    shifted,
    turn,
    unpack,
    vget,
    vput,
    walk,
)
from ._gemm import contract, empty, ones, view
from ._sinkhorn import pairs, sigmoid, sinkhorn_backward
from ._tiles import DOT_COLUMNS, DOT_ROWS, DOT_WIDTH, OUTER_ROWS, OUTER_VECTORS, dot_tile, outer_tile
from ._vectors import LANES, TAGS, cast, fma, lanes, vsplat, vsum

_TOKENS = 32  # of a task
_COLUMNS = 256  # channels of a token that hc_post's gradients are made of at a time


def _dense(x: Any, lead: Sequence[int], tail: int, real: str) -> Any:
    """``[tokens, ...]`` in a dtype, one row behind the other."""
    shape = (1, *x.shape[len(x.shape) - tail :])[-2:]
    result = np.empty((math.prod(lead), *shape), real)
    at = 0
    for sizes, (source,) in walk(lead, (tail,), x):
        count, steps = math.prod(sizes), (0, *source[2])[-2:]
        to = pointer(result) + at * math.prod(shape) * result.itemsize
        parallel(_widen, count, TAGS[dtype_name(x)], TAGS[real], sizes, (*source[:2], steps), shape, to, minimum=64)
        at += count
    return result


@jit
def _widen(start, stop, tag, real, sizes, x, shape, goal):
    rows, columns = shape
    for token in range(start, stop):
        source, target = of_task(tag, x, sizes, token), Block(real, goal, columns)
        pack(tag, source.base, x[2], shape, shifted(target, token * rows, 0), shape)


def _left(values: Any, like: Any) -> Any:
    """Numbers of NumPy as an array of the kind of another, of its shape and dtype."""
    result = empty(like, like.shape)
    tag, shape = TAGS[dtype_name(like)], (1, values.size)
    _widen(0, 1, tag, tag, (1, 1, 1), (pointer(values), (0, 0, 0), (0, 1)), shape, pointer(result))
    return result


def hc_split_sinkhorn_backward(
    grad: Any, mix: Any, scale: Any, base: Any, mult: int, iters: int, eps: float, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """Through the rounds backwards, from the factors of rows and columns."""
    if not math.prod(mix.shape):
        return NotImplemented
    lead, real = mix.shape[:-1], dtype_name(mix)
    grads = [_dense(g, lead, tail, real) for g, tail in zip(grad, (1, 1, 2), strict=True)]
    target, found = (iters, eps, *_places(scale, base)), empty(mix, mix.shape)
    of_scale, of_base = _slopes(_dense(mix, lead, 1, real), None, grads, mult, target, pointer(found), (None, None))
    return _asked((found, _left(of_scale, scale), _left(of_base, base)), needs)


def hc_pre_backward(
    grad: Any, x: Any, fn: Any, base: Any, scale: Any, iters: int, eps: float, norm_eps: float, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """The streams are read three times, and their gradient is written once."""
    if not math.prod(x.shape):
        return NotImplemented
    (*lead, n, d), columns, real = x.shape, fn.shape[0], dtype_name(fn)
    tag = TAGS[real]
    streams = _dense(x, lead, 2, real).reshape(-1, n * d)
    near, *others = (_dense(g, lead, tail, real) for g, tail in zip(grad, (1, 1, 2), strict=True))
    tokens = len(streams)
    factors, along, weights, gates = (np.empty((tokens, width), real) for width in (1, 1, n, n))
    mix, scaled = (np.empty((tokens, columns), real) for _ in range(2))
    sides = pointer(streams), pointer(near)
    parallel(_weigh, tokens, tag, n, d, norm_eps, *sides, pointer(factors), pointer(weights), minimum=16)
    contract(real, view(streams), view(fn).T, view(mix))
    target = iters, eps, *_places(scale, base)
    of_scale, of_base = _slopes(mix, factors, (weights, *others), n, target, pointer(scaled), (along, gates))
    along *= factors * factors / -(n * d)
    found, of_fn = empty(x, x.shape), empty(fn, fn.shape)
    if needs[0]:
        across = round_up.py_func(d, OUTER_VECTORS * LANES)
        panel = np.zeros((columns, n * across), real)
        for stream in range(n):
            source = pointer(fn) + stream * d * strides(fn)[1] * fn.itemsize
            _spread(tag, source, strides(fn), (columns, d), pointer(panel[:, stream * across :]), n * across)
        parts = pointer(scaled), pointer(along), pointer(gates)
        tasks = -(-tokens // OUTER_ROWS)
        parallel(_give, tasks, TAGS[dtype_name(x)], tag, (tokens, n, d), columns, *sides, *parts, pointer(panel),
                 n * across, pointer(found), minimum=4)  # fmt: skip
    if needs[1]:
        contract(real, view(scaled).T, view(streams), view(of_fn))
    return _asked((found, of_fn, _left(of_base, base), _left(of_scale, scale)), needs)


def _asked(grads: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _places(*vectors: Any) -> list[tuple[int, int]]:
    return [(pointer(x), strides(x)[0]) for x in vectors]


def _slopes(
    mix: Any, factors: Any, grads: Sequence[Any], n: int, target: Any, scaled: int, others: tuple[Any, Any]
) -> tuple[Any, Any]:
    """The gradients of scale and base; that of mix before its `factors` to the address `scaled`, and for `hc_pre` its
    products with mix and the gates of the streams to `others`."""
    real, tokens, columns = mix.dtype.name, len(mix), n * (n + 2)
    sums = np.empty((tokens, 2 * columns), real)
    places = [0 if x is None else pointer(x) for x in (mix, factors, *grads, sums, *others)]
    tasks = -(-tokens // _TOKENS)
    parallel(_slope, tasks, TAGS[real], tokens, n, target, scaled, *places)
    total = np.empty((1, 2 * columns), real)
    contract(real, ones(real, tokens), view(sums), view(total))
    of_base, products = np.split(total[0], 2)
    return np.stack([part.sum() for part in np.split(products, (n, 2 * n))]), of_base


@jit
def _weigh(start, stop, real, n, d, norm_eps, x, near, factors, weights):
    """One over the root mean square of a token's streams, and the product of each with the gradient of their sum."""
    step = lanes(real)
    whole = d - d % step
    for token in range(start, stop):
        streams, slope = Block(real, at(Block(real, x, n * d), token, 0), d), shifted(Block(real, near, d), token, 0)
        squares = real
        for j in range(n):
            total, square = vsplat(real), vsplat(real)
            for c in range(0, whole, step):
                value = vget(streams, j, c)
                square = fma(value, value, square)
                total = fma(value, vget(slope, 0, c), total)
            dot, squared = vsum(total), vsum(square)
            for c in range(whole, d):
                value = get(streams, j, c)
                squared += value * value
                dot += value * get(slope, 0, c)
            squares += squared
            put(Block(real, weights, n), token, j, dot)
        put(Block(real, factors, 1), token, 0, 1 / np.sqrt(squares / cast(real, n * d) + cast(real, norm_eps)))


@jit
def _slope(start, stop, real, tokens, n, target, scaled, mix, factors, pre, post, comb, sums, along, gates):
    iters, eps, scale, base = target
    columns, count, pair = n * (n + 2), lanes(real), 2 * lanes(real)
    scales, bases, small = Block(real, *scale), Block(real, *base), cast(real, eps)
    memory, (raw, matrix, slope, history, factor) = cleared(real, (
        (columns, pair), (columns, pair), (columns, pair), ((2 * iters + 1) * n, pair), (2, pair),
    ))  # fmt: skip
    raw, matrix, slope, factor = pairs(raw), pairs(matrix), pairs(slope), pairs(factor)
    for first in range(start * _TOKENS, min(stop * _TOKENS, tokens), pair):
        present = min(pair, min(stop * _TOKENS, tokens) - first)
        _lanes_of(real, mix, first, present, columns, raw)
        _lanes_of(real, pre, first, present, n, slope)
        _lanes_of(real, post, first, present, n, shifted(slope, n, 0))
        _lanes_of(real, comb, first, present, n * n, shifted(slope, 2 * n, 0))
        for c in range(0, pair, count):
            vput(factor, 0, c, vsplat(cast(real, 1.0)))
            vput(factor, 1, c, vsplat(cast(real, 0.0)))
        if factors != 0:
            _lanes_of(real, factors, first, present, 1, factor)
        for entry in range(columns):
            part = min(entry // n, 2)
            for c in range(0, pair, count):
                value = vget(raw, entry, c) * vget(factor, 0, c)
                vput(raw, entry, c, value)
                value = fma(value, get(scales, part, 0), get(bases, entry, 0))
                if part < 2:
                    value = sigmoid(value)
                    slant = value * (1 - value) * cast(real, part + 1)
                    vput(slope, entry, c, vget(slope, entry, c) * slant)
                    value += small
                vput(matrix, entry, c, value)
        for c in range(0, pair, count):
            inner, outer = shifted(matrix, 2 * n, c), shifted(slope, 2 * n, c)
            if n == 4:
                sinkhorn_backward(inner, outer, 4, iters, small, history)  # as in `hyper`
            elif n == 1:
                sinkhorn_backward(inner, outer, 1, iters, small, history)
            else:
                sinkhorn_backward(inner, outer, n, iters, small, history)
        _rows_of(real, slope, first, present, columns, sums, 2 * columns, 0)
        for entry in range(columns):
            part = get(scales, min(entry // n, 2), 0)
            for c in range(0, pair, count):
                value = vget(slope, entry, c)
                product = value * vget(raw, entry, c)
                vput(raw, entry, c, product)
                vput(factor, 1, c, fma(product, part, vget(factor, 1, c)))
                vput(slope, entry, c, value * part * vget(factor, 0, c))
        _rows_of(real, raw, first, present, columns, sums, 2 * columns, columns)
        _rows_of(real, slope, first, present, columns, scaled, columns, 0)
        if along != 0:
            _rows_of(real, shifted(factor, 1, 0), first, present, 1, along, 1, 0)
            _rows_of(real, matrix, first, present, n, gates, n, 0)
    return alive(memory)


@jit
def _lanes_of(real, source, first, present, width, block):
    """Rows of some tokens to the lanes of the first vectors of a block."""
    place = at(Block(real, source, width), first, 0)
    turn(real, place, (width, 1), (present, width), block.base, (1, block.row))


@jit
def _rows_of(real, block, first, present, width, target, row, column):
    """The inverse of `_lanes_of`, into rows of so many elements from a column on."""
    turn(real, block.base, (block.row, 1), (width, present), at(Block(real, target, row), first, column), (1, row))


@jit
def _spread(real, source, steps, shape, panel, row):
    pack(real, source, steps, shape, Block(real, panel, row), shape)


@jit
def _give(start, stop, tag, real, shape, columns, x, near, scaled, along, gates, panel, row, goal):
    """The gradient of OUTER_ROWS tokens' streams: what comes by `fn`, by the norm, and by the gates."""
    tokens, n, d = shape
    step, across = lanes(real), OUTER_VECTORS * lanes(real)
    memory, (left, sums) = cleared(real, ((OUTER_ROWS, columns), (OUTER_ROWS, across)))
    fn = Block(real, panel, row)
    for task in range(start, stop):
        first = task * OUTER_ROWS
        count = min(OUTER_ROWS, tokens - first)
        pack(real, at(Block(real, scaled, columns), first, 0), (columns, 1), (count, columns), left, (count, columns))
        for j in range(n):
            for begin in range(0, d, across):
                outer_tile(left, shifted(fn, 0, j * (row // n) + begin), columns, sums, False)
                width = min(across, d - begin)
                for i in range(count):
                    token = first + i
                    old = shifted(Block(real, x, n * d), token, j * d + begin)
                    slope = shifted(Block(real, near, d), token, begin)
                    target = shifted(Block(tag, goal, n * d), token, j * d + begin)
                    gate, inward = get(Block(real, gates, n), token, j), get(Block(real, along, 1), token, 0)
                    whole = width - width % step
                    for c in range(0, whole, step):
                        value = fma(vget(slope, 0, c), gate, vget(sums, i, c))
                        vput(target, 0, c, fma(vget(old, 0, c), inward, value))
                    for c in range(whole, width):
                        value = get(slope, 0, c) * gate + get(sums, i, c)
                        put(target, 0, c, value + get(old, 0, c) * inward)
    return alive(memory)


def hc_post_backward(grad: Any, y: Any, x: Any, post: Any, comb: Any, needs: Sequence[bool]) -> tuple[Any, ...]:
    """A token's gradients are read once, for the products with the streams and for their mix."""
    (*lead, n, d), inputs = grad.shape, ((y, 1), (x, 2), (post, 1), (comb, 2))
    broadcast = any(tuple(z.shape[: len(z.shape) - tail]) != tuple(lead) for z, tail in inputs)
    if broadcast or not math.prod(grad.shape):
        return NotImplemented
    found = [empty(z, z.shape) for z, _ in inputs]
    tag, real = TAGS[dtype_name(grad)], TAGS[dtype_name(post)]
    for sizes, arrays in walk(lead, (2, *(1, 2, 1, 2) * 2), grad, y, x, post, comb, *found):
        parallel(_mixed, math.prod(sizes), tag, real, sizes, n, d, *arrays, minimum=4)
    return _asked(found, needs)


@jit
def _mixed(start, stop, tag, real, sizes, n, d, grad, y, x, post, comb, of_y, of_x, of_post, of_comb):
    across, step = OUTER_VECTORS * lanes(real), lanes(real)
    ld = _COLUMNS + across
    memory, (slopes, streams, weights, sums, products) = cleared(real, (
        (n, ld), (n + 1 + DOT_ROWS, ld), (n + 1 + OUTER_ROWS, n), (n + 1 + OUTER_ROWS, ld),
        (n + 1 + DOT_ROWS, n + DOT_WIDTH),
    ))  # fmt: skip
    for token in range(start, stop):
        gates, entries = of_task(real, post, sizes, token), of_task(real, comb, sizes, token)
        for k in range(n):
            put(weights, 0, k, get(gates, k, 0))
            for j in range(n):
                put(weights, j + 1, k, get(entries, j, k * comb[2][1]))
        slope, new = of_task(tag, grad, sizes, token), of_task(tag, y, sizes, token)
        old, of_new = of_task(tag, x, sizes, token), of_task(tag, of_y, sizes, token)
        of_old = of_task(tag, of_x, sizes, token)
        for begin in range(0, d, _COLUMNS):
            width = min(_COLUMNS, d - begin)
            deep, padded = round_up(width, step), round_up(width, across)
            pack(tag, at(slope, 0, begin * grad[2][1]), grad[2], (n, width), slopes, (n, padded))
            pack(tag, at(new, begin, 0), (0, new.row), (1, width), streams, (1, deep))
            pack(tag, at(old, 0, begin * x[2][1]), x[2], (n, width), shifted(streams, 1, 0), (n, deep))
            for i in range(0, n + 1, DOT_ROWS):
                for j in range(0, n, DOT_COLUMNS):
                    part = shifted(products, i, j)
                    dot_tile(
                        shifted(streams, i, 0), shifted(slopes, j, 0), min(DOT_COLUMNS, n - j), deep, part, begin > 0
                    )
            for j in range(0, padded, across):
                for i in range(0, n + 1, OUTER_ROWS):
                    outer_tile(shifted(weights, i, 0), shifted(slopes, 0, j), n, shifted(sums, i, j), False)
            unpack(tag, sums, (1, width), at(of_new, begin, 0), (0, 1))
            unpack(tag, shifted(sums, 1, 0), (n, width), at(of_old, 0, begin), of_x[2])
        to, into = of_task(real, of_post, sizes, token), of_task(real, of_comb, sizes, token)
        for k in range(n):
            put(to, k, 0, get(products, 0, k))
            for j in range(n):
                put(into, j, k * of_comb[2][1], get(products, j + 1, k))
    return alive(memory)
