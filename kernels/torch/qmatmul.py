"""FP8 or float activations times FP8 and FP4 weights: tiles of both become float32, scales included; then a product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagops import config

from .._tensors import matrix
from .dequantize import fp4_dequantize, fp8_dequantize

_CACHED = 4 << 20  # bytes of a tile on a CPU


def fp8_matmul(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> None:
    """Each row of a tile of weights takes the scales of its block along."""

    def expand(first: int, last: int, tile: Tensor) -> None:
        rows = torch.arange(first, last, device=b.device)
        fp8_dequantize(b[first:last], b_scale.index_select(0, rows // 128), (1, 128), "float32", tile)

    _product(a, a_scale, b.shape[0], expand, out)


def fp4_matmul(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> None:
    """A table holds both products of each byte and scale."""

    def expand(first: int, last: int, tile: Tensor) -> None:
        fp4_dequantize(b[first:last], b_scale[first:last], "float32", tile)

    _product(a, a_scale, b.shape[0], expand, out)


def _product(
    a: Tensor, a_scale: Tensor | None, n: int, expand: Callable[[int, int, Tensor], None], out: Tensor
) -> None:
    """`expand(first, last, tile)` writes rows of the weights as float32."""
    if not out.numel():
        return
    lead, k = out.shape[:-1], a.shape[-1]
    codes = matrix(a.expand(*lead, k))
    factors = None if a_scale is None else matrix(a_scale.expand(*lead, a_scale.shape[-1]))
    result = matrix(out if out.is_contiguous() else out.new_empty(out.shape))
    room = config.budget() // 4 if a.device.type != "cpu" else min(config.budget() // 4, _CACHED)
    step = max(1, room // (4 * max(k, 1)))
    for top in range(0, len(result), step):
        down = slice(top, min(top + step, len(result)))
        x = torch.empty(len(result[down]), k, dtype=torch.float32, device=a.device)
        if factors is None:
            x.copy_(codes[down])
        else:
            fp8_dequantize(codes[down], factors[down], (1, 128), "float32", x)
        across = min(step, max(1, room // (4 * len(x))))
        for first in range(0, n, across):
            last = min(first + across, n)
            tile = torch.empty(last - first, k, dtype=torch.float32, device=a.device)
            expand(first, last, tile)
            result[down, first:last].copy_(torch.mm(x, tile.mT))
    if result.data_ptr() != out.data_ptr():
        out.copy_(result.view(out.shape))
