"""Rotary embedding and its table on any torch device."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops.registry import kernel

from .._rotary import frequencies
from .norm import pieces


@kernel(deterministic=True)
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """The rotated channels of a piece are copied to the accumulator's dtype; the others go straight to `out`."""
    if not out.numel():
        return
    first = out.shape[-1] - 2 * cos.shape[-1]
    same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    if not same and first:
        out[..., :first].copy_(x[..., :first])
    x = x.expand(out.shape)
    cos, sin = (t.unsqueeze(-2).expand(*out.shape[:-1], t.shape[-1]) for t in (cos, sin))
    for piece in pieces(out[..., first:], 1) if cos.shape[-1] else ():
        pair = torch.unflatten(x[piece][..., first:], -1, (-1, 2)).to(cos.dtype)
        a, b, c, s = pair[..., 0], pair[..., 1], cos[piece], sin[piece]
        s = -s if inverse else s
        turned = torch.stack((a * c - b * s, a * s + b * c), -1)
        out[piece][..., first:].copy_(turned.flatten(-2))


def rotary_embedding_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `x`, rotated back, and of `cos` and `sin`."""
    first, sign = x.shape[-1] - 2 * cos.shape[-1], -1 if inverse else 1
    grad_x = grad_cos = grad_sin = None
    if needs[0]:
        grad_x = torch.empty_like(grad)
        rotary_embedding(grad, cos, sin, not inverse, grad_x)
        grad_x = grad_x.sum_to_size(x.shape)
    if needs[1] or needs[2]:
        a, b = torch.unflatten(x[..., first:], -1, (-1, 2)).to(cos.dtype).unbind(-1)
        g, h = torch.unflatten(grad[..., first:], -1, (-1, 2)).to(cos.dtype).unbind(-1)
        grad_cos = (g * a + h * b).sum(-2).sum_to_size(cos.shape) if needs[1] else None
        grad_sin = ((h * a - g * b).sum(-2) * sign).sum_to_size(sin.shape) if needs[2] else None
    return grad_x, grad_cos, grad_sin


@kernel(deterministic=True)
def yarn_table(
    positions: Tensor,
    dim: int,
    base: float,
    factor: float,
    original: float,
    beta_fast: float,
    beta_slow: float,
    out: tuple[Tensor, Tensor],
) -> None:
    """`torch.cos` and `torch.sin` of float32 angles."""
    theta = torch.from_numpy(frequencies(dim, base, factor, original, beta_fast, beta_slow)).to(positions.device)
    angle = positions.unsqueeze(-1).float() * theta
    for result, function in zip(out, (torch.cos, torch.sin), strict=True):
        result.copy_(function(angle))
