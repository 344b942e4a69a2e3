"""What attention needs beyond `_simd`: the exponential of vectors, division, rounding in registers, integer loads."""

import math
from fractions import Fraction

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._simd import _arithmetic, _binary, _constant, _fma, _i32, _i64, _like, _narrow, _widen

_LN2 = Fraction("0.693147180559945309417232121458176568")
#            terms, mantissa bits, exponent bias, integer, below it exp rounds to 0, bits kept of ln 2
_FLOAT = {
    ir.FloatType(): (8, 23, 127, _i32, -104.5, 12),
    ir.DoubleType(): (14, 52, 1023, _i64, -746.0, 32),
}

vdiv = _binary(lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def vexp(typingctx, a):
    """exp of each lane for lanes <= 0, subnormal results included; NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        kind = arguments[0].type
        terms, bits, bias, integer, least, kept = _FLOAT[kind.element]
        whole = _like(kind, integer)

        def number(value):
            return _constant(kind, float(value))

        def power(n):
            return builder.bitcast(builder.shl(builder.add(n, _constant(whole, bias)), _constant(whole, bits)), kind)

        low = builder.fcmp_ordered("<", arguments[0], number(least))
        x = builder.select(low, number(least), arguments[0])
        magic = number(1.5 * 2.0**bits)
        shifted = _fma(builder, x, number(1 / math.log(2)), magic)
        n = builder.sub(builder.bitcast(shifted, whole), builder.bitcast(magic, whole))
        negative = builder.fsub(magic, shifted)
        high = Fraction(int(_LN2 * 2**kept), 2**kept)
        r = _fma(builder, negative, number(high), x)
        r = _fma(builder, negative, number(_LN2 - high), r)
        result = number(1 / math.factorial(terms - 1))
        for i in reversed(range(terms - 1)):
            result = _fma(builder, result, r, number(1 / math.factorial(i)))
        half = builder.ashr(n, _constant(whole, 1))  # in two steps, since 2**n may be subnormal
        return builder.fmul(builder.fmul(result, power(half)), power(builder.sub(n, half)))

    return a(a), generate


@intrinsic
def vround(typingctx, tag, a):
    """Each lane rounded to the tag's dtype and widened again."""

    def generate(context, builder, signature, arguments):
        return _widen(builder, tag, _narrow(builder, tag, arguments[1]))

    return a(tag, a), generate


@intrinsic
def cast(typingctx, tag, value):
    """A float64 in the arithmetic dtype of a tag."""
    result = _arithmetic(tag)

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], value, result)

    return result(tag, value), generate


@intrinsic
def load_index(typingctx, address, size):
    """The signed integer of 4 or 8 bytes at an address."""

    def generate(context, builder, signature, arguments):
        address, size = arguments
        with builder.if_else(builder.icmp_signed("==", size, _i64(8))) as (then, otherwise):
            with then:
                long = builder.load(builder.inttoptr(address, ir.PointerType()), align=4, typ=_i64)
                first = builder.block
            with otherwise:
                short = builder.load(builder.inttoptr(address, ir.PointerType()), align=4, typ=_i32)
                extended = builder.sext(short, _i64)
                second = builder.block
        result = builder.phi(_i64)
        result.add_incoming(long, first)
        result.add_incoming(extended, second)
        return result

    return types.int64(types.int64, types.int64), generate
