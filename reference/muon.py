"""The orthogonalisation at the heart of the Muon optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import whole

from ._rounding import Array, accumulator, unit, wide

FIRST, LAST = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)


def coefficients(steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of each step: those that lift small singular values, and in the last two those that settle at 1."""
    return [FIRST if step < steps - 2 else LAST for step in range(steps)]


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    p, q = sorted((dims["n"], dims["m"]))
    return 10.0 * math.prod(batch) * (4.0 * p * p * q + 2.0 * p**3)


@operator(
    tensors={"a": Tensor("... n m", FLOATS)},
    scalars={"steps": whole((3, 1, 2, 0), least=0)},
    result=Tensor("... n m", "a"),
    inplace={"out": "a"},
    workloads={
        "v4-flash.wkv": {"n": 512, "m": 4096, "steps": 10, "dtype": "float32"},
        "v4-flash.wq_a": {"n": 1024, "m": 4096, "steps": 10, "dtype": "bfloat16"},
        "experts-8": {"batch": (8,), "n": 256, "m": 512, "steps": 10, "dtype": "float32"},
    },
    flops=_flops,
    separable=False,
    sizes={"n": (3, 1, 2, 0, 7, 17, 33), "m": (3, 1, 2, 0, 7, 17, 40)},
)
def newton_schulz(a: Array, steps: int = 10) -> Array:
    """The orthogonal factor of a matrix, ``U V^T`` of ``a = U S V^T``, by Newton-Schulz iterations.

    ``x = a / ||a||_F``, then ``x = a_t x + b_t (x x^T) x + c_t (x x^T)^2 x`` for each step t, on the smaller side. The
    last two steps have (2, -1.5, 0.5), those before (3.4445, -4.775, 2.0315): ten bring singular values from about
    1e-3 of the norm to within 1e-3 of 1.

    Args:
        a: ``[..., n, m]``, independent matrices; float16, bfloat16, float32 or float64, any strides.
        steps: how many, at least 0.
        out: ``[..., n, m]`` to write into, dtype of ``a``, perhaps ``a`` itself; allocated if None.

    Returns:
        ``[..., n, m]``, computed in float32 (float64 for float64) and rounded once. A matrix of zeros gives zeros; one
        with a NaN or an infinity gives NaN.

    Raises:
        TypeError: the argument is no array, or its dtype does not fit.
        ValueError: it has fewer than two axes, or ``steps`` is out of range.

    Source: DeepSeek-V4 report (arXiv 2606.19348), its optimiser; the first steps as in Muon (Jordan et al., 2024).
    """
    with np.errstate(all="ignore"):
        x = wide(a)
        if x.shape[-2] > x.shape[-1]:
            return np.swapaxes(_iterate(np.swapaxes(x, -1, -2), steps), -1, -2)
        return _iterate(x, steps)


def _iterate(x: Array, steps: int) -> Array:
    top = np.abs(x).max((-2, -1), keepdims=True, initial=0)
    x = x / np.where(top == 0, 1, top)
    norm = np.sqrt((x * x).sum((-2, -1), keepdims=True))
    x = x / np.where(norm == 0, 1, norm)
    x = np.where(np.isfinite(top), x, np.nan)
    for a, b, c in coefficients(steps):
        gram = np.matmul(x, np.swapaxes(x, -1, -2))
        x = a * x + np.matmul(b * gram + c * np.matmul(gram, gram), x)
    return x


def newton_schulz_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """Every step's roundings, in the Frobenius norm, through the exact sensitivity of the steps after it.

    In the basis of singular vectors an error's symmetric part is multiplied by (g(s) - g(t)) / (s - t) for each pair of
    singular values, its skew part by (g(s) + g(t)) / (s + t), and what lies beyond the square by g(s) / s, where g is
    the polynomial of all later steps. That is the first order; what is left of a step's second is added to its
    roundings. The error of the norm only scales x and goes along the singular values.
    """
    x = wide(arguments["a"])
    if x.size == 0:
        return np.zeros(exact.shape)
    finite = np.isfinite(x).all((-2, -1), keepdims=True)
    top = np.abs(x).max((-2, -1), keepdims=True)
    x = np.where(finite & (top > 0), x / np.where(top == 0, 1, top), 0).astype(np.float64)
    first = np.linalg.svd(x, compute_uv=False)
    norm = np.sqrt((first**2).sum(-1, keepdims=True))
    chosen, acc, out = coefficients(arguments["steps"]), unit(accumulator(dtype)), unit(dtype)
    p, q = sorted(x.shape[-2:])
    with np.errstate(all="ignore"):
        values = [first / np.where(norm == 0, 1, norm)]
        added = [4 * acc.u * _norm(values[0]) + 4 * math.sqrt(p * q) * acc.tiny]
        for step in range(len(chosen) + 1):
            along = _norm(values[0] * _after(values[0], chosen[:step])[1]) * (p * q / 2 + 8) * acc.u
            error = along + sum(_gain(values[i], chosen[i:step]) * new for i, new in enumerate(added))
            if step < len(chosen):
                coefficient = chosen[step]
                added.append(1.01 * _roundings(values[step], q, coefficient, acc.u, error))
                values.append(_after(values[step], [coefficient])[0])
        error = np.where(np.isnan(error), np.inf, error)[..., None, None]
        bound = error + out.u * (np.abs(exact) + error) + out.tiny
        return np.where(np.isnan(exact) | (norm == 0)[..., None], 0, bound)


def _norm(x: Array) -> Array:
    return np.asarray(np.sqrt((x * x).sum(-1)))


def _after(s: Array, steps: list[tuple[float, float, float]]) -> tuple[Array, Array]:
    """The polynomial of some steps and its derivative."""
    slope = np.ones_like(s)
    for a, b, c in steps:
        slope = slope * (a + 3 * b * s**2 + 5 * c * s**4)
        s = a * s + b * s**3 + c * s**5
    return s, slope


def _gain(s: Array, steps: list[tuple[float, float, float]]) -> Array:
    """By how much some steps multiply the Frobenius norm of a small error, at the most."""
    after, slope = _after(s, steps)
    at_zero = math.prod(a for a, _, _ in steps)
    s, t, g, h = s[..., :, None], s[..., None, :], after[..., :, None], after[..., None, :]
    steepest = np.maximum(np.abs(slope)[..., :, None], np.abs(slope)[..., None, :])
    near = np.abs(s - t) < 1e-6
    symmetric = np.where(near, 1.01 * steepest, np.abs(g - h) / np.where(near, 1, np.abs(s - t)))
    small = s + t < 1e-9
    skew = np.where(small, 1.01 * at_zero, np.abs(g + h) / np.where(small, 1, s + t))
    return np.asarray(np.maximum(symmetric, skew).max((-2, -1)))


def _roundings(s: Array, q: int, coefficient: tuple[float, float, float], u: float, error: Array) -> Array:
    """What one step adds to the error of x: its roundings, and the terms in x's error beyond the first order."""
    p, (a, b, c) = s.shape[-1], (abs(value) for value in coefficient)
    x, gram, top = _norm(s), _norm(s**2), s.max(-1)
    off_gram = (q + 2) * u * x**2
    off_square = (p + 2) * u * gram**2 + 2 * top**2 * off_gram
    sums = b * gram + c * gram**2
    off_sums = b * off_gram + c * off_square + 3 * u * sums
    rest = b * (3 * top * error**2 + error**3)
    rest = rest + c * (10 * top**3 * error**2 + 10 * top**2 * error**3 + 5 * top * error**4 + error**5)
    return np.asarray((p + 2) * u * sums * x + top * off_sums + 3 * u * (a * x + sums * x) + rest)
