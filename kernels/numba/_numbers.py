"""Words that tell numbers apart, round them to integers, divide them with a rest, and convert them.

What C leaves undefined is defined here, and nothing traps: an integer divided by 0 is 0 with itself as the rest, the
least integer divided by -1 is itself, and a float that an integer type does not hold becomes what x86 makes of it.
"""

from __future__ import annotations

import math

from numba.core import types
from numba.extending import intrinsic

from flagops.backends._numba_internals import unliteral

from . import _ir
from ._ir import Kind, f32, f64, i32, i64
from ._terms import Term, formula, unless
from ._vectors import Vector, choose, word

_MANTISSA = {f32: 23, f64: 52}


def _mask(kind: Kind) -> Kind:
    return kind.mask if isinstance(kind, Vector) else types.boolean


@formula(1, _mask)
def isnan(x):
    return x.differs(x)


@formula(1, _mask)
def isinf(x):
    return abs(x).equals(math.inf) if x.floats else x.differs(x)


@formula(1, _mask)
def isneginf(x):
    return x.equals(-math.inf) if x.floats else x.differs(x)


@formula(1, _mask)
def isfinite(x):
    return abs(x) < math.inf if x.floats else x.equals(x)


@word(1, _mask)
def signbit(builder, kind, a):
    """Whether a number is negative; of floats, -0 and NaN may be."""
    x = Term(builder, _ir.bits(builder, a) if choose(kind, True, False, False) else a)
    return (x < 0 if choose(kind, True, True, False) else x.differs(x)).value


@formula(2, lambda kind: choose(kind, kind, None, None))
def copysign(x, y):
    """The magnitude of x with the sign of y."""
    return x.call("copysign", y)


@formula(1)
def floor(x):
    return x.call("floor") if x.floats else x


@formula(1)
def ceil(x):
    return x.call("ceil") if x.floats else x


@formula(1)
def trunc(x):
    return x.call("trunc") if x.floats else x


@formula(1)
def round_even(x):
    """The nearest integer, and of two as near the even one."""
    return x.call("rint") if x.floats else x


def _float_rest(a: Term, b: Term) -> Term:
    """C's fmod. A quotient of fewer bits than a mantissa is at most 1 too large, and the rest that it leaves exact."""
    size, step = abs(a), abs(b)
    quotient = size / step
    rest = (-quotient.call("trunc")).exact_fma(step, size)
    rest = (rest < 0.0).where(rest + step, rest).call("copysign", a)
    far = ~((quotient < 2.0 ** _MANTISSA[a.element]) & (step < math.inf))
    return unless(far, rest, lambda builder, a, b: builder.frem(a, b), a, b)


def _quotient(kind: Kind, a: Term, b: Term) -> Term:
    """Of integers, towards 0."""
    signed = choose(kind, False, True, False)
    none, negative = b.equals(0), b.equals(-1) if signed else b.differs(b)
    divide = Term.sdiv if signed else Term.udiv
    quotient = divide(a, (none | negative).where(1, b))
    return none.where(0, negative.where(-a, quotient))


def _apart(kind: Kind, rest: Term, b: Term) -> Term:
    """Whether there is a rest whose sign is not the divisor's."""
    if not choose(kind, True, True, False):
        return rest.differs(rest)
    return (rest < 0) & (b > 0) | (rest > 0) & (b < 0)


@word(2)
def fmod(builder, kind, a, b):
    """What division towards 0 leaves, with the sign of the dividend; exact."""
    a, b = Term(builder, a), Term(builder, b)
    return (_float_rest(a, b) if a.floats else a - _quotient(kind, a, b) * b).value


@word(2)
def remainder(builder, kind, a, b):
    """What floor division leaves, with the sign of the divisor, as Python's `%`."""
    a, b = Term(builder, a), Term(builder, b)
    rest = _float_rest(a, b) if a.floats else a - _quotient(kind, a, b) * b
    return _apart(kind, rest, b).where(rest + b, rest).value


@word(2)
def trunc_divide(builder, kind, a, b):
    """The quotient rounded towards 0."""
    a, b = Term(builder, a), Term(builder, b)
    return ((a / b).call("trunc") if a.floats else _quotient(kind, a, b)).value


@word(2)
def floor_divide(builder, kind, a, b):
    """The quotient rounded down, as Python's `//`: of floats the exact quotient, not the rounded one."""
    a, b = Term(builder, a), Term(builder, b)
    if not a.floats:
        quotient = _quotient(kind, a, b)
        return _apart(kind, a - quotient * b, b).where(quotient - 1, quotient).value
    rest, ratio = _float_rest(a, b), a / b
    quotient = (a - rest) / b
    quotient = _apart(kind, rest, b).where(quotient - 1.0, quotient)
    whole = quotient.call("floor")
    whole = (quotient - whole > 0.5).where(whole + 1.0, whole)
    whole = quotient.equals(0.0).where(quotient.of(0.0).call("copysign", ratio), whole)
    return b.equals(0.0).where(ratio, whole).value


def _as_integers(x: Term, target: Kind) -> Term:
    """Floats to integers as C++ compilers have x86 do it: cut towards 0 in 32 or 64 bits, of which types of fewer take
    the low ones; what does not fit, and NaN, becomes the least. LLVM's own instruction would give no defined bits."""
    wide = i64 if target.bitwidth + (not target.signed) > 32 else i32

    def cut(x: Term) -> Term:
        bound = 2.0 ** (wide.width - 1)
        return ((x >= -bound) & (x < bound)).where(x, -bound).to("fptosi", wide)

    whole = cut(x)
    if target is types.uint64:
        upper = x >= 2.0**63
        whole = upper.where(cut(x - 2.0**63) ^ (-(2**63)), whole)
    return whole.to("trunc", _ir.register(target)) if target.bitwidth < wide.width else whole


def _converted(x: Term, source: Kind, target: Kind) -> Term:
    """Between arithmetic types of numba."""
    element, signed = _ir.register(target), choose(source, True, True, False)
    if source is target:
        return x
    if target is types.boolean:
        return x.differs(0)
    if x.floats:
        if not isinstance(target, types.Float):
            return _as_integers(x, target)
        return x.to("fpext" if element == f64 else "fptrunc", element)
    if isinstance(target, types.Float):
        return x.to("sitofp" if signed else "uitofp", element)
    if target.bitwidth > x.width:
        return x.to("sext" if signed else "zext", element)
    return x.to("trunc", element) if target.bitwidth < x.width else x


@intrinsic
def convert(typingctx, tag, value):
    """Vectors, masks and scalars in the arithmetic dtype of a tag, as many lanes: integers keep their low bits, floats
    are cut towards 0 or rounded to nearest even, a mask is 0 and 1, and what differs from 0 is true."""
    target = _ir.storage(unliteral(tag)).arithmetic
    kind = unliteral(value)
    source = getattr(kind, "element", kind)
    result = Vector(target, kind.lanes) if isinstance(kind, Vector) else target

    def generate(context, builder, signature, arguments):
        return _converted(Term(builder, arguments[1]), source, target).value

    return result(tag, kind), generate


@formula(2, _mask)
def logical_and(x, y):
    return x.differs(0) & y.differs(0)


@formula(2, _mask)
def logical_or(x, y):
    return x.differs(0) | y.differs(0)


@formula(2, _mask)
def logical_xor(x, y):
    return x.differs(0) ^ y.differs(0)


@formula(1, _mask)
def logical_not(x):
    return x.equals(0)
