"""Elements picked and places written by index: bound by memory, and by how far apart indices lead.

Picking is shared out by index. Writing keeps the order of the indices for each place, whatever the number of threads: a
task has places of its own, some of the elements that one index moves or some of an only row, and sees all indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops.arrays import HALF, dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides, threads
from flagops.registry import kernel

from ._blocks import Block, alive, at, scratch
from ._elementwise import transfer
from ._indexed import (
    ACROSS,
    AMAX,
    AMIN,
    ASSIGN,
    COUNT,
    LIMIT,
    PROD,
    ROWS,
    SUM,
    Alarm,
    bits_of,
    combined,
    index_at,
    layout,
    place,
    planned,
)
from ._numbers import convert
from ._routines import call, mover
from ._vectors import TAGS, lanes, load, size, store, vload, vstore, wide

_GRAIN = 1 << 14  # elements worth a thread
_SPAN = 1 << 12  # elements of a task
_SEEN = 1 << 22  # indices that are worth a second look by another thread
_REDUCTIONS = {"assign": ASSIGN, "sum": SUM, "prod": PROD, "amax": AMAX, "amin": AMIN}


@kernel(deterministic=True, batch_invariant=True)
def gather(x: Any, index: Any, from_end: bool, out: Any) -> None:
    """Rows that lie close are moved whole."""
    count, lead = out.shape[-1], tuple(out.shape[:-1])
    if not count or 0 in lead:
        return
    plan, alarm = planned(x.shape[-1], count, lead, layout(out), layout(index), layout(x)), Alarm(x.shape[-1])
    span = max(1, _SPAN // int(plan[ACROSS]))
    tasks = int(plan[ROWS]) * -(-count // span)
    bits = bits_of(x)
    parallel(
        _pick, tasks, TAGS[bits], TAGS[dtype_name(index)], mover(bits, bits), from_end, span, plan, alarm.room,
        pointer(out), pointer(index), pointer(x), minimum=max(1, _GRAIN // (span * int(plan[ACROSS]))),
    )  # fmt: skip
    alarm.check()


@jit
def _pick(start, stop, tag, kind, move, from_end, span, plan, alarm, out, index, x):
    count, across, limit = plan[COUNT], plan[ACROSS], plan[LIMIT]
    pieces = -(-count // span)
    for task in range(start, stop):
        row, piece = divmod(task, pieces)
        goal, goal_step, goal_across = place(plan, 0, out, row)
        where, where_step, where_across = place(plan, 1, index, row)
        source, source_step, source_across = place(plan, 2, x, row)
        for j in range(piece * span, min(count, (piece + 1) * span)):
            target, mark = goal + j * goal_step, where + j * where_step
            if across == 1 or where_across == 0:
                i = index_at(kind, mark, limit, from_end, alarm)
                if i >= 0 and across == 1:
                    store(tag, target, load(tag, source + i * source_step))
                elif i >= 0:
                    call(move, across, target, source + i * source_step, goal_across, source_across, 0)
                continue
            for k in range(across):
                i = index_at(kind, mark + k * where_across, limit, from_end, alarm)
                if i >= 0:
                    store(tag, target + k * goal_across, load(tag, source + i * source_step + k * source_across))


@kernel(deterministic=True, batch_invariant=True)
def scatter(x: Any, index: Any, src: Any, reduce: str, include_self: bool, from_end: bool, out: Any) -> None:
    """Halves that are summed or multiplied are so in a float32 copy, of few places of those alone."""
    if not (pointer(x) == pointer(out) and strides(x) == strides(out) and x.shape == out.shape):
        transfer(out, x)
    computed = reduce in ("sum", "prod") and dtype_name(out) in HALF
    if computed and 2 * index.shape[-1] < out.shape[-1] and _same(index):
        _compact(out, index, src, reduce, include_self, from_end)
    elif computed:
        work = np.empty(tuple(out.shape), np.float32)
        transfer(work, out)
        _write(work, index, src, reduce, include_self, from_end)
        transfer(out, work)
    else:
        _write(out, index, src, reduce, include_self, from_end)


def _same(index: Any) -> bool:
    """Whether the indices are those of all rows."""
    return not any(step and n > 1 for step, n in zip(strides(index)[:-1], index.shape[:-1], strict=True))


def _compact(out: Any, index: Any, src: Any, reduce: str, include_self: bool, from_end: bool) -> None:
    (count, n), alarm = (index.shape[-1], out.shape[-1]), Alarm(out.shape[-1])
    lead = tuple(out.shape[:-1])
    if not count or 0 in index.shape:
        return
    places, own = np.empty(count, np.int64), np.empty(count, np.int64)
    kind = TAGS[dtype_name(index)]
    found = _numbered(kind, pointer(index), strides(index)[-1], n, from_end, places, own, alarm.room)
    alarm.check()
    halves = np.moveaxis(np.empty((found, *lead), numpy_dtype(dtype_name(out))), 0, -1)
    work = np.moveaxis(np.empty((found, *lead), np.float32), 0, -1)
    gather(out, places[:found], False, halves)
    transfer(work, halves)
    _write(work, own, src, reduce, include_self, False)
    transfer(halves, work)
    _write(out, places[:found], halves, "assign", True, False)


@jit
def _numbered(kind, index, step, n, from_end, places, own, alarm):
    """The places that indices name, each once, and which of them each index does; returns how many there are."""
    numbers, found = np.full(n, -1), 0
    for j in range(own.size):
        i = index_at(kind, index + j * step * size(kind), n, from_end, alarm)
        if i < 0:
            return 0
        if numbers[i] < 0:
            numbers[i], places[found] = found, i
            found += 1
        own[j] = numbers[i]
    return found


def _write(out: Any, index: Any, src: Any, reduce: str, include_self: bool, from_end: bool) -> None:
    count, lead = index.shape[-1], tuple(out.shape[:-1])
    if not count or 0 in lead:
        return
    plan, alarm = planned(out.shape[-1], count, lead, layout(out), layout(index), layout(src)), Alarm(out.shape[-1])
    across = int(plan[ACROSS])
    parts = max(1, across // 64) if across > 1 else threads() if plan[ROWS] == 1 and count >= _SEEN else 1
    how, kind, source = _REDUCTIONS[reduce], dtype_name(out), dtype_name(src)
    if reduce == "assign":
        kind = source = bits_of(out)
    elif kind == "bool":
        how, kind, source = {SUM: AMAX, PROD: AMIN}.get(how, how), "uint8", "uint8"
    each = count * -(-across // parts)

    def run(how: int, source: str, values: Any, plan: Any) -> None:
        parallel(
            _place, int(plan[ROWS]) * parts, TAGS[kind], TAGS[source], TAGS[dtype_name(index)], how, from_end, parts,
            plan, alarm.room, pointer(out), pointer(index), pointer(values), minimum=max(1, _GRAIN // each),
        )  # fmt: skip

    if not include_self and reduce != "assign":
        first = _start(how, kind)
        lies = (*lead, count), (0,) * (len(lead) + 1), kind
        run(ASSIGN, kind, first, planned(out.shape[-1], count, lead, layout(out), layout(index), lies))
    run(how, source, src, plan)
    alarm.check()


def _start(how: int, dtype: str) -> Any:
    """One element that changes nothing that it meets."""
    kind = numpy_dtype(dtype)
    if how in (SUM, PROD):
        return np.array([how == PROD]).astype(kind)
    least = how == AMAX
    if kind.kind in "iu":
        return np.array([np.iinfo(kind).min if least else np.iinfo(kind).max], kind)
    return np.array([-np.inf if least else np.inf]).astype(kind)


@jit
def _place(start, stop, tag, source_tag, kind, how, from_end, parts, plan, alarm, out, index, src):
    count, across, limit = plan[COUNT], plan[ACROSS], plan[LIMIT]
    step, own, other = lanes(tag), size(tag), size(source_tag)
    for task in range(start, stop):
        row, part = divmod(task, parts)
        low, high, first, last = 0, limit, 0, across
        if across > 1:
            first, last = across * part // parts, across * (part + 1) // parts
        else:
            low, high = limit * part // parts, limit * (part + 1) // parts
        goal, goal_step, goal_across = place(plan, 0, out, row)
        where, where_step, where_across = place(plan, 1, index, row)
        source, source_step, source_across = place(plan, 2, src, row)
        close = goal_across == own and source_across == other
        if across == 1 and how <= SUM:
            for j in range(count):
                i = index_at(kind, where + j * where_step, limit, from_end, alarm)
                if low <= i and i < high:
                    value, target = convert(tag, load(source_tag, source + j * source_step)), goal + i * goal_step
                    if how == SUM:
                        value = convert(tag, load(tag, target) + value)
                    store(tag, target, value)
            continue
        for j in range(count):
            mark, origin = where + j * where_step, source + j * source_step
            i = index_at(kind, mark, limit, from_end, alarm)
            if where_across == 0:
                if i < low or i >= high:
                    continue
                target, begin = goal + i * goal_step, first
                if close and how <= SUM:
                    begin = last - (last - first) % step
                    for k in range(first, begin, step):
                        value = convert(tag, vload(source_tag, origin + k * other))
                        if how == SUM:
                            value = vload(tag, target + k * own) + value
                        vstore(tag, target + k * own, value)
                for k in range(begin, last):
                    _meet(tag, source_tag, how, target + k * goal_across, origin + k * source_across)
                continue
            for k in range(first, last):
                i = index_at(kind, mark + k * where_across, limit, from_end, alarm)
                if low <= i and i < high:
                    target = goal + i * goal_step + k * goal_across
                    _meet(tag, source_tag, how, target, origin + k * source_across)


@jit
def _meet(tag, source_tag, how, target, origin):
    value = convert(tag, load(source_tag, origin))
    if how == ASSIGN:
        store(tag, target, value)
    else:
        store(tag, target, convert(tag, combined(tag, how, load(tag, target), value)))


@kernel(deterministic=True, batch_invariant=True)
def offset(x: Any, index: Any, size: int, step: int, out: Any) -> None:
    """One pass over all indices."""
    shape = tuple(out.shape)
    if 0 in shape:
        return
    plan, alarm = planned(size, 1, shape, *(_column(a) for a in (out, x, index))), Alarm(size)
    across = int(plan[ACROSS])
    span = min(across, _SPAN)
    parallel(
        _offset, int(plan[ROWS]) * -(-across // span), TAGS[dtype_name(index)], span, step, plan, alarm.room,
        pointer(out), pointer(x), pointer(index), minimum=max(1, _GRAIN // span),
    )  # fmt: skip
    alarm.check()


def _column(x: Any) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The layout of an array with a last axis of one element."""
    return (*x.shape, 1), (*strides(x), 0), dtype_name(x)


