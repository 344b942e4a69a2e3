"""The key-value compressor on any torch device: projections of a few windows, a softmax over each, weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops.registry import kernel

from .._compress import chunks
from .matmul import product, tiled

_SCRATCH = 64 << 20


@kernel(deterministic=True)
def compress_kv(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    bias: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    filled: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Tokens in chunks that end with a window; the states are brought forward after each."""
    entries, kv_out, score_out = out
    for source, target in ((kv_state, kv_out), (score_state, score_out)):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)
    batch, length, _ = x.shape
    (m, channels), before = bias.shape, kv_state.shape[1] - bias.shape[0]
    if not channels:
        return
    for chunk in chunks(batch, length, m, before, filled, 8 * channels * bias.itemsize, _SCRATCH):
        some, windows, held = slice(chunk.first, chunk.last), chunk.windows, before + chunk.inside
        part = x[some, chunk.start : chunk.stop]
        kv, scores = _project(part, wkv, bias), _project(part, wgate, bias)
        scores += _places(bias, chunk.inside, part.shape[1])
        if windows:
            kv, scores = (torch.cat([s[some, :held], new], 1) for s, new in ((kv_out, kv), (score_out, scores)))
            weights = torch.softmax(_slots(scores, m, before), 2)
            pooled = weights.mul_(_slots(kv, m, before)).sum(2)
            entries[some, chunk.emitted : chunk.emitted + windows] = pooled
        for state, line in ((kv_out[some], kv), (score_out[some], scores)):
            _advance(state, line, m, windows, held)


def _project(x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """`x @ weight.T` in the accumulator's dtype, which is that of `like`."""
    if tiled(x):
        result = like.new_empty(*x.shape[:2], weight.shape[0])
        product(x, weight.mT, result)
        return result
    return torch.matmul(x.to(like.dtype), weight.to(like.dtype).mT)


def _places(bias: Tensor, inside: int, tokens: int) -> Tensor:
    """The bias of each of the next tokens."""
    return bias[(inside + torch.arange(tokens, device=bias.device)) % bias.shape[0]]


def _slots(line: Tensor, m: int, before: int) -> Tensor:
    """The tokens that each window pools, ``[b, w, before + m, d]``, of all tokens in order."""
    (batch, rows, channels), width = line.shape, line.shape[2] // (2 if before else 1)
    windows = (rows - before) // m
    current = line[:, before : before + windows * m, channels - width :].reshape(batch, windows, m, width)
    if not before:
        return current
    return torch.cat([line[:, : windows * m, :width].reshape(batch, windows, m, width), current], 2)


def _advance(state: Tensor, line: Tensor, m: int, windows: int, held: int) -> None:
    """The newest row of each place, and the last window that closed; without one `line` has the new tokens alone."""
    before = state.shape[1] - m
    if not windows:
        state[:, held : held + line.shape[1]] = line
        return
    closed = windows * m
    state[:, :before] = line[:, closed : closed + before]
    state[:, before:] = line[:, before + closed - m : before + closed]
    rest = line[:, before + closed :]
    state[:, before : before + rest.shape[1]] = rest


def compress_kv_backward(
    grad: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    bias: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    filled: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of all six tensors; projections and weights are computed again."""
    real, m, before = bias.dtype, bias.shape[0], kv_state.shape[1] - bias.shape[0]
    batch, length, depth = x.shape
    held, windows = before + filled, (filled + length) // m
    kv, scores = _project(x, wkv, bias), _project(x, wgate, bias) + _places(bias, filled, length)
    kv, scores = (torch.cat([s[:, :held], new], 1) for s, new in ((kv_state, kv), (score_state, scores)))
    values, weights = _slots(kv, m, before), torch.softmax(_slots(scores, m, before), 2)
    slope = weights * grad[0].to(real).unsqueeze(2)
    pooled = (weights * values).sum(2, keepdim=True)
    lines, states = [], []
    for part, of_state in ((slope, grad[1]), (slope * (values - pooled), grad[2])):
        line, state = _line_gradient(part, of_state, kv.shape[1], m, before, windows)
        state[:, :held] += line[:, :held]
        lines.append(line[:, held:].reshape(batch * length, line.shape[2]))
        states.append(state)
    flat = x.reshape(batch * length, depth).to(real)
    grad_x = torch.matmul(lines[0], wkv.to(real)) + torch.matmul(lines[1], wgate.to(real)) if needs[0] else None
    grad_bias = None
    if needs[3]:
        place = (filled + torch.arange(length, device=x.device)) % m
        grad_bias = torch.zeros_like(bias).index_add_(0, place, lines[1].view(batch, length, bias.shape[1]).sum(0))
    return (
        grad_x.view(x.shape).to(x.dtype) if grad_x is not None else None,
        torch.matmul(lines[0].mT, flat).to(wkv.dtype) if needs[1] else None,
        torch.matmul(lines[1].mT, flat).to(wgate.dtype) if needs[2] else None,
        grad_bias,
        states[0] if needs[4] else None,
        states[1] if needs[5] else None,
    )


def _line_gradient(
    slots: Tensor, of_state: Tensor, rows: int, m: int, before: int, windows: int
) -> tuple[Tensor, Tensor]:
    """From gradients of slots and of the state after, those of all tokens in order and of the state before."""
    batch, width, closed = slots.shape[0], slots.shape[3], windows * m
    line = slots.new_zeros(batch, rows, of_state.shape[2])
    line[:, before : before + closed, of_state.shape[2] - width :] += slots[:, :, before:].reshape(batch, closed, width)
    if before:
        line[:, :closed, :width] += slots[:, :, :before].reshape(batch, closed, width)
    state = of_state.clone()
    rest = rows - before - closed
    line[:, before + closed :] += state[:, before : before + rest]
    state[:, before : before + rest] = 0
    if windows:
        line[:, closed : closed + before] += state[:, :before]
        line[:, before + closed - m : before + closed] += state[:, before:]
        state.zero_()
    return line, state
