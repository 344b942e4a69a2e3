"""C = A B^T with B in e4m3 or packed e2m1 and block scales, on the CPU; the sums are those of `_gemm`.

A is widened once, scaled, into rows of float32. B is decoded in registers for one row of A, else in panels that stay in
L1; a weight is never expanded as a whole. Each sum has one order, fixed by K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, threads

from ._blocks import Block, pack, unpack
from ._coded_tiles import FP8_FACTOR, fp4_arrange, fp4_decode, fp4_row, fp4_table, fp8_decode, fp8_row
from ._formats import FORMATS
from ._gemm import View, _offsets, row_blocks, share, view
from ._tiles import DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_ROWS, DOT_WIDTH, dot_tile
from ._vectors import (
    BYTE,
    FLOAT32,
    LANES,
    TAGS,
    load,
    size,
    store,
    vload,
    vsplat,
    vstore,
)

DEPTH = 512
PAIR = 2 * LANES
BLOCK = 128
_FP8_FACTOR = np.float32(FP8_FACTOR)
_ROWS, _WIDTH, _UNIT, _SERIAL = 128, 384, 24, 1 << 19


@cache
def _e4m3() -> Any:
    return FORMATS["e4m3"].values.astype(np.float32)


@cache
def _e8m0() -> Any:
    return FORMATS["e8m0"].values.astype(np.float32)


@cache
def _products() -> Any:
    return fp4_table()


@cache
def _address(table: Callable[[], Any]) -> int:
    return pointer(table())  # which keeps it


@jit
def _scale(address, index, coded, table):
    """A scale by its index, of bytes or of float32."""
    return load(FLOAT32, table + 4 * load(BYTE, address + index)) if coded else load(FLOAT32, address + 4 * index)


@jit
def _multiply(target, source, count, factor):
    many, whole = vsplat(factor), count - count % LANES
    for i in range(0, whole, LANES):
        vstore(FLOAT32, target + 4 * i, vload(FLOAT32, source + 4 * i) * many)
    for i in range(whole, count):
        store(FLOAT32, target + 4 * i, load(FLOAT32, source + 4 * i) * factor)


@jit
def _fill(start, stop, tag, m, k, ld, a, ak, scale, scale_step, coded, scales, values, arranged, offsets, x):
    """Rows of activations as float32, times their scales where there are any; zero beyond m and k."""
    for row in range(start, stop):
        target = x + 4 * ld * row
        if row < m and scale == 0:
            pack(tag, a + offsets[row, 0] * size(tag), (0, ak), (1, k), Block(FLOAT32, target, ld), (1, k))
        elif row < m:
            for i in range(k):
                store(FLOAT32, target + 4 * i, load(FLOAT32, values + 4 * load(BYTE, a + offsets[row, 0] + i * ak)))
            for first in range(0, k, BLOCK):
                factor = _scale(scale, offsets[row, 1] + first // BLOCK * scale_step, coded, scales)
                _multiply(target + 4 * first, target + 4 * first, min(BLOCK, k - first), factor)
        for i in range(k if row < m else 0, ld):
            store(FLOAT32, target + 4 * i, FLOAT32)
        if arranged:
            fp4_arrange(target, k // 32)


@jit
def _emit(tag, sums, ld, rows, columns, factor, out, cn, offsets, row):
    """Round sums, times a factor, into rows of the output."""
    for i in range(rows):
        source = sums + 4 * ld * i
        if factor != 1:
            _multiply(source, source, columns, factor)
        unpack(tag, Block(FLOAT32, source, ld), (1, columns), out + offsets[row + i, 2] * size(tag), (0, cn))


@jit
def _gather(source, row, column, rows, columns, target, at, ld):
    """Bytes of any strides into rows of `ld` of an array, zero beyond `columns`."""
    for i in range(rows):
        for j in range(columns):
            target[at + i * ld + j] = load(BYTE, source + i * row + j * column)
        for j in range(columns, ld):
            target[at + i * ld + j] = 0


@jit
def _fp4(start, stop, tag, n, groups, mc, nc, x, ldx, b, bg, bn, bk, s, sg, sn, sk, table, out, cn, offsets, blocks):
    ldc, deepest = nc + DOT_WIDTH, DEPTH // 32
    held = np.empty(4 * ((mc + DOT_ROWS) * ldc + DOT_ROW_COLUMNS * DEPTH) + 64, np.uint8)
    codes = np.empty(DOT_ROW_COLUMNS * 17 * deepest, np.uint8)
    panel = (np.int64(held.ctypes.data) + 63) & ~63
    sums = panel + 4 * DOT_ROW_COLUMNS * DEPTH
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, _, rows, _, _ = blocks[block]
        columns = min(nc, n - column)
        across, parts = DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS, max(1, -(-groups // deepest))
        tiles = -(-columns // across)
        for step in range(tiles * parts):  # one row takes whole rows of B in turn, several share a part in the cache
            j, part = divmod(step, parts) if rows == 1 else (step % tiles, step // tiles)
            j, first = j * across, part * deepest
            valid, deep = min(across, columns - j), min(deepest, groups - first)
            w, ldw = b + group * bg + (column + j) * bn + 16 * first * bk, bn
            scales, lds = s + group * sg + (column + j) * sn + first * sk, sn
            if bk != 1:
                _gather(w, bn, bk, valid, 16 * deep, codes, 0, 16 * deepest)
                w, ldw = np.int64(codes.ctypes.data), 16 * deepest
            if sk != 1:
                at = 16 * deepest * DOT_ROW_COLUMNS
                _gather(scales, sn, sk, valid, deep, codes, at, deepest)
                scales, lds = np.int64(codes.ctypes.data) + at, deepest
            left = x + 4 * (row * ldx + 32 * first)
            if rows == 1:
                fp4_row(w, ldw, scales, lds, table, valid, deep, left, sums + 4 * j, part > 0)
                continue
            for i in range(valid):
                fp4_decode(w + i * ldw, scales + i * lds, table, deep, panel + 4 * i * DEPTH)
            for i in range(0, rows, DOT_ROWS):
                into = sums + 4 * (i * ldc + j)
                dot_tile(
                    Block(FLOAT32, left + 4 * i * ldx, ldx),
                    Block(FLOAT32, panel, DEPTH),
                    valid,
                    32 * deep,
                    Block(FLOAT32, into, ldc),
                    part > 0,
                )
        _emit(tag, sums, ldc, rows, columns, np.float32(1), out + column * cn * size(tag), cn, offsets, row)
    return held[0] + codes[0]  # keeps the scratch alive until here


@jit
def _fp8(start, stop, tag, n, k, mc, nc, x, ldx, b, bg, bn, bk, s, sg, sn, sk, coded, table, out, cn, offsets, blocks):
    """`nc` divides 128, so that the columns of a task lie under one row of scales, which A takes along."""
    ldc = nc + DOT_WIDTH
    scaled = max((mc + DOT_ROWS) * DEPTH, ldx)
    held = np.empty(4 * ((mc + DOT_ROWS) * ldc + DOT_ROW_COLUMNS * DEPTH + scaled) + 64, np.uint8)
    codes = np.empty(DOT_ROW_COLUMNS * DEPTH, np.uint8)
    panel = (np.int64(held.ctypes.data) + 63) & ~63
    sums = panel + 4 * DOT_ROW_COLUMNS * DEPTH
    left = sums + 4 * (mc + DOT_ROWS) * ldc
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, _, rows, _, _ = blocks[block]
        columns = min(nc, n - column)
        across, parts = DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS, max(1, -(-k // DEPTH))
        tiles = -(-columns // across)
        scales = group * sg + column // BLOCK * sn
        if rows == 1:
            for i in range(-(-k // BLOCK)):
                at = 4 * BLOCK * i
                _multiply(left + at, x + 4 * row * ldx + at, BLOCK, _scale(s, scales + i * sk, coded, table))
        for step in range(tiles * parts):
            j, part = divmod(step, parts) if rows == 1 else (step % tiles, step // tiles)
            j, first = j * across, part * DEPTH
            valid, deep = min(across, columns - j), min(DEPTH, k - first)
            if rows > 1 and j == 0:
                for i in range(-(-rows // DOT_ROWS) * DOT_ROWS):
                    for at in range(0, deep, BLOCK):
                        factor = _scale(s, scales + (first + at) // BLOCK * sk, coded, table)
                        source = x + 4 * ((row + i) * ldx + first + at)
                        _multiply(left + 4 * (i * DEPTH + at), source, BLOCK, factor)
            w, ldw = b + group * bg + (column + j) * bn + first * bk, bn
            if bk != 1 or deep % PAIR:
                _gather(w, bn, bk, valid, deep, codes, 0, DEPTH)
                w, ldw, deep = np.int64(codes.ctypes.data), DEPTH, -(-deep // PAIR) * PAIR
            if rows == 1:
                fp8_row(w, ldw, valid, deep, left + 4 * first, sums + 4 * j, part > 0)
                continue
            for i in range(valid):
                fp8_decode(w + i * ldw, deep, panel + 4 * i * DEPTH)
            for i in range(0, rows, DOT_ROWS):
                into = sums + 4 * (i * ldc + j)
                dot_tile(
                    Block(FLOAT32, left + 4 * i * DEPTH, DEPTH),
                    Block(FLOAT32, panel, DEPTH),
                    valid,
                    deep,
                    Block(FLOAT32, into, ldc),
                    part > 0,
                )
        _emit(tag, sums, ldc, rows, columns, _FP8_FACTOR, out + column * cn * size(tag), cn, offsets, row)
    return held[0] + codes[0]  # keeps the scratch alive until here


class Scales(NamedTuple):
    """Scales as they lie; bytes where they are coded, else float32."""

    view: View
    coded: bool


def scales(x: Any) -> Scales:
    return Scales(view(x), dtype_name(x) != "float32")


def product(
    name: str, a: View, a_scale: Scales | None, b: View, b_scale: Scales, result: str, out: View, bounds: Any = None
) -> None:  # fmt: skip
    """out[.., n] = (a[.., k] * a_scale) (b[n, ..] * b_scale)^T, rounded once, to the dtype called `result`.

    name: the dtype of a: uint8 where it is codes, which have scales, else a float's, which has none. b is packed FP4
    where it is half as wide as a, else FP8. The leading axes of a and a_scale broadcast to those of out. Given bounds,
    b and b_scale have an axis of groups in front; the rows from bounds[g] to bounds[g + 1] are multiplied by b[g].
    """
    n, k, packed = b.shape[-2], a.shape[-1], 2 * b.shape[-1] == a.shape[-1]
    leads = [a, a_scale.view if a_scale else a, out]
    axes = [(out.shape[-i], *(_step(x, i) for x in leads)) for i in range(len(out.shape), 1, -1)]
    offsets = _offsets(axes)
    m = len(offsets)
    if not (m and n):
        return
    if bounds is None:
        bounds = np.array([0, m])
    ld = -(-k // BLOCK) * BLOCK + LANES  # rows a power of two apart would share few sets of a cache
    held_rows = max(_ROWS, config.budget() // 4 // (4 * ld) // _ROWS * _ROWS)
    count = threads() if m * n * k > _SERIAL else 1
    for first in range(0, m, held_rows):
        rows = min(held_rows, m - first)
        padded = rows + DOT_ROWS - 1 if rows > 1 else 1  # a tile may reach beyond its block
        held = np.empty(padded * ld + 16, np.float32)
        x, where = (pointer(held) + 63) & ~63, offsets[first : first + rows]
        scale = (a_scale.view.address, a_scale.view.strides[-1], a_scale.coded) if a_scale else (0, 0, False)
        tables = _address(_e8m0), _address(_e4m3)
        parallel(
            _fill, padded, FLOAT32 if a_scale else TAGS[name], rows, k, ld, a.address, a.strides[-1], *scale, *tables,
            packed, where, x, minimum=-(-_SERIAL // (16 * max(k, 1))),
        )  # fmt: skip
        mc = min(rows, _ROWS)
        blocks = row_blocks(bounds, first, first + rows, mc, 1, 1, 1)
        weights = b.address, *_grouped(b), b_scale.view.address, *_grouped(b_scale.view)
        target = out.address, out.strides[-1], where, blocks
        if packed:
            nc = min(_WIDTH, max(_UNIT, -(-n * len(blocks) // (4 * count * _UNIT)) * _UNIT))
            kernel, shape, table = _fp4, (n, k // 32, mc, nc), (_address(_products),)  # type: Any, Any, Any
        else:
            nc = BLOCK
            while nc > 32 and -(-n // nc) * len(blocks) < 4 * count:
                nc //= 2
            kernel, shape, table = _fp8, (n, k, mc, nc), (b_scale.coded, _address(_e8m0))
        tasks = len(blocks) * -(-n // nc)
        minimum = 1 if count > 1 else tasks
        parallel(kernel, tasks, TAGS[result], *shape, x, ld, *weights, *table, *target, minimum=minimum)


def _grouped(x: View) -> tuple[int, ...]:
    """The strides of matrices, 0 from one to the next where there is one."""
    return (0, *x.strides)[-3:]


def _step(x: View, axis: int) -> int:
    """The stride of an axis counted from the end, 0 where it is broadcast."""
    return x.strides[-axis] if axis <= len(x.shape) and x.shape[-axis] != 1 else 0
