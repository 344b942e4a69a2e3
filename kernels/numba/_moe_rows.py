# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rows on their way through an expert, on the CPU: gathered, gated, rounded through FP8, added up."""

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flagops.backends.numba import jit

from .._moe import BLOCK
from ._attention_simd import cast, vdiv, vexp, vround
from ._gemm import pack, unpack
from ._quantize_simd import from_bits, to_bits, vlarger, vlargest_bits, vmagnitude, vround_e4m3
from ._simd import _call, _constant, _fma, _i32, lanes, load, size, store, vadd, vload, vmul, vsplat, vstore, wide

_F32, _INFINITY = np.float32(0), 0x7F800000
_INVERSE, _FLOOR = np.float32(1 / 448), np.float32(1e-4)
_NAN = np.float32(np.nan)
STEP = 512  # elements of a row that stay in L1


def _pairwise(name):
    @intrinsic
    def typed(typingctx, a, b):
        def generate(context, builder, signature, arguments):
            return _call(builder, name, arguments[0].type, *arguments)

        return a(a, a), generate

    return typed


vleast = _pairwise("minimum")  # NaN if either is
vmost = _pairwise("maximum")


@intrinsic
def vdescent(typingctx, a):
    """-|a|."""

    def generate(context, builder, signature, arguments):
        return builder.fneg(_call(builder, "fabs", arguments[0].type, arguments[0]))

    return a(a), generate


@intrinsic
def vchoose(typingctx, a, b):
    """1 where a is at least 0, else b."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        up = builder.fcmp_ordered(">=", a, _constant(a.type, 0.0))
        return builder.select(up, _constant(a.type, 1.0), b)

    return a(a, b), generate


@intrinsic
def vscore(typingctx, z, fall):
    """sqrt(softplus(z)), the identity within the root above 20; `fall` is exp(-|z|).

    log(1 + e) is twice the artanh of e / (2 + e), whose series converges fast up to the 1/3 that e = 1 gives.
    """

    def generate(context, builder, signature, arguments):
        z, fall = arguments
        two, zero = _constant(z.type, 2.0), _constant(z.type, 0.0)
        ratio = builder.fdiv(fall, builder.fadd(two, fall))
        square, series = builder.fmul(ratio, ratio), zero
        for i in reversed(range(17 if z.type.element == ir.DoubleType() else 8)):
            series = _fma(builder, series, square, _constant(z.type, 1 / (2 * i + 1)))
        rise = builder.select(builder.fcmp_ordered(">", z, zero), z, zero)
        soft = builder.fadd(rise, builder.fmul(builder.fmul(two, ratio), series))
        steep = builder.fcmp_ordered(">", z, _constant(z.type, 20.0))
        return _call(builder, "sqrt", z.type, builder.select(steep, z, soft))

    return z(z, fall), generate


@intrinsic
def put_int32(typingctx, address, value):
    """Write an integer of 4 bytes."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        builder.store(builder.trunc(value, _i32), builder.inttoptr(address, ir.PointerType()), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@jit
def gate_block(real, g, u, count, weight, limit):
    """silu(min(g, limit)) * clip(u) * weight over a block of whole vectors, into g."""
    unit, step = size(real), lanes(real)
    one, factor = vsplat(cast(real, 1.0)), vsplat(weight)
    above, below = vsplat(limit), vsplat(-limit)
    for i in range(0, count, step):
        gate = vleast(vload(real, g + i * unit), above)
        up = vmost(vleast(vload(real, u + i * unit), above), below)
        fall = vexp(vdescent(gate))
        silu = vdiv(vmul(gate, vchoose(gate, fall)), vadd(one, fall))
        vstore(real, g + i * unit, vmul(vmul(silu, up), factor))


@jit
def fake_block(x, count):
    """A block of float32, of whole vectors, rounded to FP8 under one power of two; NaN unless all are finite."""
    step = lanes(_F32)
    highest = vsplat(_F32)
    for i in range(0, count, step):
        highest = vlarger(highest, vmagnitude(vload(_F32, x + 4 * i)))
    bits = np.int64(vlargest_bits(highest))
    code = (to_bits(max(from_bits(bits), _FLOOR) * _INVERSE) + 0x7FFFFF) >> 23 if bits < _INFINITY else np.int64(127)
    divisor = vsplat(from_bits((254 - code) << 23))
    factor = vsplat(from_bits(code << 23) if bits < _INFINITY else _NAN)
    for i in range(0, count, step):
        vstore(_F32, x + 4 * i, vmul(vround_e4m3(vmul(vload(_F32, x + 4 * i), divisor)), factor))


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
                pack(tag, origin, 0, column, 1, count, scratch, BLOCK, 1, BLOCK)
                fake_block(scratch, BLOCK)
                unpack(_F32, scratch, 0, 1, count, out + 4 * (i * width + first), 0, 1, 0, 0)
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
            pack(tag, source, 0, 1, 1, count, g, BLOCK, 1, padded)
            pack(tag, source + width * item, 0, 1, 1, count, u, BLOCK, 1, padded)
            gate_block(real, g, u, padded, weight, cast(real, limit))
            if quantised:
                for c in range(0, BLOCK, step):
                    vstore(real, g + c * unit, vround(tag, vload(real, g + c * unit)))
                for c in range(count, BLOCK):
                    store(real, g + c * unit, real)  # a weight that is not finite makes NaN of the padding
                fake_block(g, BLOCK)
                unpack(_F32, g, 0, 1, count, out + 4 * (i * width + first), 0, 1, 0, 0)
            else:
                unpack(tag, g, 0, 1, count, out + (i * width + first) * item, 0, 1, 0, 0)
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
                vstore(real, target + c * unit, vadd(vload(real, target + c * unit), vload(tag, source + c * item)))
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
            pack(tag, x + i * row * item, 0, column, 1, width, target, width, 1, width)
        else:
            for c in range(width):
                store(real, target + c * unit, real)


@jit
def round_rows(start, stop, tag, width, total, out, row, column):
    """Contiguous rows of the accumulator rounded into rows of any strides."""
    for i in range(start, stop):
        unpack(tag, total + i * width * size(wide(tag)), 0, 1, width, out + i * row * size(tag), 0, column, 0, 0)
