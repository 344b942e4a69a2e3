"""Elements that go from one place to another, and are what they were."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import DTYPES, FLOATS, NUMBERS
from flagops.operator import Tensor, operator
from flagops.scalars import dtype as dtype_scalar
from flagops.scalars import whole

from ._cards import LOADS, cast
from ._rounding import Array, magnitude, unit


@operator(
    name="aten.copy",
    tensors={"x": Tensor("...", DTYPES)},
    scalars={"dtype": dtype_scalar(DTYPES)},
    result=Tensor("...", "dtype"),
    workloads=LOADS,
    flops=lambda dims, batch: float(math.prod(batch)),
    exact=True,
)
def copy(x: Array, dtype: str) -> Array:
    """``x`` in another dtype.

    Args:
        x: of any shape, any real dtype, any strides.
        dtype: of the result.
        out: to write into; allocated if None.

    Returns:
        Floats rounded to nearest even (halves after float32), integers' low bits, True for what is not 0. Floats become
        integers as x86 has it: cut off, in 32 bits (64 for int64) whose low ones narrower integers take; what does not
        fit there, and NaN, becomes the least.

    Raises:
        TypeError: ``x`` is no array, or ``dtype`` is none of torch's real dtypes.

    Source: torch's ``aten::copy_`` and ``aten::_to_copy``.
    """
    return cast(x, dtype)


@operator(
    name="aten.flip",
    tensors={"x": Tensor("...", DTYPES)},
    scalars={"axes": whole((1, 0, 2, 6), least=0)},
    result=Tensor("...", "x"),
    workloads=LOADS,
    flops=lambda dims, batch: float(math.prod(batch)),
    separable=False,
    exact=True,
)
def flip(x: Array, axes: int) -> Array:
    """``x`` with its last axes in reverse.

    Args:
        x: of any shape, any real dtype, any strides.
        axes: how many, from the last on; all if there are fewer.
        out: to write into, dtype and shape of ``x``; allocated if None.

    Returns:
        An array like ``x``.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.

    Source: torch's ``aten::flip``.
    """
    return np.flip(x, tuple(range(max(0, x.ndim - axes), x.ndim)))


def _triangle_choices(dims: dict[str, int]) -> tuple[int, ...]:
    return 0, 1, -1, dims["m"], -dims["n"], 5


_triangle = functools.partial(
    operator,
    tensors={"x": Tensor("... m n", DTYPES)},
    scalars={"diagonal": whole(_triangle_choices, least=-(2**62))},
    result=Tensor("... m n", "x"),
    workloads={"2k.float32": {"m": 2048, "n": 2048, "dtype": "float32"}},
    flops=lambda dims, batch: float(math.prod(batch) * dims["m"] * dims["n"]),
    separable=("...",),
    inplace={"out": "x"},
    exact=True,
)


@_triangle(name="aten.tril")
def tril(x: Array, diagonal: int = 0) -> Array:
    """``x`` up to a diagonal, 0 above it.

    Args:
        x: ``[..., m, n]``, any real dtype, any strides.
        diagonal: the first column of it, of a negative one the first row.
        out: ``[..., m, n]`` to write into, may be ``x``; allocated if None.

    Returns:
        ``[..., m, n]``.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.
        ValueError: ``x`` has fewer than two axes.

    Source: torch's ``aten::tril``.
    """
    return np.tril(x, diagonal)


@_triangle(name="aten.triu")
def triu(x: Array, diagonal: int = 0) -> Array:
    """``x`` from a diagonal on, 0 below it.

    Args:
        x: ``[..., m, n]``, any real dtype, any strides.
        diagonal: the first column of it, of a negative one the first row.
        out: ``[..., m, n]`` to write into, may be ``x``; allocated if None.

    Returns:
        ``[..., m, n]``.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.
        ValueError: ``x`` has fewer than two axes.

    Source: torch's ``aten::triu``.
    """
    return np.triu(x, diagonal)


def _end(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: dict[str, int]) -> Array:
    value = rng.integers(-9, 10, shape) * (1 if dtype in FLOATS else int(rng.choice([1, 1, 1 << 40])))
    return (value / rng.choice([1, 3, 8])).astype(dtype) if dtype in FLOATS else value


_END = Tensor("", ("int64", "float64"), draw=_end)
_COUNTS = whole((7, 1, 2, 0, 17, 130, 3000), least=0)


@operator(
    name="aten.arange",
    tensors={"start": _END, "step": Tensor("", "start", draw=_end)},
    scalars={"n": _COUNTS, "dtype": dtype_scalar(NUMBERS)},
    result=Tensor("n", "dtype"),
    derived=lambda dims, scalars: {"n": scalars["n"]},
    workloads={"4M.int64": {"n": 1 << 22, "dtype": "int64"}},
    flops=lambda dims, batch: 2.0 * dims["n"],
    separable=False,
)
def arange(start: Array, step: Array, n: int, dtype: str) -> Array:
    """``start + i * step`` for i below n.

    Args:
        start: one number, int64 or float64.
        step: one number, dtype of ``start``.
        n: how many.
        dtype: of the result.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``[n]``, computed in float64 and rounded once for floats, in int64 for integers, which take start and step cut
        to whole numbers.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: ``start`` or ``step`` has axes.

    Source: torch's ``aten::arange``.
    """
    if dtype not in FLOATS:
        return cast(np.int64(int(start)) + np.arange(n) * np.int64(int(step)), dtype)
    return np.longdouble(start) + np.arange(n) * np.longdouble(step)


def _ramp_bound(exact: Array, size: float, dtype: str) -> Array:
    """Two roundings of float64, and one of the result."""
    error = 4 * unit("float64").u * size
    return error + unit(dtype).u * (magnitude(exact) + error) + unit(dtype).tiny


def arange_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """In units of the largest of its terms."""
    start, step, n = (abs(float(arguments[name])) for name in ("start", "step", "n"))
    return _ramp_bound(exact, start + n * step, dtype)


@operator(
    name="aten.linspace",
    tensors={"start": _END, "end": Tensor("", "start", draw=_end)},
    scalars={"n": _COUNTS, "dtype": dtype_scalar(FLOATS)},
    result=Tensor("n", "dtype"),
    derived=lambda dims, scalars: {"n": scalars["n"]},
    workloads={"4M.float32": {"n": 1 << 22, "dtype": "float32"}},
    flops=lambda dims, batch: 2.0 * dims["n"],
    separable=False,
)
def linspace(start: Array, end: Array, n: int, dtype: str) -> Array:
    """Numbers from ``start`` to ``end``, both among them, at equal distances.

    Args:
        start: one number, int64 or float64.
        end: one number, dtype of ``start``.
        n: how many; one is ``start``.
        dtype: of the result.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``[n]``, computed in float64 from the nearer end and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: ``start`` or ``end`` has axes.

    Source: torch's ``aten::linspace``.
    """
    first, last = np.longdouble(start), np.longdouble(end)
    return first + np.arange(n) * ((last - first) / max(1, n - 1))


def linspace_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """In units of the larger end."""
    start, end = (abs(float(arguments[name])) for name in ("start", "end"))
    return _ramp_bound(exact, 2 * (start + end), dtype)


@operator(
    name="aten.nonzero",
    tensors={"mask": Tensor("n", ("bool",))},
    result={"places": Tensor("n", ("int64",)), "count": Tensor("1", ("int64",))},
    workloads={"1M": {"n": 1 << 20, "dtype": "bool"}},
    flops=lambda dims, batch: float(dims["n"]),
    separable=False,
    exact=True,
)
def nonzero(mask: Array) -> tuple[Array, Array]:
    """Where a mask holds.

    Args:
        mask: ``[n]``, bool, any strides.
        out: ``[n]`` and ``[1]`` to write into, int64; allocated if None.

    Returns:
        The places in order, -1 behind the last; and how many there are.

    Raises:
        TypeError: ``mask`` is no array of bools.

    Source: torch's ``aten::nonzero``.
    """
    found = np.flatnonzero(mask)
    return np.concatenate([found, np.full(mask.size - found.size, -1)]).astype(np.int64), np.array([found.size])
