# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A row from a whole row: bound by memory. Rows that fit into registers are read once, longer ones again for each pass,
most of which the cache has."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from flagops.arrays import arithmetic, dtype_name
from flagops.registry import kernel

from ._common import keeping_subnormals, launch
from ._elementwise import BLOCK, TYPES, bits, cast, number, offset
from ._words import WORDS, divide, sqrt
from .reductions import ADD, fold, lead

WHOLE = 8192
"""Elements of a row that a program keeps."""
TOGETHER = 1024
"""Elements of short rows that share a program."""
LINES = 128
"""Rows whose columns a program sums."""

exp, log = WORDS["exp"], WORDS["log"]


@triton.jit
def _place(first, here, n, step, BLOCK: tl.constexpr):
    """Where a tile's elements of a row lie, and which there are."""
    at = first + tl.arange(0, BLOCK)
    return (at.to(tl.int64) * step)[None, :], here[:, None] & (at < n)[None, :]


@triton.jit
def _values(x, first, here, n, step, ACC: tl.constexpr, BLOCK: tl.constexpr):
    place, inside = _place(first, here, n, step, BLOCK)
    return cast(tl.load(x + place, inside, other=0), ACC)


@triton.jit
def _factor(weight, first, n, step, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    return cast(tl.load(weight + at.to(tl.int64) * step, at < n, other=0), ACC)[None, :]


@triton.jit
def _program(count, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < count


@triton.jit
def softmax_kernel(
    x, out, count, n, sizes, x_steps, out_steps, x_n, out_n,
    ACC: tl.constexpr, LOG: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, here = _program(count, ROWS)
    x += offset(row, sizes, x_steps)[:, None]
    out += offset(row, sizes, out_steps)[:, None]
    top = tl.full((ROWS,), float("-inf"), ACC)
    mass = tl.zeros((ROWS,), ACC)
    value = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        _, inside = _place(first, here, n, x_n, BLOCK)
        value = _values(x, first, here, n, x_n, ACC, BLOCK)
        top = tl.maximum(top, tl.max(tl.where(inside, value, float("-inf")), 1))
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        _, inside = _place(first, here, n, x_n, BLOCK)
        if not ONE:
            value = _values(x, first, here, n, x_n, ACC, BLOCK)
        mass += tl.sum(tl.where(inside, exp(value - top[:, None]), 0), 1)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        place, inside = _place(first, here, n, out_n, BLOCK)
        if not ONE:
            value = _values(x, first, here, n, x_n, ACC, BLOCK)
        below = value - top[:, None]
        made = below - log(mass)[:, None] if LOG else divide(exp(below), mass[:, None])
        tl.store(out + place, cast(made, out.dtype.element_ty), inside)


@triton.jit
def softmax_backward_kernel(
    grad, output, out, count, n, sizes, g_steps, y_steps, out_steps, g_n, y_n, out_n,
    ACC: tl.constexpr, LOG: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, here = _program(count, ROWS)
    grad += offset(row, sizes, g_steps)[:, None]
    output += offset(row, sizes, y_steps)[:, None]
    out += offset(row, sizes, out_steps)[:, None]
    total = tl.zeros((ROWS,), ACC)
    g = tl.zeros((ROWS, BLOCK), ACC)
    y = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        g = _values(grad, first, here, n, g_n, ACC, BLOCK)
        y = _values(output, first, here, n, y_n, ACC, BLOCK)
        total += tl.sum(g if LOG else g * y, 1)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        place, inside = _place(first, here, n, out_n, BLOCK)
        if not ONE:
            g = _values(grad, first, here, n, g_n, ACC, BLOCK)
            y = _values(output, first, here, n, y_n, ACC, BLOCK)
        made = g - exp(y) * total[:, None] if LOG else (g - total[:, None]) * y
        tl.store(out + place, cast(made, out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["eps"])
def layer_norm_kernel(
    x, weight, bias, out, out_mean, out_rstd, eps, count, n, sizes, x_steps, out_steps, mean_steps, rstd_steps,
    x_n, weight_n, bias_n, out_n, ACC: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, here = _program(count, ROWS)
    x += offset(row, sizes, x_steps)[:, None]
    out += offset(row, sizes, out_steps)[:, None]
    total, squares = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    value = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        value = _values(x, first, here, n, x_n, ACC, BLOCK)
        total += tl.sum(value, 1)
    length = tl.full((ROWS,), n, ACC)
    mean = divide(total, tl.maximum(length, 1))
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        _, inside = _place(first, here, n, x_n, BLOCK)
        if not ONE:
            value = _values(x, first, here, n, x_n, ACC, BLOCK)
        distance = tl.where(inside, value - mean[:, None], 0)
        squares += tl.sum(distance * distance, 1)
    rstd = divide(1.0, sqrt(divide(squares, length) + number(eps, ACC)))
    tl.store(out_mean + offset(row, sizes, mean_steps), cast(mean, out_mean.dtype.element_ty), here)
    tl.store(out_rstd + offset(row, sizes, rstd_steps), cast(rstd, out_rstd.dtype.element_ty), here)
    for first in range(0, tl.cast(n, tl.int64), BLOCK):
        place, inside = _place(first, here, n, out_n, BLOCK)
        if not ONE:
            value = _values(x, first, here, n, x_n, ACC, BLOCK)
        made = (value - mean[:, None]) * rstd[:, None]
        if weight is not None:
            made *= _factor(weight, first, n, weight_n, ACC, BLOCK)
        if bias is not None:
            made += _factor(bias, first, n, bias_n, ACC, BLOCK)
        tl.store(out + place, cast(made, out.dtype.element_ty), inside)


@triton.jit
def layer_norm_backward_kernel(
    grad, x, mean, rstd, weight, out, count, n, g_m, x_m, mean_m, rstd_m, out_m, g_n, x_n, weight_n, out_n,
    ACC: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, here = _program(count, ROWS)
    grad += (row * g_m)[:, None]
    x += (row * x_m)[:, None]
    out += (row * out_m)[:, None]
    center = cast(tl.load(mean + row * mean_m, here, other=0), ACC)[:, None]
    r = cast(tl.load(rstd + row * rstd_m, here, other=0), ACC)[:, None]
    total, dot = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    own, y = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, BLOCK), ACC)
    for step in tl.static_range(2):
        for first in range(0, tl.cast(n, tl.int64), BLOCK):
            place, inside = _place(first, here, n, out_n, BLOCK)
            if step == 0 or not ONE:
                own = _values(grad, first, here, n, g_n, ACC, BLOCK)
                if weight is not None:
                    own *= _factor(weight, first, n, weight_n, ACC, BLOCK)
                y = tl.where(inside, (_values(x, first, here, n, x_n, ACC, BLOCK) - center) * r, 0)
            if step == 0:
                total += tl.sum(own, 1)
                dot += tl.sum(own * y, 1)
            else:
                length = tl.full((ROWS,), n, ACC)
                made = (own - divide(total, length)[:, None] - y * divide(dot, length)[:, None]) * r
                tl.store(out + place, cast(made, out.dtype.element_ty), inside)


@triton.jit
def columns_kernel(
    grad, x, mean, rstd, dots, sums, m, n, g_m, x_m, mean_m, rstd_m, g_n, x_n, parts,
    ACC: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of some rows' columns, ``[n, parts]``."""
    part = (tl.program_id(0) % parts).to(tl.int64)
    column = (tl.program_id(0) // parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dot, total = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for first in range(part * LINES, min(part * LINES + LINES, m), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        here = row < m
        inside = here[:, None] & (column < n)[None, :]
        g = cast(tl.load(grad + (row * g_m)[:, None] + (column * g_n)[None, :], inside, other=0), ACC)
        value = cast(tl.load(x + (row * x_m)[:, None] + (column * x_n)[None, :], inside, other=0), ACC)
        center = cast(tl.load(mean + row * mean_m, here, other=0), ACC)[:, None]
        r = cast(tl.load(rstd + row * rstd_m, here, other=0), ACC)[:, None]
        dot += tl.sum(tl.where(inside, g * ((value - center) * r), 0), 0)
        total += tl.sum(g, 0)
    tl.store(dots + column * parts + part, dot, column < n)
    tl.store(sums + column * parts + part, total, column < n)


@triton.jit(do_not_specialize=["ignore"])
def nll_loss_kernel(
    x, target, weight, losses, shares, ignore, count, classes, sizes, x_steps, target_steps, loss_steps, share_steps,
    x_c, weight_c, ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, here = _program(count, ROWS)
    at = tl.load(target + offset(row, sizes, target_steps), here, other=0).to(tl.int64)
    counts = here & (at != ignore) & (at >= 0) & (at < classes)
    value = cast(tl.load(x + offset(row, sizes, x_steps) + at * x_c, counts, other=0), ACC)
    share = tl.where(counts, 1.0, 0.0).to(ACC)
    if weight is not None:
        share = cast(tl.load(weight + at * weight_c, counts, other=0), ACC)
    loss = tl.where(counts, share * value * -1, 0)
    tl.store(losses + offset(row, sizes, loss_steps), cast(loss, losses.dtype.element_ty), here)
    tl.store(shares + offset(row, sizes, share_steps), cast(share, shares.dtype.element_ty), here)


@triton.jit(do_not_specialize=["ignore"])
def nll_loss_backward_kernel(
    grad, target, weight, out, ignore, count, classes, blocks, sizes, g_steps, target_steps, out_steps, weight_c, out_c,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < count
    out += offset(row, sizes, out_steps)[:, None]
    at = tl.load(target + offset(row, sizes, target_steps), here, other=0).to(tl.int64)
    counts = here & (at != ignore) & (at >= 0) & (at < classes)
    value = cast(tl.load(grad + offset(row, sizes, g_steps), here, other=0), ACC) * -1
    if weight is not None:
        value *= cast(tl.load(weight + at * weight_c, counts, other=0), ACC)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    place, inside = _place(first, here, classes, out_c, BLOCK)
    chosen = counts[:, None] & (at[:, None] == (first + tl.arange(0, BLOCK))[None, :])
    tl.store(out + place, cast(tl.where(chosen, value[:, None], 0), out.dtype.element_ty), inside)


def _tile(n: int, count: int, acc: str) -> tuple[tuple[int], dict[str, Any]]:
    """The grid over rows, and what a program has of them: of 32 bits few enough for each thread that nothing spills."""
    block = min(WHOLE, triton.next_power_of_2(max(n, 16)))
    together = max(1, TOGETHER // block)
    words = max(block, TOGETHER) * (2 if acc == "float64" else 1)
    warps = min(16, max(4, words // 256))
    shaped = {"ROWS": together, "BLOCK": block, "ONE": n <= block, "num_warps": warps}
    return (triton.cdiv(count, together),), shaped


def _softmax(x: torch.Tensor, dtype: str, out: torch.Tensor, log: bool) -> None:
    *shape, n = out.shape
    if not out.numel():
        return
    sizes, (x_steps, out_steps) = lead(x, out, shape=tuple(shape))
    grid, shaped = _tile(n, math.prod(shape), arithmetic(dtype))
    launch(
        softmax_kernel, grid, out.device, x, out, math.prod(shape), n, sizes, x_steps, out_steps, x.stride(-1),
        out.stride(-1), ACC=TYPES[arithmetic(dtype)], LOG=log, **shaped, **keeping_subnormals(out.device),
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def softmax(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    _softmax(x, dtype, out, False)


@kernel(deterministic=True, batch_invariant=True)
def log_softmax(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    _softmax(x, dtype, out, True)


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dtype: str, out: torch.Tensor, log: bool) -> None:
    *shape, n = out.shape
    if not out.numel():
        return
    grad, output = grad.expand(out.shape), output.expand(out.shape)
    sizes, (g_steps, y_steps, out_steps) = lead(grad, output, out, shape=tuple(shape))
    grid, shaped = _tile(n, math.prod(shape), arithmetic(dtype))
    launch(
        softmax_backward_kernel, grid, out.device, grad, output, out, math.prod(shape), n, sizes, g_steps, y_steps,
        out_steps, grad.stride(-1), output.stride(-1), out.stride(-1), ACC=TYPES[arithmetic(dtype)], LOG=log, **shaped,
        **keeping_subnormals(out.device),
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def softmax_backward(grad: torch.Tensor, output: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    _softmax_backward(grad, output, dtype, out, False)


@kernel(deterministic=True, batch_invariant=True)
def log_softmax_backward(grad: torch.Tensor, output: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    _softmax_backward(grad, output, dtype, out, True)


def _acc(x: torch.Tensor) -> str:
    return arithmetic(dtype_name(x))


def _step(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(-1)


@kernel(deterministic=True, batch_invariant=True)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    stats: str,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The mean first, then distances from it."""
    y, mean, rstd = out
    *shape, n = x.shape
    if not math.prod(shape):
        return
    sizes, (x_steps, *steps) = lead(x, y, mean, rstd, shape=tuple(shape))
    grid, shaped = _tile(n, math.prod(shape), _acc(x))
    launch(
        layer_norm_kernel, grid, y.device, x, weight, bias, y, mean, rstd, bits(eps, "float64"), math.prod(shape), n,
        sizes, x_steps, *steps, x.stride(-1), _step(weight), _step(bias), y.stride(-1), ACC=TYPES[_acc(x)], **shaped,
        **keeping_subnormals(y.device),
    )  # fmt: skip


@kernel(deterministic=True)
def layer_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    sums: str,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Columns are summed some rows at a time, and those sums by a reduction."""
    dx, dweight, dbias = out
    m, n = x.shape
    if not n:
        return
    acc, options = TYPES[_acc(x)], keeping_subnormals(dx.device)
    if m:
        grid, shaped = _tile(n, m, _acc(x))
        launch(
            layer_norm_backward_kernel, grid, dx.device, grad, x, mean, rstd, weight, dx, m, n, grad.stride(0),
            x.stride(0), mean.stride(0), rstd.stride(0), dx.stride(0), grad.stride(1), x.stride(1), _step(weight),
            dx.stride(1), ACC=acc, **shaped, **options,
        )  # fmt: skip
    parts = max(1, triton.cdiv(m, LINES))
    dots, totals = (x.new_empty((n, parts), dtype=getattr(torch, _acc(x))) for _ in range(2))
    launch(
        columns_kernel, (triton.cdiv(n, 64) * parts,), dx.device, grad, x, mean, rstd, dots, totals, m, n,
        grad.stride(0), x.stride(0), mean.stride(0), rstd.stride(0), grad.stride(1), x.stride(1), parts, ACC=acc,
        LINES=LINES, ROWS=16, BLOCK=64, num_warps=4, **options,
    )  # fmt: skip
    fold(ADD, dots, _acc(x), _acc(x), dweight)
    fold(ADD, totals, _acc(x), _acc(x), dbias)


@kernel(deterministic=True, batch_invariant=True)
def nll_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    losses, shares = out
    count = losses.numel()
    if not count:
        return
    sizes, (x_steps, *steps) = lead(x, target, losses, shares, shape=tuple(losses.shape), own=(1, 0, 0, 0))
    launch(
        nll_loss_kernel, (triton.cdiv(count, 256),), losses.device, x, target, weight, losses, shares, ignore, count,
        x.shape[-1], sizes, x_steps, *steps, x.stride(-1), _step(weight), ACC=TYPES[_acc(x)], ROWS=256, num_warps=4,
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def nll_loss_backward(
    grad: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    classes: int,
    ignore: int,
    out: torch.Tensor,
) -> None:
    *shape, n = out.shape
    if not out.numel():
        return
    sizes, (g_steps, target_steps, out_steps) = lead(grad, target, out, shape=tuple(shape), own=(0, 0, 1))
    block = min(BLOCK, triton.next_power_of_2(n))
    together, blocks = BLOCK // block, triton.cdiv(n, block)
    count = math.prod(shape)
    launch(
        nll_loss_backward_kernel, (triton.cdiv(count, together) * blocks,), out.device, grad, target,
        weight, out, ignore, count, n, blocks, sizes, g_steps, target_steps, out_steps, _step(weight), out.stride(-1),
        ACC=TYPES[_acc(grad)], ROWS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