@jit
def _offset(start, stop, kind, span, step, plan, alarm, out, x, index):
    across, limit = plan[ACROSS], plan[LIMIT]
    pieces = -(-across // span)
    for task in range(start, stop):
        row, piece = divmod(task, pieces)
        goal, _, goal_step = place(plan, 0, out, row)
        source, _, source_step = place(plan, 1, x, row)
        where, _, where_step = place(plan, 2, index, row)
        for k in range(piece * span, min(across, (piece + 1) * span)):
            i = index_at(kind, where + k * where_step, limit, True, alarm)
            if i >= 0:
                store(_PLACE, goal + k * goal_step, load(_PLACE, source + k * source_step) + step * i)


_PLACE = np.int64(0)


@kernel(deterministic=True)
def embedding_dense_backward(grad: Any, index: Any, n: int, padding: int, by_frequency: bool, out: Any) -> None:
    """Indices are brought in the order of their rows first, so that each row is summed in registers' reach and written
    once."""
    (count, width), alarm = grad.shape, Alarm(n)
    order, bounds = np.empty(count, np.int64), np.empty(n + 1, np.int64)
    _sorted(TAGS[dtype_name(index)], pointer(index), *strides(index), n, order, bounds, alarm.room)
    alarm.check()
    parallel(
        _rows, n, TAGS[dtype_name(grad)], width, padding, by_frequency, order, bounds, pointer(grad), strides(grad),
        pointer(out), strides(out), minimum=max(1, _GRAIN // max(width, 1)),
    )  # fmt: skip


@jit
def _sorted(kind, index, step, n, order, bounds, alarm):
    """The numbers of the indices by what they are, in their order where that is the same, and where each begins."""
    bounds[:] = 0
    for j in range(order.size):
        i = index_at(kind, index + j * step * size(kind), n, False, alarm)
        if i < 0:
            return
        bounds[i + 1] += 1
    for i in range(n):
        bounds[i + 1] += bounds[i]
    for j in range(order.size):
        i = load(kind, index + j * step * size(kind))
        order[bounds[i]] = j
        bounds[i] += 1
    for i in range(n, 0, -1):
        bounds[i] = bounds[i - 1]
    bounds[0] = 0


@jit
def _rows(start, stop, tag, width, padding, by_frequency, order, bounds, grad, grad_steps, out, out_steps):
    real, step, own = wide(tag), lanes(tag), size(tag)
    memory, (sums,) = scratch(real, ((1, width),))
    source, target = Block(tag, grad, grad_steps[0]), Block(tag, out, out_steps[0])
    for row in range(start, stop):
        first, last = bounds[row], bounds[row + 1]
        if row == padding:
            last = first
        for k in range(width):
            store(real, at(sums, 0, k), real)
        for j in range(first, last):
            origin, begin = at(source, order[j], 0), 0
            if grad_steps[1] == 1:
                begin = width - width % step
                for k in range(0, begin, step):
                    place = at(sums, 0, k)
                    vstore(real, place, vload(real, place) + vload(tag, origin + k * own))
            for k in range(begin, width):
                place = at(sums, 0, k)
                store(real, place, load(real, place) + load(tag, origin + k * grad_steps[1] * own))
        goal, begin = at(target, row, 0), 0
        share = convert(real, max(1, last - first)) if by_frequency else convert(real, 1)
        if out_steps[1] == 1:
            begin = width - width % step
            for k in range(0, begin, step):
                vstore(tag, goal + k * own, vload(real, at(sums, 0, k)) / share)
        for k in range(begin, width):
            store(tag, goal + k * out_steps[1] * own, load(real, at(sums, 0, k)) / share)
    return alive(memory)
