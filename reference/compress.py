"""The key-value compressor of DeepSeek-V4's CSA and HCA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

CSA = {"o": 2, "m": 4, "d": 512, "dtype": "bfloat16"}
HCA = {"o": 1, "m": 128, "d": 512, "dtype": "bfloat16"}
FLASH, PRO = {"D": 4096}, {"D": 7168}


def _check(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    if dims["o"] not in (1, 2) or dims["m"] < 1:
        return (
            f"kv_state has {dims['o'] * dims['m']} rows for windows of {dims['m']} tokens (rows of bias), expected as "
            "many (HCA) or twice as many (CSA, overlapping)"
        )
    if arguments["filled"] >= dims["m"]:
        return f"filled is {arguments['filled']}, a window closes at {dims['m']} tokens"
    return None


def _state_dtypes(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return (accumulator(dtypes["x"]),)


def _scores(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    scores = rng.standard_normal(shape).astype(dtype)
    rows = rng.choice([0, shape[1] - dims["m"], shape[1]])
    scores[:, :rows] = -np.inf
    return scores


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    channels = dims["o"] * dims["d"]
    return dims["b"] * dims["s"] * channels * (4.0 * dims["D"] + 8.0)


@operator(
    tensors={
        "x": Tensor("b s D", FLOATS),
        "wkv": Tensor("o*d D", "x"),
        "wgate": Tensor("o*d D", "x"),
        "bias": Tensor("m o*d", _state_dtypes),
        "kv_state": Tensor("b o*m o*d", _state_dtypes),
        "score_state": Tensor("b o*m o*d", _state_dtypes, draw=_scores),
    },
    scalars={"filled": whole(lambda dims: (0, dims["m"] - 1, dims["m"] // 2), least=0)},
    result={
        "entries": Tensor("b w d", "x"),
        "kv_state": Tensor("b o*m o*d", "kv_state"),
        "score_state": Tensor("b o*m o*d", "kv_state"),
    },
    inplace={"kv_state": "kv_state", "score_state": "score_state"},
    separable=False,
    derived=lambda dims, scalars: {"w": (scalars["filled"] + dims["s"]) // dims["m"]},
    check=_check,
    workloads={
        "v4-flash.csa-prefill-4k": {"b": 1, "s": 4096, **FLASH, **CSA},
        "v4-flash.hca-prefill-4k": {"b": 1, "s": 4096, **FLASH, **HCA},
        "v4-flash.indexer-prefill-1k": {"b": 1, "s": 1024, **FLASH, **CSA, "d": 128},
        "v4-flash.csa-decode-1": {"b": 1, "s": 1, **FLASH, **CSA, "filled": 2},
        "v4-flash.csa-close-1": {"b": 1, "s": 1, **FLASH, **CSA, "filled": 3},
        "v4-flash.hca-decode-1": {"b": 1, "s": 1, **FLASH, **HCA, "filled": 64},
        "v4-flash.csa-decode-64": {"b": 64, "s": 1, **FLASH, **CSA, "filled": 3},
        "v4-pro.csa-prefill-1k": {"b": 1, "s": 1024, **PRO, **CSA},
        "v4-pro.csa-decode-1": {"b": 1, "s": 1, **PRO, **CSA, "filled": 2},
    },
    flops=_flops,
    sizes={
        "o": (1, 2),
        "m": (4, 1, 3, 8),
        "b": (1, 2, 3, 0),
        "s": (1, 2, 3, 0, 7, 13, 33, 130),
        "d": (3, 1, 8, 17, 64, 0),
        "D": (3, 1, 16, 65, 520, 0),
    },
    cases=({"b": 3, "s": 3, "o": 2, "m": 4, "d": 130, "D": 3},),  # more sequences than a small budget has room for
)
def compress_kv(
    x: Array, wkv: Array, wgate: Array, bias: Array, kv_state: Array, score_state: Array, filled: int = 0
) -> tuple[Array, Array, Array]:
    """Pool each window of m tokens to one entry: a softmax over the window for every channel on its own.

    ``kv = x wkv^T`` and ``z = x wgate^T + bias[t mod m]``. HCA (states of m rows): ``entry = sum_j softmax_j(z) kv``
    over the window. CSA (states of 2m rows) overlaps: channels 0 to d-1 of the projections belong to the *previous*
    window and channels d to 2d-1 to the *current* one, and the softmax runs over both, 2m tokens. A prefill, a single
    step and any chunk are the same call: chunks in turn give what one call gives for all tokens.

    Args:
        x: ``[b, s, D]``, float16, bfloat16, float32 or float64, any strides; the next s tokens.
        wkv, wgate: ``[o * d, D]``, dtype of ``x``; o is 2 for CSA and 1 for HCA.
        bias: ``[m, o * d]`` float32 (float64 when ``x`` is), added to the gate of the tokens by place in their window.
        kv_state, score_state: ``[b, o * m, o * d]``, dtype of ``bias``; a fresh state is 0 and -inf. The last m rows
            hold the newest token of each place in the window, the first m of CSA the last window that closed; scores
            have their bias.
        filled: tokens that the current window already holds, 0 to m - 1.
        out: the three results to write into; the states may be the very tensors given. Allocated if None.

    Returns:
        entries: ``[b, (filled + s) // m, d]``, dtype of ``x``: pooled, before norm, rotation and quantisation.
        kv_state, score_state: the states after these tokens. A row that a token did not reach stays as it was; when a
            window of CSA closes its rows are copied to the first m and stay.
        Projections, scores, weights and sums are float32 (float64 for float64); an entry is rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``filled`` is no place in a window, or ranks, sizes or devices do not fit.

    Temporaries stay under ``FLAGOPS_BUDGET`` bytes. Source: the DeepSeek-V4 report (arXiv 2606.19348), compressed
    sparse and heavily compressed attention; states and roundings as in its inference code.
    """
    m, before = len(bias), kv_state.shape[1] - len(bias)
    with np.errstate(all="ignore"):
        kv, scores = _project(x, wkv), _project(x, wgate) + _places(wide(bias), filled, x.shape[1])
        kv, scores = _line(kv_state, kv, before + filled), _line(score_state, scores, before + filled)
        entries = (_softmax(_slots(scores, m, before)) * _slots(kv, m, before)).sum(2)
    return entries, _state(kv_state, kv, m), _state(score_state, scores, m)


def _project(x: Array, weight: Array) -> Array:
    return np.matmul(wide(x), wide(weight).T)


def _places(bias: Array, filled: int, tokens: int) -> Array:
    return bias[(filled + np.arange(tokens)) % len(bias)]


def _line(state: Array, new: Array, held: int) -> Array:
    """All tokens in order: the previous window of CSA, those the current one holds, the new ones."""
    return np.concatenate([wide(state[:, :held]), new], axis=1)


def _slots(line: Array, m: int, before: int) -> Array:
    """The tokens that each window pools, ``[b, w, before + m, d]``."""
    (b, length, channels), d = line.shape, line.shape[2] // (2 if before else 1)
    windows = (length - before) // m
    current = line[:, before : before + windows * m, channels - d :].reshape(b, windows, m, d)
    previous = line[:, : windows * before, :d].reshape(b, windows, before, d)
    return np.concatenate([previous, current], axis=2)


def _softmax(scores: Array) -> Array:
    p = np.exp(scores - scores.max(2, keepdims=True))
    return np.asarray(p / p.sum(2, keepdims=True))


def _state(state: Array, line: Array, m: int) -> Array:
    before = state.shape[1] - m
    closed = (line.shape[1] - before) // m * m
    result = wide(state)
    if closed:
        result[:, :before] = line[:, closed : closed + before]
        result[:, before:] = line[:, before + closed - m : before + closed]
    rest = line[:, before + closed :]
    result[:, before : before + rest.shape[1]] = rest
    return result


def compress_kv_bound(
    exact: tuple[Array, ...], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """Of the states the error of the projections; of the entries that of scores through exp, values, sums, rounding."""
    x, bias, filled = arguments["x"], arguments["bias"], arguments["filled"]
    kv_state, score_state = arguments["kv_state"], arguments["score_state"]
    m, before = len(bias), kv_state.shape[1] - len(bias)
    acc, out = unit(dtypes[1]), unit(dtypes[0])
    with np.errstate(all="ignore"):
        kv, kv_error = _projected(x, arguments["wkv"], dtypes[1])
        z, z_error = _projected(x, arguments["wgate"], dtypes[1])
        z = z + _places(wide(bias), filled, x.shape[1])
        z_error = z_error + acc.u * (magnitude(z) + z_error)
        z_error = np.where(magnitude(z) + z_error < acc.largest, z_error, np.inf)
        held, none = before + filled, np.zeros_like(kv_state)
        kv_line, z_line = _line(none, kv_error, held), _line(none, z_error, held)
        values, scores = (
            _slots(_line(state, new, held), m, before) for state, new in ((kv_state, kv), (score_state, z))
        )
        v_error, s_error = _slots(kv_line, m, before), _slots(z_line, m, before)
        shift = magnitude(scores - scores.max(2, keepdims=True))
        delta = s_error + s_error.max(2, keepdims=True) + 4 * acc.u * (shift + 2)
        p, terms = _softmax(scores), before + m
        relative = np.expm1(2 * delta) + (2 * terms + 8) * acc.u
        weighted = p * (magnitude(values) * (relative + relative.max(2, keepdims=True)) + v_error * (1 + relative))
        tiny = 2.0 ** (-1021 if dtypes[1] == "float64" else -125)  # processors may flush smaller weights to 0
        error = weighted.sum(2) + 2 * terms * tiny * (1 + magnitude(values).sum(2))
        bound = error + (0 if out == acc else out.u * (magnitude(exact[0]) + error) + out.tiny)
        unclear = ((p <= 8 * tiny) & (scores > -np.inf) & ~np.isfinite(values)).any(2)  # perhaps 0 times infinity
        unclear |= np.isnan(bound) | (magnitude(values).sum(2) + v_error.sum(2) >= acc.largest / 2)
        entries = np.where(unclear, np.inf, bound)
    return entries, _state(none, kv_line, m), _state(none, z_line, m)


def _projected(x: Array, weight: Array, dtype: str) -> tuple[Array, Array]:
    """A projection and how far a float32 one may be off."""
    exact = _project(x, weight)
    absolute = np.matmul(magnitude(wide(x)), magnitude(wide(weight)).T)
    return exact, contraction_bound(exact, absolute, x.shape[2], dtype)
