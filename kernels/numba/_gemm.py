"""C = A B (+ bias) over any strides. Each sum has one order, fixed by K and the layout of B: never by M, N or threads.

One row is bound by the bytes of B: it goes from memory to registers and is widened there, read once. Many rows are
bound by operations: tiles keep their sums in registers, and A and a panel of B, widened, stay in the caches. Where B is
contiguous along K, as a transposed weight is, vectors run along K (`dot_tile`); elsewhere along N (`outer_tile`).

A *factor* is what A and B are multiplied as: their arithmetic dtype, or bfloat16 itself where the processor adds its
products in pairs and the caller's card allows for zeros in place of subnormals (`paired`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from flagops.backends.numba import jit, parallel, pointer, strides, threads

from ._amx import DEPTH, GRID, TILES, grid_width, restore_tiles, rows_of_tiles, shape_tiles, tile_product
from ._blocks import Block, alive, at, clear, pack, round_up, scratch, shifted, turn, unpack_sum, zip_rows
from ._ir import PAIRS, STORAGE
from ._tiles import (
    DOT_COLUMNS,
    DOT_ROW_COLUMNS,
    DOT_ROWS,
    DOT_WIDTH,
    OUTER_ROWS,
    OUTER_VECTORS,
    ROW_VECTORS,
    dot_row,
    dot_tile,
    outer_row,
    outer_tile,
)
from ._vectors import TAGS, lanes, size, wide

Axes = tuple[int, ...]
Steps = tuple[tuple[int, int], ...]  # of rows and of columns: of A, B and C
DOT_DEPTH, OUTER_DEPTH = 512, 256  # so deep a panel of B stays in L1
PAIR_DEPTH = 2048  # and so deep one of bfloat16, whose sums then take a tenth of the time to fold
STREAM_DEPTH = 16  # and so deep is B taken where it is read in place, row after row
_L2 = 512 << 10  # bytes that A may take of it
_FEW = 32  # rows that each task lays out in pairs anew
_MANY = 512  # rows of a task of squares at most: so often is B read that lies along K
_PANEL = 128 << 10  # elements of a factor that is laid out in pairs, for as many columns as rows
WIDTH = 384  # columns of a task at most
UNIT, _OUTER_UNIT = 24, 128  # which tiles of one row and of several both divide
SERIAL = 1 << 19  # multiplications that no second thread is worth
A, B, C, ROWS, PLACE, COUNT = range(6)  # what `row_blocks` says of a block


@jit
def row_blocks(bounds, first, last, most, a_row, b_group, c_row):
    """The rows from first to last, whose groups lie between `bounds`, in blocks of at most `most` of one group.

    Each: where it finds its A, B and C, how many rows it has, its number in its group, and how many that has.
    """
    groups = len(bounds) - 1
    counts = np.empty(groups, np.int64)
    for group in range(groups):
        counts[group] = max(0, -(-(min(bounds[group + 1], last) - max(bounds[group], first)) // most))
    blocks, at = np.empty((counts.sum(), 6), np.int64), 0
    for group in range(groups):
        start, stop = max(bounds[group], first), min(bounds[group + 1], last)
        for place in range(counts[group]):
            row = start + place * most
            where = (row - first) * a_row, group * b_group, (row - first) * c_row
            blocks[at] = *where, min(most, stop - row), place, counts[group]
            at += 1
    return blocks


@jit
def share(blocks, task, n, nc, terms):
    """The block and the first column of a task: all blocks of a group take `nc` columns of B while those are near."""
    parts = -(-n // nc)
    near = task // parts
    first, count = near - blocks[near * terms, PLACE], blocks[near * terms, COUNT]
    part, place = divmod(task - first * parts, count)
    return (first + place) * terms, part * nc


@jit
def dot_rows(x, w, rows, columns, depth, c, add):
    """As `dot_tile` for one row or any number; a last tile reads and writes whole ones."""
    if rows == 1:
        dot_row(x, w, columns, depth, c, add)
    else:
        for i in range(0, rows, DOT_ROWS):
            dot_tile(shifted(x, i, 0), w, columns, depth, shifted(c, i, 0), add)


@jit
def outer_rows(a, b, rows, depth, c, add):
    """As `outer_tile` for one row or any number; a last tile reads and writes whole ones."""
    if rows == 1:
        outer_row(a, b, depth, c, add)
    else:
        for i in range(0, rows, OUTER_ROWS):
            outer_tile(shifted(a, i, 0), b, depth, shifted(c, i, 0), add)


@jit
def _leave(tag, sums, rows, columns, column, c, offset, bias):
    """Round sums, and a bias where there is one, into columns from `column` on of the rows at an offset."""
    (base, row_step, column_step), (shift, shift_step) = c, bias
    target = base + (offset + column * column_step) * size(tag)
    if shift != 0:
        shift += column * shift_step * size(tag)
    unpack_sum(tag, sums, (rows, columns), target, (row_step, column_step), shift, shift_step)


@jit
def _dot(start, stop, tag, factor, out_tag, n, k, mc, nc, span, deepest, a, b, c, bias, blocks, terms):
    """Vectors along K. Few rows read B where it lies, unless its depth leaves part of a vector."""
    (a, am, ak), (b, _, bn), real, step = a, b, wide(tag), lanes(tag) * size(wide(tag)) // size(factor)
    memory, (x, panel) = scratch(factor, ((mc + DOT_ROWS, span), (DOT_ROW_COLUMNS, deepest)))
    apart, (sums,) = scratch(real, ((mc + DOT_ROWS, nc + DOT_WIDTH),))
    parts = -(-k // span)
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, terms)
        rows, columns = min(mc, blocks[block, ROWS]), min(nc, n - column)
        across = DOT_ROW_COLUMNS if rows == 1 else DOT_COLUMNS
        padded_rows = round_up(rows, DOT_ROWS) if rows > 1 else 1
        for part in range(parts * terms):
            term, first = block + part // parts, part % parts * span
            depth = min(span, k - first)
            left = a + (blocks[term, A] + first * ak) * size(tag)
            pack(tag, left, (am, ak), (rows, depth), x, (padded_rows, round_up(depth, step)))
            right = Block(tag, b + (blocks[term, B] + column * bn + first) * size(tag), bn)
            for j in range(0, columns, across):
                valid = min(across, columns - j)
                for begin in range(0, depth, deepest):
                    deep = min(deepest, depth - begin)
                    w, values, into = shifted(right, j, begin), shifted(x, 0, begin), shifted(sums, 0, j)
                    add = part + begin > 0
                    if rows <= DOT_ROWS and deep % step == 0:
                        dot_rows(values, w, rows, valid, deep, into, add)
                    else:
                        padded = round_up(deep, step)
                        pack(tag, w.base, (bn, 1), (valid, deep), panel, (valid, padded))
                        dot_rows(values, panel, rows, valid, padded, into, add)
        _leave(out_tag, sums, rows, columns, column, c, blocks[block, C], bias)
    return alive(memory, apart)


@jit
def _outer(start, stop, tag, factor, out_tag, n, k, mc, nc, span, deepest, a, b, c, bias, blocks, terms):
    """Vectors along N. Few rows read B where it lies, unless its rows pair, its columns are apart or a tile is cut."""
    (a, am, ak), (b, bk, bn), real = a, b, wide(tag)
    most, pair = ROW_VECTORS * lanes(tag), size(real) // size(factor)
    memory, (x, panel) = scratch(factor, ((mc + OUTER_ROWS, span), (span, most)))
    apart, (sums,) = scratch(real, ((mc + OUTER_ROWS, nc + most),))
    parts = -(-k // span)
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, terms)
        rows, columns = min(mc, blocks[block, ROWS]), min(nc, n - column)
        across = most if rows == 1 else OUTER_VECTORS * lanes(tag)
        dense = Block(factor, panel.base, across)
        padded_rows = round_up(rows, OUTER_ROWS) if rows > 1 else 1
        if k == 0:
            clear(real, sums.base, rows * sums.row)
        for part in range(parts * terms):
            term, first = block + part // parts, part % parts * span
            depth = min(span, k - first)
            left = a + (blocks[term, A] + first * ak) * size(tag)
            deep = round_up(depth, pair)
            pack(tag, left, (am, ak), (rows, depth), x, (padded_rows, deep))
            right = b + (blocks[term, B] + column * bn + first * bk) * size(tag)
            for j in range(0, columns, across):
                valid = min(across, columns - j)
                w, into, add = right + j * bn * size(tag), shifted(sums, 0, j), part > 0
                if pair == 2:
                    zip_rows(w, (bk, bn), (depth, valid), dense)
                    outer_rows(x, Block(factor, panel.base, 2 * across), rows, deep, into, add)
                elif rows <= OUTER_ROWS and bn == 1 and valid == across:
                    outer_rows(x, Block(tag, w, bk), rows, depth, into, add)
                else:
                    pack(tag, w, (bk, bn), (depth, valid), dense, (depth, across))
                    outer_rows(x, dense, rows, depth, into, add)
        _leave(out_tag, sums, rows, columns, column, c, blocks[block, C], bias)
    return alive(memory, apart)


@jit
def _grids(start, stop, tag, factor, out_tag, n, k, mc, nc, span, turned, a, b, c, bias, blocks, terms, laid):
    """Squares of sums. The factor that lies along K is read where it lies, B if `turned`, whose product is C^T; of the
    other, panels are laid out in pairs, or have been where `laid` is an address."""
    (a, am, ak), (b, bk, bn), real = a, b, wide(tag)
    down, along = (nc, mc) if turned else (mc, nc)
    width = grid_width(along)
    high, across = round_up(down, GRID), round_up(along, width)
    memory, (panel, right) = scratch(tag, ((GRID, span + DEPTH), (across, span)))
    apart, (sums, flat, shape) = scratch(real, ((high, across), (mc, nc), (1, 16)))
    parts = -(-k // span)
    shape_tiles(shape.base, width)
    for task in range(start, stop):
        block, column = share(blocks, task, n, nc, terms)
        rows, columns = min(mc, blocks[block, ROWS]), min(nc, n - column)
        if k == 0:
            clear(real, sums.base, high * across)
        for part in range(parts * terms):
            term, first = block + part // parts, part % parts * span
            depth = min(span, k - first)
            left = a + (blocks[term, A] + first * ak) * size(tag), (am, ak), rows
            other = b + (blocks[term, B] + column * bn + first * bk) * size(tag), (bn, bk), columns
            (w, w_steps, down), (x, x_steps, along) = (other, left) if turned else (left, other)
            near = right
            if laid != 0:
                near = Block(tag, at(Block(tag, laid, span), (term * parts + part % parts) * across, 0), span)
            else:
                _lay(tag, x, x_steps, depth, along, width, near)
            for i in range(0, down, GRID):
                source, held = w + i * w_steps[0] * size(tag), (min(GRID, down - i), depth)
                line = rows_of_tiles(source, w_steps, held, tag, panel, along > 2 * GRID)
                for j in range(0, along, GRID):
                    pairs = Block(tag, at(near, j, 0), 2 * width)
                    tile_product(line, pairs, along - j, round_up(depth, DEPTH), shifted(sums, i, j), part > 0)
        if turned:
            turn(real, sums.base, (across, 1), (columns, rows), flat.base, (1, nc))
            _leave(out_tag, flat, rows, columns, column, c, blocks[block, C], bias)
        else:
            _leave(out_tag, sums, rows, columns, column, c, blocks[block, C], bias)
    restore_tiles(shape.base)
    return alive(memory, apart)


@jit
def _lay(tag, source, steps, depth, count, width, panels):
    """Columns, so many by so many, each in a panel of pairs with zeros below."""
    column, row = steps
    for j in range(0, count, width):
        panel = Block(tag, at(panels, j, 0), width)
        zip_rows(source + j * column * size(tag), (row, column), (depth, min(width, count - j)), panel)
        for r in range(round_up(depth, 2), round_up(depth, DEPTH), 2):
            clear(tag, at(panel, r, 0), 2 * width)


@jit
def lay_all(start, stop, tag, k, mc, span, a, blocks, laid):
    """Panels in pairs of all rows of A, those of a block and a part of the depth behind the last's."""
    a, am, ak = a
    width, parts = grid_width(mc), -(-k // span)
    across = round_up(mc, width)
    for task in range(start, stop):
        block, part = divmod(task, parts)
        first = part * span
        source = a + (blocks[block, A] + first * ak) * size(tag)
        panels = Block(tag, at(Block(tag, laid, span), task * across, 0), span)
        _lay(tag, source, (am, ak), min(span, k - first), min(mc, blocks[block, ROWS]), width, panels)


class View(NamedTuple):
    """Memory seen as an array of two or more axes: address, shape, strides in elements. Holds no reference to it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def T(self) -> View:
        shape, steps = self.shape, self.strides
        return View(self.address, (*shape[:-2], shape[-1], shape[-2]), (*steps[:-2], steps[-1], steps[-2]))


def view(x: Any) -> View:
    """A torch tensor or NumPy array as it lies; a vector is one row."""
    shape, steps = tuple(x.shape), strides(x)
    return View(pointer(x), shape, steps) if len(shape) > 1 else View(pointer(x), (1, *shape), (0, *steps))


def empty(like: Any, shape: tuple[int, ...]) -> Any:
    """An array of the same library and dtype."""
    return like.new_empty(shape) if hasattr(like, "new_empty") else np.empty(shape, like.dtype)


_ONE_BITS = {"float16": 0x3C00, "bfloat16": 0x3F80, "float32": 0x3F800000, "float64": 0x3FF0000000000000}
_ONES = {name: np.array([bits], np.uint64) for name, bits in _ONE_BITS.items()}


def ones(name: str, count: int) -> View:
    """A row of ones that takes no memory."""
    return View(pointer(_ONES[name]), (1, count), (0, 0))


def contract(
    name: str, a: View, b: View, out: View, bias: tuple[int, int] = (0, 0), result: str | None = None,
    paired: bool = False,
) -> None:  # fmt: skip
    """out[.., m, n] = sum a[.., m, k] b[.., k, n] + bias[n], over k and over leading axes that `out` lacks.

    Leading axes broadcast; `bias` is an address, 0 for none, and a stride. a and b are of the dtype called `name`, out
    and bias of `result` if given: that or the accumulator's. One rounding. paired: where the processor can.
    """
    several = math.prod(a.shape[:-2]) * math.prod(b.shape[:-2]) > 64  # whose tables are too long to keep
    arrange = _arranged.__wrapped__ if several else _arranged
    found = arrange(
        name, result or name, paired, a.shape, a.strides, b.shape, b.strides, out.shape, out.strides, threads()
    )
    if found:
        shared, steps, terms = found
        _multiply(shared, steps, terms, a, b, out, bias)


@lru_cache(maxsize=1024)
def _arranged(
    name: str,
    result: str,
    paired: bool,
    a: Axes,
    a_steps: Axes,
    b: Axes,
    b_steps: Axes,
    c: Axes,
    c_steps: Axes,
    team: int,
) -> Any:
    """What `contract` hands to its loops, but for addresses; None where there is nothing to do."""
    (m, k), n = a[-2:], b[-1]
    (am, ak), (bk, bn), (cm, cn) = a_steps[-2:], b_steps[-2:], c_steps[-2:]
    batch: list[tuple[int, ...]] = []
    summed: list[tuple[int, ...]] = []
    for axis in range(3, max(len(a), len(b)) + 1):  # from the innermost: into m, n or k where strides allow
        sides = ((a, a_steps), (b, b_steps), (c, c_steps))
        (extent_a, sa), (extent_b, sb), (extent_c, sc) = (_axis(*side, axis) for side in sides)
        extent = extent_b if extent_a == 1 else extent_a
        if extent == 1:
            continue
        if extent_c == 1:
            if k == 1 or (sa == ak * k and sb == bk * k):
                ak, bk, k = (sa, sb, extent) if k == 1 else (ak, bk, k * extent)
            else:
                summed.insert(0, (extent, sa, sb, 0, 0, 0, 0))
        elif sb == 0 and (m == 1 or (sa == am * m and sc == cm * m)):
            am, cm, m = (sa, sc, extent) if m == 1 else (am, cm, m * extent)
        else:
            batch.insert(0, (extent, sa, sb, sc, 0, 0, 0))
    groups, terms = (math.prod(axis[0] for axis in axes) for axes in (batch, summed))
    if terms == 0:
        k, terms, summed = 0, 1, []
    if not (m and n and groups):
        return None

    def blocks(most: int) -> Any:
        count = -(-m // most)
        return _offsets([*batch, (count, most * am, 0, most * cm, -most, 1, 0), *summed], (0, 0, 0, m, 0, count))

    shared = _shared(name, result, paired, m, n, k, m * groups * terms, (bk, bn), blocks, terms, team)
    return shared, ((am, ak), (bk, bn), (cm, cn)), terms


def contract_groups(name: str, a: View, b: View, out: View, bounds: Any, result: str | None = None) -> None:
    """out[i] = a[i] b[g] for the rows i of each group g, from bounds[g] to bounds[g + 1]; paired and rounded as
    `contract` can."""
    (m, k), n = a.shape, b.shape[-1]
    (am, ak), (step, bk, bn), (cm, cn) = a.strides, b.strides, out.strides

    def blocks(most: int) -> Any:
        return row_blocks(bounds, 0, m, most, am, step, cm)

    most = min(m, _most(bounds))
    if most and n:
        shared = _shared(name, result or name, True, most, n, k, m, (bk, bn), blocks, 1, threads())
        _multiply(shared, ((am, ak), (bk, bn), (cm, cn)), 1, a, b, out, (0, 0))


def _multiply(shared: Any, steps: Steps, terms: int, a: View, b: View, out: View, bias: tuple[int, int]) -> None:
    kernel, tasks, minimum, sizes, table = shared
    operands = [(x.address, *own) for x, own in zip((a, b, out), steps, strict=True)]
    if kernel is not _grids:
        parallel(kernel, tasks, *sizes, *operands, bias, table, terms, minimum=minimum)
        return
    tag, _, _, n, k, mc, nc, span, turned = sizes
    laid = None
    if turned and mc > _FEW and n > 2 * nc:
        work = len(table) * -(-k // span)
        laid = np.empty(work * round_up.py_func(mc, GRID) * span, np.uint16)
        parallel(lay_all, work, tag, k, mc, span, operands[0], table, pointer(laid), minimum=minimum)
    place = 0 if laid is None else pointer(laid)
    parallel(kernel, tasks, *sizes, *operands, bias, table, terms, place, minimum=minimum)


@jit
def _most(bounds):
    """Rows of the largest group."""
    most = 0
    for group in range(len(bounds) - 1):
        most = max(most, bounds[group + 1] - bounds[group])
    return most


def _shared(
    name: str, result: str, paired: bool, m: int, n: int, k: int, rows: int, steps: tuple[int, int],
    blocks: Callable[[int], Any], terms: int, team: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Products of at most m rows each, `rows` together, shared out to the loops that suit the strides of B.

    `blocks` cuts them into blocks of at most so many rows, as `row_blocks` does.
    """
    paired = paired and PAIRS and name == "bfloat16"
    real = STORAGE[name].arithmetic
    factor, width, deepest = (TAGS[name], 2, PAIR_DEPTH) if paired else (TAGS[real.name], real.bitwidth // 8, DOT_DEPTH)
    bk, bn = steps
    along = bk == 1 and (bn != 1 or n == 1)
    if paired and TILES:
        kernel, unit, mc, deepest = _grids, GRID, min(m, _MANY), along  # in place of a depth, which factor is turned
        across = round_up.py_func(mc, GRID) if deepest else WIDTH
        span = max(DEPTH, min(round_up.py_func(k, DEPTH), _PANEL // across // DEPTH * DEPTH))
    elif k and along:  # of no depth `_outer` makes zeros
        kernel, unit, mc = _dot, UNIT, min(m, 128)
        span = min(max(_L2 // (mc * width * deepest), 1), max(-(-k // deepest), 1)) * deepest
    else:
        kernel, unit, mc = _outer, _OUTER_UNIT, min(m, 192)
        span = STREAM_DEPTH if m <= OUTER_ROWS and not paired else OUTER_DEPTH
    table = blocks(mc)
    count = team if rows * n * max(k, 1) > SERIAL else 1
    cut = len(table) // terms
    nc = task_columns(n, cut, count, unit)
    tasks = cut * -(-n // nc)
    sizes = TAGS[name], factor, TAGS[result], n, k, mc, nc, span, deepest
    return kernel, tasks, 1 if count > 1 else tasks, sizes, table


def task_columns(n: int, blocks: int, team: int, unit: int) -> int:
    """How many columns a task has, whole units: few enough that each of a team's threads has four tasks."""
    return min(WIDTH, max(unit, -(-n * blocks // (4 * team * unit)) * unit))


def _axis(shape: Axes, steps: Axes, axis: int) -> tuple[int, int]:
    """Extent and stride of an axis counted from the end; 0 steps where it is broadcast."""
    if axis > len(shape) or shape[-axis] == 1:
        return 1, 0
    return shape[-axis], steps[-axis]


def _offsets(axes: list[tuple[int, ...]], origin: tuple[int, ...] = (0, 0, 0)) -> Any:
    """Where each product of a batch finds its operands: `origin` plus its steps along the axes."""
    result = np.array([origin], np.int64)
    for extent, *steps in axes:
        if extent != 1:
            result = (result[:, None] + np.multiply.outer(np.arange(extent), steps)).reshape(-1, len(origin))
    return result
