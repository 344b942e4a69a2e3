"""Rows on their way through an expert, on the CPU: gathered, gated, rounded through FP8, added up."""

import numpy as np

from flagops.backends.numba import jit

from .._moe import BLOCK
from ._blocks import Block, pack, unpack
from ._formats import E4M3, FORMATS, INFINITY, vround
from ._vectors import (
    FLOAT32,
    INT32,
    bits,
    cast,
    exp,
    from_bits,
    lanes,
    load,
    log1p,
    maximum,
    minimum,
    rounded,
    size,
    sqrt,
    store,
    vhighest,
    vload,
    vsplat,
    vstore,
    where,
    wide,
)

_INVERSE, _FLOOR = FORMATS["e4m3"].inverse, FORMATS["e4m3"].floor
_NAN = np.float32(np.nan)
STEP = 512  # elements of a row that stay in L1


@jit
def fall(x):
    """exp(-|x|), which no x overflows."""
    return exp(-abs(x))


@jit
def gate_score(z):
    """sqrt(softplus(z)), the identity within the root above 20."""
    return sqrt(where(z > 20, z, where(z > 0, z, 0) + log1p(fall(z))))


@jit
def gate_block(real, g, u, count, weight, limit):
    """silu(min(g, limit)) * clip(u) * weight over a block of whole vectors, into g."""
    unit, step = size(real), lanes(real)
    for i in range(0, count, step):
        gate = minimum(vload(real, g + i * unit), limit)
        up = maximum(minimum(vload(real, u + i * unit), limit), -limit)
        power = fall(gate)
        silu = gate * where(gate >= 0, 1, power) / (1 + power)
        vstore(real, g + i * unit, silu * up * weight)


@jit
def fake_block(x, count):
    """A block of float32, of whole vectors, rounded to FP8 under one power of two; NaN unless all are finite."""
    step = lanes(FLOAT32)
    highest = vsplat(INT32)
    for i in range(0, count, step):
        highest = maximum(highest, bits(abs(vload(FLOAT32, x + 4 * i))))
    top = np.int64(vhighest(highest))
    code = (bits(max(from_bits(FLOAT32, top), _FLOOR) * _INVERSE) + 0x7FFFFF) >> 23 if top < INFINITY else np.int64(127)
    divisor = from_bits(FLOAT32, (254 - code) << 23)
    factor = from_bits(FLOAT32, code << 23) if top < INFINITY else _NAN
    for i in range(0, count, step):
        vstore(FLOAT32, x + 4 * i, vround(E4M3, vload(FLOAT32, x + 4 * i) * divisor) * factor)


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
    item = size(tag)
    held = np.empty(4 * BLOCK + 64, np.uint8)
    scratch = (np.int64(held.ctypes.data) + 63) & ~63
    for i in range(start, stop):
        source = x + tokens[i] * row * item
        for first in range(0, width, BLOCK):
            count = min(BLOCK, width - first)
            origin = source + first * column * item
            if quantised:
                pack(tag, origin, (0, column), (1, count), Block(wide(tag), scratch, BLOCK), (1, BLOCK))
                fake_block(scratch, BLOCK)
                unpack(FLOAT32, Block(FLOAT32, scratch, 0), (1, count), out + 4 * (i * width + first), (0, 1))
            elif column == 1:
                _copy(tag, origin, count, out + (i * width + first) * item)
            else:
                for c in range(count):
                    store(tag, out + (i * width + first + c) * item, load(tag, origin + c * column * item))
    return held[0]  # keeps the scratch alive until here


@jit
def _copy(tag, source, count, target):
    item, step = size(tag), lanes(tag)
    whole = count - count % step
    for c in range(0, whole, step):
        vstore(tag, target + c * item, vload(tag, source + c * item))
    for c in range(whole, count):
        store(tag, target + c * item, load(tag, source + c * item))


@jit
def activate(start, stop, tag, width, both, pairs, slots, weights, weight_row, weight_slot, limit, quantised, out):
    """h of each row [g, u], both contiguous, with its routing weight; through FP8 it leaves as float32."""
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    held = np.empty(2 * unit * BLOCK + 64, np.uint8)
    g = (np.int64(held.ctypes.data) + 63) & ~63
    u = g + unit * BLOCK
    for i in range(start, stop):
        token, slot = divmod(pairs[i], slots)
        weight = load(real, weights + (token * weight_row + slot * weight_slot) * unit)
        for first in range(0, width, BLOCK):
            count = min(BLOCK, width - first)
            padded = BLOCK if quantised else -(-count // step) * step
            source = both + (2 * i * width + first) * item
            pack(tag, source, (0, 1), (1, count), Block(real, g, BLOCK), (1, padded))
            pack(tag, source + width * item, (0, 1), (1, count), Block(real, u, BLOCK), (1, padded))
            gate_block(real, g, u, padded, weight, cast(real, limit))
            if quantised:
                for c in range(0, BLOCK, step):
                    vstore(real, g + c * unit, rounded(tag, vload(real, g + c * unit)))
                for c in range(count, BLOCK):
                    store(real, g + c * unit, real)  # a weight that is not finite makes NaN of the padding
                fake_block(g, BLOCK)
                unpack(FLOAT32, Block(FLOAT32, g, 0), (1, count), out + 4 * (i * width + first), (0, 1))
            else:
                unpack(tag, Block(real, g, 0), (1, count), out + (i * width + first) * item, (0, 1))
    return held[0]  # keeps the scratch alive until here


@jit
def add_rows(start, stop, tag, width, tokens, y, total):
    """total[token] += y, block of columns after block; a token that comes twice is added to in order."""
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    for block in range(start, stop):
        first, last = block * STEP, min(block * STEP + STEP, width)
        whole = last - (last - first) % step
        for i in range(len(tokens)):
            source, target = y + i * width * item, total + tokens[i] * width * unit
            for c in range(first, whole, step):
                vstore(real, target + c * unit, vload(real, target + c * unit) + vload(tag, source + c * item))
            for c in range(whole, last):
                store(real, target + c * unit, load(real, target + c * unit) + load(tag, source + c * item))


@jit
def widen_rows(start, stop, tag, width, x, row, column, total):
    """Rows of any strides as contiguous rows of the accumulator; zeros where there are none."""
    real = wide(tag)
    item, unit = size(tag), size(real)
    for i in range(start, stop):
        target = total + i * width * unit
        if x != 0:
            pack(tag, x + i * row * item, (0, column), (1, width), Block(real, target, width), (1, width))
        else:
            for c in range(width):
                store(real, target + c * unit, real)


@jit
def round_rows(start, stop, tag, width, total, out, row, column):
    """Contiguous rows of the accumulator rounded into rows of any strides."""
    for i in range(start, stop):
        unpack(
            tag,
            Block(wide(tag), total + i * width * size(wide(tag)), 0),
            (1, width),
            out + i * row * size(tag),
            (0, column),
        )
