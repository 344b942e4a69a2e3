# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Elements picked and places written by index: bound by memory, and by how far apart indices lead.

The host waits for each call to learn whether an index is out of range, but while a device records a graph: then such
an index reads 0 and writes nothing.

What is written is brought in the order of the places first, so that one program writes each place, and sees the
elements for it in the order of their indices.
"""

import math

import torch
import triton
import triton.language as tl

from flagops.arrays import arithmetic, dtype_name
from flagops.errors import OutOfRange
from flagops.registry import kernel

from .. import _folds
from .._rows import merged, spread
from ._common import LONGEST, keeping_subnormals, launch, too_long
from ._elementwise import BLOCK, TYPES, axes, bits, cast, elementwise, numbered
from ._elementwise import offset as lies
from ._order import order, search
from ._spelling import folding, spelled
from ._words import divide, same
from .reductions import ADD, BOTH, EITHER, HIGHEST, LOWEST, Fold, start

REDUCTIONS = {"assign": ADD, "sum": ADD, "prod": Fold(1, "times", "product"), "amax": HIGHEST, "amin": LOWEST}
OF_BOOLS = {"assign": EITHER, "sum": EITHER, "prod": BOTH, "amax": EITHER, "amin": BOTH}


def _recording(device: torch.device) -> bool:
    """Whether a graph is recorded on the current stream; vendors ask in CUDA's words, or have no graphs."""
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and bool(asked())


class Alarm:
    """What programs note down of an index that is out of range: that there is one, and which.

    room: where they do, None while a graph is recorded.
    """

    def __init__(self, x: torch.Tensor, size: int) -> None:
        recorded = _recording(x.device)
        self.size, self.room = size, None if recorded else torch.zeros(2, dtype=torch.int64).to(x.device)

    def check(self) -> None:
        """Raises OutOfRange."""
        wrong, index = (0, 0) if self.room is None else self.room.tolist()
        if wrong:
            raise OutOfRange(f"index {index} is out of bounds for an axis of size {self.size}")


@triton.jit
def named(index, here, n, alarm, FROM_END: tl.constexpr):
    """The places that indices name, and which of these there are."""
    index = index.to(tl.int64)
    place = index
    if FROM_END:
        place = tl.where(index < 0, index + n, index)
    inside = here & (place >= 0) & (place < n)
    if alarm is not None:
        wrong = here & (inside == 0)
        tl.store(alarm + index * 0, index * 0 + 1, wrong)
        tl.store(alarm + 1 + index * 0, index, wrong)
    return place, inside


