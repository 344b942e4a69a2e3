"""Manifold-constrained hyper-connections of DeepSeek-V4: how parallel residual streams are collapsed and mixed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, numpy_dtype
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import real, whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

V4_FLASH = {"n": 4, "d": 4096, "dtype": "bfloat16"}
V4_PRO = {"n": 4, "d": 7168, "dtype": "bfloat16"}
SIZES = {"n": (4, 1, 2, 3, 5), "m": (1,)}
MOST = {"n": 24}  # the bound of comb takes n^4 numbers


ITERS = whole((20, 1, 2, 3))
EPS = real((1e-6, 1e-2, 0.3), least=1e-12)
NORM_EPS = real((1e-6, 0.1), least=1e-12)


def _parameter_dtypes(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return ("float64",) if next(iter(dtypes.values())) == "float64" else ("float32",)


def _weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    return (rng.standard_normal(shape) * max(shape[-1], 1) ** -0.5).astype(numpy_dtype(dtype))


def _columns(dims: Dims, scalars: Mapping[str, Any]) -> Dims:
    return {"m": dims["n"] + 2}


def _check(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    n, m = dims["n"], dims["m"]
    return None if n > 0 and m == n + 2 else f"{n} streams need {n * (n + 2)} coefficients, got {n * m}"


@operator(
    tensors={
        "mix": Tensor("... n*m", ("float32", "float64")),
        "scale": Tensor("3", "mix"),
        "base": Tensor("n*m", "mix"),
    },
    scalars={"mult": whole(axis="n"), "iters": ITERS, "eps": EPS},
    result={"pre": Tensor("... n", "mix"), "post": Tensor("... n", "mix"), "comb": Tensor("... n n", "mix")},
    workloads={f"v4.{rows}": {"batch": (rows,), "n": 4, "dtype": "float32"} for rows in (1, 4096)},
    flops=lambda dims, batch: math.prod(batch) * dims["n"] * (160.0 * dims["n"] + 8),
    sizes=SIZES,
    most=MOST,
    derived=_columns,
    check=_check,
)
def hc_split_sinkhorn(
    mix: Array, scale: Array, base: Array, mult: int = 4, iters: int = 20, eps: float = 1e-6
) -> tuple[Array, Array, Array]:
    """The coefficients of a hyper-connection from their raw projections.

    Columns of ``mix``: n for `pre`, n for `post`, then ``comb[j, k]`` row by row; each is first multiplied by its part
    of ``scale`` and ``base`` is added. ``pre = sigmoid + eps``, ``post = 2 sigmoid``. ``comb``: a softmax over k, plus
    eps everywhere, divided by (its sums over j + eps); then ``iters - 1`` times divided by (its sums over k + eps) and
    by (its sums over j + eps).

    Args:
        mix: ``[..., n * (n + 2)]``, float32 or float64, any strides.
        scale: ``[3]``, factors for pre, post and comb, dtype of ``mix``.
        base: ``[n * (n + 2)]``, dtype of ``mix``.
        mult: n, the number of streams.
        iters: rounds of normalisation, at least 1.
        eps: added as above, at least 1e-12.
        out: ``(pre, post, comb)`` to write into; allocated if None.

    Returns:
        ``pre [..., n]``, ``post [..., n]`` and ``comb [..., n, n]``, all in the dtype and arithmetic of ``mix``.
        Sums of comb over j are 1 within eps; those over k only after many rounds.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: sizes or devices do not fit, or ``mult``, ``iters`` or ``eps`` is out of range.

    Source: DeepSeek-V4 report (arXiv 2606.19348), manifold-constrained hyper-connections, and its inference code.
    """
    with np.errstate(all="ignore"):
        return _coefficients(wide(mix), wide(scale), wide(base), mult, iters, eps)


def hc_split_sinkhorn_bound(
    exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, ...]:
    mix, scale, base = (wide(arguments[name]) for name in ("mix", "scale", "base"))
    n, iters, eps = arguments["mult"], arguments["iters"], arguments["eps"]
    with np.errstate(all="ignore"):
        return _coefficient_errors(mix, np.zeros_like(mix), scale, base, n, iters, eps, dtypes[0])


@operator(
    tensors={
        "x": Tensor("... n d", FLOATS),
        "fn": Tensor("n*m n*d", _parameter_dtypes, draw=_weights),
        "base": Tensor("n*m", "fn"),
        "scale": Tensor("3", "fn"),
    },
    scalars={"iters": ITERS, "eps": EPS, "norm_eps": NORM_EPS},
    result={"y": Tensor("... d", "x"), "post": Tensor("... n", "fn"), "comb": Tensor("... n n", "fn")},
    workloads={f"v4-flash.{rows}": {"batch": (rows,), **V4_FLASH} for rows in (1, 64, 1024, 4096)}
    | {f"v4-pro.{rows}": {"batch": (rows,), **V4_PRO} for rows in (1, 1024)},
    flops=lambda dims, batch: 2.0 * math.prod(batch) * dims["n"] * dims["d"] * (dims["n"] * dims["m"] + 2),
    sizes=SIZES,
    most=MOST,
    derived=_columns,
    check=_check,
)
def hc_pre(
    x: Array, fn: Array, base: Array, scale: Array, iters: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6
) -> tuple[Array, Array, Array]:
    """Collapse the residual streams to the input of a sublayer, and compute how its output will be mixed back.

    ``mix = (flat(x) @ fn.T) * rsqrt(mean(flat(x)^2) + norm_eps)``, its coefficients as in `hc_split_sinkhorn`, and
    ``y = sum_j pre_j x_j``.

    Args:
        x: ``[..., n, d]``, the streams; float16, bfloat16, float32 or float64, any strides.
        fn: ``[n * (n + 2), n * d]`` float32 (float64 when ``x`` is).
        base: ``[n * (n + 2)]``, dtype of ``fn``.
        scale: ``[3]``, dtype of ``fn``.
        iters: rounds of normalisation, at least 1.
        eps: as in `hc_split_sinkhorn`.
        norm_eps: added to the mean of squares, at least 1e-12.
        out: ``(y, post, comb)`` to write into; allocated if None.

    Returns:
        ``y [..., d]`` in the dtype of ``x``; ``post [..., n]`` and ``comb [..., n, n]`` in that of ``fn``. All is
        computed in float32 (float64 for float64); y is rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit, or a number is out of range.

    Source: DeepSeek-V4 report (arXiv 2606.19348); the factor is applied after the product as in its inference code.
    """
    n = x.shape[-2]
    with np.errstate(all="ignore"):
        mix, _ = _mix(wide(x), wide(fn), norm_eps)
        pre, post, comb = _coefficients(mix, wide(scale), wide(base), n, iters, eps)
        return _collapse(pre, wide(x)), post, comb


def hc_pre_bound(exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]) -> tuple[Array, ...]:
    x, fn, base, scale = (wide(arguments[name]) for name in ("x", "fn", "base", "scale"))
    n, iters, eps = x.shape[-2], arguments["iters"], arguments["eps"]
    with np.errstate(all="ignore"):
        mix, factor = _mix(x, fn, arguments["norm_eps"])
        mix_error = _mix_error(mix, factor, x, fn, arguments["norm_eps"], dtypes[1])
        errors = _coefficient_errors(mix, mix_error, scale, base, n, iters, eps, dtypes[1])
        pre = _coefficients(mix, scale, base, n, iters, eps)[0]
        return (_collapse_error(exact[0], pre, errors[0], x, dtypes[0]), *errors[1:])


@operator(
    tensors={
        "y": Tensor("... d", FLOATS),
        "x": Tensor("... n d", "y"),
        "post": Tensor("... n", _parameter_dtypes),
        "comb": Tensor("... n n", "post"),
    },
    result=Tensor("... n d", "y"),
    inplace={"out": "x"},
    separable=("...",),
    workloads={f"v4-flash.{rows}": {"batch": (rows,), **V4_FLASH} for rows in (1, 64, 1024, 4096)}
    | {f"v4-pro.{rows}": {"batch": (rows,), **V4_PRO} for rows in (1, 1024)},
    flops=lambda dims, batch: 2.0 * math.prod(batch) * dims["n"] * dims["d"] * (dims["n"] + 1),
    integral=True,
    sizes=SIZES,
    check=lambda dims, arguments: None if dims["n"] else "there are no streams",
)
def hc_post(y: Array, x: Array, post: Array, comb: Array) -> Array:
    """Add a sublayer's output to the residual streams and mix them: ``x'_k = post_k y + sum_j comb[j, k] x_j``.

    ``comb`` is used transposed: its first axis counts the streams that go in.

    Args:
        y: ``[..., d]``, the sublayer's output; float16, bfloat16, float32 or float64, any strides.
        x: ``[..., n, d]``, the streams that `hc_pre` was given, dtype of ``y``; batch axes of all arguments broadcast.
        post: ``[..., n]`` float32 (float64 when ``y`` is).
        comb: ``[..., n, n]``, dtype of ``post``.
        out: ``[..., n, d]`` to write into, dtype of ``y``, perhaps ``x`` itself; allocated if None.

    Returns:
        ``[..., n, d]``, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit.

    Source: DeepSeek-V4 report (arXiv 2606.19348), manifold-constrained hyper-connections.
    """
    with np.errstate(all="ignore"):
        return _expand(wide(y), wide(x), wide(post), wide(comb))


def hc_post_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    y, x, post, comb = (magnitude(wide(arguments[name])) for name in ("y", "x", "post", "comb"))
    return contraction_bound(exact, _expand(y, x, post, comb), x.shape[-2] + 1, dtype)


@operator(
    tensors={
        "x": Tensor("... n d", FLOATS),
        "fn": Tensor("n n*d", _parameter_dtypes, draw=_weights),
        "base": Tensor("n", "fn"),
        "scale": Tensor("1", "fn"),
    },
    scalars={"eps": EPS, "norm_eps": NORM_EPS},
    result=Tensor("... d", "x"),
    workloads={f"v4-flash.{rows}": {"batch": (rows,), **V4_FLASH} for rows in (1, 1024)},
    flops=lambda dims, batch: 2.0 * math.prod(batch) * dims["n"] * dims["d"] * (dims["n"] + 2),
    sizes={"n": SIZES["n"]},
    check=lambda dims, arguments: None if dims["n"] else "there are no streams",
)
def hc_head(x: Array, fn: Array, base: Array, scale: Array, eps: float = 1e-6, norm_eps: float = 1e-6) -> Array:
    """Collapse the residual streams before the last norm and the output head.

    ``mix = (flat(x) @ fn.T) * rsqrt(mean(flat(x)^2) + norm_eps)`` and
    ``y = sum_j (sigmoid(mix_j * scale + base_j) + eps) x_j``.

    Args:
        x: ``[..., n, d]``, the streams; float16, bfloat16, float32 or float64, any strides.
        fn: ``[n, n * d]`` float32 (float64 when ``x`` is).
        base: ``[n]``, dtype of ``fn``.
        scale: ``[1]``, dtype of ``fn``.
        eps: added to the weights of the streams, at least 1e-12.
        norm_eps: added to the mean of squares, at least 1e-12.
        out: ``[..., d]`` to write into, dtype of ``x``; allocated if None.

    Returns:
        ``[..., d]``, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit, or a number is out of range.

    Source: DeepSeek-V4 report (arXiv 2606.19348) and its inference code.
    """
    with np.errstate(all="ignore"):
        mix, _ = _mix(wide(x), wide(fn), norm_eps)
        return _collapse(_sigmoid(mix * wide(scale) + wide(base)) + eps, wide(x))


def hc_head_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x, fn, base, scale = (wide(arguments[name]) for name in ("x", "fn", "base", "scale"))
    with np.errstate(all="ignore"):
        mix, factor = _mix(x, fn, arguments["norm_eps"])
        mix_error = _mix_error(mix, factor, x, fn, arguments["norm_eps"], accumulator(dtype))
        logits, error = _logits(mix, mix_error, scale, base, accumulator(dtype))
        pre = _sigmoid(logits) + arguments["eps"]
        return _collapse_error(exact, pre, _sigmoid_error(logits, error, pre, accumulator(dtype)), x, dtype)


def _mix(x: Array, fn: Array, norm_eps: float) -> tuple[Array, Array]:
    """The projection of the streams, and the factor that normalises it; the mean of nothing is 0."""
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    factor = 1 / np.sqrt((flat * flat).sum(-1, keepdims=True) / max(flat.shape[-1], 1) + norm_eps)
    return np.matmul(flat[..., None, :], fn.T)[..., 0, :] * factor, factor


def _mix_error(mix: Array, factor: Array, x: Array, fn: Array, norm_eps: float, acc: str) -> Array:
    terms, one = max(fn.shape[-1], 1), unit(acc)
    absolute = _mix(magnitude(x), magnitude(fn), norm_eps)[0] / factor
    squares = (magnitude(x) ** 2).sum((-2, -1))[..., None]
    product = contraction_bound(mix / factor, absolute, terms, acc) * factor
    relative = (terms + 12) * one.u + terms * one.tiny / (squares / terms + norm_eps)
    error = product + magnitude(mix) * relative
    return np.where(squares < one.largest / 4, error, np.inf)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _coefficients(mix: Array, scale: Array, base: Array, n: int, iters: int, eps: float) -> tuple[Array, Array, Array]:
    logits = mix * np.repeat(scale, [n, n, n * n]) + base
    comb = logits[..., 2 * n :].reshape(*mix.shape[:-1], n, n)
    for state, _ in _sinkhorn(comb, iters, eps):
        comb = state
    return _sigmoid(logits[..., :n]) + eps, 2 * _sigmoid(logits[..., n : 2 * n]), comb


def _sinkhorn(logits: Array, iters: int, eps: float) -> Iterator[tuple[Array, int]]:
    """The softmax plus eps, then every state; with each the axis (-2 or -1) that the next division sums over."""
    p = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    x = p / p.sum(-1, keepdims=True) + eps
    for step in range(2 * iters - 1):
        axis = -1 if step % 2 else -2
        yield x, axis
        x = x / (x.sum(axis, keepdims=True) + eps)
    yield x, 0


def _logits(mix: Array, mix_error: Array, scale: Array, base: Array, acc: str) -> tuple[Array, Array]:
    """Logits and how far computed ones may be off; infinite where they may overflow."""
    one, product = unit(acc), mix * scale
    absolute = np.abs(product) + np.abs(base)
    error = np.abs(scale) * mix_error + 3 * one.u * absolute + 4 * one.tiny
    return product + base, np.where(absolute + error < one.largest / 2, error, np.inf)


def _sigmoid_error(logits: Array, error: Array, result: Array, acc: str) -> Array:
    """A logit off by e gives a sigmoid off by a factor of at most exp(e); where exp overflows it gives 0."""
    one = unit(acc)
    relative = np.expm1(error + 2 * one.u * np.abs(logits) + 10 * one.u)
    return _known(result, result * (relative + 2 * one.u) + 4 / one.largest)


def _known(exact: Array, bound: Array) -> Array:
    """NaN is held to NaN; where only the bound is unclear it holds nothing."""
    return np.where(np.isnan(exact), 0, np.where(np.isnan(bound), np.inf, bound))


def _coefficient_errors(
    mix: Array, mix_error: Array, scale: Array, base: Array, n: int, iters: int, eps: float, acc: str
) -> tuple[Array, Array, Array]:
    logits, error = _logits(mix, mix_error, np.repeat(scale, [n, n, n * n]), base, acc)
    gates = logits[..., : 2 * n]
    result = _sigmoid(gates) + np.repeat([eps, 0.0], n)
    bound = _sigmoid_error(gates, error[..., : 2 * n], result, acc)
    square = (*mix.shape[:-1], n, n)
    comb = _sinkhorn_error(logits[..., 2 * n :].reshape(square), error[..., 2 * n :].reshape(square), iters, eps, acc)
    return bound[..., :n], 2 * bound[..., n:], comb


def _sinkhorn_error(logits: Array, error: Array, iters: int, eps: float, acc: str) -> Array:
    """Errors of log(comb), to first order through every later step and with what is left of the second.

    Dividing column k by its sum takes from each log-entry's error e_jk the mean of its column, weighted by the shares
    w = x / (sum + eps): the step's Jacobian. What each step adds (its roundings; e^2 / 2 beyond the first order of its
    mean) reaches the result through the product of the Jacobians after it. The e in that square is bounded without
    them: entries carry their own errors `own`, and a row's or a column's common error is at most that of the means it
    was last corrected by.
    """
    one, n = unit(acc), logits.shape[-1]
    states = list(_sinkhorn(logits, iters, eps))
    floor = 4 / one.largest
    first = states[0][0]
    share = 1 - eps / first
    shifted = np.abs(logits - logits.max(-1, keepdims=True))
    exponent = error + 3 * one.u * np.where(share > 0, shifted, 0) + 4 * one.u
    worst = exponent.max(-1, keepdims=True)
    softmax = exponent + (share * exponent).sum(-1, keepdims=True) + worst**2 + (n + 4) * one.u
    start = share * np.expm1(softmax) + 3 * one.u + floor / first
    own = start.max((-2, -1), keepdims=True)
    common = np.zeros((2, *own.shape))
    added = []
    for state, axis in states[:-1]:
        spread = own + common.sum(0)
        fresh = (n + 6) * one.u + floor / state
        added.append(fresh + spread**2 / 2)
        own = own + fresh.max((-2, -1), keepdims=True) + spread**2 / 2
        common[axis] = np.maximum(common[axis], own + common[-3 - axis])
    eye = np.eye(n * n).reshape(n, n, n, n)
    through = np.broadcast_to(eye, (*logits.shape[:-2], n, n, n, n))
    total = np.zeros_like(logits)
    for (state, axis), new in zip(reversed(states[:-1]), reversed(added), strict=True):
        total = total + (np.abs(through) * new[..., None, None, :, :]).sum((-2, -1))
        weight = state / (state.sum(axis, keepdims=True) + eps)
        through = through - through.sum(axis, keepdims=True) * weight[..., None, None, :, :]
    total = total + (np.abs(through) * start[..., None, None, :, :]).sum((-2, -1))
    return _known(states[-1][0], states[-1][0] * np.expm1(total) + floor)


def _collapse(pre: Array, x: Array) -> Array:
    return (pre[..., None] * x).sum(-2)


def _collapse_error(exact: Array, pre: Array, error: Array, x: Array, dtype: str) -> Array:
    rounding = contraction_bound(exact, _collapse(pre + error, magnitude(x)), x.shape[-2], dtype)
    return _known(exact, rounding + _collapse(error, magnitude(x)) * (1 + 2 * unit(dtype).u))


def _expand(y: Array, x: Array, post: Array, comb: Array) -> Array:
    return post[..., None] * y[..., None, :] + np.matmul(np.swapaxes(comb, -1, -2), x)
