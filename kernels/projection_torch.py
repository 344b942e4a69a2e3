"""The grouped output projection: one batched product over the groups, then one plain product."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops import config

from .matmul_torch import matrix, product, wide


def grouped_output_projection(o: Tensor, wo_a: Tensor, wo_b: Tensor, groups: int, out: Tensor) -> None:
    """The inner vector is rounded to the dtype of `o` between the two products."""
    if not out.numel():
        return
    rank = wo_a.shape[0] // groups
    down = torch.unflatten(wo_a, 0, (groups, rank)).mT
    tokens = o.flatten(0, -3) if o.dim() > 2 else o.unsqueeze(0)
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    step = max(1, config.budget() // 8 // ((wo_a.shape[0] + o.shape[-2] * o.shape[-1]) * o.itemsize + 1))
    for start in range(0, tokens.shape[0], step):
        x = tokens[start : start + step]
        x = x.reshape(x.shape[0], groups, wo_a.shape[1])
        inner = x.new_empty(x.shape[0], wo_a.shape[0])
        product(x.transpose(0, 1), down, torch.unflatten(inner, 1, (groups, rank)).transpose(0, 1))
        product(inner, wo_b.mT, result[start : start + step])
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))


def grouped_output_projection_backward(
    grad: Tensor, o: Tensor, wo_a: Tensor, wo_b: Tensor, groups: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `o`, `wo_a` and `wo_b`; the inner vector is computed again."""
    g = matrix(wide(grad))
    down = torch.unflatten(wide(wo_a), 0, (groups, wo_a.shape[0] // groups))
    x = wide(o).reshape(g.shape[0], groups, wo_a.shape[1]).transpose(0, 1)
    grad_o = grad_a = grad_b = None
    if needs[2]:
        inner = torch.matmul(x, down.mT).transpose(0, 1).reshape(g.shape[0], wo_a.shape[0])
        grad_b = torch.matmul(g.mT, inner.to(o.dtype).to(g.dtype)).to(wo_b.dtype)
    if needs[0] or needs[1]:
        grad_inner = torch.matmul(g, wide(wo_b)).reshape(g.shape[0], groups, down.shape[1]).transpose(0, 1)
        if needs[0]:
            grad_o = torch.matmul(grad_inner, down).transpose(0, 1).reshape(o.shape).to(o.dtype)
        if needs[1]:
            grad_a = torch.matmul(grad_inner.mT, x).reshape(wo_a.shape).to(wo_a.dtype)
    return grad_o, grad_a, grad_b
