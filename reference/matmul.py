"""Matrix products: of floats, a linear layer, and of integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, INTEGERS
from flagops.operator import Dims, Tensor, operator

from ._rounding import Array, contraction_bound, flushed, magnitude, wide

# N x K of the weights of DeepSeek-V4, section 3 of the operator notes.
V4_FLASH = {
    "wq_a": (1024, 4096),
    "wkv": (512, 4096),
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "indexer.wq_b": (8192, 1024),
    "indexer.weights_proj": (64, 4096),
    "compressor.indexer": (256, 4096),
    "expert.w1": (2048, 4096),
    "expert.w2": (4096, 2048),
    "gate": (256, 4096),
    "hc_fn": (24, 16384),
    "head": (129280, 4096),
}
V4_PRO = {"wq_a": (1536, 7168), "wq_b": (65536, 1536), "wo_b": (7168, 16384), "expert.w1": (3072, 7168)}


def _workloads(layout: str) -> dict[str, dict[str, Any]]:
    loads = {
        f"v4-flash.{name}.{rows}": {"m": rows, "n": n, "k": k, "dtype": "bfloat16", "transposed": layout}
        for name, (n, k) in V4_FLASH.items()
        for rows in ((1, 16) if name == "head" else (1, 16, 128, 1024))
    }
    loads |= {
        f"v4-pro.{name}.{rows}": {"m": rows, "n": n, "k": k, "dtype": "bfloat16", "transposed": layout}
        for name, (n, k) in V4_PRO.items()
        for rows in (1, 64)
    }
    return loads


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    return 2.0 * math.prod(batch) * dims.get("m", 1) * dims["n"] * dims["k"]


@operator(
    tensors={"a": Tensor("... m k", FLOATS), "b": Tensor("... k n", "a")},
    result=Tensor("... m n", "a"),
    workloads=_workloads("b")
    | {f"square-2048.{dtype}": {"m": 2048, "n": 2048, "k": 2048, "dtype": dtype} for dtype in ("bfloat16", "float32")},
    flops=_flops,
    integral=True,
    cases=({"m": 130, "n": 17, "k": 2080}, {"m": 1, "n": 9, "k": 4133}),
)
def matmul(a: Array, b: Array) -> Array:
    """Matrix product over the last two axes.

    Args:
        a: ``[..., m, k]``, float16, bfloat16, float32 or float64, any strides.
        b: ``[..., k, n]``, dtype of ``a``; the leading axes of both broadcast.
        out: ``[..., m, n]`` to write into, dtype of ``a``, sharing memory with neither; allocated if None.

    Returns:
        ``[..., m, n]``, accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit.

    Source: ``numpy.matmul`` for two or more dimensions; ``k = 0`` gives zeros.
    """
    with np.errstate(invalid="ignore"):
        return np.matmul(wide(a), wide(b))


def matmul_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    a, b = (wide(arguments[name]) for name in "ab")
    bound = contraction_bound(exact, np.matmul(magnitude(a), magnitude(b)), a.shape[-1], dtype)
    return bound + flushed(a, b, a.shape[-1], dtype)


@operator(
    tensors={
        "x": Tensor("... k", FLOATS),
        "weight": Tensor("n k", "x"),
        "bias": Tensor("n", "x", optional=True),
    },
    result=Tensor("... n", "x"),
    workloads={
        name: {"batch": (load["m"],), "n": load["n"], "k": load["k"], "dtype": "bfloat16"}
        for name, load in _workloads("b").items()
        if name.startswith("v4-flash.wq_b") or name.startswith("v4-pro")
    }
    | {
        f"4096x4096.{rows}": {"batch": (rows,), "n": 4096, "k": 4096, "dtype": "bfloat16"}
        for rows in (1, 16, 128, 1024)
    },
    flops=_flops,
    integral=True,
    cases=({"n": 17, "k": 2080},),
)
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x @ weight.T + bias``.

    Args:
        x: ``[..., k]``, float16, bfloat16, float32 or float64, any strides.
        weight: ``[n, k]``, dtype of ``x``.
        bias: ``[n]``, dtype of ``x``, or None.
        out: ``[..., n]`` to write into, dtype of ``x``; allocated if None.

    Returns:
        ``[..., n]``; the product is accumulated in float32 (float64 for float64), the bias added there, and the sum
        rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit.

    Source: ``torch.nn.functional.linear``.
    """
    with np.errstate(invalid="ignore"):
        product = np.matmul(wide(x), wide(weight).T)
    return product if bias is None else product + wide(bias)


def linear_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x, weight = (wide(arguments[name]) for name in ("x", "weight"))
    bias = arguments["bias"]
    absolute = np.matmul(magnitude(x), magnitude(weight).T) + (0 if bias is None else magnitude(wide(bias)))
    bound = contraction_bound(exact, absolute, x.shape[-1] + 1, dtype)
    return bound + flushed(x, weight.T, x.shape[-1], dtype)


@operator(
    name="aten.integer_matmul",
    tensors={"a": Tensor("... m k", INTEGERS), "b": Tensor("... k n", "a")},
    result=Tensor("... m n", "a"),
    workloads={f"square-512.{dtype}": {"m": 512, "n": 512, "k": 512, "dtype": dtype} for dtype in ("int64", "int32")},
    flops=_flops,
    exact=True,
    cases=({"m": 130, "n": 17, "k": 2080}, {"m": 1, "n": 9, "k": 4133}),
)
def integer_matmul(a: Array, b: Array) -> Array:
    """Matrix product of integers over the last two axes.

    Args:
        a: ``[..., m, k]``, int64, int32, int16, int8 or uint8, any strides.
        b: ``[..., k, n]``, dtype of ``a``; the leading axes of both broadcast.
        out: ``[..., m, n]`` to write into, dtype of ``a``, sharing memory with neither; allocated if None.

    Returns:
        ``[..., m, n]``: of each sum the low bits that its dtype holds, so that it wraps around and has no order.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit.

    Source: torch's ``aten::mm``, ``aten::bmm``, ``aten::mv`` and ``aten::dot`` of integers on a CPU.
    """
    return np.matmul(a, b)
