"""Memory of numba kernels: blocks of it, scratch to work in, rows on three axes, and copies between them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from flagops.backends.numba import jit, pointer, strides

from .._rows import rows, spread
from . import _ir
from ._ir import Kind, i64, lanes_of, storage
from ._vectors import FLOAT32, LANES, Vector, lanes, load, size, store, transpose, vload, vsplat, vstore, wide

_LINE = 64  # bytes of a line of the cache
_BITS = np.uint16(0)


class Block(NamedTuple):
    """Rows of elements of a tag: where the first lies, and from one to the next in elements.

    A vector of any stride is rows of one element.
    """

    tag: Any
    base: Any
    row: Any


def _index(builder, block, i, j):
    """Of an element, counted from a block's beginning."""
    return builder.add(builder.mul(i, builder.extract_value(block, 2)), j)


def _address(builder, tag, arguments):
    offset = builder.mul(_index(builder, *arguments), i64(storage(tag).size))
    return builder.add(builder.extract_value(arguments[0], 1), offset)


@intrinsic
def at(typingctx, block, i, j):
    """The address of an element."""

    def generate(context, builder, signature, arguments):
        return _address(builder, block[0], arguments)

    return types.int64(block, types.int64, types.int64), generate


@intrinsic
def shifted(typingctx, block, i, j):
    """The block whose first element is element [i, j] of this one."""

    def generate(context, builder, signature, arguments):
        return builder.insert_value(arguments[0], _address(builder, block[0], arguments), 1)

    return block(block, types.int64, types.int64), generate


def _accessor(lanes: bool, name: str, about: str, put: bool) -> Any:
    """A word that reads or writes the element [i, j] of a block, or the vector that begins there."""

    def generator(block):
        tag, element = block[0], storage(block[0]).arithmetic

        def generate(context, builder, signature, arguments):
            base, index = builder.extract_value(arguments[0], 1), _index(builder, *arguments[:3])
            if put:
                _ir.store(builder, tag, arguments[3], base, index)
                return context.get_dummy_value()
            return _ir.load(builder, tag, base, index, lanes_of(element) if lanes else 0)

        kind = Vector(element) if lanes else element
        i = types.int64
        return (types.none(block, i, i, kind) if put else kind(block, i, i)), generate

    reads = lambda typingctx, block, i, j: generator(block)  # noqa: E731
    writes = lambda typingctx, block, i, j, value: generator(block)  # noqa: E731
    word: Any = writes if put else reads
    word.__name__, word.__doc__ = name, about
    return intrinsic(word)


get = _accessor(False, "get", "The element [i, j] of a block.", False)
put = _accessor(False, "put", "Round a scalar into the element [i, j] of a block.", True)
vget = _accessor(True, "vget", "The vector that begins at element [i, j] of a block.", False)
vput = _accessor(True, "vput", "Round a vector into a block from element [i, j] on.", True)


def block_of(tag: Kind) -> Kind:
    """The numba type of a Block."""
    return types.BaseTuple.from_types((tag, types.int64, types.int64), Block)  # type: ignore[attr-defined]


def _cut(context, builder, tag, shapes, values):
    """Where blocks of so many rows and leading dimensions begin, in bytes, each on a line; and behind the last."""
    offsets = [i64(0)]
    for kind, shape in zip(shapes, cgutils.unpack_tuple(builder, values), strict=True):
        count, row = (
            context.cast(builder, value, given, types.int64)
            for value, given in zip(cgutils.unpack_tuple(builder, shape), kind, strict=True)
        )
        used = builder.mul(builder.mul(count, row), i64(storage(tag).size))
        whole = builder.and_(builder.add(used, i64(_LINE - 1)), i64(-_LINE))
        offsets.append(builder.add(offsets[-1], whole))
    return offsets


@intrinsic
def _room(typingctx, tag, shapes):
    def generate(context, builder, signature, arguments):
        return _cut(context, builder, tag, shapes, arguments[1])[-1]

    return types.int64(tag, shapes), generate


@intrinsic
def _blocks(typingctx, tag, shapes, base):
    block = block_of(tag)
    result = types.UniTuple(block, len(shapes))  # type: ignore[attr-defined]

    def generate(context, builder, signature, arguments):
        value, sizes, base = arguments
        found = []
        for kind, shape, offset in zip(
            shapes,
            cgutils.unpack_tuple(builder, sizes),
            _cut(context, builder, tag, shapes, sizes),
            strict=False,
        ):
            row = context.cast(builder, builder.extract_value(shape, 1), kind[1], types.int64)
            found.append(context.make_tuple(builder, block, (value, builder.add(base, offset), row)))
        return context.make_tuple(builder, result, found)

    return result(tag, shapes, types.int64), generate


