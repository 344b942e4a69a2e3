"""Quantisers, the recoding of FP4 as FP8, and the Hadamard transform on the CPU.

A block is read for its largest magnitude and again, from cache, for its codes; both by whole vectors. Blocks that are
no whole vectors, or not contiguous, are gathered into scratch and padded with zeros.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._rows import rows
from ._formats import E2M1, E4M3, FORMATS, INFINITY, decode_fp4, vencode, vround
from ._vectors import (
    BYTE,
    FLOAT32,
    INT32,
    TAGS,
    bits,
    cast,
    from_bits,
    lanes,
    load,
    maximum,
    size,
    store,
    vbutterflies,
    vhighest,
    vload,
    vsplat,
    vstore,
    wide,
)

_GRAIN = 1 << 16  # elements worth a thread
_F32, _BYTE = np.float32(0), np.uint8(0)
_NAN = np.float32(np.nan)
_E4M3, _E2M1 = ((FORMATS[name].inverse, FORMATS[name].floor) for name in ("e4m3", "e2m1"))
_LOST = 13  # 6 * 2^-13 rounds to 0 in e4m3, and all that is smaller
_NONE = _LOST + 7  # the table of NaN
_SPAN = 4  # blocks of a task of fp4_to_fp8


@kernel(deterministic=True, batch_invariant=True)
def fp8_quantize(x: Any, block: int, power_of_two: bool, scale_dtype: str, out: tuple[Any, Any]) -> None:
    """One byte and one scale at a time go to strided results."""
    codes, scale = out
    unit = 4 if scale_dtype == "float32" else 1
    _encode(x, codes, scale, block, unit, power_of_two, False)


@kernel(deterministic=True, batch_invariant=True)
def fp4_quantize(x: Any, block: int, out: tuple[Any, Any]) -> None:
    """Two codes a byte."""
    _encode(x, *out, block, 1, True, True)


def _encode(x: Any, codes: Any, scale: Any, block: int, unit: int, power_of_two: bool, four: bool) -> None:
    (*lead, width), (*steps, column) = x.shape, strides(x)
    (*to, codes_column), (*beside, scale_column) = strides(codes), strides(scale)
    lead = lead if width else [0]
    limits = _E2M1 if four else _E4M3
    for (source, target, aside), sizes, (x_steps, codes_steps, scale_steps) in rows(lead, steps, to, beside):
        parallel(
            _code_rows, sizes[0] * sizes[1] * sizes[2], TAGS[dtype_name(x)], sizes, block, width // block,
            pointer(x) + source * x.itemsize, x_steps, column, pointer(codes) + target, codes_steps, codes_column,
            pointer(scale) + aside * unit, scale_steps, scale_column, unit, *limits, power_of_two, four,
            minimum=-(-_GRAIN // width),
        )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def fp8_fake_quantize(x: Any, block: int, power_of_two: bool, out: Any) -> None:
    """Rounded in registers; no code is ever formed."""
    _fake(x, block, power_of_two, out, False)


@kernel(deterministic=True, batch_invariant=True)
def fp4_fake_quantize(x: Any, block: int, out: Any) -> None:
    """Rounded in registers; no code is ever formed."""
    _fake(x, block, True, out, True)


def _fake(x: Any, block: int, power_of_two: bool, out: Any, four: bool) -> None:
    (*lead, width), (*steps, column), (*to, out_column) = x.shape, strides(x), strides(out)
    item = x.itemsize
    limits = _E2M1 if four else _E4M3
    for (source, target), sizes, (x_steps, out_steps) in rows(lead if width else [0], steps, to):
        parallel(
            _fake_rows, sizes[0] * sizes[1] * sizes[2], TAGS[dtype_name(x)], sizes, block, width // block,
            pointer(x) + source * item, x_steps, column, pointer(out) + target * item, out_steps, out_column,
            *limits, power_of_two, four, minimum=-(-_GRAIN // width),
        )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True, note="table lookup by byte shuffles")
def fp4_to_fp8(packed: Any, scale: Any, out: tuple[Any, Any, Any]) -> None:
    """The distance of a scale from the new one chooses the table of 16 codes that its group looks up."""
    weight, scales, lossless = out
    bands, across = scales.shape
    tables, changed = _recoded()
    pieces = -(-across // _SPAN)
    parallel(
        _recode, bands * pieces, pieces, across, pointer(packed), strides(packed), pointer(scale), strides(scale),
        pointer(weight), strides(weight), pointer(scales), strides(scales), pointer(lossless), strides(lossless),
        pointer(tables), changed,
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def hadamard(x: Any, scale: float | None, out: Any) -> None:
    """Butterflies within vectors first, then between those of a row in cache; the last ones scale and round."""
    (*lead, width), (*steps, column), (*to, out_column) = x.shape, strides(x), strides(out)
    item = x.itemsize
    factor = width**-0.5 if scale is None else scale
    for (source, target), sizes, (x_steps, out_steps) in rows(lead, steps, to):
        parallel(
            _transform, sizes[0] * sizes[1] * sizes[2], TAGS[dtype_name(x)], sizes, width,
            pointer(x) + source * item, x_steps, column, pointer(out) + target * item, out_steps, out_column,
            float(factor), minimum=-(-_GRAIN // width),
        )  # fmt: skip


@cache
def _recoded() -> tuple[Any, Any]:
    """[shift + 13, code]: e4m3 of each e2m1 value times 2^shift, NaN last; and as bits, the values that change."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    factors = np.append(np.exp2(np.arange(-_LOST, 7)), np.nan)
    exact = factors[:, None] * np.concatenate((values, -values))
    codes = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    changed = (codes.astype(np.float64) != exact)[:-1, :8]
    return codes.view(np.uint8).copy(), np.append((changed << np.arange(8)).sum(1), 0)


