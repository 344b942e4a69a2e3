# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Hyper-connections on Triton: sums of the projection, then coefficients and collapse while L2 holds the streams."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._tensors import Results, give, room, tokens
from ._common import LOG2E, chip, dot, launch, narrow, precision, too_long, widen
from ._room import fitted

PROJECT = {"BT": 16, "BK": 64, "num_warps": 4, "num_stages": 2}
COLLAPSE = {"BT": 4, "BD": 512, "num_warps": 8}
SPLIT = {"BT": 32, "num_warps": 4}
MIX = {"BD": 512, "num_warps": 4}
IN_L2 = 16 << 20
"""Bytes of streams that are projected and then read again."""


@triton.jit
def _number(bits, dtype: tl.constexpr):
    """A float64 given as its bits, since a float argument would come as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _logits(mix, mix_p, mix_t, mix_c, parts, factor, token, there, column, inside, scale, base):
    """Sums over the parts of a projection, normalised, scaled and shifted."""
    place = mix + token.to(tl.int64) * mix_t + column.to(tl.int64) * mix_c
    total = tl.load(place, there & inside, other=0.0)
    for _ in range(1, parts):
        place += mix_p
        total += tl.load(place, there & inside, other=0.0)
    return total * factor * tl.load(scale) + tl.load(base + column, inside, other=0.0)


@triton.jit
def _gates(
    mix, mix_p, mix_t, mix_c, parts, factor, token, there, first, scale, base, N: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Sigmoids [tokens, P] of N columns from the first."""
    i = tl.arange(0, P)[None, :]
    logit = _logits(
        mix, mix_p, mix_t, mix_c, parts, factor[:, None], token[:, None], there[:, None], first + i, i < N, scale, base
    )  # fmt: skip
    return _sigmoid(logit)


