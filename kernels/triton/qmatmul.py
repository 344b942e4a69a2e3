# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""FP8 or float activations times FP8 and FP4 weights on Triton, decoded on their way into the matrix units.

Codes of e4m3 become float16, which holds them all, and the product of each block of 128 is scaled in float32. Packed
e2m1 becomes bfloat16 with its scale, which is exact, its even and odd elements against those of the activations.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from flagops import config
from flagops.registry import kernel

from .._tensors import matrix
from ._common import chip, dot, launch, narrow, precision, too_long, widen
from ._room import fitting
from .dequantize import power_of_two
from .matmul import sum_kernel

Tile = dict[str, int]


def _tile(m: int, n: int, warps: int, stages: int) -> Tile:
    return {"BM": m, "BN": n, "num_warps": warps, "num_stages": stages}


TILES: dict[str, list[Tile]] = {
    "cuda": [_tile(16, 64, 4, 4), _tile(32, 64, 4, 4), _tile(64, 64, 4, 3), _tile(128, 64, 8, 3)],
    "hip": [_tile(16, 64, 4, 2), _tile(32, 64, 4, 2), _tile(64, 64, 4, 2), _tile(128, 64, 8, 2)],
    "radeon": [_tile(16, 32, 4, 1), _tile(32, 32, 4, 1), _tile(64, 32, 8, 1), _tile(128, 32, 16, 1)],
}
"""Tiles by device, smallest first; all are 128 deep."""

FOUR = TILES | {
    "cuda": [*TILES["cuda"][:-1], TILES["cuda"][-1] | {"BN": 32}],
    "radeon": [tile | {"num_stages": 2} for tile in TILES["radeon"]],
}
"""Those of packed weights, whose highest tile would spill what it decodes on NVIDIA's if it were wider."""


@triton.jit
def factor(scale):
    """A scale as float32, of a byte or as it is."""
    if scale.dtype == tl.uint8:
        scale = power_of_two(scale)
    return scale


@triton.jit
def half(code, CONVERT: tl.constexpr):
    """e4m3 codes as float16: by the processor's own conversion, else as 2^-8 of their values by their bits."""
    if CONVERT:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        size = code & 0x7F
        bits = (size.to(tl.uint16) << 7) | ((code & 0x80).to(tl.uint16) << 8)
        value = tl.where(size == 0x7F, 0x7E00, bits).to(tl.uint16).to(tl.float16, bitcast=True)
    return value


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of a program; neighbours in time share rows of a and columns of b in the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + tl.program_id(0) % (GROUP * tiles_n) % height
    tile_n = tl.program_id(0) % (GROUP * tiles_n) // height
    return tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)


