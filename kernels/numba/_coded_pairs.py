"""Weights of four and eight bits as bfloat16, each code times its scale, for products that are added in pairs.

A group of FP4 and a line of FP8 come out of their bytes in an order that takes the fewest instructions, `FP4_ORDER` and
`FP8_ORDER`; what they are multiplied with must stand in it too (`arrange`). `fp4_row` and `fp8_row` make the sums of
`dot_row` with what `fp4_decode` and `fp8_decode` write, bit for bit.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flagops.backends.numba import features

from .._moe import BLOCK, GROUP
from . import _ir
from ._coded_tiles import FP4_ORDER as FLOATS
from ._coded_tiles import finish, rows
from ._formats import FORMATS
from ._ir import LANES, PAIRS, constant, dot_pairs, f32, i8, i16, i64, load, loop, read, shuffle, store, write
from ._tiles import DOT_ROW_COLUMNS, places

BYTES = PAIRS and "+avx512vbmi" in features()
"""Whether one instruction looks 64 bytes up among 128, which FP8 takes twice."""
_E4M3, _E2M1, _SCALES = (FORMATS[name] for name in ("e4m3", "e2m1", "e8m0"))
_LINE = 64
"""Codes of FP8 that are looked up together."""
_CODES = _E4M3.top + 1
"""Magnitudes of FP8."""
_TOGETHER = 4
"""Rows of weights that run side by side: enough to hide the latency of their sums."""
_WORDS, _OCTETS = ir.VectorType(i16, GROUP), ir.VectorType(i8, _LINE)
_ZERO = constant(ir.VectorType(f32, LANES), 0.0)

FP4_ORDER = tuple(4 * word + nibble for nibble in range(4) for word in range(8))
FP8_ORDER = tuple(16 * lane + 8 * half + byte for half in (0, 1) for lane in range(4) for byte in range(8))


def fp4_table() -> np.ndarray:
    """What FP4's scales are looked up in: the bits of 16 products as bfloat16, twice."""
    return _products(np.tile(_E2M1.values, 2))


def fp8_table() -> np.ndarray:
    """What FP8's scales are looked up in: the lower bytes of 128 products as bfloat16, then the upper."""
    products = _products(np.abs(_E4M3.values[:_CODES]))
    return np.concatenate([products & 0xFF, products >> 8], 1).astype(np.uint8)


def _products(values):
    with np.errstate(over="ignore", invalid="ignore"):
        return (_SCALES.values[:, None] * values).astype(ml_dtypes.bfloat16).view(np.uint16)


