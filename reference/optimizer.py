"""Steps of optimizers, each in one pass over a parameter and its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Tensor, operator
from flagops.scalars import flag, real

from ._rounding import Array, accumulator, magnitude, unit, wide


def _variances(rng: Any, shape: tuple[int, ...], dtype: str, dims: Any) -> Array:
    from flagops.arrays import numpy_dtype

    return np.asarray(rng.exponential(size=shape) * np.exp2(rng.integers(-20, 4))).astype(numpy_dtype(dtype))


def _count(rng: Any, shape: tuple[int, ...], dtype: str, dims: Any) -> Array:
    return np.asarray(rng.integers(1, 1000), np.float32)


@operator(
    name="aten.adamw",
    tensors={
        "param": Tensor("... n", FLOATS),
        "grad": Tensor("... n", "param"),
        "exp_avg": Tensor("... n", "param"),
        "exp_avg_sq": Tensor("... n", "param", draw=_variances),
        "step": Tensor("", ("float32",), draw=_count),
    },
    scalars={
        "lr": real((1e-3, 0.1)),
        "beta1": real((0.9, 0.0, 0.5), least=0),
        "beta2": real((0.999, 0.9), least=0),
        "weight_decay": real((0.01, 0.0)),
        "eps": real((1e-8, 1e-3), least=0),
        "decoupled": flag(),
        "maximize": flag((False, True)),
    },
    result={name: Tensor("... n", "param") for name in ("out_param", "out_exp_avg", "out_exp_avg_sq")},
    workloads={f"28M.{dtype}": {"batch": (49152,), "n": 576, "dtype": dtype} for dtype in ("float32", "bfloat16")},
    flops=lambda dims, batch: 14.0 * math.prod(batch) * dims["n"],
    inplace={"out_param": "param", "out_exp_avg": "exp_avg", "out_exp_avg_sq": "exp_avg_sq"},
)
def adamw(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    step: Array,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    decoupled: bool = True,
    maximize: bool = False,
) -> tuple[Array, Array, Array]:
    """One step of AdamW, or of Adam with a decay in the gradient.

    Args:
        param, grad, exp_avg, exp_avg_sq: ``[..., n]``, floats of one dtype, any strides.
        step: the number of this step, from 1 on, float32 without axes.
        lr, beta1, beta2, weight_decay, eps: as in the paper.
        decoupled: shrink the parameter itself (AdamW); else the decay is part of the gradient (Adam).
        maximize: climb.
        out: a tuple of three such arrays, which may be `param`, `exp_avg` and `exp_avg_sq` themselves.

    Returns:
        ``(param, exp_avg, exp_avg_sq)`` after the step. Everything is float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: dtypes differ, or an argument is no array.
        ValueError: shapes do not fit, or a coefficient is negative.

    Source: Loshchilov and Hutter, arXiv 1711.05101, as in torch's ``aten::_fused_adamw_`` and ``aten::_fused_adam_``.
    """
    param, grad, exp_avg, exp_avg_sq = map(wide, (param, grad, exp_avg, exp_avg_sq))
    grad = -grad if maximize else grad
    if decoupled:
        param = param * (1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    first, second = (1 - np.power(float(beta), float(step)) for beta in (beta1, beta2))
    made = param - lr / first * exp_avg / (np.sqrt(exp_avg_sq) / math.sqrt(second) + eps)
    made, exp_avg, exp_avg_sq = np.broadcast_arrays(made, exp_avg, exp_avg_sq)
    return made, exp_avg, exp_avg_sq


def adamw_bound(
    exact: tuple[Array, Array, Array], arguments: Mapping[str, Any], dtypes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """The roundings of each line, carried through the quotient."""
    acc, out = unit(accumulator(dtypes[0])), unit(dtypes[0])
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    param, grad, exp_avg, exp_avg_sq = (magnitude(wide(arguments[name])) for name in names)
    grad = grad if arguments["decoupled"] else grad + abs(arguments["weight_decay"]) * param
    first, second = (1 - np.power(float(arguments[b]), float(arguments["step"])) for b in ("beta1", "beta2"))
    average = 5 * acc.u * (exp_avg + grad) + 8 * acc.tiny
    square = 7 * acc.u * (exp_avg_sq + grad * grad) + 8 * acc.tiny
    root = np.sqrt(magnitude(exact[2]))
    low = np.sqrt(np.maximum(magnitude(exact[2]) - square, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        least = low / math.sqrt(second) + arguments["eps"]
        rate = abs(arguments["lr"]) / first
        moved = rate * (magnitude(exact[1]) + average) / least
        divisor = (root - low + 4 * acc.u * root) / math.sqrt(second) / least
        lost = (rate * average + acc.tiny) / least + moved * (divisor + 10 * acc.u)
        lost = np.where(np.isfinite(lost), lost, np.inf) + 6 * acc.u * param + 4 * acc.tiny
    fits = (grad * grad < acc.largest / 4) & (rate * magnitude(exact[1]) < acc.largest / 4)
    errors = lost, average, square
    return tuple(  # type: ignore[return-value]
        np.where(fits, error + (0 if out == acc else out.u * (magnitude(x) + error) + out.tiny), np.inf)
        for x, error in zip(exact, errors, strict=True)
    )
