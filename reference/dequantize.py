"""Numbers of four and eight bits with shared scales, expanded. Defined bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flagops.operator import Dims, Tensor, operator
from flagops.scalars import dtype, pair

from ._rounding import Array, round_to

OUTPUTS = ("bfloat16", "float16", "float32")


DTYPE = dtype(OUTPUTS)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERTS = {
    "v4-flash.w1": (2048, 4096),
    "v4-flash.w2": (4096, 2048),
    "v4-pro.w1": (3072, 7168),
    "v4-pro.w2": (7168, 3072),
}


def _one_multiply(dims: Dims, batch: tuple[int, ...]) -> float:
    return 32.0 * dims["r"] * dims["g"] if "g" in dims else 1.0 * dims["n"] * dims["k"]


def e8m0(scale: Array) -> Array:
    """Scales as float64: a byte e is 2^(e-127), 0xFF is NaN; float32 scales as they are."""
    if scale.dtype == np.float32:
        return scale.astype(np.float64)
    return scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)


@operator(
    tensors={
        "packed": Tensor("r 16*g", ("uint8", "int8", "float4_e2m1fn_x2"), codes=True),
        "scale": Tensor("r g", ("uint8", "float8_e8m0fnu"), codes=True),
    },
    scalars={"dtype": DTYPE},
    result=Tensor("r 32*g", "dtype"),
    workloads={name: {"r": rows, "g": columns // 32} for name, (rows, columns) in EXPERTS.items()}
    | {"4096x7168": {"r": 4096, "g": 7168 // 32}},
    flops=_one_multiply,
    exact=True,
    sizes={"g": (1, 2, 3, 0, 7, 16, 65)},
)
def fp4_dequantize(packed: Array, scale: Array, dtype: str = "bfloat16") -> Array:
    """MXFP4 weights expanded: e2m1 values times one power of two for each 32 of a row.

    Args:
        packed: ``[R, K/2]`` uint8, int8 or float4_e2m1fn_x2; byte j holds element 2j in its low nibble and 2j+1 in its
            high one. Only the bits matter.
        scale: ``[R, K/32]`` float8_e8m0fnu or its bytes.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the dtype itself.
        out: ``[R, K]`` of that dtype to write into; allocated if None.

    Returns:
        ``[R, K]``, the exact products rounded once: bfloat16 and float32 are exact for every scale byte up to 252. A
        scale of 0xFF makes its elements NaN, zeros included; byte 0 is 2^-127; code 8 is -0.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: K/2 is no multiple of 16, or sizes, devices or dtype do not fit.

    Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1, and the DeepSeek-V4 checkpoints.
    """
    codes = packed.view(np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], 2 * codes.shape[1])
    values = E2M1[nibbles] * np.repeat(e8m0(scale), 32, axis=1)
    return round_to(values, dtype)


def _scale_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    if dtype == "float32":
        exponents = rng.integers(-140, 128, shape)
        with np.errstate(over="ignore"):
            return np.ldexp(rng.uniform(-2, 2, shape), exponents).astype(np.float32)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _fp8_blocks(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    rows, columns = arguments["block"]
    expected = (-(-dims["n"] // rows), -(-dims["k"] // columns))
    if (dims["nb"], dims["kb"]) == expected:
        return None
    return (
        f"scale has shape {(dims['nb'], dims['kb'])}, expected {expected}: "
        f"one for each {rows} x {columns} block of a {dims['n']} x {dims['k']} weight"
    )


@operator(
    tensors={
        "weight": Tensor("n k", ("float8_e4m3fn", "uint8"), codes=True),
        "scale": Tensor("nb kb", ("float8_e8m0fnu", "uint8", "float32"), codes=True, draw=_scale_values),
    },
    scalars={"block": pair(((128, 128), (3, 5), (1, 32), (40, 1))), "dtype": DTYPE},
    result=Tensor("n k", "dtype"),
    workloads={"4096x7168": {"n": 4096, "k": 7168}, "v4-flash.wq_b": {"n": 32768, "k": 1024}},
    flops=_one_multiply,
    exact=True,
    derived=lambda dims, scalars: {
        "nb": -(-dims["n"] // scalars["block"][0]),
        "kb": -(-dims["k"] // scalars["block"][1]),
    },
    check=_fp8_blocks,
)
def fp8_dequantize(weight: Array, scale: Array, block: tuple[int, int] = (128, 128), dtype: str = "bfloat16") -> Array:
    """FP8 weights expanded: e4m3 values times one scale for each block.

    Args:
        weight: ``[N, K]`` float8_e4m3fn or its bytes.
        scale: ``[ceil(N / rows), ceil(K / columns)]`` float8_e8m0fnu or its bytes (DeepSeek-V4), or float32 (V3).
        block: rows and columns that share a scale; the last blocks may be cut short.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the dtype itself.
        out: ``[N, K]`` of that dtype to write into; allocated if None.

    Returns:
        ``[N, K]``, the product rounded to float32 and then to ``dtype`` (with e8m0 scales the first rounding acts only
        below float32's normal range). Codes 0x7F and 0xFF, and scales that are NaN, give NaN; -0 is kept.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit (the fnuz formats do not).
        ValueError: the scale's shape is not that of the blocks, or sizes, devices or dtype do not fit.

    Source: OCP 8-bit Floating Point 1.0 for e4m3fn; the block layout of the DeepSeek-V3 and V4 checkpoints.
    """
    rows, columns = weight.shape
    scales = np.repeat(np.repeat(e8m0(scale), block[0], axis=0)[:rows], block[1], axis=1)[:, :columns]
    values = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
    return round_to(round_to(values, "float32"), dtype)