@triton.jit
def gather_kernel(
    x, index, out, alarm, count, n, sizes, x_steps, index_steps, out_steps, x_n,
    FROM_END: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, here = numbered(count, BLOCK, LONG)
    place, inside = named(tl.load(index + lies(at, sizes, index_steps), here, other=0), here, n, alarm, FROM_END)
    value = tl.load(x + lies(at, sizes, x_steps) + place * x_n, inside, other=0)
    tl.store(out + lies(at, sizes, out_steps), value, here)


@triton.jit
def named_kernel(
    index, out, alarm, count, n, sizes, index_steps, out_steps,
    FROM_END: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`n` for what is out of range, which comes last in every order of these numbers."""
    at, here = numbered(count, BLOCK, LONG)
    place, inside = named(tl.load(index + lies(at, sizes, index_steps), here, other=0), here, n, alarm, FROM_END)
    tl.store(out + lies(at, sizes, out_steps), tl.where(inside, place, n).to(out.dtype.element_ty), here)


@triton.jit(do_not_specialize=["given", "size", "step"])
def offset_kernel(
    x, index, out, alarm, given, size, step, count, sizes, x_steps, index_steps, out_steps,
    LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, here = numbered(count, BLOCK, LONG)
    place, inside = named(tl.load(index + lies(at, sizes, index_steps), here, other=0), here, size, alarm, True)
    first = given
    if x is not None:
        first = tl.load(x + lies(at, sizes, x_steps), here, other=0)
    tl.store(out + lies(at, sizes, out_steps), first + step * tl.where(inside, place, 0), here)


@triton.jit
def scatter_kernel(
    x, ranked, places, src, out, count, n, m, rounds, left, sizes, nth_steps, x_steps, index_steps, src_steps,
    out_steps, x_n, src_m, out_n,
    ASSIGN: tl.constexpr, STEP: tl.constexpr, MERGE: tl.constexpr, FOLDED: tl.constexpr, START: tl.constexpr,
    STATE: tl.constexpr, SHARED: tl.constexpr, TOGETHER: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first index of each place writes it, with what all of them bring: `ranked` are places in order, and `places`
    where these stood. Without `x` what was there does not count; a place that is `left` out is not written."""
    at, here = numbered(count, BLOCK, LONG)
    i = lies(at, sizes, nth_steps)
    row = lies(at, sizes, index_steps)
    place = tl.load(ranked + row + i, here, other=-1).to(tl.int64)
    before = tl.load(ranked + row + i - 1, here & (i > 0), other=-1).to(tl.int64)
    here = here & (place < n) & (place != before) & (place != left)
    end = search(ranked + row, 1, i + 1, i * 0 + m, place, here, rounds, True)
    src += lies(at, sizes, src_steps)
    out += lies(at, sizes, out_steps) + place * out_n
    if ASSIGN:
        last = tl.load(places + row + end - 1, here, other=0).to(tl.int64)
        tl.store(out, tl.load(src + last * src_m, here, other=0), here)
    else:
        length = tl.where(here, end - i, 0)
        s = tl.full((BLOCK, TOGETHER), START, STATE)
        for first in range(0, tl.max(length, 0), TOGETHER):
            j = (first + tl.arange(0, TOGETHER)).to(tl.int64)[None, :]
            inside = j < length[:, None]
            nth = tl.load((places + row + i)[:, None] + j, inside, other=0).to(tl.int64)
            value = cast(tl.load(src[:, None] + nth * src_m, inside, other=0), STATE)
            s = tl.where(inside, STEP(s, value, value, value), s)
        s = FOLDED(s)
        if SHARED:
            s = divide(s, length.to(STATE))
        if x is not None:
            s = MERGE(cast(tl.load(x + lies(at, sizes, x_steps) + place * x_n, here, other=0), STATE), s)
        tl.store(out, cast(s, out.dtype.element_ty), here)


def pick(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor, from_end: bool = False, room: object = None) -> None:
    """Elements of rows by index; without `room` for an alarm nobody hears of those that are out of range."""
    count = out.numel()
    if not count:
        return
    lead, rank = (*x.shape[:-1], 1), out.dim()
    shapes = (tuple(out.shape), out.stride()), (tuple(index.shape), index.stride()), (lead, x.stride())
    sizes, steps = merged(tuple(out.shape), [spread(*own, rank, 0) for own in shapes])
    out_steps, index_steps, x_steps = (tuple(own[::-1]) for own in steps)
    launch(
        gather_kernel, (triton.cdiv(count, BLOCK),), out.device, x, index, out, room, count, x.shape[-1],
        tuple(sizes[:0:-1]), x_steps, index_steps, out_steps, x.stride(-1), FROM_END=from_end, LONG=count > LONGEST,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True)
def gather(x: torch.Tensor, index: torch.Tensor, from_end: bool, out: torch.Tensor) -> None:
    """Rows that lie close are moved by neighbouring elements of a program."""
    if out.numel():
        alarm = Alarm(out, x.shape[-1])
        pick(x, index, out, from_end, alarm.room)
        alarm.check()


@kernel(deterministic=True, batch_invariant=True)
def offset(x: torch.Tensor, index: torch.Tensor, size: int, step: int, out: torch.Tensor) -> None:
    """One pass over all indices."""
    count = out.numel()
    if not count:
        return
    alarm, given = Alarm(out, size), bits(x, "int64")
    first = given if isinstance(given, torch.Tensor) else None
    sizes, (out_steps, index_steps, *x_steps) = axes(out, index, *(() if first is None else (first,)))
    launch(
        offset_kernel, (triton.cdiv(count, BLOCK),), out.device, first, index, out, alarm.room,
        given if first is None else 0, size, step, count, sizes, x_steps[0] if x_steps else out_steps, index_steps,
        out_steps, LONG=count > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    alarm.check()


def scatter_unsupported(
    x: torch.Tensor, index: torch.Tensor, src: torch.Tensor, reduce: str, include_self: bool, from_end: bool
) -> str | None:
    return too_long(index)


@kernel(deterministic=True)
def scatter(
    x: torch.Tensor, index: torch.Tensor, src: torch.Tensor, reduce: str, include_self: bool, from_end: bool,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Halves are summed and multiplied in float32, and rounded once."""
    if not (x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and x.shape == out.shape):
        elementwise(same, out, [x], [dtype_name(x)])
    how = (OF_BOOLS if out.dtype == torch.bool else REDUCTIONS)[reduce]
    _write(how, out, index, src, from_end, assign=reduce == "assign", kept=include_self)


def embedding_dense_backward_unsupported(
    grad: torch.Tensor, index: torch.Tensor, n: int, padding: int, by_frequency: bool
) -> str | None:
    return too_long(index)


@kernel(deterministic=True)
def embedding_dense_backward(
    grad: torch.Tensor, index: torch.Tensor, n: int, padding: int, by_frequency: bool, out: torch.Tensor
) -> None:
    """A row of the table is the sum of those that took it."""
    elementwise(same, out, [0], [dtype_name(out)])
    _write(ADD, out.t(), index, grad.t(), False, kept=False, left=padding, shared=by_frequency)


def _write(
    how: Fold, out: torch.Tensor, index: torch.Tensor, src: torch.Tensor, from_end: bool, assign: bool = False,
    kept: bool = True, left: int = -1, shared: bool = False,
) -> None:  # fmt: skip
    """Bring elements to the places that indices name; what rows share of these is ordered once for all of them."""
    *lead, n = out.shape
    m = index.shape[-1]
    if not m or 0 in lead:
        return
    own = [1 if not step else size for size, step in zip(index.shape[:-1], index.stride()[:-1], strict=True)]
    index = index.as_strided((*own, m), index.stride())
    named_places = index.new_empty((*own, m), dtype=torch.int32 if n <= LONGEST else torch.int64)
    count, alarm = index.numel(), Alarm(out, n)
    sizes, (out_steps, index_steps) = axes(named_places, index)
    launch(
        named_kernel, (triton.cdiv(count, BLOCK),), out.device, index, named_places, alarm.room, count, n, sizes,
        index_steps, out_steps, FROM_END=from_end, LONG=count > LONGEST, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    alarm.check()
    places = order(named_places, m, max(1, n.bit_length()))
    ranked = torch.empty_like(named_places)
    pick(named_places, places, ranked)
    shape, rank = (*lead, m), len(lead)
    steps = [spread(tuple(x.shape), x.stride(), rank, 1) for x in (out, ranked, src)]
    across = ((*steps[0], out.stride(-1)), (*(0,) * rank, 1), *((*own, 0) for own in steps))
    inner, walked = merged(shape, across)
    _, nth_steps, out_steps, index_steps, src_steps = (tuple(own[::-1]) for own in walked)
    state, count = arithmetic(dtype_name(out)), math.prod(shape)
    together = 1 if index_steps[0] == 0 and nth_steps[0] == 0 else 16  # else neighbours are elements of one index
    block = BLOCK // together // (1 if together == 1 else 2)
    launch(
        scatter_kernel, (triton.cdiv(count, block),), out.device, out if kept else None, ranked, places, src, out,
        count, n, m, m.bit_length(), left, tuple(inner[:0:-1]), nth_steps, out_steps, index_steps, src_steps, out_steps,
        out.stride(-1), src.stride(-1), out.stride(-1), ASSIGN=assign, STEP=spelled(_folds, how.step),
        MERGE=spelled(_folds, how.merge), FOLDED=folding(_folds, how.merge), START=start(how, state),
        STATE=TYPES[state], SHARED=shared, TOGETHER=together, LONG=count > LONGEST, BLOCK=block, num_warps=4,
        **keeping_subnormals(out.device),
    )  # fmt: skip
