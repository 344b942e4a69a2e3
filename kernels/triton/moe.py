# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The router and the gated activation on Triton: the scores of a token and its choice stay in registers."""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._rows import rows
from ._common import launch, narrow, too_long, widen
from .matmul import product

MOST_EXPERTS = 4096
ROUTE_TILE: dict[str, Any] = {"TILE": 1024, "num_warps": 4}
GATE_TILE: dict[str, Any] = {"ROWS": 1, "BLOCK": 1024, "num_warps": 4}


@triton.jit
def softplus(z, WIDE: tl.constexpr):
    """log(1 + exp(z)), the identity above 20. With e = exp(-|z|), log(1 + e) is twice the artanh of e / (2 + e)."""
    e = tl.exp(-tl.abs(z))
    s = e / (2 + e)
    square = s * s
    terms: tl.constexpr = 17 if WIDE else 8
    series = tl.zeros_like(s)
    for i in tl.static_range(terms):
        series = series * square + 1.0 / (2 * (terms - 1 - i) + 1)
    return tl.where(z > 20, z, tl.where(z > 0, z, 0.0) + 2 * s * series)


@triton.jit(do_not_specialize=["scale_bits"])
def route_kernel(
    z, bias, table, tokens, weights, indices, scale_bits, T, E, V, bias_e, table_v, table_k, tokens_t,
    weights_t, weights_k, indices_t, indices_k,
    K: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < T)[:, None]
    expert = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    real: tl.constexpr = z.dtype.element_ty
    logit = tl.load(z + row[:, None] * E + expert, here & (expert < E), other=0.0)
    score = tl.sqrt(softplus(logit, real == tl.float64))
    taken = tl.broadcast_to(expert >= E, (ROWS, BLOCK))
    value = score
    if BIAS:
        value += widen(tl.load(bias + expert.to(tl.int64) * bias_e, expert < E, other=0.0)).to(real)
    value = tl.where(value == value, value, -float("inf"))
    if TABLE:
        token = tl.load(tokens + row * tokens_t, row < T, other=0).to(tl.int64)
        table += tl.minimum(tl.maximum(token, 0), V - 1) * table_v
    chosen = tl.zeros((ROWS, SLOTS), dtype=real)
    ids = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
    for i in range(K):
        if TABLE:
            best = tl.load(table + i * table_k, row < T, other=0).to(tl.int64)
            best = tl.minimum(tl.maximum(best, 0), E - 1).to(tl.int32)
        else:
            top = tl.max(tl.where(taken, -float("inf"), value), 1)
            best = tl.min(tl.where((taken == 0) & (value == top[:, None]), expert, BLOCK - 1), 1)
            taken |= expert == best[:, None]
        found = tl.sum(tl.where(expert == best[:, None], score, 0.0), 1)
        chosen = tl.where(slot == i, found[:, None], chosen)
        ids = tl.where(slot == i, best[:, None], ids)
    total = tl.sum(chosen, 1)[:, None]
    scale = tl.cast(scale_bits, tl.int64).to(tl.float64, bitcast=True).to(real)  # a float argument would be float32
    result = tl.where(total == 0, 0.0, chosen / tl.where(total == 0, 1.0, total) * scale)
    inside, slot = here & (slot < K), slot.to(tl.int64)
    tl.store(weights + row[:, None] * weights_t + slot * weights_k, result, inside)
    tl.store(indices + row[:, None] * indices_t + slot * indices_k, ids, inside)


def moe_gate_unsupported(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    tokens: torch.Tensor | None,
    top_k: int,
    scale: float,
) -> str | None:
    if weight.shape[0] > MOST_EXPERTS:
        return f"{weight.shape[0]} experts; at most {MOST_EXPERTS} fit"
    return too_long(x, weight)


