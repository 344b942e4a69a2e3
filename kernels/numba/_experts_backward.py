"""Gradients of products grouped by expert on the CPU: rows are gathered once, for the products of all gradients.

A run holds all rows of the experts that it has, so that the gradient of a weight is one product, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import as_numpy, dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides

from .._moe import quantised
from ._blocks import Block, alive, at, cleared, get, pack, put, round_up, unpack
from ._gemm import contract, contract_groups, empty, view
from ._moe_rows import STEP, activate, add_rows, by_expert, gather, round_rows, slope_block
from ._vectors import TAGS, lanes, vsplat, vsum, wide

_GRAIN = 1 << 15  # elements worth a thread
_ROOM = 4 << 20  # bytes of the rows of a run, which then stay in the caches


def grouped_matmul_backward(grad: Any, a: Any, b: Any, offsets: Any, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """grad b^T and a^T grad of each expert; rows past the last offset and experts without rows get 0."""
    name, bounds = dtype_name(grad), np.concatenate(([0], as_numpy(offsets)), dtype=np.int64)
    grads: list[Any] = [empty(x, x.shape) if needed else None for x, needed in zip((a, b), needs, strict=False)]
    if needs[0]:
        contract_groups(name, view(grad), view(b).T, view(grads[0]), bounds)
        grads[0][bounds[-1] :] = 0
    if needs[1]:
        _weights(name, a, grad, bounds, range(len(b)), grads[1])
    return *grads, None


def _weights(name: str, a: Any, b: Any, bounds: Any, experts: Iterable[int], out: Any) -> None:
    """out[e] = a^T b over the rows of each expert."""
    for expert in experts:
        start, stop = bounds[expert : expert + 2]
        if start < stop:
            contract(name, view(a[start:stop]).T, view(b[start:stop]), view(out[expert]), paired=True)
        else:
            out[expert] = 0


def moe_experts_backward(
    grad: Any, x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any, needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """Intermediates are computed again and their rounding is passed through; the gradient between the two products is
    rounded to the dtype of x."""
    (rows, width), slots, inner = x.shape, indices.shape[1], gate_up.shape[1] // 2
    if quantised(gate_up) or not rows * width * slots * inner:
        return NotImplemented
    name, tag, kept = dtype_name(x), TAGS[dtype_name(x)], numpy_dtype(dtype_name(x))
    real = dtype_name(weights)
    wanted = zip((x, weights, gate_up, down), (needs[0], needs[1], needs[3], needs[4]), strict=True)
    of_x, of_weights, of_gate_up, of_down = (empty(y, y.shape) if needed else None for y, needed in wanted)
    total = np.zeros((rows, width) if needs[0] else (0, 0), real)
    shares = np.empty((rows, slots), real)
    pairs, bounds = by_expert(as_numpy(indices).reshape(-1).astype(np.int64), len(gate_up))
    few, factors = -(-_GRAIN // width), (pointer(weights), *strides(weights))
    most = math.inf if limit is None else limit
    inward = needs[0] or needs[1] or needs[3]
    columns = (width, kept), (width, kept), (2 * inner, kept), (inner, kept), (inner, real), (width, real)
    per_row = sum(count * np.dtype(dtype).itemsize for count, dtype in columns)
    room = max(1, min(config.budget() // 4, _ROOM) // per_row)
    held: list[Any] = []
    for experts in _runs(bounds, room):
        start, count = bounds[experts[0]], bounds[experts[-1] + 1] - bounds[experts[0]]
        some, within = pairs[start : start + count], bounds - start
        if not held or len(held[0]) < count:
            held = [np.empty((count, size), dtype) for size, dtype in columns]
        given, g, both, h, slope, y = (array[:count] for array in held)
        for source, goal in ((x, given), (grad, g)):
            parallel(
                gather, count, tag, width, some // slots, pointer(source), *strides(source), False, pointer(goal),
                minimum=few,
            )  # fmt: skip
        contract_groups(name, view(given), view(gate_up).T, view(both), within)
        gated = tag, inner, pointer(both), some, slots, *factors, most
        if of_down is not None:
            parallel(activate, count, *gated, False, pointer(h), minimum=-(-_GRAIN // inner))
            _weights(name, g, h, within, experts, of_down)
        if not inward:
            continue
        contract_groups(name, view(g), view(down), view(slope), within, real)
        parallel(_slopes, count, *gated, pointer(slope), pointer(shares), minimum=-(-_GRAIN // inner))
        if of_gate_up is not None:
            _weights(name, both, given, within, experts, of_gate_up)
        if of_x is not None:
            contract_groups(name, view(both), view(gate_up), view(y), within, real)
            blocks, least = -(-width // STEP), max(1, _GRAIN // (STEP * max(count, 1)))
            parallel(add_rows, blocks, TAGS[real], width, some // slots, pointer(y), pointer(total), minimum=least)
    if of_x is not None:
        parallel(round_rows, rows, tag, width, pointer(total), pointer(of_x), *strides(of_x), minimum=few)
    if of_weights is not None:
        target = pointer(of_weights), *strides(of_weights)
        parallel(round_rows, rows, TAGS[real], slots, pointer(shares), *target, minimum=-(-_GRAIN // slots))
    return of_x, of_weights, None, of_gate_up, of_down, None, None, grad if shared is not None and needs[7] else None


def _runs(bounds: Any, room: int) -> Iterator[range]:
    """Experts whose rows together are as many as there is room for, or one alone; every expert is in a run."""
    first, last = 0, len(bounds) - 1
    for expert in range(1, last):
        if bounds[expert + 1] - bounds[first] > room:
            yield range(first, expert)
            first = expert
    yield range(first, last)


@jit
def _slopes(start, stop, tag, width, both, pairs, slots, weights, weight_row, weight_slot, limit, inner, shares):
    """The gradients of g and u over both, by those of h without its weight; and of the weights."""
    real, step = wide(tag), lanes(tag)
    padded = round_up(min(STEP, width), step)
    memory, (g, u, s) = cleared(real, ((1, padded), (1, padded), (1, padded)))
    gates, slopes = Block(tag, both, 2 * width), Block(real, inner, width)
    weights, shares = Block(real, weights, weight_row), Block(real, shares, slots)
    for i in range(start, stop):
        token, slot = divmod(pairs[i], slots)
        weight, mass = get(weights, token, slot * weight_slot), vsplat(real)
        for first in range(0, width, STEP):
            count = min(STEP, width - first)
            padded = round_up(count, step)
            pack(tag, at(gates, i, first), (0, 1), (1, count), g, (1, padded))
            pack(tag, at(gates, i, width + first), (0, 1), (1, count), u, (1, padded))
            pack(real, at(slopes, i, first), (0, 1), (1, count), s, (1, padded))
            mass += slope_block(g, u, s, padded, weight, limit)
            unpack(tag, g, (1, count), at(gates, i, first), (0, 1))
            unpack(tag, u, (1, count), at(gates, i, width + first), (0, 1))
        put(shares, token, slot, vsum(mass))
    return alive(memory)
