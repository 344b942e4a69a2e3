"""The mixture of experts around its matrix products: the router and the gated activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import real, whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, unit, wide

V4_FLASH = {"d": 4096, "e": 256, "k": 6, "scale": 1.5, "dtype": "bfloat16"}
V4_PRO = {"d": 7168, "e": 384, "k": 6, "scale": 2.5, "dtype": "bfloat16"}
VOCABULARY = 129280
IDENTITY_ABOVE = 20.0


LIMIT = real((None, 10.0, 1.0, 0.25), above=0, finite=False, optional=True)


def arithmetic(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    """The arithmetic of a call: float32, or float64 where its first tensor is."""
    return (accumulator(next(iter(dtypes.values()))),)


def _parameter(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return (dtypes["x"], "float32") if dtypes["x"] in HALF else (dtypes["x"],)


def _drawn_table(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    chosen: Array = np.argsort(rng.random((shape[0], dims["e"])), axis=1)[:, : shape[1]]
    return chosen.astype(dtype)


def _drawn_tokens(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    return rng.integers(0, max(dims["v"], 1), shape).astype(dtype)


def _table_with_tokens(arguments: dict[str, Any], dims: Dims, rng: np.random.Generator) -> None:
    if arguments["table"] is None or arguments["tokens"] is None or not dims["v"]:
        arguments["table"] = arguments["tokens"] = None


def _router(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    if (arguments["table"] is None) != (arguments["tokens"] is None):
        return "table and tokens go together"
    if arguments["table"] is None and dims["k"] > dims["e"]:
        return f"top_k is {dims['k']}, but there are {dims['e']} experts"
    return None


@operator(
    tensors={
        "x": Tensor("t d", FLOATS),
        "weight": Tensor("e d", _parameter),
        "bias": Tensor("e", _parameter, optional=True),
        "table": Tensor("v k", ("int32", "int64"), optional=True, draw=_drawn_table),
        "tokens": Tensor("t", ("int32", "int64"), optional=True, draw=_drawn_tokens),
    },
    scalars={
        "top_k": whole(axis="k"),
        "scale": real((1.0, 1.5, 2.5)),
    },
    result={"weights": Tensor("t k", arithmetic), "indices": Tensor("t k", ("int32",))},
    separable=("t",),
    workloads={f"v4-flash.{t}": {"t": t, "v": 0, **V4_FLASH} for t in (1, 64, 4096)}
    | {f"v4-pro.{t}": {"t": t, "v": 0, **V4_PRO} for t in (1, 4096)}
    | {"v4-flash.hash-4096": {"t": 4096, "v": VOCABULARY, **V4_FLASH}},
    flops=lambda dims, batch: 2.0 * dims["t"] * dims["d"] * dims["e"],
    sizes={"t": (1, 2, 3, 0, 17, 65), "e": (8, 6, 7, 33, 130), "k": (6, 1, 2, 3), "v": (3, 1, 0, 7)},
    check=_router,
    fit=_table_with_tokens,
)
def moe_gate(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    table: Array | None = None,
    tokens: Array | None = None,
    top_k: int = 6,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """Which experts a token goes to, and with what weights.

    ``z = x @ weight.T``, ``score = sqrt(softplus(z))`` with softplus the identity above 20. Selected are the ``top_k``
    largest of ``score + bias``, or row ``tokens[t]`` of a table (hash layers, which read no bias). The weights are the
    scores of those selected, without bias, divided by their sum, times ``scale``.

    Args:
        x: ``[t, d]``, float16, bfloat16, float32 or float64, any strides.
        weight: ``[e, d]``, dtype of ``x``, or float32 for float16 and bfloat16.
        bias: ``[e]`` likewise, for the selection alone; None for none; ignored where a table selects.
        table: ``[v, top_k]`` int32 or int64, the experts of every token id; given exactly where ``tokens`` is. An
            expert named twice in a row is selected twice.
        tokens: ``[t]`` int32 or int64, token ids.
        top_k: experts for each token.
        scale: what the weights of a token sum to.
        out: ``(weights, indices)`` to write into; allocated if None.

    Returns:
        weights ``[t, top_k]`` float32 (float64 for float64) and indices ``[t, top_k]`` int32, by descending
        ``score + bias``, the lower expert first where they are equal, or in the order of the table. All arithmetic is
        float32 (float64 for float64), the product too. Where all selected scores are 0 (z below about -104 in float32)
        so are the weights. The row of a token with an infinite or NaN product or bias is unspecified, but names
        ``top_k`` different experts.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``top_k`` exceeds the experts, table and tokens do not come together, an entry of one of them is out
            of range (always checked on the CPU; on a GPU under FLAGOPS_CHECK=1, otherwise it is clamped), or sizes or
            devices do not fit.

    Source: the DeepSeek-V4 report (arXiv 2606.19348) and the gate of its inference code, which gives NaN where all
    scores vanish (transformers gives 0, as here).
    """
    with np.errstate(all="ignore"):
        scores = _score(np.matmul(wide(x), wide(weight).T))
        indices = _select(scores, bias, table, tokens, top_k)
        chosen = np.take_along_axis(scores, indices.astype(np.int64), axis=1)
        total = chosen.sum(1, keepdims=True)
        return np.where(total == 0, 0, chosen / total * scale), indices


def _score(z: Array) -> Array:
    return np.sqrt(np.where(z > IDENTITY_ABOVE, z, np.log1p(np.exp(np.minimum(z, IDENTITY_ABOVE)))))


def _select(scores: Array, bias: Array | None, table: Array | None, tokens: Array | None, top_k: int) -> Array:
    if table is not None and tokens is not None:
        return table[tokens.astype(np.int64)].astype(np.int32)
    biased = scores if bias is None else scores + wide(bias)
    return np.argsort(-biased, axis=1, kind="stable")[:, :top_k].astype(np.int32)


def moe_gate_values(
    x: Any, weight: Any, bias: Any, table: Any, tokens: Any, top_k: int = 6, scale: float = 1.0
) -> str | None:
    if table is None:
        return None
    for name, ids, count, of in (("tokens", tokens, len(table), "rows"), ("table", table, len(weight), "experts")):
        if 0 not in tuple(ids.shape):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= count:
                return f"{name} reaches from {low} to {high}, but there are {count} {of}"
    return None


def moe_gate_judge(got: tuple[Array, Array], arguments: Mapping[str, Any]) -> None:
    """Hold the selection to intervals of the biased scores, and the weights to intervals for what was selected."""
    weights, indices = got
    x, weight = wide(arguments["x"]), wide(arguments["weight"])
    bias, top_k, scale = arguments["bias"], arguments["top_k"], arguments["scale"]
    rows, count = x.shape[0], weight.shape[0]
    name = weights.dtype.name
    u, tiny = unit(name).u, float(np.finfo(name).tiny)
    assert weights.shape == indices.shape == (rows, top_k), f"shapes {weights.shape} and {indices.shape}"
    assert indices.dtype == np.int32, f"indices are {indices.dtype}"
    assert ((indices >= 0) & (indices < count)).all(), f"indices reach from {indices.min()} to {indices.max()}"
    with np.errstate(all="ignore"):
        z = np.matmul(x, weight.T)
        error = contraction_bound(z, np.matmul(magnitude(x), magnitude(weight).T), x.shape[1], name)
        spread = 1 + (2 * magnitude(z) + 16) * u
        jump = np.where(np.abs(z - IDENTITY_ABOVE) <= error, 2.1e-9, 0)
        low = np.sqrt(np.maximum(_score(z - error) ** 2 / spread - jump - tiny, 0)) * (1 - 2 * u)
        high = np.sqrt(_score(z + error) ** 2 * spread + jump + tiny) * (1 + 2 * u)
        certain = np.isfinite(z + error).all(1)
        if arguments["table"] is None:
            ranked = np.sort(indices, axis=1)
            assert (ranked[:, 1:] != ranked[:, :-1]).all(), "an expert was selected twice"
            added = 0 if bias is None else wide(bias)
            shift = 0 if bias is None else u * magnitude(wide(bias))
            first, last = (low + added) - u * low - shift, (high + added) + u * high + shift
            certain &= not np.isnan(added).any()
            _hold_selection(indices, first, last, certain)
            if _exact(x, weight):
                _hold_ties(indices, z, added, certain)
        else:
            expected = arguments["table"][arguments["tokens"].astype(np.int64)]
            assert (indices == expected).all(), "the indices are not those of the table"
        ids = indices.astype(np.int64)
        lowest, highest = (np.take_along_axis(bounds, ids, axis=1) for bounds in (low, high))
        least, most = (bounds.sum(1, keepdims=True) for bounds in (lowest, highest))
        slack = 1 + (top_k + 4) * u
        bottom = np.where(lowest > 0, lowest / (lowest + (most - highest)), 0) / slack
        top = np.where(highest > 0, highest / (highest + (least - lowest)), 0) * slack
        bottom = np.where(most <= 4 * top_k * math.sqrt(tiny), 0, bottom)  # all of them may have vanished
        bounds = np.sort(np.stack([bottom * scale, top * scale]), axis=0) + np.array([-tiny, tiny])[:, None, None]
        wrong = ~((weights >= bounds[0]) & (weights <= bounds[1])) & certain[:, None]
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(f"weight {at} is {weights[at]}, expected {bounds[0][at]} to {bounds[1][at]}")


def _hold_selection(indices: Array, first: Array, last: Array, certain: Array) -> None:
    """Nothing left out may certainly lie above what was selected, nor a later one above an earlier one."""
    ids = indices.astype(np.int64)
    left = first.copy()
    np.put_along_axis(left, ids, -np.inf, axis=1)
    chosen_last = np.take_along_axis(last, ids, axis=1)
    missed = left.max(1) > chosen_last.min(1)
    assert not (missed & certain).any(), f"row {int(np.argmax(missed & certain))} leaves out a larger expert"
    earlier = np.minimum.accumulate(chosen_last, axis=1)[:, :-1]
    swapped = (np.take_along_axis(first, ids, axis=1)[:, 1:] > earlier).any(1)
    assert not (swapped & certain).any(), f"row {int(np.argmax(swapped & certain))} is not in descending order"


def _exact(x: Array, weight: Array) -> bool:
    """Whether all products are sums of small integers, which no order of summation changes."""
    whole = all(bool(np.all(np.isfinite(y) & (y == np.rint(y)))) for y in (x, weight))
    return whole and bool(np.matmul(np.abs(x), np.abs(weight).T).max(initial=0) < 2**24)


def _hold_ties(indices: Array, z: Array, added: Any, certain: Array) -> None:
    """Of equal experts the lower come first; all of z are exact."""
    bias = np.broadcast_to(added, z.shape)
    for row in np.flatnonzero(certain):
        chosen = [int(i) for i in indices[row]]
        for place, expert in enumerate(chosen):
            same = np.flatnonzero((z[row, :expert] == z[row, expert]) & (bias[row, :expert] == bias[row, expert]))
            assert set(same) <= set(chosen[:place]), f"row {row}: expert {expert} precedes an equal one below it"


@operator(
    tensors={
        "gate": Tensor("... t n", FLOATS),
        "up": Tensor("... t n", "gate"),
        "weight": Tensor("... t", arithmetic, optional=True),
    },
    scalars={"limit": LIMIT},
    result=Tensor("... t n", "gate"),
    workloads={
        f"v4-{model}.{t}": {"t": t, "n": n, "dtype": "bfloat16", "limit": 10.0}
        for model, n in (("flash", 2048), ("pro", 3072))
        for t in (6, 4096)
    },
    flops=lambda dims, batch: 6.0 * math.prod(batch) * dims["t"] * dims["n"],
    inplace={"out": "gate"},
)
def swiglu(gate: Array, up: Array, weight: Array | None = None, limit: float | None = None) -> Array:
    """The gated activation of an expert: ``silu(min(gate, limit)) * clip(up, -limit, limit) * weight``.

    Args:
        gate: ``[..., t, n]``, float16, bfloat16, float32 or float64, any strides.
        up: ``[..., t, n]``, dtype of ``gate``; leading axes broadcast.
        weight: ``[..., t]`` float32 (float64 for float64), one factor for each row; None for none.
        limit: the clamp, positive; None for none. The gate has no lower limit.
        out: ``[..., t, n]`` to write into, dtype of ``gate``, which may be ``gate`` itself; allocated if None.

    Returns:
        ``[..., t, n]``, computed in float32 (float64 for float64) and rounded once. NaN passes through the clamp.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``limit`` is not positive, or ranks, sizes or devices do not fit.

    Source: DeepSeek-V4 report (arXiv 2606.19348) and the experts of its inference code.
    """
    return gated(wide(gate), wide(up), _column(weight), limit)


def _column(weight: Array | None) -> Any:
    return 1.0 if weight is None else wide(weight)[..., None]


def clamped(gate: Array, up: Array, limit: float | None) -> tuple[Array, Array]:
    """What is left of both after the clamp."""
    return (gate, up) if limit is None else (np.minimum(gate, limit), np.clip(up, -limit, limit))


def gated(gate: Array, up: Array, weight: Any, limit: float | None) -> Array:
    """`swiglu` on arrays that are wide already."""
    with np.errstate(all="ignore"):
        gate, up = clamped(gate, up, limit)
        return gate / (1 + np.exp(-gate)) * up * weight


def gated_error(gate: Array, up: Array, gate_error: Any, up_error: Any, weight: Any, limit: float | None) -> Array:
    """How far `gated` in float32 (float64 for longdouble) may be off, of inputs that are off by their errors.

    The slope of silu is at most 1.1. exp(-g) has a relative error that grows with g, and overflows where g is very low.
    """
    acc = unit("float64" if gate.dtype == np.longdouble else "float32")
    with np.errstate(all="ignore"):
        g, u = clamped(gate, up, limit)
        silu = magnitude(g / (1 + np.exp(-g)))
        off_g, off_u = (
            np.maximum(*(np.abs(moved[i] - (g, u)[i]) for moved in around))
            for around in [[clamped(gate + s * gate_error, up + s * up_error, limit) for s in (1, -1)]]
            for i in (0, 1)
        )
        arithmetic = (magnitude(g) + 12) * acc.u * silu
        arithmetic = arithmetic + np.where(g < 2 - math.log(acc.largest), silu, 0) + 4 * acc.tiny
        w = magnitude(np.asarray(weight))
        silu_error = 1.1 * off_g + arithmetic
        most = (silu + silu_error) * (magnitude(u) + off_u)
        error = silu_error * (magnitude(u) + off_u) + silu * off_u + 4 * acc.u * most + 4 * acc.tiny
        unclear = (silu <= silu_error) & ~np.isfinite(u)  # perhaps 0 times infinity
        unclear = unclear | ((silu * magnitude(u) <= error) & ~np.isfinite(weight))
        fits = ~unclear & (most * np.maximum(w, 1) < acc.largest / 2)
        return np.where(fits, w * error + 4 * acc.tiny, np.inf)


def swiglu_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    gate, up, weight = wide(arguments["gate"]), wide(arguments["up"]), _column(arguments["weight"])
    error = gated_error(gate, up, 0.0, 0.0, weight, arguments["limit"])
    out = unit(dtype)
    return error + out.u * (magnitude(exact) + error) + out.tiny
