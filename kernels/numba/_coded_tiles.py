"""Weights of four and eight bits decoded in registers, on the way into a product.

FP4 comes in groups of GROUP that stand in the order `FP4_ORDER`; so must what they are multiplied with (`fp4_arrange`).
FP8 comes in natural order and as 1 / `FP8_FACTOR` of its value: shifted by the bits of mantissa it lacks, a code is a
float16 of that value, subnormals included. `fp4_row` and `fp8_row` make the sums of `dot_row` with what `fp4_decode`
and `fp8_decode` write, bit for bit.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flagops.backends.numba import features

from .._moe import GROUP
from . import _ir
from ._formats import FORMATS, HALF
from ._ir import LANES, constant, f16, f32, fma, i8, i16, i32, i64, load, lookup, loop, read, shuffle, splat, store
from ._tiles import DOT_ROW_COLUMNS, fold, initial, places

_PERMUTE = "+avx512f" in features()
"""Whether one instruction looks 16 floats up; each scale then has a row of 16 products, else its half."""
_HALVES = "+sse2" not in features() or "+f16c" in features()
_TOGETHER = 4
"""Rows of weights that run side by side: enough to hide the latency of their sums."""
_E4M3, _E2M1, _SCALES = (FORMATS[name] for name in ("e4m3", "e2m1", "e8m0"))
PAIR = 2 * LANES
"""Weights of FP8 that are decoded together; there must be a multiple of it."""
FP8_FACTOR = 2.0 ** (HALF.bias - _E4M3.bias)

FP4_ORDER = (
    tuple(8 * (lane % 4) + 4 * half + lane // 4 for half in (0, 1) for lane in range(16))
    if _PERMUTE
    else (*range(0, GROUP, 2), *range(1, GROUP, 2))
)


def fp4_table() -> np.ndarray:
    """What `fp4_row` and `fp4_decode` look scales up in."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (_SCALES.values[:, None] * (_E2M1.values if _PERMUTE else (0.5,))).astype(np.float32)


def _vector(element, count=LANES):
    return ir.VectorType(element, count)


def _floats(builder, base, index, lanes=LANES):
    return load(builder, types.float32, base, index, lanes)


def _plus(builder, index, step):
    """An element further."""
    return builder.add(index, i64(step))


