# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""FP4 and FP8 dequantisation on Triton: codes become float32 by their bits; products are exact before rounding."""

from typing import Any

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from ._common import launch, narrow, too_long
from ._room import fitted

FP4_TILE: dict[str, Any] = {"BLOCK": 128, "num_warps": 8}
FP8_TILE: dict[str, Any] = {"BR": 32, "BC": 128, "num_warps": 8}


@triton.jit
def power_of_two(code):
    """The float32 of an e8m0 byte: 0 is the subnormal 2^-127, 255 is NaN."""
    code = code.to(tl.uint32)
    bits = tl.where(code == 0, 0x400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def fp4_kernel(
    packed, scale, out, groups, size, packed_r, packed_c, scale_r, scale_c, out_r, out_c,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < size
    if not FLAT:
        row, group = group // groups, group % groups
        packed += row[:, None] * packed_r
        scale += row * scale_r
        out += row[:, None] * out_r
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    pair = tl.load(packed + byte * packed_c, inside[:, None], other=0).to(tl.uint32)
    factor = power_of_two(tl.load(scale + group * scale_c, inside, other=0))
    code = tl.reshape(tl.join(pair & 15, pair >> 4), (BLOCK, 32))
    # the code's exponent and mantissa at the top of a float32 are its value times 2^-126, subnormals included
    value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + column * out_c, narrow(value * factor[:, None], out.dtype.element_ty), inside[:, None])


@triton.jit
def fp8_kernel(
    weight, scale, out, N, K, block_r, block_c, weight_r, weight_c, scale_r, scale_c, out_r, out_c,
    SHARED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(K, BC)
    row = tl.program_id(0) // across * BR + tl.arange(0, BR)
    left = tl.program_id(0) % across * BC
    column = left + tl.arange(0, BC)
    inside = (row < N)[:, None] & (column < K)[None, :]
    scale += (row // block_r).to(tl.int64) * scale_r
    if SHARED:  # the whole tile lies under one column of scales
        factor = tl.load(scale + (left // block_c).to(tl.int64) * scale_c, row < N, other=0)[:, None]
    else:
        factor = tl.load(scale[:, None] + (column // block_c).to(tl.int64)[None, :] * scale_c, inside, other=0)
    row, column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    code = tl.load(weight + row * weight_r + column * weight_c, inside, other=0).to(tl.uint32)
    if factor.dtype == tl.uint8:
        factor = power_of_two(factor)
    # as for FP4, with an exponent bias of 7: the value times 2^-120
    value = (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    tl.store(out + row * out_r + column * out_c, narrow(value * factor, out.dtype.element_ty), inside)


@kernel(deterministic=True, batch_invariant=True)
def fp4_dequantize(packed: torch.Tensor, scale: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """One thread block per 128 groups of 32; contiguous tensors are one long row."""
    size = scale.numel()
    if size:
        flat = packed.is_contiguous() and scale.is_contiguous() and out.is_contiguous()
        steps = (*packed.stride(), *scale.stride(), *out.stride())
        tile = fitted(FP4_TILE, out.device, lambda tile: 51 * 32 * tile["BLOCK"], ("BLOCK",))
        grid = (triton.cdiv(size, tile["BLOCK"]),)
        launch(fp4_kernel, grid, out.device, packed, scale, out, scale.shape[1], size, *steps, FLAT=flat, **tile)


def fp8_dequantize_unsupported(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: str
) -> str | None:
    return too_long(weight)


@kernel(deterministic=True, batch_invariant=True)
def fp8_dequantize(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: str, out: torch.Tensor
) -> None:
    """Tiles of 32 rows; narrow or odd blocks read a scale for every element."""
    rows, columns = weight.shape
    if out.numel():
        width = block[1] & -block[1]
        shared = width >= 16
        tile = FP8_TILE | {"BC": min(width, 128) if shared else 128}
        steps = (*weight.stride(), *scale.stride(), *out.stride())
        grid = (triton.cdiv(rows, tile["BR"]) * triton.cdiv(columns, tile["BC"]),)
        launch(fp8_kernel, grid, out.device, weight, scale, out, rows, columns, *block, *steps, SHARED=shared, **tile)
