"""The router and the gated activation on the CPU.

The router is bound by its product; the choice goes through a row of scores once for each expert that is chosen, while
the row stays in L1. The activation is bound by bytes, if its exponential is a polynomial of whole vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from ._blocks import Block, alive, at, get, of_task, pack, place, put, round_up, scratch, unpack, vget, vput, walk
from ._gemm import View, contract, empty, view
from ._moe_rows import STEP, gate_block, gate_score, slope_block
from ._vectors import INT32, LANES, TAGS, cast, lanes, load, load_index, size, store, vsplat, vsum, wide

_GRAIN = 1 << 14  # elements worth a thread
_ROUTED = 16  # tokens worth one


@kernel(deterministic=True, batch_invariant=True)
def moe_gate(
    x: Any, weight: Any, bias: Any, table: Any, tokens: Any, top_k: int, scale: float, out: tuple[Any, Any]
) -> None:
    """One product with float32 results; then every token selects from its row while it is in cache."""
    real = "float64" if dtype_name(x) == "float64" else "float32"
    name = dtype_name(x) if dtype_name(x) == dtype_name(weight) else real
    x, weight = _converted(x, name), _converted(weight, name)
    (count, _), (experts, _) = x.shape, weight.shape
    z = np.empty(count * experts + LANES, real)  # the last row is read by whole vectors
    contract(name, view(x), view(weight).T, View(pointer(z), (count, experts), (experts, 1)), result=real)
    bias = None if bias is None else _converted(bias, real)
    nothing = 0, (0, 0), 0
    weights, indices = out
    parallel(
        _route, count, TAGS[real], pointer(z), experts, top_k, float(scale),
        (0, 0) if bias is None else (pointer(bias), *strides(bias)),
        nothing if tokens is None else _integers(table), nothing if tokens is None else _integers(tokens),
        (pointer(weights), *strides(weights)), (pointer(indices), *strides(indices)), minimum=_ROUTED,
    )  # fmt: skip


def _converted(x: Any, name: str) -> Any:
    if dtype_name(x) == name:
        return x
    return x.float() if hasattr(x, "float") else x.astype(name)


def _integers(x: Any) -> tuple[int, tuple[int, ...], int]:
    """Address, strides and bytes of an element; a vector is a column."""
    return pointer(x), (*strides(x), 0)[:2], x.itemsize


@jit
def _index(x, i, j):
    address, (row, column), item = x
    return load_index(address + (i * row + j * column) * item, item)


@jit
def _route(start, stop, tag, z, experts, top_k, scale, bias, table, tokens, weights, indices):
    step = lanes(tag)
    memory, (scores, biased) = scratch(tag, ((1, experts + step), (1, experts)))
    taken = np.empty(experts, np.uint8)
    logits, biases, factor = Block(tag, z, experts), Block(tag, *bias), cast(tag, scale)
    chosen, (goals, goal_row, goal_column) = Block(INT32, *indices[:2]), weights
    for row in range(start, stop):
        for e in range(0, experts, step):
            vput(scores, 0, e, gate_score(vget(logits, row, e)))
        for e in range(experts):
            score = get(scores, 0, e)
            put(biased, 0, e, score + get(biases, e, 0) if biases.base != 0 else score)
            taken[e] = 0
        goal = Block(tag, at(Block(tag, goals, goal_row), row, 0), goal_column)
        token = _index(tokens, row, 0) if table[0] != 0 else 0
        total = tag
        for slot in range(top_k):
            best = -1
            if table[0] != 0:
                best = _index(table, token, slot)
            else:
                highest = tag
                for e in range(experts):
                    value = get(biased, 0, e)
                    if not taken[e] and (best < 0 or value > highest):
                        best, highest = e, value
                taken[best] = 1
            score = get(scores, 0, best)
            total += score
            put(goal, slot, 0, score)
            put(chosen, row, slot * indices[2], best)
        for slot in range(top_k):
            put(goal, slot, 0, get(goal, slot, 0) / total * factor if total != 0 else tag)
    return alive(memory)


@kernel(deterministic=True)
def swiglu(gate: Any, up: Any, weight: Any, limit: float | None, out: Any) -> None:
    """A row in pieces that stay in L1; the exponential is a polynomial of whole vectors."""
    *lead, width = out.shape
    for sizes, arrays in walk(lead if width else [0], (1, 1, 0, 1), gate, up, weight, out):
        parallel(
            _gate_rows, math.prod(sizes), TAGS[dtype_name(out)], width, sizes, *arrays,
            math.inf if limit is None else float(limit), minimum=-(-_GRAIN // width),
        )  # fmt: skip


@jit
def _gate_rows(start, stop, tag, width, sizes, gate, up, weight, out, limit):
    real, step = wide(tag), lanes(tag)
    memory, (g, u) = scratch(real, ((1, STEP), (1, STEP)))
    for row in range(start, stop):
        left, right, target = (
            of_task(tag, gate, sizes, row),
            of_task(tag, up, sizes, row),
            of_task(tag, out, sizes, row),
        )
        factor = cast(real, 1.0)
        if weight[0] != 0:
            factor = load(real, weight[0] + place(row, sizes, weight[1]) * size(real))
        for first in range(0, width, STEP):
            count = min(STEP, width - first)
            padded = -(-count // step) * step
            pack(tag, at(left, first, 0), (0, left.row), (1, count), g, (1, padded))
            pack(tag, at(right, first, 0), (0, right.row), (1, count), u, (1, padded))
            gate_block(g, u, padded, factor, limit)
            unpack(tag, g, (1, count), at(target, first, 0), (0, target.row))
    return alive(memory)


def swiglu_backward(
    grad: Any, gate: Any, up: Any, weight: Any, limit: float | None, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    """All three in one pass; operands that broadcast are left to torch's."""
    *lead, width = grad.shape
    whole = tuple(gate.shape) == tuple(up.shape) == tuple(grad.shape)
    if not (whole and math.prod(grad.shape)) or (weight is not None and list(weight.shape) != lead):
        return NotImplemented
    given = gate, up, weight
    grads = tuple(empty(x, x.shape) if x is not None and n else None for x, n in zip(given, needs, strict=True))
    for sizes, arrays in walk(lead, (1, 1, 1, 0, 1, 1, 0), grad, *given, *grads):
        parallel(
            _slope_rows, math.prod(sizes), TAGS[dtype_name(grad)], width, sizes, *arrays,
            math.inf if limit is None else float(limit), minimum=-(-_GRAIN // width),
        )  # fmt: skip
    return grads


@jit
def _slope_rows(start, stop, tag, width, sizes, grad, gate, up, weight, of_gate, of_up, of_weight, limit):
    real = wide(tag)
    padded = round_up(min(STEP, width), lanes(tag))
    memory, (g, u, s) = scratch(real, ((1, padded), (1, padded), (1, padded)))
    for row in range(start, stop):
        factor, mass = cast(real, 1.0), vsplat(real)
        if weight[0] != 0:
            factor = load(real, weight[0] + place(row, sizes, weight[1]) * size(real))
        for first in range(0, width, STEP):
            count = min(STEP, width - first)
            padded = round_up(count, lanes(tag))
            for array, block in ((gate, g), (up, u), (grad, s)):
                source = of_task(tag, array, sizes, row)
                pack(tag, at(source, first, 0), (0, source.row), (1, count), block, (1, padded))
            mass += slope_block(g, u, s, padded, factor, limit)
            for array, block in ((of_gate, g), (of_up, u)):
                if array[0] != 0:
                    target = of_task(tag, array, sizes, row)
                    unpack(tag, block, (1, count), at(target, first, 0), (0, target.row))
        if of_weight[0] != 0:
            store(real, of_weight[0] + place(row, sizes, of_weight[1]) * size(real), vsum(mass))
    return alive(memory)
