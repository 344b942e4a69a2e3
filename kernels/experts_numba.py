"""Products of rows grouped by expert on the CPU: rows are sorted, and each expert that is hit reads its weights once.

Once, that is, for as many of its rows as fit the byte budget. FP8 and FP4 weights are decoded inside the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import as_numpy, dtype_name, numpy_dtype
from flagops.backends.numba import parallel, pointer, strides
from flagops.registry import kernel

from ._gemm import TAGS, View, contract, view
from ._moe import quantised, refusal
from ._moe_rows import STEP, activate, add_rows, gather, round_rows, widen_rows
from ._qmatmul import product, scales

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True)
def grouped_matmul(a: Any, b: Any, offsets: Any, out: Any) -> None:
    """One product for each expert that has rows, through strides."""
    name, left, right, target = dtype_name(out), view(a), view(b), view(out)
    start = 0
    for expert, stop in enumerate(int(end) for end in offsets):
        if stop > start:
            weight = View(right.address + expert * right.strides[0] * b.itemsize, right.shape[1:], right.strides[1:])
            contract(name, _rows(left, start, stop, a.itemsize), weight, _rows(target, start, stop, a.itemsize))
        start = stop
    as_numpy(out)[start:] = 0


def _rows(x: View, start: int, stop: int, item: int) -> View:
    return View(x.address + start * x.strides[0] * item, (stop - start, *x.shape[1:]), x.strides)


def moe_experts_unsupported(
    x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any,
) -> str | None:  # fmt: skip
    return refusal(x, weights, gate_up, shared)


@kernel(deterministic=True, batch_invariant=True, note="experts in ascending order, each weight read once for its rows")
def moe_experts(
    x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any, out: Any,
) -> None:  # fmt: skip
    """The rows of an expert are gathered, and its outputs added to a sum in the accumulator's format."""
    (rows, width), slots, inner = x.shape, indices.shape[1], gate_up.shape[1] // 2
    if not rows * width:
        return
    name, tag = dtype_name(x), TAGS[dtype_name(x)]
    packed, item, kept = quantised(gate_up), x.itemsize, numpy_dtype(dtype_name(x))
    passed = np.dtype(np.float32) if packed else kept
    real = np.float64 if name == "float64" else np.float32
    total = np.empty((rows, width), real)
    few = -(-_GRAIN // width)
    source = (0, 0, 0) if shared is None else (pointer(shared), *strides(shared))
    parallel(widen_rows, rows, tag, width, *source, pointer(total), minimum=few)
    per_row = (width + inner) * passed.itemsize + (width + 2 * inner) * item
    for expert, pairs in _grouped(as_numpy(indices)):
        step = max(1, config.budget() // 4 // (per_row + 1))
        for some in (pairs[first : first + step] for first in range(0, len(pairs), step)):
            tokens, count = some // slots, len(some)
            given, both = np.empty((count, width), passed), np.empty((count, 2 * inner), kept)
            h, y = np.empty((count, inner), passed), np.empty((count, width), kept)
            parallel(
                gather, count, tag, width, tokens, pointer(x), *strides(x), packed, pointer(given), minimum=few
            )  # fmt: skip
            _project(name, given, gate_up, gate_up_scale, expert, both)
            parallel(
                activate, count, tag, inner, pointer(both), some, slots, pointer(weights), *strides(weights),
                math.inf if limit is None else limit, packed, pointer(h), minimum=-(-_GRAIN // (inner + 1)),
            )  # fmt: skip
            _project(name, h, down, down_scale, expert, y)
            blocks = -(-width // STEP)
            least = max(1, _GRAIN // (STEP * count))
            parallel(add_rows, blocks, tag, width, tokens, pointer(y), pointer(total), minimum=least)
    parallel(round_rows, rows, tag, width, pointer(total), pointer(out), *strides(out), minimum=few)


def _grouped(indices: Any) -> Iterator[tuple[int, Any]]:
    """Each expert that is hit, in ascending order, with its pairs of token and slot in theirs."""
    flat = indices.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    yield from zip(experts.tolist(), np.split(order, starts[1:]), strict=True) if len(flat) else ()


def _project(name: str, x: Any, weights: Any, scale: Any, expert: int, out: Any) -> None:
    """``x @ weights[expert].T``, rounded to the dtype called `name`."""
    weight = weights[expert]
    if scale is None:
        contract(name, view(x), view(weight).T, view(out))
    else:
        product("float32", view(x), None, view(weight), scales(scale[expert]), name, view(out))
