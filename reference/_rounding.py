"""Numbers: wide arithmetic for references, rounding once, and the units of error bounds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops.arrays import HALF, numpy_dtype

Array = NDArray[Any]


def wide(x: Array) -> Array:
    """An array in the arithmetic of references: float64, or longdouble for float64 itself."""
    return x.astype(np.longdouble if x.dtype == np.float64 else np.float64)


def round_to(x: Array, dtype: str) -> Array:
    """Round once, to nearest even; overflow becomes an infinity."""
    x = np.asarray(x)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16" or x.dtype.itemsize <= 4:
            return x.astype(numpy_dtype(dtype))
        # ml_dtypes goes through float32. Rounding to odd there keeps what decides the second rounding.
        narrow = x.astype(np.float32)
        past = np.abs(narrow) > np.abs(x)
        narrow = np.where(past, np.nextafter(narrow, np.float32(0)), narrow)
        bits = narrow.view(np.uint32)
        inexact = np.isfinite(narrow) & (narrow != x)
        return np.where(inexact, bits | 1, bits).astype(np.uint32).view(np.float32).astype(numpy_dtype(dtype))


@dataclass(frozen=True)
class Unit:
    """What one rounding costs in a format: u relative, tiny absolute (smallest subnormal); and its largest value."""

    u: float
    tiny: float
    largest: float


@functools.cache
def unit(dtype: str) -> Unit:
    """The unit of a float format by name."""
    import ml_dtypes

    info = ml_dtypes.finfo(numpy_dtype(dtype))
    return Unit(float(info.eps) / 2, float(info.smallest_subnormal), float(info.max))


def accumulator(dtype: str) -> str:
    """The format in which kernels accumulate for a dtype of inputs."""
    return "float64" if dtype == "float64" else "float32"


def magnitude(x: Array) -> Array:
    """Absolute values, with 0 for what is not finite: infinities and NaN are compared by class, not by distance."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(x), np.abs(x), 0)


def contraction_bound(exact: Array, absolute: Array, terms: int, dtype: str) -> Array:
    """How far a sum of ``terms`` products in any order, rounded once, may lie from the exact one.

    absolute: the sum of the products' magnitudes. The accumulator's worst case, plus one rounding of the result;
    infinite where the accumulator may overflow on the way.
    """
    acc, out = unit(accumulator(dtype)), unit(dtype)
    error = terms * acc.u * absolute + terms * acc.tiny
    rounding = 0.0 if out == acc else out.u * (magnitude(exact) + error) + out.tiny
    return np.where(absolute <= acc.largest * (1 - terms * acc.u), error + rounding + acc.tiny, np.inf)


_PAIRED = ContextVar("paired", default=False)


@contextlib.contextmanager
def pairing(paired: bool) -> Iterator[None]:
    """Bounds made here are those of kernels that add products of bfloat16 in pairs, to which subnormals are zeros."""
    token = _PAIRED.set(paired)
    try:
        yield
    finally:
        _PAIRED.reset(token)


def least() -> float:
    """Below what a number is lost on the way of a sum in float32: its subnormals, unless bfloat16s are paired."""
    return 2.0**-126 if _PAIRED.get() else unit("float32").tiny


def flushed(a: Array, b: Array, terms: int, dtype: str, multiply: Callable[..., Array] = np.matmul) -> Array:
    """What sums of ``terms`` products of ``a`` and ``b``, of a dtype, may lose besides to zeros in place of subnormals.

    A factor below the normal range loses all its products, and each of the sums on the way, two in a pair, may lose as
    much as the least normal number. Infinite where a product with an infinity is lost, which is then NaN.
    """
    if not (_PAIRED.get() and dtype == "bfloat16"):
        return np.zeros(())
    below = [np.where(np.abs(x) < least(), np.abs(x), 0) for x in (a, b)]
    lost = multiply(below[0], magnitude(b)) + multiply(magnitude(a), below[1]) + 2 * terms * least()
    endless = [~np.isfinite(x) * 1.0 for x in (a, b)]
    unclear = multiply((below[0] > 0) * 1.0, endless[1]) + multiply(endless[0], (below[1] > 0) * 1.0)
    return np.where(unclear > 0, np.inf, lost)


def narrowed(x: Array, dtype: str) -> Array:
    """An intermediate as kernels keep it: rounded to a half format, untouched in float32 and float64."""
    return wide(round_to(x, dtype)) if dtype in HALF else x
