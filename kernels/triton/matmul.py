# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Matrix products on Triton: tiles in grouped order, and split sums where too few tiles would fill the device."""

from typing import Any

import torch
import triton
import triton.language as tl

from flagops import config
from flagops.registry import kernel

from ._common import LONGEST, chip, dot, launch, narrow, precision, too_long, widen
from ._room import products

Tile = dict[str, int]


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return {"BM": m, "BN": n, "BK": k, "num_warps": warps, "num_stages": stages}


TILES: dict[str, dict[str, list[Tile]]] = {
    "cuda": {
        "half": [
            _tile(16, 64, 128, 4, 4),
            _tile(32, 64, 128, 4, 4),
            _tile(64, 64, 128, 4, 3),
            _tile(64, 128, 64, 4, 4),
            _tile(128, 128, 64, 8, 4),
            _tile(128, 256, 64, 8, 3),
        ],
        "float32": [_tile(16, 64, 32, 4, 3), _tile(64, 64, 16, 4, 3), _tile(128, 128, 16, 8, 3)],
        "float64": [_tile(16, 32, 16, 4, 2), _tile(64, 64, 16, 8, 2)],
        "integers": [_tile(16, 32, 16, 4, 2)],
    },
    "hip": {
        "half": [
            _tile(16, 64, 128, 4, 2),
            _tile(32, 64, 128, 4, 2),
            _tile(64, 64, 64, 4, 2),
            _tile(128, 128, 64, 8, 2),
            _tile(256, 128, 64, 8, 2),
        ],
        "float32": [_tile(16, 64, 32, 4, 2), _tile(64, 64, 16, 4, 2), _tile(128, 64, 16, 8, 2)],
        "float64": [_tile(16, 32, 16, 4, 2), _tile(64, 64, 16, 8, 2)],
        "integers": [_tile(16, 32, 16, 4, 2)],
    },
}
TILES["radeon"] = TILES["hip"] | {
    "half": [
        _tile(16, 64, 64, 4, 2),
        _tile(32, 64, 64, 4, 2),
        _tile(64, 64, 64, 4, 2),
        _tile(128, 128, 64, 8, 2),
        _tile(256, 128, 64, 16, 2),
    ]
}
"""Tiles by device and dtype, smallest first."""


