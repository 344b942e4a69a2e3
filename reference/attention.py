"""Attention over listed keys: the core of DeepSeek-V4's sliding-window, CSA and HCA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import real

from ._rounding import Array, accumulator, magnitude, narrowed, unit, wide

V4_FLASH = {"h": 64, "d": 512, "dtype": "bfloat16"}
V4_PRO = {"h": 128, "d": 512, "dtype": "bfloat16"}


def _listed(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    indices = rng.integers(-1, max(dims["n"], 0), shape)
    indices[rng.random(shape) < rng.choice([0, 0.2, 1])] = -1
    return indices.astype(dtype)


def _sink_dtypes(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return ("float64",) if dtypes["q"] == "float64" else ("float32",)


@operator(
    tensors={
        "q": Tensor("b s h d", FLOATS),
        "kv": Tensor("b n d", "q"),
        "sink": Tensor("h", _sink_dtypes, optional=True),
        "indices": Tensor("b s k", ("int32", "int64"), draw=_listed),
    },
    scalars={"scale": real(lambda dims: (max(dims["d"], 1) ** -0.5, 1.0, -0.5, 0.0))},
    result=Tensor("b s h d", "q"),
    workloads={
        "v4-flash.prefill-4k": {"b": 1, "s": 4096, "n": 5120, "k": 640, **V4_FLASH},
        "v4-flash.prefill-256": {"b": 1, "s": 256, "n": 5120, "k": 640, **V4_FLASH},
        "v4-flash.decode-1": {"b": 1, "s": 1, "n": 8320, "k": 640, **V4_FLASH},
        "v4-flash.decode-64": {"b": 64, "s": 1, "n": 1280, "k": 640, **V4_FLASH},
        "v4-pro.decode-64": {"b": 64, "s": 1, "n": 1280, "k": 1152, **V4_PRO},
    },
    sizes={"n": (7, 1, 0, 33, 130)},
    cases=({"b": 1, "s": 2, "h": 3, "d": 17, "n": 300, "k": 300},),  # several blocks of keys, whose maxima differ
    flops=lambda dims, batch: 4.0 * dims["b"] * dims["s"] * dims["k"] * dims["h"] * dims["d"],
)
def sparse_attention(q: Array, kv: Array, sink: Array | None, indices: Array, scale: float) -> Array:
    """Softmax attention of each query over its own list of keys; one key-value head serves all query heads.

    ``l_j = scale * (q . kv_j)`` over the valid indices j of the query, ``p_j = exp(l_j - max l)``,
    ``o = sum_j p_j kv_j / (sum_j p_j + exp(sink - max l))``.

    Args:
        q: ``[b, s, h, d]``, float16, bfloat16, float32 or float64, any strides.
        kv: ``[b, n, d]``, key and value at once, dtype of ``q``.
        sink: ``[h]`` float32 (float64 when ``q`` is), a logit that takes weight but has no value; None for none.
        indices: ``[b, s, k]`` int32 or int64, rows of ``kv``; -1 is absent, in any place. A repeated row counts again.
        scale: factor of the logits, usually ``d ** -0.5``.
        out: ``[b, s, h, d]`` to write into, dtype of ``q``; allocated if None.

    Returns:
        ``[b, s, h, d]``. Logits and sums are float32 (float64 for float64); p is rounded to the dtype of ``q`` for the
        product with values (float16 and bfloat16) but not in the sum; the result is rounded once. A query with no valid
        index gives exactly 0. A sink of -inf changes nothing, one of +inf gives 0.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: an index is below -1 or not below n (always checked on the CPU; on a GPU under FLAGOPS_CHECK=1,
            otherwise such an index counts as absent), or ranks, sizes or devices do not fit.

    Temporaries stay under ``FLAGOPS_BUDGET`` bytes. Source: the DeepSeek-V4 report (arXiv 2606.19348) and the sparse
    attention of its inference code.
    """
    return _attend(q, kv, sink, indices, scale, lambda p: p)


def sparse_attention_rounded(q: Array, kv: Array, sink: Array | None, indices: Array, scale: float) -> Array:
    return _attend(q, kv, sink, indices, scale, lambda p: narrowed(p, q.dtype.name))


def sparse_attention_values(q: Any, kv: Any, sink: Any, indices: Any, scale: float) -> str | None:
    n = kv.shape[1]
    if 0 in tuple(indices.shape):
        return None
    low, high = int(indices.min()), int(indices.max())
    if low >= -1 and high < n:
        return None
    return f"indices reach from {low} to {high}, expected -1 (absent) or a row of kv below {n}"


def _seen(valid: Array) -> Array:
    """Whether a query has a key at all, ``[b, s, 1, 1]``."""
    return np.asarray(valid.any(-1))[:, :, None, None]


def _logits(q: Array, kv: Array, indices: Array, scale: float) -> tuple[Array, Array, Array]:
    valid = (indices >= 0) & (indices < kv.shape[1])
    if kv.shape[1] == 0:
        rows = np.zeros((*indices.shape, kv.shape[2]), kv.dtype)
    else:
        rows = np.take_along_axis(kv[:, None], np.where(valid, indices, 0)[..., None].astype(np.int64), axis=2)
    rows = np.where(valid[..., None], rows, 0)
    return np.einsum("bshd,bskd->bshk", q, rows) * scale, rows, valid


def _probabilities(logits: Array, sink: Array | None, valid: Array) -> tuple[Array, Array]:
    logits = np.where(valid[:, :, None], logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(_seen(valid), top, 0)
    p = np.where(valid[:, :, None], np.exp(logits - top), 0)
    total = p.sum(-1, keepdims=True)
    return p, total if sink is None else total + np.exp(wide(sink)[:, None] - top)


def _attend(q: Array, kv: Array, sink: Array | None, indices: Array, scale: float, rounding: Any) -> Array:
    with np.errstate(all="ignore"):
        logits, rows, valid = _logits(wide(q), wide(kv), indices, scale)
        p, total = _probabilities(logits, sink, valid)
        o = np.einsum("bshk,bskd->bshd", rounding(p), rows)
        return np.where(_seen(valid), o / total, 0)


def sparse_attention_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """The logits' error through exp, the rounding of p, the sums and the last rounding, as for a contraction."""
    q, kv = wide(arguments["q"]), wide(arguments["kv"])
    indices, scale, sink = arguments["indices"], arguments["scale"], arguments["sink"]
    acc, out = unit(accumulator(dtype)), unit(dtype)
    u_p, tiny_p = (out.u, out.tiny) if dtype in HALF else (0.0, acc.tiny)
    terms = indices.shape[-1]
    with np.errstate(all="ignore"):
        logits, rows, valid = _logits(q, kv, indices, scale)
        absolute, _, _ = _logits(magnitude(q), magnitude(kv), indices, 1.0)
        p, total = _probabilities(logits, sink, valid)
        worst = np.where(valid[:, :, None], absolute, 0).max(-1, keepdims=True, initial=0)
        worst = np.where(worst * max(1, abs(scale)) < acc.largest / 2, worst * abs(scale), np.inf)
        delta = (q.shape[-1] + 2) * acc.u * worst + acc.u * (0 if sink is None else magnitude(wide(sink))[:, None])
        weighted = np.einsum("bshk,bskd->bshd", p, magnitude(rows)) / total
        lost = tiny_p * magnitude(rows).sum(-2)[:, :, None] / total
        error = (np.expm1(2 * delta) + u_p + (terms + 8) * acc.u) * weighted + lost
        bound = error + out.u * (magnitude(exact) + error) + out.tiny
        bound += np.where(total < acc.largest / 2, 0, magnitude(exact))  # a sink that dwarfs all logits may give 0
        vanishing = ((p <= 4 * tiny_p) & valid[:, :, None]) * 1.0
        unclear = np.einsum("bshk,bskd->bshd", vanishing, ~np.isfinite(rows) * 1.0) > 0  # perhaps 0 times infinity
        bound = np.where(unclear, np.inf, bound)
        bound = np.where(magnitude(rows).sum(-2)[:, :, None] < acc.largest / 2, bound, np.inf)
        return np.where(_seen(valid), bound, 0)
