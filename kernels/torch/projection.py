"""The grouped output projection: one batched product over the groups, then one plain product."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops import config
from flagops.arrays import dtype_name

from .._tensors import matrix
from .dequantize import fp8_dequantize
from .matmul import product, wide
from .qmatmul import fp8_matmul
from .quantize import fp8_quantize


def grouped_output_projection_unsupported(
    o: Tensor, wo_a: Tensor, wo_b: Tensor, groups: int, wo_a_scale: Tensor | None, wo_b_scale: Tensor | None
) -> str | None:
    plain = wo_a_scale is None and wo_b_scale is None
    return None if plain or o.dtype != torch.float64 else "FP8 weights with float64 activations"


def grouped_output_projection(
    o: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    groups: int,
    wo_a_scale: Tensor | None,
    wo_b_scale: Tensor | None,
    out: Tensor,
) -> None:
    """The inner vector is rounded to the dtype of `o` between the two products, and to codes where `wo_b` is FP8."""
    if not out.numel():
        return
    rank, width = wo_a.shape
    tokens = o.flatten(0, -3) if o.dim() > 2 else o.unsqueeze(0)
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    step = max(1, config.budget() // 8 // ((rank + o.shape[-2] * o.shape[-1]) * o.itemsize + 1))
    for start in range(0, tokens.shape[0], step):
        x = tokens[start : start + step]
        x = x.reshape(x.shape[0], groups, width)
        padding = 0 if wo_b_scale is None else -rank % 128
        inner = x.new_zeros(x.shape[0], rank + padding)
        z, y = inner[:, :rank], result[start : start + step]
        if wo_a_scale is None:
            down = torch.unflatten(wo_a, 0, (groups, rank // groups)).mT
            product(x.transpose(0, 1), down, torch.unflatten(z, 1, (groups, rank // groups)).transpose(0, 1))
        else:
            _expanding(x, wo_a, wo_a_scale, z)
        if wo_b_scale is None:
            product(z, wo_b.mT, y)
        else:
            codes = torch.empty_like(inner, dtype=torch.uint8)
            scale = codes.new_empty(len(codes), codes.shape[1] // 128)
            fp8_quantize(inner, 128, True, "float8_e8m0fnu", (codes, scale))
            fp8_matmul(codes[:, :rank], scale, wo_b, wo_b_scale, dtype_name(out), y)
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))


def _expanding(x: Tensor, wo_a: Tensor, scale: Tensor, z: Tensor) -> None:
    """`z[t, rows of g] = x[t, g] @ wo_a[rows].T`, some rows at a time expanded."""
    groups, rank = x.shape[1], wo_a.shape[0] // x.shape[1]
    step = max(1, config.budget() // 8 // (wo_a.shape[1] * x.itemsize + 1))
    for group in range(groups):
        for first in range(group * rank, (group + 1) * rank, step):
            last = min(first + step, (group + 1) * rank)
            product(x[:, group], _expanded(wo_a[first:last], scale, x, first).mT, z[:, first:last])


def _expanded(weight: Tensor, scale: Tensor | None, like: Tensor, first: int = 0) -> Tensor:
    """Rows of a weight, from the `first` on, in the dtype of the activations."""
    if scale is None:
        return weight
    tile = like.new_empty(weight.shape)
    rows = torch.arange(first, first + len(weight), device=weight.device)
    fp8_dequantize(weight, scale.index_select(0, rows // 128), (1, 128), dtype_name(like), tile)
    return tile


def grouped_output_projection_backward(
    grad: Tensor,
    o: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    groups: int,
    wo_a_scale: Tensor | None,
    wo_b_scale: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `o`, `wo_a` and `wo_b`; the inner vector is computed again. FP8 weights, expanded, have none."""
    for_o, _, _, for_a, for_b = needs
    wo_a, wo_b = _expanded(wo_a, wo_a_scale, o), _expanded(wo_b, wo_b_scale, o)
    g = matrix(wide(grad))
    down = torch.unflatten(wide(wo_a), 0, (groups, wo_a.shape[0] // groups))
    x = wide(o).reshape(g.shape[0], groups, wo_a.shape[1]).transpose(0, 1)
    grad_o = grad_a = grad_b = None
    if for_b:
        inner = torch.matmul(x, down.mT).transpose(0, 1).reshape(g.shape[0], wo_a.shape[0])
        grad_b = torch.matmul(g.mT, inner.to(o.dtype).to(g.dtype)).to(wo_b.dtype)
    if for_o or for_a:
        grad_inner = torch.matmul(g, wide(wo_b)).reshape(g.shape[0], groups, down.shape[1]).transpose(0, 1)
        if for_o:
            grad_o = torch.matmul(grad_inner, down).transpose(0, 1).reshape(o.shape).to(o.dtype)
        if for_a:
            grad_a = torch.matmul(grad_inner.mT, x).reshape(wo_a.shape).to(wo_a.dtype)
    return grad_o, None, None, grad_a, grad_b
