"""FP4 and FP8 block formats by table lookup: a table holds every product of a scale byte and a code byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from flagops import config
from flagops.registry import kernel

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@kernel(deterministic=True, batch_invariant=True, note="table lookup")
def fp4_dequantize(packed: Tensor, scale: Tensor, dtype: str, out: Tensor) -> None:
    """Two elements a byte, the low nibble first, one e8m0 scale for 32 elements."""
    table = _fp4_pairs(out.dtype, packed.device)
    for rows in _chunks(out):
        index = (scale[rows].int() << 8).unsqueeze(-1) + torch.unflatten(packed[rows], 1, (scale.shape[1], 16))
        out[rows].copy_(table.index_select(0, index.reshape(-1)).view(out.dtype).view(out[rows].shape))


@kernel(deterministic=True, batch_invariant=True, note="table lookup")
def fp8_dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: str, out: Tensor) -> None:
    """One e8m0 or float32 scale for a block of e4m3 codes; blocks at the edges may be cut short."""
    height, width = block
    whole = weight.shape[1] // width * width
    coded = scale.dtype == torch.uint8
    table = _fp8_products(out.dtype, weight.device) if coded else _fp8_values(weight.device)
    for rows in _chunks(out):
        row = torch.arange(rows.start, rows.stop, device=weight.device)
        scales = scale.index_select(0, row // height)
        for first, last in ((0, whole), (whole, weight.shape[1])):
            if first == last:
                continue
            codes = torch.unflatten(weight[rows, first:last], 1, (-1, min(width, last - first)))
            factor = scales[:, first // width :][:, : codes.shape[1]].unsqueeze(-1)
            if coded:
                values = table.index_select(0, ((factor.int() << 8) + codes).reshape(-1)).view(codes.shape)
            else:
                values = table.index_select(0, codes.int().reshape(-1)).view(codes.shape) * factor
            out[rows, first:last].copy_(values.view(out[rows, first:last].shape))


def _chunks(out: Tensor) -> Iterator[slice]:
    """Row ranges whose temporaries stay in cache on a CPU and under the byte budget elsewhere."""
    count, columns = out.shape
    limit = config.budget() // 4 if out.device.type != "cpu" else 2 << 20
    step = max(1, limit // (8 * columns)) if columns else max(1, count)
    for start in range(0, count if columns else 0, step):
        yield slice(start, min(start + step, count))


def _e8m0() -> Tensor:
    """The 256 scales, as float64."""
    return torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), float("nan")], dtype=torch.float64)


def _e4m3() -> Tensor:
    """The 256 code values, as float64."""
    subnormal = [code * 2.0**-9 for code in range(8)]
    positive = subnormal + [(8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(8, 127)]
    return torch.tensor([*positive, float("nan"), *(-x for x in positive), float("nan")], dtype=torch.float64)


@cache
def _fp4_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[scale << 8 | byte]: the bits of both elements of a byte in one integer."""
    values = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=torch.float64)
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    products = (_e8m0()[:, None, None] * pairs).to(torch.float32).to(dtype)
    return products.view(torch.int32 if products.itemsize == 2 else torch.int64).flatten().to(device)


@cache
def _fp8_products(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[scale << 8 | code]"""
    return (_e8m0()[:, None] * _e4m3()).to(torch.float32).to(dtype).flatten().to(device)


@cache
def _fp8_values(device: torch.device) -> Tensor:
    return _e4m3().to(torch.float32).to(device)
