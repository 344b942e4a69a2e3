"""Elements that are picked, and places that are written, by index: along the last axis, which callers move there.

Indices count from 0 on; one that is out of range is an `IndexError` that is a `RuntimeError` too, since torch raises
the one of some operators and the other of others. Nothing outside of an array is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import DTYPES, FLOATS
from flagops.operator import Scalar, Tensor, operator
from flagops.scalars import flag, whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

INDICES = ("int64", "int32")
SIZES = (1, 2, 3, 7, 16, 17, 33, 64, 65, 130, 520, 1030)
"""Of an axis that is indexed; an empty one has no index."""


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: dict[str, int]) -> Array:
    """Half of the draws use few of the places, so that many meet."""
    few = rng.random() < 0.5
    return rng.integers(0, min(dims["n"], 3) if few else dims["n"], shape).astype(dtype)


INDEX = Tensor("... m", INDICES, draw=_drawn)


def _some_from_end(arguments: dict[str, Any], dims: dict[str, int], rng: np.random.Generator) -> None:
    if arguments["from_end"]:
        arguments["index"] -= dims["n"] * rng.integers(0, 2, arguments["index"].shape, arguments["index"].dtype)


def _along(x: Array, lead: tuple[int, ...]) -> Array:
    return np.broadcast_to(x, (*lead, x.shape[-1]))


@operator(
    name="aten.gather",
    tensors={"x": Tensor("... n", DTYPES), "index": INDEX},
    scalars={"from_end": flag()},
    result=Tensor("... m", "x"),
    fit=_some_from_end,
    sizes={"n": SIZES},
    workloads={
        "rows-4M.float32": {"batch": (576,), "n": 49152, "m": 8192, "dtype": ("float32", "int64")},
        "4M.float32": {"batch": (64,), "n": 65536, "m": 65536, "dtype": ("float32", "int64")},
    },
    flops=lambda dims, batch: float(math.prod(batch) * dims["m"]),
    exact=True,
)
def gather(x: Array, index: Array, from_end: bool = False) -> Array:
    """``x[..., index]``: of each row the elements that its indices name.

    Args:
        x: ``[..., n]``, any real dtype, any strides.
        index: ``[..., m]``, int64 or int32, below n.
        from_end: whether negative indices count from the end.
        out: ``[..., m]`` to write into, dtype of ``x``; allocated if None.

    Returns:
        ``[..., m]``, batch axes broadcast.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.
        IndexError: an index is out of range.

    Source: torch's ``aten::gather`` and ``aten::index_select``.
    """
    lead = np.broadcast_shapes(x.shape[:-1], index.shape[:-1])
    return np.take_along_axis(_along(x, lead), _along(index, lead).astype(np.int64), -1)


def gather_astray(x: Any, index: Any, from_end: bool = False) -> tuple[str, tuple[int, ...]]:
    return "index", _outside(x.shape[-1], from_end)


def _outside(size: int, from_end: bool) -> tuple[int, ...]:
    """The indices next to those of an axis, and some far away."""
    return size, -size - 1 if from_end else -1, 1 << 30, -(1 << 30)


REDUCTIONS = ("assign", "sum", "prod", "amax", "amin")


def _reduction(value: Any) -> str:
    if value not in REDUCTIONS:
        raise ValueError(f"must be one of {', '.join(REDUCTIONS)}, got {value!r}")
    return str(value)


@operator(
    name="aten.scatter",
    tensors={"x": Tensor("... n", DTYPES), "index": INDEX, "src": Tensor("... m", "x")},
    scalars={
        "reduce": Scalar(_reduction, REDUCTIONS, torch="str"),
        "include_self": flag((True, False)),
        "from_end": flag(),
    },
    fit=_some_from_end,
    result=Tensor("... n", "x"),
    sizes={"n": SIZES},
    workloads={
        "1M.float32": {"n": 1 << 20, "m": 1 << 20, "dtype": ("float32", "int64"), "reduce": "sum"},
        "rows-4M.float32": {"batch": (576,), "n": 49152, "m": 8192, "dtype": ("float32", "int64"), "reduce": "sum"},
    },
    flops=lambda dims, batch: float(math.prod(batch) * dims["m"]),
    inplace={"out": "x"},
)
def scatter(
    x: Array, index: Array, src: Array, reduce: str = "assign", include_self: bool = True, from_end: bool = False
) -> Array:
    """``x`` with ``src`` brought to the places that ``index`` names in each row, in the order of the indices.

    Args:
        x: ``[..., n]``, any real dtype, any strides.
        index: ``[..., m]``, int64 or int32, below n.
        src: ``[..., m]``, dtype of ``x``.
        reduce: ``assign`` (the last one stays), ``sum``, ``prod``, ``amax`` or ``amin``; of bools sums are "or".
        include_self: whether what is there counts; else a place that an index names starts anew.
        from_end: whether negative indices count from the end.
        out: ``[..., n]`` to write into, may be ``x``; allocated if None.

    Returns:
        ``[..., n]``, batch axes broadcast. Halves are summed and multiplied in float32 and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit, or ``reduce`` is none of the five.
        IndexError: an index is out of range.

    Source: torch's ``aten::scatter``, ``aten::scatter_reduce``, ``aten::index_add``, ``aten::index_copy``.
    """
    return _scattered(wide(x) if x.dtype.name in FLOATS else x, index, src, reduce, include_self)


def scatter_astray(
    x: Any, index: Any, src: Any, reduce: str = "assign", include_self: bool = True, from_end: bool = False
) -> tuple[str, tuple[int, ...]]:
    return "index", _outside(x.shape[-1], from_end)


_UFUNCS: dict[str, Any] = {"sum": np.add, "prod": np.multiply, "amax": np.maximum, "amin": np.minimum}


def _identity(reduce: str, dtype: Any) -> Any:
    if reduce in ("sum", "prod"):
        return np.array(reduce == "prod").astype(dtype)
    least = reduce == "amax"
    if dtype.kind == "b":
        return not least
    if dtype.kind != "i" and dtype.kind != "u":
        return -np.inf if least else np.inf
    return np.iinfo(dtype).min if least else np.iinfo(dtype).max


def _scattered(x: Array, index: Array, src: Array, reduce: str, include_self: bool) -> Array:
    lead = np.broadcast_shapes(x.shape[:-1], index.shape[:-1], src.shape[:-1])
    out = np.array(_along(x, lead), order="C")
    count, m = math.prod(lead), index.shape[-1]
    rows, places = out.reshape(count, x.shape[-1]), _along(index, lead).reshape(count, m)
    values = _along(src, lead).reshape(count, m).astype(x.dtype)
    for row, where, value in zip(rows, places.astype(np.int64), values, strict=True):
        if reduce == "assign":
            for i, v in zip(where, value, strict=True):
                row[i] = v
            continue
        if not include_self:
            row[where] = _identity(reduce, x.dtype)
        _UFUNCS[reduce].at(row, where, value)
    return out


def scatter_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """A rounding of the accumulator for each addition or product, and one of the result."""
    x, index, src, reduce, include = (arguments[n] for n in ("x", "index", "src", "reduce", "include_self"))
    terms = index.shape[-1] + 1
    if reduce == "sum":
        absolute = _scattered(magnitude(wide(x)), index, magnitude(wide(src)), "sum", include)
        return contraction_bound(exact, absolute, terms, dtype)
    if reduce != "prod":
        return np.zeros(exact.shape)
    sizes = [np.where(v == 0, 1, v) for v in (magnitude(wide(x)), magnitude(wide(src)))]
    above = _scattered(np.maximum(sizes[0], 1), index, np.maximum(sizes[1], 1), "prod", include)
    below = _scattered(np.minimum(sizes[0], 1), index, np.minimum(sizes[1], 1), "prod", include)
    acc, out = unit(accumulator(dtype)), unit(dtype)
    safe = (above < acc.largest / 4) & (below > acc.tiny * 2.0**40)
    return np.where(safe, (terms * acc.u + out.u) * 1.01 * magnitude(exact) + out.tiny, np.inf)


@operator(
    name="aten.offset",
    tensors={
        "x": Tensor("...", ("int64",), draw=lambda rng, shape, dtype, dims: rng.integers(0, 99 << 32, shape)),
        "index": Tensor("...", INDICES, draw=lambda rng, shape, dtype, dims: rng.integers(-3, 3, shape).astype(dtype)),
    },
    scalars={"size": whole((3, 1030), least=0), "step": whole((1, 0, 7, 520, 5 << 32), least=0)},
    result=Tensor("...", ("int64",)),
    workloads={"1M": {"batch": (1 << 20,), "dtype": "int64"}},
    flops=lambda dims, batch: 2.0 * math.prod(batch),
    exact=True,
)
def offset(x: Array, index: Array, size: int, step: int) -> Array:
    """``x + step * index``, where a negative index counts from the end: of several indices the place in memory.

    Args:
        x: ``[...]``, int64, any strides: the place so far.
        index: ``[...]``, int64 or int32, from ``-size`` on and below ``size``.
        size: of the axis that is indexed.
        step: from one of its elements to the next.
        out: ``[...]`` to write into, int64; allocated if None.

    Returns:
        ``[...]``, int64, axes broadcast.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not broadcast.
        IndexError: an index is out of range.

    Source: torch's ``aten::index.Tensor``.
    """
    index = index.astype(np.int64)
    return x + step * np.where(index < 0, index + size, index)


def offset_astray(x: Any, index: Any, size: int, step: int) -> tuple[str, tuple[int, ...]]:
    return "index", _outside(size, True)


def _drawn_targets(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: dict[str, int]) -> Array:
    return rng.integers(0, dims["n"], shape).astype(dtype)


@operator(
    name="aten.embedding_dense_backward",
    tensors={"grad": Tensor("m d", FLOATS), "index": Tensor("m", INDICES, draw=_drawn_targets)},
    scalars={
        "n": whole(SIZES),
        "padding": whole((-1, 0, 1), least=-1),
        "by_frequency": flag(),
    },
    result=Tensor("n d", "grad"),
    derived=lambda dims, scalars: {"n": scalars["n"]},
    workloads={
        f"smollm2.8192.{dtype}": {"m": 8192, "d": 576, "n": 49152, "dtype": (dtype, "int64"), "padding": -1}
        for dtype in ("float32", "bfloat16")
    },
    flops=lambda dims, batch: float(dims["m"] * dims["d"]),
    separable=False,
)
def embedding_dense_backward(grad: Array, index: Array, n: int, padding: int = -1, by_frequency: bool = False) -> Array:
    """The gradient of a table of n rows from that of the rows that ``index`` took.

    Args:
        grad: ``[m, d]``, float16, bfloat16, float32 or float64, any strides.
        index: ``[m]``, int64 or int32, below n.
        n: rows of the table.
        padding: the row that gets no gradient; -1 if there is none.
        by_frequency: divide the sum of a row by how often it was taken.
        out: ``[n, d]`` to write into, dtype of ``grad``; allocated if None.

    Returns:
        ``[n, d]``: sums in the order of the indices, in float32 (float64 for float64), rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.
        IndexError: an index is out of range.

    Source: torch's ``aten::embedding_dense_backward``.
    """
    return _summed(wide(grad), index, n, padding, by_frequency)


def embedding_dense_backward_astray(
    grad: Any, index: Any, n: int, padding: int = -1, by_frequency: bool = False
) -> tuple[str, tuple[int, ...]]:
    return "index", _outside(n, False)


def _summed(grad: Array, index: Array, n: int, padding: int, by_frequency: bool) -> Array:
    out = np.zeros((n, grad.shape[1]), grad.dtype)
    kept = index != padding
    np.add.at(out, index[kept].astype(np.int64), grad[kept])
    counts = np.bincount(index.astype(np.int64), minlength=n)
    return out / np.maximum(counts, 1)[:, None] if by_frequency else out


def embedding_dense_backward_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """A rounding for each row that is added, one of the quotient, one of the result."""
    grad, index, n = arguments["grad"], arguments["index"], arguments["n"]
    absolute = _summed(magnitude(wide(grad)), index, n, arguments["padding"], False)
    return contraction_bound(exact, absolute, index.size + 1, dtype)
