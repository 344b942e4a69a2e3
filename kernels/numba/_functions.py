"""Functions of float32 and float64, of vectors and of scalars: no library for them comes with numba.

Each holds for every argument, subnormal, infinite, NaN or a zero of either sign, as C's library has it. A result is
within 2 units in the last place of the true one, the same bits in every lane and as a scalar. Series are Taylor's, cut
where what is left is below the rounding, unless a table says otherwise.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from . import _ir
from ._ir import f32, f64, generic
from ._terms import Term, formula, unless
from ._vectors import choose

_function = functools.partial(formula, result=lambda kind: choose(kind, kind, None, None))

_LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254")
_LN10 = Fraction("2.302585092994045684017991454684364207601101488628772976")
_HALF_PI = Fraction("1.570796326794896619231321691639751442098584699687552910487472296153908203")


class _Format(NamedTuple):
    """A float's layout, and where series of functions of it may be cut."""

    mantissa: int
    bias: int
    least: float  # exp of less is 0
    most: float  # exp of more is infinite
    kept: int  # bits of a constant whose product with an exponent is exact
    exp: int  # terms
    log: int
    sine: int
    tiny: float  # x below it is its own sine, expm1 and log1p
    round: type


_FORMATS = {
    f32: _Format(23, 127, -104.5, 89.0, 12, 8, 4, 5, 2.0**-26, np.float32),
    f64: _Format(52, 1023, -746.0, 710.0, 32, 14, 9, 9, 2.0**-55, np.float64),
}
_SERIES = [1 / math.factorial(i) for i in range(24)]  # of e to the power of x
_ARTANH = [2 / (2 * i + 3) for i in range(12)]


def _parts(value: Fraction, form: _Format, count: int) -> list[float]:
    """Floats that add up to a constant, each the nearest to what is left."""
    found = []
    for _ in range(count):
        found.append(float(form.round(float(value))))
        value -= Fraction(found[-1])
    return found


def _short(value: Fraction, form: _Format) -> tuple[float, float]:
    """A constant as one of few bits and the rest."""
    high = Fraction(int(value * 2**form.kept), 2**form.kept)
    return float(high), float(value - high)


def _nearest(x: Term, factor: float, form: _Format) -> tuple[Term, Term]:
    """The integer nearest to x * factor, as a float and as an integer; it has fewer bits than a mantissa."""
    magic = x.of(1.5 * 2.0**form.mantissa)
    shifted = x.fma(factor, magic)
    return shifted - magic, shifted.bits() - magic.bits()


