"""Dense attention on the CPU: blocks of keys and values stay in L2 while many queries pass over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flagops.reference.sdpa import factor

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._blocks import Block, pack
from ._tiles import DOT_ROW_COLUMNS, DOT_ROWS, OUTER_ROWS, OUTER_VECTORS
from ._vectors import BYTE, TAGS, cast, lanes, load, size, store, wide
from .attention import _finish, _scores, _softmax, _values

_KEYS = 96  # keys of a block
_ROWS = 96  # queries of a task


@kernel(deterministic=True, batch_invariant=True, note="an online softmax over blocks of 96 keys")
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
    each = (*batch, heads)
    kind, steps = 0, (0, 0)
    mask: Any = 0, np.zeros(1, np.int64)
    if attn_mask is not None:
        kind = 1 if dtype_name(attn_mask) == "uint8" else 2
        mask, steps = (
            (pointer(attn_mask), _places(attn_mask, each, 2)),
            (strides(attn_mask)[-2], strides(attn_mask)[-1]),
        )
    parallel(
        _queries, math.prod(batch) * groups * blocks, TAGS[dtype_name(query)],
        (length, count, width, depth, shared, rows), factor(scale, width), is_causal,
        (pointer(query), _places(query, each, 2), *strides(query)[-2:]),
        (pointer(key), _places(key, (*batch, groups), 2), *strides(key)[-2:]),
        (pointer(value), _places(value, (*batch, groups), 2), *strides(value)[-2:]),
        (*mask, *steps, kind), (pointer(out), _places(out, each, 2), *strides(out)[-2:]),
    )  # fmt: skip


def _places(x: Any, lead: tuple[int, ...], tail: int) -> Any:
    """Where each matrix starts, in elements; batch axes broadcast to `lead`."""
    shape, steps = tuple(x.shape)[: x.ndim - tail], strides(x)
    result = np.zeros(lead, np.int64)
    for axis, (extent, step) in enumerate(zip(shape, steps, strict=False), len(lead) - len(shape)):
        if extent > 1:
            result += (np.arange(extent) * step).reshape(-1, *[1] * (len(lead) - axis - 1))
    return result.reshape(-1)


@jit
def _queries(start, stop, tag, shape, scale, is_causal, query, key, value, mask, out):
    real = wide(tag)
    length, count, width, depth, shared, rows = shape
    item, unit = size(tag), size(real)
    across = OUTER_VECTORS * lanes(tag)
    padded = rows + OUTER_ROWS + DOT_ROWS
    ld = -(-max(width, depth) // (2 * across)) * 2 * across + 16
    ldp = _KEYS + 16
    held = np.zeros(unit * (padded * (2 * ld + ldp + 3) + 2 * (_KEYS + DOT_ROW_COLUMNS) * ld) + 128, np.uint8)
    x = (np.int64(held.ctypes.data) + 63) & ~63
    keys = x + padded * ld * unit
    values = keys + (_KEYS + DOT_ROW_COLUMNS) * ld * unit
    p = values + (_KEYS + DOT_ROW_COLUMNS) * ld * unit
    sums = p + padded * ldp * unit
    tops = sums + padded * ld * unit
    masses = tops + padded * unit
    blocks = -(-shared * length // rows)
    for task in range(start, stop):
        group, first = task // blocks, task % blocks * rows
        here = min(rows, shared * length - first)
        reach = count
        if is_causal and first // length == (first + here - 1) // length:
            reach = min(count, (first + here - 1) % length + 1)
        for i in range(here):
            head, t = divmod(first + i, length)
            source = query[0] + (query[1][group * shared + head] + t * query[2]) * item
            pack(tag, source, (0, query[3]), (1, width), Block(real, x + i * ld * unit, ld), (1, width))
            store(real, tops + i * unit, cast(real, -np.inf))
            store(real, masses + i * unit, real)
        for at in range(0, reach, _KEYS):
            found = min(_KEYS, reach - at)
            source = key[0] + (key[1][group] + at * key[2]) * item
            pack(tag, source, (key[2], key[3]), (found, width), Block(real, keys, ld), (found, width))
            source = value[0] + (value[1][group] + at * value[2]) * item
            pack(tag, source, (value[2], value[3]), (found, depth), Block(real, values, ld), (found, depth))
            _scores(tag, x, keys, ld, here, found, width, p, ldp)
            for i in range(here):
                head, t = divmod(first + i, length)
                line, factor_left = p + i * ldp * unit, scale
                if mask[4] or (is_causal and at + found > t + 1):
                    _cover(
                        tag,
                        line,
                        at,
                        found,
                        scale,
                        is_causal,
                        t,
                        mask,
                        mask[1][(group * shared + head) * (mask[4] > 0)],
                    )
                    factor_left = 1.0
                _softmax(tag, line, found, factor_left, tops + i * unit, masses + i * unit, sums + i * ld * unit,
                         depth, at == 0)  # fmt: skip
            _values(tag, p, ldp, values, ld, here, found, depth, sums, at > 0)
        for i in range(here):
            head, t = divmod(first + i, length)
            top, mass = np.float64(load(real, tops + i * unit)), np.float64(load(real, masses + i * unit))
            seen = 0 if top == -np.inf else reach
            target = out[0] + (out[1][group * shared + head] + t * out[2]) * item
            _finish(tag, sums + i * ld * unit, seen, top, mass, depth, target, out[3])
    return held[0]  # keeps the scratch alive until here


@jit
def _cover(tag, line, at, found, scale, is_causal, t, mask, place):
    """Scores times the scale, plus the mask, -inf where a key does not count."""
    real = wide(tag)
    item, unit = size(tag), size(real)
    multiple, none = cast(real, scale), cast(real, -np.inf)
    origin = place + t * mask[2] + at * mask[3]
    for j in range(found):
        score = load(real, line + j * unit) * multiple
        if mask[4] == 2:
            score += load(tag, mask[0] + (origin + j * mask[3]) * item)
        if (is_causal and at + j > t) or (mask[4] == 1 and load(BYTE, mask[0] + origin + j * mask[3]) == 0):
            score = none
        store(real, line + j * unit, score)
