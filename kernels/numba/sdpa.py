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

from ._blocks import Block, alive, cleared, get, pack, put, shifted
from ._softmax import KEYS, add_values, finish, panels, score, soften
from ._tiles import DOT_ROW_COLUMNS, OUTER_ROWS
from ._vectors import BYTE, TAGS, cast, load, size, wide

_ROWS = 96  # queries of a task
_NONE, _BOOL, _ADDED = 0, 1, 2  # kinds of masks


@kernel(deterministic=True, batch_invariant=True, note=f"an online softmax over blocks of {KEYS} keys")
def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, out: Any
) -> None:
    """A task has queries of all heads that share a key head; blocks of keys behind the last of them are not read."""
    (heads, length, width), (count, depth) = query.shape[-3:], value.shape[-2:]
    batch, groups = tuple(out.shape)[:-3], key.shape[-3]
    if not (math.prod(batch) * heads * length * depth):
        return
    shared = heads // groups
    room = config.budget() // (4 * threads()) // (16 * max(width, depth) + 1) - 2 * KEYS
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
    wanted = panels(real, rows, max(width, depth))
    held = KEYS + DOT_ROW_COLUMNS, wanted[0][1]
    memory, (x, sums, p, tops, masses, keys, values) = cleared(real, (*wanted, held, held))
    blocks = -(-shared * length // rows)
    for task in range(start, stop):
        group, first = task // blocks, task % blocks * rows
        here = min(rows, shared * length - first)
        reach = count
        if is_causal and first // length == (first + here - 1) // length:
            reach = min(count, (first + here - 1) % length + 1)
        for i in range(here):
            head, t = divmod(first + i, length)
            source = _at(tag, query, group * shared + head, t)
            pack(tag, source, (0, query[3]), (1, width), shifted(x, i, 0), (1, width))
            put(tops, i, 0, -np.inf)
            put(masses, i, 0, 0.0)
        for begin in range(0, reach, KEYS):
            found = min(KEYS, reach - begin)
            pack(tag, _at(tag, key, group, begin), key[2:], (found, width), keys, (found, width))
            pack(tag, _at(tag, value, group, begin), value[2:], (found, depth), values, (found, depth))
            score(x, keys, here, found, width, p)
            for i in range(here):
                head, t = divmod(first + i, length)
                line, scale_left = shifted(p, i, 0), scale
                if mask[4] != _NONE or (is_causal and begin + found > t + 1):
                    _cover(tag, line, begin, found, scale, is_causal, t, mask, group * shared + head)
                    scale_left = 1.0
                top, mass = shifted(tops, i, 0), shifted(masses, i, 0)
                soften(tag, line, found, scale_left, top, mass, shifted(sums, i, 0), depth, begin == 0)
            add_values(p, values, here, found, depth, sums, begin > 0)
        for i in range(here):
            head, t = divmod(first + i, length)
            top, mass = np.float64(get(tops, i, 0)), np.float64(get(masses, i, 0))
            seen = 0 if top == -np.inf else reach
            target = Block(tag, _at(tag, out, group * shared + head, t), out[3])
            finish(shifted(sums, i, 0), seen, top, mass, depth, target)
    return alive(memory)


@jit
def _cover(tag, line, begin, found, scale, is_causal, t, mask, matrix):
    """Scores times the scale, plus the mask, -inf where a key does not count."""
    address, places, row, column, kind = mask
    origin = places[matrix] + t * row + begin * column if kind != _NONE else 0
    added = Block(tag, address + origin * size(tag), column)
    for j in range(found):
        value = get(line, 0, j) * cast(line.tag, scale)
        if kind == _ADDED:
            value += get(added, j, 0)
        if (is_causal and begin + j > t) or (kind == _BOOL and load(BYTE, address + origin + j * column) == 0):
            value = cast(line.tag, -np.inf)
        put(line, 0, j, value)