def _sum(a: Term, b: Term) -> tuple[Term, Term]:
    """A sum and what rounding it loses."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _ordered_sum(a: Term, b: Term) -> tuple[Term, Term]:
    """As `_sum`, where b has no greater exponent, or a is 0."""
    total = a + b
    return total, b - (total - a)


def _product(a: Term, b: Term) -> tuple[Term, Term]:
    """A product and what rounding it loses."""
    rounded = a * b
    return rounded, a.exact_fma(b, -rounded)


def _two_to(n: Term, form: _Format) -> Term:
    return (n + form.bias << form.mantissa).as_floats()


def _scaled(x: Term, n: Term, form: _Format) -> Term:
    """x * 2**n, in one instruction or two steps, since the power may be subnormal, or beyond the largest."""
    if _ir.X86 and _ir.MANY and x.type == ir.VectorType(f32, 16):
        every, as_set = ir.IntType(16)(-1), _ir.i32(4)  # lanes; the rounding that the process has set
        given = x.value, n.to("sitofp", f32).value, x.value, every, as_set
        return Term(x.builder, _ir.call(x.builder, "x86.avx512.mask.scalef.ps.512", *given))
    half = n >> 1
    return x * _two_to(half, form) * _two_to(n - half, form)


def _bounded(x: Term, least: float, most: float) -> Term:
    """Within bounds, or NaN."""
    x = (x < least).where(least, x)
    return (x > most).where(most, x)


def _without_ln2(x: Term, form: _Format) -> tuple[Term, Term, Term]:
    """n as an integer, and the two parts of x - n ln 2."""
    steps, n = _nearest(x, 1 / math.log(2), form)
    high, low = _short(_LN2, form)
    rest = (-steps).fma(high, x)
    r = (-steps).fma(low, rest)
    return n, r, (-steps).fma(low, rest - r)


def _exp(x: Term, terms: int, more: Term | None = None) -> Term:
    """exp(x), or of x and little more than its rounding."""
    form = _FORMATS[x.element]
    n, r, low = _without_ln2(_bounded(x, form.least, form.most), form)
    result = r.polynomial(_SERIES[:terms])
    return _scaled(result if more is None else result.fma(low + more, result), n, form)


@_function(1)
def exp(x):
    """e to the power of each lane, subnormal results included."""
    return _exp(x, _FORMATS[x.element].exp)


@_function(1)
def exp_flushed(x):
    """As `exp`, half of the work; 0 of less, and infinite of more, than half of what normal numbers reach."""
    form = _FORMATS[x.element]
    n, r, _ = _without_ln2(x, form)
    result = r.polynomial(_SERIES[: form.exp]) * _two_to(n, form)
    most = (form.bias - 0.5) * math.log(2)
    return (x < -most + math.log(2)).where(0.0, (x > most).where(math.inf, result))


@_function(1)
def exp2(x):
    """2 to the power of each lane, subnormal results included."""
    form = _FORMATS[x.element]
    x = _bounded(x, form.least / math.log(2), form.most / math.log(2))
    whole, n = _nearest(x, 1.0, form)
    r = (x - whole) * float(_LN2)
    return _scaled(r.polynomial(_SERIES[: form.exp]), n, form)


def _half_expm1(x: Term) -> tuple[Term, Term]:
    """(exp(x) - 1) / 2, whose double may be beyond the largest, as a float and what is added."""
    form = _FORMATS[x.element]
    n, r, low = _without_ln2(_bounded(x, -form.mantissa, form.most), form)
    rest = (r * r).fma(r.polynomial(_SERIES[2 : form.exp + 1]), low)
    half = _two_to(n - 1, form)
    return half.fma(r, half - 0.5), half * rest


@_function(1)
def expm1(x):
    """exp(x) - 1, without the loss near 0."""
    high, low = _half_expm1(x)
    half = high + low
    return (abs(x) < _FORMATS[x.element].tiny).where(x, half + half)


@_function(1)
def tanh(x):
    """h / (h + 1) for h of twice the size, with what rounding h and h + 1 loses put back."""
    half, lost = _ordered_sum(*_half_expm1(_bounded(abs(x) * 2.0, 0.0, 2.0 * _FORMATS[x.element].mantissa)))
    below, lost_below = _sum(x.of(1.0), half)
    inverse = 1.0 / below
    result = half * inverse
    left = (-result).fma(below, half) + (lost - result * (lost_below + lost))
    return left.fma(inverse, result).call("copysign", x)


def _halved(x: Term) -> tuple[Term, Term]:
    """k and m of x = 2**k m, where m**2 lies between 1/2 and 2; of positive normal numbers."""
    form = _FORMATS[x.element]
    bits, least = x.bits(), x.of(math.sqrt(0.5)).bits()
    k = bits - least >> form.mantissa
    return k, (bits - (k << form.mantissa)).as_floats()


def _parted(x: Term) -> tuple[Term, Term]:
    """As `_halved`, of subnormal numbers too; k as a float."""
    form = _FORMATS[x.element]
    subnormal = x < 2.0 ** (1 - form.bias)
    k, m = _halved(subnormal.where(x * 2.0**form.mantissa, x))
    return subnormal.where(k - form.mantissa, k).to("sitofp", x.element), m


def _near_one(f: Term, terms: int) -> Term:
    """log(1 + f) - f, where (1 + f)**2 lies between 1/2 and 2: by the series of artanh."""
    s = f / (f + 2.0)
    square, half = s * s, f * f * 0.5
    return s * square.fma(square.polynomial(_ARTANH[:terms]), half) - half


def _checked(x: Term, result: Term) -> Term:
    """A logarithm, right where x has none that is finite."""
    outside = x.equals(0.0).where(x.of(-math.inf), (x < 0.0).where(x.of(math.nan), x))
    return ((x > 0.0) & (x < math.inf)).where(result, outside)


def _log(x: Term, terms: int, base: Fraction | None = None) -> Term:
    """The logarithm to a base, which is e if not given."""
    form = _FORMATS[x.element]
    k, m = _parted(x)
    f = m - 1.0
    more = _near_one(f, terms)
    if base is None:
        high, low = _short(_LN2, form)
        return _checked(x, k.fma(high, f + k.fma(low, more)))
    high, low = _short(_LN2 / base, form)
    factor, rest = _parts(1 / base, form, 2)
    natural, lost = _ordered_sum(f, more)
    return _checked(x, k.fma(high, natural.fma(factor, natural.fma(rest, lost.fma(factor, k * low)))))


@_function(1)
def log(x):
    return _log(x, _FORMATS[x.element].log)


@_function(1)
def log2(x):
    return _log(x, _FORMATS[x.element].log, _LN2)


@_function(1)
def log10(x):
    return _log(x, _FORMATS[x.element].log, _LN10)


@_function(1)
def log1p(x):
    """log(1 + x), without the loss near 0: what rounding 1 + x loses is added to its mantissa."""
    form = _FORMATS[x.element]
    u, lost = _sum(x, x.of(1.0))
    k, m = _halved(u)
    few = (k < form.bias // 2).where(k, form.bias // 2)  # beyond, nothing that is lost counts
    f = (m - 1.0) + lost * _two_to(-few, form)
    more = _near_one(f, form.log)
    high, low = _short(_LN2, form)
    k = k.to("sitofp", x.element)
    result = _checked(u, k.fma(high, f + k.fma(low, more)))
    return (abs(x) < form.tiny).where(x, result)


REDUCED = {"float32": 2.0**16, "float64": 2.0**30}
"""Angles up to it are reduced by a constant of three parts; the others, rare, are left to C's library."""


