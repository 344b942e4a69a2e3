# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The key-value compressor on Triton: two products, a kernel that pools windows, and one that keeps the states."""

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._compress import chunks
from ._common import LOG2E, launch, narrow, too_long
from .matmul import product

_SCRATCH = 64 << 20
POOL = {"SLOTS": 16, "BLOCK": 128, "num_warps": 8}
ADVANCE = {"BLOCK": 512, "num_warps": 4}


@triton.jit
def _tokens(
    new, state, bias, row, held, inside, M, C, channel, there, state_r, state_c, bias_m, bias_c, BIAS: tl.constexpr
):
    """Rows of all tokens in order: the first `held` are the state's; others are new, and their scores get a bias."""
    old = row < held
    place = (row - held).to(tl.int64)
    before = tl.load(state + row.to(tl.int64) * state_r + channel * state_c, there & old, other=0.0)
    after = tl.load(new + place * C + channel, there & (row >= held), other=0.0)
    if BIAS:
        after += tl.load(bias + (inside + place) % M * bias_m + channel * bias_c, there & (row >= held), other=0.0)
    return tl.where(old, before, after)


_CHANGING = ["inside", "held", "tokens", "windows"]


@triton.jit(do_not_specialize=_CHANGING)
def pool_kernel(
    kv, scores, bias, kv_state, score_state, entries, M, before, inside, held, tokens, windows, C, width,
    bias_m, bias_c, kv_b, kv_r, kv_c, score_b, score_r, score_c, entry_b, entry_w, entry_d,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // windows).to(tl.int64)
    window = tl.program_id(0) % windows
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = channel < width
    kv += b * tokens * C
    scores += b * tokens * C
    kv_state += b * kv_b
    score_state += b * score_b
    top = tl.full((BLOCK,), float("-inf"), scores.dtype.element_ty)
    for start in range(0, before + M, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < before + M)[:, None] & inner[None, :]
        place = tl.where(slot < before, 0, C - width)[:, None].to(tl.int64) + channel[None, :]
        row = (window * M + slot)[:, None]
        score = _tokens(
            scores, score_state, bias, row, held, inside, M, C, place, there, score_r, score_c, bias_m, bias_c, True
        )
        top = tl.maximum(top, tl.max(tl.where(there, score, float("-inf")), 0))
    mass = tl.zeros((BLOCK,), scores.dtype.element_ty)
    total = tl.zeros((BLOCK,), scores.dtype.element_ty)
    for start in range(0, before + M, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < before + M)[:, None] & inner[None, :]
        place = tl.where(slot < before, 0, C - width)[:, None].to(tl.int64) + channel[None, :]
        row = (window * M + slot)[:, None]
        score = _tokens(
            scores, score_state, bias, row, held, inside, M, C, place, there, score_r, score_c, bias_m, bias_c, True
        )
        value = _tokens(kv, kv_state, bias, row, held, inside, M, C, place, there, kv_r, kv_c, bias_m, bias_c, False)
        p = tl.where(there, tl.exp2((score - top[None, :]) * LOG2E), 0.0)
        mass += tl.sum(p, 0)
        total += tl.sum(p * value, 0)
    to = entries + b * entry_b + window.to(tl.int64) * entry_w + channel.to(tl.int64) * entry_d
    tl.store(to, narrow(total / mass, entries.dtype.element_ty), inner)


@triton.jit(do_not_specialize=_CHANGING)
def advance_kernel(
    kv, scores, bias, kv_state, score_state, M, before, inside, held, tokens, windows, C,
    bias_m, bias_c, kv_b, kv_r, kv_c, score_b, score_r, score_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One place in the window a program: it alone reads and writes its rows of the states, which may be one array."""
    places = M if windows > 0 else tokens
    b = (tl.program_id(0) // places).to(tl.int64)
    j = tl.program_id(0) % places
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = channel < C
    kv += b * tokens * C
    scores += b * tokens * C
    kv_state += b * kv_b
    score_state += b * score_b
    row, place = j, before + inside + j
    if windows > 0:
        row, place = windows * M + before + j, before + j
        if row >= held + tokens:  # no new token has this place: the window that closed still has
            row -= M
    new_kv = _tokens(kv, kv_state, bias, row, held, inside, M, C, channel, there, kv_r, kv_c, bias_m, bias_c, False)
    new_score = _tokens(
        scores, score_state, bias, row, held, inside, M, C, channel, there, score_r, score_c, bias_m, bias_c, True
    )  # fmt: skip
    if (windows > 0) & (before > 0):
        row = windows * M + j
        old_kv = _tokens(kv, kv_state, bias, row, held, inside, M, C, channel, there, kv_r, kv_c, bias_m, bias_c, False)
        old_score = _tokens(
            scores, score_state, bias, row, held, inside, M, C, channel, there, score_r, score_c, bias_m, bias_c, True
        )  # fmt: skip
        tl.debug_barrier()  # all of a row is read before it is written
        tl.store(kv_state + j.to(tl.int64) * kv_r + channel * kv_c, old_kv, there)
        tl.store(score_state + j.to(tl.int64) * score_r + channel * score_c, old_score, there)
    tl.store(kv_state + place.to(tl.int64) * kv_r + channel * kv_c, new_kv, there)
    tl.store(score_state + place.to(tl.int64) * score_r + channel * score_c, new_score, there)


def compress_kv_unsupported(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    bias: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    filled: int,
) -> str | None:
    return too_long(x, wkv, bias, kv_state)


@kernel(deterministic=True)
def compress_kv(
    x: torch.Tensor,
    wkv: torch.Tensor,
    wgate: torch.Tensor,
    bias: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    filled: int,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Tokens in chunks that end with a window; the projections of a chunk are read back from the cache."""
    entries, *states = out
    for source, target in zip((kv_state, score_state), states, strict=True):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)
    (batch, length, _), (m, channels) = x.shape, bias.shape
    before, width = kv_state.shape[1] - m, entries.shape[2]
    if not channels:
        return
    for chunk in chunks(batch, length, m, before, filled, 2 * channels * bias.itemsize, _SCRATCH):
        some, windows, inside = slice(chunk.first, chunk.last), chunk.windows, chunk.inside
        count, tokens = chunk.last - chunk.first, chunk.stop - chunk.start
        kv, scores = bias.new_empty(2, count, tokens, channels)
        product(x[some, chunk.start : chunk.stop], wkv.t(), None, kv)
        product(x[some, chunk.start : chunk.stop], wgate.t(), None, scores)
        held = before + inside if windows else 0
        arrays = kv, scores, bias, states[0][some], states[1][some]
        steps = *bias.stride(), *states[0].stride(), *states[1].stride()
        if windows:
            pooled = entries[:, chunk.emitted :][some]
            launch(
                pool_kernel, (count * windows, triton.cdiv(width, POOL["BLOCK"])), x.device,
                *arrays, pooled, m, before, inside, held, tokens, windows, channels, width,
                *steps, *pooled.stride(), **POOL,
            )  # fmt: skip
        launch(
            advance_kernel, (count * (m if windows else tokens), triton.cdiv(channels, ADVANCE["BLOCK"])), x.device,
            *arrays, m, before, inside, held, tokens, windows, channels, *steps, **ADVANCE,
        )  # fmt: skip
