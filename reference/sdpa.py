"""Dense softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF, numpy_dtype
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import flag, real

from ._rounding import Array, accumulator, magnitude, narrowed, unit, wide


def _mask_dtypes(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return ("bool", dtypes["query"])


def _mask(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    kept = rng.random(shape) < rng.choice([0.9, 0.2, 1])
    kept &= rng.random((*shape[:-1], 1)) < 0.9
    if dtype == "bool":
        return kept
    return np.where(kept, rng.standard_normal(shape), -np.inf).astype(numpy_dtype(dtype))


def _heads_of_mask(dims: Dims, scalars: Mapping[str, Any]) -> Dims:
    return {"a": dims["h"] * dims["g"] if dims["s"] % 2 else 1}


def _check(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    heads = dims["h"] * dims["g"]
    if arguments["attn_mask"] is not None and dims["a"] not in (1, heads):
        return f"attn_mask is for {dims['a']} heads, expected 1 or {heads}"
    return None


def factor(scale: float | None, width: int) -> float:
    """What logits are multiplied by."""
    return max(width, 1) ** -0.5 if scale is None else scale


@operator(
    tensors={
        "query": Tensor("... h*g s d", FLOATS),
        "key": Tensor("... h n d", "query"),
        "value": Tensor("... h n v", "query"),
        "attn_mask": Tensor("... a s n", _mask_dtypes, optional=True, codes=True, draw=_mask),
    },
    scalars={
        "is_causal": flag(),
        "scale": real((None, 1.0, -0.3, 0.0), optional=True),
    },
    result=Tensor("... h*g s v", "query"),
    separable=("...", "v"),
    workloads={
        "llama-8b.prefill-1k": {"h": 8, "g": 4, "s": 1024, "n": 1024, "d": 128, "v": 128, "dtype": "bfloat16"},
    },
    flops=lambda dims, batch: (
        2.0 * math.prod(batch) * dims["h"] * dims["g"] * dims["s"] * dims["n"] * (dims["d"] + dims["v"])
    ),
    sizes={"h": (1, 2), "g": (1, 2, 3), "a": (1,)},
    cases=({"h": 1, "g": 2, "s": 130, "n": 300, "d": 17, "v": 17, "a": 1},),
    derived=_heads_of_mask,
    check=_check,
)
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """``softmax(scale * query @ key^T + mask) @ value``, without dropout.

    Args:
        query: ``[..., H, s, d]``, float16, bfloat16, float32 or float64, any strides.
        key: ``[..., h, n, d]``, dtype of ``query``. h divides H: each key head serves H / h query heads in a row.
        value: ``[..., h, n, v]``, dtype of ``query``. Batch axes of all arguments broadcast.
        attn_mask: ``[..., H or 1, s, n]``: bool, True where a key counts, or of the dtype of ``query``, added to the
            logits; a mask that is shared along s or n is given expanded. None for none.
        is_causal: key j counts for query i only if j <= i, whatever s and n are, and only if the mask has it too.
        scale: of the logits; None for ``d ** -0.5``.
        out: ``[..., H, s, v]`` to write into, dtype of ``query``; allocated if None.

    Returns:
        ``[..., H, s, v]``. Logits and sums are float32 (float64 for float64); weights may be rounded to the dtype of
        ``query`` (float16 and bfloat16) for the product with values but not in the sum; the result is rounded once. A
        query whose logits are all -inf, or that has no key, gives exactly 0, as in torch.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ranks, sizes or devices do not fit, or ``scale`` is not finite.

    Temporaries stay under ``FLAGOPS_BUDGET`` bytes. Source: ``torch.nn.functional.scaled_dot_product_attention``.
    """
    return _attend(query, key, value, attn_mask, is_causal, scale, lambda p: p)


def scaled_dot_product_attention_rounded(
    query: Array, key: Array, value: Array, attn_mask: Array | None, is_causal: bool, scale: float | None
) -> Array:
    return _attend(query, key, value, attn_mask, is_causal, scale, lambda p: narrowed(p, query.dtype.name))


def _spread(x: Array, heads: int) -> Array:
    """Key heads repeated for the query heads that they serve."""
    return np.repeat(x, heads // x.shape[-3] if x.shape[-3] else 1, axis=-3)


def _logits(query: Array, key: Array, mask: Array | None, is_causal: bool, scale: float) -> tuple[Array, Array]:
    """Logits, and which keys count."""
    logits = np.matmul(query, np.swapaxes(_spread(key, query.shape[-3]), -1, -2)) * scale
    kept = np.ones(logits.shape[-2:], bool)
    if is_causal:
        kept = np.tril(kept)
    if mask is not None and mask.dtype.itemsize == 1:
        kept = kept & (mask != 0)
    elif mask is not None:
        logits = logits + wide(mask)
    return np.where(kept, logits, -np.inf), np.broadcast_to(kept, np.broadcast_shapes(kept.shape, logits.shape))


def _weights(logits: Array, kept: Array) -> tuple[Array, Array, Array]:
    """exp(l - max l), its sums, and whether a row has a logit above -inf."""
    top = logits.max(-1, keepdims=True, initial=-np.inf)
    p = np.where(kept, np.exp(logits - np.where(top == -np.inf, 0, top)), 0)
    return p, p.sum(-1, keepdims=True), top != -np.inf


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    is_causal: bool,
    scale: float | None,
    rounding: Callable[[Array], Array],
) -> Array:
    with np.errstate(all="ignore"):
        logits, kept = _logits(wide(query), wide(key), mask, is_causal, factor(scale, query.shape[-1]))
        p, total, seen = _weights(logits, kept)
        o = _blend(rounding(p), _spread(wide(value), query.shape[-3]))
        return np.where(seen, o / np.where(seen, total, 1), 0)


def _blend(p: Array, value: Array) -> Array:
    """p @ value, where a weight of 0 takes nothing, not even of what is not finite."""
    finite = np.isfinite(value)
    o = np.matmul(p, np.where(finite, value, 0))
    if finite.all():
        return o
    taken = (p != 0) * 1.0
    for special, there in ((np.inf, value == np.inf), (-np.inf, value == -np.inf), (np.nan, np.isnan(value))):
        o = o + np.where(np.matmul(taken, there * 1.0) > 0, special, 0)
    return o


def scaled_dot_product_attention_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """The logits' error through exp, the rounding of p, the sums and the last rounding, as for a contraction. Minus
    infinity where a logit may overflow: its key may then be hidden, with whatever value it has."""
    query, key, value = (wide(arguments[name]) for name in ("query", "key", "value"))
    mask, is_causal = arguments["attn_mask"], arguments["is_causal"]
    scale = factor(arguments["scale"], query.shape[-1])
    acc, out = unit(accumulator(dtype)), unit(dtype)
    u_p, tiny_p = (out.u, out.tiny) if dtype in HALF else (0.0, acc.tiny)
    terms, value = key.shape[-2], _spread(value, query.shape[-3])
    with np.errstate(all="ignore"):
        logits, kept = _logits(query, key, mask, is_causal, scale)
        added = None if mask is None or mask.dtype.itemsize == 1 else np.where(np.isfinite(mask), np.abs(wide(mask)), 0)
        absolute, _ = _logits(magnitude(query), magnitude(key), None, False, 1.0)
        p, total, seen = _weights(logits, kept)
        worst = absolute * max(1.0, abs(scale)) + (0 if added is None else added)
        worst = np.where(kept, worst, 0).max(-1, keepdims=True, initial=0)
        delta = (query.shape[-1] + 6) * acc.u * np.where(worst < acc.largest / 2, worst, np.inf)
        total = np.where(seen, total, 1)
        size = magnitude(value)
        weighted = np.matmul(p, size) / total
        lost = tiny_p * size.sum(-2, keepdims=True) / total
        error = (np.expm1(2 * delta) + u_p + (terms + 8) * acc.u) * weighted + lost
        bound = error + out.u * (magnitude(exact) + error) + out.tiny
        vanishing = (p <= 4 * tiny_p) * 1.0
        unclear = np.matmul(vanishing, ~np.isfinite(value) * 1.0) > 0  # perhaps 0 times infinity
        bound = np.where(unclear | (size.sum(-2, keepdims=True) >= acc.largest / 2), np.inf, bound)
        overflow = worst >= acc.largest / 2  # of a logit, whose key a kernel may then take for a hidden one
        bound = np.where(np.isnan(bound), np.where(np.isnan(exact) & ~unclear, 0, np.inf), bound)
        return np.where(overflow, -np.inf, np.where(seen, bound, 0))
