"""Formulas of words: LLVM values with Python's operators, so that what a word emits reads as its arithmetic.

A `Term` is one scalar or one vector while a kernel is compiled; a number beside it is taken in its type, in every lane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from . import _ir
from ._ir import Builder, Kind, Value, constant, generic, like
from ._vectors import word


class Term:
    """A value of floats, of integers that wrap around and compare as signed ones, or of truth."""

    def __init__(self, builder: Builder, value: Value) -> None:
        self.builder, self.value = builder, value
        self.type: ir.Type = value.type
        self.element: ir.Type = _ir.element_of(value.type)
        self.floats = not isinstance(self.element, ir.IntType)
        self.width: int = 8 * _ir.SIZE[self.element] if self.floats else self.element.width

    def of(self, value: Any) -> Term:
        """A number, in this type; a term as it is."""
        return value if isinstance(value, Term) else Term(self.builder, constant(self.type, value))

    def call(self, name: str, *others: Any) -> Term:
        """One of LLVM's functions that exist for every type."""
        return Term(self.builder, generic(self.builder, name, self.value, *(self.of(x).value for x in others)))

    def _do(self, of_floats: str, of_integers: str, *others: Any) -> Term:
        instruction = getattr(self.builder, of_floats if self.floats else of_integers)
        return Term(self.builder, instruction(self.value, *(self.of(x).value for x in others)))

    def _is(self, sign: str, other: Any) -> Term:
        """A comparison; NaN differs from all and is neither less nor greater."""
        of_floats = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        compare = of_floats if self.floats else self.builder.icmp_signed
        return Term(self.builder, compare(sign, self.value, self.of(other).value))

    def __add__(self, other: Any) -> Term:
        return self._do("fadd", "add", other)

    def __sub__(self, other: Any) -> Term:
        return self._do("fsub", "sub", other)

    def __mul__(self, other: Any) -> Term:
        return self._do("fmul", "mul", other)

    def __truediv__(self, other: Any) -> Term:
        return Term(self.builder, self.builder.fdiv(self.value, self.of(other).value))

    def sdiv(self, other: Any) -> Term:
        return Term(self.builder, self.builder.sdiv(self.value, self.of(other).value))

    def udiv(self, other: Any) -> Term:
        return Term(self.builder, self.builder.udiv(self.value, self.of(other).value))

    def __radd__(self, number: float) -> Term:
        return self.of(number) + self

    def __rsub__(self, number: float) -> Term:
        return self.of(number) - self

    def __rmul__(self, number: float) -> Term:
        return self.of(number) * self

    def __rtruediv__(self, number: float) -> Term:
        return self.of(number) / self

    def __neg__(self) -> Term:
        return self._do("fneg", "neg")

    def __abs__(self) -> Term:
        return self.call("fabs") if self.floats else self.call("abs", Term(self.builder, _ir.i1(0)))

    def __lt__(self, other: Any) -> Term:
        return self._is("<", other)

    def __le__(self, other: Any) -> Term:
        return self._is("<=", other)

    def __gt__(self, other: Any) -> Term:
        return self._is(">", other)

    def __ge__(self, other: Any) -> Term:
        return self._is(">=", other)

    def equals(self, other: Any) -> Term:
        return self._is("==", other)

    def differs(self, other: Any) -> Term:
        return self._is("!=", other)

    def __and__(self, other: Any) -> Term:
        return Term(self.builder, self.builder.and_(self.value, self.of(other).value))

    def __or__(self, other: Any) -> Term:
        return Term(self.builder, self.builder.or_(self.value, self.of(other).value))

    def __xor__(self, other: Any) -> Term:
        return Term(self.builder, self.builder.xor(self.value, self.of(other).value))

    def __invert__(self) -> Term:
        return Term(self.builder, self.builder.not_(self.value))

    def __lshift__(self, count: int) -> Term:
        return Term(self.builder, self.builder.shl(self.value, self.of(count).value))

    def __rshift__(self, count: int) -> Term:
        return Term(self.builder, self.builder.ashr(self.value, self.of(count).value))

    def where(self, yes: Any, no: Any) -> Term:
        """Of truth: lanes of `yes` or of `no`, of which one at least is a term."""
        form = yes if isinstance(yes, Term) else no
        return Term(self.builder, self.builder.select(self.value, form.of(yes).value, form.of(no).value))

    def fma(self, factor: Any, addend: Any) -> Term:
        """self * factor + addend, rounded once where the processor can."""
        values = (self.of(x).value for x in (factor, addend))
        return Term(self.builder, _ir.fma(self.builder, self.value, *values))

    def exact_fma(self, factor: Any, addend: Any) -> Term:
        """As `fma` but rounded once on every processor, though slowly by a library where it cannot."""
        return self.call("fma", factor, addend)

    def polynomial(self, coefficients: Sequence[float]) -> Term:
        """The value at `self` of a polynomial, its constant first."""
        result = self.of(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = result.fma(self, coefficient)
        return result

    def bits(self) -> Term:
        """Floats as integers of as many bits."""
        return Term(self.builder, _ir.bits(self.builder, self.value))

    def as_floats(self) -> Term:
        """The floats of these bits."""
        return Term(self.builder, _ir.floats(self.builder, self.value))

    def to(self, instruction: str, element: ir.Type) -> Term:
        """Converted by one of LLVM's instructions, such as "fpext"."""
        return Term(self.builder, getattr(self.builder, instruction)(self.value, like(self.type, element)))

    def any(self) -> Value:
        """Of truth: whether any lane is."""
        whole = isinstance(self.type, ir.VectorType)
        return generic(self.builder, "vector.reduce.or", self.value, result=_ir.i1) if whole else self.value


def formula(
    arity: int, result: Callable[[Kind], Kind | None] = lambda kind: kind
) -> Callable[[Callable[..., Term]], Any]:
    """A word written as a function of terms."""

    def made(emit: Callable[..., Term]) -> Any:
        @functools.wraps(emit)
        def emitted(builder: Builder, kind: Kind, *values: Value) -> Value:
            return emit(*(Term(builder, value) for value in values)).value

        return word(arity, result)(emitted)

    return made


Scalar = Callable[..., Value]
"""What a builder emits of scalars."""


def lanewise(emit: Scalar, *values: Term) -> Term:
    """What vectors have no instructions for, a lane at a time."""
    first, builder = values[0], values[0].builder
    if not isinstance(first.type, ir.VectorType):
        return Term(builder, emit(builder, *(x.value for x in values)))
    result = first.value
    for lane in map(_ir.i32, range(first.type.count)):
        one = emit(builder, *(builder.extract_element(x.value, lane) for x in values))
        result = builder.insert_element(result, one, lane)
    return Term(builder, result)


def unless(far: Term, near: Term, emit: Scalar, *values: Term) -> Term:
    """`near`, but in lanes that are `far` what is emitted lanewise, behind a branch that vectors without such lanes do
    not take."""
    builder, before = near.builder, near.builder.block
    with builder.if_then(far.any(), likely=False):
        mixed, inside = far.where(lanewise(emit, *values), near).value, builder.block
    phi = builder.phi(near.type)
    phi.add_incoming(near.value, before)
    phi.add_incoming(mixed, inside)
    return Term(builder, phi)
