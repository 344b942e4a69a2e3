"""C = A B^T with B in e4m3 or packed e2m1 and block scales, on the CPU; the sums are those of `_gemm`.

One row is bound by the bytes of B, which are decoded in registers; many rows by operations, and decode B in panels that
stay in L1. A weight is never expanded as a whole. A is widened once, scaled, into rows of float32. Where the processor
adds products of bfloat16 in pairs, rows and panels of that hold codes times powers of two, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from flagops import config
from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, room, threads

from .._moe import BLOCK, GROUP
from . import _coded_pairs as pairs
from ._amx import DEPTH, GRID, TILES, grid_width, restore_tiles, shape_tiles, tile_product
from ._blocks import Block, alive, at, clear, get, pack, put, round_up, scratch, shifted, turn, unpack, vget, vput
from ._coded_tiles import FP8_FACTOR, PAIR, fp4_decode, fp4_row, fp4_table, fp8_decode, fp8_row
from ._formats import FORMATS
from ._gemm import (
    DOT_DEPTH,
    PAIR_DEPTH,
    ROWS,
    SERIAL,
    UNIT,
    A,
    Axes,
    B,
    View,
    _axis,
    _offsets,
    dot_rows,
    lay_all,
    row_blocks,
    share,
    task_columns,
    view,
)
from ._ir import PAIRS
from ._tiles import DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_ROWS, DOT_WIDTH
from ._vectors import BYTE, FLOAT32, LANES, TAGS, load, size

_FP8_FACTOR = np.float32(FP8_FACTOR)
_ROWS = 128  # of a block
_FEW = 64  # rows whose cut is kept
_NEAR = 128  # so deep is a panel for few rows in tile registers, whose sums cost less than what falls out of L1
_AHEAD = 512  # bytes of a row that are fetched before they are needed
_A, _A_SCALE, _OUT = range(3)  # of what the offsets of a row are


@cache
def _values(name: str) -> Any:
    """Of a format of 8 bits, by code."""
    return FORMATS[name].values.astype(np.float32)


_floats, _products = cache(fp4_table), (cache(pairs.fp8_table), cache(pairs.fp4_table))


@cache
def _address(table: Callable[..., Any], *name: str) -> int:
    """Of a table that is made once and kept."""
    return pointer(table(*name))


@jit
def _scale(address, index, coded, table):
    """A scale by its index, of bytes or of float32."""
    return load(FLOAT32, table + 4 * load(BYTE, address + index)) if coded else load(FLOAT32, address + 4 * index)


@jit
def _multiply(source, count, factor, target):
    """The beginning of a block, times a factor, into that of another."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        vput(target, 0, i, vget(source, 0, i) * factor)
    for i in range(whole, count):
        put(target, 0, i, get(source, 0, i) * factor)


