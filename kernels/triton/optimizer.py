# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Steps of optimizers: bound by memory, seven passes of it, so everything is done while an element is there."""

import math

import torch
import triton
import triton.language as tl

from flagops.arrays import arithmetic, dtype_name
from flagops.registry import kernel

from ._common import LONGEST, chip, keeping_subnormals, launch
from ._elementwise import BLOCK, TYPES, axes, bits, cast, number, offset
from ._words import WORDS, divide, sqrt

PIECES = 8
"""Blocks of a program where there are many: its rates, computed in float64, cost as much as a block."""

expm1 = WORDS["expm1"]


@triton.jit
def _rest(log_beta, count):
    """``1 - beta ** count``."""
    return -expm1(log_beta * count)


@triton.jit(do_not_specialize=["lr", "decay", "eps", "beta1", "beta2", "log_beta1", "log_beta2", "number_of_step"])
def adamw_kernel(
    outs, tensors, step, lr, decay, eps, beta1, beta2, log_beta1, log_beta2, number_of_step,
    sizes, out_steps, steps, count,
    ACC: tl.constexpr, DECOUPLED: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    LONG: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    lr, decay, eps = number(lr, tl.float64), number(decay, tl.float64), number(eps, ACC)
    beta1, beta2 = number(beta1, tl.float64), number(beta2, tl.float64)
    done = number(number_of_step, tl.float64) if step is None else tl.load(step).to(tl.float64)
    rate = (lr / _rest(number(log_beta1, tl.float64), done)).to(ACC)
    root = (1 / tl.sqrt(_rest(number(log_beta2, tl.float64), done))).to(ACC)
    shrink, decay = (1 - lr * decay).to(ACC), decay.to(ACC)
    rest1, rest2, beta1, beta2 = (1 - beta1).to(ACC), (1 - beta2).to(ACC), beta1.to(ACC), beta2.to(ACC)
    first = tl.program_id(0)
    if LONG:
        first = first.to(tl.int64)
    for piece in range(PIECES):
        at = (first * PIECES + piece) * BLOCK + tl.arange(0, BLOCK)
        here = at < count
        p = cast(tl.load(tensors[0] + offset(at, sizes, steps[0]), here, other=0), ACC)
        g = cast(tl.load(tensors[1] + offset(at, sizes, steps[1]), here, other=0), ACC)
        m = cast(tl.load(tensors[2] + offset(at, sizes, steps[2]), here, other=0), ACC)
        v = cast(tl.load(tensors[3] + offset(at, sizes, steps[3]), here, other=0), ACC)
        if MAXIMIZE:
            g = -g
        if DECOUPLED:
            p_kept = p * shrink
        else:
            p_kept = p
            if DECAY:  # else an infinite parameter would make the gradient NaN
                g += p * decay
        m = m * beta1 + g * rest1
        v = v * beta2 + g * g * rest2
        p = p_kept - divide(m * rate, sqrt(v) * root + eps)
        dtype: tl.constexpr = outs[0].dtype.element_ty
        tl.store(outs[0] + offset(at, sizes, out_steps[0]), cast(p, dtype), here)
        tl.store(outs[1] + offset(at, sizes, out_steps[1]), cast(m, dtype), here)
        tl.store(outs[2] + offset(at, sizes, out_steps[2]), cast(v, dtype), here)


@kernel(deterministic=True, batch_invariant=True)
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """A program for several blocks of elements."""
    count = out[0].numel()
    if not count:
        return
    outs, tensors = tuple(out), (param, grad, exp_avg, exp_avg_sq)
    sizes, steps = axes(*outs, *tensors)
    done = bits(step, "float64")
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    numbers = [bits(x, "float64") for x in (lr, weight_decay, eps, beta1, beta2, *logs)]
    programs = triton.cdiv(count, BLOCK)
    pieces = PIECES if programs >= 8 * PIECES * chip(out[0].device).processors else 1
    launch(
        adamw_kernel, (triton.cdiv(programs, pieces),), out[0].device, outs, tensors,
        done if isinstance(done, torch.Tensor) else None, *numbers, 0 if isinstance(done, torch.Tensor) else done,
        sizes, tuple(steps[:3]), tuple(steps[3:]), count, ACC=TYPES[arithmetic(dtype_name(param))],
        DECOUPLED=decoupled, DECAY=bool(weight_decay), MAXIMIZE=maximize, LONG=count > LONGEST, BLOCK=BLOCK,
        PIECES=pieces, num_warps=4, **keeping_subnormals(out[0].device),
    )  # fmt: skip
