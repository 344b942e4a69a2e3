"""Products of FP8 or float activations with FP8 or packed FP4 weights, the codes with block scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flagops.arrays import numpy_dtype
from flagops.operator import Dims, Tensor, operator

from ._rounding import Array, least, magnitude, unit, wide
from .dequantize import DTYPE, E2M1, EXPERTS, e8m0

BLOCK = 128
CODES = ("float8_e4m3fn", "uint8")
SCALES = ("float8_e8m0fnu", "uint8", "float32")
FLOATS = ("bfloat16", "float16", "float32")

FP8_WEIGHTS = {
    "v4-flash.wq_a": (1024, 4096),
    "v4-flash.wq_b": (32768, 1024),
    "v4-flash.wo_b": (4096, 8192),
    "v4-pro.wq_b": (65536, 1536),
}

FLOAT = {"absent": ("a_scale",)}


def blocks(size: int) -> int:
    """How many blocks of 128 an axis has; the last may be cut short."""
    return -(-size // BLOCK)


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Every e4m3 code; in some draws a few NaN, in the others none."""
    code = rng.integers(0, 256, shape, dtype=np.uint8)
    code[(code & 0x7F) == 0x7F] = 0x7E
    if rng.random() < 0.2:
        code[rng.random(shape) < 0.02] |= 0x7F
    return code.view(numpy_dtype(dtype))


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Scales as in a model, over a wide range, or any at all."""
    spread = rng.choice([6, 40, 0], p=[0.6, 0.3, 0.1])
    code = 127 + rng.integers(-spread, spread + 1, shape) if spread else rng.integers(0, 256, shape)
    if dtype != "float32":
        return code.astype(np.uint8).view(numpy_dtype(dtype))
    value = np.ldexp(rng.uniform(0.5, 1, shape), code - 127)
    if not spread:
        value *= rng.choice([-1, 0, 1], shape)
        value[rng.random(shape) < 0.02] = rng.choice([np.nan, np.inf])
    return value.astype(np.float32)


def _activations(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    """Codes with scales, else floats."""
    return CODES if "a_scale" in dtypes else FLOATS


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    """Codes, or floats over some range, in some draws a few that are not finite."""
    if dtype in CODES:
        return codes(rng, shape, dtype, dims)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 6, shape) * rng.integers(0, 2))
    if x.size < 4096 and dims["n"] < 1024 and rng.random() < 0.2:  # not at real sizes: of a row only NaN would be left
        x[rng.random(shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
    return x.astype(numpy_dtype(dtype))


def factors(a: Array, a_scale: Array | None) -> tuple[Array, Array]:
    """Activations and the scale of each as float64; floats have 1."""
    return (wide(a), np.ones(())) if a_scale is None else (e4m3(a), along(a_scale, a.shape[-1]))


def e4m3(code: Array) -> Array:
    """Codes as float64."""
    return code.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def e2m1(packed: Array) -> Array:
    """Packed codes as float64, the low nibble first."""
    byte = packed.view(np.uint8)
    return E2M1[np.stack([byte & 15, byte >> 4], axis=-1).reshape(byte.shape[0], 2 * byte.shape[1])]


def along(scale: Array, size: int, block: int = BLOCK, axis: int = -1) -> Array:
    """Scales as float64, each repeated for the elements of its block."""
    return np.repeat(e8m0(scale), block, axis).take(range(size), axis)


def tiled(scale: Array, rows: int, columns: int) -> Array:
    """Scales of 128 x 128 blocks as float64, each repeated for its block."""
    return along(np.repeat(scale, BLOCK, 0)[:rows], columns)


def scaled_bound(exact: Array, absolute: Array, reach: Array, terms: int, dtype: str) -> Array:
    """How far a sum of ``a sa b sb`` may lie from the exact one, its factors multiplied in any order in float32.

    absolute: the sum of the magnitudes. reach: that of ``(1 + |a|) (1 + |sa|) (1 + |b|) (1 + |sb|)``, more than any
    product of some of the factors. Each of the sum's ``terms`` roundings and four of the scaling cost u of
    ``absolute``; what falls below float32's range, at any step and with a power of two up to 2^8 moved to the end,
    costs its smallest subnormal times the other factors, or its smallest normal where bfloat16s are paired. Infinite
    where a product of some of the factors, or the sum, may overflow.
    """
    acc, out = unit("float32"), unit(dtype)
    error = (terms + 4) * acc.u * absolute + 256 * least() * reach
    rounding = 0.0 if out.u <= acc.u else out.u * (magnitude(exact) + error) + out.tiny
    inside = reach <= acc.largest * (1 - (terms + 4) * acc.u)
    return np.where(inside, error + rounding + acc.tiny, np.inf)


def sizes(code: Array, scale: Array) -> tuple[Array, Array]:
    """What `scaled_bound` sums: magnitudes of scaled codes, and what is larger than either; NaN counts as 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        code, scale = (np.where(np.isnan(x), 0, np.abs(x)) for x in (code, scale))
        return magnitude(code * scale), (1 + code) * (1 + scale)


