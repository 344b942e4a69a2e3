"""Small compiled loops that drivers call by address: a driver is compiled once, whatever it is given.

Every routine is ``f(n, out, a, b, c, more) -> 0`` of six int64, most of them addresses. A loop over dtypes would else
be compiled for each operator and each combination of dtypes.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined"
from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flagops.backends._numba_internals import entry
from flagops.backends.numba import jit

from . import _ir
from ._ir import LANES, TAGS, i64, storage
from ._numbers import convert
from ._vectors import Vector, load, store, vstore

WIDTH = LANES
"""Elements that a routine computes at once, whatever their dtype: LLVM splits what is longer than a register."""

_INTEGERS = [types.int64] * 6


_alive: list[Any] = []


def routine(body: Any, name: str, **words: Any) -> int:
    """The address of a body compiled with these words for its names; `name` is unique to them."""
    made = FunctionType(body.__code__, body.__globals__ | words, f"{body.__name__}_{name}")
    made.__module__ = body.__module__
    dispatcher = jit(made, body)
    _alive.append(dispatcher)
    return entry(dispatcher, _INTEGERS)


@intrinsic
def call(typingctx, place, n, out, a, b, c, more):
    """Call a routine by its address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(i64, [i64] * 6).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(*[types.int64] * 7), generate


def wide_words(lanes: int) -> tuple[Any, Any, Any]:
    """What fills, reads and numbers the lanes of vectors of so many."""

    @intrinsic
    def many(typingctx, value):
        """A number in every lane."""

        def generate(context, builder, signature, arguments):
            return _ir.splat(builder, arguments[0], lanes)

        return Vector(value, lanes)(value), generate

    @intrinsic
    def read(typingctx, tag, address):
        """As many elements as there are lanes."""

        def generate(context, builder, signature, arguments):
            return _ir.load(builder, tag, arguments[1], lanes=lanes)

        return Vector(storage(tag).arithmetic, lanes)(tag, types.int64), generate

    @intrinsic
    def numbered(typingctx, first):
        """first, first + 1, ... in the lanes."""

        def generate(context, builder, signature, arguments):
            steps = ir.Constant(ir.VectorType(i64, lanes), list(range(lanes)))
            return builder.add(_ir.splat(builder, arguments[0], lanes), steps)

        return Vector(types.int64, lanes)(types.int64), generate

    return many, read, numbered


repeated, vread, _ = wide_words(WIDTH)


def _move(n, out, a, out_step, a_step, more):
    """n elements from `a` to `out`, so many bytes from one to the next."""
    i = 0
    if out_step == TO_SIZE and a_step == FROM_SIZE:
        whole = n - n % WIDTH
        for i in range(0, whole, WIDTH):
            vstore(TO, out + i * TO_SIZE, convert(TO, vread(FROM, a + i * FROM_SIZE)))
        for i in range(whole, n):
            store(TO, out + i * TO_SIZE, convert(TO, load(FROM, a + i * FROM_SIZE)))
    elif out_step == TO_SIZE and a_step == 0:
        value = convert(TO, load(FROM, a))
        whole = n - n % WIDTH
        many = repeated(value)
        for i in range(0, whole, WIDTH):
            vstore(TO, out + i * TO_SIZE, many)
        for i in range(whole, n):
            store(TO, out + i * TO_SIZE, value)
    else:
        for i in range(n):
            store(TO, out + i * out_step, convert(TO, load(FROM, a + i * a_step)))
    return 0


@cache
def mover(source: str, target: str) -> int:
    """The routine that brings elements of a dtype to another: ``f(n, out, a, out_step, a_step, 0)``, steps in bytes."""
    if source == target:  # as bits, so that no NaN changes
        source = target = f"uint{8 * _ir.STORAGE[source].size}"
    words = {"FROM": TAGS[source], "TO": TAGS[target]}
    sizes = {"FROM_SIZE": _ir.STORAGE[source].size, "TO_SIZE": _ir.STORAGE[target].size}
    return routine(_move, f"{source}_{target}", **words, **sizes)