def _fp4_group(builder, codes, scale, table):
    """The weights at `codes` times the scale of the byte at `scale`, as vectors in FP4_ORDER."""
    byte = builder.zext(read(builder, i8, scale), i64)
    if _PERMUTE:
        products = _floats(builder, table, builder.mul(byte, i64(len(_E2M1.values))))
        packed = read(builder, _vector(i32, 4), codes)
        packed = shuffle(builder, packed, packed, [lane % 4 for lane in range(16)])
        found = []
        for first in (0, 16):  # the instruction takes the low four bits of an index
            shifts = ir.Constant(packed.type, [first + 4 * (lane // 4) for lane in range(16)])
            found.append(_ir.call(builder, "x86.avx512.permvar.sf.512", products, builder.lshr(packed, shifts)))
        return found
    factor = splat(builder, load(builder, types.float32, table, byte), LANES)
    packed = read(builder, _vector(i8, 16), codes)
    doubled = ir.Constant(packed.type, [int(2 * value) & 0xFF for value in _E2M1.values])
    found = []
    for index in (builder.and_(packed, constant(packed.type, 15)), builder.lshr(packed, constant(packed.type, 4))):
        values = lookup(builder, doubled, index)
        for first in range(0, 16, LANES):
            part = builder.sext(shuffle(builder, values, values, range(first, first + LANES)), _vector(i32))
            found.append(builder.fmul(builder.sitofp(part, _vector(f32)), factor))
    return found


def _fp8_pair(builder, code):
    """Two vectors for PAIR codes; NaN codes give numbers."""
    if not _HALVES:
        return [_fp8_by_hand(builder, part) for part in _parts(builder, code)]
    wide = builder.sext(code, _vector(i16, PAIR))
    shifted = builder.shl(wide, constant(wide.type, HALF.mantissa - _E4M3.mantissa))
    bits = builder.and_(shifted, constant(wide.type, ~(1 << HALF.bits - 2)))  # a copy of the sign is shifted there
    half = builder.bitcast(bits, _vector(f16, PAIR))
    return [builder.fpext(part, _vector(f32)) for part in _parts(builder, half)]


def _parts(builder, value):
    return [shuffle(builder, value, value, range(first, first + LANES)) for first in (0, LANES)]


def _fp8_by_hand(builder, code):
    """Without conversions of float16; no step meets a subnormal float32, which a process may flush to zero."""
    wide = builder.sext(code, _vector(i32))

    def bits(value):
        return constant(wide.type, value)

    magnitude = builder.and_(builder.shl(wide, bits(20)), bits(0x7F << 20))
    normal = builder.add(magnitude, bits(112 << 23))
    above = builder.bitcast(builder.add(magnitude, bits(113 << 23)), _vector(f32))  # 2^-14 above a subnormal's value
    subnormal = builder.bitcast(builder.fsub(above, constant(above.type, 2.0**-14)), wide.type)
    found = builder.select(builder.icmp_unsigned("<", magnitude, bits(8 << 20)), subnormal, normal)
    return builder.bitcast(builder.or_(found, builder.and_(wide, bits(-(1 << 31)))), _vector(f32))


def _magnitude(builder, code):
    return builder.and_(code, constant(code.type, _E4M3.top))


def rows(builder, block, valid):
    """The address of each of the rows of a block of bytes, the last repeated."""
    (base, step), last = places(builder, block), builder.sub(valid, i64(1))
    rows = [builder.select(builder.icmp_signed("<", i64(j), last), i64(j), last) for j in range(DOT_ROW_COLUMNS)]
    return [builder.add(base, builder.mul(row, step)) for row in rows]


def finish(builder, sums, c, add):
    folded, (c, _) = fold(builder, sums), places(builder, c)
    store(builder, types.float32, builder.fadd(folded, initial(builder, folded.type, c, i64(0), add)), c)


_ZERO = constant(_vector(f32), 0.0)


@intrinsic
def fp4_row(typingctx, x, codes, scales, table, valid, groups, c, add):
    """C[DOT_ROW_COLUMNS] = x[groups * GROUP] W^T, plus C if add, of `valid` rows of codes and scales."""

    def generate(context, builder, signature, arguments):
        x, codes, scales, table, valid, groups, c, add = arguments
        (x, _), codes, scales, sums = places(builder, x), *(rows(builder, y, valid) for y in (codes, scales)), []
        for first in range(0, DOT_ROW_COLUMNS, _TOGETHER):
            several = slice(first, first + _TOGETHER)

            def step(group, values, left=codes[several], right=scales[several]):
                start = builder.mul(group, i64(GROUP))
                xs = [_floats(builder, x, _plus(builder, start, i)) for i in range(0, GROUP, LANES)]
                result = []
                for code, scale, total in zip(left, right, values, strict=True):
                    at = builder.add(code, builder.mul(group, i64(GROUP // 2)))
                    weights = _fp4_group(builder, at, builder.add(scale, group), table)
                    for weight, other in zip(weights, xs, strict=True):
                        total = fma(builder, other, weight, total)
                    result.append(total)
                return result

            sums += loop(builder, groups, [_ZERO] * _TOGETHER, step)
        finish(builder, sums, c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(x, codes, scales, i, i, i, c, types.boolean), generate


@intrinsic
def fp4_decode(typingctx, codes, scales, table, groups, out):
    """Write groups of weights, scaled, as float32 in FP4_ORDER."""

    def generate(context, builder, signature, arguments):
        codes, scales, table, groups, out = arguments

        def step(group, values):
            at = builder.add(codes, builder.mul(group, i64(GROUP // 2)))
            for i, weight in enumerate(_fp4_group(builder, at, builder.add(scales, group), table)):
                place = _plus(builder, builder.mul(group, i64(GROUP)), i * LANES)
                store(builder, types.float32, weight, out, place)
            return []

        loop(builder, groups, [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5), generate


@intrinsic
def fp8_row(typingctx, x, codes, valid, k, c, add):
    """C[DOT_ROW_COLUMNS] = x[k] W^T, plus C if add, of `valid` rows of codes; k is a multiple of PAIR."""

    def generate(context, builder, signature, arguments):
        x, codes, valid, k, c, add = arguments
        (x, _), codes, sums, kind = places(builder, x), rows(builder, codes, valid), [], _vector(i8, PAIR)
        nothing = constant(kind, 0)
        for first in range(0, DOT_ROW_COLUMNS, _TOGETHER):

            def step(index, values, several=codes[first : first + _TOGETHER]):
                start = builder.mul(index, i64(PAIR))
                xs = [_floats(builder, x, _plus(builder, start, i)) for i in (0, LANES)]
                totals, largest = [], []
                for row, total, seen in zip(several, values[:_TOGETHER], values[_TOGETHER:], strict=True):
                    code = read(builder, kind, row, start)
                    for weight, other in zip(_fp8_pair(builder, code), xs, strict=True):
                        total = fma(builder, other, weight, total)
                    totals.append(total)
                    largest.append(_ir.generic(builder, "umax", seen, _magnitude(builder, code)))
                return totals + largest

            values = [_ZERO] * _TOGETHER + [nothing] * _TOGETHER
            values = loop(builder, builder.sdiv(k, i64(PAIR)), values, step)
            for total, seen in zip(values[:_TOGETHER], values[_TOGETHER:], strict=True):
                nan = builder.icmp_unsigned("==", seen, constant(kind, _E4M3.top))
                bits = builder.bitcast(nan, ir.IntType(PAIR))
                any_nan = builder.icmp_unsigned("!=", bits, bits.type(0))
                sums.append(builder.select(any_nan, constant(total.type, float("nan")), total))
        finish(builder, sums, c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(x, codes, i, i, c, types.boolean), generate


@intrinsic
def fp8_decode(typingctx, codes, count, out):
    """Write `count` codes, a multiple of PAIR, as float32 of 1 / FP8_FACTOR of their values."""

    def generate(context, builder, signature, arguments):
        codes, count, out = arguments
        kind = _vector(i8, PAIR)

        def step(index, values):
            start = builder.mul(index, i64(PAIR))
            code = read(builder, kind, codes, start)
            nan = builder.icmp_unsigned("==", _magnitude(builder, code), constant(kind, _E4M3.top))
            for part, weight in enumerate(_fp8_pair(builder, code)):
                bad = shuffle(builder, nan, nan, range(part * LANES, (part + 1) * LANES))
                weight = builder.select(bad, constant(weight.type, float("nan")), weight)
                store(builder, types.float32, weight, out, _plus(builder, start, part * LANES))
            return []

        loop(builder, builder.sdiv(count, i64(PAIR)), [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate
