"""Gradients of dense attention on the CPU: probabilities of some queries are computed again, whole, for all five
products with them.

What is shared by several queries is summed in runs, which are cut by shapes alone and added in order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from flagops.reference.sdpa import factor

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads

from ._attention_backward import ALL, add_runs
from ._blocks import Block, alive, at, clear, cleared, pack, round_up, shifted, unpack, vget, vput
from ._dense import alike, cover, mask_places, places_of, row_of
from ._functions import exp
from ._ir import LANES
from ._softmax import PAD, STRIP, multiply, multiply_turned
from ._tiles import OUTER_VECTORS
from ._vectors import TAGS, below, cast, fma, higher, lanes, vhigher, vsplat, vsum, where, wide

_ROWS = 96  # queries that are worked on together
_FEWEST, _LINES = 24, 1 << 20  # as many as fit so many bytes, but not fewer
_RUNS = 8  # of queries, over all matrices of keys
_LEAST = 192  # queries of a run, which lays out its keys anew


def scaled_dot_product_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """A mask's gradient, batches that broadcast and rows beyond the budget are left to torch's."""
    given, made = (query, key, value), [alike(x) for x in (query, key, value)]
    layouts = tuple([(tuple(x.shape), strides(x)) for x in (grad, *given, *made)])
    mask = attn_mask is not None and (dtype_name(attn_mask), tuple(attn_mask.shape), strides(attn_mask))
    plan = None if needs[3] else _arranged(dtype_name(query), layouts, mask, threads(), config.budget())
    if plan is None:
        return NotImplemented
    tag, real, sets, runs, sizes, places, of_mask, parts = plan
    of_grad, *of_given, of_query, of_key, of_value = (
        (pointer(x), *where) for x, where in zip((grad, *given, *made), places, strict=True)
    )
    sums = [np.empty(shape, real.dtype) for shape in parts]
    parallel(
        _gradients, sets * runs, tag, sizes, factor(scale, query.shape[-1]), is_causal, *of_given,
        (pointer(attn_mask) if mask else 0, *of_mask), of_grad, of_query, of_key, of_value, *map(pointer, sums),
        minimum=-(-sets * runs // (2 * threads())),
    )  # fmt: skip
    if runs > 1:
        count = key.shape[-2]
        for goal, part, x in zip((of_key, of_value), sums, (key, value), strict=True):
            shape = runs, part.shape[1:], (count, x.shape[-1])
            parallel(add_runs, sets * count, tag, real, shape, pointer(part), goal, ALL, minimum=64)
    return *(x if needed else None for x, needed in zip(made, needs, strict=False)), None


@lru_cache(maxsize=256)
def _arranged(name: str, layouts: Any, of_mask: Any, team: int, budget: int) -> tuple[Any, ...] | None:
    """What calls of a dtype, of layouts of the gradient, query, key, value and their gradients, and of a mask have in
    common; None for those that are left to torch's."""
    (batch, (heads, length, width)), (groups, count, depth) = (
        (layouts[1][0][:-3], layouts[1][0][-3:]), layouts[3][0][-3:]
    )  # fmt: skip
    same = all(shape[:-3] == batch for shape, _ in layouts)
    if not same or not math.prod(batch) * heads * length * count * width * depth:
        return None
    real, shared, sets = TAGS["float64" if name == "float64" else "float32"], heads // groups, math.prod(batch) * groups
    item, across = real.itemsize, OUTER_VECTORS * LANES * 4 // real.itemsize
    tiles, widths = -(-count // across), tuple(-(-n // across) * across + PAD for n in (width, depth))
    rows = min(_ROWS, max(_FEWEST, _LINES // (2 * tiles * across * item)))
    rows = -(-min(rows, length) // STRIP) * STRIP
    runs = max(1, min(-(-_RUNS // sets), shared * -(-length // rows), shared * length // _LEAST))
    held, several = tiles * across + STRIP, sets * runs if runs > 1 else 0
    scratch = tiles * (across + PAD) * (2 * rows + width + depth) + held * (2 * widths[0] + widths[1])
    if (team * scratch + several * held * sum(widths)) * item > budget // 2:
        return None
    places = [
        places_of(shape, steps, (*batch, n))
        for (shape, steps), n in zip(layouts, (heads, heads, groups, groups, heads, groups, groups), strict=True)
    ]
    sizes = length, count, width, depth, shared, rows, runs, held, *widths
    of_mask = mask_places(of_mask or None, (*batch, heads))
    return TAGS[name], real, sets, runs, sizes, places, of_mask, [(several, held, n) for n in widths]


@jit
def _gradients(
    start, stop, tag, shape, scale, is_causal, query, key, value, mask, grad, of_query, of_key, of_value,
    of_keys, of_values,
):  # fmt: skip
    """The gradients by each run's blocks of queries, over tiles of as many keys as an outer tile is wide. Those of keys
    and values are sums of a run, or whole where there is one run."""
    length, count, width, depth, shared, rows, runs, held, wide_key, wide_value = shape
    real, high = wide(tag), rows + STRIP
    across = OUTER_VECTORS * lanes(real)
    tiles, row = -(-count // across), across + PAD
    own = held if runs == 1 else 0
    memory, (x, slopes, sums, keys, p, q, turned_keys, turned_values, by_keys, by_values) = cleared(real, (
        (high, wide_key), (high, wide_value), (high, wide_key), (held, wide_key), (tiles * high, row),
        (tiles * high, row), (tiles * width, across), (tiles * depth, across), (own, wide_key), (own, wide_value),
    ))  # fmt: skip
    blocks = -(-length // rows)
    for task in range(start, stop):
        group, run = divmod(task, runs)
        pack(tag, row_of(tag, key, group, 0), key[2:], (count, width), keys, (count, width))
        for tile in range(tiles):
            valid = min(across, count - tile * across)
            for source, depth_of, goal in ((key, width, turned_keys), (value, depth, turned_values)):
                origin, steps = row_of(tag, source, group, tile * across), (source[3], source[2])
                pack(tag, origin, steps, (depth_of, valid), shifted(goal, tile * depth_of, 0), (depth_of, across))
        if runs > 1:
            by_keys = shifted(Block(real, of_keys, wide_key), task * held, 0)
            by_values = shifted(Block(real, of_values, wide_value), task * held, 0)
        for block in range(run, shared * blocks, runs):
            head, first = divmod(block, blocks)
            matrix, first = group * shared + head, first * rows
            here = min(rows, length - first)
            seen, fresh = min(count, first + here) if is_causal else count, block == run
            if fresh:  # and adds to nothing, but there is nothing either behind what it sees
                clear(real, at(by_keys, seen, 0), (held - seen) * wide_key)
                clear(real, at(by_values, seen, 0), (held - seen) * wide_value)
            pack(tag, row_of(tag, query, matrix, first), query[2:], (here, width), x, (here, width))
            pack(tag, row_of(tag, grad, matrix, first), grad[2:], (here, depth), slopes, (here, depth))
            for strip in range(0, here, STRIP):
                some = min(STRIP, here - strip)
                reach = min(count, first + strip + some) if is_causal else count
                used = -(-reach // across)
                for tile in range(used):
                    columns, line = min(across, reach - tile * across), tile * high + strip
                    laid, right = shifted(turned_keys, tile * width, 0), shifted(turned_values, tile * depth, 0)
                    multiply(shifted(x, strip, 0), laid, some, width, columns, shifted(p, line, 0), False)
                    multiply(shifted(slopes, strip, 0), right, some, depth, columns, shifted(q, line, 0), False)
                for i in range(strip, strip + some):
                    last = min(count, first + i + 1) if is_causal else count
                    for tile in range(-(-last // across)):
                        begin, line = tile * across, shifted(p, tile * high + i, 0)
                        cover(tag, line, begin, min(across, last - begin), first + i, scale, mask, matrix)
                    _soften(shifted(p, i, 0), shifted(q, i, 0), last, scale, used, high, across)
                for tile in range(used):
                    begin, left = tile * across, shifted(q, tile * high + strip, 0)
                    found, goal = min(across, reach - begin), shifted(sums, strip, 0)
                    multiply(left, shifted(keys, begin, 0), some, found, width, goal, tile > 0)
            for tile in range(-(-seen // across)):
                begin = tile * across
                for j in range(0, min(across, seen - begin), STRIP):
                    some = min(STRIP, seen - begin - j, across - j)
                    least = max(0, begin + j - first) if is_causal else 0
                    line, more = tile * high + least, here - least
                    goal = shifted(by_values, begin + j, 0)
                    multiply_turned(shifted(p, line, j), shifted(slopes, least, 0), some, more, depth, goal, not fresh)
                    goal = shifted(by_keys, begin + j, 0)
                    multiply_turned(shifted(q, line, j), shifted(x, least, 0), some, more, width, goal, not fresh)
            unpack(tag, sums, (here, width), row_of(tag, of_query, matrix, first), of_query[2:])
        if runs == 1:
            unpack(tag, by_keys, (count, width), row_of(tag, of_key, group, 0), of_key[2:])
            unpack(tag, by_values, (count, depth), row_of(tag, of_value, group, 0), of_value[2:])
    return alive(memory)


@jit
def _soften(p, slope, last, scale, tiles, high, across):
    """A row of logits, tile after tile, of which so many count, to probabilities, and the gradients of those to the
    gradients of the products that the logits are made of; zeros behind them, and where every logit is -inf."""
    real, step = p.tag, lanes(p.tag)
    used = -(-last // across)
    inner = round_up(last - (used - 1) * across, step)  # of the last tile, whole vectors
    if last % step:
        line, j = (used - 1) * high, inner - step
        vput(p, line, j, where(below(real, last % step), vget(p, line, j), -np.inf))
    top = vsplat(cast(real, -np.inf))
    for tile in range(used):
        for j in range(0, inner if tile == used - 1 else across, step):
            top = higher(vget(p, tile * high, j), top)
    base = vhigher(top)
    if base == -np.inf:
        base = cast(real, 0.0)
    mass = mean = vsplat(real)
    for tile in range(used):
        for j in range(0, inner if tile == used - 1 else across, step):
            share = exp(vget(p, tile * high, j) - base)
            mass += share
            mean = fma(share, vget(slope, tile * high, j), mean)
            vput(p, tile * high, j, share)
    total = vsum(mass)
    inverse = cast(real, 1 / total if total != 0 else 0.0)
    middle, factor = vsum(mean) * inverse, cast(real, scale)
    for tile in range(used):
        for j in range(0, inner if tile == used - 1 else across, step):
            share = vget(p, tile * high, j) * inverse
            vput(slope, tile * high, j, share * (vget(slope, tile * high, j) - middle) * factor)
            vput(p, tile * high, j, share)
    for tile in range(used - 1, tiles):
        for j in range(inner if tile == used - 1 else 0, across, step):
            vput(p, tile * high, j, vsplat(real))
            vput(slope, tile * high, j, vsplat(real))
