"""The lightning indexer of DeepSeek-V4's CSA layers: which compressed entries a query attends to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

V4 = {"b": 1, "h": 64, "d": 128, "dtype": "bfloat16"}
_ELEMENTS = 1 << 24  # of the products of some queries with all keys


def _check(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    return f"{dims['n']} entries; at most 2**30 have an int32 index" if dims["n"] > 1 << 30 else None


def _weight_dtypes(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return (dtypes["q"],) if dtypes["q"] in ("float32", "float64") else (dtypes["q"], "float32")


def _visible(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Causal for workloads; in tests as the seed says, up to all entries or none."""
    n = dims["n"]
    causal = np.broadcast_to((np.arange(shape[1]) + 1) * n // max(shape[1], 1), shape)
    drawn = rng.integers(0, n + 1, shape) if n < 256 and rng.random() < 0.5 else causal
    return drawn.astype(dtype)


@operator(
    tensors={
        "q": Tensor("b s h d", FLOATS),
        "keys": Tensor("b n d", "q"),
        "weights": Tensor("b s h", _weight_dtypes),
        "visible": Tensor("b s", ("int32",), optional=True, draw=_visible),
    },
    scalars={
        "top_k": whole(lambda dims: (max(dims["n"] // 3, 1), 1, dims["n"] + 2, max(dims["n"] - 1, 1))),
        "offset": whole((0, 128), least=0, below=1 << 30),
    },
    result=Tensor("b s 1*k", ("int32",)),  # a product: no part of a row is the result of a part of the inputs
    derived=lambda dims, scalars: {"k": min(scalars["top_k"], dims["n"])},
    check=_check,
    workloads={
        "v4-flash.prefill-4k": {**V4, "s": 4096, "n": 1024, "top_k": 512, "offset": 4096},
        "v4-flash.decode-32k": {**V4, "s": 1, "n": 8192, "top_k": 512, "offset": 128},
        "v4-flash.decode-64x8k": {**V4, "b": 64, "s": 1, "n": 2048, "top_k": 512, "offset": 128},
        "v4-pro.prefill-8k": {**V4, "s": 8192, "n": 2048, "top_k": 1024, "offset": 8192},
        "v4-pro.decode-1m": {**V4, "s": 1, "n": 262144, "top_k": 1024, "offset": 128},
    },
    flops=lambda dims, batch: 2.0 * dims["b"] * dims["s"] * dims["n"] * dims["h"] * (dims["d"] + 1),
    sizes={"b": (1, 2, 3, 0), "s": (1, 2, 3, 0, 7, 13), "n": (7, 1, 0, 33, 130, 250), "h": (2, 1, 3, 17, 64, 0)},
    cases=({"b": 1, "s": 2, "h": 3, "d": 8, "n": 1540}, {"b": 1, "s": 5, "h": 65, "d": 19, "n": 129}),
)
def lightning_indexer(
    q: Array,
    keys: Array,
    weights: Array,
    top_k: int,
    visible: Array | None = None,
    offset: int = 0,
) -> Array:
    """The ``top_k`` entries of each query with the highest scores ``sum_h weights_h * relu(q_h . key)``.

    Args:
        q: ``[b, s, h, d]``, float16, bfloat16, float32 or float64, any strides.
        keys: ``[b, n, d]``, one for each compressed entry, dtype of ``q``.
        weights: ``[b, s, h]``, dtype of ``q`` or float32, of either sign; they carry every scale.
        top_k: how many entries to choose; of fewer all are.
        visible: ``[b, s]`` int32: a query may choose from entries 0 to ``visible - 1``, from all n if None.
        offset: added to every index, for entries that follow others in the list that attention reads.
        out: ``[b, s, min(top_k, n)]`` int32 to write into; allocated if None.

    Returns:
        ``[b, s, min(top_k, n)]`` int32: for each query its ``min(top_k, visible)`` chosen entries in ascending order,
        plus ``offset``; then -1. Scores are float32 (float64 for float64) and never rounded below that. Of equal scores
        the lower index wins; 0 and -0 are equal, and NaN is chosen after every number. A query that sees no more than
        ``top_k`` entries takes them all and none is scored.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``visible`` is negative or above n (always checked on the CPU; on a GPU under FLAGOPS_CHECK=1,
            otherwise such a count is clipped), or ranks, sizes or devices do not fit.

    Temporaries stay under ``FLAGOPS_BUDGET`` bytes whatever s and n are. Without a gradient: indices have none.
    Source: the DeepSeek-V4 report (arXiv 2606.19348), lightning indexer of compressed sparse attention.
    """
    out = np.empty((*q.shape[:2], min(top_k, keys.shape[1])), np.int32)
    for b, part in _parts(q, keys):
        seen = _seen(visible, b, part, q, keys)
        with np.errstate(all="ignore"):
            out[b, part] = _select(
                _scores(wide(q[b, part]), wide(keys[b]), wide(weights[b, part])), seen, top_k, offset
            )
    return out


def lightning_indexer_values(
    q: Any, keys: Any, weights: Any, top_k: int, visible: Any = None, offset: int = 0
) -> str | None:
    if visible is None or 0 in tuple(visible.shape):
        return None
    low, high = int(visible.min()), int(visible.max())
    if low >= 0 and high <= keys.shape[1]:
        return None
    return f"visible reaches from {low} to {high}, expected 0 to {keys.shape[1]}, the number of keys"


def _parts(q: Array, keys: Array) -> Iterator[tuple[int, slice]]:
    """Queries few enough to hold all their products."""
    step = max(1, _ELEMENTS // max(keys.shape[1] * q.shape[2], 1))
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1], step):
            yield b, slice(start, min(start + step, q.shape[1]))


def _seen(visible: Array | None, b: int, part: slice, q: Array, keys: Array) -> Array:
    if visible is None:
        return np.full(len(range(*part.indices(q.shape[1]))), keys.shape[1])
    return np.clip(visible[b, part].astype(np.int64), 0, keys.shape[1])


def _dots(q: Array, keys: Array) -> Array:
    """``[s, h, n]``"""
    return np.matmul(q.reshape(q.shape[0] * q.shape[1], q.shape[2]), keys.T).reshape(*q.shape[:2], len(keys))


def _scores(q: Array, keys: Array, weights: Array) -> Array:
    return np.matmul(weights[:, None], np.maximum(_dots(q, keys), 0))[:, 0]


def _select(scores: Array, seen: Array, top_k: int, offset: int) -> Array:
    n = scores.shape[1]
    ranked = np.argsort(-scores, axis=1, kind="stable")  # NaN last
    hidden = np.take_along_axis(np.arange(n) >= seen[:, None], ranked, 1)
    ranked = np.take_along_axis(ranked, np.argsort(hidden, axis=1, kind="stable"), 1)[:, :top_k]
    chosen = np.sort(np.where(np.arange(ranked.shape[1]) < seen[:, None], ranked, n), axis=1)
    return np.where(chosen < n, chosen + offset, -1)


def lightning_indexer_judge(got: Array, arguments: Mapping[str, Any]) -> None:
    """Each list well formed, and no entry left out that scores higher than one chosen, beyond the errors of both.

    Where all sums are exact, as of small integers, the list is the reference's.
    """
    q, keys, weights = (arguments[name] for name in ("q", "keys", "weights"))
    top_k, visible, offset = (arguments[name] for name in ("top_k", "visible", "offset"))
    dtype = accumulator(q.dtype.name)
    n = keys.shape[1]
    assert got.shape == (*q.shape[:2], min(top_k, n)), f"got shape {got.shape}"
    assert got.dtype == np.int32, f"got {got.dtype}"
    for b, part in _parts(q, keys):
        seen, chosen = _seen(visible, b, part, q, keys), got[b, part].astype(np.int64)
        count = np.minimum(seen, top_k)
        real = np.arange(chosen.shape[1]) < count[:, None]
        where = f"of queries {part.start} to {part.stop - 1} of sequence {b}"
        assert (chosen[~real] == -1).all(), f"an index {where} where -1 was expected"
        entries = np.where(real, chosen - offset, n + np.arange(chosen.shape[1]))
        low_high = ((entries >= 0) & (entries < seen[:, None])) | ~real
        assert low_high.all(), f"an index {where} is {chosen[~low_high][:1]}, which it cannot see"
        assert (np.diff(entries, axis=1) > 0).all(), f"indices {where} do not ascend"
        with np.errstate(all="ignore"):
            scores, error, exact = _judged(wide(q[b, part]), wide(keys[b]), wide(weights[b, part]), dtype)
        if exact:
            wrong = (chosen != _select(scores, seen, top_k, offset)).any(1)
            assert not wrong.any(), f"query {part.start + int(wrong.argmax())} of sequence {b} breaks a tie wrongly"
        taken = np.zeros((len(chosen), n + chosen.shape[1] + 1), bool)
        np.put_along_axis(taken, entries, True, 1)
        taken = taken[:, :n]
        left = ~taken & (np.arange(n) < seen[:, None])
        low, high = _ends(scores, error)
        best = np.max(low, axis=1, where=left, initial=-np.inf)
        worst = np.min(high, axis=1, where=taken, initial=np.inf)
        bad = best > worst
        assert not bad.any(), (
            f"query {part.start + int(bad.argmax())} of sequence {b} leaves out a score of at least "
            f"{best[bad][0]!s} for one of at most {worst[bad][0]!s}"
        )


def _ends(scores: Array, error: Array) -> tuple[Array, Array]:
    """The range of each score as numbers: NaN as -inf, and -inf as the lowest number."""
    lowest, unknown = -np.finfo(scores.dtype).max, ~np.isfinite(error)
    ranked = np.where(np.isnan(scores), -np.inf, np.maximum(scores, lowest))
    error = np.where(np.isfinite(scores), error, 0)
    return np.where(unknown, -np.inf, ranked - error), np.where(unknown, np.inf, ranked + error)


def _judged(q: Array, keys: Array, weights: Array, dtype: str) -> tuple[Array, Array, bool]:
    """Scores, how far float32 ones may be off (infinite: anywhere), and whether all of them are exact."""
    acc, (h, d) = unit(dtype), q.shape[1:]
    dots = _dots(q, keys)
    absolute = _dots(magnitude(q), magnitude(keys))
    dot_error = contraction_bound(dots, absolute, d, dtype)
    relu = np.maximum(dots, 0)
    scores = np.matmul(weights[:, None], relu)[:, 0]
    whole = [np.isfinite(x).all() and (x == np.rint(x)).all() for x in (q, keys, weights)]
    largest = np.matmul(magnitude(weights)[:, None], absolute)[:, 0]
    exact = all(whole) and float(absolute.max(initial=0)) < 2**24 and float(largest.max(initial=0)) < 2**24
    reach = magnitude(relu) + dot_error
    sure = np.where(np.isfinite(reach), reach, 0)
    total = np.matmul(magnitude(weights)[:, None], sure)[:, 0]
    passed = np.matmul(magnitude(weights)[:, None], np.where(np.isfinite(dot_error), dot_error, 0))[:, 0]
    error = contraction_bound(scores, total, h, dtype) + passed * (1 + 2 * h * acc.u)
    astray = ~np.isfinite(dot_error).all(1)
    astray |= ((~np.isfinite(weights))[:, :, None] & (magnitude(dots) <= dot_error)).any(1)  # 0 times infinity, or not
    return scores, np.where(astray | np.isnan(error), np.inf, error), exact
