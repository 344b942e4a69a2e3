"""Hyper-connections in plain torch, tokens innermost; gradients in closed form through every normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flagops import config

from .._tensors import Results, give, room, tokens


def hc_split_sinkhorn(
    mix: Tensor, scale: Tensor, base: Tensor, mult: int, iters: int, eps: float, out: Results
) -> None:
    """As many tokens at a time as the byte budget allows."""
    flat = tokens(mix, mix.shape[:-1], 1)
    pre, post, comb = (room(x, mix.dim() - 1) for x in out)
    for rows in _chunks(len(flat), 8 * mix.shape[-1] * mix.element_size()):
        found = _coefficients(flat[rows].t(), scale, base, mult, iters, eps)
        pre[rows], post[rows], comb[rows] = (x.movedim(-1, 0) for x in found)
    give(out, (pre, post, comb))


def hc_split_sinkhorn_backward(
    grad: Results, mix: Tensor, scale: Tensor, base: Tensor, mult: int, iters: int, eps: float, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    lead, tails = mix.shape[:-1], (1, 1, 2)
    flat = tokens(mix, lead, 1)
    grads = [tokens(g, lead, tail) for g, tail in zip(grad, tails, strict=True)]
    grad_mix, grad_scale, grad_base = torch.empty_like(flat), torch.zeros_like(scale), torch.zeros_like(base)
    for rows in _chunks(len(flat), _kept(mult, iters) * mix.element_size()):
        x, given = flat[rows].t(), [g[rows].movedim(0, -1) for g in grads]
        slope = _coefficients_backward(given, x, scale, base, mult, iters, eps)
        grad_mix[rows] = (slope * _by_column(scale, mult)).t()
        grad_scale += _by_part((slope * x).sum(1), mult)
        grad_base += slope.sum(1)
    return _asked((grad_mix.view(mix.shape), grad_scale, grad_base), needs)


def hc_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float, out: Results
) -> None:
    """A chunk of tokens is widened once, for the projection and for the collapse."""
    flat, n = tokens(x, x.shape[:-2], 2), x.shape[-2]
    y, post, comb = (room(z, x.dim() - 2) for z in out)
    for rows in _chunks(len(flat), n * (3 * x.shape[-1] + 16 * n) * fn.element_size()):
        streams = flat[rows].to(fn.dtype)
        mix = _project(streams, fn, norm_eps)[0]
        pre, *others = _coefficients(mix.t(), scale, base, n, iters, eps)
        post[rows], comb[rows] = (z.movedim(-1, 0) for z in others)
        y[rows] = torch.bmm(pre.t().unsqueeze(1), streams).squeeze(1).to(y.dtype)
    give(out, (y, post, comb))


def hc_pre_backward(
    grad: Results,
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    lead, n = x.shape[:-2], x.shape[-2]
    flat, tails = tokens(x, lead, 2), (1, 1, 2)
    grad_y, *others = (tokens(g, lead, tail) for g, tail in zip(grad, tails, strict=True))
    grad_x = torch.empty_like(flat)
    grad_fn, grad_base, grad_scale = (torch.zeros_like(p) for p in (fn, base, scale))
    for rows in _chunks(len(flat), (6 * n * x.shape[-1] + _kept(n, iters)) * fn.element_size()):
        streams, g = flat[rows].to(fn.dtype), grad_y[rows].to(fn.dtype)
        mix, factor = _project(streams, fn, norm_eps)
        weights = torch.bmm(streams, g.unsqueeze(-1)).squeeze(-1).t()
        given = [weights, *(z[rows].movedim(0, -1) for z in others)]
        slope = _coefficients_backward(given, mix.t(), scale, base, n, iters, eps)
        grad_base += slope.sum(1)
        grad_scale += _by_part((slope * mix.t()).sum(1), n)
        pre = torch.sigmoid(_logits(mix.t(), scale, base, n)[:n]) + eps
        direct = pre.t().unsqueeze(-1) * g.unsqueeze(1)
        grad_mix = (slope * _by_column(scale, n)).t()
        grad_x[rows] = _project_backward(grad_mix, mix, factor, streams, fn, direct, grad_fn).to(x.dtype)
    return _asked((grad_x.view(x.shape), grad_fn, grad_base, grad_scale), needs)


def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float, out: Tensor) -> None:
    """A chunk of tokens is widened once, for the projection and for the collapse."""
    flat = tokens(x, x.shape[:-2], 2)
    y = room(out, x.dim() - 2)
    for rows in _chunks(len(flat), 3 * x.shape[-2] * x.shape[-1] * fn.element_size()):
        streams = flat[rows].to(fn.dtype)
        pre = torch.sigmoid(_project(streams, fn, norm_eps)[0] * scale + base) + eps
        y[rows] = torch.bmm(pre.unsqueeze(1), streams).squeeze(1).to(y.dtype)
    give((out,), (y,))


def hc_head_backward(
    grad: Tensor,
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps: float,
    norm_eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    flat, grads = tokens(x, x.shape[:-2], 2), tokens(grad, x.shape[:-2], 1)
    grad_x = torch.empty_like(flat)
    grad_fn, grad_base, grad_scale = (torch.zeros_like(p) for p in (fn, base, scale))
    for rows in _chunks(len(flat), 6 * x.shape[-2] * x.shape[-1] * fn.element_size()):
        streams, g = flat[rows].to(fn.dtype), grads[rows].to(fn.dtype)
        mix, factor = _project(streams, fn, norm_eps)
        sigmoid = torch.sigmoid(mix * scale + base)
        slope = torch.bmm(streams, g.unsqueeze(-1)).squeeze(-1) * sigmoid * (1 - sigmoid)
        grad_base += slope.sum(0)
        grad_scale += (slope * mix).sum()
        direct = (sigmoid + eps).unsqueeze(-1) * g.unsqueeze(1)
        grad_x[rows] = _project_backward(slope * scale, mix, factor, streams, fn, direct, grad_fn).to(x.dtype)
    return _asked((grad_x.view(x.shape), grad_fn, grad_base, grad_scale), needs)


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor) -> None:
    """One batched product of a few tokens at a time."""
    lead, (n, d) = out.shape[:-2], out.shape[-2:]
    new, streams, gates, mixing = (tokens(z, lead, tail) for z, tail in ((y, 1), (x, 2), (post, 1), (comb, 2)))
    result = room(out, len(lead))
    for rows in _chunks(len(streams), 4 * (n + 1) * d * post.element_size()):
        added = gates[rows].unsqueeze(-1) * new[rows].to(post.dtype).unsqueeze(1)
        result[rows] = torch.baddbmm(added, mixing[rows].mT, streams[rows].to(post.dtype)).to(out.dtype)
    give((out,), (result,))


def hc_post_backward(
    grad: Tensor, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    lead, (n, d) = grad.shape[:-2], grad.shape[-2:]
    inputs = (y, 1), (x, 2), (post, 1), (comb, 2)
    new, streams, gates, mixing = (tokens(z, lead, tail) for z, tail in inputs)
    slopes = tokens(grad, lead, 2)
    grads = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (new, streams, gates, mixing)]
    for rows in _chunks(len(streams), 6 * (n + 1) * d * post.element_size()):
        g, v, s = (z[rows].to(post.dtype) for z in (slopes, new, streams))
        grads[0][rows] = torch.bmm(gates[rows].unsqueeze(1), g).squeeze(1).to(y.dtype)
        grads[1][rows] = torch.bmm(mixing[rows], g).to(x.dtype)
        grads[2][rows] = torch.bmm(g, v.unsqueeze(-1)).squeeze(-1)
        grads[3][rows] = torch.bmm(s, g.mT)
    found = [
        g.view(*lead, *g.shape[1:]).sum_to_size(z.shape) if needed else None
        for g, (z, _), needed in zip(grads, inputs, needs, strict=True)
    ]
    return tuple(found)


def _asked(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _chunks(tokens: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, config.budget() // 2 // max(bytes_each, 1))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _kept(n: int, iters: int) -> int:
    """Elements that the backward of one token's coefficients holds."""
    return n * n * (2 * iters + 8) + 12 * n


