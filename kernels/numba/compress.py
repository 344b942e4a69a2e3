"""The key-value compressor on the CPU: projections of a few windows at a time, pooled while they are in the caches."""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._compress import chunks
from ._blocks import Block, pack, unpack
from ._gemm import View, contract, view
from ._vectors import TAGS, cast, exp, fma, lanes, load, maximum, size, store, vload, vsplat, vstore

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
    name, result = dtype_name(x), dtype_name(bias)
    tag, real, item, width = TAGS[name], TAGS[result], x.itemsize, bias.itemsize
    ld = channels + _PAD
    at_bias = pointer(bias), strides(bias)
    at_entries, entry_steps = pointer(entries), strides(entries)
    at_states = pointer(states[0]), strides(states[0]), pointer(states[1]), strides(states[1])
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
        left = source + (first * x_steps[0] + chunk.start * x_steps[1]) * item
        for weight, line in ((wkv, kv), (wgate, scores)):
            new = View(line + old * ld * width, (count, tokens, channels), (rows * ld, ld, 1))
            contract(name, View(left, (count, tokens, depth), x_steps), view(weight).T, new, result=result)
        shape = real, m, channels, before, inside, first, rows, old, ld, kv, scores
        parallel(_complete, count * rows, *shape, *at_bias, *at_states, minimum=-(-_GRAIN // channels))
        parallel(
            _pool, count * windows, tag, *shape, at_entries, entry_steps, chunk.emitted, windows,
            minimum=-(-_GRAIN // (8 * channels * m)),
        )  # fmt: skip
        parallel(_advance, count, *shape, *at_states, windows, minimum=-(-_GRAIN // (channels * m)))


@jit
def _complete(
    start, stop, real, m, channels, before, inside, first, rows, old, ld, kv, scores,
    bias, bias_steps, kv_state, kv_steps, score_state, score_steps,
):  # fmt: skip
    """Lay the rows of the states before the new tokens, whose scores get their bias."""
    unit, step = size(real), lanes(real)
    for task in range(start, stop):
        b, row = divmod(task, rows)
        line = task * ld * unit
        if row < old:
            for state, steps, target in ((kv_state, kv_steps, kv), (score_state, score_steps, scores)):
                origin = state + ((first + b) * steps[0] + row * steps[1]) * unit
                pack(real, origin, (0, steps[2]), (1, channels), Block(real, target + line, ld), (1, channels))
            continue
        origin = bias + (inside + row - old) % m * bias_steps[0] * unit
        whole = channels - channels % step if bias_steps[1] == 1 else 0
        for c in range(0, whole, step):
            at = scores + line + c * unit
            vstore(real, at, vload(real, at) + vload(real, origin + c * unit))
        for c in range(whole, channels):
            at = scores + line + c * unit
            store(real, at, load(real, at) + load(real, origin + c * bias_steps[1] * unit))


@jit
def _pool(
    start, stop, tag, real, m, channels, before, inside, first, rows, old, ld, kv, scores,
    entries, entry_steps, emitted, windows,
):  # fmt: skip
    """One entry a task: for a vector of channels the maximum over the slots, then the weights and both sums."""
    item, unit, step = size(tag), size(real), lanes(real)
    width = channels // 2 if before else channels
    held = np.empty(unit * step, np.uint8)
    last = np.int64(held.ctypes.data)
    for task in range(start, stop):
        b, window = divmod(task, windows)
        line = (b * rows + window * m) * ld
        target = entries + ((first + b) * entry_steps[0] + (emitted + window) * entry_steps[1]) * item
        for c in range(0, width, step):
            top = vsplat(cast(real, -np.inf))
            for j in range(before + m):
                at = (line + j * ld + (c if j < before else channels - width + c)) * unit
                top = maximum(top, vload(real, scores + at))
            mass = vsplat(real)
            total = vsplat(real)
            for j in range(before + m):
                at = (line + j * ld + (c if j < before else channels - width + c)) * unit
                p = exp(vload(real, scores + at) - top)
                mass += p
                total = fma(p, vload(real, kv + at), total)
            value = total / mass
            if entry_steps[2] == 1 and c + step <= width:
                vstore(tag, target + c * item, value)
            else:
                vstore(real, last, value)
                for i in range(min(step, width - c)):
                    store(tag, target + (c + i) * entry_steps[2] * item, load(real, last + i * unit))
    return held[0]  # keeps the scratch alive until here


@jit
def _advance(
    start, stop, real, m, channels, before, inside, first, rows, old, ld, kv, scores,
    kv_state, kv_steps, score_state, score_steps, windows,
):  # fmt: skip
    """The states after these tokens: the newest row of each place, and the last window that closed."""
    unit = size(real)
    for b in range(start, stop):
        for state, steps, lines in ((kv_state, kv_steps, kv), (score_state, score_steps, scores)):
            origin, target = lines + b * rows * ld * unit, state + (first + b) * steps[0] * unit
            for j in range(before + m if windows else rows):
                row, place = (windows * m + j, j) if windows else (j, before + inside + j)
                if row >= rows:  # no new token has this place: the window that closed still has
                    row -= m
                into = target + place * steps[1] * unit
                unpack(real, Block(real, origin + row * ld * unit, ld), (1, channels), into, (0, steps[2]))