@jit
def _aligned(memory):
    return (np.int64(memory.ctypes.data) + _LINE - 1) & -_LINE


@jit
def scratch(tag, shapes):
    """Memory, and blocks of it, each of so many rows and elements from one to the next, that begin on a line.

    numba frees an array after the last line that names it, which no address does: `return alive(memory)` at the end.
    """
    memory = np.empty(_room(tag, shapes) + _LINE, np.uint8)
    return memory, _blocks(tag, shapes, _aligned(memory))


@jit
def cleared(tag, shapes):
    """As `scratch`, zeros."""
    memory = np.zeros(_room(tag, shapes) + _LINE, np.uint8)
    return memory, _blocks(tag, shapes, _aligned(memory))


@jit
def alive(*memories):
    """What a kernel returns so that its scratch, once or more often taken, lives until then."""
    return memories[0][0]


def laid(x: Any) -> tuple[int, ...]:
    """Address and strides of an array."""
    return (pointer(x), *strides(x))


@jit
def round_up(count, step):
    """The least multiple of a step that is no less."""
    return -(-count // step) * step


def walk(lead: Any, tails: tuple[int, ...], *arrays: Any) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Blocks of three axes that cover leading axes, to which those of the arrays broadcast: their sizes; and of each
    array its address, its strides along the three, and those of its last axes, as many as `tails` says; 0 of None."""
    layouts = _layouts(tuple(lead), tails, *[None if x is None else (tuple(x.shape), strides(x)) for x in arrays])
    for sizes, own in layouts:
        yield (
            sizes,
            [
                (0 if x is None else pointer(x) + offset * x.itemsize, *steps)
                for x, (offset, *steps) in zip(arrays, own, strict=True)
            ],
        )


@lru_cache(maxsize=1024)
def _layouts(lead: tuple[int, ...], tails: tuple[int, ...], *arrays: Any) -> list[Any]:
    """As `walk`, from shapes and strides, with offsets for addresses."""
    leading, last = [], []
    for tail, array in zip(tails, arrays, strict=True):
        shape, steps = array or ((1,) * tail, (0,) * tail)
        leading.append(spread(shape, steps, len(lead), tail))
        last.append(steps[len(steps) - tail :])
    return [(sizes, list(zip(offsets, own, last, strict=True))) for offsets, sizes, own in rows(lead, *leading)]


@jit
def place(task, sizes, steps):
    """Elements from the first of the rows on three axes to that of a task."""
    if task < sizes[2]:
        return task * steps[2]
    rest, k = divmod(task, sizes[2])
    i, j = divmod(rest, sizes[1])
    return i * steps[0] + j * steps[1] + k * steps[2]


@jit
def of_task(tag, x, sizes, task):
    """What a task has of an array of `walk`: rows of its last two axes, or the elements of its last as rows of one."""
    return Block(tag, x[0] + place(task, sizes, x[1]) * size(tag), x[2][0])


@jit
def copy(source, target, count):
    """The first elements of the rows of a block into those of another of the same tag."""
    step = lanes(source.tag)
    whole = count - count % step if source.row == 1 and target.row == 1 else 0
    for i in range(0, whole, step):
        vput(target, i, 0, vget(source, i, 0))
    for i in range(whole, count):
        put(target, i, 0, get(source, i, 0))


@jit
def clear(tag, target, count):
    """Zeros from an address on."""
    item, step = size(tag), lanes(tag)
    zeros, whole = vsplat(wide(tag)), count - count % step
    for i in range(0, whole, step):
        vstore(tag, target + i * item, zeros)
    for i in range(whole, count):
        store(tag, target + i * item, wide(tag))


def _mover(several: bool, name: str, about: str) -> Any:
    """A word that converts an element, or a vector of them, from an address to another; of one tag its bits."""

    def typed(typingctx, tag, source, goal, target):
        lanes = lanes_of(storage(tag).arithmetic) if several else 0

        def generate(context, builder, signature, arguments):
            _, source, _, target = arguments
            if tag == goal:
                kind = storage(tag).memory
                _ir.write(builder, _ir.read(builder, ir.VectorType(kind, lanes) if lanes else kind, source), target)
            else:
                _ir.store(builder, goal, _ir.load(builder, tag, source, lanes=lanes), target)
            return context.get_dummy_value()

        return types.none(tag, types.int64, goal, types.int64), generate

    typed.__name__, typed.__doc__ = name, about
    return intrinsic(typed)


_move = _mover(False, "_move", "An element of a tag from an address, to an address as one of another.")
_vmove = _mover(True, "_vmove", "As `_move`, a vector.")


@jit
def turn(real, source, steps, shape, target, target_steps):
    """Copy a block of any strides, where it is transposed by tiles; the last ones overlap."""
    (row, column), (rows, columns), (target_row, target_column) = steps, shape, target_steps
    count = lanes(real)
    here, there = Block(real, source, row), Block(real, target, target_column)
    if column == 1 and target_row == 1 and min(rows, columns) >= count:
        for i in range(0, rows, count):
            r = min(i, rows - count)
            for j in range(0, columns, count):
                c = min(j, columns - count)
                transpose(real, at(here, r, c), row, real, at(there, c, r), target_column)
    else:
        for r in range(rows):
            for c in range(columns):
                put(there, c, r * target_row, get(here, r, c * column))


@intrinsic
def _vzip(typingctx, first, second, target):
    """As many numbers of 16 bits from two addresses as a vector has lanes, alternating, to a third."""

    def generate(context, builder, signature, arguments):
        first, second, target = arguments
        one, other = (_ir.read(builder, ir.VectorType(_ir.i16, _ir.LANES), row) for row in (first, second))
        order = [lane + side * _ir.LANES for lane in range(_ir.LANES) for side in (0, 1)]
        _ir.write(builder, _ir.shuffle(builder, one, other, order), target)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i), generate


@jit
def zip_rows(source, steps, shape, target):
    """Rows of 16 bits two by two, each two as one row of a block that holds them column by column; zero beyond them."""
    (row, column), (count, columns) = steps, shape
    done = 0
    if row == 1 and column % 2 == 0:  # what is to be neighbours is so already
        done = count - count % 2
        if columns < target.row:
            for r in range(0, done, 2):
                clear(target.tag, at(target, r, 0), 2 * target.row)
        turn(FLOAT32, source, (column // 2, 1), (columns, done // 2), target.base, (1, target.row))
    for r in range(done, count, 2):
        low, high, goal = source + r * row * 2, source + (r + 1) * row * 2, at(target, r, 0)
        second = r + 1 < count
        whole = columns - columns % LANES if column == 1 and second else 0
        for c in range(0, whole, LANES):
            _vzip(low + 2 * c, high + 2 * c, goal + 4 * c)
        for c in range(whole, target.row):
            inside, step = c < columns, c * column * 2
            store(_BITS, goal + 4 * c, load(_BITS, low + step) if inside else _BITS)
            store(_BITS, goal + 4 * c + 2, load(_BITS, high + step) if inside and second else _BITS)


@jit
def pack(tag, source, steps, shape, target, padded):
    """Widen rows and columns of any strides into a block, zero beyond them up to the shape `padded`."""
    (row, column), (count, columns), (padded_rows, padded_columns) = steps, shape, padded
    item, unit, step = size(tag), size(target.tag), lanes(tag)
    if column == 1:
        whole = columns - columns % step
        for r in range(count):
            origin, goal = source + r * row * item, at(target, r, 0)
            for c in range(0, whole, step):
                _vmove(tag, origin + c * item, target.tag, goal + c * unit)
            for c in range(whole, columns):
                _move(tag, origin + c * item, target.tag, goal + c * unit)
    elif row == 1 and min(count, columns) >= step:  # columns lie as rows: by tiles, of which the last ones overlap
        for c in range(0, columns, step):
            j = min(c, columns - step)
            for r in range(0, count, step):
                i = min(r, count - step)
                transpose(tag, source + (i + j * column) * item, column, target.tag, at(target, i, j), target.row)
    else:
        for c in range(columns):
            for r in range(count):
                _move(tag, source + (r * row + c * column) * item, target.tag, at(target, r, c))
    if padded_columns > columns:
        for r in range(count):
            clear(target.tag, at(target, r, columns), padded_columns - columns)
    for r in range(count, padded_rows):
        clear(target.tag, at(target, r, 0), padded_columns)


@jit
def unpack(tag, source, shape, target, steps):
    """Round a block into rows and columns of any strides."""
    unpack_sum(tag, source, shape, target, steps, 0, 0)


@jit
def unpack_sum(tag, source, shape, target, steps, bias, bias_step):
    """As `unpack`, with a bias added to each row where its address is not 0."""
    (rows, columns), (row, column) = shape, steps
    item, unit, step = size(tag), size(source.tag), lanes(tag)
    whole = columns - columns % step if column == 1 and (bias == 0 or bias_step == 1) else 0
    for r in range(rows):
        origin, goal = at(source, r, 0), target + r * row * item
        for c in range(0, whole, step):
            value = vload(source.tag, origin + c * unit)
            if bias != 0:
                value += vload(tag, bias + c * item)
            vstore(tag, goal + c * item, value)
        for c in range(whole, columns):
            scalar = load(source.tag, origin + c * unit)
            if bias != 0:
                scalar += load(tag, bias + c * bias_step * item)
            store(tag, goal + c * column * item, scalar)
