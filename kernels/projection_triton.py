"""The grouped output projection on Triton: two products, with the groups as a batch of the first."""

import math

import torch

from flagops.registry import kernel

from ._triton import too_long
from .matmul_triton import product


def grouped_output_projection_unsupported(
    o: torch.Tensor, wo_a: torch.Tensor, wo_b: torch.Tensor, groups: int
) -> str | None:
    return too_long(o, wo_a, wo_b)


@kernel(deterministic=True)
def grouped_output_projection(
    o: torch.Tensor, wo_a: torch.Tensor, wo_b: torch.Tensor, groups: int, out: torch.Tensor
) -> None:
    """Heads whose strides do not merge into a group's one axis are copied first."""
    if out.numel() == 0:
        return
    if o.dim() == 2:
        o, out = o[None], out[None]
    tokens, rank, width = o.shape[:-2], wo_a.shape[0] // groups, wo_a.shape[1]
    z = o.new_empty((*tokens, groups * rank))
    rows = math.prod(tokens)
    inner = o.reshape(rows, groups, width).transpose(0, 1)
    product(inner, wo_a.view(groups, rank, width).mT, None, z.view(rows, groups, rank).transpose(0, 1))
    product(z, wo_b.t(), None, out)
