"""One element of a result from one element of each operand: the loop over memory, whatever strides and dtypes.

Bound by memory: each operand is read once. `_drive` walks pieces of rows that stay in the first cache, brings operands
to the dtype of the computation there where they are not, and calls the routine that computes them.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined"
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides

from .._rows import merged
from . import _ir
from ._blocks import alive, at, scratch
from ._ir import STORAGE, TAGS, storage
from ._routines import WIDTH, call, mover, routine, vread
from ._vectors import BYTE, load, vstore

SPAN = 2048  # elements of a piece
SHORT = 128  # elements of a row below which a piece has several rows
_GRAIN = 1 << 15  # elements worth a thread
_TILE = 32  # rows of a source that are moved together
_LONG = np.int64(0)
_OUTER = 5  # where the number of a plan's outer axes stands, and their sizes behind it
_SIZE, _HOW, _STEP = 1, 2, 3  # of an operand, behind the routine that moves it
IN_PLACE, REPEATED, APART = 0, 1, 2
"""How a routine gets an operand: where it is; one element, brought once; or each piece brought."""


class Operand(NamedTuple):
    """An array, and the dtype in which the routine has it."""

    array: Any
    tag: str


def elementwise(body: int, out: Operand, operands: Sequence[Operand], more: Any, work: float = 1.0) -> None:
    """Compute `out` from up to three operands that broadcast to it.

    more: an array of what else the routine reads. work: how much an element costs, of an addition.
    """
    slots = (out, *operands)
    layouts = [(tuple(x.array.shape), strides(x.array), dtype_name(x.array), x.tag) for x in slots]
    plan, tasks, elements = _planned(tuple(out.array.shape), *layouts)
    places = [pointer(x.array) for x in slots] + [0] * (4 - len(slots))
    least = max(1, int(_GRAIN / work) // elements) if tasks else 1
    parallel(_drive, tasks, pointer(plan), body, pointer(more), *places, minimum=least)


def transfer(out: Any, x: Any, steps: tuple[int, ...] | None = None, first: int = 0) -> None:
    """The elements of an array that broadcasts to `out`, brought to its dtype.

    steps, first: another way through it, in elements, from one that lies so many behind its first.
    """
    slots = [
        (tuple(a.shape), own, dtype_name(a), dtype_name(out))
        for a, own in ((out, strides(out)), (x, strides(x) if steps is None else steps))
    ]
    move, begin = mover(dtype_name(x), dtype_name(out)), pointer(x) + first * x.itemsize
    turned = _turned(tuple(out.shape), *slots)
    if turned is not None:
        gather = mover(dtype_name(x), dtype_name(x))
        least = max(1, _GRAIN // (int(turned[2]) * _TILE))
        parallel(_turn, turned[0] * turned[1], turned, x.itemsize, gather, move, pointer(out), begin, minimum=least)
        return
    plan, tasks, elements = _planned(tuple(out.shape), *slots)
    least = max(1, _GRAIN // elements)
    parallel(_carry, tasks, pointer(plan), move, pointer(out), begin, minimum=least)


@lru_cache(maxsize=4096)
def _turned(shape: tuple[int, ...], *layouts: Any) -> Any:
    """What `_turn` reads, where source and result lie closest along two different axes; else None."""
    if 0 in shape:
        return None
    sizes, (goal, origin) = merged(shape, [_bytes(len(shape), *layout[:3]) for layout in layouts])
    size = STORAGE[layouts[1][2]].size
    close = [i for i, step in enumerate(origin[:-1]) if abs(step) == size]
    if not close or abs(origin[-1]) <= size or min(sizes[-1], sizes[close[0]]) < _TILE:
        return None
    across = close[0]
    outer = [i for i in range(len(sizes) - 1) if i != across]
    plan = [math.prod(sizes[i] for i in outer), -(-sizes[across] // _TILE), sizes[-1], sizes[across], len(outer)]
    plan += [goal[-1], origin[-1], goal[across], origin[across]]
    for i in outer:
        plan += [sizes[i], goal[i], origin[i]]
    return np.array(plan, np.int64)


@jit
def _turn(start, stop, plan, size, gather, move, out, a):
    """Squares of a few rows and columns, by way of the first cache, so that lines are read and written whole."""
    n, height = plan[2], plan[3]
    memory, (square,) = scratch(BYTE, ((1, 8 * _TILE * _TILE),))
    room = at(square, 0, 0)
    for task in range(start, stop):
        row, tile = divmod(task, plan[1])
        first = tile * _TILE
        goal, place = out + first * plan[7], a + first * plan[8]
        for axis in range(plan[4]):
            i = row % plan[9 + 3 * axis]
            row //= plan[9 + 3 * axis]
            goal += i * plan[10 + 3 * axis]
            place += i * plan[11 + 3 * axis]
        rows = min(_TILE, height - first)
        for j in range(0, n, _TILE):
            columns = min(_TILE, n - j)
            for c in range(columns):
                call(gather, rows, room + c * size * _TILE, place + (j + c) * plan[6], size, plan[8], 0)
            for r in range(rows):
                call(move, columns, goal + r * plan[7] + j * plan[5], room + r * size, plan[5], size * _TILE, 0)
    return alive(memory)


@lru_cache(maxsize=4096)
def _planned(shape: tuple[int, ...], *layouts: Any) -> tuple[Any, int, int]:
    """What `_drive` reads, how many tasks it has, and the elements of one."""
    if 0 in shape:
        return np.zeros(1, np.int64), 0, 1
    sizes, steps = merged(shape, [_bytes(len(shape), *layout[:3]) for layout in layouts])
    *outer, n = sizes
    rows = math.prod(outer)
    group = 1 if n >= SHORT or rows == 1 else SPAN // n
    plan = [rows, n, min(n, SPAN), group, len(layouts), len(outer), *reversed(outer)]
    for k, ((_, _, dtype, tag), own) in enumerate(zip(layouts, steps, strict=True)):
        size = STORAGE[tag].size
        whole = all(step == size * math.prod(sizes[i + 1 :]) for i, step in enumerate(own))
        lies = dtype == tag and own[-1] == size and (group == 1 or whole)
        how = IN_PLACE if lies else REPEATED if k and not any(own) else APART
        pair = (tag, dtype) if k == 0 else (dtype, tag)
        plan += [mover(*pair), size, how, own[-1], *reversed(own[:-1])]
    each = min(n, SPAN) if group == 1 else group * n
    tasks = rows * -(-n // SPAN) if group == 1 else -(-rows // group)
    return np.array(plan, np.int64), tasks, each


def _bytes(axes: int, shape: tuple[int, ...], steps: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Bytes from one element to the next along each axis of the result, 0 where the operand is repeated."""
    size = STORAGE[dtype].size
    own = (0 if n == 1 else step * size for n, step in zip(shape, steps, strict=True))
    return (*(0,) * (axes - len(shape)), *own)


