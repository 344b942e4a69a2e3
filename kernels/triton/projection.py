"""The grouped output projection on Triton: two products, with the groups as a batch of the first."""

import math

import torch

from flagops import config
from flagops.registry import kernel

from ._common import too_long
from .dequantize import fp8_dequantize
from .matmul import product
from .qmatmul import fp8_kernel, quantized_product
from .quantize import fp8_quantize


def grouped_output_projection_unsupported(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    wo_b: torch.Tensor,
    groups: int,
    wo_a_scale: torch.Tensor | None,
    wo_b_scale: torch.Tensor | None,
) -> str | None:
    if o.dtype == torch.float64 and not (wo_a_scale is None and wo_b_scale is None):
        return "FP8 weights with float64 activations"
    return too_long(o, wo_a, wo_b)


@kernel(deterministic=True)
def grouped_output_projection(
    o: torch.Tensor,
    wo_a: torch.Tensor,
    wo_b: torch.Tensor,
    groups: int,
    wo_a_scale: torch.Tensor | None,
    wo_b_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Heads whose strides do not merge into a group's one axis are copied first; FP8 weights take a group at a time."""
    if out.numel() == 0:
        return
    if o.dim() == 2:
        o, out = o[None], out[None]
    tokens, rank, width = o.shape[:-2], wo_a.shape[0] // groups, wo_a.shape[1]
    rows, padding = math.prod(tokens), 0 if wo_b_scale is None else -wo_a.shape[0] % 128
    z = o.new_zeros((rows, groups * rank + padding)) if padding else o.new_empty((rows, groups * rank))
    inner = o.reshape(rows, groups, width).transpose(0, 1)
    if wo_a_scale is None:
        to = z[:, : groups * rank].unflatten(1, (groups, rank)).transpose(0, 1)
        product(inner, wo_a.view(groups, rank, width).mT, None, to)
    else:
        for group in range(groups):
            last = (group + 1) * rank
            cut = min(-(-group * rank // 128) * 128, last)  # from there on the rows begin with a row of blocks
            for part in (slice(group * rank, cut), slice(cut, last)):
                if part.start < part.stop:
                    _expanding(inner[group], wo_a[part], wo_a_scale[part.start // 128 :], z[:, part])
    if wo_b_scale is None:
        product(z.view(*tokens, groups * rank), wo_b.t(), None, out)
        return
    codes = torch.empty_like(z, dtype=torch.uint8)
    scale = codes.new_empty(rows, codes.shape[1] // 128)
    fp8_quantize(z, 128, True, "float8_e8m0fnu", (codes, scale))
    a, factors = (x.view(*tokens, x.shape[1]) for x in (codes, scale))
    quantized_product(fp8_kernel, a[..., : groups * rank], factors, wo_b, wo_b_scale, out)


def _expanding(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """``out = x @ weight.T``; against float32, which has no matrix units, in tiles that are expanded before."""
    if x.dtype != torch.float32:
        quantized_product(fp8_kernel, x, None, weight, scale, out, rounded=True)
        return
    step = max(1, config.budget() // 4 // (4 * 128 * weight.shape[1] + 1)) * 128
    for first in range(0, len(weight), step):
        codes = weight[first : first + step]
        factors = scale[first // 128 :][: -(-len(codes) // 128)]
        tile = torch.empty(codes.shape, dtype=torch.float32, device=x.device)
        fp8_dequantize(codes, factors, (128, 128), "float32", tile)
        product(x, tile.mT, None, out[:, first : first + step])