@triton.jit
def finish(acc, out, rows, columns, M, N, out_part, out_m, out_n):
    out += tl.program_id(1).to(tl.int64) * out_part
    out_tile = out + rows.to(tl.int64)[:, None] * out_m + columns.to(tl.int64)[None, :] * out_n
    tl.store(out_tile, narrow(acc, out.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def fp8_kernel(
    a, a_scale, b, b_scale, out, M, N, K, span,
    a_m, a_k, a_scale_m, a_scale_k, b_n, b_k, b_scale_n, b_scale_k, out_part, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, CONVERT: tl.constexpr,
    FLOAT: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, columns = place(M, N, BM, BN, GROUP)
    row, column = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    start = tl.program_id(1) * span
    block = (start // 128).to(tl.int64)
    depth = start + tl.arange(0, 128)
    a_tile = a + row[:, None] * a_m + depth.to(tl.int64)[None, :] * a_k
    b_tile = b + depth.to(tl.int64)[:, None] * b_k + column[None, :] * b_n
    a_scale += row * a_scale_m + block * a_scale_k
    b_scale += column // 128 * b_scale_n + block * b_scale_k
    step = tl.full((), 128, tl.int64)
    shift: tl.constexpr = 1.0 if CONVERT else 256.0  # for each side
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    end = min(K, start + span)
    for k in range(start, end, 128):
        if EVEN:
            x, w = tl.load(a_tile), tl.load(b_tile)
        else:
            left = tl.arange(0, 128) < end - k
            x, w = tl.load(a_tile, left[None, :], other=0), tl.load(b_tile, left[:, None], other=0)
        scale = factor(tl.load(b_scale))[None, :]
        w = half(w, CONVERT)
        if ROUNDED:  # weights and scales in the dtype of the activations, which have no scales
            w = narrow(w.to(tl.float32) * shift * scale, x.dtype)
            acc = dot(x, w, acc, PRECISION)
        elif FLOAT:
            w = narrow(w.to(tl.float32), x.dtype)
            acc += dot(x, w, tl.zeros((BM, BN), dtype=tl.float32), PRECISION) * shift * scale
        else:
            part = dot(half(x, CONVERT), w, tl.zeros((BM, BN), dtype=tl.float32), "ieee")
            acc += part * (shift * shift) * (factor(tl.load(a_scale))[:, None] * scale)
        a_tile += step * a_k
        b_tile += step * b_k
        a_scale += a_scale_k
        b_scale += b_scale_k
    finish(acc, out, rows, columns, M, N, out_part, out_m, out_n)


@triton.jit
def weight(code, scale):
    """e2m1 codes times their scales: exponent and mantissa at the top of a float32 are the value times 2^-126."""
    value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return narrow(value * scale, tl.bfloat16)


@triton.jit
def fp4_kernel(
    a, a_scale, b, b_scale, out, M, N, K, span,
    a_m, a_k, a_scale_m, a_scale_k, b_n, b_k, b_scale_n, b_scale_k, out_part, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, CONVERT: tl.constexpr,
    FLOAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, columns = place(M, N, BM, BN, GROUP)
    row, column = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    start = tl.program_id(1) * span
    block = (start // 128).to(tl.int64)
    pair = (start + 2 * tl.arange(0, 64)).to(tl.int64)
    group = tl.arange(0, 4)
    byte = (start // 2 + 16 * group[:, None] + tl.arange(0, 16)[None, :]).to(tl.int64)
    a_tile = a + row[:, None] * a_m + pair[None, :] * a_k
    b_tile = b + column[:, None, None] * b_n + byte[None, :, :] * b_k
    a_scale += row * a_scale_m + block * a_scale_k
    b_scale_tile = b_scale + column[:, None] * b_scale_n + (start // 32 + group).to(tl.int64)[None, :] * b_scale_k
    step = tl.full((), 64, tl.int64)
    shift: tl.constexpr = 1.0 if CONVERT else 256.0
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    end = min(K, start + span)
    for k in range(start, end, 128):
        if EVEN:
            even, odd, packed, scale = tl.load(a_tile), tl.load(a_tile + a_k), tl.load(b_tile), tl.load(b_scale_tile)
        else:
            left = (2 * tl.arange(0, 64) < end - k)[None, :]
            there = (32 * group < end - k)[None, :]
            even, odd = tl.load(a_tile, left, other=0), tl.load(a_tile + a_k, left, other=0)
            packed, scale = tl.load(b_tile, there[:, :, None], other=0), tl.load(b_scale_tile, there, other=127)
        packed, scale = packed.to(tl.uint32), power_of_two(scale)[:, :, None]
        low = tl.trans(tl.reshape(weight(packed & 15, scale), (BN, 64)))
        high = tl.trans(tl.reshape(weight(packed >> 4, scale), (BN, 64)))
        if FLOAT:
            acc = multiplied(even, low, acc, PRECISION)
            acc = multiplied(odd, high, acc, PRECISION)
        else:
            part = dot(brain(even, CONVERT), low, tl.zeros((BM, BN), dtype=tl.float32), "ieee")
            part = dot(brain(odd, CONVERT), high, part, "ieee")
            acc += part * shift * factor(tl.load(a_scale))[:, None]
        a_tile += 2 * step * a_k
        b_tile += step * b_k
        a_scale += a_scale_k
        b_scale_tile += step // 16 * b_scale_k
    finish(acc, out, rows, columns, M, N, out_part, out_m, out_n)


@triton.jit
def brain(code, CONVERT: tl.constexpr):
    """e4m3 codes as bfloat16, which holds what `half` gives."""
    return narrow(half(code, CONVERT).to(tl.float32), tl.bfloat16)


@triton.jit
def multiplied(x, w, acc, PRECISION: tl.constexpr):
    """The product of floats with weights of bfloat16, which float16 would not hold."""
    if x.dtype == tl.bfloat16:
        acc = dot(x, w, acc, PRECISION)
    else:
        acc = dot(widen(x), widen(w), acc, PRECISION)
    return acc


def _held(tile: Tile, four: bool, coded: bool) -> int:
    """Bytes of a tile where a chip holds all. Every second code of FP4's activations lies in 32 bytes of its own."""
    if four:
        return (136 if coded else 18) * 128 * tile["BM"]
    return max(18 * tile["BM"], 34 * tile["BN"]) * 128


def quantized_product(
    run: Any, a: torch.Tensor, a_scale: torch.Tensor | None, b: torch.Tensor, b_scale: torch.Tensor, out: torch.Tensor,
    rounded: bool = False,
) -> None:  # fmt: skip
    """Few tiles split K, and their parts are added in order. Activations without scales are floats; FP8 weights may be
    `rounded` to their dtype, scales included."""
    if not out.numel():
        return
    (*lead, n), k, device = out.shape, a.shape[-1], out.device
    x = matrix(a.expand(*lead, k))
    scale = b_scale if a_scale is None else matrix(a_scale.expand(*lead, a_scale.shape[-1]))
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    m, size = len(result), result.numel()
    four, coded = run is fp4_kernel, a_scale is not None
    table = (FOUR if four else TILES)[chip(device).kind]
    tiles = fitting(table, device, lambda tile: _held(tile, four, coded), ("BM",) if four else ("BN", "BM"))
    tile = next((t for t in tiles if m <= t["BM"]), tiles[-1])
    if four and not coded and a.dtype != torch.bfloat16:  # by multiply-adds, whose operands all lie in registers
        tile = tile | {"BM": min(tile["BM"], 32), "BN": min(tile["BN"], 32), "num_warps": 8, "num_stages": 1}
    programs = triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"])
    blocks = triton.cdiv(k, 128)
    parts = min(chip(device).processors // programs, blocks // 4, 16, config.budget() // 4 // (8 * size))
    span = triton.cdiv(blocks, max(parts, 1))
    parts = triton.cdiv(blocks, span) if blocks else 1
    kinds: dict[str, Any] = {"FLOAT": a_scale is None, "PRECISION": precision()}
    kinds |= {"ROUNDED": rounded} if run is fp8_kernel else {}
    to, part = result, 0
    if parts > 1:
        to, part = torch.empty((parts, m, n), dtype=torch.float32, device=device), size
    launch(
        run, (programs, parts), device,
        x, scale, b, b_scale, to, m, n, k, 128 * span,
        *x.stride(), *scale.stride(), *b.stride(), *b_scale.stride(), part, *to.stride()[-2:],
        GROUP=8, EVEN=k % 128 == 0, CONVERT=chip(device).converts, **kinds, **tile,
    )  # fmt: skip
    if parts > 1:
        launch(
            sum_kernel, (triton.cdiv(size, 256),), device,
            to, None, result, m, n, 1, parts, size, 0, 0, 0, *result.stride(), BLOCK=256, BIAS=False, num_warps=4,
        )  # fmt: skip
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))


def fp8_matmul_unsupported(
    a: torch.Tensor, a_scale: torch.Tensor | None, b: torch.Tensor, b_scale: torch.Tensor, dtype: str
) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True)
def fp8_matmul(
    a: torch.Tensor, a_scale: torch.Tensor | None, b: torch.Tensor, b_scale: torch.Tensor, dtype: str, out: torch.Tensor
) -> None:
    """The product of each block of 128 is scaled by both scales, multiplied first."""
    quantized_product(fp8_kernel, a, a_scale, b, b_scale, out)


def fp4_matmul_unsupported(
    a: torch.Tensor, a_scale: torch.Tensor | None, b: torch.Tensor, b_scale: torch.Tensor, dtype: str
) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True)
def fp4_matmul(
    a: torch.Tensor, a_scale: torch.Tensor | None, b: torch.Tensor, b_scale: torch.Tensor, dtype: str, out: torch.Tensor
) -> None:
    """The weights take their scales along, the products those of the activations."""
    quantized_product(fp4_kernel, a, a_scale, b, b_scale, out)
