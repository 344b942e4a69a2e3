"""Steps of optimizers: bound by memory, seven passes of it, so everything is done while an element is there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel
from flagops.registry import kernel

from ._blocks import Block, get, of_task, put, vget, vput, walk
from ._vectors import FLOAT32, TAGS, cast, lanes, load, sqrt, wide

_PIECE = 1 << 14  # elements of a task


@kernel(deterministic=True, batch_invariant=True)
def adamw(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    step: Any,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
    out: Any,
) -> None:
    """Pieces of rows, by whole vectors where elements lie side by side."""
    n = param.shape[-1]
    tag = TAGS[dtype_name(param)]
    pieces = max(1, -(-n // _PIECE))
    lead = np.broadcast_shapes(*(tuple(x.shape[:-1]) for x in (param, grad, exp_avg, exp_avg_sq)))
    settings = (lr, beta1, beta2, weight_decay, eps, decoupled, -1.0 if maximize else 1.0)
    tensors = (param, grad, exp_avg, exp_avg_sq, *out, step)
    for sizes, (*arrays, count) in walk(lead if n else (0,), (1, 1, 1, 1, 1, 1, 1, 0), *tensors):
        tasks = math.prod(sizes) * pieces
        parallel(_adamw, tasks, tag, n, pieces, sizes, settings, count[0], *arrays, minimum=max(1, _PIECE // (2 * max(n, 1))))


@jit
def _stepped(p, g, m, v, shrink, decay, beta1, beta2, rate, root, eps, sign):
    """The element of a parameter and of its averages after a step; of vectors or of numbers."""
    g = g * sign + p * decay
    m = m * beta1 + g * (wide_of(beta1) - beta1)
    v = v * beta2 + g * g * (wide_of(beta2) - beta2)
    return p * shrink - m * rate / (sqrt(v) * root + eps), m, v


@jit
def wide_of(x):
    return x / x if x != 0 else x + 1
