"""The key-value compressor on the CPU: projections of a few windows at a time, pooled while they are in the caches.

Bound by operations: two products of every token, which `contract` does; what is here reads their results once more. A
chunk is as many tokens as fit the caches and ends with a window, so that no window is pooled in parts.
"""

from __future__ import annotations

from operator import mul
from typing import Any

import numpy as np

from flagops.arrays import as_numpy, dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._compress import chunks
from ._blocks import Block, alive, at, get, pack, put, scratch, shifted, unpack, vget, vput
from ._functions import exp
from ._gemm import View, contract, empty, ones, view
from ._vectors import TAGS, cast, fma, lanes, maximum, size, vsplat

_PAD = 16  # elements behind a row that a vector may touch
_SCRATCH = 16 << 20
_GRAIN = 1 << 15  # elements that are worth a thread


@kernel(deterministic=True, batch_invariant=True, note="chunks give the bits of one call")
def compress_kv(
    x: Any, wkv: Any, wgate: Any, bias: Any, kv_state: Any, score_state: Any, filled: int, out: tuple[Any, Any, Any]
) -> None:
    """Tokens in chunks that end with a window; the states are brought forward after each."""
    entries, *states = out
    for source, target in zip((kv_state, score_state), states, strict=True):
        if pointer(source) != pointer(target):
            target[...] = source
    (batch, length, depth), (m, channels), before = x.shape, bias.shape, kv_state.shape[1] - bias.shape[0]
    if not (batch and length and channels):
        return
    name, result, ld = dtype_name(x), dtype_name(bias), channels + _PAD
    tag, real, width = TAGS[name], TAGS[result], bias.itemsize
    source, x_steps = pointer(x), strides(x)
    held = np.empty(0, np.uint8)
    for chunk in chunks(batch, length, m, before, filled, 2 * ld * width, _SCRATCH):
        first, inside, windows = chunk.first, chunk.inside, chunk.windows
        count, tokens = chunk.last - first, chunk.stop - chunk.start
        old = before + inside if windows else 0
        rows = old + tokens
        if held.size < 2 * count * rows * ld * width + 64:
            held = np.empty(2 * count * rows * ld * width + 64, np.uint8)
        kv = (pointer(held) + 63) & ~63
        scores = kv + count * rows * ld * width
        left = source + (first * x_steps[0] + chunk.start * x_steps[1]) * x.itemsize
        for weight, lines in ((wkv, kv), (wgate, scores)):
            new = View(lines + old * ld * width, (count, tokens, channels), (rows * ld, ld, 1))
            contract(name, View(left, (count, tokens, depth), x_steps), view(weight).T, new, result=result)
        shape, panels = (m, channels, before, inside, rows, old), ((real, kv, ld), (real, scores, ld))
        at_states = tuple(_from(state, first) for state in states)
        parallel(
            _complete, count * rows, shape, *panels, _from(bias, 0), *at_states, minimum=-(-_GRAIN // channels)
        )  # fmt: skip
        parallel(
            _pool, count * windows, tag, shape, *panels, _from(entries, first, chunk.emitted), windows,
            minimum=-(-_GRAIN // (8 * channels * m)),
        )  # fmt: skip
        parallel(_advance, count, shape, *panels, *at_states, windows, minimum=-(-_GRAIN // (channels * m)))


def _from(x: Any, *place: int) -> tuple[int, tuple[int, ...]]:
    """The address of a place in an array, and its strides."""
    return pointer(x) + sum(map(mul, place, strides(x))) * x.itemsize, strides(x)


@jit
def _matrix(tag, x, b):
    address, (step, row, _) = x
    return Block(tag, address + b * step * size(tag), row)


@jit
def _complete(start, stop, shape, kv, scores, bias, kv_state, score_state):
    """Lay the rows of the states before the new tokens, whose scores get their bias."""
    m, channels, _, inside, rows, old = shape
    scores = Block(*scores)
    real, step = scores.tag, lanes(scores.tag)
    biases, (bias_row, bias_column) = bias
    for task in range(start, stop):
        b, row = divmod(task, rows)
        if row < old:
            for state, lines in ((kv_state, Block(*kv)), (score_state, scores)):
                source, line = at(_matrix(real, state, b), row, 0), shifted(lines, task, 0)
                pack(real, source, (0, state[1][2]), (1, channels), line, (1, channels))
            continue
        line = shifted(scores, task, 0)
        added = Block(real, at(Block(real, biases, bias_row), (inside + row - old) % m, 0), bias_column)
        whole = channels - channels % step if bias_column == 1 else 0
        for c in range(0, whole, step):
            vput(line, 0, c, vget(line, 0, c) + vget(added, c, 0))
        for c in range(whole, channels):
            put(line, 0, c, get(line, 0, c) + get(added, c, 0))


@jit
def _weighed(real, values, logits, m, before, current, c):
    """Of a vector of channels in a window the greatest logit, and the sums of the weights and of what they weigh;
    those of the current slots lie `current` channels behind."""
    top = vsplat(cast(real, -np.inf))
    for j in range(before + m):
        top = maximum(top, vget(logits, j, c if j < before else current + c))
    mass = total = vsplat(real)
    for j in range(before + m):
        place = c if j < before else current + c
        p = exp(vget(logits, j, place) - top)
        mass += p
        total = fma(p, vget(values, j, place), total)
    return top, mass, total


@jit
def _pool(start, stop, tag, shape, kv, scores, entries, windows):
    """One entry a task: for a vector of channels the maximum over the slots, then the weights and both sums."""
    m, channels, before, _, rows, _ = shape
    kv, scores = Block(*kv), Block(*scores)
    real, step = scores.tag, lanes(scores.tag)
    width = channels // 2 if before else channels
    memory, (last,) = scratch(real, ((step, 1),))
    column = entries[1][2]
    for task in range(start, stop):
        b, window = divmod(task, windows)
        values, logits = shifted(kv, b * rows + window * m, 0), shifted(scores, b * rows + window * m, 0)
        target = Block(tag, at(_matrix(tag, entries, b), window, 0), column)
        for c in range(0, width, step):
            _, mass, total = _weighed(real, values, logits, m, before, channels - width, c)
            if column == 1 and c + step <= width:
                vput(target, c, 0, total / mass)
            else:
                vput(last, 0, 0, total / mass)
                for i in range(min(step, width - c)):
                    put(target, c + i, 0, get(last, i, 0))
    return alive(memory)


@jit
def _advance(start, stop, shape, kv, scores, kv_state, score_state, windows):
    """The states after these tokens: the newest row of each place, and the last window that closed."""
    m, channels, before, inside, rows, _ = shape
    for b in range(start, stop):
        for state, panel in ((kv_state, kv), (score_state, scores)):
            lines = shifted(Block(*panel), b * rows, 0)
            target = _matrix(lines.tag, state, b)
            for j in range(before + m if windows else rows):
                row, place = (windows * m + j, j) if windows else (j, before + inside + j)
                if row >= rows:  # no new token has this place: the window that closed still has
                    row -= m
                line, steps = shifted(lines, row, 0), (0, state[1][2])
                unpack(lines.tag, line, (1, channels), at(target, place, 0), steps)


def compress_kv_backward(
    grad: tuple[Any, Any, Any], x: Any, wkv: Any, wgate: Any, bias: Any, kv_state: Any, score_state: Any, filled: int,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """A channel of a token is in one window alone, as the current or the previous one: what a window reads it
    overwrites by the gradients; those of tokens in no window are zero, but for what the states bring.

    All tokens at once; their gradients are rounded to the dtype of x before the products. The states' own gradients,
    and calls that close no window, are left to torch's."""
    (batch, length, depth), (m, channels), before = x.shape, bias.shape, kv_state.shape[1] - bias.shape[0]
    windows, held, width = (filled + length) // m, before + filled, channels // (2 if before else 1)
    if needs[4] or needs[5] or not batch * windows * channels * depth:
        return NotImplemented
    name, result, ld, rows = dtype_name(x), dtype_name(bias), channels + _PAD, held + length
    tag, real, closed = TAGS[name], TAGS[result], windows * m
    lines = np.empty((2, batch, rows, ld), result)
    shape, panels = (m, channels, before, filled, rows, held), tuple((real, pointer(line), ld) for line in lines)
    steps, new = (rows * ld, ld, 1), tuple(pointer(line) + held * ld * lines.itemsize for line in lines)
    for weight, line in zip((wkv, wgate), new, strict=True):
        contract(name, view(x), view(weight).T, View(line, (batch, length, channels), steps), result=result)
    given = ((pointer(y), strides(y)) for y in (bias, kv_state, score_state))
    parallel(_complete, batch * rows, shape, *panels, *given, minimum=-(-_GRAIN // channels))
    parallel(
        _unpool, batch * windows, tag, shape, *panels, (pointer(grad[0]), strides(grad[0])), windows,
        minimum=-(-_GRAIN // (8 * channels * m)),
    )  # fmt: skip
    for line, of_state in zip(lines, grad[1:], strict=True):
        line[:, before + closed :, channels - width : channels] = 0
        if before:
            line[:, closed:, :width] = 0
        state, rest = as_numpy(of_state), rows - before - closed
        line[:, before + closed :, :channels] += state[:, before : before + rest]
        line[:, closed : closed + before, :channels] += state[:, :before]
        line[:, before + closed - m + rest : before + closed, :channels] += state[:, before + rest :]
    if name != result:
        exact, lines = lines, np.empty((2, batch, length, ld), numpy_dtype(name))
        places = (pointer(y) for y in (exact, lines))
        parallel(_rounded, 2 * batch * length, tag, real, channels, ld, rows, length, *places, minimum=-(-_GRAIN // ld))
        steps, new = (length * ld, ld, 1), tuple(pointer(line) for line in lines)
    sides = tuple(View(line, (batch, length, channels), steps) for line in new)
    grads = [empty(y, y.shape) if needed else None for y, needed in zip((x, wkv, wgate, bias), needs, strict=False)]
    if needs[0]:
        weights = empty(wkv, (2, 1, channels, depth))
        weights[0], weights[1] = wkv, wgate
        both = View(new[0], (2, *sides[0].shape), ((new[1] - new[0]) // lines.itemsize, *steps))
        contract(name, both, view(weights), view(grads[0]), paired=True)
    for place, side in enumerate(sides, 1):
        if needs[place]:
            contract(name, side.T, view(x), view(grads[place]), paired=True)
    if needs[3]:
        scores = (lines if name == result else exact)[1]
        scores[:, before:held] = 0
        total, first = np.zeros((1, m * ld), result), pointer(scores) + before * ld * scores.itemsize
        cut = View(first, (batch, windows, m * ld), (rows * ld, m * ld, 1))
        contract(result, ones(result, windows), cut, view(total))
        found = total.reshape(m, ld)[:, :channels]
        found[:rest] += scores[:, before + closed :, :channels].sum(0)
        as_numpy(grads[3])[...] = found
    return *grads, None, None


@jit
def _unpool(start, stop, tag, shape, kv, scores, grad, windows):
    """A window's values and scores to their gradients, a vector of channels after the other."""
    m, channels, before, _, rows, _ = shape
    kv, scores = Block(*kv), Block(*scores)
    real, step = scores.tag, lanes(scores.tag)
    width = channels // 2 if before else channels
    memory, (given, parts) = scratch(real, ((1, step), (2, step)))
    column = grad[1][2]
    for task in range(start, stop):
        b, window = divmod(task, windows)
        values, logits = shifted(kv, b * rows + window * m, 0), shifted(scores, b * rows + window * m, 0)
        source = Block(tag, at(_matrix(tag, grad, b), window, 0), column)
        for c in range(0, width, step):
            count = min(step, width - c)
            pack(tag, at(source, c, 0), (0, column), (1, count), given, (1, step))
            slope = vget(given, 0, 0)
            top, mass, total = _weighed(real, values, logits, m, before, channels - width, c)
            pooled = total / mass
            for j in range(before + m):
                place = c if j < before else channels - width + c
                share = exp(vget(logits, j, place) - top) / mass * slope
                change = share * (vget(values, j, place) - pooled)
                if count == step:
                    vput(values, j, place, share)
                    vput(logits, j, place, change)
                else:
                    vput(parts, 0, 0, share)
                    vput(parts, 1, 0, change)
                    for i in range(count):
                        put(values, j, place + i, get(parts, 0, i))
                        put(logits, j, place + i, get(parts, 1, i))
    return alive(memory)


@jit
def _rounded(start, stop, tag, real, channels, ld, rows, length, exact, lines):
    """The last rows of each matrix, rounded, one matrix behind the other."""
    for task in range(start, stop):
        line, token = divmod(task, length)
        source = shifted(Block(real, exact, ld), line * rows + rows - length + token, 0)
        unpack(tag, source, (1, channels), at(Block(tag, lines, ld), task, 0), (0, 1))
