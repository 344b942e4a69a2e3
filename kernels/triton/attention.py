# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Sparse attention on Triton: a program gathers the keys of one token for a block of heads; the softmax is online."""

import numpy as np
import torch
import triton
import triton.language as tl

from flagops import config
from flagops.registry import kernel

from ._common import (
    INTERPRET,
    LOG2E,
    attend,
    chip,
    dot,
    launch,
    narrow,
    precision,
    too_long,
)
from ._room import fitting

Tile = dict[str, int]


def _tile(heads: int, keys: int, chunk: int, piece: int, warps: int, stages: int) -> Tile:
    return {"BH": heads, "BK": keys, "CHUNK": chunk, "SLICE": piece, "num_warps": warps, "num_stages": stages}


_FINE = {
    "float32": [_tile(16, 16, 32, 64, 4, 2), _tile(16, 16, 32, 256, 8, 2)],
    "float64": [_tile(16, 16, 16, 64, 4, 2), _tile(16, 16, 32, 128, 8, 2)],
}
TILES: dict[str, dict[str, list[Tile]]] = {
    "cuda": {
        "half": [
            _tile(16, 64, 64, 64, 4, 3),
            _tile(64, 64, 64, 64, 4, 3),
            _tile(16, 64, 128, 128, 4, 3),
            _tile(64, 64, 128, 128, 4, 3),
            _tile(16, 32, 256, 256, 4, 3),
            _tile(64, 64, 256, 256, 8, 2),
            _tile(16, 64, 512, 512, 8, 3),
            _tile(32, 32, 512, 512, 8, 2),
            _tile(64, 32, 512, 512, 8, 3),
        ],
        **_FINE,
        "float32": [_tile(16, 16, 32, 64, 4, 2), _tile(16, 16, 32, 256, 4, 2)],  # eight warps would spill
    },
    "hip": {
        "half": [
            _tile(16, 64, 64, 64, 4, 2),
            _tile(64, 64, 64, 64, 4, 2),
            _tile(16, 64, 128, 128, 4, 2),
            _tile(64, 64, 128, 128, 4, 2),
            _tile(16, 32, 256, 256, 4, 2),
            _tile(64, 32, 256, 256, 8, 2),
            _tile(16, 32, 512, 512, 4, 2),
            _tile(32, 32, 512, 512, 4, 2),
        ],
        **_FINE,
    },
    "radeon": {
        "half": [
            _tile(16, 32, 64, 64, 4, 1),
            _tile(64, 32, 64, 64, 4, 1),
            _tile(16, 32, 128, 128, 4, 1),
            _tile(64, 32, 128, 128, 8, 1),
            _tile(16, 32, 64, 256, 8, 1),  # a query of so many channels would fill all registers
            _tile(64, 32, 64, 256, 8, 1),
            _tile(16, 32, 64, 512, 8, 1),
            _tile(32, 32, 64, 512, 16, 1),
        ],
        **_FINE,
    },
}
"""Tiles by device and dtype, narrow and short first. Where CHUNK is SLICE, a head no wider than that is one piece and
its keys are read once; any other head is cut into pieces, and each sums the scores anew, CHUNK channels at a time."""

WIDEST = 128
"""The slice for heads that no tile holds whole; beyond it the pieces would not fit beside the chunks."""


