# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Products of rows grouped by expert on Triton: one launch over a list of row tiles, each with its expert.

The list is made on the device, so that nothing waits for it. FP8 activations are held as the bfloat16 of their values,
which is exact; FP8 and FP4 weights become bfloat16 in registers on their way into the matrix units.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from flagops import config
from flagops.registry import kernel

from .._moe import BLOCK, quantised, refusal
from ._common import chip, dot, launch, narrow, precision, too_long, widen
from ._room import fitting, products
from .matmul import TILES as PLAIN
from .moe import bits, gated
from .qmatmul import TILES as CODED
from .qmatmul import brain, factor, weight
from .quantize import NAN, e4m3_code, e4m3_value, magnitude_of

ACTIVATE_TILE: dict[str, Any] = {"ROWS": 8, "num_warps": 4}
COMBINE_TILE: dict[str, Any] = {"BLOCK": 512, "num_warps": 4}
Tile = dict[str, int]


@triton.jit
def place(work, rows, E, BM: tl.constexpr, GATHER: tl.constexpr):
    """A tile of the list: its expert, its rows, which of them count, and where in a they lie."""
    work += tl.program_id(0) * 3
    expert = tl.load(work)
    first = tl.load(work + 1)
    row = first + tl.arange(0, BM)
    inside = row < tl.load(work + 2)
    source = tl.where(inside, row, first)
    if GATHER:
        source = tl.load(rows + source)
    return expert, row.to(tl.int64), inside, source.to(tl.int64)


