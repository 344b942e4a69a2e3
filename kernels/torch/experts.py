"""Products of rows grouped by expert, one expert after the other: only its rows and its weights are in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flagops import config

from .._moe import BLOCK, quantised, refusal
from .dequantize import fp4_dequantize, fp8_dequantize
from .matmul import product, wide
from .moe import activate, slopes


def grouped_matmul(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    """One product for each expert that has rows."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        stop = min(max(end, start), a.shape[0])
        if stop > start:
            product(a[start:stop], b[expert], out[start:stop])
        start = stop
    out[start:].zero_()


def grouped_matmul_backward(
    grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `a` and `b`; rows past the last offset and experts without rows get 0."""
    grad_a = torch.zeros_like(a) if needs[0] else None
    grad_b = torch.zeros_like(b) if needs[1] else None
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        stop = min(max(end, start), a.shape[0])
        g = wide(grad[start:stop])
        if grad_a is not None:
            grad_a[start:stop] = torch.matmul(g, wide(b[expert]).mT)
        if grad_b is not None:
            grad_b[expert] = torch.matmul(wide(a[start:stop]).mT, g)
        start = stop
    return grad_a, grad_b, None


def moe_experts_unsupported(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    limit: float | None,
    shared: Tensor | None,
) -> str | None:
    return refusal(x, weights, gate_up, shared)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    limit: float | None,
    shared: Tensor | None,
    out: Tensor,
) -> None:
    """The experts that are hit, in ascending order; FP8 and FP4 weights are expanded a tile of rows at a time."""
    real = torch.promote_types(x.dtype, torch.float32)
    packed, width = quantised(gate_up), gate_up.shape[1] // 2
    total = torch.zeros(x.shape, dtype=real, device=x.device) if shared is None else shared.to(real, copy=True)
    routing = weights.flatten()
    per_row = 2 * (x.shape[1] + 4 * width) * real.itemsize
    for expert, pairs in _grouped(indices, gate_up.shape[0]):
        for chosen in pairs.split(max(1, config.budget() // 4 // (per_row + 1))):
            tokens = chosen // indices.shape[1]
            rows = x[tokens]
            both, h, y = rows.new_empty((len(rows), 2 * width)), rows.new_empty((len(rows), width)), rows
            _project(_fake(rows) if packed else rows, gate_up, gate_up_scale, expert, both)
            activate(both[:, :width], both[:, width:], routing[chosen], limit, h)
            y = torch.empty_like(rows)
            _project(_fake(h) if packed else h, down, down_scale, expert, y)
            total.index_add_(0, tokens, y.to(real))
    out.copy_(total)


def _grouped(indices: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is hit with its pairs of token and slot; a foreign id belongs to none."""
    flat = indices.flatten().long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(flat, stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts).tolist()[:experts]):
        if count:
            yield expert, order[start : start + count]
        start += count


def _project(x: Tensor, weights: Tensor, scales: Tensor | None, expert: int, out: Tensor) -> None:
    """``x @ weights[expert].T`` rounded into `out`."""
    if scales is None:
        product(x, weights[expert].mT, out)
        return
    weight, scale = weights[expert], scales[expert]
    rows, width = out.shape[1], x.shape[1]
    step = max(config.budget() // 16 // (BLOCK * width + 1), 1) * BLOCK
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tile = torch.empty((stop - start, width), dtype=torch.float32, device=x.device)
        if weight.shape[1] == width:
            blocks = scale[start // BLOCK : -(-stop // BLOCK)]
            fp8_dequantize(weight[start:stop], blocks, (BLOCK, BLOCK), "float32", tile)
        else:
            fp4_dequantize(weight[start:stop], scale[start:stop], "float32", tile)
        out[:, start:stop] = torch.matmul(x, tile.mT)


def _fake(x: Tensor) -> Tensor:
    """Rows in FP8 under a power of two for each block of 128, as float32."""
    width = x.shape[1]
    x = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).unflatten(1, (-(-width // BLOCK), BLOCK))
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-4) if width else x[..., :1]
    mantissa, exponent = torch.frexp(largest * (1 / 448))
    scale = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    scale.masked_fill_(~largest.isfinite(), torch.nan)
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(1)[:, :width]


def moe_experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    limit: float | None,
    shared: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the routing weights, both weights of plain experts, and `shared`.

    Intermediates are computed again, one expert at a time; their rounding is passed through.
    """
    if quantised(gate_up):
        raise NotImplementedError("moe_experts: FP8 and FP4 experts have no backward")
    real = torch.promote_types(x.dtype, torch.float32)
    width, slots = gate_up.shape[1] // 2, indices.shape[1]
    grad_x = torch.zeros(x.shape, dtype=real, device=x.device) if needs[0] else None
    grad_weights = torch.zeros_like(weights).flatten() if needs[1] else None
    grad_gate_up = torch.zeros_like(gate_up) if needs[3] else None
    grad_down = torch.zeros_like(down) if needs[4] else None
    routing = weights.flatten()
    for expert, pairs in _grouped(indices, gate_up.shape[0]):
        tokens = pairs // slots
        rows = x[tokens]
        both, h = torch.matmul(wide(rows), wide(gate_up[expert]).mT).to(x.dtype), rows.new_empty((len(rows), width))
        g = grad[tokens].to(real)
        if grad_down is not None:
            activate(both[:, :width], both[:, width:], routing[pairs], limit, h)
            grad_down[expert] = torch.matmul(g.mT, h.to(real))
        if not (needs[0] or needs[1] or needs[3]):
            continue
        inner = torch.matmul(g, down[expert].to(real))
        by_gate, by_up, by_weight = slopes(inner, both[:, :width], both[:, width:], routing[pairs], limit)
        if grad_weights is not None:
            grad_weights[pairs] = by_weight
        by_both = torch.cat((by_gate, by_up), 1)
        if grad_gate_up is not None:
            grad_gate_up[expert] = torch.matmul(by_both.mT, rows.to(real))
        if grad_x is not None:
            grad_x.index_add_(0, tokens, torch.matmul(by_both, gate_up[expert].to(real)))
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_weights is None else grad_weights.view(weights.shape),
        None,
        grad_gate_up,
        grad_down,
        None,
        None,
        grad if shared is not None and needs[7] else None,
    )