def _fp4_group(builder, codes, scale, table):
    """The weights of the codes at an address times the scale of the byte at another, in FP4_ORDER."""
    row = builder.mul(builder.zext(read(builder, i8, scale), i64), i64(2 * GROUP))
    packed = read(builder, ir.VectorType(i16, 8), codes)
    spread = shuffle(builder, packed, packed, [lane % 8 for lane in range(GROUP)])
    shifts = ir.Constant(_WORDS, [4 * (lane // 8) for lane in range(GROUP)])
    # the instruction takes five bits of an index, of which the fifth chooses one of two equal halves
    return _ir.call(
        builder, "x86.avx512.permvar.hi.512", read(builder, _WORDS, table, row), builder.lshr(spread, shifts)
    )


def _fp8_products(builder, scale, table):
    """Those of the scale of the byte at an address: two vectors of lower and two of upper bytes."""
    row = builder.mul(builder.zext(read(builder, i8, scale), i64), i64(2 * _CODES))
    return [read(builder, _OCTETS, table, builder.add(row, i64(first))) for first in range(0, 2 * _CODES, _LINE)]


def _fp8_line(builder, code, products):
    """Two vectors of the weights of a line of codes, in FP8_ORDER."""
    # the instruction takes seven bits of an index; the eighth is the sign
    low, high = (
        _ir.call(builder, "x86.avx512.vpermi2var.qi.512", products[first], code, products[first + 1])
        for first in (0, 2)
    )
    high = builder.or_(high, builder.and_(code, constant(_OCTETS, -_CODES)))
    found = []
    for start in (0, 8):  # within 128 bits, where bytes of two vectors are zipped by one instruction
        where = [16 * lane + start + byte + side for lane in range(4) for byte in range(8) for side in (0, _LINE)]
        found.append(builder.bitcast(shuffle(builder, low, high, where), _WORDS))
    return found


@intrinsic
def fp4_decode(typingctx, codes, scales, table, groups, out, ahead):
    """Write groups of weights, scaled, in FP4_ORDER; what lies `ahead` of the codes is fetched."""

    def generate(context, builder, signature, arguments):
        codes, scales, table, groups, out, ahead = arguments

        def step(group, values):
            at = builder.add(codes, builder.mul(group, i64(GROUP // 2)))
            _ir.prefetch(builder, builder.add(at, ahead))
            weight = _fp4_group(builder, at, builder.add(scales, group), table)
            write(builder, weight, builder.add(out, builder.mul(group, i64(2 * GROUP))))
            return []

        loop(builder, groups, [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), generate


@intrinsic
def fp8_decode(typingctx, codes, scales, table, blocks, out, ahead):
    """Write blocks of weights, scaled, in FP8_ORDER; what lies `ahead` of the codes is fetched."""

    def generate(context, builder, signature, arguments):
        if not BYTES:  # compiled beside what runs
            return context.get_dummy_value()
        codes, scales, table, blocks, out, ahead = arguments

        def step(block, values):
            products = _fp8_products(builder, builder.add(scales, block), table)
            start = builder.mul(block, i64(BLOCK))
            for first in range(0, BLOCK, _LINE):
                at = builder.add(codes, builder.add(start, i64(first)))
                _ir.prefetch(builder, builder.add(at, ahead))
                place = builder.add(out, builder.shl(builder.add(start, i64(first)), i64(1)))
                for i, weight in enumerate(_fp8_line(builder, read(builder, _OCTETS, at), products)):
                    write(builder, weight, place, 2 * GROUP * i)
            return []

        loop(builder, blocks, [], step)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), generate


@intrinsic
def decode_row(typingctx, codes, scales, table, blocks, packed, x):
    """Write blocks of a row of FP8, scaled, in the order of the weights that it is multiplied with: FP4's if `packed`.

    False where the row is wider than bfloat16 or there is no instruction for that, and nothing is written.
    """
    there = x[0].name == "bfloat16" and BYTES

    def generate(context, builder, signature, arguments):
        if not there:
            return ir.Constant(ir.IntType(1), 0)
        codes, scales, table, blocks, packed, x = arguments
        out, _ = places(builder, x)
        wanted = [first + place for first in (0, GROUP) for place in FP4_ORDER]
        order = [FP8_ORDER.index(place) for place in wanted]

        def step(block, values):
            products = _fp8_products(builder, builder.add(scales, block), table)
            start = builder.mul(block, i64(BLOCK))
            for first in range(0, BLOCK, _LINE):
                at = builder.add(start, i64(first))
                halves = _fp8_line(builder, read(builder, _OCTETS, builder.add(codes, at)), products)
                for i, half in enumerate(halves):
                    other = shuffle(builder, halves[0], halves[1], order[GROUP * i : GROUP * (i + 1)])
                    place = builder.add(out, builder.shl(builder.add(at, i64(GROUP * i)), i64(1)))
                    write(builder, builder.select(packed, other, half), place)
            return []

        loop(builder, blocks, [], step)
        return ir.Constant(ir.IntType(1), 1)

    i = types.int64
    return types.boolean(i, i, i, i, types.boolean, x), generate


def _halves(builder, x, index):
    """A vector of bfloat16 of the row at an address, so many elements on."""
    return read(builder, _WORDS, x, builder.shl(index, i64(1)))


@intrinsic
def fp4_row(typingctx, x, codes, scales, table, valid, groups, c, add, ahead):
    """C[DOT_ROW_COLUMNS] = x[groups * GROUP] W^T, plus C if add, of `valid` rows of codes and scales; as many bytes as
    they have are fetched from `ahead` on."""

    def generate(context, builder, signature, arguments):
        x, codes, scales, table, valid, groups, c, add, ahead = arguments
        (x, _), codes, scales, sums = places(builder, x), *(rows(builder, y, valid) for y in (codes, scales)), []
        for first in range(0, DOT_ROW_COLUMNS, _TOGETHER):
            several = slice(first, first + _TOGETHER)
            line = builder.add(ahead, builder.mul(groups, i64(first * GROUP // 2)))

            def step(group, totals, left=codes[several], right=scales[several], line=line):
                start = builder.mul(group, i64(GROUP))
                _ir.prefetch(builder, builder.add(line, builder.mul(group, i64(_TOGETHER * GROUP // 2))))
                own = _halves(builder, x, start)
                result = []
                for code, scale, total in zip(left, right, totals, strict=True):
                    at = builder.add(code, builder.mul(group, i64(GROUP // 2)))
                    weight = _fp4_group(builder, at, builder.add(scale, group), table)
                    result.append(dot_pairs(builder, own, weight, total))
                return result

            sums += loop(builder, groups, [_ZERO] * _TOGETHER, step)
        finish(builder, sums, c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(x, codes, scales, i, i, i, c, types.boolean, i), generate


@intrinsic
def fp8_row(typingctx, x, codes, scales, table, valid, blocks, c, add, ahead):
    """C[DOT_ROW_COLUMNS] = x[blocks * BLOCK] W^T, plus C if add, of `valid` rows of codes under one row of scales; as
    many bytes as they have are fetched from `ahead` on."""

    def generate(context, builder, signature, arguments):
        if not BYTES:  # compiled beside what runs
            return context.get_dummy_value()
        x, codes, scales, table, valid, blocks, c, add, ahead = arguments
        (x, _), codes, (scales, _) = places(builder, x), rows(builder, codes, valid), places(builder, scales)

        def step(block, totals):
            products = _fp8_products(builder, builder.add(scales, block), table)
            start = builder.mul(block, i64(BLOCK))
            further = builder.add(ahead, builder.mul(start, i64(DOT_ROW_COLUMNS)))
            for first in range(0, BLOCK, _LINE):
                place = builder.add(start, i64(first))
                own = [_halves(builder, x, builder.add(place, i64(i))) for i in (0, GROUP)]
                result = []
                for i, (code, total) in enumerate(zip(codes, totals, strict=True)):
                    _ir.prefetch(builder, builder.add(further, i64(DOT_ROW_COLUMNS * first + _LINE * i)))
                    line = _fp8_line(builder, read(builder, _OCTETS, builder.add(code, place)), products)
                    for part, weight in zip(own, line, strict=True):
                        total = dot_pairs(builder, part, weight, total)
                    result.append(total)
                totals = result
            return totals

        finish(builder, loop(builder, blocks, [_ZERO] * DOT_ROW_COLUMNS, step), c, add)
        return context.get_dummy_value()

    i = types.int64
    return types.none(x, codes, scales, i, i, i, c, types.boolean, i), generate


@intrinsic
def arrange(typingctx, x, packed, count):
    """Bring the elements of a row into the order of the weights that they are multiplied with, in place."""
    paired = x[0].name == "bfloat16"

    def generate(context, builder, signature, arguments):
        block, packed, count = arguments
        x, _ = places(builder, block)

        def ordered(order):
            def step(index, values):
                start = builder.mul(index, i64(len(order)))
                if paired:
                    kind = ir.VectorType(i16, len(order))
                    at = builder.add(x, builder.shl(start, i64(1)))
                    values = read(builder, kind, at)
                    write(builder, shuffle(builder, values, values, order), at)
                else:
                    values = load(builder, types.float32, x, start, len(order))
                    store(builder, types.float32, shuffle(builder, values, values, order), x, start)
                return []

            loop(builder, builder.sdiv(count, i64(len(order))), [], step)

        if not paired:
            with builder.if_then(packed):
                ordered(FLOATS)
        else:
            with builder.if_else(packed) as (then, otherwise):
                with then:
                    ordered(FP4_ORDER)
                with otherwise:
                    ordered(FP8_ORDER)
        return context.get_dummy_value()

    return types.none(x, types.boolean, types.int64), generate