@kernel(deterministic=True)
def moe_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    tokens: torch.Tensor | None,
    top_k: int,
    scale: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """One product with float32 results, then one program for a few tokens."""
    count, experts = x.shape[0], weight.shape[0]
    if not count:
        return
    real = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype != x.dtype:
        x, weight = x.to(real), weight.to(real)
    z = torch.empty((count, experts), dtype=real, device=x.device)
    product(x, weight.t(), None, z)
    block = triton.next_power_of_2(experts)
    height = max(1, ROUTE_TILE["TILE"] // block)
    hashed = table is not None and tokens is not None
    table_steps = table.stride() if table is not None and hashed else (0, 0)
    launch(
        route_kernel, (triton.cdiv(count, height),), x.device,
        z, bias, table if hashed else z, tokens if hashed else z, *out, bits(scale), count, experts,
        len(table) if table is not None else 0, 0 if bias is None else bias.stride(0), *table_steps,
        tokens.stride(0) if tokens is not None else 0, *out[0].stride(), *out[1].stride(),
        K=top_k, SLOTS=triton.next_power_of_2(top_k), BIAS=bias is not None and not hashed, TABLE=hashed,
        ROWS=height, BLOCK=block, num_warps=ROUTE_TILE["num_warps"],
    )  # fmt: skip


def bits(value: float | None) -> int:
    """A float64 as an integer; infinity for None."""
    return int(np.float64(math.inf if value is None else value).view(np.int64))


@triton.jit
def gated(gate, up, weight, limit):
    """silu(min(gate, limit)) * clip(up) * weight; NaN passes through the clamp."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1 + tl.exp(-gate)) * up * weight


@triton.jit(do_not_specialize=["limit_bits"])
def swiglu_kernel(
    gate, up, weight, out, limit_bits, count, N, N1, N2, gate_0, gate_1, gate_2, gate_n, up_0, up_1, up_2, up_n,
    weight_0, weight_1, weight_2, out_0, out_1, out_2, out_n,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < N)[None, :]
    k, j, i = row % N2, row // N2 % N1, row // N2 // N1
    column = column.to(tl.int64)[None, :]
    gate += (i * gate_0 + j * gate_1 + k * gate_2)[:, None] + column * gate_n
    up += (i * up_0 + j * up_1 + k * up_2)[:, None] + column * up_n
    g, u = widen(tl.load(gate, inside, other=0.0)), widen(tl.load(up, inside, other=0.0))
    limit = tl.cast(limit_bits, tl.int64).to(tl.float64, bitcast=True).to(g.dtype)  # a float would be float32
    factor = tl.full((ROWS,), 1.0, g.dtype)
    if WEIGHT:
        factor = tl.load(weight + i * weight_0 + j * weight_1 + k * weight_2, row < count, other=0.0)
    h = gated(g, u, factor[:, None], limit)
    out += (i * out_0 + j * out_1 + k * out_2)[:, None] + column * out_n
    tl.store(out, narrow(h, out.dtype.element_ty), inside)


def swiglu_unsupported(
    gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None, limit: float | None
) -> str | None:
    return too_long(gate, up)


@kernel(deterministic=True)
def swiglu(
    gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor | None, limit: float | None, out: torch.Tensor
) -> None:
    """Both inputs through strides, the leading axes broadcast by strides of 0."""
    (*lead, width) = out.shape
    if not width:
        return
    gate, up = gate.expand(out.shape), up.expand(out.shape)
    factors = weight.expand(lead) if weight is not None else out[..., 0]
    steps = (gate.stride()[:-1], up.stride()[:-1], factors.stride(), out.stride()[:-1])
    block = min(GATE_TILE["BLOCK"], triton.next_power_of_2(width))
    height = GATE_TILE["ROWS"] * GATE_TILE["BLOCK"] // block
    for at, sizes, (first, second, third, fourth) in rows(lead, *steps):
        count = math.prod(sizes)
        launch(
            swiglu_kernel, (triton.cdiv(count, height) * triton.cdiv(width, block),), out.device,
            moved(gate, at[0]), moved(up, at[1]), moved(factors, at[2]), moved(out, at[3]), bits(limit),
            count, width, *sizes[1:], *first, gate.stride(-1), *second, up.stride(-1), *third, *fourth, out.stride(-1),
            WEIGHT=weight is not None, ROWS=height, BLOCK=block, num_warps=GATE_TILE["num_warps"],
        )  # fmt: skip


def moved(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The tensor that begins some elements further on."""
    return x.as_strided((1,), (1,), x.storage_offset() + offset) if offset and x.numel() else x
