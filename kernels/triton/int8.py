# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Integers of eight bits on Triton: rows are read for their largest magnitude and again; products sum in int32."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._rows import rows
from .._tensors import matrix
from ._common import chip, launch, narrow, too_long, widen
from ._room import products
from .moe import moved
from .quantize import NAN, magnitude_of, origins

QUANTIZE_TILE: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4}
TILES: dict[str, list[dict[str, int]]] = {
    kind: [
        {"BM": m, "BN": n, "BK": 128, "num_warps": warps, "num_stages": stages}
        for m, n, warps in ((16, 64, 4), (32, 64, 4), (64, 64, 4), (128, 128, 8))
    ]
    for kind, stages in (("cuda", 3), ("hip", 2), ("radeon", 2))
}
"""Tiles by device, smallest first."""


@triton.jit
def quantize_kernel(
    x, codes, scales, K, N1, N2,
    x_0, x_1, x_2, x_k, codes_0, codes_1, codes_2, codes_k, scales_0, scales_1, scales_2, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    source, target = origins(row, N1, N2, x_0, x_1, x_2, codes_0, codes_1, codes_2, False)
    beside, _ = origins(row, N1, N2, scales_0, scales_1, scales_2, scales_0, scales_1, scales_2, False)
    within = tl.arange(0, BLOCK)
    highest = tl.zeros((BLOCK,), dtype=tl.int32)
    for k in range(0, K, BLOCK):
        at = (k + within).to(tl.int64)
        highest = tl.maximum(highest, magnitude_of(widen(tl.load(x + source + at * x_k, at < K, other=0.0))))
    top = tl.max(highest, 0)
    finite = top < NAN
    largest = tl.full((BLOCK,), 127.0, tl.float32)
    spread = tl.zeros((BLOCK,), dtype=tl.int32) + tl.where(finite, top, 0)
    scale = tl.maximum(tl.div_rn(spread.to(tl.float32, bitcast=True), largest), 1.1754943508222875e-38)
    tl.store(scales + beside, tl.where(finite, tl.max(scale, 0), float("nan")))
    for k in range(0, K, BLOCK):
        at = (k + within).to(tl.int64)
        value = tl.div_rn(widen(tl.load(x + source + at * x_k, at < K, other=0.0)), scale)
        value = tl.minimum(tl.maximum(tl.where(finite, value, 0.0), -127.0), 127.0)
        code = (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # whose unit is 1: rounds to even
        tl.store(codes + target + at * codes_k, code.to(tl.int8), at < K)


def int8_quantize_unsupported(x: torch.Tensor) -> str | None:
    return too_long(x)


@kernel(deterministic=True, batch_invariant=True)
def int8_quantize(x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A program for a row."""
    codes, scale = out
    *lead, k = x.shape
    steps = (x.stride()[:-1], codes.stride()[:-1], scale.stride()[:-1])
    for offsets, sizes, own in rows(lead, *steps):
        pieces = map(moved, (x, codes, scale), offsets)
        launch(
            quantize_kernel, (math.prod(sizes),), x.device, *pieces, k, *sizes[1:],
            *own[0], x.stride(-1), *own[1], codes.stride(-1), *own[2], **QUANTIZE_TILE,
        )  # fmt: skip


@triton.jit
def int8_kernel(
    a, a_scale, b, b_scale, out, M, N, K, a_m, a_k, a_scale_m, b_n, b_k, b_scale_n, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BN)
    rows = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    row, column = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    depth = tl.arange(0, BK)
    a_tile = a + row[:, None] * a_m + depth.to(tl.int64)[None, :] * a_k
    b_tile = b + depth.to(tl.int64)[:, None] * b_k + column[None, :] * b_n
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(0, K, BK):
        if EVEN:
            x, w = tl.load(a_tile), tl.load(b_tile)
        else:
            x = tl.load(a_tile, (depth < K - k)[None, :], other=0)
            w = tl.load(b_tile, (depth < K - k)[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        a_tile += step * a_k
        b_tile += step * b_k
    value = acc.to(tl.float32) * tl.load(a_scale + row * a_scale_m)[:, None]
    value *= tl.load(b_scale + column * b_scale_n)[None, :]
    out_tile = out + rows.to(tl.int64)[:, None] * out_m + columns.to(tl.int64)[None, :] * out_n
    tl.store(out_tile, narrow(value, out.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


def _programs(m: int, n: int, tile: dict[str, int]) -> int:
    return triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"])


def int8_matmul_unsupported(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: str
) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True, batch_invariant=True)
def int8_matmul(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: str, out: torch.Tensor
) -> None:
    """Sums of integers have no order, so that a tile may be of any size: as high as there are rows, unless more than
    half of the processors would have none."""
    if not out.numel():
        return
    (*lead, n), k, device = out.shape, a.shape[-1], out.device
    x, factors = (matrix(y.expand(*lead, y.shape[-1])) for y in (a, a_scale))
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    m = len(result)
    tiles = products(TILES[chip(device).kind], device, 1)
    highest = next((i for i, t in enumerate(tiles) if m <= t["BM"]), len(tiles) - 1)
    tile = next((t for t in tiles[highest::-1] if 2 * _programs(m, n, t) >= chip(device).processors), tiles[0])
    launch(
        int8_kernel, (_programs(m, n, tile),), device,
        x, factors, b, b_scale, result, m, n, k,
        *x.stride(), factors.stride(0), *b.stride(), b_scale.stride(0), *result.stride(),
        EVEN=k % tile["BK"] == 0, **tile,
    )  # fmt: skip
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))