def _project(streams: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """The normalised projection [tokens, columns], and the factor of each token [tokens, 1]."""
    flat = streams.flatten(1)
    fn = fn.contiguous()  # MKL multiplies a long way from one column to the next in 32 bits
    mean = torch.linalg.vecdot(flat, flat).unsqueeze(-1) / max(flat.shape[1], 1)
    factor = torch.rsqrt(mean + norm_eps)
    return torch.mm(flat, fn.t()).mul_(factor), factor


def _project_backward(
    grad: Tensor, mix: Tensor, factor: Tensor, streams: Tensor, fn: Tensor, direct: Tensor, grad_fn: Tensor
) -> Tensor:
    """The gradient of the streams, `direct` included; that of `fn` is added to `grad_fn`."""
    flat, fn = streams.flatten(1), fn.contiguous()
    scaled = grad * factor
    grad_fn.addmm_(scaled.t(), flat)
    along = -((grad * mix).sum(1, keepdim=True) * factor.square() / max(flat.shape[1], 1))
    return torch.addcmul(direct.flatten(1), along, flat).addmm_(scaled, fn).view(streams.shape)


def _by_column(scale: Tensor, n: int) -> Tensor:
    """The factor of each column, [columns, 1]."""
    return torch.cat([x.expand(size) for x, size in zip(scale.unbind(), (n, n, n * n), strict=True)]).unsqueeze(-1)


def _by_part(x: Tensor, n: int) -> Tensor:
    return torch.stack([part.sum() for part in x.split((n, n, n * n))])


def _logits(mix: Tensor, scale: Tensor, base: Tensor, n: int) -> Tensor:
    return mix * _by_column(scale, n) + base.unsqueeze(-1)


def _coefficients(mix: Tensor, scale: Tensor, base: Tensor, n: int, iters: int, eps: float) -> list[Tensor]:
    """pre [n, tokens], post [n, tokens] and comb [n, n, tokens] of mix [columns, tokens]."""
    logits = _logits(mix, scale, base, n)
    comb = torch.softmax(logits[2 * n :].unflatten(0, (n, n)), 1).add_(eps)
    for step in range(2 * iters - 1):
        comb.div_(comb.sum(step % 2, keepdim=True).add_(eps))
    return [torch.sigmoid(logits[:n]) + eps, 2 * torch.sigmoid(logits[n : 2 * n]), comb]


def _coefficients_backward(
    grad: Sequence[Tensor], mix: Tensor, scale: Tensor, base: Tensor, n: int, iters: int, eps: float
) -> Tensor:
    """The gradient of the logits [columns, tokens], through the states of every step."""
    logits = _logits(mix, scale, base, n)
    softmax = torch.softmax(logits[2 * n :].unflatten(0, (n, n)), 1)
    states, sums = [softmax + eps], []
    for step in range(2 * iters - 1):
        sums.append(states[-1].sum(step % 2, keepdim=True).add_(eps))
        states.append(states[-1] / sums[-1])
    slope = grad[2]
    for step in reversed(range(2 * iters - 1)):
        slope = (slope - (slope * states[step + 1]).sum(step % 2, keepdim=True)) / sums[step]
    slope = softmax * (slope - (slope * softmax).sum(1, keepdim=True))
    gates = torch.sigmoid(logits[: 2 * n])
    gates = gates * (1 - gates) * torch.cat([grad[0], 2 * grad[1]])
    return torch.cat([gates, slope.flatten(0, 1)])
