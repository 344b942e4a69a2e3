"""Numbers of eight and four bits with shared scales, made: activations quantised, weights recoded. Defined bit for bit.

The Hadamard transform stands here too: it prepares what is quantised to four bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import dtype, flag, real, whole

from ._rounding import Array, round_to
from .dequantize import E2M1, EXPERTS

NARROW = ("bfloat16", "float16", "float32")
SCALES = ("float8_e8m0fnu", "float32")
E4M3_LARGEST, E2M1_LARGEST = 448.0, 6.0
E4M3_FLOOR, E2M1_FLOOR = np.float32(1e-4), np.float32(6 * 2.0**-126)
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])


def _scale_choices(dims: Mapping[str, Any]) -> tuple[str, ...]:
    return SCALES if dims.get("power_of_two", True) else SCALES[1:]


def _representable(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    if arguments["scale_dtype"] == "float32" or arguments["power_of_two"]:
        return None
    return "scale_dtype float8_e8m0fnu holds powers of two only; set power_of_two or take scale_dtype float32"


def _power_of_two(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    d = dims["d"]
    return None if d > 0 and d & (d - 1) == 0 else f"x has {d} channels, expected a power of two"


def _one_each(dims: Dims, batch: tuple[int, ...]) -> float:
    return 1.0 * math.prod(batch) * dims["g"] * dims["block"]


def _butterflies(dims: Dims, batch: tuple[int, ...]) -> float:
    return math.prod(batch) * dims["d"] * (1.0 + math.log2(dims["d"]))


def _spread(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Scale bytes as weights have them, from one end of the range to the other, and now and then anything."""
    spread = int(rng.choice([1, 8, 14, 15, 20, 256]))
    start = rng.integers(0, 257 - spread)
    scale = start + rng.integers(0, spread, shape)
    if rng.random() < 0.7:
        scale = np.minimum(scale, 254)
    return scale.astype(np.uint8)


def _blocks(x: Array, block: int) -> Array:
    return x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _scale(blocks: Array, floor: np.float32, largest: float, power_of_two: bool) -> Array:
    """One float32 scale for each block; NaN where the block holds a NaN or an infinity."""
    amax = np.maximum(np.abs(blocks).max(-1, initial=0), floor)
    scale = amax * np.float32(1 / largest)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return np.asarray(np.where(np.isfinite(amax), scale, np.float32(np.nan)))


