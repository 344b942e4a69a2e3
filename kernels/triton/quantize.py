# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Quantisers, the recoding of FP4 as FP8, and the Hadamard transform on Triton.

Narrow formats are rounded by integer arithmetic on float32's bits, which every device has; divisions are IEEE ones.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._rows import rows
from ._common import launch, narrow, widen
from ._room import fits, fitted

LONGEST = 8192
"""Elements of a block, or of a row to transform, that a program holds."""
LONGEST_COUNT = 2**31 - LONGEST
"""Blocks or rows that 32 bits can number."""
ENCODE_TILE: dict[str, Any] = {"TILE": 4096, "num_warps": 4}
HADAMARD_TILE: dict[str, Any] = {"TILE": 4096, "num_warps": 4}
RECODE_TILE: dict[str, Any] = {"BAND": 128, "num_warps": 8}
BESIDE, APART = 28, 256
"""Bytes of an element to encode where a chip holds all: of those that lie side by side, and of those that do not."""
SPLIT = 1296
"""Likewise of one to transform: halves of pairs lie in 32 bytes each, at every stage."""
NAN = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_of(x):
    """The bits of a float32 without its sign."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def even(bits, DROPPED: tl.constexpr):
    """Bits rounded to nearest even at a place, what lies below it not yet cleared."""
    return bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)


@triton.jit
def e4m3_code(x):
    """The code of a finite float32 that does not round past 448."""
    size = magnitude_of(x)
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, (even(size, 20) >> 20) - 960)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def e2m1_code(x):
    """The code of a finite float32 that does not round past 6."""
    size = magnitude_of(x)
    small = (size.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(size < 0x3F800000, small, (even(size, 22) >> 22) - 252)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e4m3_value(code):
    """The float32 of a code that is no NaN."""
    return (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def e2m1_value(code):
    """The float32 of a code."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def origins(row, N1, N2, x_0, x_1, x_2, out_0, out_1, out_2, FLAT: tl.constexpr):
    """Where rows begin in two tensors."""
    if FLAT:
        row = row.to(tl.int64)
        return row * x_2, row * out_2
    k, j, i = (row % N2).to(tl.int64), (row // N2 % N1).to(tl.int64), (row // N2 // N1).to(tl.int64)
    return i * x_0 + j * x_1 + k * x_2, i * out_0 + j * out_1 + k * out_2


@triton.jit
def encode_kernel(
    x, codes, scales, count, groups, block, N1, N2,
    x_0, x_1, x_2, x_c, codes_0, codes_1, codes_2, codes_c, scales_0, scales_1, scales_2, scales_c,
    POWERS: tl.constexpr, FOUR: tl.constexpr, FAKE: tl.constexpr, LONG: tl.constexpr, FLAT: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64 if LONG else tl.int32) * GROUPS + tl.arange(0, GROUPS)
    here = at < count
    group, row = (at % groups).to(tl.int64), at // groups
    source, target = origins(row, N1, N2, x_0, x_1, x_2, codes_0, codes_1, codes_2, FLAT)
    within = tl.arange(0, BLOCK)
    inside = here[:, None] & (within < block)[None, :]
    channel = (group * block)[:, None] + within[None, :]
    value = widen(tl.load(x + source[:, None] + channel * x_c, inside, other=0.0))
    top = tl.max(magnitude_of(value), 1)
    finite = top < NAN
    floor: tl.constexpr = 7.052966104933725e-38 if FOUR else 1e-4
    inverse: tl.constexpr = 1 / 6 if FOUR else 1 / 448
    scale = tl.maximum(tl.where(finite, top, 0).to(tl.float32, bitcast=True), floor) * inverse
    byte = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    if POWERS:
        scale = (byte << 23).to(tl.float32, bitcast=True)
        value = value * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        value = tl.div_rn(value, tl.broadcast_to(scale[:, None], (GROUPS, BLOCK)))
    scale = tl.where(finite, scale, float("nan"))
    byte = tl.where(finite, byte, 255)
    if FOUR:
        code = tl.where(finite[:, None], e2m1_code(value), 7)
    else:
        code = tl.where(finite[:, None], e4m3_code(value), 0x7F)
    codes += target[:, None]
    if FAKE:
        rounded = e2m1_value(code) if FOUR else e4m3_value(code)
        tl.store(codes + channel * codes_c, narrow(rounded * scale[:, None], codes.dtype.element_ty), inside)
    else:
        beside, _ = origins(row, N1, N2, scales_0, scales_1, scales_2, scales_0, scales_1, scales_2, FLAT)
        scales += beside + group * scales_c
        if scales.dtype.element_ty == tl.uint8:
            tl.store(scales, byte.to(tl.uint8), here)
        else:
            tl.store(scales, scale, here)
        if FOUR:
            low, high = tl.split(tl.reshape(code, (GROUPS, BLOCK // 2, 2)))
            pair = tl.arange(0, BLOCK // 2)
            place = (group * (block // 2))[:, None] + pair[None, :]
            tl.store(
                codes + place * codes_c, (low | high << 4).to(tl.uint8), here[:, None] & (2 * pair < block)[None, :]
            )
        else:
            tl.store(codes + channel * codes_c, code.to(tl.uint8), inside)


@triton.jit
def recode_kernel(
    packed, scale, weight, scales, lossless, across, packed_r, packed_c, scale_r, scale_c,
    weight_r, weight_c, scales_r, scales_c, lossless_r, lossless_c, BAND: tl.constexpr,
):  # fmt: skip
    band, place = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)
    packed += band * 128 * packed_r + place * 64 * packed_c
    scale += band * 128 * scale_r + place * 4 * scale_c
    weight += band * 128 * weight_r + place * 128 * weight_c
    group = tl.arange(0, 4).to(tl.int64)
    every = tl.arange(0, 128).to(tl.int64)
    old = tl.load(scale + every[:, None] * scale_r + group[None, :] * scale_c).to(tl.int32)
    top = tl.max(tl.max(old, 1), 0)
    new = tl.maximum(top - 6, 0)
    changed = tl.zeros((BAND, 64), tl.int32)
    for first in range(0, 128, BAND):
        row = first + tl.arange(0, BAND).to(tl.int64)[:, None]
        byte = tl.arange(0, 64).to(tl.int64)[None, :]
        pair = tl.load(packed + row * packed_r + byte * packed_c).to(tl.int32)
        code = tl.load(scale + row * scale_r + byte // 16 * scale_c).to(tl.int32)
        factor = ((tl.maximum(code - new, -13) + 127) << 23).to(tl.float32, bitcast=True)  # below 2^-13 all rounds to 0
        low, high = e2m1_value(pair & 15) * factor, e2m1_value(pair >> 4) * factor
        low_code, high_code = e4m3_code(low), e4m3_code(high)
        changed |= ((e4m3_value(low_code) != low) | (e4m3_value(high_code) != high)).to(tl.int32)
        both = tl.reshape(tl.join(low_code, high_code), (BAND, 128))
        both = tl.where(top == 255, 0x7F, both)
        tl.store(weight + row * weight_r + every[None, :] * weight_c, both.to(tl.uint8))
    same = (tl.max(tl.max(changed, 1), 0) == 0) & (top != 255)
    tl.store(scales + band * scales_r + place * scales_c, tl.where(top == 255, 255, new).to(tl.uint8))
    tl.store(lossless + band * lossless_r + place * lossless_c, same.to(tl.uint8))


@triton.jit(do_not_specialize=["scale_bits"])
def hadamard_kernel(
    x, out, scale_bits, count, N1, N2, x_0, x_1, x_2, x_c, out_0, out_1, out_2, out_c,
    LONG: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64 if LONG else tl.int32) * ROWS + tl.arange(0, ROWS)
    source, target = origins(row, N1, N2, x_0, x_1, x_2, out_0, out_1, out_2, FLAT)
    here = (row < count)[:, None]
    column = tl.arange(0, D).to(tl.int64)[None, :]
    half: tl.constexpr = x.dtype.element_ty
    number: tl.constexpr = tl.float64 if half == tl.float64 else tl.float32
    y = widen(tl.load(x + source[:, None] + column * x_c, here, other=0.0))
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(y, (ROWS, D >> (stage + 1), 2, 1 << stage)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, D))
    y *= tl.cast(scale_bits, tl.int64).to(tl.float64, bitcast=True).to(number)  # a float argument would be float32
    tl.store(out + target[:, None] + column * out_c, narrow(y, half), here)


def _too_wide(width: int) -> str | None:
    return f"{width} channels in one piece; at most {LONGEST} fit" if width > LONGEST else None


def fp8_quantize_unsupported(x: torch.Tensor, block: int, power_of_two: bool, scale_dtype: str) -> str | None:
    return _too_wide(block)


@kernel(deterministic=True, batch_invariant=True)
def fp8_quantize(
    x: torch.Tensor, block: int, power_of_two: bool, scale_dtype: str, out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Whole blocks of 128 lie in one program, several together."""
    _encode(x, *out, block, POWERS=power_of_two, FOUR=False, FAKE=False)


def fp8_fake_quantize_unsupported(x: torch.Tensor, block: int, power_of_two: bool) -> str | None:
    return _too_wide(block)


@kernel(deterministic=True, batch_invariant=True)
def fp8_fake_quantize(x: torch.Tensor, block: int, power_of_two: bool, out: torch.Tensor) -> None:
    """Read once, written once."""
    _encode(x, out, None, block, POWERS=power_of_two, FOUR=False, FAKE=True)


def fp4_quantize_unsupported(x: torch.Tensor, block: int) -> str | None:
    return _too_wide(block)


@kernel(deterministic=True, batch_invariant=True)
def fp4_quantize(x: torch.Tensor, block: int, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Neighbouring codes meet in one byte before they are stored."""
    _encode(x, *out, block, POWERS=True, FOUR=True, FAKE=False)


def fp4_fake_quantize_unsupported(x: torch.Tensor, block: int) -> str | None:
    return _too_wide(block)


@kernel(deterministic=True, batch_invariant=True)
def fp4_fake_quantize(x: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """Read once, written once."""
    _encode(x, out, None, block, POWERS=True, FOUR=True, FAKE=True)


def _encode(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, block: int, **flags: bool) -> None:
    width = x.shape[-1]
    lead = x.shape[:-1] if width else (0,)
    size = triton.next_power_of_2(block)
    each = BESIDE if x.stride(-1) == codes.stride(-1) == 1 else APART
    tile = fitted(ENCODE_TILE, x.device, lambda tile: each * tile["TILE"], ("TILE",))
    together = max(1, tile["TILE"] // size)
    groups = width // block
    beside = codes if scales is None else scales
    steps = (x.stride()[:-1], codes.stride()[:-1], beside.stride()[:-1])
    for (source, target, aside), (n0, n1, n2), (x_steps, codes_steps, scale_steps) in rows(lead, *steps):
        count = n0 * n1 * n2 * groups
        launch(
            encode_kernel, (triton.cdiv(count, together),), x.device,
            _at(x, source), _at(codes, target), _at(beside, aside), count, groups, block, n1, n2,
            *x_steps, x.stride(-1), *codes_steps, codes.stride(-1), *scale_steps, beside.stride(-1),
            **flags, LONG=count > LONGEST_COUNT, FLAT=n0 * n1 == 1, GROUPS=together, BLOCK=size,
            num_warps=tile["num_warps"] if each == BESIDE else 8,  # their addresses too take registers
        )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def fp4_to_fp8(packed: torch.Tensor, scale: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """One program for a block of 128 x 128."""
    weight, scales, lossless = out
    if scales.numel():
        lossless = lossless.view(torch.uint8)
        steps = [step for x in (packed, scale, weight, scales, lossless) for step in x.stride()]
        launch(
            recode_kernel, (scales.numel(),), packed.device,
            packed, scale, weight, scales, lossless, scales.shape[1], *steps,
            **fitted(RECODE_TILE, packed.device, lambda tile: 180 * 128 * tile["BAND"], ("BAND",)),
        )  # fmt: skip


def hadamard_unsupported(x: torch.Tensor, scale: float | None) -> str | None:
    width = x.shape[-1]
    return _too_wide(width) or (None if fits(x.device, SPLIT * width) else f"{width} channels: no room on the chip")


@kernel(deterministic=True, batch_invariant=True)
def hadamard(x: torch.Tensor, scale: float | None, out: torch.Tensor) -> None:
    """All stages in registers, short rows together."""
    width = x.shape[-1]
    tile = fitted(HADAMARD_TILE, x.device, lambda tile: SPLIT * tile["TILE"], ("TILE",))
    together = max(1, tile["TILE"] // width)
    factor = int(np.float64(width**-0.5 if scale is None else scale).view(np.int64))
    for (source, target), (n0, n1, n2), (x_steps, out_steps) in rows(x.shape[:-1], x.stride()[:-1], out.stride()[:-1]):
        count = n0 * n1 * n2
        launch(
            hadamard_kernel, (triton.cdiv(count, together),), x.device,
            _at(x, source), _at(out, target), factor, count, n1, n2, *x_steps, x.stride(-1), *out_steps, out.stride(-1),
            LONG=count > LONGEST_COUNT, FLAT=n0 * n1 == 1, ROWS=together, D=width, STAGES=width.bit_length() - 1,
            num_warps=tile["num_warps"],
        )  # fmt: skip


def _at(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor that begins elsewhere in the same memory."""
    return x.as_strided((1,), (1,), x.storage_offset() + offset) if offset else x