def _bound(exact: Array, a: tuple[Array, Array], b: tuple[Array, Array], terms: int, dtype: str) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        absolute, reach = (np.matmul(x, y.T) for x, y in zip(sizes(*a), sizes(*b), strict=True))
    return scaled_bound(exact, absolute, reach, terms, dtype)


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    return 2.0 * math.prod(batch) * dims["n"] * dims.get("k", 32 * dims.get("g", 0))


def _fp8_blocks(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    n, k, kb = dims["n"], dims["k"], blocks(dims["k"])
    if dims["kb"] != kb:
        return f"the scales have {dims['kb']} columns, expected {kb}: one for each 128 of k = {k}"
    if dims["nb"] != blocks(n):
        return f"b_scale has {dims['nb']} rows, expected {blocks(n)}: one for each 128 of n = {n}"
    return None


@operator(
    tensors={
        "a_scale": Tensor("... kb", SCALES, optional=True, codes=True, draw=scales),
        "a": Tensor("... k", _activations, codes=True, draw=_drawn),
        "b": Tensor("n k", CODES, codes=True, draw=codes),
        "b_scale": Tensor("nb kb", SCALES, codes=True, draw=scales),
    },
    scalars={"dtype": DTYPE},
    result=Tensor("... n", "dtype"),
    workloads={
        f"{name}.{rows}": {"batch": (rows,), "n": n, "k": k}
        for name, (n, k) in FP8_WEIGHTS.items()
        for rows in (1, 16, 128)
    }
    | {"v4-flash.wq_a.4096": {"batch": (4096,), "n": 1024, "k": 4096}}
    | {f"v4-flash.wq_b.float.{rows}": {"batch": (rows,), "n": 32768, "k": 1024, **FLOAT} for rows in (1, 128)},
    flops=_flops,
    sizes={"k": (128, 1, 32, 0, 130, 256, 520, 1030)},
    cases=({"n": 130, "k": 257}, {"n": 259, "k": 64}, {"n": 17, "k": 1536}),
    derived=lambda dims, scalars: {"nb": blocks(dims["n"]), "kb": blocks(dims["k"])},
    check=_fp8_blocks,
)
def fp8_matmul(a: Array, a_scale: Array | None, b: Array, b_scale: Array, dtype: str = "bfloat16") -> Array:
    """``(a * a_scale) @ (b * b_scale).T`` of e4m3 codes, one scale for 128 of a row of a and for 128 x 128 of b.

    Args:
        a: ``[..., k]`` float8_e4m3fn or its bytes, or without scales bfloat16, float16 or float32; any strides.
        a_scale: ``[..., ceil(k / 128)]`` float8_e8m0fnu or its bytes, or float32; broadcasts with a. None for floats.
        b: ``[n, k]`` float8_e4m3fn or its bytes.
        b_scale: ``[ceil(n / 128), ceil(k / 128)]`` float8_e8m0fnu or its bytes, or float32.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the dtype itself.
        out: ``[..., n]`` of that dtype to write into; allocated if None.

    Returns:
        ``[..., n]``, accumulated in float32 and rounded once. Codes 0x7F and 0xFF and scales that are NaN make all
        they take part in NaN, times zero too. An infinite scale, or scaled codes past float32's range, give an infinity
        or NaN.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: a scale's shape is not that of the blocks, or ranks, sizes, devices or dtype do not fit.

    Source: the block-scaled products of the DeepSeek-V3 and V4 reports (arXiv 2412.19437, section 3.3; 2606.19348).
    """
    with np.errstate(invalid="ignore"):
        return np.matmul(np.multiply(*factors(a, a_scale)), (e4m3(b) * tiled(b_scale, *b.shape)).T)


def fp8_matmul_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    n, k = arguments["b"].shape
    a = factors(arguments["a"], arguments["a_scale"])
    b = e4m3(arguments["b"]), tiled(arguments["b_scale"], n, k)
    return _bound(exact, a, b, k + blocks(k), dtype)


def _fp4_blocks(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    k, kb = 32 * dims["g"], blocks(32 * dims["g"])
    if dims.get("kb", kb) == kb:
        return None
    return f"a_scale has {dims['kb']} columns, expected {kb}: one for each 128 of k = {k}"


@operator(
    tensors={
        "a_scale": Tensor("... kb", SCALES, optional=True, codes=True, draw=scales),
        "a": Tensor("... 32*g", _activations, codes=True, draw=_drawn),
        "b": Tensor("n 16*g", ("uint8", "int8", "float4_e2m1fn_x2"), codes=True),
        "b_scale": Tensor("n g", SCALES[:2], codes=True, draw=scales),
    },
    scalars={"dtype": DTYPE},
    result=Tensor("... n", "dtype"),
    workloads={
        f"{name}.{rows}": {"batch": (rows,), "n": n, "g": k // 32}
        for name, (n, k) in EXPERTS.items()
        for rows in (1, 16, 128)
    }
    | {f"{name}.float.1": {"batch": (1,), "n": n, "g": k // 32, **FLOAT} for name, (n, k) in EXPERTS.items()},
    flops=_flops,
    sizes={"g": (4, 1, 2, 0, 5, 16, 33)},
    cases=({"n": 17, "g": 70},),
    derived=lambda dims, scalars: {"kb": blocks(32 * dims["g"])},
    check=_fp4_blocks,
)
def fp4_matmul(a: Array, a_scale: Array | None, b: Array, b_scale: Array, dtype: str = "bfloat16") -> Array:
    """``(a * a_scale) @ (b * b_scale).T`` of e4m3 codes with packed MXFP4 weights, one power of two for 32 of a row.

    Args:
        a: ``[..., k]`` float8_e4m3fn or its bytes, or without scales bfloat16, float16 or float32; any strides; k is a
            multiple of 32.
        a_scale: ``[..., ceil(k / 128)]`` float8_e8m0fnu or its bytes, or float32; broadcasts with a. None for floats.
        b: ``[n, k / 2]`` uint8, int8 or float4_e2m1fn_x2; byte j holds element 2j in its low nibble and 2j+1 in its
            high one. It is never expanded as a whole.
        b_scale: ``[n, k / 32]`` float8_e8m0fnu or its bytes.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the dtype itself.
        out: ``[..., n]`` of that dtype to write into; allocated if None.

    Returns:
        ``[..., n]``, accumulated in float32 and rounded once. Codes 0x7F and 0xFF of a and scales that are NaN make all
        they take part in NaN, times zero too. An infinite scale, or scaled codes past float32's range, give an infinity
        or NaN.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: k/2 is no multiple of 16, a_scale's shape is not that of the blocks, or ranks, sizes, devices or
            dtype do not fit.

    Source: OCP Microscaling Formats 1.0; the expert products of the DeepSeek-V4 report (arXiv 2606.19348).
    """
    with np.errstate(invalid="ignore"):
        return np.matmul(np.multiply(*factors(a, a_scale)), (e2m1(b) * along(b_scale, a.shape[-1], 32)).T)


def fp4_matmul_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    k = arguments["a"].shape[-1]
    a = factors(arguments["a"], arguments["a_scale"])
    b = e2m1(arguments["b"]), along(arguments["b_scale"], k, 32)
    return _bound(exact, a, b, k + k // 32, dtype)