def _circular(x: Term, name: str) -> Term:
    """The sine or cosine: x less a multiple of pi / 2, and the series for what is left, up to pi / 4."""
    form = _FORMATS[x.element]
    high, middle, low = _parts(_HALF_PI, form, 3)
    steps, n = _nearest(x, 2 / math.pi, form)
    first = (-steps).exact_fma(high, x)  # exact: a multiple of the last place of `high`, and less than 1
    second, error = _product(-steps, x.of(middle))
    r, lost = _sum(first, second)
    angle, rest = _ordered_sum(r, lost + (-steps).fma(low, error))
    square = angle * angle
    even, odd = ([(-1) ** i * _SERIES[2 * i + part] for i in range(1, form.sine + 1)] for part in (0, 1))
    sine = angle + (square * angle).fma(square.polynomial(odd), rest)
    cosine = square.fma(square.polynomial(even), -(angle * rest)) + 1.0
    quarter = n if name == "sin" else n + 1
    value = (quarter & 1).equals(0).where(sine, cosine)
    value = (value.bits() ^ ((quarter & 2) << x.width - 2)).as_floats()
    if name == "sin":
        value = (abs(x) < form.tiny).where(x, value)
    far = ~(abs(x) <= REDUCED[form.round.__name__])
    return unless(far, value, lambda builder, x: generic(builder, name, x), x)


@_function(1)
def sin(x):
    return _circular(x, "sin")


@_function(1)
def cos(x):
    return _circular(x, "cos")


# Remez: erf(x) / x - 1 of x**2 up to 1, its relative error even; -log(erfc(x)) of x - 1.5 from 1 to where erf rounds to
# 1, the error of erf even.
_ERF = {
    f32: (
        (0.12837916612625122, -0.3761262595653534, 0.1128358542919159, -0.026853814721107483, 0.005188330542296171,
         -0.0008010202436707914, 7.853849820094183e-05),
        (3.3844920818421818, 3.5088011034545183, 0.892641759372471, 0.02582037746846649, -0.006021386704629354,
         0.0012694413532903918, -0.00018557333199510908),
        4.0,
    ),
    f64: (
        (0.1283791670955126, -0.3761263890318375, 0.11283791670954858, -0.02686617064507296, 0.00522397762478137,
         -0.0008548326978765149, 0.00012055331037551108, -1.4925593518728226e-05, 1.6460972954153765e-06,
         -1.635002619207727e-07, 1.4657883530919653e-08, -1.136567067182716e-09, 5.945255584223488e-11),
        (3.3844920895515527, 3.5088008017795276, 0.8926403306150379, 0.025824140633643935, -0.006006746386489123,
         0.0012572166868187469, -0.00021596330435045568, 2.247368805752821e-05, 2.6468310641046723e-06,
         -2.370837504056729e-06, 8.18775050041355e-07, -1.9261124284124783e-07, 2.784126598519482e-08,
         1.1154197139156886e-09, -2.386787619969338e-09, 9.304091643247606e-10, -2.276133053102998e-10,
         3.6847242454802666e-11, -3.597314774100753e-12, 1.596816556826441e-13),
        6.0,
    ),
}  # fmt: skip


