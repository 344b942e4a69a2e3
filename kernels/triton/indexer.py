# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The lightning indexer on Triton: scores as ordered integers, then an exact choice by their digits."""

from typing import Any

import torch
import triton
import triton.language as tl

from flagops import config
from flagops.registry import kernel

from ._common import chip, dot, launch, precision, too_long, widen

Tile = dict[str, int]


def _tile(heads: int, entries: int, depth: int, warps: int) -> Tile:
    return {"BH": heads, "BN": entries, "BD": depth, "num_warps": warps, "num_stages": 2}


_FINE = {"float32": [_tile(16, 32, 32, 4), _tile(64, 64, 32, 8)], "float64": [_tile(16, 32, 16, 4)]}
TILES: dict[str, dict[str, list[Tile]]] = {
    "cuda": {"half": [_tile(16, 128, 128, 4), _tile(64, 128, 128, 4)], **_FINE},
    "hip": {"half": [_tile(16, 64, 128, 4), _tile(64, 64, 128, 4)], **_FINE},
    "radeon": {"half": [_tile(16, 64, 128, 4), _tile(64, 32, 128, 8)], **_FINE},
}
"""Tiles by device and dtype: for few heads, for many."""

SELECT = {"BLOCK": 2048, "num_warps": 8}
_SCRATCH = 64 << 20
_PART = 512  # entries that are worth a program of their own


@triton.jit
def _limit(visible, b, t, N, visible_b, visible_s, VISIBLE: tl.constexpr):
    """How many entries a query sees."""
    limit = N
    if VISIBLE:
        limit = tl.minimum(tl.maximum(tl.load(visible + b * visible_b + t * visible_s), 0), N)
    return limit


@triton.jit
def score_kernel(
    q, keys, weights, visible, scores, S, N, K, H, D, base, E, queries, blocks,
    q_b, q_s, q_h, q_d, key_b, key_n, key_d, weight_b, weight_s, weight_h, visible_b, visible_s,
    BH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    WHOLE: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    groups, some = tl.cdiv(S, queries), tl.program_id(0) // blocks  # a second axis would end at 65535
    b = (some // groups).to(tl.int64)
    first = some % groups * queries
    start = tl.program_id(0) % blocks * BN
    column = start + tl.arange(0, BN)
    entry = base + column
    inside = (column < E) & (entry < N)
    depth = tl.arange(0, BD)
    keys += b * key_b + entry.to(tl.int64)[:, None] * key_n
    number: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    if WHOLE:
        across = depth < D
        key = tl.load(keys + depth.to(tl.int64)[None, :] * key_d, inside[:, None] & across[None, :], other=0.0)
    for step in range(0, queries):
        t = tl.minimum(first + step, S - 1).to(tl.int64)
        limit = _limit(visible, b, t, N, visible_b, visible_s, VISIBLE)
        if (first + step < S) & (limit > K) & (base + start < limit):
            score = tl.zeros((BN,), number)
            for h in range(0, H, BH):
                head = h + tl.arange(0, BH)
                here = head < H
                query = q + b * q_b + t * q_s + head.to(tl.int64)[:, None] * q_h
                product = tl.zeros((BH, BN), number)
                if WHOLE:
                    x = tl.load(query + depth.to(tl.int64)[None, :] * q_d, here[:, None] & across[None, :], other=0.0)
                    product = dot(x, tl.trans(key), product, PRECISION)
                else:
                    for d in range(0, D, BD):
                        at = d + depth
                        near = (at < D)[None, :]
                        x = tl.load(query + at.to(tl.int64)[None, :] * q_d, here[:, None] & near, other=0.0)
                        y = tl.load(keys + at.to(tl.int64)[None, :] * key_d, inside[:, None] & near, other=0.0)
                        product = dot(x, tl.trans(y), product, PRECISION)
                product = tl.where(product < 0, 0.0, product)
                at_weight = weights + b * weight_b + t * weight_s + head.to(tl.int64) * weight_h
                weight = widen(tl.load(at_weight, here, other=0.0))
                score += tl.sum(tl.where(here[:, None], product * weight[:, None], 0.0), 0)
            score = tl.where(score == 0, 0.0, score)
            if number == tl.float64:
                bits = score.to(tl.int64, bitcast=True)
                bits = tl.where(score == score, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), -0x7FFFFFFFFFFFFFFF)
            else:
                bits = score.to(tl.int32, bitcast=True)
                bits = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)
            tl.store(scores + (b * S + t) * E + column, bits, inside)


