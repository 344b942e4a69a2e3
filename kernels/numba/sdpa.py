"""Dense attention on the CPU: blocks of keys and values stay in L2 while many queries pass over them.

Bound by operations. A task has queries of all the heads that share a key head, so that a block of keys, once widened,
serves them all; blocks that no query of a task may see are not read.
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
from flagops.registry import kernel

from ._attention_backward import ALL, add_runs
from ._blocks import Block, alive, at, clear, cleared, get, pack, put, round_up, shifted, unpack, vget, vput
from ._functions import exp
from ._gemm import empty
from ._ir import LANES
from ._softmax import PAD, add_values, finish, panels, soften
from ._tiles import OUTER_ROWS, OUTER_VECTORS, outer_tile, outer_turned
from ._vectors import BYTE, TAGS, cast, fma, lanes, load, maximum, size, vhighest, vsplat, vsum, wide

_ROWS = 96  # queries of a task
_KEYS = 256  # of a block, laid out across so that a vector holds the scores of several
_FEWEST, _LINES = 24, 1 << 20  # of a backward, which holds as many as fit so many bytes, but not fewer
_RUNS = 8  # of queries, over all matrices of keys
_NONE, _BOOL, _ADDED = 0, 1, 2  # kinds of masks


@kernel(deterministic=True, batch_invariant=True, note=f"an online softmax over blocks of {_KEYS} keys")
def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, out: Any
) -> None:
    """A task has queries of all heads that share a key head; blocks of keys behind the last of them are not read."""
    (heads, length, width), (count, depth) = query.shape[-3:], value.shape[-2:]
    batch, groups = tuple(out.shape)[:-3], key.shape[-3]
    if not (math.prod(batch) * heads * length * depth):
        return
    shared = heads // groups
    room = config.budget() // (4 * threads()) // (16 * max(width, depth) + 1) - 2 * _KEYS
    rows = min(_ROWS, shared * length, max(OUTER_ROWS, room))
    blocks = -(-shared * length // rows)
    mask: Any = (0, _starts((), (), (1,)), 0, 0, _NONE)
    if attn_mask is not None:
        mask = (*_matrices(attn_mask, (*batch, heads)), _BOOL if dtype_name(attn_mask) == "uint8" else _ADDED)
    parallel(
        _queries, math.prod(batch) * groups * blocks, TAGS[dtype_name(query)],
        (length, count, width, depth, shared, rows), factor(scale, width), is_causal,
        _matrices(query, (*batch, heads)), *(_matrices(x, (*batch, groups)) for x in (key, value)), mask,
        _matrices(out, (*batch, heads)),
    )  # fmt: skip


def _matrices(x: Any, lead: tuple[int, ...]) -> tuple[int, Any, int, int]:
    """Address; where each matrix starts, in elements, with batch axes that broadcast to `lead`; strides in a matrix."""
    *steps, row, column = strides(x)
    return pointer(x), _starts(tuple(x.shape)[:-2], tuple(steps), lead), row, column


@lru_cache(maxsize=256)
def _starts(shape: tuple[int, ...], steps: tuple[int, ...], lead: tuple[int, ...]) -> Any:
    """One table for all calls alike, which none may write."""
    places = np.zeros(lead, np.int64)
    for axis, (extent, step) in enumerate(zip(shape, steps, strict=True), len(lead) - len(shape)):
        if extent > 1:
            places += (np.arange(extent) * step).reshape(-1, *[1] * (len(lead) - axis - 1))
    return places.reshape(-1)


@jit
def _at(tag, x, matrix, row):
    """The address of a row of one of `_matrices`."""
    address, places, step, _ = x
    return address + (places[matrix] + row * step) * size(tag)


@jit
def _queries(start, stop, tag, shape, scale, is_causal, query, key, value, mask, out):
    length, count, width, depth, shared, rows = shape
    real = wide(tag)
    wanted = panels(real, rows, max(width, depth), _KEYS)
    held = (width, _KEYS + PAD), (_KEYS, wanted[0][1])
    memory, (x, sums, p, tops, masses, keys, values) = cleared(real, (*wanted, *held))
    blocks = -(-shared * length // rows)
    for task in range(start, stop):
        group, first = task // blocks, task % blocks * rows
        here = min(rows, shared * length - first)
        reach, one = count, is_causal and first // length == (first + here - 1) // length
        if one:
            reach = min(count, (first + here - 1) % length + 1)
        i = 0
        while i < here:
            head, t = divmod(first + i, length)
            some = min(length - t, here - i)
            _scaled(tag, _at(tag, query, group * shared + head, t), query[2:], (some, width), scale, shifted(x, i, 0))
            i += some
        for i in range(here):
            put(tops, i, 0, -np.inf)
            put(masses, i, 0, 0.0)
        for begin in range(0, reach, _KEYS):
            found = min(_KEYS, reach - begin)
            pack(tag, _at(tag, key, group, begin), (key[3], key[2]), (width, found), keys, (width, _KEYS))
            pack(tag, _at(tag, value, group, begin), value[2:], (found, depth), values, (found, depth))
            least = max(0, begin - first % length) // OUTER_ROWS * OUTER_ROWS if one else 0  # who sees none of them
            add_values(shifted(x, least, 0), keys, here - least, width, found, shifted(p, least, 0), False)
            for i in range(least, here):
                head, t = divmod(first + i, length)
                line = shifted(p, i, 0)
                _cover(tag, line, begin, found, is_causal, t, mask, group * shared + head)
                top, mass = shifted(tops, i, 0), shifted(masses, i, 0)
                soften(tag, line, found, 1.0, top, mass, shifted(sums, i, 0), depth, begin == 0)
            goal = shifted(sums, least, 0)
            add_values(shifted(p, least, 0), values, here - least, found, depth, goal, begin > 0)
        for i in range(here):
            head, t = divmod(first + i, length)
            top, mass = np.float64(get(tops, i, 0)), np.float64(get(masses, i, 0))
            seen = 0 if top == -np.inf else reach
            target = Block(tag, _at(tag, out, group * shared + head, t), out[3])
            finish(shifted(sums, i, 0), seen, top, mass, depth, target)
    return alive(memory)


@jit
def _scaled(tag, source, steps, shape, scale, target):
    """Rows, widened and times the scale, and zeros up to whole vectors."""
    step = lanes(target.tag)
    padded, factor = round_up(shape[1], step), cast(target.tag, scale)
    pack(tag, source, steps, shape, target, (shape[0], padded))
    for i in range(shape[0]):
        for j in range(0, padded, step):
            vput(target, i, j, vget(target, i, j) * factor)


@jit
def _cover(tag, line, begin, found, is_causal, t, mask, matrix):
    """Logits plus the mask, -inf where a key does not count."""
    address, places, row, column, kind = mask
    seen = max(0, min(found, t + 1 - begin)) if is_causal else found
    if kind != _NONE:
        origin = places[matrix] + t * row + begin * column
        added = Block(tag, address + origin * size(tag), column)
        for j in range(seen):
            if kind == _ADDED:
                put(line, 0, j, get(line, 0, j) + get(added, j, 0))
            elif load(BYTE, address + origin + j * column) == 0:
                put(line, 0, j, -np.inf)
    for j in range(seen, found):
        put(line, 0, j, -np.inf)


def scaled_dot_product_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """Probabilities of some queries are computed again, whole, for all five products with them; what is shared by
    several queries is summed in runs, which are cut by shapes alone and added in order.

    A mask's gradient, batches that broadcast and rows beyond the budget are left to torch's.
    """
    (heads, length, width), (count, depth) = query.shape[-3:], value.shape[-2:]
    batch, groups = tuple(grad.shape)[:-3], key.shape[-3]
    same = all(tuple(x.shape[:-3]) == batch for x in (query, key, value))
    if not same or needs[3] or not math.prod(batch) * heads * length * count * width * depth:
        return NotImplemented
    name, shared = dtype_name(query), heads // groups
    real = "float64" if name == "float64" else "float32"
    tag, matrices = TAGS[name], math.prod(batch) * groups
    item, across = np.dtype(real).itemsize, OUTER_VECTORS * LANES * 4 // np.dtype(real).itemsize
    tiles, widths = -(-count // across), tuple(-(-n // across) * across + PAD for n in (width, depth))
    rows = min(_ROWS, max(_FEWEST, _LINES // (2 * tiles * across * item)))
    rows = -(-min(rows, length) // OUTER_ROWS) * OUTER_ROWS
    runs = max(1, min(-(-_RUNS // matrices), shared * -(-length // rows)))
    held, several = tiles * across + OUTER_ROWS, matrices * runs if runs > 1 else 0
    scratch = tiles * (across + PAD) * (2 * rows + width + depth) + held * (2 * widths[0] + widths[1])
    if (threads() * scratch + several * held * sum(widths)) * item > config.budget() // 2:
        return NotImplemented
    sums = [np.zeros((several, held, n), real) for n in widths]
    mask: Any = (0, _starts((), (), (1,)), 0, 0, _NONE)
    if attn_mask is not None:
        mask = (*_matrices(attn_mask, (*batch, heads)), _BOOL if dtype_name(attn_mask) == "uint8" else _ADDED)
    of_query, *others = (empty(x, x.shape) for x in (query, key, value))
    parallel(
        _gradients, matrices * runs, tag, (length, count, width, depth, shared, rows, runs, held, *widths),
        factor(scale, width), is_causal,
        *(_matrices(x, (*batch, n)) for x, n in ((query, heads), (key, groups), (value, groups))), mask,
        _matrices(grad, (*batch, heads)), _matrices(of_query, (*batch, heads)),
        *(pointer(x) for x in (sums if several else others)), minimum=-(-matrices * runs // (2 * threads())),
    )  # fmt: skip
    for x, part, n in zip(others, sums, (width, depth), strict=True):
        shape = runs, (held, part.shape[2]), (count, n)
        parallel(
            add_runs, matrices * count * (runs > 1), tag, TAGS[real], shape, pointer(part), pointer(x), ALL, minimum=64
        )
    return *(x if needed else None for x, needed in zip((of_query, *others), needs, strict=False)), None


@jit
def _gradients(start, stop, tag, shape, scale, is_causal, query, key, value, mask, grad, of_query, of_keys, of_values):
    """The gradients by each run's blocks of queries, over tiles of as many keys as an outer tile is wide. Those of keys
    and values are sums of a run, or whole where there is one run."""
    length, count, width, depth, shared, rows, runs, held, wide_key, wide_value = shape
    real, high = wide(tag), rows + OUTER_ROWS
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
        pack(tag, _at(tag, key, group, 0), key[2:], (count, width), keys, (count, width))
        for tile in range(tiles):
            valid = min(across, count - tile * across)
            for source, depth_of, goal in ((key, width, turned_keys), (value, depth, turned_values)):
                origin, steps = _at(tag, source, group, tile * across), (source[3], source[2])
                pack(tag, origin, steps, (depth_of, valid), shifted(goal, tile * depth_of, 0), (depth_of, across))
        if runs == 1:
            clear(real, by_keys.base, held * wide_key)
            clear(real, by_values.base, held * wide_value)
        else:
            by_keys = shifted(Block(real, of_keys, wide_key), task * held, 0)
            by_values = shifted(Block(real, of_values, wide_value), task * held, 0)
        for block in range(run, shared * blocks, runs):
            head, first = divmod(block, blocks)
            matrix, first = group * shared + head, first * rows
            here = min(rows, length - first)
            _scaled(tag, _at(tag, query, matrix, first), query[2:], (here, width), scale, x)
            pack(tag, _at(tag, grad, matrix, first), grad[2:], (here, depth), slopes, (high, depth))
            seen = min(count, first + here) if is_causal else count
            for tile in range(-(-seen // across)):
                begin = tile * across
                least = max(0, begin - first) // OUTER_ROWS * OUTER_ROWS if is_causal else 0
                for i in range(least, here, OUTER_ROWS):
                    line = tile * high + i
                    outer_tile(
                        shifted(x, i, 0), shifted(turned_keys, tile * width, 0), width, shifted(p, line, 0), False
                    )
                    outer_tile(
                        shifted(slopes, i, 0),
                        shifted(turned_values, tile * depth, 0),
                        depth,
                        shifted(q, line, 0),
                        False,
                    )
            for i in range(here):
                last = min(count, first + i // OUTER_ROWS * OUTER_ROWS + OUTER_ROWS) if is_causal else count
                used = -(-last // across)
                for tile in range(used):
                    begin = tile * across
                    line, found = shifted(p, tile * high + i, 0), min(across, count - begin)
                    _cover(tag, line, begin, found, is_causal, first + i, mask, matrix)
                    for j in range(found, across):
                        put(line, 0, j, -np.inf)
                _soften(shifted(p, i, 0), shifted(q, i, 0), used, high, across)
            for tile in range(-(-seen // across)):
                begin = tile * across
                least = max(0, begin - first) // OUTER_ROWS * OUTER_ROWS if is_causal else 0
                found = min(across, count - begin)
                for c in range(0, width, across):
                    for i in range(least, here, OUTER_ROWS):
                        left, right = shifted(q, tile * high + i, 0), shifted(keys, begin, c)
                        outer_tile(left, right, found, shifted(sums, i, c), tile > 0)
                for j in range(0, min(across, seen - begin), OUTER_ROWS):
                    least = max(0, begin + j - first) if is_causal else 0
                    line = tile * high + least
                    for c in range(0, depth, across):
                        left, right = shifted(p, line, j), shifted(slopes, least, c)
                        outer_turned(left, right, here - least, shifted(by_values, begin + j, c), True)
                    for c in range(0, width, across):
                        left, right = shifted(q, line, j), shifted(x, least, c)
                        outer_turned(left, right, here - least, shifted(by_keys, begin + j, c), True)
            _scaled(real, sums.base, (sums.row, 1), (here, width), scale, sums)
            unpack(tag, sums, (here, width), _at(tag, of_query, matrix, first), of_query[2:])
        if runs == 1:
            for part, n, goal in ((by_keys, width, of_keys), (by_values, depth, of_values)):
                unpack(tag, part, (count, n), at(Block(tag, goal, n), group * count, 0), (n, 1))
    return alive(memory)


@jit
def _soften(p, slope, tiles, high, across):
    """A row of logits, tile after tile, to probabilities, and the gradients of those to the gradients of the logits;
    zeros where every logit is -inf."""
    real, step = p.tag, lanes(p.tag)
    top = vsplat(cast(real, -np.inf))
    for tile in range(tiles):
        for j in range(0, across, step):
            top = maximum(top, vget(p, tile * high, j))
    base = vhighest(top)
    if base == -np.inf:
        base = cast(real, 0.0)
    mass = mean = vsplat(real)
    for tile in range(tiles):
        for j in range(0, across, step):
            share = exp(vget(p, tile * high, j) - base)
            mass += share
            mean = fma(share, vget(slope, tile * high, j), mean)
            vput(p, tile * high, j, share)
    total = vsum(mass)
    inverse = cast(real, 1 / total if total != 0 else 0.0)
    middle = vsum(mean) * inverse
    for tile in range(tiles):
        for j in range(0, across, step):
            share = vget(p, tile * high, j) * inverse
            vput(slope, tile * high, j, share * (vget(slope, tile * high, j) - middle))
            vput(p, tile * high, j, share)
