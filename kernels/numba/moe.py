"""The router and the gated activation on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._rows import rows, spread
from ._blocks import Block, pack, unpack
from ._gemm import View, contract, view
from ._moe_rows import STEP, gate_block, gate_score
from ._vectors import INT32, LANES, TAGS, cast, lanes, load, load_index, size, store, vload, vstore, wide

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
    weights, indices = out
    parallel(
        _route, count, TAGS[real], pointer(z), experts, top_k, float(scale),
        *((0, 0) if bias is None else (pointer(bias), *strides(bias))),
        *(_integers(table, 2) if tokens is not None else (0, (0, 0), 0)),
        *(_integers(tokens, 1) if tokens is not None else (0, (0,), 0)),
        pointer(weights), strides(weights), pointer(indices), strides(indices), minimum=_ROUTED,
    )  # fmt: skip


def _converted(x: Any, name: str) -> Any:
    if dtype_name(x) == name:
        return x
    return x.float() if hasattr(x, "float") else x.astype(name)


def _integers(x: Any, axes: int) -> tuple[int, tuple[int, ...], int]:
    return pointer(x), strides(x), 8 if dtype_name(x) == "int64" else 4


@jit
def _route(
    start, stop, tag, z, experts, top_k, scale, bias, bias_step, table, table_steps, table_size,
    tokens, token_steps, token_size, weights, weight_steps, indices, index_steps,
):  # fmt: skip
    unit, step = size(tag), lanes(tag)
    padded = -(-experts // step) * step
    held = np.empty(2 * padded * unit, np.uint8)
    taken = np.empty(experts, np.uint8)
    scores = np.int64(held.ctypes.data)
    biased = scores + padded * unit
    for row in range(start, stop):
        for e in range(0, experts, step):
            logit = vload(tag, z + (row * experts + e) * unit)
            vstore(tag, scores + e * unit, gate_score(logit))
        for e in range(experts):
            score = load(tag, scores + e * unit)
            if bias != 0:
                score += load(tag, bias + e * bias_step * unit)
            store(tag, biased + e * unit, score)
            taken[e] = 0
        total = tag
        goal, places = weights + row * weight_steps[0] * unit, indices + row * index_steps[0] * 4
        line = np.int64(0)
        if table != 0:
            token = load_index(tokens + row * token_steps[0] * token_size, token_size)
            line = table + token * table_steps[0] * table_size
        for slot in range(top_k):
            best = -1
            if table != 0:
                best = load_index(line + slot * table_steps[1] * table_size, table_size)
            else:
                highest = tag
                for e in range(experts):
                    value = load(tag, biased + e * unit)
                    if not taken[e] and (best < 0 or value > highest):
                        best, highest = e, value
                taken[best] = 1
            score = load(tag, scores + best * unit)
            total += score
            store(tag, goal + slot * weight_steps[1] * unit, score)
            store(INT32, places + slot * index_steps[1] * 4, best)
        factor = cast(tag, scale)
        for slot in range(top_k):
            place = goal + slot * weight_steps[1] * unit
            store(tag, place, load(tag, place) / total * factor if total != 0 else tag)
    return held.size  # keeps the scratch alive until here


@kernel(deterministic=True)
def swiglu(gate: Any, up: Any, weight: Any, limit: float | None, out: Any) -> None:
    """A row in pieces that stay in L1; the exponential is a polynomial of whole vectors."""
    (*lead, width), tag = out.shape, TAGS[dtype_name(out)]
    *to, column = strides(out)
    *gates, gate_column = spread(gate.shape, strides(gate), out.ndim, 0)
    *ups, up_column = spread(up.shape, strides(up), out.ndim, 0)
    factors = (0,) * len(lead) if weight is None else spread(weight.shape, strides(weight), len(lead), 0)
    unit = 8 if out.itemsize == 8 else 4
    for (first, second, third, fourth), sizes, steps in rows(lead if width else [0], gates, ups, factors, to):
        parallel(
            _gate_rows, sizes[0] * sizes[1] * sizes[2], tag, width, sizes,
            pointer(gate) + first * out.itemsize, steps[0], gate_column,
            pointer(up) + second * out.itemsize, steps[1], up_column,
            0 if weight is None else pointer(weight) + third * unit, steps[2],
            pointer(out) + fourth * out.itemsize, steps[3], column, math.inf if limit is None else limit,
            minimum=-(-_GRAIN // width),
        )  # fmt: skip


@jit
def _gate_rows(
    start, stop, tag, width, sizes, gate, gate_steps, gate_column, up, up_steps, up_column,
    weights, weight_steps, out, out_steps, column, limit,
):  # fmt: skip
    real = wide(tag)
    item, unit, step = size(tag), size(real), lanes(tag)
    held = np.empty(2 * STEP * unit + 64, np.uint8)
    g = (np.int64(held.ctypes.data) + 63) & ~63
    u = g + STEP * unit
    for row in range(start, stop):
        rest, k = divmod(row, sizes[2])
        i, j = divmod(rest, sizes[1])
        left = gate + (i * gate_steps[0] + j * gate_steps[1] + k * gate_steps[2]) * item
        right = up + (i * up_steps[0] + j * up_steps[1] + k * up_steps[2]) * item
        target = out + (i * out_steps[0] + j * out_steps[1] + k * out_steps[2]) * item
        weight = cast(real, 1.0)
        if weights != 0:
            weight = load(real, weights + (i * weight_steps[0] + j * weight_steps[1] + k * weight_steps[2]) * unit)
        for first in range(0, width, STEP):
            count = min(STEP, width - first)
            padded = -(-count // step) * step
            pack(
                tag, left + first * gate_column * item, (0, gate_column), (1, count), Block(real, g, STEP), (1, padded)
            )
            pack(tag, right + first * up_column * item, (0, up_column), (1, count), Block(real, u, STEP), (1, padded))
            gate_block(real, g, u, padded, weight, cast(real, limit))
            unpack(tag, Block(real, g, 0), (1, count), target + first * column * item, (0, column))
    return held[0]  # keeps the scratch alive until here
