# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Elements by their order, by whole numbers of the same order: see `_order`."""

import torch
import triton
import triton.language as tl

from flagops.arrays import arithmetic, dtype_name
from flagops.registry import kernel

from ._common import LONGEST, launch, too_long
from ._elementwise import BLOCK, TYPES, axes, bits, cast, elementwise, number, numbered, offset
from ._order import order, search
from ._words import same
from .indexing import pick


@triton.jit
def rising(x):
    """A whole number in the order of the elements: zeros are equal, and NaN is the greatest."""
    if x.dtype.is_floating():
        if x.dtype == tl.float64:
            number = tl.where(x == 0, 0.0, x).to(tl.int64, bitcast=True)
            number = tl.where(number < 0, number ^ 0x7FFFFFFFFFFFFFFF, number)
            number = tl.where(x == x, number, 0x7FFFFFFFFFFFFFFF)
        else:
            number = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
            number = tl.where(number < 0, number ^ 0x7FFFFFFF, number)
            number = tl.where(x == x, number, 0x7FFFFFFF)
    else:
        number = x
    return number


@triton.jit
def falling(x):
    return rising(x) ^ -1


def _chosen(x: torch.Tensor, k: int, descending: bool, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    values, indices = out
    if not k or not values.numel():
        return
    dtype = dtype_name(x)
    long = dtype in ("int64", "float64")
    kind = dtype if long else "int32" if arithmetic(dtype) != "float32" else "float32"
    keys = x.new_empty(x.shape, dtype=torch.int64 if long else torch.int32)
    elementwise(falling if descending else rising, keys, [x], [kind])
    places = order(keys, k, 64 if long else 32)
    elementwise(same, indices, [places], ["int64"])
    pick(x, places, values)


def sort_unsupported(x: torch.Tensor, descending: bool) -> str | None:
    return too_long(x)


@kernel(deterministic=True, batch_invariant=True)
def sort(x: torch.Tensor, descending: bool, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The order is that of whole numbers, by which elements are picked."""
    _chosen(x, x.shape[-1], descending, out)


def topk_unsupported(x: torch.Tensor, k: int, largest: bool) -> str | None:
    return too_long(x)


@kernel(deterministic=True, batch_invariant=True)
def topk(x: torch.Tensor, k: int, largest: bool, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The first of `sort`, without the rest of it."""
    _chosen(x, k, largest, out)


@triton.jit
def search_kernel(
    sides, x, out, count, n, rounds, sizes, side_steps, x_steps, out_steps, side_n,
    RIGHT: tl.constexpr, KIND: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, here = numbered(count, BLOCK, LONG)
    value = cast(tl.load(x + offset(at, sizes, x_steps), here, other=0), KIND)
    low = at.to(tl.int64) * 0
    low = search(sides + offset(at, sizes, side_steps), side_n, low, low + n, value, here, rounds, RIGHT)
    tl.store(out + offset(at, sizes, out_steps), low, here)


@kernel(deterministic=True, batch_invariant=True)
def searchsorted(boundaries: torch.Tensor, x: torch.Tensor, right: bool, out: torch.Tensor) -> None:
    """Each element halves the boundaries until one place is left."""
    count, n = out.numel(), boundaries.shape[-1]
    if not count:
        return
    sizes, (out_steps, x_steps, side_steps) = axes(out, x, boundaries[..., :1] if n else boundaries.new_empty(()))
    launch(
        search_kernel, (triton.cdiv(count, BLOCK),), out.device, boundaries, x, out, count, n, n.bit_length(), sizes,
        side_steps, x_steps, out_steps, boundaries.stride(-1), RIGHT=right, KIND=TYPES[arithmetic(dtype_name(x))],
        LONG=count > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def isin_kernel(
    x, values, out, count, k, sizes, x_steps, out_steps, value_k,
    INVERT: tl.constexpr, KIND: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, here = numbered(count, BLOCK, LONG)
    x = cast(tl.load(x + offset(at, sizes, x_steps), here, other=0), KIND)
    found = at < 0
    for j in range(0, k):
        found |= x == cast(tl.load(values + tl.cast(j, tl.int64) * value_k), KIND)
    tl.store(out + offset(at, sizes, out_steps), found != INVERT, here)


@kernel(deterministic=True, batch_invariant=True)
def isin(x: torch.Tensor, values: torch.Tensor, invert: bool, out: torch.Tensor) -> None:
    """Each element is compared with all values, so that one reading is enough where they are few."""
    count = out.numel()
    if not count:
        return
    sizes, (out_steps, x_steps) = axes(out, x)
    launch(
        isin_kernel, (triton.cdiv(count, BLOCK),), out.device, x, values, out, count, values.shape[0], sizes, x_steps,
        out_steps, values.stride(0), INVERT=invert, KIND=TYPES[arithmetic(dtype_name(x))], LONG=count > LONGEST,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["least", "most"])
def histc_kernel(x, counts, least, most, bins, n, x_n, LONG: tl.constexpr, BLOCK: tl.constexpr):
    """Whole numbers are added in whatever order."""
    at, here = numbered(n, BLOCK, LONG)
    value = cast(tl.load(x + at.to(tl.int64) * x_n, here, other=0), tl.float64)
    least, most = number(least, tl.float64), number(most, tl.float64)
    here = here & (value >= least) & (value <= most)
    scale = tl.cast(bins, tl.float64) / (most - least)
    place = tl.minimum((tl.where(here, value - least, 0.0) * scale).to(tl.int64), bins - 1)
    tl.atomic_add(counts + place, place * 0 + 1, here)


@kernel(deterministic=True)
def histc(x: torch.Tensor, bins: int, least: float, most: float, out: torch.Tensor) -> None:
    """Counted in whole numbers, which do not care in which order."""
    counts, n = x.new_empty(bins, dtype=torch.int64), x.shape[0]
    elementwise(same, counts, [0], ["int64"])
    if n:
        launch(
            histc_kernel, (triton.cdiv(n, BLOCK),), x.device, x, counts, _bits(least), _bits(most), bins, n,
            x.stride(0), LONG=n > LONGEST, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    elementwise(same, out, [counts], [dtype_name(out)])


def _bits(value: float) -> int:
    return int(bits(float(value), "float64"))
