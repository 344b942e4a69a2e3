"""Root-mean-square normalisation: hidden states, latents and single heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF
from flagops.operator import Tensor, operator
from flagops.scalars import flag, real

from ._rounding import Array, accumulator, magnitude, round_to, unit, wide


def _weights(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return ("float32", dtypes["x"]) if dtypes["x"] in HALF else (dtypes["x"],)


@operator(
    tensors={"x": Tensor("... n", FLOATS), "weight": Tensor("n", _weights, optional=True)},
    scalars={
        "eps": real((1e-6, 1e-20, 0.5, -0.5)),
        "stepwise": flag(),
    },
    result=Tensor("... n", "x"),
    workloads={
        "v4-flash.hidden-1": {"batch": (1,), "n": 4096, "dtype": "bfloat16"},
        "v4-flash.hidden-4k": {"batch": (4096,), "n": 4096, "dtype": "bfloat16"},
        "v4-flash.heads-1k": {"batch": (1024, 64), "n": 512, "dtype": "bfloat16"},
        "v4-pro.hidden-1": {"batch": (1,), "n": 7168, "dtype": "bfloat16"},
        "v4-pro.hidden-4k": {"batch": (4096,), "n": 7168, "dtype": "bfloat16"},
    },
    flops=lambda dims, batch: 4.0 * math.prod(batch) * dims["n"],
    inplace={"out": "x"},
)
def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-6, stepwise: bool = False) -> Array:
    """Divide each row by its root mean square: ``y = weight * (x * rsqrt(mean(x^2) + eps))`` over the last axis.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, any strides.
        weight: ``[n]``, float32 or the dtype of ``x`` (float64 for float64); None for none.
        eps: added to the mean; a row whose sum with it is below 0 becomes NaN.
        stepwise: round to the dtype of ``x`` after every step (square, mean, sum with eps, reciprocal root, product,
            product with the weight), as DeepSeek-V4's inference code does for single heads; the mean is that of a
            float64 sum and goes through float32, the other steps are float32. The same bits on every backend. Only in
            float16 and bfloat16 is there anything to round: float32 and float64 give what ``stepwise=False`` does.
        out: ``[..., n]`` to write into, dtype of ``x``; may be ``x`` itself; allocated if None.

    Returns:
        ``[..., n]``. Everything is float32 (float64 for float64) and rounded once, unless stepwise. A row of zeros
        stays zero (for ``eps > 0``).

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``eps`` is not finite, or ranks, sizes or devices do not fit.

    Source: DeepSeek-V4's inference code and transformers, which agree but for the steps.
    """
    w = 1.0 if weight is None else wide(weight)
    with np.errstate(all="ignore"):
        if stepwise and x.dtype.name in HALF:
            return _in_steps(x, w, eps)
        y = wide(x)
        return w * (y / np.sqrt(_mean(y) + eps))


def _mean(x: Array) -> Array:
    return np.square(x).sum(-1, keepdims=True) / max(x.shape[-1], 1)


def _in_steps(x: Array, w: Any, eps: float) -> Array:
    def rounded(value: Array) -> Array:
        return round_to(value.astype(np.float32), x.dtype.name).astype(np.float32)

    q = x.astype(np.float32)
    squares = rounded(q * q).astype(np.float64)
    mean = rounded(squares.sum(-1, keepdims=True) / max(x.shape[-1], 1))
    factor = rounded(1 / np.sqrt(rounded(mean + np.float32(eps)).astype(np.float64)))
    y = rounded(q * factor)
    return wide(y if np.ndim(w) == 0 else rounded(y * w.astype(np.float32)))


def rms_norm_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """The relative error of the mean, halved by the root, and a few roundings; infinite where squares overflow, and
    where the root of what is left may be that of a number on the other side of 0."""
    if arguments["stepwise"] and dtype in HALF:
        return np.zeros(exact.shape)
    x, eps = wide(arguments["x"]), arguments["eps"]
    w = np.ones(()) if arguments["weight"] is None else wide(arguments["weight"])
    acc, out, n = unit(accumulator(dtype)), unit(dtype), x.shape[-1]
    with np.errstate(all="ignore"):
        mean = _mean(magnitude(x))
        total = mean + eps
        delta = ((n + 3) * acc.u * (mean + abs(eps)) + (n + 2) * acc.tiny) / np.abs(total)
        spread = np.where(delta < 0.5, 1 / np.sqrt(1 - np.minimum(delta, 0.5)) - 1, np.inf)
        y = magnitude(x / np.sqrt(_mean(x) + eps))
        error = (spread + 8 * acc.u) * magnitude(exact) + acc.tiny * (1 + magnitude(w))
        bound = error + out.u * (magnitude(exact) + error) + out.tiny
        bound = np.where((n * mean + eps < acc.largest / 2) | (total == 0), bound, np.inf)
        unclear = (y <= 4 * acc.tiny) & (y + magnitude(x) > 0) & ~np.isfinite(w)  # perhaps 0 times infinity
        below = (total < 0) & (delta < 0.5)
    return np.where(below, 0, np.where(np.isnan(bound) | unclear, np.inf, bound))
