# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Weights of four and eight bits decoded in registers, on the way into a product.

FP4 comes in groups of 32 that stand in the order `FP4_ORDER`; so must what they are multiplied with (`fp4_arrange`).
FP8 comes in natural order and as 2^-8 of its value: shifted by 7 bits, a code is a float16 of that value, subnormals
included. `fp4_row` and `fp8_row` make the sums of `dot_row` with what `fp4_decode` and `fp8_decode` write, bit for bit.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from flagops.backends.numba import features

from ._dequantize_simd import _lookup_bytes
from ._simd import (
    DOT_ROW_COLUMNS,
    LANES,
    _fma,
    _fold,
    _i16,
    _i32,
    _i64,
    _initial,
    _loop,
    _shuffle,
    _splat,
    _store,
)

_PERMUTE = "+avx512f" in features()
"""Whether one instruction looks 16 floats up; each scale then has a row of 16 products, else its half."""
_HALVES = "+sse2" not in features() or "+f16c" in features()
_TOGETHER = 4
"""Rows of weights that run side by side: enough to hide the latency of their sums."""
_i8, _f32 = ir.IntType(8), ir.FloatType()
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_NAN = 0x7F

FP4_ORDER = (
    tuple(8 * (lane % 4) + 4 * half + lane // 4 for half in (0, 1) for lane in range(16))
    if _PERMUTE
    else (*range(0, 32, 2), *range(1, 32, 2))
)


def fp4_table() -> np.ndarray:
    """What `fp4_row` and `fp4_decode` look scales up in."""
    scales = np.append(np.exp2(np.arange(255) - 127.0), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        return (scales[:, None] * (_E2M1 if _PERMUTE else (0.5,))).astype(np.float32)


def _constant(element, values):
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def _load(builder, kind, base, *offsets):
    for offset in offsets:
        base = builder.add(base, offset if isinstance(offset, ir.Value) else _i64(offset))
    return builder.load(builder.inttoptr(base, ir.PointerType()), align=1, typ=kind)


def _call(builder, name, a, b):
    kind = ir.FunctionType(a.type, [a.type, b.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), [a, b])


def _fp4_group(builder, codes, scale, table):
    """The 32 weights at `codes` times the scale of the byte at `scale`, as vectors in FP4_ORDER."""
    byte = builder.zext(_load(builder, _i8, scale), _i64)
    if _PERMUTE:
        products = _load(builder, ir.VectorType(_f32, 16), table, builder.shl(byte, _i64(6)))
        packed = _load(builder, ir.VectorType(_i32, 4), codes)
        packed = _shuffle(builder, packed, packed, [lane % 4 for lane in range(16)])
        found = []
        for first in (0, 16):  # the instruction takes the low four bits of an index
            index = builder.lshr(packed, _constant(_i32, [first + 4 * (lane // 4) for lane in range(16)]))
            found.append(_call(builder, "x86.avx512.permvar.sf.512", products, index))
        return found
    factor = _splat(builder, _load(builder, _f32, table, builder.shl(byte, _i64(2))), LANES)
    packed = _load(builder, ir.VectorType(_i8, 16), codes)
    doubled = _constant(_i8, [int(2 * value) & 0xFF for value in _E2M1])
    found = []
    for index in (builder.and_(packed, _constant(_i8, [15] * 16)), builder.lshr(packed, _constant(_i8, [4] * 16))):
        values = _lookup_bytes(builder, doubled, index)
        for first in range(0, 16, LANES):
            part = builder.sext(_shuffle(builder, values, values, range(first, first + LANES)), _vector(_i32))
            found.append(builder.fmul(builder.sitofp(part, _vector(_f32)), factor))
    return found


def _vector(element):
    return ir.VectorType(element, LANES)


def _fp8_pair(builder, code):
    """Two vectors for 2 * LANES codes; NaN codes give numbers."""
    if not _HALVES:
        return [_fp8_by_hand(builder, part) for part in _halves(builder, code)]
    wide = builder.sext(code, ir.VectorType(_i16, 2 * LANES))
    bits = builder.and_(builder.shl(wide, _constant(_i16, [7] * (2 * LANES))), _constant(_i16, [0xBFFF] * (2 * LANES)))
    half = builder.bitcast(bits, ir.VectorType(ir.HalfType(), 2 * LANES))
    return [builder.fpext(part, _vector(_f32)) for part in _halves(builder, half)]


def _halves(builder, value):
    return [_shuffle(builder, value, value, range(first, first + LANES)) for first in (0, LANES)]


def _fp8_by_hand(builder, code):
    """Without conversions of float16; no step meets a subnormal float32, which a process may flush to zero."""

    def bits(value):
        return _constant(_i32, [value] * LANES)

    wide = builder.sext(code, _vector(_i32))
    magnitude = builder.and_(builder.shl(wide, bits(20)), bits(0x7F << 20))
    normal = builder.add(magnitude, bits(112 << 23))
    above = builder.bitcast(builder.add(magnitude, bits(113 << 23)), _vector(_f32))  # 2^-14 above a subnormal's value
    subnormal = builder.bitcast(builder.fsub(above, _constant(_f32, [2.0**-14] * LANES)), _vector(_i32))
    found = builder.select(builder.icmp_unsigned("<", magnitude, bits(8 << 20)), subnormal, normal)
    return builder.bitcast(builder.or_(found, builder.and_(wide, bits(1 << 31))), _vector(_f32))


def _magnitude(builder, code):
    return builder.and_(code, _constant(_i8, [0x7F] * code.type.count))


def _rows(builder, valid):
    """The index of each of the rows, the last repeated."""
    last = builder.sub(valid, _i64(1))
    return [builder.select(builder.icmp_signed("<", _i64(j), last), _i64(j), last) for j in range(DOT_ROW_COLUMNS)]


def _finish(builder, sums, c, add):
    folded = _fold(builder, sums)
    _store(builder, types.float32, builder.fadd(folded, _initial(builder, folded.type, c, _i64(0), add)), c)


_ZERO = ir.Constant(ir.VectorType(_f32, LANES), [0.0] * LANES)


@intrinsic
def fp4_row(typingctx, codes, ld, scales, lds, table, valid, groups, x, c, add):
    """C[DOT_ROW_COLUMNS] = x[32 groups] W^T, plus C if add, of `valid` rows of codes; `ld`, `lds` in bytes."""

    def generate(context, builder, signature, arguments):
        codes, ld, scales, lds, table, valid, groups, x, c, add = arguments
        rows, sums = _rows(builder, valid), []
        for first in range(0, DOT_ROW_COLUMNS, _TOGETHER):
            several = rows[first : first + _TOGETHER]
            left = [builder.add(codes, builder.mul(row, ld)) for row in several]
            right = [builder.add(scales, builder.mul(row, lds)) for row in several]

            def step(group, values, left=left, right=right):
                at = builder.mul(group, _i64(128))
                xs = [_load(builder, _vector(_f32), x, at, 4 * i) for i in range(0, 32, LANES)]
                result = []
                for code, scale, total in zip(left, right, values, strict=True):
                    at = builder.add(code, builder.mul(group, _i64(16)))
                    for weight, other in zip(
                        _fp4_group(builder, at, builder.add(scale, group), table), xs, strict=True
                    ):
                        total = _fma(builder, other, weight, total)
                    result.append(total)
                return result

            sums += _loop(builder, groups, [_ZERO] * _TOGETHER, step)
        _finish(builder, sums, c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, types.boolean), generate


@intrinsic
def fp4_decode(typingctx, codes, scales, table, groups, out):
    """Write groups of 32 weights, scaled, as float32 in FP4_ORDER."""

    def generate(context, builder, signature, arguments):
        codes, scales, table, groups, out = arguments

        def step(group, values):
            at = builder.add(codes, builder.mul(group, _i64(16)))
            for i, weight in enumerate(_fp4_group(builder, at, builder.add(scales, group), table)):
                _store(builder, types.float32, weight, out, builder.add(builder.mul(group, _i64(32)), _i64(i * LANES)))
            return []

        _loop(builder, groups, [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5), generate


@intrinsic
def fp4_arrange(typingctx, x, groups):
    """Bring groups of 32 float32 into FP4_ORDER, in place."""

    def generate(context, builder, signature, arguments):
        x, groups = arguments

        def step(group, values):
            at = builder.add(x, builder.mul(group, _i64(128)))
            values = _load(builder, ir.VectorType(_f32, 32), at)
            _store(builder, types.float32, _shuffle(builder, values, values, FP4_ORDER), at)
            return []

        _loop(builder, groups, [], step)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def fp8_row(typingctx, codes, ld, valid, k, x, c, add):
    """C[DOT_ROW_COLUMNS] = x[k] W^T, plus C if add, of `valid` rows of codes; k is a multiple of 2 * LANES."""

    def generate(context, builder, signature, arguments):
        codes, ld, valid, k, x, c, add = arguments
        rows, sums, kind = _rows(builder, valid), [], ir.VectorType(_i8, 2 * LANES)
        nothing = ir.Constant(kind, [0] * 2 * LANES)
        for first in range(0, DOT_ROW_COLUMNS, _TOGETHER):
            left = [builder.add(codes, builder.mul(row, ld)) for row in rows[first : first + _TOGETHER]]

            def step(index, values, left=left):
                at = builder.mul(index, _i64(8 * LANES))
                xs = [_load(builder, _vector(_f32), x, at, 4 * i) for i in (0, LANES)]
                totals, largest = [], []
                for row, total, seen in zip(left, values[:_TOGETHER], values[_TOGETHER:], strict=True):
                    code = _load(builder, kind, row, builder.mul(index, _i64(2 * LANES)))
                    for weight, other in zip(_fp8_pair(builder, code), xs, strict=True):
                        total = _fma(builder, other, weight, total)
                    totals.append(total)
                    largest.append(_call(builder, f"umax.v{2 * LANES}i8", seen, _magnitude(builder, code)))
                return totals + largest

            values = [_ZERO] * _TOGETHER + [nothing] * _TOGETHER
            values = _loop(builder, builder.sdiv(k, _i64(2 * LANES)), values, step)
            for total, seen in zip(values[:_TOGETHER], values[_TOGETHER:], strict=True):
                nan = builder.icmp_unsigned("==", seen, ir.Constant(kind, [_NAN] * 2 * LANES))
                bits = builder.bitcast(nan, ir.IntType(2 * LANES))
                any_nan = builder.icmp_unsigned("!=", bits, bits.type(0))
                sums.append(builder.select(any_nan, ir.Constant(total.type, [float("nan")] * LANES), total))
        _finish(builder, sums, c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, types.boolean), generate


@intrinsic
def fp8_decode(typingctx, codes, count, out):
    """Write `count` codes, a multiple of 2 * LANES, as float32 of 2^-8 of their values."""

    def generate(context, builder, signature, arguments):
        codes, count, out = arguments
        kind = ir.VectorType(_i8, 2 * LANES)

        def step(index, values):
            code = _load(builder, kind, codes, builder.mul(index, _i64(2 * LANES)))
            nan = builder.icmp_unsigned("==", _magnitude(builder, code), ir.Constant(kind, [_NAN] * 2 * LANES))
            for part, weight in enumerate(_fp8_pair(builder, code)):
                bad = _shuffle(builder, nan, nan, range(part * LANES, (part + 1) * LANES))
                weight = builder.select(bad, ir.Constant(weight.type, [float("nan")] * LANES), weight)
                _store(
                    builder, types.float32, weight, out,
                    builder.add(builder.mul(index, _i64(2 * LANES)), _i64(part * LANES)),
                )  # fmt: skip
            return []

        _loop(builder, builder.sdiv(count, _i64(2 * LANES)), [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate
