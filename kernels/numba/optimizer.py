"""Steps of optimizers: bound by memory, seven passes of it, so everything is done while an element is there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, parallel
from flagops.registry import kernel

from ._blocks import at, of_task, vget, vput, walk
from ._vectors import FLOAT32, TAGS, cast, lanes, load, sqrt, vload_one, vstore

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
    least = max(1, _PIECE // (2 * max(n, 1)))
    for sizes, (*arrays, count) in walk(lead if n else (0,), (1, 1, 1, 1, 1, 1, 1, 0), *tensors):
        parallel(
            _adamw, math.prod(sizes) * pieces, tag, n, pieces, sizes, settings, count[0], *arrays, minimum=least
        )  # fmt: skip


@jit
def _rates(tag, settings, step):
    """What every element is multiplied with, in the arithmetic of its dtype; computed as float64."""
    lr, beta1, beta2, weight_decay, eps, decoupled, sign = settings
    count = float(load(FLOAT32, step))
    rate = lr / (1.0 - beta1**count)
    root = 1.0 / math.sqrt(1.0 - beta2**count)
    shrink, decay = (1.0 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    return (
        cast(tag, sign), cast(tag, shrink), cast(tag, decay), cast(tag, beta1), cast(tag, 1.0 - beta1),
        cast(tag, beta2), cast(tag, 1.0 - beta2), cast(tag, rate), cast(tag, root), cast(tag, eps),
    )  # fmt: skip


@jit
def _stepped(p, g, m, v, rates):
    """Elements of a parameter and of its averages after a step."""
    sign, shrink, decay, beta1, rest1, beta2, rest2, rate, root, eps = rates
    g = g * sign
    if decay != 0:  # else an infinite parameter would make the gradient NaN
        g = g + p * decay
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    return p * shrink - m * rate / (sqrt(v) * root + eps), m, v


@jit
def _adamw(start, stop, tag, n, pieces, sizes, settings, count, param, grad, exp_avg, exp_avg_sq, p_out, m_out, v_out):
    rates, step = _rates(tag, settings, count), lanes(tag)
    for task in range(start, stop):
        row, first = task // pieces, task % pieces * _PIECE
        last = min(n, first + _PIECE)
        p, g, m = of_task(tag, param, sizes, row), of_task(tag, grad, sizes, row), of_task(tag, exp_avg, sizes, row)
        v, new_p = of_task(tag, exp_avg_sq, sizes, row), of_task(tag, p_out, sizes, row)
        new_m, new_v = of_task(tag, m_out, sizes, row), of_task(tag, v_out, sizes, row)
        beside = p.row == g.row == m.row == v.row == new_p.row == new_m.row == new_v.row == 1
        whole = last - (last - first) % step if beside else first
        for i in range(first, whole, step):
            made = _stepped(vget(p, i, 0), vget(g, i, 0), vget(m, i, 0), vget(v, i, 0), rates)
            vput(new_p, i, 0, made[0])
            vput(new_m, i, 0, made[1])
            vput(new_v, i, 0, made[2])
        for i in range(whole, last):
            ones = vload_one(tag, at(p, i, 0)), vload_one(tag, at(g, i, 0)), vload_one(tag, at(m, i, 0))
            one = _stepped(ones[0], ones[1], ones[2], vload_one(tag, at(v, i, 0)), rates)
            vstore(tag, at(new_p, i, 0), one[0])
            vstore(tag, at(new_m, i, 0), one[1])
            vstore(tag, at(new_v, i, 0), one[2])
