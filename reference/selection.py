"""Elements by their order: sorted, the first of them, and where others stand among them.

NaN comes after every number, and equal elements keep the order that they have; so every result is defined bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import DTYPES, FLOATS, NUMBERS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import flag, real, whole

from ._rounding import Array

ORDERED = {"values": Tensor("... n", "x"), "indices": Tensor("... n", ("int64",))}


def _ranks(x: Array) -> Array:
    """Numbers in the order of the elements: equal ones have the same, NaN the highest."""
    x = x.astype(np.float64) if x.dtype.name in FLOATS else x
    return np.unique(x, return_inverse=True)[1].reshape(x.shape)


@operator(
    name="aten.sort",
    tensors={"x": Tensor("... n", DTYPES)},
    scalars={"descending": flag()},
    result=ORDERED,
    workloads={
        "1M.float32": {"n": 1 << 20, "dtype": "float32"},
        "4k.float32": {"batch": (256,), "n": 4096, "dtype": "float32"},
    },
    flops=lambda dims, batch: math.prod(batch) * dims["n"] * math.log2(max(dims["n"], 2)),
    exact=True,
)
def sort(x: Array, descending: bool = False) -> tuple[Array, Array]:
    """Each row in order.

    Args:
        x: ``[..., n]``, any real dtype, any strides.
        descending: the greatest first, of which NaN is one.
        out: ``[..., n]`` of the dtype of ``x`` and ``[..., n]``, int64, to write into; allocated if None.

    Returns:
        The elements, and where in its row each was; of equal ones the first comes first either way.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.

    Source: torch's ``aten::sort.stable``.
    """
    ranks = _ranks(x)
    order = np.argsort(-ranks if descending else ranks, axis=-1, kind="stable")
    return np.take_along_axis(x, order, -1), order


def _counts(dims: Dims) -> tuple[int, ...]:
    return tuple(min(k, dims["n"]) for k in (1, 2, 0, 7, 50, dims["n"]))


@operator(
    name="aten.topk",
    tensors={"x": Tensor("... n", DTYPES)},
    scalars={"k": whole(_counts, least=0), "largest": flag((True, False))},
    result={"values": Tensor("... k", "x"), "indices": Tensor("... k", ("int64",))},
    derived=lambda dims, scalars: {"k": scalars["k"]},
    check=lambda dims, given: f"k is {given['k']} of {dims['n']}" if given["k"] > dims["n"] else None,
    workloads={
        "vocabulary.float32": {"batch": (512,), "n": 49152, "k": 50, "dtype": "float32"},
        "router.float32": {"batch": (4096,), "n": 256, "k": 8, "dtype": "float32"},
    },
    flops=lambda dims, batch: float(math.prod(batch) * dims["n"]),
    exact=True,
)
def topk(x: Array, k: int, largest: bool = True) -> tuple[Array, Array]:
    """The first k of each row in order.

    Args:
        x: ``[..., n]``, any real dtype, any strides.
        k: how many, n at most.
        largest: the greatest, of which NaN is one; else the least.
        out: ``[..., k]`` of the dtype of ``x`` and ``[..., k]``, int64, to write into; allocated if None.

    Returns:
        What `sort` has first.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.
        ValueError: ``k`` is more than n.

    Source: torch's ``aten::topk``.
    """
    values, order = sort.reference(x, largest)
    return values[..., :k], order[..., :k]


def _sorted(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    return np.sort(_among(rng, shape, dtype), -1)


def _among(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Few numbers, of integers in some draws the largest too, which no float tells apart."""
    x = rng.integers(0, 31, shape).astype(dtype)
    if dtype in FLOATS or rng.random() < 0.5:
        return x
    return np.where(rng.random(shape) < 0.5, np.iinfo(dtype).max - x, x).astype(dtype)