@triton.jit
def product_kernel(
    a, b, bias, out, M, N, K, inner, span,
    a_outer, a_inner, a_m, a_k, b_outer, b_inner, b_k, b_n, bias_n, out_part, out_outer, out_inner, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    first = tile // (GROUP * tiles_n) * GROUP  # neighbours in time share rows of a and columns of b in the L2
    height = min(tiles_m - first, GROUP)
    tile_m = first + tile % (GROUP * tiles_n) % height
    tile_n = tile % (GROUP * tiles_n) // height
    outer = (batch // inner).to(tl.int64)
    within = (batch % inner).to(tl.int64)
    part = tl.program_id(1)

    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    depth = part * span + tl.arange(0, BK)
    a += outer * a_outer + within * a_inner
    b += outer * b_outer + within * b_inner
    a_tile = a + (rows % M).to(tl.int64)[:, None] * a_m + depth.to(tl.int64)[None, :] * a_k
    b_tile = b + depth.to(tl.int64)[:, None] * b_k + (columns % N).to(tl.int64)[None, :] * b_n
    step = tl.full((), BK, tl.int64)

    acc = tl.zeros((BM, BN), dtype=SUM)
    end = min(K, (part + 1) * span)
    for k in range(part * span, end, BK):
        if EVEN:
            x, w = tl.load(a_tile), tl.load(b_tile)
        else:
            left = tl.arange(0, BK) < end - k
            x, w = tl.load(a_tile, left[None, :], other=0.0), tl.load(b_tile, left[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        a_tile += step * a_k
        b_tile += step * b_k

    inside_m, inside_n = rows < M, columns < N
    if BIAS:
        acc += widen(tl.load(bias + columns.to(tl.int64) * bias_n, inside_n, other=0.0))[None, :]
    out += part.to(tl.int64) * out_part + outer * out_outer + within * out_inner
    out_tile = out + rows.to(tl.int64)[:, None] * out_m + columns.to(tl.int64)[None, :] * out_n
    tl.store(out_tile, narrow(acc, out.dtype.element_ty), inside_m[:, None] & inside_n[None, :])


@triton.jit
def sum_kernel(
    parts, bias, out, M, N, inner, count, size, bias_n, out_outer, out_inner, out_m, out_n,
    BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Add the parts of a split product in their order, then the bias; the one rounding happens here."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros((BLOCK,), dtype=parts.dtype.element_ty)
    for _ in range(count):
        acc += tl.load(parts + at, inside, other=0.0)
        parts += size
    row, column = at // N, at % N
    batch, row = row // M, row % M
    if BIAS:
        acc += widen(tl.load(bias + column * bias_n, inside, other=0.0))
    to = out + (batch // inner) * out_outer + (batch % inner) * out_inner + row * out_m + column * out_n
    tl.store(to, narrow(acc, out.dtype.element_ty), inside)


def _choose(m: int, n: int, k: int, batch: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """As many rows as there are, up to the largest tile that still gives every processor one, or for more rows than a
    tile has that lets programs move fewer bytes, the parts of split sums among them."""

    def moved(tile: Tile) -> int:
        across, down = triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"])
        parts = _parts(batch * across * down, k, batch * m * n, tile, device)
        sums = 2 * max(4, dtype.itemsize) * parts * m * n if parts > 1 else 0
        return (m * across + n * down) * k * dtype.itemsize + sums

    kind = "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
    kind = kind if dtype.is_floating_point else "integers"
    tiles = products(TILES[chip(device).kind][kind], device, dtype.itemsize)
    chosen = tiles[0]
    for tile in tiles[1:]:
        count = batch * triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"])
        if tile["BM"] >= 2 * max(m, chosen["BM"]):
            break
        if count >= chip(device).processors or (m > chosen["BM"] and moved(tile) < moved(chosen)):
            chosen = tile
    return chosen


def _parts(tiles: int, k: int, rows: int, tile: Tile, device: torch.device) -> int:
    """Into how many spans of k a product is cut, so that few tiles still fill the device; 1 leaves it whole."""
    wanted = min(chip(device).processors // max(tiles, 1), k // (4 * tile["BK"]), 16)
    return max(1, min(wanted, config.budget() // 4 // max(8 * rows, 1)))


def _axes(a: Any, b: Any, out: Any) -> tuple[list[tuple[int, int, int, int]], int]:
    """The batch axes as (size, strides of a, b, out), merged where all three allow, and how many rows merge into m."""
    m = out.shape[-2]
    axes: list[tuple[int, int, int, int]] = []
    for axis in range(out.dim() - 2):
        entry = (out.shape[axis], a.stride(axis), b.stride(axis), out.stride(axis))
        if entry[0] == 1:
            continue
        if axes and all(axes[-1][i] == entry[0] * entry[i] for i in (1, 2, 3)):
            axes[-1] = (axes[-1][0] * entry[0], *entry[1:])
        else:
            axes.append(entry)
    size, step, still, out_step = axes[-1] if axes else (1, 0, 1, 0)
    joins = m == 1 or (step, out_step) == (m * a.stride(-2), m * out.stride(-2))
    return axes, size if still == 0 and joins and m * size <= LONGEST else 1


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """``out[..., m, n] = a[..., m, k] @ b[..., k, n] + bias[n]`` in any layout; leading axes broadcast to out's."""
    (m, n), k, device = out.shape[-2:], a.shape[-1], out.device
    if out.numel() == 0:
        return
    if n <= 32 < m and bias is None:  # few columns: let them be the rows, which the small tiles fit
        a, b, out, m, n = b.mT, a.mT, out.mT, n, m
    a, b = a.expand(*out.shape[:-2], m, k), b.expand(*out.shape[:-2], k, n)
    axes, folds = _axes(a, b, out)
    a_m, out_m = a.stride(-2), out.stride(-2)
    if folds > 1:
        _, step, _, out_step = axes.pop()
        a_m, out_m, m = (step, out_step, folds) if m == 1 else (a_m, out_m, m * folds)
    if len(axes) > 2:
        axis = next(i for i, size in enumerate(out.shape) if size > 1)
        for i in range(out.shape[axis]):
            product(a.select(axis, i), b.select(axis, i), bias, out.select(axis, i))
        return
    (outer, *outer_steps), (inner, *inner_steps) = [(1, 0, 0, 0)] * (2 - len(axes)) + axes

    tile = _choose(m, n, k, outer * inner, a.dtype, device)
    tiles = outer * inner * triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"])
    size = outer * inner * m * n
    parts = _parts(tiles, k, size, tile, device)
    span = triton.cdiv(triton.cdiv(k, tile["BK"]), parts) * tile["BK"]
    parts = max(1, triton.cdiv(k, span)) if span else 1
    total = torch.promote_types(a.dtype, torch.float32 if a.is_floating_point() else torch.int32)
    steps = (outer_steps[2], inner_steps[2], out_m, out.stride(-1))
    to, to_steps, part_step = out, steps, 0
    if parts > 1:
        to = torch.empty((parts, size), dtype=total, device=device)
        to_steps, part_step = (inner * m * n, m * n, n, 1), size
    bias_n = 0 if bias is None else bias.stride(0)
    launch(
        product_kernel, (tiles, parts), device,
        a, b, bias, to, m, n, k, inner, span,
        outer_steps[0], inner_steps[0], a_m, a.stride(-1), outer_steps[1], inner_steps[1], b.stride(-2), b.stride(-1),
        bias_n, part_step, *to_steps,
        GROUP=8, BIAS=bias is not None and parts == 1, EVEN=k % tile["BK"] == 0, PRECISION=precision(),
        SUM=getattr(tl, str(total).removeprefix("torch.")), **tile,
    )  # fmt: skip
    if parts > 1:
        launch(
            sum_kernel, (triton.cdiv(size, 256),), device,
            to, bias, out, m, n, inner, parts, size, bias_n, *steps, BLOCK=256, BIAS=bias is not None, num_warps=4,
        )  # fmt: skip


def matmul_unsupported(a: torch.Tensor, b: torch.Tensor) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True)
def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Batched products through strides; nothing is copied."""
    product(a, b, None, out)


def linear_unsupported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    return too_long(x, weight)


@kernel(deterministic=True)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """The bias joins the accumulator before the one rounding."""
    if x.dim() == 1:
        x, out = x[None], out[None]
    product(x, weight.t(), bias, out)


def integer_matmul_unsupported(a: torch.Tensor, b: torch.Tensor) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True)
def integer_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Sums in int32 or int64, of which the low bits are left."""
    product(a, b, None, out)