@jit
def _fill(start, stop, tag, rows, k, a, column, offsets, scale, scale_step, coded, scales, values, products, packed, x):
    """Rows of activations in the dtype of x, times their scales where there are any; zero beyond `rows` and k."""
    for row in range(start, stop):
        if row >= rows:
            clear(x.tag, at(x, row, 0), x.row)
            continue
        lie = scale != 0 and coded and column == 1 and scale_step == 1 and k % BLOCK == 0
        place, above = a + offsets[row, _A], scale + offsets[row, _A_SCALE]
        if lie and pairs.decode_row(place, above, products, k // BLOCK, packed, shifted(x, row, 0)):
            clear(x.tag, at(x, row, k), x.row - k)
            continue
        if scale == 0:
            pack(tag, a + offsets[row, _A] * size(tag), (0, column), (1, k), shifted(x, row, 0), (1, x.row))
        else:
            codes = a + offsets[row, _A]
            for i in range(k):
                put(x, row, i, load(FLOAT32, values + 4 * load(BYTE, codes + i * column)))
            for first in range(0, k, BLOCK):
                factor = _scale(scale, offsets[row, _A_SCALE] + first // BLOCK * scale_step, coded, scales)
                part = shifted(x, row, first)
                _multiply(part, min(BLOCK, k - first), factor, part)
            clear(x.tag, at(x, row, k), x.row - k)
        pairs.arrange(shifted(x, row, 0), packed, round_up(k, BLOCK))


@jit
def _part(each, counts, most, whole):
    """Where the part of a task that comes next begins, and how far it goes, in columns and in depth.

    One row reads whole rows of B, several keep a part of A.
    """
    tiles, parts, rows = counts
    tile, part = divmod(each, parts) if rows == 1 else (each % tiles, each // tiles)
    column, first = tile * most[0], part * most[1]
    return column, first, min(most[0], whole[0] - column), min(most[1], whole[1] - first)


@jit
def _bytes(matrices, group, row, column, shape, padded, gathered):
    """Part of a matrix of bytes where it lies; gathered, and zero beyond it, if columns are apart or it is padded."""
    base, group_step, row_step, column_step = matrices
    source = base + group * group_step + row * row_step + column * column_step
    if column_step == 1 and shape[1] == padded:
        return Block(BYTE, source, row_step)
    pack(BYTE, source, (row_step, column_step), shape, gathered, (shape[0], padded))
    return gathered


@jit
def _emit(tag, sums, rows, columns, factor, out, step, offsets):
    """Round sums, times a factor, into rows of the output at offsets."""
    for i in range(rows):
        row = shifted(sums, i, 0)
        if factor != 1:
            _multiply(row, columns, factor, row)
        unpack(tag, row, (1, columns), out + offsets[i, _OUT] * size(tag), (0, step))


@jit
def _fp4(start, stop, tag, n, groups, mc, nc, x, b, s, table, out, step, offsets, blocks):
    deepest = DOT_DEPTH // GROUP
    memory, (panel, sums) = scratch(FLOAT32, ((DOT_ROW_COLUMNS, DOT_DEPTH), (mc + DOT_ROWS, nc + DOT_WIDTH)))
    apart, (codes, factors) = scratch(BYTE, ((DOT_ROW_COLUMNS, DOT_DEPTH // 2), (DOT_ROW_COLUMNS, deepest)))
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, rows = blocks[block, A], blocks[block, B], blocks[block, ROWS]
        columns, across = min(nc, n - column), DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
        tiles, parts = -(-columns // across), max(1, -(-groups // deepest))
        for each in range(tiles * parts):
            j, first, valid, deep = _part(each, (tiles, parts, rows), (across, deepest), (columns, groups))
            begin, length = first * GROUP // 2, deep * GROUP // 2
            w = _bytes(b, group, column + j, begin, (valid, length), length, codes)
            scales = _bytes(s, group, column + j, first, (valid, deep), deep, factors)
            left, into = shifted(x, row, GROUP * first), shifted(sums, 0, j)
            if rows == 1:
                fp4_row(left, w, scales, table, valid, deep, into, first > 0)
            else:
                for i in range(valid):
                    fp4_decode(at(w, i, 0), at(scales, i, 0), table, deep, at(panel, i, 0))
                dot_rows(left, panel, rows, valid, GROUP * deep, into, first > 0)
        target = out + column * step * size(tag)
        _emit(tag, sums, rows, columns, np.float32(1), target, step, offsets[row:])
    return alive(memory, apart)


@jit
def _paired(start, stop, tag, packed, n, k, mc, nc, x, b, s, table, out, step, offsets, blocks):
    """Panels of bfloat16, each weight times its scale; the columns of a task of FP8 lie under one row of scales."""
    unit, per_byte = (GROUP, 2) if packed else (BLOCK, 1)
    deepest, groups = PAIR_DEPTH // unit, -(-k // unit)
    memory, (panel,) = scratch(x.tag, ((DOT_ROW_COLUMNS, PAIR_DEPTH),))
    further, (sums,) = scratch(FLOAT32, ((mc + DOT_ROWS, nc + DOT_WIDTH),))
    apart, (codes, factors) = scratch(BYTE, ((DOT_ROW_COLUMNS, PAIR_DEPTH), (DOT_ROW_COLUMNS, PAIR_DEPTH // GROUP)))
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, rows = blocks[block, A], blocks[block, B], blocks[block, ROWS]
        columns, across = min(nc, n - column), DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
        tiles, parts = -(-columns // across), max(1, -(-groups // deepest))
        for each in range(tiles * parts):
            j, first, valid, deep = _part(each, (tiles, parts, rows), (across, deepest), (columns, groups))
            place, left, into = (group, column + j, first), shifted(x, row, unit * first), shifted(sums, 0, j)
            w, scales = _coded(packed, b, s, place, (valid, deep), k, codes, factors)
            if rows == 1:
                # of the next tile, as much as this part is of its own, from where the parts before left off
                ahead = w.base + across * b[2] + (across - 1) * first * unit // per_byte
                if packed:
                    pairs.fp4_row(left, w, scales, table, valid, deep, into, first > 0, ahead)
                else:
                    pairs.fp8_row(left, w, scales, table, valid, deep, into, first > 0, ahead)
            else:
                _decoded(packed, w, scales, table, (valid, deep), panel, valid * b[2])
                dot_rows(left, panel, rows, valid, unit * deep, into, first > 0)
        target = out + column * step * size(tag)
        _emit(tag, sums, rows, columns, np.float32(1), target, step, offsets[row:])
    return alive(memory, further, apart)


@jit
def _squared(start, stop, tag, packed, n, k, mc, nc, x, b, s, table, out, step, offsets, blocks):
    """As `_paired`, in tile registers: x holds the panels in pairs of all blocks of rows, each x.row deep."""
    (unit, per_byte), width = (GROUP, 2) if packed else (BLOCK, 1), grid_width(mc)
    most, groups = DOT_DEPTH if mc > GRID else _NEAR, -(-k // unit)
    high, across = round_up(nc, GRID), round_up(mc, width)
    memory, (panel,) = scratch(x.tag, ((GRID, most + DEPTH),))
    further, (sums, flat, shape) = scratch(FLOAT32, ((high, across), (mc, nc), (1, 16)))
    apart, (codes, factors) = scratch(BYTE, ((GRID, DOT_DEPTH), (GRID, DOT_DEPTH // GROUP)))
    shape_tiles(shape.base, width)
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, rows = blocks[block, A], blocks[block, B], blocks[block, ROWS]
        columns, deepest = min(nc, n - column), most // unit
        tiles, parts = -(-columns // GRID), max(1, -(-groups // deepest))
        for each in range(tiles * parts):
            counts = tiles, parts, 1 if most < DOT_DEPTH else rows
            i, first, valid, deep = _part(each, counts, (GRID, deepest), (columns, groups))
            w, scales = _coded(packed, b, s, (group, column + i, first), (valid, deep), k, codes, factors)
            ahead, line = valid * b[2], k // per_byte
            if most < DOT_DEPTH:  # along a row as far as there is more of it, then where the next ones begin
                ahead = _AHEAD if first * unit // per_byte + _AHEAD < line else _AHEAD + ahead - line
            _decoded(packed, w, scales, table, (valid, deep), panel, ahead)
            for j in range(0, rows, GRID):
                right = Block(x.tag, at(x, block * across + j, first * unit * width), 2 * width)
                tile_product(panel, right, rows - j, unit * deep, shifted(sums, i, j), first > 0)
        turn(FLOAT32, sums.base, (across, 1), (columns, rows), flat.base, (1, nc))
        target = out + column * step * size(tag)
        _emit(tag, flat, rows, columns, np.float32(1), target, step, offsets[row:])
    restore_tiles(shape.base)
    return alive(memory, further, apart)


@jit
def _coded(packed, b, s, place, shape, k, codes, factors):
    """Rows of B and of its scales, from a group or block of them on."""
    unit, per_byte = (GROUP, 2) if packed else (BLOCK, 1)
    (group, column, first), (valid, deep) = place, shape
    begin, length = first * unit // per_byte, deep * unit // per_byte
    w = _bytes(b, group, column, begin, (valid, min(length, k // per_byte - begin)), length, codes)
    above, scaled = (column, valid) if packed else (column // BLOCK, 1)
    return w, _bytes(s, group, above, first, (scaled, deep), deep, factors)


@jit
def _decoded(packed, w, scales, table, shape, panel, ahead):
    """Rows of a panel of bfloat16, each weight times its scale."""
    valid, deep = shape
    for i in range(valid):
        if packed:
            pairs.fp4_decode(at(w, i, 0), at(scales, i, 0), table, deep, at(panel, i, 0), ahead)
        else:
            pairs.fp8_decode(at(w, i, 0), at(scales, 0, 0), table, deep, at(panel, i, 0), ahead)


@jit
def _scaled(x, rows, depth, scales, index, step, coded, table, target):
    """Rows of activations times the scales of a row of blocks of B, from that of an index on."""
    for first in range(0, depth, BLOCK):
        factor = _scale(scales, index + first // BLOCK * step, coded, table)
        for i in range(rows):
            _multiply(shifted(x, i, first), BLOCK, factor, shifted(target, i, first))


@jit
def _fp8(start, stop, tag, n, k, mc, nc, x, b, s, coded, table, out, step, offsets, blocks):
    """`nc` divides BLOCK, so that the columns of a task lie under one row of scales, which A takes along."""
    scales, group_step, row_step, scale_step = s
    several = max(mc + DOT_ROWS, -(-x.row // DOT_DEPTH))  # rows of a part, or parts of one row
    shapes = (DOT_ROW_COLUMNS, DOT_DEPTH), (mc + DOT_ROWS, nc + DOT_WIDTH), (several, DOT_DEPTH)
    memory, (panel, sums, left) = scratch(FLOAT32, shapes)
    apart, (codes,) = scratch(BYTE, ((DOT_ROW_COLUMNS, DOT_DEPTH),))
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, 1)
        row, group, rows = blocks[block, A], blocks[block, B], blocks[block, ROWS]
        columns, across = min(nc, n - column), DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
        tiles, parts = -(-columns // across), max(1, -(-k // DOT_DEPTH))
        above = group * group_step + column // BLOCK * row_step
        if rows == 1:
            _scaled(shifted(x, row, 0), 1, k, scales, above, scale_step, coded, table, left)
        for each in range(tiles * parts):
            j, first, valid, deep = _part(each, (tiles, parts, rows), (across, DOT_DEPTH), (columns, k))
            if rows > 1 and j == 0:
                index, all_rows = above + first // BLOCK * scale_step, round_up(rows, DOT_ROWS)
                _scaled(shifted(x, row, first), all_rows, deep, scales, index, scale_step, coded, table, left)
            padded, into = round_up(deep, PAIR), shifted(sums, 0, j)
            w = _bytes(b, group, column + j, first, (valid, deep), padded, codes)
            if rows == 1:
                fp8_row(shifted(left, 0, first), w, valid, padded, into, first > 0)
            else:
                for i in range(valid):
                    fp8_decode(at(w, i, 0), padded, at(panel, i, 0))
                dot_rows(left, panel, rows, valid, padded, into, first > 0)
        target = out + column * step * size(tag)
        _emit(tag, sums, rows, columns, _FP8_FACTOR, target, step, offsets[row:])
    return alive(memory, apart)


class Scales(NamedTuple):
    """Scales as they lie; bytes where they are coded, else float32."""

    view: View
    coded: bool


def scales(x: Any) -> Scales:
    return Scales(view(x), dtype_name(x) != "float32")


def product(
    name: str, a: View, a_scale: Scales | None, b: View, b_scale: Scales, result: str, out: View, bounds: Any = None,
    narrow: bool = False,
) -> None:  # fmt: skip
    """out[.., n] = (a[.., k] * a_scale) (b[n, ..] * b_scale)^T, rounded once, to the dtype called `result`.

    name: the dtype of a: uint8 where it is codes, which have scales, else a float's, which has none. b is packed FP4
    where it is half as wide as a, else FP8. The leading axes of a and a_scale broadcast to those of out. Given bounds,
    b and b_scale have an axis of groups in front; the rows from bounds[g] to bounds[g + 1] are multiplied by b[g].
    narrow: whether bfloat16 holds the activations, times their scales.
    """
    n, k, packed = b.shape[-2], a.shape[-1], 2 * b.shape[-1] == a.shape[-1]
    paired = (PAIRS if packed else pairs.BYTES) and narrow and b_scale.coded
    leads = a, a_scale.view if a_scale else a, out
    rows = math.prod(out.shape[:-1])
    cut = _cut if bounds is None and rows <= _FEW else _cut.__wrapped__  # what is kept is as long as they are many
    steps = tuple([(x.shape[:-1], x.strides[:-1]) for x in leads])
    parts = cut(steps, rows, n, k, packed, paired, threads() if rows * n * k > SERIAL else 1, config.budget(), bounds)
    kind, item = (TAGS["bfloat16"], 2) if paired else (FLOAT32, 4)
    scale = (a_scale.view.address, a_scale.view.strides[-1], a_scale.coded) if a_scale else (0, 0, False)
    tables, products = (_address(_values, "e8m0"), _address(_values, "e4m3")), _address(_products[False])
    weights = _matrices(b), _matrices(b_scale.view)
    ld = _apart(k, item)
    kernel: Any
    shape: tuple[Any, ...]
    table: tuple[Any, ...]
    for part in parts:
        _memory, place = room(part.padded * ld * item)
        x = Block(kind, place, ld)
        parallel(
            _fill, part.padded, FLOAT32 if a_scale else TAGS[name], part.rows, k, a.address, a.strides[-1], part.where,
            *scale, *tables, products, packed, x, minimum=-(-SERIAL // (16 * max(k, 1))),
        )  # fmt: skip
        if paired and TILES:
            x, _memory = _panels(x, k, part)
        if paired:
            kernel = _squared if TILES else _paired
            shape, table = (packed, n, k, part.mc, part.nc), (_address(_products[packed]),)
        elif packed:
            kernel, shape, table = _fp4, (n, k // GROUP, part.mc, part.nc), (_address(_floats),)
        else:
            kernel, shape, table = _fp8, (n, k, part.mc, part.nc), (b_scale.coded, tables[0])
        target = out.address, out.strides[-1], part.where, part.blocks
        parallel(kernel, part.tasks, TAGS[result], *shape, x, *weights, *table, *target, minimum=part.minimum)


class _Part(NamedTuple):
    """Rows that are multiplied together: where each finds its A, scales and C, and how they and columns are cut.

    apart: the blocks, whose A is counted in elements of rows that lie as they are filled.
    """

    rows: int
    padded: int
    where: Any
    blocks: Any
    apart: Any
    mc: int
    nc: int
    tasks: int
    minimum: int


def _apart(k: int, item: int) -> int:
    """From row to row of activations; a power of two apart, they would share few sets of a cache."""
    return round_up.py_func(k, BLOCK) + 64 // item


@lru_cache(maxsize=256)
def _cut(
    leads: tuple[tuple[Axes, Axes], ...], m: int, n: int, k: int, packed: bool, paired: bool, team: int, budget: int,
    bounds: Any,
) -> list[_Part]:  # fmt: skip
    """The rows in parts that fit the budget; leads: shapes and strides of A, its scales and C, but the last."""
    if not (m and n):
        return []
    whole = leads[-1][0]
    offsets = _offsets([(whole[-i], *(_axis(*lead, i)[1] for lead in leads)) for i in range(len(whole), 0, -1)])
    squared, item = paired and TILES, 2 if paired else 4
    most = max(_ROWS, budget // 4 // (item * _apart(k, item)) // _ROWS * _ROWS)
    if bounds is None:
        bounds = np.array([0, m])
    parts = []
    for first in range(0, m, most):
        rows = min(most, m - first)
        mc = min(rows, 2 * _ROWS if squared else _ROWS)
        blocks = row_blocks(bounds, first, first + rows, mc, 1, 1, 1)
        nc = task_columns(n, len(blocks), team, UNIT) if packed else BLOCK
        while not packed and nc > 32 and -(-n // nc) * len(blocks) < 4 * team:
            nc //= 2
        tasks = len(blocks) * -(-n // nc)
        padded = rows + DOT_ROWS - 1 if rows > 1 else 1  # a tile may reach beyond its block
        minimum = 1 if team > 1 else tasks
        apart = blocks.copy()
        apart[:, A] *= _apart(k, item)
        parts.append(_Part(rows, padded, offsets[first : first + rows], blocks, apart, mc, nc, tasks, minimum))
    return parts


def _panels(x: Any, k: int, part: _Part) -> tuple[Any, Any]:
    """Rows as `_squared` wants them, those of a block behind those of the one before; and their memory."""
    deep, across = round_up.py_func(k, BLOCK), round_up.py_func(part.mc, grid_width.py_func(part.mc))
    memory, place = room(2 * len(part.blocks) * across * deep)
    least = -(-SERIAL // (4 * part.mc * max(k, 1)))
    rows = x.base, x.row, 1
    parallel(lay_all, len(part.blocks), x.tag, deep, part.mc, deep, rows, part.apart, place, minimum=least)
    return Block(x.tag, place, deep), memory


def _matrices(x: View) -> tuple[int, ...]:
    """The address and the strides of matrices, 0 from one to the next where there is one."""
    return (x.address, *(0, *x.strides)[-3:])