def _small(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    x = _among(rng, shape, dtype)
    if dtype in FLOATS and rng.random() < 0.3:
        x[rng.random(shape) < 0.2] = np.nan
    return x


@operator(
    name="aten.searchsorted",
    tensors={
        "boundaries": Tensor("... n", NUMBERS, draw=_sorted),
        "x": Tensor("... m", "boundaries", draw=_small),
    },
    scalars={"right": flag()},
    result=Tensor("... m", ("int64",)),
    workloads={"1M.float32": {"n": 1024, "m": 1 << 20, "dtype": "float32"}},
    flops=lambda dims, batch: math.prod(batch) * dims["m"] * math.log2(max(dims["n"], 2)),
    exact=True,
)
def searchsorted(boundaries: Array, x: Array, right: bool = False) -> Array:
    """How many of the boundaries are less than each element, or with ``right`` no greater.

    Args:
        boundaries: ``[..., n]`` in ascending order, float16, bfloat16, float32, float64 or an integer, any strides.
        x: ``[..., m]``, dtype of ``boundaries``.
        right: count those that are equal too.
        out: ``[..., m]`` to write into, int64; allocated if None.

    Returns:
        ``[..., m]``, int64, batch axes broadcast; n for NaN.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::searchsorted`` and ``aten::bucketize``.
    """
    lead = np.broadcast_shapes(boundaries.shape[:-1], x.shape[:-1])
    rows = np.broadcast_to(boundaries, (*lead, boundaries.shape[-1]))[..., None, :]
    columns = np.broadcast_to(x, (*lead, x.shape[-1]))[..., :, None]
    before = ~(rows > columns) if right else ~(rows >= columns)
    return before.sum(-1, dtype=np.int64)


@operator(
    name="aten.isin",
    tensors={"x": Tensor("...", NUMBERS, draw=_small), "values": Tensor("k", "x", draw=_small)},
    scalars={"invert": flag()},
    result=Tensor("...", ("bool",)),
    workloads={"1M.int64": {"batch": (1 << 20,), "k": 4, "dtype": "int64"}},
    flops=lambda dims, batch: float(math.prod(batch) * dims["k"]),
    exact=True,
)
def isin(x: Array, values: Array, invert: bool = False) -> Array:
    """Whether each element is one of some values, of which NaN is none.

    Args:
        x: ``[...]``, any real dtype but bool, any strides.
        values: ``[k]``, dtype of ``x``.
        invert: whether it is none of them.
        out: ``[...]`` to write into, bool; allocated if None.

    Returns:
        ``[...]``, bool.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.

    Source: torch's ``aten::isin``.
    """
    found = (x[..., None] == values).any(-1)
    return ~found if invert else found


def _width(dims: Dims, given: Mapping[str, Any]) -> str | None:
    """Parts whose width float64 does not hold, which places are computed by, would lead anywhere."""
    if not given["least"] < given["most"]:
        return "least is no less than most"
    held = 0 < given["bins"] / (given["most"] - given["least"]) < math.inf
    return None if held else f"{given['bins']} parts of {given['least']} to {given['most']} have no width in float64"


@operator(
    name="aten.histc",
    tensors={"x": Tensor("n", NUMBERS)},
    scalars={"bins": whole((1, 2, 7, 100)), "least": real((0, -2.5)), "most": real((1, 6))},
    result=Tensor("bins", "x"),
    derived=lambda dims, scalars: {"bins": scalars["bins"]},
    check=_width,
    workloads={"1M.float32": {"n": 1 << 20, "bins": 100, "dtype": "float32"}},
    flops=lambda dims, batch: 2.0 * dims["n"],
    separable=False,
    exact=True,
)
def histc(x: Array, bins: int, least: float, most: float) -> Array:
    """How many elements lie in each of some equal parts of a range; its end is in the last.

    Args:
        x: ``[n]``, float16, bfloat16, float32, float64 or an integer, any strides.
        bins: how many parts.
        least: where the range begins.
        most: where it ends.
        out: ``[bins]`` to write into, dtype of ``x``; allocated if None.

    Returns:
        ``[bins]``, dtype of ``x``; places are computed in float64. What lies outside, and NaN, counts for none.

    Raises:
        TypeError: ``x`` is no array, or of another dtype.
        ValueError: the range is empty, or its parts are too narrow or too wide for float64.

    Source: torch's ``aten::histc``.
    """
    value = x.astype(np.float64)
    value = value[(value >= least) & (value <= most)]
    place = ((value - least) * (bins / (most - least))).astype(np.int64)
    return np.bincount(np.minimum(place, bins - 1), minlength=bins).astype(x.dtype)
