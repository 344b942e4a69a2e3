"""A row from a whole row: softmax, layer normalisation, the loss of likelihoods, and their backwards.

All definitions are torch's. Halves are computed in float32, and everything is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Operator, Tensor, operator
from flagops.scalars import dtype as dtype_scalar
from flagops.scalars import real, whole

from ._cards import brought
from ._rounding import Array, accumulator, magnitude, unit, wide

_LOADS = {
    f"{name}.{dtype}": {"batch": (rows,), "n": n, "dtype": dtype}
    for name, rows, n in (("hidden-8k", 8192, 576), ("logits-512", 512, 49152))
    for dtype in ("float32", "bfloat16")
}


def _off(exact: Array, error: Array, dtype: str, most: Array, computed: str = "") -> Array:
    """An error of the arithmetic, which is that of `computed` or of the result's dtype, and a rounding of the result;
    infinite where `most` may overflow on the way."""
    acc, out = unit(accumulator(computed or dtype)), unit(dtype)
    rounding = 0.0 if out == acc else out.u * (magnitude(exact) + error) + out.tiny
    bound = error + rounding + acc.tiny
    return np.where((most < acc.largest / 4) & ~np.isnan(bound), bound, np.inf)


def _of_rows(name: str, *tensors: str) -> Callable[[Callable[..., Array]], Operator]:
    """Make the card of an operator that gives rows of rows alike."""
    return operator(
        name=f"aten.{name}",
        tensors={tensor: Tensor("... n", FLOATS) for tensor in tensors},
        scalars={"dtype": dtype_scalar(FLOATS)},
        result=Tensor("... n", "dtype"),
        workloads=_LOADS,
        flops=lambda dims, batch: 5.0 * math.prod(batch) * dims["n"],
        inplace={"out": tensors[0]},
    )


def _wide(x: Array, dtype: str) -> Array:
    return wide(brought(x, dtype))


def _below(x: Array, dtype: str) -> tuple[Array, Array]:
    """What each element is less than the greatest of its row, and the sum of exponentials of that."""
    x = _wide(x, dtype)
    with np.errstate(all="ignore"):
        below = x - x.max(-1, keepdims=True, initial=-np.inf)
        return below, np.exp(below).sum(-1, keepdims=True)


def _flushed(dtype: str) -> float:
    """What an exponential may be to be taken for 0: twice the smallest normal number, as kernels are half as fast for
    what lies below."""
    acc = unit(accumulator(dtype))
    return acc.tiny / acc.u


def _mass_off(below: Array, dtype: str) -> Array:
    """The relative error of a sum of exponentials, of which the greatest is 1."""
    acc, size = unit(accumulator(dtype)), magnitude(below)
    terms = np.where(np.isfinite(below), np.exp(below), 0)
    total = np.maximum(terms.sum(-1, keepdims=True), 1)
    return ((terms * (4 + 2 * size)).sum(-1, keepdims=True) / total + below.shape[-1] + 2) * acc.u


@_of_rows("_softmax", "x")
def softmax(x: Array, dtype: str) -> Array:
    """``exp(x) / sum(exp(x))`` of each row, whatever its size; NaN of one that is all -inf.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, any strides.
        dtype: what `x` is brought to and the result is: float16, bfloat16, float32 or float64.
        out: to write into; may be `x` itself; allocated if None.

    Returns:
        ``[..., n]`` of `dtype`; computed in float32 for halves and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::_softmax``.
    """
    below, mass = _below(x, dtype)
    with np.errstate(all="ignore"):
        return np.exp(below) / mass


def softmax_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    below, _ = _below(arguments["x"], arguments["dtype"])
    acc, size = unit(accumulator(dtype)), magnitude(exact)
    relative = (8 + 2 * magnitude(below)) * acc.u + _mass_off(below, dtype)
    return _off(exact, 2 * relative * size + _flushed(dtype), dtype, size)


@_of_rows("_log_softmax", "x")
def log_softmax(x: Array, dtype: str) -> Array:
    """The logarithm of `_softmax`: each element less the logarithm of its row's ``sum(exp(x))``.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, any strides.
        dtype: what `x` is brought to and the result is: float16, bfloat16, float32 or float64.
        out: to write into; may be `x` itself; allocated if None.

    Returns:
        ``[..., n]`` of `dtype`; computed in float32 for halves and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::_log_softmax``.
    """
    below, mass = _below(x, dtype)
    with np.errstate(all="ignore"):
        return below - np.log(mass)


def log_softmax_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    below, mass = _below(arguments["x"], arguments["dtype"])
    acc = unit(accumulator(dtype))
    error = 2 * acc.u * (magnitude(below) + magnitude(exact)) + 2 * _mass_off(below, dtype)
    return _off(exact, error + 4 * acc.u * (magnitude(np.log(mass)) + 1), dtype, magnitude(below))


@_of_rows("_softmax_backward_data", "grad", "output")
def softmax_backward(grad: Array, output: Array, dtype: str) -> Array:
    """The gradient of what `_softmax` took: ``output * (grad - sum(grad * output))``.

    Args:
        grad: ``[..., n]``, of what it gave; float16, bfloat16, float32 or float64, any strides.
        output: ``[..., n]``, what it gave.
        dtype: what both are brought to and the result is: float16, bfloat16, float32 or float64.
        out: to write into; may be `grad` itself; allocated if None.

    Returns:
        ``[..., n]`` of `dtype`; computed in float32 for halves and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::_softmax_backward_data``.
    """
    g, y = _wide(grad, dtype), _wide(output, dtype)
    return (g - (g * y).sum(-1, keepdims=True)) * y


def softmax_backward_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    g, y = (magnitude(_wide(arguments[n], arguments["dtype"])) for n in ("grad", "output"))
    acc, n = unit(accumulator(dtype)), g.shape[-1]
    total = (g * y).sum(-1, keepdims=True)
    error = y * ((n + 4) * (acc.u * total + acc.tiny) + 2 * acc.u * (g + total)) + 2 * acc.u * magnitude(exact)
    return _off(exact, error + acc.tiny, dtype, (g + total) * np.maximum(y, 1))


@_of_rows("_log_softmax_backward_data", "grad", "output")
def log_softmax_backward(grad: Array, output: Array, dtype: str) -> Array:
    """The gradient of what `_log_softmax` took: ``grad - exp(output) * sum(grad)``.

    Args:
        grad: ``[..., n]``, of what it gave; float16, bfloat16, float32 or float64, any strides.
        output: ``[..., n]``, what it gave.
        dtype: what both are brought to and the result is: float16, bfloat16, float32 or float64.
        out: to write into; may be `grad` itself; allocated if None.

    Returns:
        ``[..., n]`` of `dtype`; computed in float32 for halves and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::_log_softmax_backward_data``.
    """
    g, y = _wide(grad, dtype), _wide(output, dtype)
    return g - np.exp(y) * g.sum(-1, keepdims=True)


def log_softmax_backward_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    g, y = (_wide(arguments[n], arguments["dtype"]) for n in ("grad", "output"))
    acc, n, share = unit(accumulator(dtype)), g.shape[-1], np.exp(y)
    total = magnitude(g).sum(-1, keepdims=True)
    error = (
        (share + _flushed(dtype)) * (n + 8) * (acc.u * total + acc.tiny)
        + _flushed(dtype) * total
        + 2 * acc.u * magnitude(g)
    )
    most = np.maximum(share, total * np.maximum(share, 1))
    return _off(exact, error + 2 * acc.u * magnitude(exact), dtype, np.maximum(magnitude(g), most))


@operator(
    name="aten.native_layer_norm",
    tensors={
        "x": Tensor("... n", FLOATS),
        "weight": Tensor("n", FLOATS, optional=True),
        "bias": Tensor("n", FLOATS, optional=True),
    },
    scalars={"eps": real((1e-5, 0.5, 1e-12, -0.5)), "stats": dtype_scalar(FLOATS)},
    result={"y": Tensor("... n", "x"), "mean": Tensor("...", "stats"), "rstd": Tensor("...", "stats")},
    workloads=_LOADS,
    flops=lambda dims, batch: 7.0 * math.prod(batch) * dims["n"],
)
def layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, stats: str = "float32"
) -> tuple[Array, Array, Array]:
    """``(x - mean) * rstd * weight + bias`` of each row, where ``rstd = 1 / sqrt(mean((x - mean)^2) + eps)``.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, any strides.
        weight, bias: ``[n]``, of any of these dtypes; None for 1 and 0.
        eps: added to the mean of squares; a row whose sum with it is below 0 becomes NaN.
        stats: the dtype of the mean and of `rstd`.
        out: ``(y, mean, rstd)`` to write into; allocated if None.

    Returns:
        ``(y, mean, rstd)``: ``[..., n]`` of the dtype of `x`, and twice ``[...]``; computed in float32 for halves, and
        each rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: `eps` is not finite, or shapes do not fit.

    Source: torch's ``aten::native_layer_norm``.
    """
    v, n = wide(x), x.shape[-1]
    w, b = _factors(x, weight, bias)
    with np.errstate(all="ignore"):
        mean = v.sum(-1) / max(n, 1)
        rstd = 1 / np.sqrt(np.square(v - mean[..., None]).sum(-1) / np.asarray(n, v.dtype) + eps)
        return (v - mean[..., None]) * rstd[..., None] * w + b, mean, rstd


def _factors(x: Array, weight: Array | None, bias: Array | None) -> tuple[Any, Any]:
    dtype = x.dtype.name
    one = np.ones(x.shape[-1], wide(x).dtype)
    return one if weight is None else _wide(weight, dtype), one * 0 if bias is None else _wide(bias, dtype)


def layer_norm_bound(
    exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, ...]:
    """The error of the mean moves every distance, and with those the sum of their squares."""
    y, mean, rstd = exact
    x, n = wide(arguments["x"]), max(arguments["x"].shape[-1], 1)
    w, b = map(magnitude, _factors(arguments["x"], arguments["weight"], arguments["bias"]))
    acc = unit(accumulator(dtypes[0]))
    off = (n + 1) * (acc.u * magnitude(x).sum(-1) / n) + 2 * acc.tiny
    distance = magnitude(x - mean[..., None])
    moved = off[..., None] + acc.u * (distance + off[..., None])
    squares = np.square(distance).sum(-1) / n
    spread = (moved * (2 * distance + moved)).sum(-1) / n + (n + 4) * (acc.u * squares + acc.tiny)
    total = squares + arguments["eps"]
    spread = spread + 2 * acc.u * (squares + abs(arguments["eps"]))
    below = total < -spread  # the root of what is surely less than 0
    with np.errstate(all="ignore"):
        root_off = np.where(spread < total, 1 / np.sqrt(np.maximum(total - spread, 0)) - 1 / np.sqrt(total), np.inf)
    root_off = root_off + 4 * acc.u * magnitude(rstd)
    r = magnitude(rstd)[..., None]
    error = w * (distance * root_off[..., None] + moved * (r + root_off[..., None]) + 4 * acc.u * distance * r)
    error = error + 2 * acc.u * (magnitude(y) + b) + (w + 1) * acc.tiny
    most = np.maximum(magnitude(x).sum(-1), n * squares)
    largest = unit(accumulator(dtypes[0])).largest
    safe = most < largest / 4
    bounds = (error, off, root_off)
    result = [_off(e, o, d, np.zeros(()), dtypes[0]) for e, o, d in zip(exact, bounds, dtypes, strict=True)]
    return (
        np.where(
            below[..., None],
            0,
            np.where(safe[..., None] & (w * (distance + 1) * np.maximum(r, 1) < largest / 4), result[0], np.inf),
        ),
        np.where(safe, result[1], np.inf),
        np.where(below, 0, np.where(safe, result[2], np.inf)),
    )


@operator(
    name="aten.native_layer_norm_backward",
    tensors={
        "grad": Tensor("m n", FLOATS),
        "x": Tensor("m n", FLOATS),
        "mean": Tensor("m", FLOATS),
        "rstd": Tensor("m", FLOATS),
        "weight": Tensor("n", FLOATS, optional=True),
    },
    scalars={"sums": dtype_scalar(FLOATS)},
    result={"dx": Tensor("m n", "x"), "dweight": Tensor("n", "sums"), "dbias": Tensor("n", "sums")},
    workloads={
        name: {"m": load["batch"][0], "n": load["n"], "dtype": load["dtype"]}  # type: ignore[index]
        for name, load in _LOADS.items()
    },
    flops=lambda dims, batch: 14.0 * dims["m"] * dims["n"],
    separable=False,
)
def layer_norm_backward(
    grad: Array, x: Array, mean: Array, rstd: Array, weight: Array | None = None, sums: str = "float32"
) -> tuple[Array, Array, Array]:
    """The gradients of what `native_layer_norm` took, of ``y = (x - mean) * rstd``, with ``g = grad * weight``:
    ``(g - mean(g) - y * mean(g * y)) * rstd``, ``sum(grad * y)`` and ``sum(grad)``.

    Args:
        grad: ``[m, n]``, float16, bfloat16, float32 or float64, any strides.
        x: ``[m, n]``, of any of these dtypes.
        mean, rstd: ``[m]``, what it gave.
        weight: ``[n]``; None for 1.
        sums: the dtype of the last two results.
        out: ``(dx, dweight, dbias)`` to write into; allocated if None.

    Returns:
        ``(dx, dweight, dbias)``: ``[m, n]`` of the dtype of `x`, ``[n]`` and ``[n]``; computed in float32 where `x` is
        of halves, and rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::native_layer_norm_backward``.
    """
    g, own, y, r, n = _operands(grad, x, mean, rstd, weight)
    dx = (own - own.sum(-1, keepdims=True) / n - y * ((own * y).sum(-1, keepdims=True) / n)) * r
    return dx, (g * y).sum(0), g.sum(0)


_TAKEN = ("grad", "x", "mean", "rstd", "weight")


def _operands(grad: Array, x: Array, mean: Array, rstd: Array, weight: Array | None) -> tuple[Any, ...]:
    dtype = x.dtype.name
    g, m, r = _wide(grad, dtype), _wide(mean, dtype)[:, None], _wide(rstd, dtype)[:, None]
    w, _ = _factors(x, weight, None)
    with np.errstate(all="ignore"):
        return g, g * w, (wide(x) - m) * r, r, max(x.shape[-1], 1)


def layer_norm_backward_bound(
    exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, ...]:
    g, own, y, r, n = (magnitude(np.asarray(x)) for x in _operands(*(arguments[k] for k in _TAKEN)))
    acc, rows = unit(accumulator(dtypes[0])), g.shape[0]
    total, dot = own.sum(-1, keepdims=True), (own * y).sum(-1, keepdims=True)
    inside = ((n + 8) * (total + y * dot) / n + 8 * own) * acc.u + (n + 4) * acc.tiny * (1 + y)
    most = ((own + total + y * (dot + own + 1)) * np.maximum(r, 1)).max(-1, keepdims=True, initial=0)
    most = np.broadcast_to(most, own.shape)
    columns = (g * y).sum(0), g.sum(0)
    errors = r * inside, *((rows + 8) * (acc.u * x + acc.tiny) for x in columns)
    scales = most, *columns
    given = zip(exact, errors, dtypes, scales, strict=True)
    return tuple(_off(*one, dtypes[0]) for one in given)


_CLASSES = (1, 2, 3, 7, 17, 33, 130)
_IGNORED = whole((-100, 1), least=-(2**63))


def _draw_classes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    return rng.integers(0, dims["c"], shape).astype(dtype)


def _among(target: Any, classes: int, ignore: int) -> str | None:
    """What is wrong with targets."""
    if 0 in tuple(target.shape):
        return None
    wrong = target[(target != ignore) & ((target < 0) | (target >= classes))]
    return f"target {int(wrong.reshape(-1)[0])} is out of bounds, there are {classes} classes" if len(wrong) else None


@operator(
    name="aten.nll_loss_forward",
    tensors={
        "x": Tensor("... c", FLOATS),
        "target": Tensor("...", ("int64", "uint8"), draw=_draw_classes),
        "weight": Tensor("c", FLOATS, optional=True),
    },
    scalars={"ignore": _IGNORED},
    result={"losses": Tensor("...", "x"), "shares": Tensor("...", "x")},
    workloads={"logits-512.float32": {"batch": (512,), "c": 49152, "dtype": "float32"}},
    flops=lambda dims, batch: float(math.prod(batch)),
    sizes={"c": _CLASSES},
)
def nll_loss(x: Array, target: Array, weight: Array | None = None, ignore: int = -100) -> tuple[Array, Array]:
    """Of each row the element at its target, times ``-weight[target]``, and that weight; 0 of rows that are ignored.

    Args:
        x: ``[..., c]``, float16, bfloat16, float32 or float64, any strides.
        target: ``[...]``, int64 or uint8, from 0 to c - 1, or `ignore`.
        weight: ``[c]``; None for 1.
        ignore: the target of rows that do not count.
        out: ``(losses, shares)`` to write into; allocated if None.

    Returns:
        ``(losses, shares)``, each ``[...]`` of the dtype of `x`, rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: a target is out of bounds, or shapes do not fit.

    Source: torch's ``aten::nll_loss_forward``, before losses are summed.
    """
    w, _ = _factors(x, weight, None)
    lead = np.broadcast_shapes(x.shape[:-1], target.shape)
    x, target = np.broadcast_to(wide(x), (*lead, x.shape[-1])), np.broadcast_to(target, lead).astype(np.int64)
    counts = target != ignore
    safe = np.where(counts, target, 0)
    with np.errstate(all="ignore"):
        losses = -w[safe] * np.take_along_axis(x, safe[..., None], -1)[..., 0]
    return np.where(counts, losses, 0), np.where(counts, w[safe], 0)


def nll_loss_values(x: Any, target: Any, weight: Any = None, ignore: int = -100) -> str | None:
    return _among(target, x.shape[-1], ignore)


def nll_loss_bound(
    exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, ...]:
    acc = unit(accumulator(dtypes[0]))
    return tuple(_off(e, acc.u * magnitude(e), dtype, magnitude(e)) for e, dtype in zip(exact, dtypes, strict=True))


@operator(
    name="aten.nll_loss_backward",
    tensors={
        "grad": Tensor("...", FLOATS),
        "target": Tensor("...", ("int64", "uint8"), draw=_draw_classes),
        "weight": Tensor("c", FLOATS, optional=True),
    },
    scalars={"classes": whole(axis="c"), "ignore": _IGNORED},
    result=Tensor("... c", "grad"),
    workloads={"logits-512.float32": {"batch": (512,), "c": 49152, "dtype": "float32"}},
    flops=lambda dims, batch: float(math.prod(batch)),
    sizes={"c": _CLASSES},
    separable=("...",),
)
def nll_loss_backward(
    grad: Array, target: Array, weight: Array | None = None, classes: int = 1, ignore: int = -100
) -> Array:
    """The gradient of what `nll_loss_forward` took: 0 but for ``-weight[target] * grad`` at each row's target.

    Args:
        grad: ``[...]``, of each row's loss; float16, bfloat16, float32 or float64, any strides.
        target: ``[...]``, int64 or uint8, from 0 to c - 1, or `ignore`.
        weight: ``[c]``; None for 1.
        classes: c.
        ignore: the target of rows that do not count.
        out: to write into; allocated if None.

    Returns:
        ``[..., c]`` of the dtype of `grad`, rounded once.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: a target is out of bounds, or shapes do not fit.

    Source: torch's ``aten::nll_loss_backward``, after gradients of sums.
    """
    w = np.ones(classes) if weight is None else _wide(weight, grad.dtype.name)
    lead = np.broadcast_shapes(grad.shape, target.shape)
    g, target = np.broadcast_to(wide(grad), lead), np.broadcast_to(target, lead).astype(np.int64)
    made = np.zeros((*lead, classes), g.dtype)
    counts = target != ignore
    safe = np.where(counts, target, 0)
    with np.errstate(all="ignore"):
        np.put_along_axis(made, safe[..., None], np.where(counts, -w[safe] * g, 0)[..., None], -1)
    return made


def nll_loss_backward_values(
    grad: Any, target: Any, weight: Any = None, classes: int = 1, ignore: int = -100
) -> str | None:
    return _among(target, classes, ignore)


def nll_loss_backward_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    return _off(exact, unit(accumulator(dtype)).u * magnitude(exact), dtype, magnitude(exact))
