# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Elements moved: bound by memory."""

import torch
import triton
import triton.language as tl

from flagops.arrays import FLOATS, dtype_name
from flagops.registry import kernel

from .._rows import merged, spread
from ._common import LONGEST, launch
from ._elementwise import BLOCK, NUMBERS, TYPES, bits, cast, elementwise, elementwise_kernel, number, numbered, offset
from ._words import divide, same
from .reductions import cumsum, lead


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


@triton.jit(do_not_specialize=["a", "b"])
def ramp_kernel(
    start, other, out, a, b, n, out_n, GIVEN: tl.constexpr, REAL: tl.constexpr, ENDS: tl.constexpr,
    LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers by their places: from a start by steps, or from the nearer of two ends. What is no tensor is a number."""
    at, here = numbered(n, BLOCK, LONG)
    first = cast(number(a, GIVEN) if start is None else tl.load(start), REAL)
    step = cast(number(b, GIVEN) if other is None else tl.load(other), REAL)
    i = at.to(tl.int64)
    if ENDS:
        last = step
        step = divide(last - first, tl.maximum(n - 1, 1).to(REAL))
        value = tl.where(i < (n + 1) // 2, first + step * i.to(REAL), last - step * (n - 1 - i).to(REAL))
    else:
        value = first + step * i.to(REAL)
    tl.store(out + i * out_n, cast(value, out.dtype.element_ty), here)


def _ramp(start: torch.Tensor, other: torch.Tensor, n: int, dtype: str, ends: bool, out: torch.Tensor) -> None:
    if not n:
        return
    kind = dtype_name(start)
    given = [bits(x, kind) for x in (start, other)]
    tensors = [x if isinstance(x, torch.Tensor) else None for x in given]
    numbers = [0 if isinstance(x, torch.Tensor) else x for x in given]
    launch(
        ramp_kernel, (triton.cdiv(n, BLOCK),), out.device, *tensors, out, *numbers, n, out.stride(0),
        GIVEN=TYPES[kind], REAL=TYPES["float64" if dtype in FLOATS else "int64"], ENDS=ends, LONG=n > LONGEST,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@kernel(deterministic=True)
def arange(start: torch.Tensor, step: torch.Tensor, n: int, dtype: str, out: torch.Tensor) -> None:
    """Each number by its place."""
    _ramp(start, step, n, dtype, False, out)


@kernel(deterministic=True)
def linspace(start: torch.Tensor, end: torch.Tensor, n: int, dtype: str, out: torch.Tensor) -> None:
    """Each number from the nearer end."""
    _ramp(start, end, n, dtype, True, out)


@triton.jit
def nonzero_kernel(mask, ends, places, count, n, mask_n, places_n, LONG: tl.constexpr, BLOCK: tl.constexpr):
    """By how many hold up to each place; those that do not are cleared behind the last, in their order."""
    at, here = numbered(n, BLOCK, LONG)
    at = at.to(tl.int64)
    holds = tl.load(mask + at * mask_n, here, other=0) != 0
    so_far = tl.load(ends + at, here, other=0)
    total = tl.load(ends + n - 1)
    tl.store(places + tl.where(holds, so_far - 1, total + at - so_far) * places_n, tl.where(holds, at, -1), here)
    tl.store(count, total)


@kernel(deterministic=True)
def nonzero(mask: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Those that hold are counted along the mask first."""
    (places, count), (n,) = out, mask.shape
    if not n:
        elementwise(same, count, [0], ["int64"])
        return
    ends = torch.empty_like(places, memory_format=torch.contiguous_format)
    cumsum(mask, "int64", ends)
    launch(
        nonzero_kernel, (triton.cdiv(n, BLOCK),), places.device, mask, ends, places, count, n, mask.stride(0),
        places.stride(0), LONG=n > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
