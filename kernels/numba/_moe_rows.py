"""Rows on their way through an expert, on the CPU: gathered, gated, rounded through FP8, added up.

Bound by bytes but for the exponential of the gate; a row goes through in blocks that stay in L1.
"""

from __future__ import annotations

import numpy as np

from flagops.backends.numba import jit

from .._moe import BLOCK
from ._blocks import Block, alive, at, clear, copy, get, pack, put, scratch, shifted, unpack, vget, vput
from ._formats import E4M3
from ._functions import exp, log1p
from ._scales import fake
from ._vectors import FLOAT32, fma, lanes, maximum, minimum, rounded, sqrt, vsplat, where, wide

STEP = 512  # elements of a row that stay in L1


@jit
def gate_score(z):
    """sqrt(softplus(z)), the identity within the root above 20."""
    return sqrt(where(z > 20, z, where(z > 0, z, 0) + log1p(exp(-abs(z)))))


@jit
def gate_block(g, u, count, weight, limit):
    """silu(min(g, limit)) * clip(u) * weight over whole vectors of the first rows, into g."""
    for i in range(0, count, lanes(g.tag)):
        gate = minimum(vget(g, 0, i), limit)
        up = maximum(minimum(vget(u, 0, i), limit), -limit)
        power = exp(-abs(gate))
        silu = gate * where(gate >= 0, 1, power) / (1 + power)
        vput(g, 0, i, silu * up * weight)


@jit
def slope_block(g, u, s, count, weight, limit):
    """The gradients of g and u by that of what `gate_block` makes of them, s, in their places; returns, lane by lane,
    that of the weight. The ends of the clamp have a gradient, what it cuts off has none."""
    real = g.tag
    total = vsplat(real)
    for i in range(0, count, lanes(real)):
        left, right, slope = vget(g, 0, i), vget(u, 0, i), vget(s, 0, i)
        gate, up = minimum(left, limit), maximum(minimum(right, limit), -limit)
        power = exp(-abs(gate))
        sigma, rest = where(gate >= 0, 1, power) / (1 + power), where(gate >= 0, power, 1) / (1 + power)
        silu = gate * sigma
        total = fma(slope * silu, up, total)
        slope *= weight
        vput(g, 0, i, where(left > limit, 0, slope * up * sigma * (1 + gate * rest)))
        vput(u, 0, i, where(abs(right) > limit, 0, slope * silu))
    return total


@jit
def by_expert(ids, experts):
    """The places of the ids in ascending order of them, and where in that order those of each expert begin and end."""
    bounds, order = np.zeros(experts + 2, np.int64), np.empty(len(ids), np.int64)
    for expert in ids:
        bounds[expert + 2] += 1
    for expert in range(experts):
        bounds[expert + 2] += bounds[expert + 1]
    for place in range(len(ids)):
        order[bounds[ids[place] + 1]] = place
        bounds[ids[place] + 1] += 1
    return order, bounds[: experts + 1]


@jit
def gather(start, stop, tag, width, tokens, x, row, column, quantised, out):
    """Rows of x by number, one after the other: as they are, or through FP8 and as float32."""
    memory, (packed,) = scratch(wide(tag), ((1, BLOCK),))
    single = Block(FLOAT32, packed.base, BLOCK)  # the same, if float64 could be quantised
    source = Block(tag, x, row)
    wide_rows, rows = Block(FLOAT32, out, width), Block(tag, out, width)
    for i in range(start, stop):
        for first in range(0, width, BLOCK):
            count = min(BLOCK, width - first)
            here = at(source, tokens[i], first * column)
            if quantised:
                pack(tag, here, (0, column), (1, count), packed, (1, BLOCK))
                fake(E4M3, single, BLOCK, True, single)
                unpack(FLOAT32, single, (1, count), at(wide_rows, i, first), (0, 1))
            else:
                copy(Block(tag, here, column), Block(tag, at(rows, i, first), 1), count)
    return alive(memory)


@jit
def activate(start, stop, tag, width, both, pairs, slots, weights, weight_row, weight_slot, limit, quantised, out):
    """h of each row [g, u], both contiguous, with its routing weight; through FP8 it leaves as float32."""
    real = wide(tag)
    memory, (g, u) = scratch(real, ((1, BLOCK), (1, BLOCK)))
    single = Block(FLOAT32, g.base, BLOCK)  # the same, if float64 could be quantised
    gates, weights = Block(tag, both, 2 * width), Block(real, weights, weight_row)
    wide_rows, rows = Block(FLOAT32, out, width), Block(tag, out, width)
    for i in range(start, stop):
        token, slot = divmod(pairs[i], slots)
        weight = get(weights, token, slot * weight_slot)
        for first in range(0, width, BLOCK):
            count = min(BLOCK, width - first)
            padded = BLOCK if quantised else -(-count // lanes(tag)) * lanes(tag)
            pack(tag, at(gates, i, first), (0, 1), (1, count), g, (1, padded))
            pack(tag, at(gates, i, width + first), (0, 1), (1, count), u, (1, padded))
            gate_block(g, u, padded, weight, limit)
            if quantised:
                for c in range(0, BLOCK, lanes(real)):
                    vput(g, 0, c, rounded(tag, vget(g, 0, c)))
                for c in range(count, BLOCK):
                    put(g, 0, c, 0.0)  # a weight that is not finite makes NaN of the padding
                fake(E4M3, single, BLOCK, True, single)
                unpack(FLOAT32, single, (1, count), at(wide_rows, i, first), (0, 1))
            else:
                unpack(tag, g, (1, count), at(rows, i, first), (0, 1))
    return alive(memory)


@jit
def add_rows(start, stop, tag, width, tokens, y, total):
    """total[token] += y, block of columns after block; a token that comes twice is added to in order."""
    rows, sums, step = Block(tag, y, width), Block(wide(tag), total, width), lanes(tag)
    for block in range(start, stop):
        first, last = block * STEP, min(block * STEP + STEP, width)
        whole = last - (last - first) % step
        for i in range(len(tokens)):
            for c in range(first, whole, step):
                vput(sums, tokens[i], c, vget(sums, tokens[i], c) + vget(rows, i, c))
            for c in range(whole, last):
                put(sums, tokens[i], c, get(sums, tokens[i], c) + get(rows, i, c))


@jit
def widen_rows(start, stop, tag, width, x, row, column, total):
    """Rows of any strides as contiguous rows of the accumulator; zeros where there are none."""
    sums = Block(wide(tag), total, width)
    for i in range(start, stop):
        if x != 0:
            pack(tag, at(Block(tag, x, row), i, 0), (0, column), (1, width), shifted(sums, i, 0), (1, width))
        else:
            clear(sums.tag, at(sums, i, 0), width)


@jit
def round_rows(start, stop, tag, width, total, out, row, column):
    """Contiguous rows of the accumulator rounded into rows of any strides."""
    sums, rows = Block(wide(tag), total, width), Block(tag, out, row)
    for i in range(start, stop):
        unpack(tag, shifted(sums, i, 0), (1, width), at(rows, i, 0), (0, column))
