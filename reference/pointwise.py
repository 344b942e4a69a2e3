"""Each element of a result from one of each operand: arithmetic, comparisons, activations and their backwards.

All definitions are torch's; what operands are computed in and how results are rounded, `_cards` says of all of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.scalars import flag, number

from ._cards import pointwise
from ._rounding import Array

_FACTOR = number((1, 2, -3, 0.5))
_ROOT = math.sqrt(0.5)
_CUBE = 0.044715
_TANH = math.sqrt(2 / math.pi)

_erf_of_one = np.vectorize(math.erf, otypes=[np.float64])


def _erf(x: Array) -> Array:
    return _erf_of_one(x).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@pointwise("numbers", scalars={"alpha": _FACTOR}, roundings=2, scale=lambda x, y, alpha: np.abs(x) + np.abs(alpha * y))
def add(x: Array, y: Array, dtype: str, alpha: Any = 1) -> Array:
    """``x + alpha * y``."""
    return x + alpha * y


@pointwise("numbers")
def mul(x: Array, y: Array, dtype: str) -> Array:
    """``x * y``."""
    return x * y


@pointwise("floats")
def div(x: Array, y: Array, dtype: str) -> Array:
    """``x / y``."""
    return x / y


@pointwise("numbers", exact=True)
def floor_divide(x: Array, y: Array, dtype: str) -> Array:
    """The floor of ``x / y``, of floats as Python divides them: ``(x - remainder(x, y)) / y``, to the nearest whole
    number. An integer divided by 0 is 0."""
    return _divided(x, y, dtype)


def _divided(x: Array, y: Array, dtype: str) -> Array:
    if not _is_float(x):
        return np.where(y == 0, 0, x // np.where(y == 0, 1, y))
    x, y = _narrow(x, dtype), _narrow(y, dtype)
    rest = np.fmod(x, y)
    quotient = (x - rest) / y
    quotient = np.where((rest != 0) & ((y < 0) != (rest < 0)), quotient - 1, quotient)
    floor = np.floor(quotient)
    floor = np.where(quotient - floor > 0.5, floor + 1, floor)
    floor = np.where(quotient == 0, np.copysign(0, x / y), floor)
    return np.where(y == 0, x / y, floor)


def _is_float(x: Array) -> bool:
    return x.dtype.kind == "f"


@pointwise("numbers", roundings=1)
def trunc_divide(x: Array, y: Array, dtype: str) -> Array:
    """``x / y`` rounded towards 0; an integer divided by 0 is 0."""
    if not _is_float(x):
        safe = np.where(y == 0, 1, y)
        down = x // safe
        return np.where(y == 0, 0, down + ((down < 0) & (down * safe != x)))
    acc = np.float64 if dtype == "float64" else np.float32
    return np.trunc(x.astype(acc) / y.astype(acc))


@pointwise("numbers", exact=True)
def remainder(x: Array, y: Array, dtype: str) -> Array:
    """What is left of ``x`` divided by ``y``, with the sign of ``y``; of an integer by 0 all of it."""
    if not _is_float(x):
        return np.where(y == 0, x, x % np.where(y == 0, 1, y))
    x, y = _narrow(x, dtype), _narrow(y, dtype)
    rest = np.fmod(x, y)
    return np.where((rest != 0) & ((y < 0) != (rest < 0)), rest + y, rest)


def _narrow(x: Array, dtype: str) -> Array:
    return x.astype(np.float64 if dtype == "float64" else np.float32)


@pointwise("numbers", exact=True)
def fmod(x: Array, y: Array, dtype: str) -> Array:
    """What is left of ``x`` divided by ``y``, with the sign of ``x``; of an integer by 0 all of it."""
    if not _is_float(x):
        return np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y)))
    return np.fmod(_narrow(x, dtype), _narrow(y, dtype))


@pointwise("numbers", roundings=4)
def pow(x: Array, y: Array, dtype: str) -> Array:
    """``x`` to the power of ``y``; an integer to a negative power is cut to a whole number."""
    if _is_float(x):
        return x**y
    ends = np.where(x == 1, 1, np.where(x == -1, np.where(y % 2 == 0, 1, -1), 0))
    return np.where(y < 0, ends, x ** np.where(y < 0, 0, y))


@pointwise(
    "numbers", scalars={"value": _FACTOR}, roundings=3, scale=lambda x, y, z, value: np.abs(x) + np.abs(value * y * z),
    reaches=lambda x, y, z, value: value * y,
)  # fmt: skip
def addcmul(x: Array, y: Array, z: Array, dtype: str, value: Any = 1) -> Array:
    """``x + value * y * z``."""
    return x + value * y * z


@pointwise(
    "floats", scalars={"value": _FACTOR}, roundings=3, scale=lambda x, y, z, value: np.abs(x) + np.abs(value * y / z),
    reaches=lambda x, y, z, value: value * y,
)  # fmt: skip
def addcdiv(x: Array, y: Array, z: Array, dtype: str, value: Any = 1) -> Array:
    """``x + value * y / z``."""
    return x + value * y / z


def _between(x: Array, y: Array, weight: Any) -> Array:
    return np.where(np.abs(weight) < 0.5, x + weight * (y - x), y - (y - x) * (1 - weight))


def _lerp_scale(x: Array, y: Array, weight: Any) -> Array:
    return (np.abs(x) + np.abs(y)) * (1 + np.abs(weight))


@pointwise("floats", roundings=4, scale=_lerp_scale)
def lerp(x: Array, y: Array, weight: Array, dtype: str) -> Array:
    """``x + weight * (y - x)``, from ``y`` downwards for a weight of half or more."""
    return _between(x, y, weight)


@pointwise("floats", scalars={"weight": number((0.5, 0.1, -2, 1))}, roundings=4, scale=_lerp_scale)
def lerp_scalar(x: Array, y: Array, dtype: str, weight: Any) -> Array:
    """``x + weight * (y - x)``, from ``y`` downwards for a weight of half or more."""
    return _between(x, y, weight)


@pointwise("all", condition="condition", exact=True)
def where(condition: Array, x: Array, y: Array, dtype: str) -> Array:
    """``x`` where the condition holds, else ``y``."""
    return np.where(condition, x, y)


@pointwise("all", roundings=0)
def maximum(x: Array, y: Array, dtype: str) -> Array:
    """The greater of both, NaN if either is."""
    return np.maximum(x, y)


@pointwise("all", roundings=0)
def minimum(x: Array, y: Array, dtype: str) -> Array:
    """The less of both, NaN if either is."""
    return np.minimum(x, y)


@pointwise("numbers", roundings=0)
def clamp(x: Array, least: Array, most: Array, dtype: str) -> Array:
    """``x`` within limits, of which the upper one wins; NaN if any of the three is."""
    return np.minimum(np.maximum(x, least), most)


@pointwise("all", result="bool")
def eq(x: Array, y: Array, dtype: str) -> Array:
    """``x == y``."""
    return x == y


@pointwise("all", result="bool")
def ne(x: Array, y: Array, dtype: str) -> Array:
    """``x != y``, true of NaN."""
    return x != y


@pointwise("all", result="bool")
def lt(x: Array, y: Array, dtype: str) -> Array:
    """``x < y``."""
    return x < y


@pointwise("all", result="bool")
def le(x: Array, y: Array, dtype: str) -> Array:
    """``x <= y``."""
    return x <= y


@pointwise("all", result="bool")
def gt(x: Array, y: Array, dtype: str) -> Array:
    """``x > y``."""
    return x > y


@pointwise("all", result="bool")
def ge(x: Array, y: Array, dtype: str) -> Array:
    """``x >= y``."""
    return x >= y


@pointwise("floats", result="bool")
def isnan(x: Array, dtype: str) -> Array:
    """Whether it is no number."""
    return np.isnan(x)


@pointwise("floats", result="bool")
def isinf(x: Array, dtype: str) -> Array:
    """Whether it is an infinity of either sign."""
    return np.isinf(x)


@pointwise("floats", result="bool")
def isneginf(x: Array, dtype: str) -> Array:
    """Whether it is the infinity below all numbers."""
    return np.isneginf(x)


@pointwise("floats", result="bool")
def isposinf(x: Array, dtype: str) -> Array:
    """Whether it is the infinity above all numbers."""
    return np.isposinf(x)


@pointwise("bits")
def bitwise_and(x: Array, y: Array, dtype: str) -> Array:
    """The bits that both have."""
    return x & y


@pointwise("bits")
def bitwise_or(x: Array, y: Array, dtype: str) -> Array:
    """The bits that either has."""
    return x | y


@pointwise("bits")
def bitwise_xor(x: Array, y: Array, dtype: str) -> Array:
    """The bits that one of both has."""
    return x ^ y


@pointwise("bits")
def bitwise_not(x: Array, dtype: str) -> Array:
    """The bits that it has not."""
    return ~x


@pointwise("numbers", exact=True)
def neg(x: Array, dtype: str) -> Array:
    """``-x``."""
    return -x


@pointwise("numbers", exact=True)
def abs(x: Array, dtype: str) -> Array:
    """The magnitude."""
    return np.abs(x)


@pointwise("numbers", exact=True)
def sign(x: Array, dtype: str) -> Array:
    """-1, 0 or 1; 0 of NaN."""
    return np.where(x != x, 0, np.sign(x))


@pointwise("floats", exact=True)
def floor(x: Array, dtype: str) -> Array:
    """The greatest whole number that is no greater."""
    return np.floor(x)


@pointwise("floats", exact=True)
def ceil(x: Array, dtype: str) -> Array:
    """The least whole number that is no less."""
    return np.ceil(x)


@pointwise("floats", exact=True)
def round(x: Array, dtype: str) -> Array:
    """The nearest whole number, of two the even one."""
    return np.rint(x)


@pointwise("floats", exact=True)
def trunc(x: Array, dtype: str) -> Array:
    """The nearest whole number towards 0."""
    return np.trunc(x)


@pointwise("floats")
def reciprocal(x: Array, dtype: str) -> Array:
    """``1 / x``."""
    return 1 / x


@pointwise("floats")
def sqrt(x: Array, dtype: str) -> Array:
    """The square root."""
    return np.sqrt(x)


@pointwise("floats", roundings=3)
def rsqrt(x: Array, dtype: str) -> Array:
    """``1 / sqrt(x)``."""
    return 1 / np.sqrt(x)


@pointwise("floats", roundings=4)
def exp(x: Array, dtype: str) -> Array:
    """e to the power of ``x``."""
    return np.exp(x)


@pointwise("floats", roundings=4)
def expm1(x: Array, dtype: str) -> Array:
    """``exp(x) - 1``, as exact near 0."""
    return np.expm1(x)


@pointwise("floats", roundings=4)
def log(x: Array, dtype: str) -> Array:
    """The natural logarithm."""
    return np.log(x)


@pointwise("floats", roundings=4)
def log1p(x: Array, dtype: str) -> Array:
    """``log(1 + x)``, as exact near 0."""
    return np.log1p(x)


@pointwise("floats", roundings=4)
def log2(x: Array, dtype: str) -> Array:
    """The logarithm to base 2."""
    return np.log2(x)


@pointwise("floats", roundings=4, scale=lambda x: 1.0)
def sin(x: Array, dtype: str) -> Array:
    """The sine of an angle in radians."""
    return np.sin(x)


@pointwise("floats", roundings=4, scale=lambda x: 1.0)
def cos(x: Array, dtype: str) -> Array:
    """The cosine of an angle in radians."""
    return np.cos(x)


@pointwise("floats", roundings=4)
def tanh(x: Array, dtype: str) -> Array:
    """The hyperbolic tangent."""
    return np.tanh(x)


@pointwise("floats", roundings=4)
def erf(x: Array, dtype: str) -> Array:
    """The error function."""
    return _erf(x)


@pointwise("floats", roundings=6, reaches=lambda x: np.exp(-x))
def sigmoid(x: Array, dtype: str) -> Array:
    """``1 / (1 + exp(-x))``."""
    return _sigmoid(x)


@pointwise("numbers", exact=True)
def relu(x: Array, dtype: str) -> Array:
    """``x`` where it is positive, else 0; NaN stays NaN."""
    return np.where(x <= 0, 0, x)


@pointwise("floats", roundings=8, reaches=lambda x: np.exp(-x))
def silu(x: Array, dtype: str) -> Array:
    """``x * sigmoid(x)``."""
    return x / (1 + np.exp(-x))


def _phi(x: Array) -> Array:
    """The normal distribution's cumulative one."""
    return (1 + _erf(x * _ROOT)) / 2


