"""Products of rows grouped by expert on the CPU: rows are sorted, and each expert that is hit reads its weights once.

Once, that is, for as many of its rows as fit the byte budget. Bound by the bytes of the weights of experts hit
until each has many rows: FP8 and FP4 weights are decoded inside the product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops import config
from flagops.arrays import as_numpy, dtype_name, numpy_dtype
from flagops.backends.numba import parallel, pointer, strides
from flagops.registry import kernel

from .._moe import quantised, refusal
from ._experts_backward import grouped_matmul_backward as grouped_matmul_backward
from ._experts_backward import moe_experts_backward as moe_experts_backward
from ._gemm import View, contract_groups, view
from ._ir import PAIRS
from ._moe_rows import STEP, activate, add_rows, by_expert, gather, round_rows, widen_rows
from ._qmatmul import product, scales
from ._vectors import TAGS

_GRAIN = 1 << 15  # elements worth a thread


@kernel(deterministic=True, paired=PAIRS)
def grouped_matmul(a: Any, b: Any, offsets: Any, out: Any) -> None:
    """The products of all experts together, block of rows after block, through strides."""
    bounds = np.concatenate(([0], as_numpy(offsets)), dtype=np.int64)
    contract_groups(dtype_name(out), view(a), view(b), view(out), bounds)
    as_numpy(out)[bounds[-1] :] = 0


def moe_experts_unsupported(
    x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any,
) -> str | None:  # fmt: skip
    return refusal(x, weights, gate_up, shared)


@kernel(
    deterministic=True, batch_invariant=True, paired=PAIRS,
    note="experts in ascending order, each weight read once for its rows",
)  # fmt: skip
def moe_experts(
    x: Any, weights: Any, indices: Any, gate_up: Any, down: Any, gate_up_scale: Any, down_scale: Any,
    limit: float | None, shared: Any, out: Any,
) -> None:  # fmt: skip
    """Rows are gathered expert after expert, and their outputs added to a sum in the accumulator's format."""
    (rows, width), slots, inner = x.shape, indices.shape[1], gate_up.shape[1] // 2
    if not rows * width:
        return
    name, tag = dtype_name(x), TAGS[dtype_name(x)]
    packed, kept = quantised(gate_up), numpy_dtype(name)
    passed = np.dtype(np.float32) if packed else kept  # what a quantised product takes
    total = np.empty((rows, width), np.float64 if name == "float64" else np.float32)
    few = -(-_GRAIN // width)
    source = (0, 0, 0) if shared is None else (pointer(shared), *strides(shared))
    parallel(widen_rows, rows, tag, width, *source, pointer(total), minimum=few)
    pairs, bounds = by_expert(as_numpy(indices).reshape(-1).astype(np.int64), len(gate_up))
    columns = (width, passed), (inner, passed), (2 * inner, kept), (width, kept)
    per_row = sum(count * dtype.itemsize for count, dtype in columns)
    step = min(len(pairs), max(1, config.budget() // 4 // (per_row + 1)))
    given, h, both, y = (np.empty((step, count), dtype) for count, dtype in columns)
    for first in range(0, len(pairs), step or 1):
        some = pairs[first : first + step]
        tokens, count, within = some // slots, len(some), bounds - first
        parallel(gather, count, tag, width, tokens, pointer(x), *strides(x), packed, pointer(given), minimum=few)
        _project(name, view(given[:count]), gate_up, gate_up_scale, within, view(both[:count]))
        parallel(
            activate, count, tag, inner, pointer(both), some, slots, pointer(weights), *strides(weights),
            math.inf if limit is None else limit, packed, pointer(h), minimum=-(-_GRAIN // (inner + 1)),
        )  # fmt: skip
        _project(name, view(h[:count]), down, down_scale, within, view(y[:count]))
        blocks = -(-width // STEP)
        least = max(1, _GRAIN // (STEP * count))
        parallel(add_rows, blocks, tag, width, tokens, pointer(y), pointer(total), minimum=least)
    parallel(round_rows, rows, tag, width, pointer(total), pointer(out), *strides(out), minimum=few)


def _project(name: str, x: View, weights: Any, scale: Any, bounds: Any, out: View) -> None:
    """``x[i] @ weights[g].T`` for the rows of each expert, rounded to the dtype called `name`."""
    if scale is None:
        contract_groups(name, x, view(weights).T, out, bounds)
    else:
        product("float32", x, None, view(weights), scales(scale), name, out, bounds, narrow=True)
