"""Cards made by family: what is the same for every operator of one element each, or of one axis."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import DTYPES, FLOATS, HALF, INTEGERS, NUMBERS, arithmetic, numpy_dtype
from flagops.operator import Operator, Scalar, Tensor, operator
from flagops.scalars import dtype as dtype_scalar

from ._rounding import Array, accumulator, magnitude, round_to, unit

KINDS = {
    "floats": FLOATS,
    "numbers": NUMBERS,
    "integers": INTEGERS,
    "bits": (*INTEGERS, "bool"),
    "all": DTYPES,
    "bool": ("bool",),
}
"""What an operator is computed in."""

LOADS = {
    f"{count >> 20}M.{dtype}": {"batch": (count,), "dtype": dtype}
    for count in (1 << 22,)
    for dtype in ("float32", "bfloat16")
}

Scale = Callable[..., Any]


def brought(x: Array, dtype: str) -> Array:
    """An operand in the arithmetic of a dtype, as `cast` brings it there."""
    return cast(x, arithmetic(dtype))


def cast(x: Array, dtype: str) -> Array:
    """An array in another dtype, as x86 has it: fractions are cut off, in 32 bits (64 for int64) whose low ones
    narrower integers take; what does not fit there, and NaN, becomes the least."""
    if dtype == "bool":
        return x != 0
    if dtype in HALF and x.dtype.itemsize > 2:  # which torch brings to float32 first
        x = round_to(x, "float32")
    if dtype in FLOATS or not _float(x):
        return round_to(x, dtype) if dtype in FLOATS else x.astype(numpy_dtype(dtype))
    bits = 64 if dtype == "int64" else 32
    value = x.astype(np.float64)
    inside = (value >= -(2.0 ** (bits - 1))) & (value < 2.0 ** (bits - 1))
    return np.where(inside, value, -(2.0 ** (bits - 1))).astype(np.int64).astype(numpy_dtype(dtype))


def _float(x: Array) -> bool:
    return x.dtype.name in FLOATS


def pointwise(
    computed: str,
    *,
    result: str = "dtype",
    roundings: float = 1,
    scale: Scale | None = None,
    reaches: Scale | None = None,
    scalars: dict[str, Scalar] | None = None,
    condition: str = "",
    name: str = "",
    exact: bool = False,
) -> Callable[[Callable[..., Any]], Operator]:
    """Make the card ``aten.<name>`` of an operator that gives each element from one of each operand.

    The reference takes its operands, `dtype` and its scalars. It gets operands brought to the arithmetic of `dtype`,
    floats wide; what it gives is rounded to `dtype`, of integers the low bits.

    computed: the dtypes that `dtype` may be, a key of `KINDS`. result: ``"dtype"`` or ``"bool"``.
    roundings: units of the arithmetic that a kernel may be off, of ``scale(*arguments)``, of the result if not given.
    reaches: an intermediate, ``reaches(*arguments)``, that may overflow where the scale does not.
    condition: the operand that is bool whatever `dtype` is.
        0: one of the operands, of zeros either.
    exact: whether floats agree bit for bit.
    """

    def declare(function: Callable[..., Any]) -> Operator:
        called = name or function.__name__
        words = list(inspect.signature(function).parameters)
        operands = words[: words.index("dtype")]

        def reference(*args: Any) -> Array:
            made = _computed(function, operands, condition, args)
            return round_to(made, args[words.index("dtype")]) if exact and made.dtype != bool else made

        def within(exactly: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
            return _bound(exactly, arguments, operands, condition, roundings, scale, reaches)

        reference.__name__, reference.__module__ = function.__name__, function.__module__
        reference.__doc__ = _documented(function, called, operands, condition, KINDS[computed], result)
        reference.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        declared = operator(
            name=f"aten.{called}",
            tensors={n: Tensor("...", ("bool",) if n == condition else DTYPES) for n in operands},
            scalars={"dtype": dtype_scalar(KINDS[computed]), **(scalars or {})},
            result=Tensor("...", ("bool",) if result == "bool" else "dtype"),
            workloads=LOADS if "float32" in KINDS[computed] else _INTEGER_LOADS,
            flops=lambda dims, batch: float(math.prod(batch)),
            inplace={"out": operands[-1 if condition else 0]},
            exact=exact,
            within=within,
        )
        return declared(reference)

    return declare


_INTEGER_LOADS = {"4M.int64": {"batch": (1 << 22,), "dtype": "int64"}}


def _wide(x: Array) -> Array:
    return x.astype(np.longdouble if x.dtype == np.float64 else np.float64) if _float(x) else x


def _operands(operands: list[str], condition: str, values: Mapping[str, Any]) -> list[Array]:
    given = (brought(values[n], "bool" if n == condition else values["dtype"]) for n in operands)
    return [_wide(x) for x in given]


def _computed(function: Callable[..., Any], operands: list[str], condition: str, args: tuple[Any, ...]) -> Array:
    values = inspect.signature(function).bind(*args)
    values.apply_defaults()
    named, dtype = values.arguments, values.arguments["dtype"]
    rest = [x for n, x in named.items() if n not in operands]
    rest[1:] = [_as(x, dtype) for x in rest[1:]]
    with np.errstate(all="ignore"):
        made = np.asarray(function(*_operands(operands, condition, named), *rest))
    shape = np.broadcast_shapes(*(named[n].shape for n in operands))
    made = np.broadcast_to(made, shape)
    return made if made.dtype == bool or dtype in FLOATS else made.astype(numpy_dtype(dtype))


def _as(x: Any, dtype: str) -> Any:
    """A scalar in the arithmetic of a dtype; None and words as they are."""
    if not isinstance(x, (int, float)):
        return x
    return (
        int(x) if dtype in INTEGERS else bool(x) if dtype == "bool" else float(numpy_dtype(arithmetic(dtype)).type(x))
    )


def _bound(
    exactly: Array,
    arguments: Mapping[str, Any],
    operands: list[str],
    condition: str,
    roundings: float,
    scale: Scale | None,
    reaches: Scale | None,
) -> Array:
    """Roundings of the arithmetic relative to the scale, and one of the result."""
    dtype = arguments["dtype"]
    acc, out = unit(accumulator(dtype)), unit(dtype)
    others = [_as(x, dtype) for n, x in arguments.items() if n not in operands and n != "dtype"]

    def at_least(size: Array, given: Scale | None) -> Array:
        if given is None:
            return size
        with np.errstate(all="ignore"):
            larger = np.maximum(size, np.abs(given(*_operands(operands, condition, arguments), *others)))
        return np.broadcast_to(larger, exactly.shape)

    size = at_least(magnitude(exactly), scale)
    error = roundings * (acc.u * size + acc.tiny)
    rounding = 0.0 if out == acc else out.u * (magnitude(exactly) + error) + out.tiny
    # an intermediate may overflow where the result does not
    return np.where(at_least(size, reaches) < acc.largest / 4, error + rounding, np.inf)


def _documented(
    function: Callable[..., Any], name: str, operands: list[str], condition: str, computed: tuple[str, ...], result: str
) -> str:
    """What the documentation of all pointwise cards says alike, around what the function's own says."""
    words = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    args = [f"    {n}: of any shape, {'bool' if n == condition else 'any real dtype, any strides'}." for n in operands]
    args += [
        "    dtype: what operands are brought to and the result is"
        if result == "dtype"
        else "    dtype: what operands are brought to"
    ]
    args[-1] += f": {', '.join(computed)}."
    made = "of `dtype`, rounded once" if result == "dtype" else "bool"
    return "\n".join(
        [
            *words,
            "",
            "Args:",
            *args,
            "    out: to write into; may be the first operand itself; allocated if None.",
            "",
            "Returns:",
            f"    An array of the shape that operands broadcast to, {made}. Computed in float32 for halves, in int64",
            "    for integers.",
            "",
            "Raises:",
            "    TypeError: an argument is no array, or a dtype does not fit.",
            "    ValueError: shapes do not broadcast.",
            "",
            f"Source: torch's ``aten::{name}``.",
        ]
    )