@jit
def _field(plan, i):
    return load(_LONG, plan + 8 * i)


@jit
def _piece(plan, task):
    """The first row of a task, how many it has, and which elements of each."""
    rows, n, span, group = _field(plan, 0), _field(plan, 1), _field(plan, 2), _field(plan, 3)
    if group > 1:
        return task * group, min(group, rows - task * group), 0, n
    pieces = -(-n // span)
    first = task % pieces * span
    return task // pieces, 1, first, min(span, n - first)


@jit
def _origin(plan, own, base, row, first):
    """The address of an operand's element: its row's number, and the one in the row."""
    place = base + first * _field(plan, own + _STEP)
    for axis in range(_field(plan, _OUTER)):
        size = _field(plan, _OUTER + 1 + axis)
        place += row % size * _field(plan, own + _STEP + 1 + axis)
        row //= size
    return place


@jit
def _repeat(plan, own, base, room):
    """Fill the room of an operand that is one element."""
    if own and _field(plan, own + _HOW) == REPEATED:
        call(_field(plan, own), SPAN + WIDTH, room, base, _field(plan, own + _SIZE), 0, 0)


@jit
def _brought(plan, own, base, row, count, first, width, room):
    """Where a piece's elements of an operand lie side by side: there, or in the room they are moved to."""
    if not own:
        return np.int64(0)
    how = _field(plan, own + _HOW)
    if how == IN_PLACE:
        return _origin(plan, own, base, row, first)
    if how == APART:
        size = _field(plan, own + _SIZE)
        for r in range(count):
            place = _origin(plan, own, base, row + r, first)
            call(_field(plan, own), width, room + r * width * size, place, size, _field(plan, own + _STEP), 0)
    return room


@jit
def _rest(plan, own, piece, done, left, spare):
    """The last few elements of a piece with as many behind them as the routine reads."""
    if not own:
        return piece
    size = _field(plan, own + _SIZE)
    if _field(plan, own + _HOW) != IN_PLACE:
        return piece + done * size
    call(_field(plan, own), left, spare, piece + done * size, size, size, 0)
    return spare


@jit
def _carry(start, stop, plan, move, out, a):
    fields = _STEP + 1 + _field(plan, _OUTER)
    own_out = _OUTER + 1 + _field(plan, _OUTER)
    own_a = own_out + fields
    steps = _field(plan, own_out + _STEP), _field(plan, own_a + _STEP)
    for task in range(start, stop):
        row, count, first, width = _piece(plan, task)
        for r in range(row, row + count):
            goal, place = _origin(plan, own_out, out, r, first), _origin(plan, own_a, a, r, first)
            call(move, width, goal, place, steps[0], steps[1], 0)


@jit
def _drive(start, stop, plan, body, more, out, a, b, c):
    slots = _field(plan, 4)
    fields = _STEP + 1 + _field(plan, _OUTER)
    own_out = _OUTER + 1 + _field(plan, _OUTER)
    own_a = own_out + fields if slots > 1 else 0  # where there is no such operand
    own_b = own_out + 2 * fields if slots > 2 else 0
    own_c = own_out + 3 * fields if slots > 3 else 0
    memory, (room, spare) = scratch(BYTE, ((4, 8 * (SPAN + WIDTH)), (4, 8 * WIDTH)))
    room_out, room_a, room_b, room_c = at(room, 0, 0), at(room, 1, 0), at(room, 2, 0), at(room, 3, 0)
    _repeat(plan, own_a, a, room_a)
    _repeat(plan, own_b, b, room_b)
    _repeat(plan, own_c, c, room_c)
    for task in range(start, stop):
        row, count, first, width = _piece(plan, task)
        pa = _brought(plan, own_a, a, row, count, first, width, room_a)
        pb = _brought(plan, own_b, b, row, count, first, width, room_b)
        pc = _brought(plan, own_c, c, row, count, first, width, room_c)
        in_place = _field(plan, own_out + _HOW) == IN_PLACE
        goal = _origin(plan, own_out, out, row, first) if in_place else room_out
        total = count * width
        whole = total - total % WIDTH
        if whole:
            call(body, whole, goal, pa, pb, pc, more)
        if whole < total:
            left, size = total - whole, _field(plan, own_out + _SIZE)
            pa = _rest(plan, own_a, pa, whole, left, at(spare, 1, 0))
            pb = _rest(plan, own_b, pb, whole, left, at(spare, 2, 0))
            pc = _rest(plan, own_c, pc, whole, left, at(spare, 3, 0))
            end = at(spare, 0, 0) if in_place else goal + whole * size
            call(body, left, end, pa, pb, pc, more)
            if in_place:
                call(_field(plan, own_out), left, goal + whole * size, end, size, size, 0)
        if not in_place:
            size, step = _field(plan, own_out + _SIZE), _field(plan, own_out + _STEP)
            for r in range(count):
                place = _origin(plan, own_out, out, row + r, first)
                call(_field(plan, own_out), width, place, goal + r * width * size, step, size, 0)
    return alive(memory)


@intrinsic
def parameters(typingctx, tag, address, count):
    """As many scalars of a tag, side by side, as the tuple `count` is long."""
    element = storage(tag).arithmetic

    def generate(context, builder, signature, arguments):
        values = [_ir.load(builder, tag, arguments[1], _ir.i64(i)) for i in range(len(count))]
        return context.make_tuple(builder, signature.return_type, values)

    result = types.UniTuple(element, len(count))  # type: ignore[attr-defined]
    return result(tag, types.int64, count), generate


def _unary(n, out, a, b, c, more):
    for i in range(0, n, WIDTH):
        vstore(OUT, out + i * OUT_SIZE, lane(vread(A, a + i * A_SIZE), *parameters(MORE, more, COUNT)))
    return 0


def _binary(n, out, a, b, c, more):
    for i in range(0, n, WIDTH):
        x, y = vread(A, a + i * A_SIZE), vread(B, b + i * B_SIZE)
        vstore(OUT, out + i * OUT_SIZE, lane(x, y, *parameters(MORE, more, COUNT)))
    return 0


def _ternary(n, out, a, b, c, more):
    for i in range(0, n, WIDTH):
        x, y, z = vread(A, a + i * A_SIZE), vread(B, b + i * B_SIZE), vread(C, c + i * C_SIZE)
        vstore(OUT, out + i * OUT_SIZE, lane(x, y, z, *parameters(MORE, more, COUNT)))
    return 0


_BODIES = _unary, _binary, _ternary


@cache
def lane_routine(lane: Any, out: str, tags: tuple[str, ...], more: str, count: int) -> int:
    """The routine of a lane for dtypes of its result, its operands and its `count` scalars."""
    words: dict[str, Any] = {"lane": lane, "MORE": TAGS[more], "COUNT": (0,) * count}
    for name, tag in zip(("OUT", "A", "B", "C"), (out, *tags), strict=False):
        words |= {name: TAGS[tag], f"{name}_SIZE": STORAGE[tag].size}
    return routine(_BODIES[len(tags) - 1], "_".join((lane.__name__, out, *tags, more)), **words)
