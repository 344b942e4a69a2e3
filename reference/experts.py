"""Matrix products of a mixture of experts: rows grouped by expert, and whole experts from hidden states to output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flagops.arrays import FLOATS, HALF
from flagops.operator import Dims, Tensor, operator

from ._rounding import Array, accumulator, contraction_bound, flushed, magnitude, round_to, unit, wide
from .dequantize import E2M1, e8m0
from .moe import LIMIT, arithmetic, gated, gated_error

V4_FLASH = {"d": 4096, "i": 2048, "limit": 10.0}
V4_PRO = {"d": 7168, "i": 3072, "limit": 10.0}
BLOCK = 128
GROUP = 32
PACKED = ("uint8", "int8", "float4_e2m1fn_x2")


def _drawn_offsets(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    ends = np.sort(rng.integers(0, dims["m"] + 1, shape))
    if shape[0] and rng.random() < 0.5:
        ends[-1] = dims["m"]
    return ends.astype(dtype)


@operator(
    tensors={
        "a": Tensor("m k", FLOATS),
        "b": Tensor("e k n", "a"),
        "offsets": Tensor("e", ("int32", "int64"), draw=_drawn_offsets),
    },
    result=Tensor("m n", "a"),
    workloads={
        f"v4-flash.{name}.{m}": {"m": m, "n": n, "k": k, "e": 8, "dtype": "bfloat16", "transposed": "b"}
        for name, n, k in (("w13", 4096, 4096), ("w2", 4096, 2048))
        for m in (6, 768)
    },
    flops=lambda dims, batch: 2.0 * dims["m"] * dims["n"] * dims["k"],
    integral=True,
    separable=False,
    sizes={"e": (3, 1, 0, 7), "m": (1, 2, 3, 0, 17, 130), "k": (1, 2, 3, 0, 16, 33, 130, 520)},
)
def grouped_matmul(a: Array, b: Array, offsets: Array) -> Array:
    """A product for each expert: rows of ``a`` sorted by expert, each group with a matrix of its own.

    Args:
        a: ``[m, k]``, float16, bfloat16, float32 or float64, any strides.
        b: ``[e, k, n]``, dtype of ``a``.
        offsets: ``[e]`` int32 or int64, where the rows of each expert end: expert i has rows ``offsets[i - 1]`` (0 for
            the first) to ``offsets[i]``. Experts may have no rows.
        out: ``[m, n]`` to write into, dtype of ``a``; allocated if None.

    Returns:
        ``[m, n]``, accumulated in float32 (float64 for float64) and rounded once. Rows past the last offset are 0;
        torch leaves them as they were allocated.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: offsets descend, start below 0 or end past m (always checked on the CPU; on a GPU under
            FLAGOPS_CHECK=1, otherwise such rows are unspecified, but nothing outside is touched), or ranks, sizes or
            devices do not fit.

    Source: ``torch._grouped_mm`` of a matrix with a stack of them.
    """
    return _grouped(wide(a), wide(b), offsets)


def _grouped(a: Array, b: Array, offsets: Array) -> Array:
    out = np.zeros((a.shape[0], b.shape[2]), a.dtype)
    start = 0
    with np.errstate(invalid="ignore"):
        for expert, stop in enumerate(int(end) for end in offsets):
            out[start:stop] = np.matmul(a[start:stop], b[expert])
            start = stop
    return out


def grouped_matmul_values(a: Any, b: Any, offsets: Any) -> str | None:
    ends = [0, *(int(end) for end in offsets), a.shape[0]]
    for expert, (before, after) in enumerate(itertools.pairwise(ends)):
        if after < before:
            last = f"the {a.shape[0]} rows of a" if expert == len(ends) - 2 else f"offsets[{expert}] = {after}"
            return f"offsets must ascend from 0 to at most the rows of a, got {before} before {last}"
    return None


def grouped_matmul_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    (a, b), offsets = (wide(arguments[name]) for name in "ab"), arguments["offsets"]
    bound = contraction_bound(exact, _grouped(magnitude(a), magnitude(b), offsets), a.shape[1], dtype)
    bound += flushed(a, b, a.shape[1], dtype, lambda left, right: _grouped(left, right, offsets))
    bound[int(offsets[-1]) if len(offsets) else 0 :] = 0
    return bound


def _weights(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return (dtypes["x"], "float8_e4m3fn", *PACKED)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _layout(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    """Whether widths and scales are those of the format of the weights."""
    d, i, experts = dims["d"], dims["i"], dims["e"]
    kind = str(arguments["gate_up"].dtype).removeprefix("torch.")
    packed = kind in PACKED
    for name, scales, rows, width, got in (
        ("gate_up", "gate_up_scale", 2 * i, d, dims["d_stored"]),
        ("down", "down_scale", d, i, dims["i_stored"]),
    ):
        scale = arguments[scales]
        if packed and width % GROUP:
            return f"{name} is packed FP4, whose {width} columns are no multiple of {GROUP}"
        stored = width // 2 if packed else width
        if got != stored:
            return f"{name} has {got} columns, expected {stored} in {kind}"
        if kind != "float8_e4m3fn" and not packed:
            if scale is not None:
                return f"{scales} belongs to FP8 and FP4 weights, {name} is {kind}"
            continue
        shape = (experts, rows, width // GROUP) if packed else (experts, _blocks(rows), _blocks(width))
        if scale is None:
            return f"{scales} is missing: {name} is {kind}"
        if tuple(scale.shape) != shape:
            return f"{scales} has shape {tuple(scale.shape)}, expected {shape}"
        if packed and "float32" in str(scale.dtype):
            return f"{scales} is float32; scales of FP4 weights are powers of two"
    return None


def _drawn_ids(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    used = rng.integers(0, dims["e"], max(dims["e"] // 2, 1)) if rng.random() < 0.3 else np.arange(dims["e"])
    return used[rng.integers(0, len(used), shape)].astype(dtype)


def _formatted(arguments: dict[str, Any], dims: Dims, rng: np.random.Generator) -> None:
    """Packed weights at half their width, scales of the shape that the format asks for, none for plain weights."""
    d, i, experts = dims["d"], dims["i"], dims["e"]
    kind = arguments["gate_up"].dtype.name
    packed = kind in PACKED
    if packed and (d % GROUP or i % GROUP):
        kind, packed = arguments["x"].dtype.name, False
        for name in ("gate_up", "down"):
            arguments[name] = rng.standard_normal(arguments[name].shape).astype(arguments["x"].dtype)
    for name, scales, rows, width in (("gate_up", "gate_up_scale", 2 * i, d), ("down", "down_scale", d, i)):
        if kind in FLOATS:
            arguments[scales] = None
            continue
        if packed:
            arguments[name] = np.ascontiguousarray(arguments[name][..., : width // 2])
        else:  # no NaN among the codes, else every result would be
            codes = arguments[name].view(np.uint8)
            arguments[name] = np.where(codes & 127 == 127, 0, codes).view(arguments[name].dtype)
        shape = (experts, rows, width // GROUP) if packed else (experts, _blocks(rows), _blocks(width))
        old = arguments[scales]
        if old is not None and old.dtype == np.float32 and not packed:
            arguments[scales] = rng.uniform(2**-8, 2**-5, shape).astype(np.float32)
            continue
        made = rng.integers(120, 128, shape) if packed else rng.integers(114, 123, shape)
        if made.size < 4096 and rng.random() < 0.1:  # not at real sizes, where nothing but NaN would be left
            made[rng.random(shape) < 0.01] = 255
        dtype = np.dtype(ml_dtypes.float8_e8m0fnu) if old is None or old.dtype == np.float32 else old.dtype
        arguments[scales] = made.astype(np.uint8).view(dtype)


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    return 6.0 * dims["t"] * dims["k"] * dims["d"] * dims["i"]


SCALES = ("float8_e8m0fnu", "uint8", "float32")


@operator(
    tensors={
        "x": Tensor("t d", ("bfloat16", "float16", "float32", "float64")),
        "weights": Tensor("t k", arithmetic),
        "indices": Tensor("t k", ("int32", "int64"), draw=_drawn_ids),
        "gate_up": Tensor("e 2*i d_stored", _weights, codes=True),
        "down": Tensor("e d i_stored", "gate_up", codes=True),
        "gate_up_scale": Tensor("e a b", SCALES, optional=True, codes=True),
        "down_scale": Tensor("e f g", SCALES, optional=True, codes=True),
        "shared": Tensor("t d", "x", optional=True),
    },
    scalars={"limit": LIMIT},
    result=Tensor("t d", "x"),
    workloads={
        f"v4-{model}.{name}.{t}": {"t": t, "k": 6, "e": 8, "dtype": dtype, **sizes}
        for model, sizes in (("flash", V4_FLASH), ("pro", V4_PRO))
        for name, dtype in (("bf16", "bfloat16"), ("fp4", "uint8"), ("fp8", "float8_e4m3fn"))
        for t in (1, 256)
        if model == "flash" or name == "fp4"
    }
    | {f"v4-flash.fp4.{t}": {"t": t, "k": 6, "e": 8, "dtype": "uint8", **V4_FLASH} for t in (16, 64)},
    flops=_flops,
    sizes={"t": (1, 2, 3, 0, 17), "k": (1, 2, 6), "e": (3, 1, 8), "d": (32, 1, 64, 7, 160), "i": (32, 1, 64, 33, 160)}
    | dict.fromkeys(("d_stored", "i_stored", "a", "b", "f", "g"), (1,)),
    derived=lambda dims, scalars: {
        "d_stored": dims["d"], "i_stored": dims["i"],
        "a": _blocks(2 * dims["i"]), "b": _blocks(dims["d"]), "f": _blocks(dims["d"]), "g": _blocks(dims["i"]),
    },
    check=_layout,
    fit=_formatted,
)  # fmt: skip
def moe_experts(
    x: Array,
    weights: Array,
    indices: Array,
    gate_up: Array,
    down: Array,
    gate_up_scale: Array | None = None,
    down_scale: Array | None = None,
    limit: float | None = None,
    shared: Array | None = None,
) -> Array:
    """The routed experts of a layer: each token through the experts selected for it, and the weighted sum.

    For each token t and each slot: ``g, u = gate_up[e] @ x[t]``, ``h = swiglu(g, u, weights[t, slot], limit)``,
    ``y[t] += down[e] @ h`` with ``e = indices[t, slot]``.

    Args:
        x: ``[t, d]``, float16, bfloat16, float32 or float64, any strides.
        weights: ``[t, k]`` float32 (float64 for float64), the routing weights.
        indices: ``[t, k]`` int32 or int64, expert ids. An id that a row holds twice counts twice.
        gate_up: ``[e, 2*i, d]``, the gate's rows first; in the dtype of ``x``, in float8_e4m3fn, or packed FP4
            ``[e, 2*i, d/2]`` in uint8, int8 or float4_e2m1fn_x2 (d and i are then multiples of 32).
        down: ``[e, d, i]``, or ``[e, d, i/2]`` packed, in the format of ``gate_up``.
        gate_up_scale: of FP8 weights one for each block of 128 rows and 128 columns, float8_e8m0fnu, its bytes in
            uint8, or float32; of FP4 weights ``[e, 2*i, d/32]`` float8_e8m0fnu or its bytes; None for plain weights.
        down_scale: likewise, ``[e, d, i/32]`` for FP4.
        limit: the clamp of `swiglu`, None for none.
        shared: ``[t, d]``, what joins the sum before it is rounded, as the shared expert's output; None for nothing.
        out: ``[t, d]`` to write into, dtype of ``x``; allocated if None.

    Returns:
        ``[t, d]``. Products are accumulated in float32 (float64 for float64); g and u, h with its routing weight, and
        the output of each expert are rounded to the dtype of ``x`` (float16 and bfloat16); the outputs of a token are
        added in float32 in the order of their expert ids, and the sum is rounded once. Where weights are FP8 or FP4, x
        and the rounded h are first quantised to FP8 in blocks of 128 with powers of two as scales; a block that holds
        a NaN or an infinity becomes NaN.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: an index is not that of an expert (always checked on the CPU; on a GPU under FLAGOPS_CHECK=1,
            otherwise it counts for nothing), scales are missing or not of the format, or sizes or devices do not fit.

    Packed weights are never expanded as a whole. Source: the DeepSeek-V4 report (arXiv 2606.19348) and the experts of
    its inference code.
    """
    return _compose(x, weights, indices, gate_up, down, gate_up_scale, down_scale, limit, shared)[0]


def moe_experts_values(
    x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, *rest: Any, **named: Any
) -> str | None:
    if 0 in tuple(indices.shape):
        return None
    low, high = int(indices.min()), int(indices.max())
    if low >= 0 and high < gate_up.shape[0]:
        return None
    return f"indices reach from {low} to {high}, but there are {gate_up.shape[0]} experts"


def moe_experts_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    value, error = _compose(**arguments, track=True)
    out, acc = unit(dtype), unit(accumulator(dtype))
    bound = error if dtype not in HALF else error + out.u * (magnitude(value) + error) + out.tiny
    return np.where(np.isnan(bound), np.inf, bound + acc.tiny)


def _compose(
    x: Array, weights: Array, indices: Array, gate_up: Array, down: Array, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any, track: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """The layer with its roundings, and how far float32 sums (float64 for float64) may be off: all in intervals."""
    dtype = x.dtype.name
    acc = unit(accumulator(dtype))
    quantised = gate_up.dtype.name not in FLOATS
    factors = "bfloat16" if quantised else dtype
    value = np.zeros(x.shape, wide(x).dtype) if shared is None else wide(shared).copy()
    error, absolute, extra = np.zeros_like(value), magnitude(value), np.zeros_like(value)
    routing = wide(weights)
    with np.errstate(all="ignore"):
        given = _quantised(wide(x), 0.0)[0] if quantised else wide(x)
        for expert, rows, slots in _pairs(indices):
            i = gate_up.shape[1] // 2
            w13 = _expanded(gate_up, gate_up_scale, expert, x.shape[1])
            w2 = _expanded(down, down_scale, expert, i)
            both, off = _linear(given[rows], 0.0, w13, factors, dtype, track)
            g, u = both[:, :i], both[:, i:]
            weight = routing[rows, slots][:, None]
            h, h_off = gated(g, u, weight, limit), np.zeros_like(g)
            if track:
                h_off = gated_error(g, u, off[:, :i], off[:, i:], weight, limit)
                h_off[~(np.isfinite(g) & np.isfinite(u))] = np.inf
            h, h_off = _rounded(h, h_off, dtype)
            if quantised:
                h, h_off = _quantised(h, h_off)
            if track:
                h_off[~np.isfinite(h).all(1)] = np.inf
            y, y_off = _linear(h, h_off, w2, factors, dtype, track)
            np.add.at(value, rows, y)
            if track:
                np.add.at(error, rows, y_off)
                np.add.at(absolute, rows, magnitude(y))
                np.add.at(extra, rows, ~np.isfinite(y) & ~np.isfinite(y_off))
        terms = indices.shape[1] + 2
        error += terms * acc.u * (absolute + error)
        error = np.where(absolute + error < acc.largest / 2, error, np.inf)
    return value, error


def _pairs(indices: Array) -> Iterator[tuple[int, Array, Array]]:
    """For each expert in ascending order the tokens that go there and by which slot."""
    for expert in np.unique(indices):
        rows, slots = np.nonzero(indices == expert)
        yield int(expert), rows, slots


def _expanded(weights: Array, scales: Array | None, expert: int, width: int) -> Array:
    """The weights of one expert. Kernels get the codes of either format as bytes; the width tells which it is."""
    weight = weights[expert]
    if scales is None:
        return wide(weight)
    scale = e8m0(scales[expert])
    if weight.shape[1] == width:
        rows = np.repeat(np.repeat(scale, BLOCK, axis=0)[: weight.shape[0]], BLOCK, axis=1)
        return weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * rows[:, :width]
    codes = weight.view(np.uint8)
    values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(codes.shape[0], width)
    return values * np.repeat(scale, GROUP, axis=1)


def _linear(x: Array, x_off: Any, weight: Array, factors: str, dtype: str, track: bool) -> tuple[Array, Array]:
    """``x @ weight.T``, whose factors a dtype holds, rounded to another, and how far it may be off."""
    weight = weight.astype(x.dtype)
    y = np.matmul(x, weight.T)
    if not track:
        return _rounded(y, np.zeros_like(y), dtype)
    acc = unit(accumulator(dtype))
    terms = x.shape[1] + 4
    x_off = np.broadcast_to(np.asarray(x_off, x.dtype), x.shape)
    size = magnitude(weight).T
    absolute = np.matmul(magnitude(x) + x_off, size)
    error = np.matmul(x_off, size) + terms * acc.u * absolute + terms * acc.tiny
    error += flushed(x, weight.T, terms, factors)
    unclear = np.matmul((magnitude(x) <= x_off) * 1.0, ~np.isfinite(weight.T) * 1.0) > 0  # perhaps 0 times infinity
    beyond = (magnitude(x) + x_off).max(1, keepdims=True, initial=0) > acc.largest  # rounded up to 2^128 as FP8
    error = np.where(unclear | np.isnan(error) | (absolute > acc.largest / 2) | beyond, np.inf, error)
    return _rounded(y, error, dtype)


def _rounded(y: Array, error: Array, dtype: str) -> tuple[Array, Array]:
    """An intermediate in a half format, and how far the rounding of anything within its error lies from it."""
    if dtype not in HALF:
        return y, error
    rounded, above, below = (wide(round_to(moved, dtype)) for moved in (y, y + error, y - error))
    off = np.maximum(above - rounded, rounded - below)
    off = np.where(np.isfinite(above) & np.isfinite(below), off, np.inf)
    return rounded, np.where(np.isfinite(y), off, error)


def _quantised(x: Array, error: Any) -> tuple[Array, Array]:
    """Values in FP8 under a power of two for each block of 128, and how far those of anything within the error lie.

    Some rows at a time: those of one channel are 128 wide meanwhile.
    """
    off = np.broadcast_to(np.asarray(error, x.dtype), x.shape)
    rows = max(1, (1 << 22) // (BLOCK * max(_blocks(x.shape[1]), 1)))
    parts = [_quantised_rows(x[at : at + rows], off[at : at + rows]) for at in range(0, max(len(x), 1), rows)]
    values, moved = (np.concatenate(each) for each in zip(*parts, strict=True))
    return values, moved


def _quantised_rows(x: Array, off: Array) -> tuple[Array, Array]:
    width = x.shape[1]
    padded = [np.pad(y, ((0, 0), (0, -width % BLOCK))) for y in (x, off)]
    x, off = (y.reshape(y.shape[0], _blocks(width), BLOCK) for y in padded)
    scales = [
        _scale(np.abs(moved).max(-1, keepdims=True)) for moved in (x, np.abs(x) + off, np.maximum(np.abs(x) - off, 0))
    ]
    values = [_fp8(x + s * off, scale) for scale in scales for s in (0, 1, -1)]
    result = values[0]
    moved = np.maximum.reduce([np.abs(value - result) for value in values])
    shape = (x.shape[0], _blocks(width) * BLOCK)
    return result.reshape(shape)[:, :width], moved.reshape(shape)[:, :width]


def _scale(largest: Array) -> Array:
    """2^ceil(log2(largest / 448)), as float32 arithmetic gives it."""
    ratio = np.maximum(largest, 1e-4).astype(np.float32) * np.float32(1 / 448)
    mantissa, exponent = np.frexp(ratio)
    return np.where(np.isfinite(ratio), np.ldexp(1.0, exponent - (mantissa == 0.5)), np.nan)


def _fp8(x: Array, scale: Array) -> Array:
    codes = np.clip(x / scale, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(x.dtype) * scale
