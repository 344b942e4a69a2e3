"""Integers of eight bits under scales of float32: activations quantised row by row, and products with exact sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.operator import Dims, Tensor, operator

from ._rounding import Array, magnitude
from .dequantize import DTYPE
from .qmatmul import scaled_bound, scales
from .quantize import NARROW

LARGEST = 127
LEAST = np.float32(2.0**-126)
DEEPEST = (2**31 - 1) // 2**14
"""Products of two codes that a sum of 32 bits can hold, whatever they are."""
WEIGHTS = {"qwen3-8b.qkv": (6144, 4096), "qwen3-8b.down": (4096, 12288)}


def _codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Any codes, in some draws those of most magnitude alone, or of one sign in one half of a row and of that or the
    other in the other half, in most where sums are long: those of any codes stay small."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice([-128, 127], shape).astype(np.int8)
    if kind < (0.4 if dims.get("k", 0) < 1 << 12 else 0.9):
        made = rng.integers(rng.choice([1, 64]), 128, shape, np.int8)
        made[..., shape[-1] // 2 :] *= np.int8(rng.choice([-1, 1]))
        return made
    return rng.integers(-128, 128, shape, np.int8)


@operator(
    tensors={"x": Tensor("... k", NARROW)},
    result={"codes": Tensor("... k", ("int8",)), "scale": Tensor("... 1", ("float32",))},
    workloads={
        "qwen3-8b.decode": {"batch": (1,), "k": 4096},
        "qwen3-8b.prefill-4k": {"batch": (4096,), "k": 4096},
    },
    flops=lambda dims, batch: 1.0 * math.prod(batch) * dims["k"],
    exact=True,
    sizes={"k": (64, 1, 5, 0, 40, 257, 1030)},
)
def int8_quantize(x: Array) -> tuple[Array, Array]:
    """A scale for each row, symmetric: the largest magnitude becomes 127, and nothing -128.

    Args:
        x: ``[..., k]`` bfloat16, float16 or float32, any strides.
        out: a pair of ``[..., k]`` int8 and ``[..., 1]`` float32 to write into; allocated if None.

    Returns:
        ``(codes, scale)``: ``scale = max(max |x| / 127, 2^-126)`` and ``codes = x / scale`` rounded to nearest even and
        clamped to 127, each operation in float32. A row with an infinity or a NaN has NaN as its scale and codes of 0;
        one of no elements has the least scale.

    Raises:
        TypeError: ``x`` is no array of such a dtype, or ``out`` does not fit.

    Source: the per-token activations of LLM.int8 (arXiv 2208.07339) and of compressed-tensors' W8A8.
    """
    values = x.astype(np.float32)
    top = np.abs(values).max(-1, keepdims=True, initial=0)
    scale = np.where(np.isfinite(top), np.maximum(top / np.float32(LARGEST), LEAST), np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        codes = np.clip(np.rint(values / scale), -LARGEST, LARGEST)
        return np.where(np.isnan(scale), 0, codes).astype(np.int8), scale


def _deep(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    if dims["k"] <= DEEPEST:
        return None
    return f"k is {dims['k']}, expected at most {DEEPEST}: a sum of more products may pass 32 bits; split it"


@operator(
    tensors={
        "a": Tensor("... k", ("int8",), draw=_codes),
        "a_scale": Tensor("... 1", ("float32",), draw=scales),
        "b": Tensor("n k", ("int8",), draw=_codes),
        "b_scale": Tensor("n 1", ("float32",), draw=scales),
    },
    scalars={"dtype": DTYPE},
    result=Tensor("... n", "dtype"),
    workloads={
        f"{name}.{rows}": {"batch": (rows,), "n": n, "k": k}
        for name, (n, k) in WEIGHTS.items()
        for rows in (1, 16, 128)
    },
    flops=lambda dims, batch: 2.0 * math.prod(batch) * dims["n"] * dims["k"],
    sizes={"k": (64, 1, 5, 0, 130, 257, 1030)},
    cases=({"n": 130, "k": 257}, {"n": 17, "k": 4100}),
    check=_deep,
)
def int8_matmul(a: Array, a_scale: Array, b: Array, b_scale: Array, dtype: str = "bfloat16") -> Array:
    """``(a * a_scale) @ (b * b_scale).T`` of integers, a scale for each row of a and of b.

    Args:
        a: ``[..., k]`` int8, any strides; k is at most 131,071.
        a_scale: ``[..., 1]`` float32; broadcasts with a.
        b: ``[n, k]`` int8.
        b_scale: ``[n, 1]`` float32.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the dtype itself.
        out: ``[..., n]`` of that dtype to write into; allocated if None.

    Returns:
        ``[..., n]``: the sums are exact, only the scaling, in float32, and the result are rounded. Scales that are not
        finite, or products of scales past float32's range, give an infinity or NaN.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: k is too large, or ranks, sizes, devices or dtype do not fit.

    Source: the W8A8 products of LLM.int8 (arXiv 2208.07339), as compressed-tensors' checkpoints store the weights.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _sums(a, b) * a_scale * b_scale[:, 0].astype(np.float64)


def _sums(a: Array, b: Array) -> Array:
    return np.matmul(a.astype(np.float64), b.T.astype(np.float64))


def int8_matmul_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """The sum as a float, two products and the result are rounded; no sum is."""
    with np.errstate(invalid="ignore", over="ignore"):
        factors = arguments["a_scale"], arguments["b_scale"][:, 0]
        left, right = (1 + np.where(np.isnan(x), 0, np.abs(x)).astype(np.float64) for x in factors)
        reach = (1 + np.abs(_sums(arguments["a"], arguments["b"]))) * left * right
    return scaled_bound(exact, magnitude(exact), reach, 0, dtype)