@triton.jit
def _sinkhorn(
    mix, mix_p, mix_t, mix_c, parts, factor, token, there, scale, base, eps, iters, N: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Matrices [tokens, P, P]; the rounds scale rows and columns, not entries."""
    j, k = tl.arange(0, P)[None, :, None], tl.arange(0, P)[None, None, :]
    inside = (j < N) & (k < N)
    logit = _logits(
        mix, mix_p, mix_t, mix_c, parts, factor[:, None, None], token[:, None, None], there[:, None, None],
        (2 + j) * N + k, inside, scale, base,
    )  # fmt: skip
    logit = tl.where(inside, logit, float("-inf"))
    x = tl.exp2((logit - tl.max(logit, 2)[:, :, None]) * LOG2E)
    x = tl.where(inside, x / tl.sum(x, 2)[:, :, None] + eps, 0.0)
    own = tl.arange(0, P)[None, :] < N
    row = tl.where(own & there[:, None], 1.0, 0.0).to(x.dtype)
    column = row / (tl.sum(x, 1) + eps)
    for _ in range(1, iters):
        row = row / (row * tl.sum(x * column[:, None, :], 2) + eps)
        column = column / (column * tl.sum(x * row[:, :, None], 1) + eps)
    return x * row[:, :, None] * column[:, None, :]


@triton.jit
def _keep(x, to, to_t, to_i, token, there, N: tl.constexpr, P: tl.constexpr):
    i = tl.arange(0, P).to(tl.int64)[None, :]
    tl.store(to + token.to(tl.int64)[:, None] * to_t + i * to_i, x, there[:, None] & (i < N))


@triton.jit
def _keep_matrix(x, to, to_t, to_j, to_k, token, there, N: tl.constexpr, P: tl.constexpr):
    stream = tl.arange(0, P).to(tl.int64)
    j, k = stream[None, :, None], stream[None, None, :]
    place = to + token.to(tl.int64)[:, None, None] * to_t + j * to_j + k * to_k
    tl.store(place, x, there[:, None, None] & (j < N) & (k < N))


@triton.jit(do_not_specialize=["eps_bits", "iters"])
def split_kernel(
    mix, scale, base, pre, post, comb, eps_bits, T, iters, mix_t, mix_c,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    there = token < T
    eps = _number(eps_bits, mix.dtype.element_ty)
    one = tl.full((BT,), 1.0, mix.dtype.element_ty)
    x = _gates(mix, 0, mix_t, mix_c, 1, one, token, there, 0, scale, base, N, P)
    _keep(x + eps, pre, N, 1, token, there, N, P)
    x = _gates(mix, 0, mix_t, mix_c, 1, one, token, there, N, scale + 1, base, N, P)
    _keep(2 * x, post, N, 1, token, there, N, P)
    x = _sinkhorn(mix, 0, mix_t, mix_c, 1, one, token, there, scale + 2, base, eps, iters, N, P)
    _keep_matrix(x, comb, N * N, N, 1, token, there, N, P)


@triton.jit
def project_kernel(
    x, fn, sums, T, D, K, span, x_t, x_n, x_d, fn_r, fn_k, lines,
    C: tl.constexpr, PC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a span of the flat streams: a column each, then the squares; sums[part, token, C + 1]."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    there = token < T
    column = tl.arange(0, PC)
    acc = tl.zeros((BT, PC), sums.dtype.element_ty)
    squares = tl.zeros((BT,), sums.dtype.element_ty)
    for start in range(part * span, min(K, (part + 1) * span), BK):
        k = start + tl.arange(0, BK)
        left = k < K
        place = token.to(tl.int64)[:, None] * x_t + ((k // D).to(tl.int64) * x_n + (k % D).to(tl.int64) * x_d)[None, :]
        value = widen(tl.load(x + place, there[:, None] & left[None, :], other=0.0))
        weight = fn + column.to(tl.int64)[None, :] * fn_r + k.to(tl.int64)[:, None] * fn_k
        acc = dot(value, tl.load(weight, left[:, None] & (column < C)[None, :], other=0.0), acc, PRECISION)
        squares += tl.sum(value * value, 1)
    line = sums + part.to(tl.int64) * lines + token.to(tl.int64) * (C + 1)
    tl.store(line[:, None] + column[None, :], acc, there[:, None] & (column < C)[None, :])
    tl.store(line + C, squares, there)


@triton.jit(do_not_specialize=["eps_bits", "norm_bits", "iters"])
def collapse_kernel(
    sums, scale, base, x, y, post, comb, eps_bits, norm_bits, T, D, depth, parts, span, iters, x_t, x_n, x_d, lines,
    FULL: tl.constexpr, C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Coefficients of a few tokens, and some of their channels summed over the streams."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    there = token < T
    real: tl.constexpr = sums.dtype.element_ty
    eps = _number(eps_bits, real)
    squares = tl.zeros((BT,), real)
    place = sums + token.to(tl.int64) * (C + 1) + C
    for _ in range(0, parts):
        squares += tl.load(place, there, other=0.0)
        place += lines
    factor = 1 / tl.sqrt(squares / depth + _number(norm_bits, real))
    pre = _gates(sums, lines, C + 1, 1, parts, factor, token, there, 0, scale, base, N, P) + eps
    if FULL:  # noqa: SIM102  (one condition is known to the compiler)
        if tl.program_id(1) == 0:
            gates = _gates(sums, lines, C + 1, 1, parts, factor, token, there, N, scale + 1, base, N, P)
            _keep(2 * gates, post, N, 1, token, there, N, P)
            x_ = _sinkhorn(sums, lines, C + 1, 1, parts, factor, token, there, scale + 2, base, eps, iters, N, P)
            _keep_matrix(x_, comb, N * N, N, 1, token, there, N, P)
    stream = tl.arange(0, P)[None, :]
    first = tl.program_id(1) * span
    for start in range(first, min(D, first + span), BD):
        d = start + tl.arange(0, BD)
        inside = there[:, None] & (d < D)[None, :]
        total = tl.zeros((BT, BD), real)
        for j in tl.static_range(N):
            weight = tl.sum(tl.where(stream == j, pre, 0.0), 1)
            at = token.to(tl.int64)[:, None] * x_t + tl.cast(j, tl.int64) * x_n + d.to(tl.int64)[None, :] * x_d
            total += weight[:, None] * widen(tl.load(x + at, inside, other=0.0))
        to = y + token.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(to, narrow(total, y.dtype.element_ty), inside)


@triton.jit
def mix_kernel(
    y, x, post, comb, out, D, y_t, y_d, x_t, x_n, x_d, post_t, post_n, comb_t, comb_j, comb_k, out_t, out_n, out_d,
    N: tl.constexpr, P: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Some channels of a token: every stream is read before any is written."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < D
    at = d.to(tl.int64)
    k = tl.arange(0, P).to(tl.int64)
    weight = tl.load(post + token * post_t + k * post_n, k < N, other=0.0)
    new = widen(tl.load(y + token * y_t + at * y_d, inside, other=0.0))
    total = weight[:, None] * new[None, :]
    for j in tl.static_range(N):
        row = tl.cast(j, tl.int64)  # times a stride of 32 bits it may take more
        weight = tl.load(comb + token * comb_t + row * comb_j + k * comb_k, k < N, other=0.0)
        stream = widen(tl.load(x + token * x_t + row * x_n + at * x_d, inside, other=0.0))
        total += weight[:, None] * stream[None, :]
    to = out + token * out_t + k[:, None] * out_n + at[None, :] * out_d
    tl.store(to, narrow(total, out.dtype.element_ty), (k < N)[:, None] & inside[None, :])


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def hc_split_sinkhorn_unsupported(
    mix: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, mult: int, iters: int, eps: float
) -> str | None:
    return _too_many(mult) or too_long(mix)


def _too_many(n: int) -> str | None:
    return f"{n} streams; a program holds the matrices of at most 16" if n > 16 else None


@kernel(deterministic=True, batch_invariant=True)
def hc_split_sinkhorn(
    mix: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, mult: int, iters: int, eps: float, out: Results
) -> None:
    """A program holds the matrices of 32 tokens through all rounds."""
    flat = tokens(mix, mix.shape[:-1], 1)
    if not len(flat):
        return
    found = [room(x, mix.dim() - 1) for x in out]
    launch(
        split_kernel, (triton.cdiv(len(flat), SPLIT["BT"]),), mix.device,
        flat, scale.contiguous(), base.contiguous(), *found, _bits(eps), len(flat), iters, *flat.stride(),
        N=mult, P=triton.next_power_of_2(mult), **SPLIT,
    )  # fmt: skip
    give(out, found)


def hc_pre_unsupported(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> str | None:
    return _too_many(x.shape[-2]) or too_long(x, fn)


@kernel(deterministic=True)
def hc_pre(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    out: Results,
) -> None:
    """Two kernels for as many tokens as L2 holds; the projection of few tokens is cut into parts."""
    found = [room(z, x.dim() - 2) for z in out]
    _run(tokens(x, x.shape[:-2], 2), fn, base, scale, iters, eps, norm_eps, found)
    give(out, found)


def hc_head_unsupported(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, eps: float, norm_eps: float
) -> str | None:
    return _too_many(x.shape[-2]) or too_long(x, fn)


@kernel(deterministic=True)
def hc_head(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    norm_eps: float,
    out: torch.Tensor,
) -> None:
    """As `hc_pre`, with one gate for each stream."""
    found = room(out, x.dim() - 2)
    _run(tokens(x, x.shape[:-2], 2), fn, base, scale, 0, eps, norm_eps, [found])
    give((out,), (found,))


def _run(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    out: list[torch.Tensor],
) -> None:
    tokens, n, d = x.shape
    columns, device = fn.shape[0], x.device
    base, scale = base.contiguous(), scale.contiguous()
    project = PROJECT | ({"num_warps": 8} if fn.dtype == torch.float64 else {})
    collapse = fitted(COLLAPSE, device, lambda tile: 97 * tile["BT"] * tile["BD"], ("BD",))
    together = max(64, IN_L2 // (n * d * x.element_size() + 1))
    for start in range(0, tokens, together):
        rows = slice(start, min(start + together, tokens))
        part, found = x[rows], [z[rows] for z in out]
        y, post, comb = found if iters else (found[0], None, None)
        count, depth = len(part), max(n * d, 1)
        blocks = triton.cdiv(count, PROJECT["BT"])
        parts = max(1, min(chip(device).processors // blocks, triton.cdiv(depth, 4 * PROJECT["BK"]), 64))
        span = triton.cdiv(triton.cdiv(depth, PROJECT["BK"]), parts) * PROJECT["BK"]
        parts = triton.cdiv(depth, span)
        sums = torch.empty((parts, count, columns + 1), dtype=fn.dtype, device=device)
        launch(
            project_kernel, (blocks, parts), device,
            part, fn, sums, count, max(d, 1), n * d, span, *part.stride(), *fn.stride(), sums.stride(0),
            C=columns, PC=max(16, triton.next_power_of_2(columns)), PRECISION=precision(), **project,
        )  # fmt: skip
        blocks, wide = triton.cdiv(count, collapse["BT"]), collapse["BD"]
        pieces = max(1, min(chip(device).processors // blocks, triton.cdiv(d, wide)))
        reach = triton.cdiv(triton.cdiv(d, wide), pieces) * wide
        launch(
            collapse_kernel, (blocks, pieces), device,
            sums, scale, base, part, y, post, comb, _bits(eps), _bits(norm_eps),
            count, d, depth, parts, reach, iters, *part.stride(), sums.stride(0),
            FULL=iters > 0, C=columns, N=n, P=triton.next_power_of_2(n), **collapse,
        )  # fmt: skip


def hc_post_unsupported(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> str | None:
    return _too_many(x.shape[-2]) or too_long(y, x)


@kernel(deterministic=True, batch_invariant=True)
def hc_post(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, out: torch.Tensor) -> None:
    """A program mixes some channels of one token."""
    if not out.numel():
        return
    lead, (n, d) = out.shape[:-2], out.shape[-2:]
    parts = [tokens(z, lead, tail) for z, tail in ((y, 1), (x, 2), (post, 1), (comb, 2))]
    found = room(out, len(lead))
    launch(
        mix_kernel, (len(found), triton.cdiv(d, MIX["BD"])), out.device,
        *parts, found, d, *(step for z in parts for step in z.stride()), *found.stride(),
        N=n, P=triton.next_power_of_2(n), **MIX,
    )  # fmt: skip
    give((out,), (found,))