def _inner(x: Array) -> Array:
    return np.tanh(_TANH * (x + _CUBE * x**3))


@pointwise("floats", scalars={"tanh": flag()}, roundings=8, scale=lambda x, tanh: x)
def gelu(x: Array, dtype: str, tanh: bool = False) -> Array:
    """``x`` times the probability that a normal variable is less, or its approximation by a hyperbolic tangent."""
    return x * (1 + _inner(x)) / 2 if tanh else x * _phi(x)


@pointwise(
    "floats", scalars={"beta": number((1, 2, 0.5)), "threshold": number((20, 1))}, roundings=8,
    scale=lambda x, beta, threshold: np.maximum(x, 1 / beta) + 1 / beta,
)  # fmt: skip
def softplus(x: Array, dtype: str, beta: Any = 1, threshold: Any = 20) -> Array:
    """``log(1 + exp(beta * x)) / beta``, and ``x`` where ``beta * x`` is beyond the threshold."""
    return np.where(x * beta > threshold, x, np.log1p(np.exp(x * beta)) / beta)


@pointwise("floats", roundings=3, scale=lambda grad, y: np.abs(grad * y) * (1 + np.abs(y)))
def sigmoid_backward(grad: Array, y: Array, dtype: str) -> Array:
    """The gradient of ``y = sigmoid(x)``: ``grad * y * (1 - y)``."""
    return grad * (1 - y) * y


