# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Elements moved: bound by memory."""

import torch
import triton
import triton.language as tl

from flagops.arrays import dtype_name
from flagops.registry import kernel

from .._rows import merged, spread
from ._common import LONGEST, launch
from ._elementwise import BLOCK, NUMBERS, TYPES, elementwise, elementwise_kernel, numbered, offset
from ._words import same
from .reductions import lead


@kernel(deterministic=True, batch_invariant=True)
def copy(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Elements moved, and brought to another dtype on the way."""
    elementwise(same, out, [x], [dtype])


@kernel(deterministic=True)
def flip(x: torch.Tensor, axes: int, out: torch.Tensor) -> None:
    """From the last element on, by steps backwards."""
    if not out.numel():
        return
    turned = [axis >= x.dim() - axes for axis in range(x.dim())]
    own = tuple(-step if back else step for step, back in zip(x.stride(), turned, strict=True))
    last = sum((n - 1) * step for n, step, back in zip(x.shape, x.stride(), turned, strict=True) if back)
    shape = tuple(out.shape)
    sizes, (out_steps, steps) = merged(shape, [spread(shape, s, len(shape), 0) for s in (out.stride(), own)])
    launch(
        elementwise_kernel, (triton.cdiv(out.numel(), BLOCK),), out.device, out,
        (x.as_strided((1,), (1,), x.storage_offset() + last),), *(0,) * NUMBERS, tuple(sizes[:0:-1]),
        tuple(out_steps[::-1]), (tuple(steps[::-1]),), out.numel(), LANE=same,
        KINDS=(TYPES[dtype_name(x)],), LONG=out.numel() > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def triangle_kernel(
    x, out, count, m, n, sizes, x_steps, out_steps, x_m, x_n, out_m, out_n, diagonal,
    LOWER: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, here = numbered(count, BLOCK, LONG)
    column, row, matrix = (at % n).to(tl.int64), (at // n % m).to(tl.int64), at // n // m
    kept = column - row <= diagonal if LOWER else column - row >= diagonal
    place = offset(matrix, sizes, x_steps) + row * x_m + column * x_n
    value = tl.load(x + place, here & kept, other=0)
    tl.store(out + offset(matrix, sizes, out_steps) + row * out_m + column * out_n, value, here)


def _triangle(x: torch.Tensor, diagonal: int, out: torch.Tensor, lower: bool) -> None:
    count = out.numel()
    if not count:
        return
    *shape, m, n = out.shape
    sizes, (x_steps, out_steps) = lead(x, out, shape=tuple(shape))
    launch(
        triangle_kernel, (triton.cdiv(count, BLOCK),), out.device, x, out, count, m, n, sizes, x_steps, out_steps,
        x.stride(-2), x.stride(-1), out.stride(-2), out.stride(-1), min(max(diagonal, -m), n), LOWER=lower,
        LONG=count > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def tril(x: torch.Tensor, diagonal: int, out: torch.Tensor) -> None:
    _triangle(x, diagonal, out, True)


@kernel(deterministic=True, batch_invariant=True)
def triu(x: torch.Tensor, diagonal: int, out: torch.Tensor) -> None:
    _triangle(x, diagonal, out, False)