@_function(1)
def erf(x):
    """The error function: x times a polynomial up to 1, and 1 - exp(-a polynomial) beyond."""
    within, beyond, last = _ERF[x.element]
    size = _bounded(abs(x), 0.0, last)
    large = 1.0 - _exp(-(size - 1.5).polynomial(beyond), _FORMATS[x.element].exp)
    small = size.fma((size * size).polynomial(within), size)
    return (size > 1.0).where(large, small).call("copysign", x)


@_function(1)
def rsqrt(x):
    """1 / sqrt(x), both rounded."""
    return 1.0 / x.call("sqrt")


def _log_in_two(x: Term) -> tuple[Term, Term]:
    """log(x) of float64 with a dozen bits more than one has: the series of artanh, its first terms in two parts."""
    form = _FORMATS[f64]
    k, m = _parted(x)
    below, lost_below = _ordered_sum(m.of(1.0), m)
    inverse = 1.0 / below
    s = (m - 1.0) * inverse
    s_more = ((-s).exact_fma(below, m - 1.0) - s * lost_below) * inverse
    square, square_more = _product(s, s)
    square_more = square_more + 2.0 * s * s_more
    two_thirds, rest = _parts(Fraction(2, 3), form, 2)
    factor, factor_more = _ordered_sum(s.of(two_thirds), square * square.polynomial(_ARTANH[1:]))
    cubic, cubic_more = _product(square, factor)
    cubic_more = cubic_more + (square * (factor_more + rest) + square_more * factor)
    tail, tail_more = _product(s, cubic)
    tail_more = tail_more + (s * cubic_more + s_more * cubic)
    high, low = _short(_LN2, form)
    near, near_more = _ordered_sum(2.0 * s, tail)
    total, more = _ordered_sum(k * high, near)
    more = more + k.fma(low, near_more + (2.0 * s_more + tail_more))
    total, more = _ordered_sum(total, more)
    return _checked(x, total), more


def _size_of_power(x: Term, y: Term) -> Term:
    """x to the power of y for x from 0."""
    form = _FORMATS[f64]
    if x.element == f64:
        log, more = _log_in_two(x)
        exponent, lost = _product(y, log)
        more = (abs(exponent) < -form.least).where(y.fma(more, lost), 0.0)
        return _exp(exponent, form.exp, more)
    k, m = _parted(x)
    k = x.equals(0.0).where(-math.inf, (x < math.inf).where(k, x))
    k, m, y = (term.to("fpext", f64) for term in (k, m, y))
    log = k.fma(float(_LN2), (m - 1.0) + _near_one(m - 1.0, 6))
    n, r, _ = _without_ln2(_bounded(log * y, -110.0, 100.0), form)  # beyond which float32 is 0 or infinite
    return (r.polynomial(_SERIES[:9]) * _two_to(n, form)).to("fptrunc", f32)


@_function(2)
def power(x, y):
    """x to the power of y with C's special cases; float32 through float64, float64 by a logarithm in two parts."""
    size = _size_of_power(abs(x), y)
    size = (y.equals(0.0) | x.equals(1.0) | x.equals(-1.0) & abs(y).equals(math.inf)).where(1.0, size)
    whole, half = y.call("floor").equals(y), y * 0.5
    odd = whole & half.call("floor").differs(half)
    size = ((x < 0.0) & (x > -math.inf) & ~whole).where(math.nan, size)
    return odd.where(size.call("copysign", x), size)