def _e4m3(x: Array) -> Array:
    return np.clip(x, -E4M3_LARGEST, E4M3_LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _e2m1(x: Array) -> Array:
    """Codes 0..15: to nearest, ties to the even code, the sign kept; NaN is code 7."""
    size = np.abs(x)[..., None]
    code = ((size > _MIDPOINTS[::2]).sum(-1) + (size >= _MIDPOINTS[1::2]).sum(-1)).astype(np.uint8)
    return np.asarray(np.where(np.isnan(x), 7, code | np.uint8(8) * np.signbit(x))).astype(np.uint8)


def _fake(x: Array, scale: Callable[[Array], Array], narrow: Callable[[Array], Array], block: int) -> Array:
    with np.errstate(all="ignore"):
        blocks = _blocks(x, block)
        s = scale(blocks)[..., None]
        return round_to(narrow(blocks / s) * s, x.dtype.name).reshape(x.shape)


def _bytes(scale: Array) -> Array:
    """Powers of two, or NaN, as e8m0."""
    exponent = np.frexp(scale)[1] + 126
    return np.where(np.isnan(scale), 255, exponent).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


@operator(
    tensors={"x": Tensor("... g*block", NARROW)},
    scalars={
        "block": whole(axis="block"),
        "power_of_two": flag((True, False)),
        "scale_dtype": dtype(SCALES, _scale_choices),
    },
    result={
        "codes": Tensor("... g*block", ("float8_e4m3fn",), codes=True),
        "scale": Tensor("... g", "scale_dtype", codes=True),
    },
    workloads={
        "v4-flash.decode": {"batch": (1,), "g": 32, "block": 128},
        "v4-flash.prefill-4k": {"batch": (4096,), "g": 32, "block": 128},
        "v4-pro.prefill-4k": {"batch": (4096,), "g": 56, "block": 128},
    },
    flops=_one_each,
    exact=True,
    sizes={"block": (128, 64, 1, 5, 32, 40), "g": (1, 2, 3, 0, 7, 33)},
    check=_representable,
)
def fp8_quantize(
    x: Array, block: int = 128, power_of_two: bool = True, scale_dtype: str = "float8_e8m0fnu"
) -> tuple[Array, Array]:
    """Activations as e4m3 codes with one scale for each block of a row.

    ``amax = max(max |x|, 1e-4)``, the scale ``s = amax * float32(1/448)``, rounded up to a power of two if asked for,
    the codes ``e4m3(clamp(x / s, -448, 448))``; all in float32.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32, any strides.
        block: channels that share a scale; divides k.
        power_of_two: round scales up to powers of two, as the e8m0 format needs.
        scale_dtype: ``"float8_e8m0fnu"`` or ``"float32"``, or the dtype itself.
        out: ``(codes, scale)`` to write into; allocated if None.

    Returns:
        codes ``[..., k]`` float8_e4m3fn, rounded to nearest even, -0 kept; scale ``[..., k / block]``. A block of zeros
        has the scale of 1e-4. A NaN or an infinity makes its whole block NaN, codes and scale.

    Raises:
        TypeError: x is no array or of another dtype, or a scalar is of the wrong kind.
        ValueError: block does not divide k, or scale_dtype is float8_e8m0fnu without power_of_two.

    Source: the DeepSeek-V3 and V4 reports (arXiv 2412.19437, section 3.3; 2606.19348); OCP 8-bit Floating Point 1.0.
    """
    with np.errstate(all="ignore"):
        blocks = _blocks(x, block)
        scale = _scale(blocks, E4M3_FLOOR, E4M3_LARGEST, power_of_two)
        codes = _e4m3(blocks / scale[..., None]).reshape(x.shape)
    return codes, scale if scale_dtype == "float32" else _bytes(scale)


@operator(
    tensors={"x": Tensor("... g*block", NARROW)},
    scalars={
        "block": whole(axis="block"),
        "power_of_two": flag((True, False)),
    },
    result=Tensor("... g*block", "x"),
    workloads={
        "v4.kv.decode": {"batch": (1,), "g": 7, "block": 64},
        "v4.kv.prefill-4k": {"batch": (4096,), "g": 7, "block": 64},
    },
    flops=_one_each,
    inplace={"out": "x"},
    exact=True,
    sizes={"block": (64, 128, 1, 5, 32, 40), "g": (1, 2, 3, 0, 7, 33)},
)
def fp8_fake_quantize(x: Array, block: int = 64, power_of_two: bool = True) -> Array:
    """What `fp8_quantize` and dequantisation make of x: ``e4m3(x / s) * s`` in the dtype of x.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32, any strides.
        block: channels that share a scale; divides k.
        power_of_two: round scales up to powers of two.
        out: ``[..., k]`` of the dtype of x to write into, also x itself; allocated if None.

    Returns:
        ``[..., k]``, the product in float32 and then rounded to the dtype of x. With power_of_two both roundings are
        exact in bfloat16 and float32 unless the largest magnitude of a block rounds past the format's range and
        becomes an infinity; applied again, it changes nothing. A NaN or an infinity makes its whole block NaN.

    Raises:
        TypeError: x is no array or of another dtype, or a scalar is of the wrong kind.
        ValueError: block does not divide k, or out overlaps x without being x.

    Source: as for `fp8_quantize`.
    """
    return _fake(
        x,
        lambda blocks: _scale(blocks, E4M3_FLOOR, E4M3_LARGEST, power_of_two),
        lambda ratio: _e4m3(ratio).astype(np.float32),
        block,
    )


@operator(
    tensors={"x": Tensor("... g*block", NARROW)},
    scalars={"block": whole(least=2, even=True, axis="block")},
    result={
        "packed": Tensor("... g*half", ("uint8",)),
        "scale": Tensor("... g", ("float8_e8m0fnu",), codes=True),
    },
    workloads={
        "v4.indexer.q.decode": {"batch": (1, 64), "g": 4, "block": 32},
        "v4.indexer.q.prefill-4k": {"batch": (4096, 64), "g": 4, "block": 32},
    },
    flops=_one_each,
    exact=True,
    sizes={"block": (32, 16, 2, 6, 64), "g": (1, 2, 3, 0, 7, 33)},
    derived=lambda dims, scalars: {"half": scalars["block"] // 2},
)
def fp4_quantize(x: Array, block: int = 32) -> tuple[Array, Array]:
    """Activations as packed e2m1 codes with one power of two for each block of a row (MXFP4).

    ``amax = max(max |x|, 6 * 2^-126)``, ``s = 2^ceil(log2(amax * float32(1/6)))``, the codes
    ``e2m1(clamp(x / s, -6, 6))``; all in float32.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32, any strides.
        block: channels that share a scale; even, divides k. The checkpoints and `fp4_dequantize` have 32.
        out: ``(packed, scale)`` to write into; allocated if None.

    Returns:
        packed ``[..., k / 2]`` uint8, element 2j in the low nibble of byte j and 2j+1 in the high one, rounded to
        nearest, ties to the even code, the sign kept; scale ``[..., k / block]`` float8_e8m0fnu. The format has no NaN:
        a NaN or an infinity makes the scale of its block NaN, and all codes of the block 7.

    Raises:
        TypeError: x is no array or of another dtype, or block is no whole number.
        ValueError: block is odd or does not divide k.

    Source: OCP Microscaling Formats 1.0; the indexer of the DeepSeek-V4 report (arXiv 2606.19348).
    """
    with np.errstate(all="ignore"):
        blocks = _blocks(x, block)
        scale = _scale(blocks, E2M1_FLOOR, E2M1_LARGEST, True)
        codes = _e2m1(blocks / scale[..., None]).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, _bytes(scale)


@operator(
    tensors={"x": Tensor("... g*block", NARROW)},
    scalars={"block": whole(axis="block")},
    result=Tensor("... g*block", "x"),
    workloads={
        "v4.indexer.q.decode": {"batch": (1, 64), "g": 4, "block": 32},
        "v4.indexer.q.prefill-4k": {"batch": (4096, 64), "g": 4, "block": 32},
    },
    flops=_one_each,
    inplace={"out": "x"},
    exact=True,
    sizes={"block": (32, 16, 1, 5, 64), "g": (1, 2, 3, 0, 7, 33)},
)
def fp4_fake_quantize(x: Array, block: int = 32) -> Array:
    """What `fp4_quantize` and dequantisation make of x: ``e2m1(x / s) * s`` in the dtype of x.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32, any strides.
        block: channels that share a scale; divides k.
        out: ``[..., k]`` of the dtype of x to write into, also x itself; allocated if None.

    Returns:
        ``[..., k]``, exact in bfloat16 and float32 unless the largest magnitude of a block rounds past the format's
        range and becomes an infinity; float16 rounds what lies below its normal range. Applied again, it changes
        nothing. A NaN or an infinity makes its whole block NaN.

    Raises:
        TypeError: x is no array or of another dtype, or block is no whole number.
        ValueError: block does not divide k, or out overlaps x without being x.

    Source: as for `fp4_quantize`.
    """
    return _fake(
        x,
        lambda blocks: _scale(blocks, E2M1_FLOOR, E2M1_LARGEST, True),
        lambda ratio: np.where(np.isnan(ratio), np.nan, E2M1[_e2m1(ratio)]).astype(np.float32),
        block,
    )


@operator(
    tensors={
        "packed": Tensor("128*p 64*q", ("uint8", "int8", "float4_e2m1fn_x2"), codes=True),
        "scale": Tensor("128*p 4*q", ("uint8", "float8_e8m0fnu"), codes=True, draw=_spread),
    },
    result={
        "weight": Tensor("128*p 128*q", ("float8_e4m3fn",), codes=True),
        "scales": Tensor("p q", ("float8_e8m0fnu",), codes=True),
        "lossless": Tensor("p q", ("bool",)),
    },
    workloads={
        name: {"p": EXPERTS[name][0] // 128, "q": EXPERTS[name][1] // 128} for name in ("v4-flash.w1", "v4-pro.w1")
    },
    flops=lambda dims, batch: 16384.0 * dims["p"] * dims["q"],
    separable=False,
    exact=True,
    sizes={"p": (1, 2, 0), "q": (1, 2, 0, 5)},
)
def fp4_to_fp8(packed: Array, scale: Array) -> tuple[Array, Array, Array]:
    """MXFP4 weights recoded as e4m3 with one scale for each 128 x 128 block.

    The new scale is the largest of the block's 512 scales divided by 2^6, and at least 2^-127, the least that e8m0 has;
    the weights are ``e4m3(v * 2^(old exponent - new exponent))``.

    Args:
        packed: ``[R, K/2]`` uint8, int8 or float4_e2m1fn_x2, the low nibble first; R and K are multiples of 128.
        scale: ``[R, K/32]`` float8_e8m0fnu or its bytes.
        out: ``(weight, scale, lossless)`` to write into; allocated if None.

    Returns:
        weight ``[R, K]`` float8_e4m3fn, -0 kept; scale ``[R/128, K/128]`` float8_e8m0fnu; lossless ``[R/128, K/128]``
        bool, whether the block stands for exactly the values it had. That is so whenever its scales span at most 2^14.
        One NaN scale makes the whole block NaN, weights and scale, and not lossless.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: R or K is no multiple of 128, or sizes or devices do not fit.

    Source: the DeepSeek-V4 report (arXiv 2606.19348), section 3.4.
    """
    rows, columns = packed.shape[0] // 128, packed.shape[1] // 64
    byte = packed.view(np.uint8)
    codes = np.stack([byte & 15, byte >> 4], axis=-1).reshape(rows, 128, columns, 4, 32)
    old = scale.view(np.uint8).astype(np.int64).reshape(rows, 128, columns, 4)
    new = np.maximum(old.max(axis=(1, 3)) - 6, 0)
    nan = (old == 255).any(axis=(1, 3))
    exact = np.ldexp(E2M1[codes], (old - new[:, None, :, None])[..., None])
    exact[np.broadcast_to(nan[:, None, :, None, None], exact.shape)] = np.nan
    weight = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    lossless = (weight.astype(np.float64) == exact).all(axis=(1, 3, 4))
    scales = np.where(nan, 255, new).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return weight.reshape(128 * rows, 128 * columns), scales, lossless


@operator(
    tensors={"x": Tensor("... d", FLOATS)},
    scalars={"scale": real((None, 1.0, -0.5, 0.3), optional=True)},
    result=Tensor("... d", "x"),
    workloads={
        "v4.indexer.q.decode": {"batch": (1, 64), "d": 128, "dtype": "bfloat16"},
        "v4.indexer.q.prefill-4k": {"batch": (4096, 64), "d": 128, "dtype": "bfloat16"},
    },
    flops=_butterflies,
    inplace={"out": "x"},
    exact=True,
    sizes={"d": (128, 64, 1, 2, 4, 8, 16, 32, 256, 1024)},
    check=_power_of_two,
)
def hadamard(x: Array, scale: float | None = None) -> Array:
    """The Walsh-Hadamard transform of each row: ``y_i = scale * sum_j (-1)^popcount(i & j) x_j``.

    Args:
        x: ``[..., d]``, float16, bfloat16, float32 or float64, any strides; d is a power of two.
        scale: factor of the sums, rounded to their dtype; None for ``d ** -0.5``, which makes the transform its own
            inverse.
        out: ``[..., d]`` of the dtype of x to write into, also x itself; allocated if None.

    Returns:
        ``[..., d]``: sums of float32 (float64 for float64), rounded once. The sums are defined bit for bit: sums and
        differences of elements 1 apart, then of those 2, 4, ... d/2 apart.

    Raises:
        TypeError: x is no array or of another dtype.
        ValueError: d is no power of two, the scale is not finite, or out overlaps x without being x.

    Source: Fino and Algazi, Unified matrix treatment of the fast Walsh-Hadamard transform (1976).
    """
    d = x.shape[-1]
    with np.errstate(all="ignore"):
        y: Array = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        step = 1
        while step < d:
            pairs = y.reshape(*x.shape[:-1], d // (2 * step), 2, step)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            y = np.stack([np.add(low, high), np.subtract(low, high)], axis=-2).reshape(x.shape)
            step *= 2
        return round_to(np.multiply(y, d**-0.5 if scale is None else scale, dtype=y.dtype), x.dtype.name)