@triton.jit
def _counts(
    keys, places, begin, end, prefix,
    SHIFT: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """How many keys have each digit, of those that begin with the prefix; of the sign's digit the order is kept."""
    counts = tl.zeros((512,), tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < end
        key = tl.load(keys + at, there, other=0)
        if LISTED:
            there &= tl.load(places + at, there, other=-1) >= 0
        if FIRST:
            digit = (key >> SHIFT).to(tl.int32) + 128
        else:
            there &= (key >> (SHIFT + 8)) == prefix
            digit = (key >> SHIFT).to(tl.int32) & 255
        counts += tl.histogram(tl.where(there, digit, 511), 512)
    return tl.where(tl.arange(0, 512) < 256, counts, 0)


@triton.jit
def select_kernel(
    keys, places, visible, to_keys, to_places, S, N, K, base, E, span, line, to_line, offset,
    visible_b, visible_s, to_b, to_s, to_k,
    BLOCK: tl.constexpr, LISTED: tl.constexpr, LAST: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """The K highest of a part of each row, in order; of equals the first. The last stage writes the result."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // S, row % S
    part = tl.program_id(1)
    limit = _limit(visible, b, t, N, visible_b, visible_s, VISIBLE)
    begin = part * span
    end = min(begin + span, E)
    if not LISTED:
        end = min(end, limit - base)
    keys += row * line
    if LISTED:
        places += row * line
    if LAST:
        to_places += b * to_b + t * to_s
    else:
        to_keys += row * to_line + part.to(tl.int64) * K
        to_places += row * to_line + part.to(tl.int64) * K
    number: tl.constexpr = keys.dtype.element_ty
    bytes_of: tl.constexpr = 8 if number == tl.int64 else 4
    lane = tl.arange(0, BLOCK)
    kept = tl.full((), 0, tl.int32)
    if limit > K:
        prefix = tl.full((), 0, number)
        remaining = tl.full((), 0, tl.int32) + K
        few = limit < 0
        for digits in tl.static_range(bytes_of):
            counts = _counts(keys, places, begin, end, prefix, 8 * (bytes_of - 1 - digits), digits == 0, BLOCK, LISTED)
            total = tl.sum(counts, 0)
            above = total - tl.cumsum(counts, 0)
            chosen = (above < remaining) & (remaining <= above + counts)
            digit = tl.sum(tl.where(chosen, tl.arange(0, 512), 0), 0)
            if digits == 0:
                few = total < K
                prefix = (digit - 128).to(number)
            else:
                prefix = (prefix << 8) | digit.to(number)
            remaining -= tl.sum(tl.where(chosen, above, 0), 0)
        lowest: tl.constexpr = -(2 ** (8 * bytes_of - 1))
        least = tl.where(few, tl.full((), lowest, number), prefix)
        for start in range(begin, end, BLOCK):
            at = start + lane
            there = at < end
            key = tl.load(keys + at, there, other=0)
            place = base + at
            if LISTED:
                place = tl.load(places + at, there, other=-1)
                there &= place >= 0
            equal = (there & (key == least)).to(tl.int32)
            keep = there & ((key > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= remaining)))
            remaining -= tl.sum(equal, 0)
            position = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
            if LAST:
                tl.store(to_places + position.to(tl.int64) * to_k, place + offset, keep)
            else:
                tl.store(to_keys + position, key, keep)
                tl.store(to_places + position, place, keep)
            kept += tl.sum(keep.to(tl.int32), 0)
        for start in range(0, K, BLOCK):
            at = start + lane
            if LAST:
                tl.store(to_places + at.to(tl.int64) * to_k, -1, (at >= kept) & (at < K))
            else:
                tl.store(to_places + at, -1, (at >= kept) & (at < K))
    elif LAST:
        for start in range(0, K, BLOCK):
            at = start + lane
            tl.store(to_places + at.to(tl.int64) * to_k, tl.where(at < limit, at + offset, -1), at < K)


def lightning_indexer_unsupported(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, top_k: int, visible: torch.Tensor | None, offset: int
) -> str | None:
    return too_long(q, keys)


@kernel(deterministic=True)
def lightning_indexer(
    q: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    top_k: int,
    visible: torch.Tensor | None,
    offset: int,
    out: torch.Tensor,
) -> None:
    """As many queries at a time as their scores have room for; of few queries the entries are shared out too."""
    batch, length = q.shape[:2]
    n, k = keys.shape[1], out.shape[2]
    if not out.numel():
        return
    wide = 8 if q.dtype == torch.float64 else 4
    room = min(config.budget() // 4, _SCRATCH)
    entries = n if n == k else max(1, min(n, room // 4 // wide))
    lines = max(1, min(batch * length, room // (entries * wide)))
    longest = max(1, int((entries / k) ** 0.5))  # more would leave the second choice, of k from each, more than a part
    parts = min(max(4, chip(q.device).processors) // lines, entries // _PART, room // (2 * lines * k * (wide + 4)))
    parts = max(1, min(parts, longest))
    if lines < length:
        for b in range(batch):
            for start in range(0, length, lines):
                some = slice(start, start + lines)
                seen = None if visible is None else visible[b : b + 1, some]
                one = slice(b, b + 1)
                _choose(q[one, some], keys[one], weights[one, some], seen, offset, out[one, some], entries, parts)
        return
    for b in range(0, batch, lines // length):
        some = slice(b, b + lines // length)
        seen = None if visible is None else visible[some]
        _choose(q[some], keys[some], weights[some], seen, offset, out[some], entries, parts)


def _choose(
    q: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    visible: torch.Tensor | None,
    offset: int,
    out: torch.Tensor,
    entries: int,
    parts: int,
) -> None:
    """Some entries at a time; what each part of them chose, and what was chosen before, is chosen from again."""
    (batch, length, heads, depth), n, k, device = q.shape, keys.shape[1], out.shape[2], q.device
    number = torch.int64 if q.dtype == torch.float64 else torch.int32
    scores = torch.empty((batch * length, entries if n > k else 0), dtype=number, device=device)
    kind = "half" if q.dtype.itemsize == 2 else str(q.dtype).removeprefix("torch.")
    tiles = TILES[chip(device).kind][kind]
    tile = tiles[0] if heads <= tiles[0]["BH"] else tiles[-1]
    queries = 8 if batch * length * triton.cdiv(entries, tile["BN"]) >= 16 * chip(device).processors else 1
    seen_steps = (0, 0) if visible is None else visible.stride()
    shared: dict[str, Any] = {"VISIBLE": visible is not None}

    def select(source: Any, base: int, size: int, to: Any, parts: int = 1) -> None:
        """From (keys, places or None for those of a row of scores), to the same or, None, the result."""
        last, span = to is None, triton.cdiv(size, parts)
        launch(
            select_kernel, (batch * length, parts), device,
            *source, visible, *((None, out) if last else to), length, n, k, base, size, span, source[0].stride(0),
            0 if last else to[0].stride(0), offset, *seen_steps, *out.stride(),
            LISTED=source[1] is not None, LAST=last, **shared, **SELECT,
        )  # fmt: skip

    if n == k:
        select((scores, None), 0, 0, None)
        return
    several = int(entries < n)
    lists = []
    if several or parts > 1:
        shape = (batch * length, (several + parts) * k)
        lists = [(scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)) for _ in range(1 + several)]
        lists[0][1].fill_(-1)
    for base in range(0, n, entries):
        size = min(entries, n - base)
        blocks = triton.cdiv(size, tile["BN"])
        launch(
            score_kernel, (blocks * batch * triton.cdiv(length, queries),), device,
            q, keys, weights, visible, scores, length, n, k, heads, depth, base, entries, queries, blocks,
            *q.stride(), *keys.stride(), *weights.stride(), *seen_steps,
            WHOLE=depth <= tile["BD"], PRECISION=precision(), **shared, **tile,
        )  # fmt: skip
        if not lists:
            select((scores, None), base, size, None)
            return
        of_keys, of_places = (x[:, several * k :] for x in lists[0])
        select((scores, None), base, size, (of_keys, of_places), parts)
        select(lists[0], 0, (several + parts) * k, None if base + entries >= n else lists[1])
        lists.reverse()