@triton.jit(do_not_specialize=["scale_bits"])
def attention_kernel(
    q, kv, sink, indices, out, maxima, sums, scale_bits,
    S, H, W, N, K, span,
    q_b, q_s, q_h, q_d, kv_b, kv_n, kv_d, sink_h, index_b, index_s, index_k,
    out_part, out_b, out_s, out_h, out_d,
    BH: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr, SINK: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H, BH)
    token = tl.program_id(0) // blocks
    part = tl.program_id(1)
    b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
    head = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    here = head < H
    channel = tl.arange(0, SLICE)
    if not WHOLE:
        channel += tl.program_id(2) * SLICE
    wide = tl.full((SLICE,), True, tl.int1) if FULL else channel < W
    q += b * q_b + s * q_s + head.to(tl.int64)[:, None] * q_h
    kv += b * kv_b
    indices += b * index_b + s * index_s
    number: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    # a float argument would come as float32
    scale = tl.cast(scale_bits, tl.int64).to(tl.float64, bitcast=True).to(number)
    if WHOLE:
        query = tl.load(q + channel.to(tl.int64)[None, :] * q_d, here[:, None] & wide[None, :], other=0.0)
    top = tl.full((BH,), float("-inf"), number)
    total = tl.zeros((BH,), number)
    acc = tl.zeros((BH, SLICE), number)
    seen = tl.zeros((BK,), tl.int1)
    end = min(K, (part + 1) * span)
    for start in range(part * span, end, BK):
        place = start + tl.arange(0, BK)
        index = tl.load(indices + place.to(tl.int64) * index_k, place < end, other=-1)
        valid = (index >= 0) & (index < N)
        row = kv + index.to(tl.int64)[:, None] * kv_n
        value = tl.load(row + channel.to(tl.int64)[None, :] * kv_d, valid[:, None] & wide[None, :], other=0.0)
        score = tl.zeros((BH, BK), number)
        if WHOLE:
            score = dot(query, tl.trans(value), score, PRECISION)
        else:
            for c in range(0, W, CHUNK):
                d = c + tl.arange(0, CHUNK)
                at, near = d.to(tl.int64)[None, :], (d < W)[None, :]
                part_of_query = tl.load(q + at * q_d, here[:, None] & near, other=0.0)
                part_of_key = tl.load(row + at * kv_d, valid[:, None] & near, other=0.0)
                score = dot(part_of_query, tl.trans(part_of_key), score, PRECISION)
        score = tl.where(valid[None, :], score * scale, float("-inf"))
        top, total, acc = attend(score, value, top, total, acc, PRECISION)
        seen |= valid

    out += part.to(tl.int64) * out_part + b * out_b + s * out_s
    to = out + head.to(tl.int64)[:, None] * out_h + channel.to(tl.int64)[None, :] * out_d
    if PARTIAL:
        if tl.program_id(2) == 0:
            line = (part.to(tl.int64) * (tl.num_programs(0) // blocks) + token) * H + head
            tl.store(maxima + line, top, here)
            tl.store(sums + line, total, here)
    else:
        if SINK:
            origin = tl.where(top == float("-inf"), 0.0, top)
            total += tl.exp2((tl.load(sink + head.to(tl.int64) * sink_h, here, other=0.0) - origin) * LOG2E)
        acc = tl.where(tl.max(seen.to(tl.int32), 0) > 0, acc / total[:, None], 0.0)
    tl.store(to, narrow(acc, out.dtype.element_ty), here[:, None] & wide[None, :])


@triton.jit
def combine_kernel(
    parts, maxima, sums, sink, out, S, H, W, count, lines, sink_h, out_b, out_s, out_h, out_d,
    P: tl.constexpr, BLOCK: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Weigh the parts of one head by their maxima, always in the same order, and divide."""
    line = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, P).to(tl.int64)
    there = part < count
    top = tl.load(maxima + part * lines + line, there, other=float("-inf"))
    total = tl.load(sums + part * lines + line, there, other=0.0)
    highest = tl.max(top, 0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2((top - origin) * LOG2E)
    inside = there[:, None] & (channel < W)[None, :]
    value = tl.load(parts + (part * lines + line)[:, None] * W + channel[None, :], inside, other=0.0)
    total = tl.sum(total * weight, 0)
    empty = (highest == float("-inf")) & (total == 0.0)
    head, token = line % H, line // H
    if SINK:
        total += tl.exp2((tl.load(sink + head.to(tl.int64) * sink_h) - origin) * LOG2E)
    result = tl.where(empty, 0.0, tl.sum(value * weight[:, None], 0) / total)
    to = out + token // S * out_b + token % S * out_s + head * out_h + channel.to(tl.int64) * out_d
    tl.store(to, narrow(result, out.dtype.element_ty), channel < W)


def _choose(lines: int, keys: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The narrowest tile that holds the head, tall if there are heads to fill it, shared memory to hold it, and tokens
    and keys enough for a program on every processor."""
    kind = "half" if dtype.itemsize == 2 or INTERPRET.value else str(dtype).removeprefix("torch.")
    weighed = kind == "half" and not INTERPRET.value and chip(device).kind == "cuda"
    item = dtype.itemsize if weighed else 0
    tiles = fitting(
        TILES[chip(device).kind][kind], device, lambda tile: (12 * tile["BH"] + 4 * tile["BK"]) * tile["SLICE"], (),
        lambda tile: item * (tile["BH"] + 2 * tile["BK"]) * tile["SLICE"],  # the query and two tiles of keys
    )  # fmt: skip
    pieces = {tile["SLICE"] for tile in tiles}
    piece = min((p for p in pieces if p >= width), default=max(p for p in pieces if p <= WIDEST or kind != "half"))
    short, *tall = (tile for tile in tiles if tile["SLICE"] == piece)
    if not tall or heads <= short["BH"]:
        return short
    most = lines * triton.cdiv(heads, tall[-1]["BH"]) * max(1, keys // (2 * tall[-1]["BK"]))
    return tall[-1] if most >= chip(device).processors else short


def sparse_attention_unsupported(
    q: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor | None, indices: torch.Tensor, scale: float
) -> str | None:
    return too_long(q, kv, indices)


@kernel(deterministic=True)
def sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor | None,
    indices: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Keys are read once per block of heads; the keys of few tokens are shared out among programs, then combined."""
    if out.numel() == 0:
        return
    batch, tokens, heads, width = q.shape
    keys, device = indices.shape[2], out.device
    tile = _choose(batch * tokens, keys, heads, width, q.dtype, device)
    pieces = triton.cdiv(width, tile["SLICE"])
    programs, lines = batch * tokens * triton.cdiv(heads, tile["BH"]), batch * tokens * heads
    affordable = config.budget() // 4 // (8 * lines * (width + 2))
    parts = max(1, min(chip(device).processors // (programs * pieces), keys // (2 * tile["BK"]), affordable, 32))
    span = triton.cdiv(triton.cdiv(keys, tile["BK"]), parts) * tile["BK"]
    parts = triton.cdiv(keys, span) if span else 1

    to, maxima, sums, steps = out, None, None, (0, *out.stride())
    if parts > 1:
        number = torch.promote_types(q.dtype, torch.float32)
        to = torch.empty((parts, batch, tokens, heads, width), dtype=number, device=device)
        maxima, sums = torch.empty((2, parts, lines), dtype=number, device=device)
        steps = to.stride()
    sink_h = 0 if sink is None else sink.stride(0)
    launch(
        attention_kernel, (programs, parts, pieces), device,
        q, kv, sink, indices, to, maxima, sums, int(np.float64(scale).view(np.int64)),
        tokens, heads, width, kv.shape[1], keys, span, *q.stride(), *kv.stride(), sink_h, *indices.stride(), *steps,
        WHOLE=pieces == 1 and tile["CHUNK"] == tile["SLICE"], FULL=width % tile["SLICE"] == 0,
        SINK=sink is not None, PARTIAL=parts > 1, PRECISION=precision(), **tile,
    )  # fmt: skip
    if parts > 1:
        launch(
            combine_kernel, (lines, triton.cdiv(width, 128)), device,
            to, maxima, sums, sink, out, tokens, heads, width, parts, lines, sink_h, *out.stride(),
            P=triton.next_power_of_2(parts), BLOCK=128, SINK=sink is not None, num_warps=4,
        )  # fmt: skip