@jit
def _place(task, sizes, steps):
    rest, k = divmod(task, sizes[2])
    i, j = divmod(rest, sizes[1])
    return i * steps[0] + j * steps[1] + k * steps[2]


@jit
def _scale(tag, source, padded, inverse, floor, power_of_two):
    """The scale of a block and its e8m0 byte; NaN and 255 where the block is not finite."""
    item, step = size(tag), lanes(tag)
    highest = vsplat(INT32)
    for i in range(0, padded, step):
        highest = maximum(highest, bits(abs(vload(tag, source + i * item))))
    top = np.int64(vhighest(highest))
    if top >= INFINITY:
        return _NAN, 255
    scale = max(from_bits(FLOAT32, top), floor) * inverse
    if power_of_two:
        code = (bits(scale) + 0x7FFFFF) >> 23
        return from_bits(FLOAT32, code << 23), code
    return scale, 0


@jit
def _codes(tag, source, target, padded, scale, code, four):
    """The codes of a finite block. A power of two divides exactly by its inverse."""
    item, step = size(tag), lanes(tag)
    exact = code != 0
    divisor = vsplat(from_bits(FLOAT32, (254 - code) << 23) if exact else scale)
    for i in range(0, padded, step):
        value = vload(tag, source + i * item)
        value = value * divisor if exact else value / divisor
        if four:
            vencode(E2M1, target + i // 2, value)
        else:
            vencode(E4M3, target + i, value)


@jit
def _code_rows(
    start, stop, tag, sizes, block, groups, x, x_steps, column, codes, codes_steps, codes_column,
    scales, scale_steps, scale_column, unit, inverse, floor, power_of_two, four,
):  # fmt: skip
    item, step = size(tag), lanes(tag)
    padded = -(-block // step) * step
    count = block // 2 if four else block
    direct = padded == block and column == 1 and codes_column == 1
    held = np.zeros(0 if direct else 5 * padded, np.uint8)
    scratch = np.int64(held.ctypes.data)
    for row in range(start, stop):
        source = x + _place(row, sizes, x_steps) * item
        target = codes + _place(row, sizes, codes_steps)
        beside = scales + _place(row, sizes, scale_steps) * unit
        for group in range(groups):
            first = source + group * block * column * item
            into = target + group * count * codes_column
            if direct:
                scale, code = _scale(tag, first, padded, inverse, floor, power_of_two)
                if code != 255:
                    _codes(tag, first, into, padded, scale, code, four)
            else:
                for i in range(block):
                    store(FLOAT32, scratch + 4 * i, load(tag, first + i * column * item))
                scale, code = _scale(FLOAT32, scratch, padded, inverse, floor, power_of_two)
                if code != 255:
                    _codes(FLOAT32, scratch, scratch + 4 * padded, padded, scale, code, four)
                    for i in range(count):
                        store(BYTE, into + i * codes_column, np.int64(load(BYTE, scratch + 4 * padded + i)))
            if code == 255:
                for i in range(count):
                    store(BYTE, into + i * codes_column, 0x77 if four else 0x7F)
            if unit == 4:
                store(FLOAT32, beside + group * scale_column * unit, scale)
            else:
                store(BYTE, beside + group * scale_column, code)
    return held.size  # keeps the scratch alive until here


@jit
def _rounded(tag, source, target, padded, scale, code, four):
    """A block to the format and back; a NaN scale makes it NaN."""
    item, step = size(tag), lanes(tag)
    exact = 0 < code < 255
    divisor, factor = vsplat(from_bits(FLOAT32, (254 - code) << 23) if exact else scale), vsplat(scale)
    for i in range(0, padded, step):
        value = vload(tag, source + i * item)
        value = value * divisor if exact else value / divisor
        value = vround(E2M1, value) if four else vround(E4M3, value)
        vstore(tag, target + i * item, value * factor)


@jit
def _fake_rows(
    start, stop, tag, sizes, block, groups, x, x_steps, column, out, out_steps, out_column,
    inverse, floor, power_of_two, four,
):  # fmt: skip
    item, step = size(tag), lanes(tag)
    padded = -(-block // step) * step
    direct = padded == block and column == 1 and out_column == 1
    held = np.zeros(0 if direct else 4 * padded, np.uint8)
    scratch = np.int64(held.ctypes.data)
    for row in range(start, stop):
        source, target = x + _place(row, sizes, x_steps) * item, out + _place(row, sizes, out_steps) * item
        for group in range(groups):
            first, into = source + group * block * column * item, target + group * block * out_column * item
            if direct:
                scale, code = _scale(tag, first, padded, inverse, floor, power_of_two)
                _rounded(tag, first, into, padded, scale, code, four)
            else:
                for i in range(padded):
                    store(FLOAT32, scratch + 4 * i, load(tag, first + i * column * item) if i < block else FLOAT32)
                scale, code = _scale(FLOAT32, scratch, padded, inverse, floor, power_of_two)
                _rounded(FLOAT32, scratch, scratch, padded, scale, code, four)
                for i in range(block):
                    store(tag, into + i * out_column * item, load(FLOAT32, scratch + 4 * i))
    return held.size


@jit
def _recode(
    start, stop, pieces, across, packed, packed_steps, scale, scale_steps, weight, weight_steps,
    scales, scales_steps, lossless, lossless_steps, tables, changed,
):  # fmt: skip
    held = np.empty(192 * _SPAN, np.uint8)
    scratch = np.int64(held.ctypes.data)
    tops, news, same = np.empty(_SPAN, np.int64), np.empty(_SPAN, np.int64), np.empty(_SPAN, np.int64)
    for task in range(start, stop):
        band, piece = divmod(task, pieces)
        first = piece * _SPAN
        count = min(_SPAN, across - first)
        old = scale + 128 * band * scale_steps[0] + 4 * first * scale_steps[1]
        tops[:] = 0
        for row in range(128):
            for group in range(4 * count):
                code = np.int64(load(BYTE, old + row * scale_steps[0] + group * scale_steps[1]))
                if code > tops[group >> 2]:
                    tops[group >> 2] = code
        for block in range(count):
            news[block] = max(tops[block] - 6, 0)
            same[block] = tops[block] != 255
        for row in range(128):
            source = packed + (128 * band + row) * packed_steps[0] + 64 * first * packed_steps[1]
            target = weight + (128 * band + row) * weight_steps[0] + 128 * first * weight_steps[1]
            if packed_steps[1] != 1:
                for i in range(64 * count):
                    store(BYTE, scratch + i, np.int64(load(BYTE, source + i * packed_steps[1])))
                source = scratch
            into = target if weight_steps[1] == 1 else scratch + 64 * _SPAN
            for group in range(4 * count):
                block = group >> 2
                shift = np.int64(load(BYTE, old + row * scale_steps[0] + group * scale_steps[1])) - news[block]
                shift = max(shift, -_LOST) + _LOST if tops[block] != 255 else _NONE
                decode_fp4(source + 16 * group, into + 32 * group, tables + 16 * shift, False, _BYTE)
                if changed[shift]:
                    for i in range(16):
                        pair = np.int64(load(BYTE, source + 16 * group + i))
                        same[block] &= ~(changed[shift] >> (pair & 7) | changed[shift] >> (pair >> 4 & 7))
            if weight_steps[1] != 1:
                for i in range(128 * count):
                    store(BYTE, target + i * weight_steps[1], np.int64(load(BYTE, into + i)))
        for block in range(count):
            place = first + block
            new = 255 if tops[block] == 255 else news[block]
            store(BYTE, scales + band * scales_steps[0] + place * scales_steps[1], new)
            store(BYTE, lossless + band * lossless_steps[0] + place * lossless_steps[1], same[block])
    return held[0]


@jit
def _transform(start, stop, tag, sizes, width, x, x_steps, column, out, out_steps, out_column, factor):
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    held = np.empty(width * unit + 64, np.uint8)
    row = (np.int64(held.ctypes.data) + 63) & ~63
    scale = cast(real, factor)
    for task in range(start, stop):
        source, target = x + _place(task, sizes, x_steps) * item, out + _place(task, sizes, out_steps) * item
        if column != 1 or width < step:
            for i in range(width):
                store(real, row + i * unit, load(tag, source + i * column * item))
        if width < step:
            apart = 1
            while apart < width:
                _scalars(real, row, width, apart)
                apart *= 2
        else:
            for i in range(0, width, step):
                value = vload(tag, source + i * item) if column == 1 else vload(real, row + i * unit)
                vstore(real, row + i * unit, vbutterflies(value))
            apart = step
            while apart < width:
                _vectors(real, row, width, apart)
                apart *= 2
        if out_column == 1 and width >= step:
            factors = vsplat(scale)
            for i in range(0, width, step):
                vstore(tag, target + i * item, vload(real, row + i * unit) * factors)
        else:
            for i in range(width):
                store(tag, target + i * out_column * item, load(real, row + i * unit) * scale)
    return held[0]


@jit
def _scalars(real, row, width, apart):
    unit = size(real)
    for first in range(0, width, 2 * apart):
        for i in range(first, first + apart):
            low, high = load(real, row + i * unit), load(real, row + (i + apart) * unit)
            store(real, row + i * unit, low + high)
            store(real, row + (i + apart) * unit, low - high)


@jit
def _vectors(real, row, width, apart):
    unit, step = size(real), lanes(real)
    for first in range(0, width, 2 * apart):
        for i in range(first, first + apart, step):
            low, high = vload(real, row + i * unit), vload(real, row + (i + apart) * unit)
            vstore(real, row + i * unit, low + high)
            vstore(real, row + (i + apart) * unit, low - high)