@triton.jit
def grouped_kernel(
    a, b, out, work, rows, E, N, K, a_m, a_k, b_e, b_k, b_n, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    expert, row, inside, source = place(work, rows, E, BM, GATHER)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    b += tl.minimum(expert, E - 1).to(tl.int64) * b_e
    a_tile = a + source[:, None] * a_m + depth.to(tl.int64)[None, :] * a_k
    b_tile = b + depth.to(tl.int64)[:, None] * b_k + (column % N).to(tl.int64)[None, :] * b_n
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32)
    end = tl.where(expert < E, K, 0)
    for k in range(0, end, BK):
        if EVEN:
            x, w = tl.load(a_tile), tl.load(b_tile)
        else:
            left = depth < end - k
            x, w = tl.load(a_tile, left[None, :], other=0.0), tl.load(b_tile, left[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        a_tile += step * a_k
        b_tile += step * b_k
    out += row[:, None] * out_m + column.to(tl.int64)[None, :] * out_n
    tl.store(out, narrow(acc, out.dtype.element_ty), inside[:, None] & (column < N)[None, :])


@triton.jit
def coded_kernel(
    a, b, scale, out, work, rows, E, N, K, a_m, b_e, b_n, b_k, scale_e, scale_n, scale_k, out_m,
    BM: tl.constexpr, BN: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, FOUR: tl.constexpr,
    CONVERT: tl.constexpr,
):  # fmt: skip
    expert, row, inside, source = place(work, rows, E, BM, GATHER)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    at, chosen = (column % N).to(tl.int64), tl.minimum(expert, E - 1).to(tl.int64)
    b += chosen * b_e
    scale += chosen * scale_e
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    end = tl.where(expert < E, K, 0)
    shift: tl.constexpr = 1.0 if CONVERT else 256.0
    long = tl.full((), 1, tl.int64)  # the number k has 32 bits, and a far stride times it more
    for k in range(0, end, 128):
        if FOUR:
            group, byte = tl.arange(0, 4), tl.arange(0, 16)
            there = (32 * group < end - k)[None, :]
            half = tl.arange(0, 64)
            even = tl.load(a + source[:, None] * a_m + (k + half)[None, :])
            odd = tl.load(a + source[:, None] * a_m + (k + 64 + half)[None, :])
            deep = (k // 2 + 16 * group[:, None] + byte[None, :]).to(tl.int64)
            codes = b + at[:, None, None] * b_n + deep[None, :, :] * b_k
            scales = scale + at[:, None] * scale_n + (k // 32 + group).to(tl.int64)[None, :] * scale_k
            if EVEN:
                packed, power = tl.load(codes), tl.load(scales)
            else:
                packed, power = tl.load(codes, there[:, :, None], other=0), tl.load(scales, there, other=127)
            packed, power = packed.to(tl.uint32), factor(power)[:, :, None]
            acc = dot(even, tl.trans(tl.reshape(weight(packed & 15, power), (BN, 64))), acc, "ieee")
            acc = dot(odd, tl.trans(tl.reshape(weight(packed >> 4, power), (BN, 64))), acc, "ieee")
        else:
            depth = k + tl.arange(0, 128)
            x = tl.load(a + source[:, None] * a_m + depth[None, :])
            codes = b + depth.to(tl.int64)[:, None] * b_k + at[None, :] * b_n
            if EVEN:
                w = tl.load(codes)
            else:
                w = tl.load(codes, (depth < end)[:, None], other=0)
            power = factor(tl.load(scale + at // 128 * scale_n + long * (k // 128) * scale_k))
            part = dot(x, brain(w, CONVERT), tl.zeros((BM, BN), dtype=tl.float32), "ieee")
            acc += part * shift * power[None, :]
    out += row[:, None] * out_m + column.to(tl.int64)[None, :]
    tl.store(out, narrow(acc, out.dtype.element_ty), inside[:, None] & (column < N)[None, :])


@triton.jit
def through_fp8(value, out, column, inside, FOUR: tl.constexpr):
    """Store blocks of 128 as the bfloat16 of their FP8 values; for FP4 weights the even elements before the odd."""
    top = tl.max(magnitude_of(value), 1)
    finite = (top < NAN)[:, None]
    largest = tl.maximum(tl.where(top < NAN, top, 0).to(tl.float32, bitcast=True), 1e-4)
    byte = ((largest * (1 / 448)).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    code = e4m3_code(tl.where(finite, value, 0.0) * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None])
    rounded = e4m3_value(code) * (byte << 23).to(tl.float32, bitcast=True)[:, None]
    rounded = tl.where(finite, rounded, float("nan"))
    if FOUR:
        column = column % 2 * 64 + column // 2
    tl.store(out + column[None, :], narrow(rounded, tl.bfloat16), inside)


@triton.jit
def fake_kernel(x, out, T, D, x_t, x_d, out_t, ROWS: tl.constexpr, FOUR: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, within = tl.program_id(1) * 128, tl.arange(0, 128)
    here = (row < T)[:, None]
    column = (first + within).to(tl.int64)[None, :]
    value = widen(tl.load(x + row[:, None] * x_t + column * x_d, here & (column < D), other=0.0))
    through_fp8(value, out + row[:, None] * out_t + first, within, here, FOUR)


@triton.jit(do_not_specialize=["limit_bits"])
def activate_kernel(
    both, order, weights, out, limit_bits, P, N, slots, weights_t, weights_k, out_p,
    ROWS: tl.constexpr, FAKE: tl.constexpr, FOUR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, within = tl.program_id(1) * 128, tl.arange(0, 128)
    here = row < P
    column = (first + within).to(tl.int64)[None, :]
    inside = here[:, None] & (column < N)
    pair = tl.load(order + row, here, other=0).to(tl.int64)
    routing = tl.load(weights + pair // slots * weights_t + pair % slots * weights_k, here, other=0.0)
    both += row[:, None] * (2 * N) + column
    g, u = widen(tl.load(both, inside, other=0.0)), widen(tl.load(both + N, inside, other=0.0))
    limit = tl.cast(limit_bits, tl.int64).to(tl.float64, bitcast=True).to(g.dtype)  # a float would be float32
    h = gated(g, u, routing[:, None], limit)
    if FAKE:
        h = widen(narrow(tl.where(inside, h, 0.0), both.dtype.element_ty))
        through_fp8(h, out + row[:, None] * out_p + first, within, here[:, None], FOUR)
    else:
        tl.store(out + row[:, None] * out_p + column, narrow(h, out.dtype.element_ty), inside)


@triton.jit
def combine_kernel(
    y, position, shared, out, D, slots, shared_t, shared_d, out_t, out_d, SHARED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < D
    acc = tl.zeros((BLOCK,), dtype=tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)
    if SHARED:
        acc += widen(tl.load(shared + token * shared_t + column * shared_d, inside, other=0.0))
    for slot in range(slots):
        row = tl.load(position + token * slots + slot).to(tl.int64)
        acc += widen(tl.load(y + row * D + column, inside, other=0.0))
    tl.store(out + token * out_t + column * out_d, narrow(acc, out.dtype.element_ty), inside)


def _work(ends: torch.Tensor, count: int, height: int) -> torch.Tensor:
    """Tiles of rows as (expert, first, last), for rows sorted by expert; the last group is that of no expert."""
    ends = torch.cat((ends.long().clamp(0, count).cummax(0).values, ends.new_full((1,), count, dtype=torch.int64)))
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    tiles = (ends - starts + height - 1) // height
    after = tiles.cumsum(0)
    tile = torch.arange(count // height + min(len(ends), count), device=ends.device)
    expert = torch.searchsorted(after, tile, right=True)
    known = expert.clamp(max=len(ends) - 1)
    first = starts[known] + (tile - after[known] + tiles[known]) * height
    used = expert < len(ends)
    return torch.stack((expert, first * used, ends[known] * used), 1).int()


def _narrow(tiles: list[Tile]) -> list[Tile]:
    return [tile for tile in tiles if max(tile["BM"], tile["BN"]) <= 128]


def _lowest(tiles: list[Tile], rows: float) -> Tile:
    """The smallest tile that holds the rows of an expert, or the largest."""
    return next((tile for tile in tiles if tile["BM"] >= rows), tiles[-1])


def _plain(
    a: torch.Tensor, rows: torch.Tensor | None, b: torch.Tensor, ends: torch.Tensor, count: int, out: torch.Tensor
) -> None:
    """Rows of a, sorted by expert or listed in ``rows``, times b[e, k, n]."""
    experts, depth, width = b.shape
    kind = "half" if a.dtype.itemsize == 2 else str(a.dtype).removeprefix("torch.")
    tiles = products(_narrow(PLAIN[chip(a.device).kind][kind]), a.device, a.dtype.itemsize)
    tile = _lowest(tiles, count / experts)
    work = _work(ends, count, tile["BM"])
    launch(
        grouped_kernel, (len(work), triton.cdiv(width, tile["BN"])), a.device,
        a, b, out, work, work if rows is None else rows, experts, width, depth, *a.stride(), *b.stride(), *out.stride(),
        GATHER=rows is not None, EVEN=depth % tile["BK"] == 0, PRECISION=precision(), **tile,
    )  # fmt: skip


def _coded(
    a: torch.Tensor, rows: torch.Tensor | None, b: torch.Tensor, scale: torch.Tensor, depth: int, ends: torch.Tensor,
    count: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Likewise, a as `through_fp8` leaves it and b[e, n, k] in codes."""
    experts, width = b.shape[:2]
    tiles = _narrow(CODED[chip(a.device).kind])
    every = 2 * BLOCK  # bytes of a row, in all stages: on AMD's too, where registers hold what is decoded
    tiles = fitting(
        tiles, a.device, lambda tile: 0, (), lambda tile: tile["num_stages"] * (tile["BM"] + tile["BN"]) * every
    )
    tile = _lowest(tiles, count / experts)
    work = _work(ends, count, tile["BM"])
    launch(
        coded_kernel, (len(work), triton.cdiv(width, tile["BN"])), a.device,
        a, b, scale, out, work, work if rows is None else rows, experts, width, depth,
        a.stride(0), *b.stride(), *scale.stride(), out.stride(0),
        GATHER=rows is not None, EVEN=depth % BLOCK == 0, FOUR=b.shape[2] != depth, CONVERT=chip(a.device).converts,
        **tile,
    )  # fmt: skip


def grouped_matmul_unsupported(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> str | None:
    return too_long(a, b)


@kernel(deterministic=True)
def grouped_matmul(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Rows past the last offset make tiles of their own, whose sums stay 0."""
    if not out.numel():
        return
    if not len(offsets) or not a.shape[1]:
        out.zero_()
        return
    _plain(a, None, b, offsets, a.shape[0], out)


def moe_experts_unsupported(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    limit: float | None,
    shared: torch.Tensor | None,
) -> str | None:
    return refusal(x, weights, gate_up, shared) or too_long(x, gate_up, down)


@kernel(deterministic=True)
def moe_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    limit: float | None,
    shared: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Two products over the pairs of token and expert, as many tokens at a time as the byte budget allows."""
    (tokens, width), slots, inner = x.shape, indices.shape[1], gate_up.shape[1] // 2
    experts, codes = gate_up.shape[0], quantised(gate_up)
    if not out.numel():
        return
    if not (slots and experts and inner):
        out.zero_() if shared is None else out.copy_(shared)
        return
    per_token = slots * (width + 4 * inner) * x.itemsize + 2 * width + 32 * slots
    step = max(1, config.budget() // 2 // per_token)
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        _some(
            x[some], weights[some], indices[some], gate_up, down, gate_up_scale if codes else None, down_scale,
            limit, None if shared is None else shared[some], out[some],
        )  # fmt: skip


def _some(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    gate_up_scale: torch.Tensor | None, down_scale: torch.Tensor | None, limit: float | None,
    shared: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    (tokens, width), slots, (experts, both_width) = x.shape, indices.shape[1], gate_up.shape[:2]
    inner, pairs, device = both_width // 2, tokens * slots, x.device
    flat = indices.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    ids, order = torch.sort(flat, stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=device), right=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=device))
    position = position.view(tokens, slots).sort(1).values  # of a token, in the order of its experts
    rows, codes, four = order // slots, gate_up_scale is not None, gate_up.shape[2] != width
    both = x.new_empty((pairs, both_width))
    y = x.new_empty((pairs, width))
    height = ACTIVATE_TILE["ROWS"]
    blocks = triton.cdiv(inner, BLOCK)
    if gate_up_scale is not None:
        deep = triton.cdiv(width, BLOCK)
        given = torch.empty((tokens, deep * BLOCK), dtype=torch.bfloat16, device=device)
        launch(
            fake_kernel, (triton.cdiv(tokens, height), deep), device,
            x, given, tokens, width, *x.stride(), given.stride(0), FOUR=four, **ACTIVATE_TILE,
        )  # fmt: skip
        _coded(given, rows, gate_up, gate_up_scale, width, ends, pairs, both)
        h = torch.empty((pairs, blocks * BLOCK), dtype=torch.bfloat16, device=device)
    else:
        _plain(x, rows, gate_up.mT, ends, pairs, both)
        h = x.new_empty((pairs, inner))
    launch(
        activate_kernel, (triton.cdiv(pairs, height), blocks), device,
        both, order, weights, h, bits(limit), pairs, inner, slots, *weights.stride(), h.stride(0),
        FAKE=codes, FOUR=four, **ACTIVATE_TILE,
    )  # fmt: skip
    if down_scale is not None:
        _coded(h, None, down, down_scale, inner, ends, pairs, y)
    else:
        _plain(h, None, down.mT, ends, pairs, y)
    steps = (0, 0) if shared is None else shared.stride()
    launch(
        combine_kernel, (tokens, triton.cdiv(width, COMBINE_TILE["BLOCK"])), device,
        y, position, out if shared is None else shared, out, width, slots, *steps, *out.stride(),
        SHARED=shared is not None, **COMBINE_TILE,
    )  # fmt: skip
