"""The grouped low-rank output projection of DeepSeek-V4's attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import whole

from ._rounding import Array, accumulator, contraction_bound, magnitude, narrowed, round_to, unit, wide
from .qmatmul import BLOCK, SCALES, along, blocks, e4m3, scaled_bound, scales, sizes, tiled
from .quantize import fp8_quantize

V4_FLASH = {"g": 8, "p": 8, "c": 512, "r": 1024, "d": 4096, "dtype": "bfloat16"}
V4_PRO = {"g": 16, "p": 8, "c": 512, "r": 1024, "d": 7168, "dtype": "bfloat16"}
PLAIN = {"absent": ("wo_a_scale", "wo_b_scale")}


def _flops(dims: Dims, batch: tuple[int, ...]) -> float:
    rank = dims["g"] * dims["r"]
    return 2.0 * math.prod(batch) * rank * (dims["p"] * dims["c"] + dims["d"])


def _weight(scale: str) -> Callable[[Mapping[str, str]], tuple[str, ...]]:
    """FP8 with scales, else like the activations."""
    return lambda dtypes: ("float8_e4m3fn",) if scale in dtypes else (dtypes["o"],)


def _counted(dims: Dims) -> Dims:
    rank, width = dims["g"] * dims["r"], dims["p"] * dims["c"]
    return {"rb": blocks(rank), "kb": blocks(width), "db": blocks(dims["d"])}


def _blocks(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    expected = _counted(dims)
    for name, axes in (("wo_a_scale", ("rb", "kb")), ("wo_b_scale", ("db", "rb"))):
        wanted = tuple(expected[axis] for axis in axes)
        if arguments[name] is not None and tuple(arguments[name].shape) != wanted:
            return f"{name} has shape {tuple(arguments[name].shape)}, expected {wanted}: one for each 128 x 128 block"
    return None


@operator(
    tensors={
        "o": Tensor("... g*p c", FLOATS),
        "wo_a_scale": Tensor("rb kb", SCALES, optional=True, codes=True, draw=scales),
        "wo_b_scale": Tensor("db rb", SCALES, optional=True, codes=True, draw=scales),
        "wo_a": Tensor("g*r p*c", _weight("wo_a_scale"), codes=True),
        "wo_b": Tensor("d g*r", _weight("wo_b_scale"), codes=True),
    },
    scalars={"groups": whole(axis="g")},
    result=Tensor("... d", "o"),
    workloads={f"v4-flash.{rows}": {"batch": (rows,), **V4_FLASH, **PLAIN} for rows in (1, 16, 128, 1024)}
    | {f"v4-pro.{rows}": {"batch": (rows,), **V4_PRO, **PLAIN} for rows in (1, 64)}
    | {f"v4-flash.fp8.{rows}": {"batch": (rows,), **V4_FLASH} for rows in (1, 16, 128)},
    flops=_flops,
    integral=True,
    sizes={"g": (1, 2, 3, 4)},
    cases=(
        {"g": 2, "p": 2, "c": 96, "r": 80, "d": 140},
        {"g": 1, "p": 1, "c": 130, "r": 128, "d": 129},
        {"g": 3, "p": 1, "c": 64, "r": 96, "d": 20},
    ),
    derived=lambda dims, scalars: _counted(dims),
    check=_blocks,
)
def grouped_output_projection(
    o: Array,
    wo_a: Array,
    wo_b: Array,
    groups: int,
    wo_a_scale: Array | None = None,
    wo_b_scale: Array | None = None,
) -> Array:
    """Attention heads to hidden states, through one low-rank factor for each group of heads.

    ``z_g = A_g @ o_g`` for each group and ``y = wo_b @ concat(z)``, where ``o_g`` are the heads of group g laid end to
    end and ``A_g`` is rows ``g*r`` to ``(g+1)*r`` of ``wo_a``. Each of the weights may be FP8, with scales.

    Args:
        o: ``[..., H, c]``, heads of the attention output; float16, bfloat16, float32 or float64, any strides.
        wo_a: ``[groups * r, (H / groups) * c]``, dtype of ``o``, or with scales float8_e4m3fn.
        wo_b: ``[D, groups * r]``, likewise.
        groups: number of groups; divides ``H``.
        wo_a_scale: ``[ceil(groups * r / 128), ceil(H / groups * c / 128)]`` float8_e8m0fnu or its bytes, or float32,
            one for each 128 x 128 block; None where ``wo_a`` is not FP8.
        wo_b_scale: ``[ceil(D / 128), ceil(groups * r / 128)]``, likewise.
        out: ``[..., D]`` to write into, dtype of ``o``; allocated if None.

    Returns:
        ``[..., D]``. Both products are accumulated in float32 (float64 for float64); z is rounded to the dtype of ``o``
        in between (float16 and bfloat16), y once. An FP8 ``wo_a`` stands for its values times its scales in the dtype
        of ``o``. For an FP8 ``wo_b`` z is quantised as by `fp8_quantize`, in blocks of 128, the last cut short. The
        gradient of ``o`` takes that quantisation for the identity; FP8 weights have none.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: ``groups`` does not divide the heads, a scale's shape is not that of the blocks, or ranks, sizes or
            devices do not fit.

    Source: DeepSeek-V4 report (arXiv 2606.19348), grouped output projection; roundings as in its inference code.
    """
    return _project(o, wo_a, wo_b, groups, wo_a_scale, wo_b_scale, lambda z: z)


def grouped_output_projection_rounded(
    o: Array, wo_a: Array, wo_b: Array, groups: int, wo_a_scale: Array | None, wo_b_scale: Array | None
) -> Array:
    return _project(o, wo_a, wo_b, groups, wo_a_scale, wo_b_scale, lambda z: narrowed(z, o.dtype.name))


def _project(
    o: Array, wo_a: Array, wo_b: Array, groups: int, wo_a_scale: Array | None, wo_b_scale: Array | None, rounding: Any
) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        z = _inner(wide(o), _expanded(wo_a, wo_a_scale, o.dtype.name)[0], groups)
        if wo_b_scale is None:
            return np.matmul(rounding(z), wide(wo_b).T)
        code, scale = _quantized(_kept(z, o.dtype.name))
        return np.matmul(code * scale, (e4m3(wo_b) * tiled(wo_b_scale, *wo_b.shape)).T)


def _inner(o: Array, wo_a: Array, groups: int) -> Array:
    per_group = o.reshape(*o.shape[:-2], groups, wo_a.shape[1])
    factors = wo_a.reshape(groups, wo_a.shape[0] // groups, wo_a.shape[1])
    z = np.matmul(per_group[..., None, :], np.swapaxes(factors, 1, 2))  # einsum leaves an empty sum undefined
    return z.reshape(*o.shape[:-2], wo_a.shape[0])


def _expanded(weight: Array, scale: Array | None, dtype: str) -> tuple[Array, Array]:
    """A weight in the dtype of the activations, wide, and how much was lost in rounding to that."""
    if scale is None:
        return wide(weight), np.zeros(())
    exact = e4m3(weight) * tiled(scale, *weight.shape)
    kept = wide(round_to(exact.astype(np.float32), dtype))
    return kept, np.where(np.isfinite(exact), np.where(np.isfinite(kept), np.abs(exact - kept), np.inf), 0)


def _kept(z: Array, dtype: str) -> Array:
    """z as it is quantised: in the dtype of the activations, in float32 where they are float64."""
    return round_to(z, dtype if dtype in HALF else "float32")


def _quantized(z: Array) -> tuple[Array, Array]:
    """Codes and scales of each element, as float64."""
    code, scale = fp8_quantize.reference(np.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, -z.shape[-1] % BLOCK)]))
    return e4m3(code)[..., : z.shape[-1]], along(scale, z.shape[-1])


def _moved(z: Array, error: Array, dtype: str) -> Array:
    """How far the quantised z may move where z may be off by an error: rounding keeps the order of values."""
    code, scale = _quantized(_kept(z, dtype))
    centre = np.where(np.isfinite(z), z, 0)
    low, high = (wide(_kept(centre + side * error, dtype).astype(np.float32)) for side in (-1, 1))
    spans = np.where(low * high <= 0, 0, np.minimum(np.abs(low), np.abs(high))), np.maximum(np.abs(low), np.abs(high))
    first, last = (_quantized(size.astype(np.float32))[1] for size in spans)

    def nearest(x: Array, step: Array) -> Array:
        return step * round_to(np.clip(x / step, -448, 448), "float8_e4m3fn").astype(np.float64)

    least, most = (
        np.minimum(nearest(low, first), nearest(low, last)),
        np.maximum(nearest(high, first), nearest(high, last)),
    )
    moved = np.maximum(most - code * scale, code * scale - least)
    known = np.isfinite(moved) & (last <= 2 * first)
    surely = np.isfinite(error) & (~np.isfinite(z) | np.isinf(low) & (low == high))  # no number, however it is rounded
    beside = np.pad(surely, [(0, 0)] * (z.ndim - 1) + [(0, -z.shape[-1] % BLOCK)])
    lost = np.repeat(beside.reshape(*z.shape[:-1], beside.shape[-1] // BLOCK, BLOCK).any(-1), BLOCK, -1)[
        ..., : z.shape[-1]
    ]  # all its block
    return np.where(lost, 0, np.where(known, moved, np.inf))


def grouped_output_projection_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    o, wo_b, b_scale, groups = (arguments[name] for name in ("o", "wo_b", "wo_b_scale", "groups"))
    with np.errstate(all="ignore"):
        z, z_error = _inner_bound(
            wide(o), arguments["wo_a"], arguments["wo_a_scale"], groups, dtype, b_scale is not None
        )
        if b_scale is not None:
            return _quantized_bound(exact, z, z_error, e4m3(wo_b), tiled(b_scale, *wo_b.shape), dtype)
        z_error = np.where(magnitude(z) + z_error < unit(dtype).largest, z_error, np.inf)
        weight = wide(wo_b)
        absolute = np.matmul(magnitude(z) + z_error, magnitude(weight).T)
        second = contraction_bound(exact, absolute, weight.shape[1], dtype)
        bound = second + np.matmul(z_error, magnitude(weight).T) * (1 + 2 * unit(dtype).u)
        unclear = (
            np.matmul((magnitude(z) <= z_error) * 1.0, ~np.isfinite(weight.T) * 1.0) > 0
        )  # perhaps 0 times infinity
    return np.where(np.isnan(bound) | unclear, np.inf, bound)


def _inner_bound(
    o: Array, wo_a: Array, scale: Array | None, groups: int, dtype: str, unrounded: bool
) -> tuple[Array, Array]:
    """z and how far it may be off, in the accumulator or rounded."""
    kept = accumulator(dtype) if unrounded else dtype
    weight, lost = _expanded(wo_a, scale, dtype)
    z = _inner(o, weight, groups)
    if scale is None:
        return z, contraction_bound(z, _inner(magnitude(o), magnitude(weight), groups), wo_a.shape[1], kept)
    absolute, reach = sizes(e4m3(wo_a), tiled(scale, *wo_a.shape))
    absolute, reach = _inner(magnitude(o), absolute, groups), _inner(1 + magnitude(o), reach, groups)
    error = scaled_bound(z, absolute, reach, wo_a.shape[1], kept)
    error = error + _inner(magnitude(o), lost, groups) * (1 + unit(dtype).u)
    return z, np.where(np.isnan(error), np.inf, error)


def _quantized_bound(exact: Array, z: Array, z_error: Array, code: Array, scale: Array, dtype: str) -> Array:
    moved = _moved(z, z_error, dtype)
    pairs = zip(sizes(*_quantized(_kept(z, dtype))), sizes(code, scale), strict=True)
    absolute, reach = (np.matmul(x, y.T) for x, y in pairs)
    off = np.matmul(moved, sizes(code, scale)[0].T)
    bound = scaled_bound(exact, absolute + off, 4 * reach, code.shape[1] + blocks(code.shape[1]), dtype)
    bound = bound + off * (1 + 2 * unit(dtype).u)
    return np.where(np.isnan(bound), np.inf, bound)
