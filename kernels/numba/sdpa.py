"""Dense attention on the CPU: blocks of keys and values stay in L2 while many queries pass over them.

Bound by operations. A strip of queries, as many as a tile has, goes through its scores, their softmax and its sums
while they are near; keys that none of its queries may see are not multiplied.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flagops.reference.sdpa import factor

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, threads
from flagops.registry import kernel

from ._blocks import Block, alive, at, clear, get, pack, put, round_up, scratch, shifted
from ._dense import NONE, cover, mask_of, matrices, row_of
from ._sdpa_backward import scaled_dot_product_attention_backward as scaled_dot_product_attention_backward
from ._softmax import PAD, STRIP, finish, multiply, score, soften
from ._tiles import NARROW_VECTORS, OUTER_VECTORS
from ._vectors import TAGS, lanes, size, wide

_ROWS = 192  # queries of a task
_KEYS = 256  # of a block, laid out across so that a vector holds the scores of several
_FEW = 3  # queries that read keys where they lie
_APART = 2048  # elements from a row to the next, beyond which a block's rows meet in few sets of L2


@kernel(deterministic=True, batch_invariant=True, note=f"an online softmax over blocks of {_KEYS} keys")
def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, out: Any
) -> None:
    """A task has queries of a head, or of several that share a key head; blocks of keys behind the last of them are
    not read."""
    (heads, length, width), (count, depth) = query.shape[-3:], value.shape[-2:]
    batch, groups = tuple(out.shape)[:-3], key.shape[-3]
    if not (math.prod(batch) * heads * length * depth):
        return
    shared = heads // groups
    room = config.budget() // (4 * threads()) // (16 * max(width, depth) + 1) - 2 * _KEYS
    most = min(_ROWS, max(STRIP, room))
    together, parts = max(1, min(shared, most // length)), -(-length // most)
    rows = together * length if parts == 1 else -(-length // (parts * STRIP)) * STRIP
    parts = -(-length // rows) if parts > 1 else 1
    parallel(
        _queries, math.prod(batch) * groups * -(-shared // together) * parts, TAGS[dtype_name(query)],
        (length, count, width, depth, shared, together, parts, rows), factor(scale, width), is_causal,
        matrices(query, (*batch, heads)), *(matrices(x, (*batch, groups)) for x in (key, value)),
        mask_of(attn_mask, (*batch, heads)), matrices(out, (*batch, heads)),
    )  # fmt: skip


@jit
def _queries(start, stop, tag, shape, scale, is_causal, query, key, value, mask, out):
    length, count, width, depth, shared, together, parts, rows = shape
    real, step = wide(tag), lanes(tag)
    across, narrow = OUTER_VECTORS * step, NARROW_VECTORS * step
    high, line_x, line_v = round_up(rows, STRIP), round_up(width, step) + PAD, round_up(depth, across) + PAD
    longest = min(_KEYS, round_up(count, across))
    memory, (x, sums, p, tops, masses, keys, values) = scratch(real, (
        (high, line_x), (high, line_v), (STRIP, _KEYS + PAD), (high, 1), (high, 1),
        (width, longest + PAD), (longest, line_v),
    ))  # fmt: skip
    clear(real, p.base, STRIP * p.row)  # of which rows that no query has are multiplied too
    counts, blocks = np.empty(STRIP, np.int64), -(-shared // together) * parts
    for task in range(start, stop):
        group, block = divmod(task, blocks)
        unit, part = divmod(block, parts)
        first = unit * together * length + part * rows
        here = min(rows, min((unit + 1) * together, shared) * length - first)
        i = 0
        while i < here:
            head, t = divmod(first + i, length)
            some = min(length - t, here - i)
            from_queries = row_of(tag, query, group * shared + head, t)
            pack(tag, from_queries, query[2:], (some, width), shifted(x, i, 0), (some, round_up(width, step)))
            i += some
        for i in range(here, round_up(here, STRIP)):
            clear(real, at(x, i, 0), x.row)
        for i in range(here):
            put(tops, i, 0, -np.inf)
            put(masses, i, 0, 0.0)
        near = here <= _FEW and key[3] == 1 and width % step == 0  # read once, where they lie
        lying = value[3] == 1 and depth % narrow == 0
        lying &= here <= STRIP or (size(tag) == size(real) and value[2] <= _APART)
        for begin in range(0, _reach(first, here, length, count, is_causal), _KEYS):
            found = min(_KEYS, count - begin)
            from_keys, from_values = row_of(tag, key, group, begin), row_of(tag, value, group, begin)
            if not near:
                pack(tag, from_keys, (key[3], key[2]), (width, found), keys, (width, round_up(found, across)))
            if not lying:
                pack(tag, from_values, value[2:], (found, depth), values, (found, round_up(depth, narrow)))
            for strip in range(0, here, STRIP):
                some = min(STRIP, here - strip)
                deep = min(found, _reach(first + strip, some, length, count, is_causal) - begin)
                if deep <= 0:
                    continue
                if near:
                    score(x, Block(tag, from_keys, key[2]), some, deep, width, p)
                else:
                    multiply(shifted(x, strip, 0), keys, some, width, deep, p, False)
                for i in range(some):
                    head, t = divmod(first + strip + i, length)
                    counts[i] = max(0, min(deep, t + 1 - begin)) if is_causal else deep
                    if mask[4] != NONE:
                        cover(tag, shifted(p, i, 0), begin, counts[i], t, scale, mask, group * shared + head)
                top, mass, goal = shifted(tops, strip, 0), shifted(masses, strip, 0), shifted(sums, strip, 0)
                left = scale if mask[4] == NONE else 1.0
                soften(real, p, counts[:some], deep, left, top, mass, goal, depth, begin == 0)
                if lying:
                    multiply(p, Block(tag, from_values, value[2]), some, deep, depth, goal, begin > 0)
                else:
                    multiply(p, values, some, deep, depth, goal, begin > 0)
        for i in range(here):
            head, t = divmod(first + i, length)
            mass = np.float64(get(masses, i, 0))
            target = Block(tag, row_of(tag, out, group * shared + head, t), out[3])
            finish(shifted(sums, i, 0), mass != 0, 0.0, mass, depth, target)
    return alive(memory)


@jit
def _reach(first, rows, length, count, is_causal):
    """How many keys some rows from one on may see, of one head or several."""
    return min(count, first % length + rows, length) if is_causal else count
