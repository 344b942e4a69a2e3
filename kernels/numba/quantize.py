"""Quantisers, the recoding of FP4 as FP8, and the Hadamard transform on the CPU.

Bound by bytes: a block is read for its largest magnitude and again, from cache, for its codes; both by whole vectors.
Blocks that are no whole vectors, or not contiguous, are gathered into scratch and padded with zeros. The transform, of
log2(width) additions an element, keeps a row in L1.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer
from flagops.registry import kernel

from .._moe import BLOCK, GROUP
from ._blocks import Block, alive, at, get, laid, of_task, pack, put, round_up, scratch, unpack, vget, vput, walk
from ._formats import E2M1, E4M3, FORMATS, NO_SCALE, decode_fp4, per_byte
from ._scales import encode, fake
from ._vectors import BYTE, FLOAT32, TAGS, cast, lanes, load, size, store, vbutterflies, wide

_GRAIN = 1 << 16  # elements worth a thread
_FP4 = FORMATS["e2m1"]
_BITS, _TOP = _FP4.bits, _FP4.top
_GROUPS, _HALF = BLOCK // GROUP, BLOCK // 2  # in a block's row: scales of FP4, bytes of its codes
_ABOVE = 6  # e4m3 holds all of e2m1 times two to this
_LOST = 13  # 6 * 2^-13 rounds to 0 in e4m3, and all that is smaller
_NONE = _LOST + _ABOVE + 1  # the table of NaN
_SPAN = 4  # blocks of a task of fp4_to_fp8


@kernel(deterministic=True, batch_invariant=True)
def fp8_quantize(x: Any, block: int, power_of_two: bool, scale_dtype: str, out: tuple[Any, Any]) -> None:
    """One byte and one scale at a time go to strided results."""
    _encode(E4M3, x, *out, block, FLOAT32 if scale_dtype == "float32" else BYTE, power_of_two)


@kernel(deterministic=True, batch_invariant=True)
def fp4_quantize(x: Any, block: int, out: tuple[Any, Any]) -> None:
    """Two codes a byte."""
    _encode(E2M1, x, *out, block, BYTE, True)


def _encode(form: Any, x: Any, codes: Any, scale: Any, block: int, kind: Any, power_of_two: bool) -> None:
    *lead, width = x.shape
    for sizes, rows in walk(lead if width else (0,), (1, 1, 1), x, codes, scale):
        parallel(
            _code_rows, math.prod(sizes), TAGS[dtype_name(x)], form, kind, sizes, block, width // block, *rows,
            power_of_two, minimum=-(-_GRAIN // width),
        )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def fp8_fake_quantize(x: Any, block: int, power_of_two: bool, out: Any) -> None:
    """Rounded in registers; no code is ever formed."""
    _fake(E4M3, x, block, power_of_two, out)


@kernel(deterministic=True, batch_invariant=True)
def fp4_fake_quantize(x: Any, block: int, out: Any) -> None:
    """Rounded in registers; no code is ever formed."""
    _fake(E2M1, x, block, True, out)


def _fake(form: Any, x: Any, block: int, power_of_two: bool, out: Any) -> None:
    *lead, width = x.shape
    for sizes, rows in walk(lead if width else (0,), (1, 1), x, out):
        parallel(
            _fake_rows, math.prod(sizes), TAGS[dtype_name(x)], form, sizes, block, width // block, *rows,
            power_of_two, minimum=-(-_GRAIN // width),
        )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True, note="table lookup by byte shuffles")
def fp4_to_fp8(packed: Any, scale: Any, out: tuple[Any, Any, Any]) -> None:
    """The distance of a scale from the new one chooses the table of 16 codes that its group looks up."""
    weight, scales, lossless = out
    bands, across = scales.shape
    tables, changed = _recoded()
    pieces = -(-across // _SPAN)
    parallel(
        _recode, bands * pieces, pieces, across,
        *map(laid, (packed, scale, weight, scales, lossless)), pointer(tables), changed,
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def hadamard(x: Any, scale: float | None, out: Any) -> None:
    """Butterflies within vectors first, then between those of a row in cache; the last ones scale and round."""
    *lead, width = x.shape
    factor = width**-0.5 if scale is None else scale
    for sizes, rows in walk(lead, (1, 1), x, out):
        parallel(
            _transform, math.prod(sizes), TAGS[dtype_name(x)], sizes, width, *rows, float(factor),
            minimum=-(-_GRAIN // width),
        )  # fmt: skip


@cache
def _recoded() -> tuple[Any, Any]:
    """[shift + _LOST, code]: e4m3 of each e2m1 value times 2^shift, NaN last; and as bits, the values that change."""
    factors = np.append(np.exp2(np.arange(-_LOST, _ABOVE + 1)), np.nan)
    exact = factors[:, None] * _FP4.values
    codes = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    changed = (codes.astype(np.float64) != exact)[:-1, : _TOP + 1]
    return codes.view(np.uint8).copy(), np.append((changed << np.arange(_TOP + 1)).sum(1), 0)


@jit
def _code_rows(start, stop, tag, form, kind, sizes, block, groups, x, codes, scales, power_of_two):
    (column,), (codes_column,) = x[2], codes[2]
    shape, padded, count = (1, block), round_up(block, lanes(tag)), block // per_byte(form)
    direct = padded == block and column == 1 and codes_column == 1
    memory, (gathered,) = scratch(FLOAT32, ((1, padded),))
    apart, (coded,) = scratch(BYTE, ((1, padded),))
    for row in range(start, stop):
        source, target = of_task(tag, x, sizes, row), of_task(BYTE, codes, sizes, row)
        beside = of_task(kind, scales, sizes, row)
        for group in range(groups):
            first, into = at(source, group * block, 0), at(target, group * count, 0)
            if direct:
                scale, code = encode(form, Block(tag, first, block), block, power_of_two, Block(BYTE, into, count))
            else:
                pack(tag, first, (0, column), shape, gathered, (1, padded))
                scale, code = encode(form, gathered, padded, power_of_two, coded)
                unpack(BYTE, coded, (1, count), into, (0, codes_column))
            if size(kind) == 1:
                store(BYTE, at(beside, group, 0), code)
            else:
                store(FLOAT32, at(beside, group, 0), scale)
    return alive(memory, apart)


@jit
def _fake_rows(start, stop, tag, form, sizes, block, groups, x, out, power_of_two):
    (column,), (out_column,) = x[2], out[2]
    shape, padded = (1, block), round_up(block, lanes(tag))
    direct = padded == block and column == 1 and out_column == 1
    memory, (gathered,) = scratch(FLOAT32, ((1, padded),))
    for row in range(start, stop):
        source, target = of_task(tag, x, sizes, row), of_task(tag, out, sizes, row)
        for group in range(groups):
            first, into = at(source, group * block, 0), at(target, group * block, 0)
            if direct:
                fake(form, Block(tag, first, block), block, power_of_two, Block(tag, into, block))
            else:
                pack(tag, first, (0, column), shape, gathered, (1, padded))
                fake(form, gathered, padded, power_of_two, gathered)
                unpack(tag, gathered, shape, into, (0, out_column))
    return alive(memory)


@jit
def _byte(matrix, i, j):
    """The address of a byte of a matrix of any strides."""
    base, row, column = matrix
    return base + i * row + j * column


@jit
def _recode(start, stop, pieces, across, packed, scale, weight, scales, lossless, tables, changed):
    """A new scale is two to the power that lets the largest group under it in; the others lose what is too small."""
    memory, (codes, results) = scratch(BYTE, ((1, _SPAN * _HALF), (1, _SPAN * BLOCK)))
    tops, news, same = np.empty(_SPAN, np.int64), np.empty(_SPAN, np.int64), np.empty(_SPAN, np.int64)
    table = Block(BYTE, tables, 2**_BITS)
    for task in range(start, stop):
        band, piece = divmod(task, pieces)
        first = piece * _SPAN
        count = min(_SPAN, across - first)
        tops[:] = 0
        for row in range(BLOCK * band, BLOCK * (band + 1)):
            for group in range(_GROUPS * count):
                code = np.int64(load(BYTE, _byte(scale, row, _GROUPS * first + group)))
                tops[group // _GROUPS] = max(tops[group // _GROUPS], code)
        for block in range(count):
            news[block] = max(tops[block] - _ABOVE, 0)
            same[block] = tops[block] != NO_SCALE
        for row in range(BLOCK * band, BLOCK * (band + 1)):
            source, target = _byte(packed, row, _HALF * first), _byte(weight, row, BLOCK * first)
            halves, shape = (1, _HALF * count), (1, BLOCK * count)
            if packed[2] != 1:
                pack(BYTE, source, (0, packed[2]), halves, codes, halves)
                source = codes.base
            into = target if weight[2] == 1 else results.base
            for group in range(_GROUPS * count):
                block = group // _GROUPS
                shift = np.int64(load(BYTE, _byte(scale, row, _GROUPS * first + group))) - news[block]
                shift = max(shift, -_LOST) + _LOST if tops[block] != NO_SCALE else _NONE
                pairs = source + group * GROUP // 2
                decode_fp4(pairs, into + group * GROUP, at(table, shift, 0), False, BYTE)
                if changed[shift]:
                    for i in range(GROUP // 2):
                        pair = np.int64(load(BYTE, pairs + i))
                        low, high = pair & _TOP, pair >> _BITS & _TOP
                        same[block] &= ~(changed[shift] >> low | changed[shift] >> high)
            if weight[2] != 1:
                unpack(BYTE, results, shape, target, (0, weight[2]))
        for block in range(count):
            new = NO_SCALE if tops[block] == NO_SCALE else news[block]
            store(BYTE, _byte(scales, band, first + block), new)
            store(BYTE, _byte(lossless, band, first + block), same[block])
    return alive(memory)


@jit
def _transform(start, stop, tag, sizes, width, x, out, factor):
    real, step = wide(tag), lanes(tag)
    scale = cast(real, factor)
    memory, (row,) = scratch(real, ((1, width),))
    for task in range(start, stop):
        given, result = of_task(tag, x, sizes, task), of_task(tag, out, sizes, task)
        if given.row != 1 or width < step:
            pack(tag, given.base, (0, given.row), (1, width), row, (1, width))
        if width < step:
            apart = 1
            while apart < width:
                _scalars(row, width, apart)
                apart *= 2
        else:
            for i in range(0, width, step):
                vput(row, 0, i, vbutterflies(vget(given, 0, i) if given.row == 1 else vget(row, 0, i)))
            apart = step
            while apart < width:
                _vectors(row, width, apart)
                apart *= 2
        if result.row == 1 and width >= step:
            for i in range(0, width, step):
                vput(result, 0, i, vget(row, 0, i) * scale)
        else:
            for i in range(width):
                put(result, i, 0, get(row, 0, i) * scale)
    return alive(memory)


@jit
def _scalars(row, width, apart):
    for first in range(0, width, 2 * apart):
        for i in range(first, first + apart):
            low, high = get(row, 0, i), get(row, 0, i + apart)
            put(row, 0, i, low + high)
            put(row, 0, i + apart, low - high)


@jit
def _vectors(row, width, apart):
    for first in range(0, width, 2 * apart):
        for i in range(first, first + apart, lanes(row.tag)):
            low, high = vget(row, 0, i), vget(row, 0, i + apart)
            vput(row, 0, i, low + high)
            vput(row, 0, i + apart, low - high)
