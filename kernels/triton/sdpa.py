# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Dense attention on Triton: a program holds a block of queries of one head; the softmax over keys is online."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from flagops.reference.sdpa import factor

from flagops.registry import kernel

from ._common import INTERPRET, attend, chip, dot, launch, narrow, precision, too_long
from ._room import fits

WIDEST = 256


def _tile(queries: int, keys: int, width: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": queries, "BN": keys, "SLICE": width, "num_warps": warps, "num_stages": stages}


_FINE = [_tile(16, 16, 64, 4, 2), _tile(16, 16, 128, 4, 2), _tile(16, 16, 256, 8, 1)]
TILES: dict[str, dict[str, list[dict[str, int]]]] = {
    kind: {"half": half, "float32": _FINE, "float64": _FINE}
    for kind, half in {
        "cuda": [_tile(64, 64, 64, 4, 3), _tile(64, 64, 128, 4, 3), _tile(64, 32, 256, 8, 1)],
        "hip": [_tile(64, 64, 64, 4, 1), _tile(64, 64, 128, 4, 1), _tile(64, 32, 256, 8, 1)],
        "radeon": [_tile(64, 32, 64, 4, 1), _tile(64, 16, 128, 8, 1), _tile(16, 16, 256, 8, 1)],
    }.items()
}
"""Tiles by device and dtype; SLICE holds a head's keys and values."""


@triton.jit(do_not_specialize=["scale_bits"])
def dense_kernel(
    q, k, v, mask, out, scale_bits, H, SHARED, S, N, D, V,
    q_b, q_h, q_s, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, mask_b, mask_h, mask_s, mask_n,
    out_b, out_h, out_s, out_v,
    BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BM)
    line = tl.program_id(0) // blocks
    b, h = (line // H).to(tl.int64), line % H
    group = (h // SHARED).to(tl.int64)
    row = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    channel = tl.arange(0, SLICE)
    here = row < S
    number: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.cast(scale_bits, tl.int64).to(tl.float64, bitcast=True).to(number)
    q += b * q_b + h.to(tl.int64) * q_h
    k += b * k_b + group * k_h
    v += b * v_b + group * v_h
    place = row.to(tl.int64)[:, None] * q_s + channel.to(tl.int64)[None, :] * q_d
    query = tl.load(q + place, here[:, None] & (channel < D)[None, :], other=0.0)
    top = tl.full((BM,), float("-inf"), number)
    total = tl.zeros((BM,), number)
    acc = tl.zeros((BM, SLICE), number)
    end = N
    if CAUSAL:
        end = min(N, (tl.program_id(0) % blocks + 1) * BM)
    for start in range(0, end, BN):
        column = start + tl.arange(0, BN)
        inside = column < N
        at = column.to(tl.int64)[:, None]
        key = tl.load(
            k + at * k_n + channel.to(tl.int64)[None, :] * k_d, inside[:, None] & (channel < D)[None, :], other=0.0
        )
        value = tl.load(
            v + at * v_n + channel.to(tl.int64)[None, :] * v_d, inside[:, None] & (channel < V)[None, :], other=0.0
        )
        score = dot(query, tl.trans(key), tl.zeros((BM, BN), number), PRECISION) * scale
        kept = here[:, None] & inside[None, :]
        if MASK > 0:
            spot = mask + b * mask_b + h.to(tl.int64) * mask_h + row.to(tl.int64)[:, None] * mask_s
            given = tl.load(spot + column.to(tl.int64)[None, :] * mask_n, kept, other=0)
            if MASK == 1:
                kept = kept & (given != 0)
            else:
                score += given.to(number)
        if CAUSAL:
            kept = kept & (column[None, :] <= row[:, None])
        score = tl.where(kept, score, float("-inf"))
        top, total, acc = attend(score, value, top, total, acc, PRECISION)
    unseen = (top == float("-inf")) & (total == 0.0)
    acc = tl.where(unseen[:, None], 0.0, acc / tl.where(unseen, 1.0, total)[:, None])
    to = out + b * out_b + h.to(tl.int64) * out_h + row.to(tl.int64)[:, None] * out_s
    to += channel.to(tl.int64)[None, :] * out_v
    tl.store(to, narrow(acc, out.dtype.element_ty), here[:, None] & (channel < V)[None, :])


def scaled_dot_product_attention_unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> str | None:
    width = max(query.shape[-1], value.shape[-1])
    if width > WIDEST:
        return f"heads of {width} channels; a program holds at most {WIDEST}"
    return too_long(query, key)


def _flat(x: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """Batch axes, broadcast to `lead`, as one."""
    return x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])


@kernel(deterministic=True, batch_invariant=True)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    out: torch.Tensor,
) -> None:
    """Keys behind a causal block are not read; batch axes whose strides do not merge are copied first."""
    if not out.numel():
        return
    lead, (heads, length, depth), device = out.shape[:-3], out.shape[-3:], out.device
    result = out if out.dim() == 4 or out.is_contiguous() else out.new_empty(out.shape)
    q, k, v, to = (_flat(x, lead) for x in (query, key, value, result))
    mask, kind = None, 0
    steps: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        mask = _flat(attn_mask.expand(*attn_mask.shape[:-3], heads, *attn_mask.shape[-2:]), lead)
        kind, steps = 1 if mask.dtype == torch.uint8 else 2, mask.stride()
    name = "half" if query.dtype.itemsize == 2 or INTERPRET.value else str(query.dtype).removeprefix("torch.")
    width = max(query.shape[-1], depth)
    table = TILES[chip(device).kind][name]
    tile = next(tile for tile in table if tile["SLICE"] >= width)
    if kind == 2 and chip(device).kind == "cuda" and not chip(device).direct:
        tile = {**tile, "BN": min(tile["BN"], 32)}  # a mask of floats would be one operand too many for the registers
    if not fits(device, 0, 3 * 64 * tile["SLICE"] * query.itemsize * tile["num_stages"]):
        tile = {**tile, "num_stages": 1}
    launch(
        dense_kernel, (len(q) * heads * triton.cdiv(length, tile["BM"]),), device,
        q, k, v, mask, to, int(np.float64(factor(scale, query.shape[-1])).view(np.int64)),
        heads, heads // key.shape[-3], length, key.shape[-2], query.shape[-1], depth,
        *q.stride(), *k.stride(), *v.stride(), *steps, *to.stride(),
        CAUSAL=is_causal, MASK=kind, PRECISION=precision(), **tile,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)
