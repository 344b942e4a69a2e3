"""One number of each row, the last axis: sums, products, the greatest and where it is, norms, spreads, running sums.

All definitions are torch's. Rows are brought to the arithmetic of `dtype` before, as `_cards` says, and what they give
is rounded to it, of integers the low bits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import DTYPES, FLOATS, numpy_dtype
from flagops.operator import Operator, Scalar, Tensor, operator
from flagops.scalars import dtype as dtype_scalar
from flagops.scalars import flag, number

from ._cards import KINDS, brought
from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

_SHAPES = {
    "4M": {"batch": (), "n": 1 << 22},
    "4k-rows": {"batch": (4096,), "n": 1024},
    "1k-columns": {"batch": (1024,), "n": 4096, "transposed": "x"},
}
_LOADS = {
    f"{name}.{dtype}": {**load, "dtype": dtype} for name, load in _SHAPES.items() for dtype in ("float32", "bfloat16")
}
_INTEGER_LOADS = {"4M.int64": {"batch": (), "n": 1 << 22, "dtype": "int64"}}
_SOME = {"n": (1, 2, 3, 7, 16, 17, 33, 64, 65, 130, 520, 1030)}
_LONG = ({"n": 4097}, {"n": 9000})


def reduction(
    computed: str,
    *,
    gives: str = "dtype",
    scalars: dict[str, Scalar] | None = None,
    empty: bool = True,
    rows: bool = False,
    name: str = "",
) -> Callable[[Callable[..., Any]], Operator]:
    """Make the card ``aten.<name>`` of an operator that gives one number of each row ``[..., n]``.

    The reference takes the rows, `dtype` and its scalars; rows come in the arithmetic of `dtype`, floats wide.

    computed: the dtypes that `dtype` may be, a key of `KINDS`; none for a result of one dtype, which rows are not
        brought to. gives: that dtype. empty: whether n may be 0. rows: whether it gives as many numbers as it takes.
    """

    def declare(function: Callable[..., Any]) -> Operator:
        called = name or function.__name__
        takes = "dtype" in inspect.signature(function).parameters

        def reference(x: Array, *args: Any) -> Array:
            values = brought(x, args[0]) if takes else x
            with np.errstate(all="ignore"):
                made = np.asarray(function(wide(values) if values.dtype.name in FLOATS else values, *args))
            return made.astype(numpy_dtype(args[0])) if takes and args[0] not in FLOATS else made

        reference.__name__, reference.__module__ = function.__name__, function.__module__
        reference.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        reference.__doc__ = _documented(function, called, KINDS[computed] if takes else (), gives, empty, rows)
        return operator(
            name=f"aten.{called}",
            tensors={"x": Tensor("... n", DTYPES)},
            scalars={**({"dtype": dtype_scalar(KINDS[computed])} if takes else {}), **(scalars or {})},
            result=Tensor("... n" if rows else "...", "dtype" if takes else (gives,)),
            workloads=_LOADS if computed != "integers" else _INTEGER_LOADS,
            flops=lambda dims, batch: float(math.prod(batch) * dims["n"]),
            sizes={} if empty else _SOME,
            cases=_LONG,
            check=None if empty else lambda dims, arguments: None if dims["n"] else "a row of no elements has none",
        )(reference)

    return declare


def _documented(
    function: Callable[..., Any], name: str, computed: tuple[str, ...], gives: str, empty: bool, rows: bool
) -> str:
    args = [f"    x: ``[..., n]``, any real dtype, any strides{'' if empty else '; n at least 1'}."]
    args += [f"    dtype: what rows are brought to and the result is: {', '.join(computed)}."] if computed else []
    shape = "``[..., n]``" if rows else "``[...]``"
    made = "of `dtype`, rounded once; computed in float32 for halves, in int64 for integers" if computed else gives
    return "\n".join(
        [
            inspect.cleandoc(function.__doc__ or ""),
            "",
            "Args:",
            *args,
            "    out: to write into; allocated if None.",
            "",
            "Returns:",
            f"    {shape}, {made}.",
            "",
            "Raises:",
            "    TypeError: an argument is no array, or a dtype does not fit.",
            "    ValueError: shapes do not fit.",
            "",
            f"Source: torch's ``aten::{name}``.",
        ]
    )


def _rows(arguments: Mapping[str, Any]) -> Array:
    return wide(brought(arguments["x"], arguments["dtype"]))


def _off(exact: Array, error: Array, dtype: str, most: Array) -> Array:
    """An error of the arithmetic and a rounding of the result; infinite where `most` may overflow on the way."""
    acc, out = unit(accumulator(dtype)), unit(dtype)
    rounding = 0.0 if out == acc else out.u * (magnitude(exact) + error) + out.tiny
    return np.where(most < acc.largest / 4, error + rounding + acc.tiny, np.inf)


@reduction("numbers")
def sum(x: Array, dtype: str) -> Array:
    """The sum of each row."""
    return x.sum(-1)


def sum_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x = _rows(arguments)
    return contraction_bound(exact, magnitude(x).sum(-1), x.shape[-1] + 1, dtype)


@reduction("floats")
def nansum(x: Array, dtype: str) -> Array:
    """The sum of what is not NaN in each row."""
    return np.nansum(x, -1)


nansum_bound = sum_bound


@reduction("floats")
def mean(x: Array, dtype: str) -> Array:
    """The mean of each row, NaN of none."""
    return np.sum(x, -1) / x.shape[-1] if x.shape[-1] else np.full(x.shape[:-1], np.nan)


def _mean_error(x: Array, dtype: str) -> Array:
    acc, n = unit(accumulator(dtype)), max(x.shape[-1], 1)
    total = magnitude(x).sum(-1)
    return (n + 1) * acc.u * total / n + 2 * acc.tiny


def mean_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x = _rows(arguments)
    return _off(exact, _mean_error(x, dtype), dtype, magnitude(x).sum(-1))


@reduction("numbers")
def prod(x: Array, dtype: str) -> Array:
    """The product of each row."""
    return x.prod(-1)


def prod_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """Infinite where a part of a row may overflow, or be subnormal."""
    x = _rows(arguments)
    acc, size = unit(accumulator(dtype)), magnitude(x)
    powers = np.log2(np.where(size > 0, size, 1))
    reach = math.log2(acc.largest) - 2
    safe = (np.maximum(powers, 0).sum(-1) < reach) & (np.minimum(powers, 0).sum(-1) > -reach)
    error = 2 * (x.shape[-1] + 1) * acc.u * magnitude(exact)
    return np.where(safe, _off(exact, error, dtype, magnitude(exact)), np.inf)


@reduction("all", empty=False)
def amax(x: Array, dtype: str) -> Array:
    """The greatest of each row, NaN if there is one."""
    return x.max(-1)


def amax_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    out = unit(dtype)
    return out.u * magnitude(exact) + out.tiny if out != unit(accumulator(dtype)) else np.zeros(exact.shape)


@reduction("all", empty=False)
def amin(x: Array, dtype: str) -> Array:
    """The least of each row, NaN if there is one."""
    return x.min(-1)


amin_bound = amax_bound


@reduction("numbers", empty=False, gives="int64")
def argmax(x: Array) -> Array:
    """Where the greatest of each row stands, or the first NaN; of several the first."""
    return x.argmax(-1).astype(np.int64)


@reduction("numbers", empty=False, gives="int64")
def argmin(x: Array) -> Array:
    """Where the least of each row stands, or the first NaN; of several the first."""
    return x.argmin(-1).astype(np.int64)


@reduction("all", gives="bool", name="any")
def any_(x: Array) -> Array:
    """Whether a row has an element that is not 0; NaN is not."""
    return (x != 0).any(-1)


@reduction("all", gives="bool", name="all")
def all_(x: Array) -> Array:
    """Whether no element of a row is 0."""
    return (x != 0).all(-1)


@reduction("all", gives="int64")
def count_nonzero(x: Array) -> Array:
    """How many elements of a row are not 0; NaN is not."""
    return (x != 0).sum(-1, dtype=np.int64)


@reduction("floats", scalars={"ord": number((2, 1, 0, math.inf, -math.inf, 3, 0.5))}, name="linalg_vector_norm")
def vector_norm(x: Array, dtype: str, ord: Any = 2) -> Array:
    """``sum(|x|^ord)^(1/ord)`` of each row; the greatest or least magnitude for an infinite `ord`, the number of
    elements that are not 0 for 0. A row of none has 0, and an infinite norm for a negative `ord`."""
    size = np.abs(x)
    if math.isinf(ord):
        return size.max(-1, initial=0) if ord > 0 else size.min(-1, initial=np.inf)
    if ord == 0:
        return (x != 0).sum(-1).astype(x.dtype)
    return (size**ord).sum(-1) ** (x.dtype.type(1) / ord)


def vector_norm_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """Of the sum of powers, and from it through the root, at both ends."""
    x, ord = magnitude(_rows(arguments)), arguments["ord"]
    acc, n = unit(accumulator(dtype)), x.shape[-1]
    size = magnitude(exact)
    if math.isinf(ord) or ord == 0:
        return _off(exact, acc.u * size, dtype, size)
    total = (x**ord).sum(-1)
    error = (n + 8) * (acc.u * total + acc.tiny)
    ends = [np.maximum(total + way * error, 0) ** (1 / ord) for way in (-1, 1)]
    least, most = np.minimum(*ends), np.maximum(*ends)
    off = np.maximum(most - size, size - least) + (8 + np.abs(np.log(np.where(size > 0, size, 1)))) * acc.u * size
    bound = _off(exact, off, dtype, total)
    return np.where(np.isnan(bound), np.inf, bound)


@reduction("floats", scalars={"correction": number((1, 0, 2)), "root": flag()})
def var(x: Array, dtype: str, correction: Any = 1, root: bool = False) -> Array:
    """The sum of squared distances from the mean over ``max(n - correction, 0)``, or its root."""
    n = x.shape[-1]
    if not n:
        return np.full(x.shape[:-1], np.nan)
    spread = np.square(x - x.mean(-1, keepdims=True)).sum(-1) / np.asarray(max(n - correction, 0), x.dtype)
    return np.sqrt(spread) if root else spread


def var_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """The mean's error moves each distance."""
    x = _rows(arguments)
    acc, n = unit(accumulator(dtype)), x.shape[-1]
    free = max(n - arguments["correction"], 0) or 1
    off = _mean_error(x, dtype)[..., None]
    distance = magnitude(x - x.sum(-1, keepdims=True) / max(n, 1))
    off = off + acc.u * (distance + off)
    squares = np.square(distance).sum(-1)
    error = (off * (2 * distance + off)).sum(-1) + (n + 3) * (acc.u * squares + acc.tiny)
    spread, error = squares / free, error / free + acc.tiny
    if arguments["root"]:
        root = np.sqrt(spread)
        error = np.maximum(np.sqrt(spread + error) - root, root - np.sqrt(np.maximum(spread - error, 0)))
        error = error + 2 * acc.u * root
    most = np.maximum(np.square(magnitude(x)).sum(-1), magnitude(x).sum(-1))
    return _off(exact, error, dtype, most)


