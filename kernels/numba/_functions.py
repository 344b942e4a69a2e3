"""Functions of vectors and of scalars as polynomials: no library for them comes with numba.

Each says where it holds. A result is within a few roundings of the true one, the same in every lane and as a scalar.
"""

from __future__ import annotations

import math
from fractions import Fraction

from llvmlite import ir

from . import _ir
from ._ir import constant, like
from ._vectors import word

_LN2 = Fraction("0.693147180559945309417232121458176568")
#          terms, mantissa bits, exponent bias, below it exp rounds to 0, above it to infinity, bits kept of ln 2
_EXP = {_ir.f32: (8, 23, 127, -104.5, 89.0, 12), _ir.f64: (14, 52, 1023, -746.0, 710.0, 32)}


@word(1)
def exp(builder, kind, a):
    """e to the power of each lane, subnormal results included."""
    element = _ir.element_of(a.type)
    terms, mantissa, bias, least, most, kept = _EXP[element]
    whole = like(a.type, ir.IntType(8 * _ir.SIZE[element]))

    def number(value):
        return constant(a.type, float(value))

    def power(n):
        return builder.bitcast(builder.shl(builder.add(n, constant(whole, bias)), constant(whole, mantissa)), a.type)

    x = builder.select(builder.fcmp_ordered("<", a, number(least)), number(least), a)
    x = builder.select(builder.fcmp_ordered(">", x, number(most)), number(most), x)
    magic = number(1.5 * 2.0**mantissa)
    shifted = _ir.fma(builder, x, number(1 / math.log(2)), magic)
    n = builder.sub(builder.bitcast(shifted, whole), builder.bitcast(magic, whole))
    negative = builder.fsub(magic, shifted)
    high = Fraction(int(_LN2 * 2**kept), 2**kept)
    r = _ir.fma(builder, negative, number(high), x)
    r = _ir.fma(builder, negative, number(_LN2 - high), r)
    result = number(1 / math.factorial(terms - 1))
    for i in reversed(range(terms - 1)):
        result = _ir.fma(builder, result, r, number(1 / math.factorial(i)))
    half = builder.ashr(n, constant(whole, 1))  # in two steps, since 2**n may be subnormal, or beyond the largest
    return builder.fmul(builder.fmul(result, power(half)), power(builder.sub(n, half)))


@word(1)
def log1p(builder, kind, a):
    """log(1 + a) for lanes from 0 to 1: twice the artanh of a / (2 + a), whose series converges fast up to 1/3."""
    two, series = constant(a.type, 2.0), constant(a.type, 0.0)
    ratio = builder.fdiv(a, builder.fadd(two, a))
    square = builder.fmul(ratio, ratio)
    for i in reversed(range(17 if _ir.element_of(a.type) == _ir.f64 else 8)):
        series = _ir.fma(builder, series, square, constant(a.type, 1 / (2 * i + 1)))
    return builder.fmul(builder.fmul(two, ratio), series)
