"""Quantisers, the recoding of FP4 as FP8, and the Hadamard transform with torch's own operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from flagops import config
from flagops.registry import kernel

_E4M3, _E2M1 = (448.0, 1e-4), (6.0, 6 * 2.0**-126)  # largest value; floor of a block's largest magnitude
_LOST = 13  # 6 * 2^-13 rounds to 0 in e4m3, and all that is smaller


@kernel(deterministic=True, batch_invariant=True)
def fp8_quantize(x: Tensor, block: int, power_of_two: bool, scale_dtype: str, out: tuple[Tensor, Tensor]) -> None:
    """Clamped before the conversion: not every torch saturates."""
    codes, scale = out
    for source, (target, factors) in chunks(x, codes, scale):
        blocks = source.float().unflatten(-1, (-1, block))
        s, byte = _scale(blocks, _E4M3, power_of_two)
        quotient = blocks.div(s).clamp_(-448, 448).to(torch.float8_e4m3fn)
        target.copy_(quotient.view(torch.uint8).view(target.shape))
        factors.copy_((s if scale_dtype == "float32" else byte).squeeze(-1))


@kernel(deterministic=True, batch_invariant=True)
def fp8_fake_quantize(x: Tensor, block: int, power_of_two: bool, out: Tensor) -> None:
    """To e4m3 and back."""
    for source, (target,) in chunks(x, out):
        blocks = source.float().unflatten(-1, (-1, block))
        s, _ = _scale(blocks, _E4M3, power_of_two)
        quotient = blocks.div(s).clamp_(-448, 448).to(torch.float8_e4m3fn)
        target.copy_(quotient.float().mul_(s).view(target.shape))


@kernel(deterministic=True, batch_invariant=True)
def fp4_quantize(x: Tensor, block: int, out: tuple[Tensor, Tensor]) -> None:
    """A code is a multiple of the step at its magnitude, counted on from the codes of smaller steps."""
    packed, scale = out
    for source, (target, factors) in chunks(x, packed, scale):
        blocks = source.float().unflatten(-1, (-1, block))
        s, byte = _scale(blocks, _E2M1, True)
        quotient = blocks.div(s)
        size = quotient.abs()
        step, passed = _steps(size)
        codes = size.div_(step).round_().add_(passed, alpha=2).to(torch.uint8)
        codes = (codes | quotient.signbit().to(torch.uint8) << 3).masked_fill_(s.isnan(), 7).view(*target.shape, 2)
        target.copy_(codes[..., 0] | codes[..., 1] << 4)
        factors.copy_(byte.squeeze(-1))


@kernel(deterministic=True, batch_invariant=True)
def fp4_fake_quantize(x: Tensor, block: int, out: Tensor) -> None:
    """Rounded to multiples of the step that e2m1 has at each magnitude."""
    for source, (target,) in chunks(x, out):
        blocks = source.float().unflatten(-1, (-1, block))
        s, _ = _scale(blocks, _E2M1, True)
        quotient = blocks.div(s)
        step, _ = _steps(quotient.abs())
        target.copy_(quotient.div_(step).round_().mul_(step).mul_(s).view(target.shape))


@kernel(deterministic=True, batch_invariant=True, note="table lookup")
def fp4_to_fp8(packed: Tensor, scale: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Two codes a lookup; a table for each distance between an old scale and the new one."""
    weight, scales, lossless = out
    bands, across = scales.shape
    if not scales.numel():
        return
    table, changed = _recoded(packed.device)
    step = max(1, config.budget() // (4 * 64 * 128 * 8 * across))
    for start in range(0, bands, step):
        rows, band = slice(128 * start, 128 * (start + step)), slice(start, start + step)
        old = torch.unflatten(torch.unflatten(scale[rows].int(), 0, (-1, 128)), 2, (across, 4))
        top = old.amax((1, 3), keepdim=True)
        new = (top - 6).clamp_min_(0)
        shift = (old - new).clamp_(-_LOST, 6).masked_fill_(top == 255, 7) + _LOST
        byte = torch.unflatten(torch.unflatten(packed[rows], 0, (-1, 128)), 2, (across, 4, 16))
        index = ((shift << 8).unsqueeze(-1) + byte).flatten()
        pairs = table.index_select(0, index).view(torch.uint8)
        weight[rows].copy_(pairs.view(weight[rows].shape))
        scales[band].copy_(new.masked_fill_(top == 255, 255)[:, 0, :, 0])
        lossless[band].copy_(~changed.index_select(0, index).view(-1, 128, across, 64).any(-1).any(1))


@kernel(deterministic=True, batch_invariant=True)
def hadamard(x: Tensor, scale: float | None, out: Tensor) -> None:
    """Sums and differences of neighbours, then at twice the distance, up to half the row."""
    width = x.shape[-1]
    for source, (target,) in chunks(x, out):
        y = source.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        step = 1
        while step < width:
            low, high = y.unflatten(-1, (-1, 2, step)).unbind(-2)
            y = torch.stack((low + high, low - high), -2).flatten(-3)
            step *= 2
        target.copy_(y * (width**-0.5 if scale is None else scale))


def hadamard_backward(grad: Tensor, x: Tensor, scale: float | None, needs: tuple[bool, ...]) -> tuple[Tensor]:
    """The matrix is symmetric."""
    result = torch.empty_like(x)
    hadamard(grad, scale, result)
    return (result,)


def _scale(blocks: Tensor, limits: tuple[float, float], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """The scales ``[..., 1]`` as float32 and as e8m0 bytes, NaN where a block is not finite."""
    largest, floor = limits
    amax = blocks.abs().amax(-1, keepdim=True).clamp_min_(floor)
    infinite = ~amax.isfinite()
    scale = amax.mul_(1 / largest)
    byte = scale.view(torch.int32)
    if power_of_two:
        byte = (byte + 0x7FFFFF) >> 23
        scale = (byte << 23).view(torch.float32)
        byte.masked_fill_(infinite, 255)
    return scale.masked_fill(infinite, torch.nan), byte


def _steps(size: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of neighbouring e2m1 values at a magnitude, 0.5, 1 or 2, and how many smaller ones there are."""
    upper, top = (size >= 2).float(), (size >= 4).float()
    return (0.5 + 0.5 * upper).add_(top), upper.add_(top)


def chunks(x: Tensor, *outs: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Rows of an input and of the results, few enough for their temporaries to stay under the byte budget."""
    if not x.numel():
        return
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    made = [out if _flat(out) else out.new_empty(out.shape) for out in outs]
    flat = [out.view(-1, out.shape[-1]) for out in made]
    limit = config.budget() if x.device.type != "cpu" else min(config.budget(), 8 << 20)
    step = max(1, limit // (32 * width))
    for start in range(0, len(rows), step):
        yield rows[start : start + step], [out[start : start + step] for out in flat]
    for out, full in zip(outs, made, strict=True):
        if full is not out:
            out.copy_(full)


def _flat(x: Tensor) -> bool:
    """Whether all leading axes are one."""
    axes = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    return all(step == size * inner for (_, step), (size, inner) in itertools.pairwise(axes))


@cache
def _recoded(device: torch.device) -> tuple[Tensor, Tensor]:
    """[shift << 8 | byte]: the two e4m3 codes of a byte times 2^(shift - 13), and whether either value changed."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    values = torch.cat((values, -values))
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    factors = [2.0**shift for shift in range(-_LOST, 7)] + [math.nan]
    exact = torch.tensor(factors, dtype=torch.float64)[:, None, None] * pairs
    codes = exact.float().to(torch.float8_e4m3fn)
    changed = (codes.double() != exact).any(-1)
    return codes.view(torch.int16).flatten().to(device), changed.flatten().to(device)