@reduction("floats")
def logsumexp(x: Array, dtype: str) -> Array:
    """``log(sum(exp(x)))`` of each row, whatever its size; -inf of none."""
    top = x.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isinf(top), 0, top)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def logsumexp_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """Differences are rounded, exponentials are off by 2 units, and the logarithm is added to the greatest."""
    x = _rows(arguments)
    acc, n = unit(accumulator(dtype)), x.shape[-1]
    top = x.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    below = magnitude(x - top)
    terms = np.where(np.isfinite(x), np.exp(x - top), 0)
    total = np.maximum(terms.sum(-1), 1)
    relative = ((terms * (4 + 2 * below)).sum(-1) * acc.u + n * (acc.u * total + acc.tiny)) / total
    error = relative + 4 * acc.u * (np.log(total) + magnitude(top[..., 0]) + 1)
    return _off(exact, error, dtype, magnitude(exact))


@reduction("numbers", rows=True)
def cumsum(x: Array, dtype: str) -> Array:
    """The sum of each element and those before it in its row."""
    return x.cumsum(-1)


def cumsum_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x = _rows(arguments)
    return contraction_bound(exact, magnitude(x).cumsum(-1), x.shape[-1] + 1, dtype)


def _pair(name: str, pick: Callable[..., Array]) -> Operator:
    def reference(x: Array) -> tuple[Array, Array]:
        places = pick(wide(x) if x.dtype.name in FLOATS else x, -1).astype(np.int64)
        return np.take_along_axis(x, places[..., None], -1)[..., 0], places

    word = "greatest" if name == "max_dim" else "least"
    reference.__name__ = name
    reference.__doc__ = "\n".join(
        [
            f"The {word} of each row, NaN if there is one, and where the first such stands.",
            "",
            "Args:",
            "    x: ``[..., n]``, any real dtype, any strides; n at least 1.",
            "    out: ``(values, indices)`` to write into; allocated if None.",
            "",
            "Returns:",
            "    ``(values, indices)``, each ``[...]``: the elements as they are, and int64.",
            "",
            "Raises:",
            "    TypeError: an argument is no array, or a dtype does not fit.",
            "    ValueError: rows are empty, or shapes do not fit.",
            "",
            f"Source: torch's ``aten::{name.replace('_', '.')}``.",
        ]
    )
    return operator(
        name=f"aten.{name}",
        tensors={"x": Tensor("... n", DTYPES)},
        result={"values": Tensor("...", "x"), "indices": Tensor("...", ("int64",))},
        workloads=_LOADS,
        flops=lambda dims, batch: float(math.prod(batch) * dims["n"]),
        sizes=_SOME,
        cases=_LONG,
        exact=True,
        check=lambda dims, arguments: None if dims["n"] else "a row of no elements has none",
    )(reference)


max_dim = _pair("max_dim", np.argmax)
min_dim = _pair("min_dim", np.argmin)
