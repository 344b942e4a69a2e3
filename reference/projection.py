"""The grouped low-rank output projection of DeepSeek-V4's attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Scalar, Tensor, operator

from ._rounding import Array, contraction_bound, magnitude, narrowed, unit, wide

V4_FLASH = {"g": 8, "p": 8, "c": 512, "r": 1024, "d": 4096, "dtype": "bfloat16"}
V4_PRO = {"g": 16, "p": 8, "c": 512, "r": 1024, "d": 7168, "dtype": "bfloat16"}


def _groups(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"must be a positive whole number, got {value!r}")
    return int(value)


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    rank = dims["g"] * dims["r"]
    return 2.0 * math.prod(batch) * rank * (dims["p"] * dims["c"] + dims["d"])


@operator(
    tensors={
        "o": Tensor("... g*p c", FLOATS),
        "wo_a": Tensor("g*r p*c", "o"),
        "wo_b": Tensor("d g*r", "o"),
    },
    scalars={"groups": Scalar(_groups, (), axis="g", torch="int")},
    result=Tensor("... d", "o"),
    workloads={f"v4-flash.{rows}": {"batch": (rows,), **V4_FLASH} for rows in (1, 16, 128, 1024)}
    | {f"v4-pro.{rows}": {"batch": (rows,), **V4_PRO} for rows in (1, 64)},
    flops=_flops,
    integral=True,
    sizes={"g": (1, 2, 3, 4)},
)
def grouped_output_projection(o: Array, wo_a: Array, wo_b: Array, groups: int) -> Array:
    """Attention heads to hidden states, through one low-rank factor for each group of heads.

    ``z_g = A_g @ o_g`` for each group and ``y = wo_b @ concat(z)``, where ``o_g`` are the heads of group g laid end to
    end and ``A_g`` is rows ``g*r`` to ``(g+1)*r`` of ``wo_a``.

    Args:
        o: ``[..., H, c]``, heads of the attention output; float16, bfloat16, float32 or float64, any strides.
        wo_a: ``[groups * r, (H / groups) * c]``, dtype of ``o``.
        wo_b: ``[D, groups * r]``, dtype of ``o``.
        groups: number of groups; divides ``H``.
        out: ``[..., D]`` to write into, dtype of ``o``; allocated if None.

    Returns:
        ``[..., D]``. Both products are accumulated in float32 (float64 for float64); z is rounded to the dtype of ``o``
        in between (float16 and bfloat16), y once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``groups`` does not divide the heads, or ranks, sizes or devices do not fit.

    Source: DeepSeek-V4 report (arXiv 2606.19348), grouped output projection; roundings as in its inference code.
    """
    return _project(o, wo_a, wo_b, groups, lambda z: z)


def grouped_output_projection_rounded(o: Array, wo_a: Array, wo_b: Array, groups: int) -> Array:
    return _project(o, wo_a, wo_b, groups, lambda z: narrowed(z, o.dtype.name))


def _project(o: Array, wo_a: Array, wo_b: Array, groups: int, rounding: Any) -> Array:
    with np.errstate(invalid="ignore"):
        return np.matmul(rounding(_inner(wide(o), wide(wo_a), groups)), wide(wo_b).T)


def _inner(o: Array, wo_a: Array, groups: int) -> Array:
    per_group = o.reshape(*o.shape[:-2], groups, wo_a.shape[1])
    factors = wo_a.reshape(groups, wo_a.shape[0] // groups, wo_a.shape[1])
    z = np.matmul(per_group[..., None, :], np.swapaxes(factors, 1, 2))  # einsum leaves an empty sum undefined
    return z.reshape(*o.shape[:-2], wo_a.shape[0])


def grouped_output_projection_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    o, wo_a, wo_b = (wide(arguments[name]) for name in ("o", "wo_a", "wo_b"))
    groups = arguments["groups"]
    z = _inner(o, wo_a, groups)
    z_error = contraction_bound(z, _inner(magnitude(o), magnitude(wo_a), groups), wo_a.shape[1], dtype)
    z_error = np.where(magnitude(z) + z_error < unit(dtype).largest, z_error, np.inf)
    absolute = np.matmul(magnitude(z) + z_error, magnitude(wo_b).T)
    second = contraction_bound(exact, absolute, wo_b.shape[1], dtype)
    bound = second + np.matmul(z_error, magnitude(wo_b).T) * (1 + 2 * unit(dtype).u)
    unclear = np.matmul((magnitude(z) <= z_error) * 1.0, ~np.isfinite(wo_b.T) * 1.0) > 0  # perhaps 0 times infinity
    return np.where(np.isnan(bound) | unclear, np.inf, bound)