@pointwise("floats", roundings=3, scale=lambda grad, y: np.abs(grad) * (1 + y * y))
def tanh_backward(grad: Array, y: Array, dtype: str) -> Array:
    """The gradient of ``y = tanh(x)``: ``grad * (1 - y * y)``."""
    return grad * (1 - y * y)


@pointwise("floats", roundings=12, scale=lambda grad, x: np.abs(grad) * (1 + np.abs(x)))
def silu_backward(grad: Array, x: Array, dtype: str) -> Array:
    """The gradient of `silu`: ``grad * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""
    s = _sigmoid(x)
    return grad * s * (1 + x * (1 - s))


def _slope(x: Array) -> Array:
    return _phi(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tanh_slope(x: Array) -> Array:
    t = _inner(x)
    return (1 + t) / 2 + x / 2 * (1 - t * t) * _TANH * (1 + 3 * _CUBE * x * x)


@pointwise(
    "floats", scalars={"tanh": flag()}, roundings=16,
    scale=lambda grad, x, tanh: np.abs(grad) * (1 + np.abs(x) + (np.minimum(np.abs(x), 6) ** 3 if tanh else 0)),
    reaches=lambda grad, x, tanh: x * x,
)  # fmt: skip
def gelu_backward(grad: Array, x: Array, dtype: str, tanh: bool = False) -> Array:
    """The gradient of `gelu`."""
    return grad * (_tanh_slope(x) if tanh else _slope(x))


@pointwise(
    "floats", scalars={"beta": number((1, 2, 0.5)), "threshold": number((20, 1))}, roundings=8,
    scale=lambda grad, x, beta, threshold: grad,
)  # fmt: skip
def softplus_backward(grad: Array, x: Array, dtype: str, beta: Any = 1, threshold: Any = 20) -> Array:
    """The gradient of `softplus`: ``grad * sigmoid(beta * x)``, and ``grad`` beyond the threshold."""
    return np.where(x * beta > threshold, grad, grad * _sigmoid(x * beta))


@pointwise("numbers", scalars={"threshold": number((0, 1))}, exact=True)
def threshold_backward(grad: Array, x: Array, dtype: str, threshold: Any = 0) -> Array:
    """``grad`` where ``x`` is beyond the threshold or NaN, else 0."""
    return np.where(x <= threshold, 0, grad)


@pointwise("floats", scalars={"scale": number((1, 2, 1.25))}, roundings=2)
def native_dropout_backward(grad: Array, mask: Array, dtype: str, scale: Any) -> Array:
    """``grad * mask * scale``."""
    return grad * mask * scale
