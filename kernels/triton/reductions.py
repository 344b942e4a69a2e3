# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""One number of each row: every reduction of the family by its fold, bound by memory.

A program folds a part of several rows, as many accumulators a row as a block is long. Rows of several parts are folded
again, part by part. Tiles and parts depend on a row's length and its elements' stride alone, so that a row gives the
same in every batch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flagops.arrays import arithmetic, dtype_name
from flagops.registry import kernel

from .. import _folds
from .._rows import merged, spread
from ._common import keeping_subnormals, launch
from ._elementwise import TYPES, bits, cast, number, offset
from ._room import fitted
from ._spelling import folding, spelled

TILE = 1024
HELD = 193
"""Bytes of an element to fold where a chip holds all."""
PART, ACROSS = 1 << 14, 1 << 9
"""Elements of a row that a program folds; of one across memory, where a program has many rows, fewer."""
LIMITS = {"int64": (-(2**63), 2**63 - 1), "float32": (-math.inf, math.inf), "float64": (-math.inf, math.inf)}


class Fold(NamedTuple):
    """Where a reduction starts, a number or an end of the dtype, and its functions in `_folds`."""

    start: Any
    step: str
    merge: str
    finish: str = "same"


ADD, MEAN = Fold(0, "add", "plus"), Fold(0, "add", "plus", "over")
HIGHEST, LOWEST = Fold("least", "highest", "greater"), Fold("most", "lowest", "less")
EITHER, BOTH = Fold(False, "either", "any_of"), Fold(True, "both", "all_of")
COUNT = Fold(0, "count", "plus")
SPREAD = Fold(0, "add_deviation", "plus", "over")
FIRST_HIGHEST = Fold("least", "first_highest", "merged_highest")
FIRST_LOWEST = Fold("most", "first_lowest", "merged_lowest")
NORMS = {
    math.inf: Fold(0, "highest_magnitude", "greater"),
    -math.inf: Fold("most", "lowest_magnitude", "less"),
    1: Fold(0, "add_magnitude", "plus"),
    2: Fold(0, "add_square", "plus", "root"),
}
POWERS = Fold(0, "add_power", "plus", "inverse_power")


@triton.jit(do_not_specialize=["scalar"])
def fold_kernel(
    x, found, out, scalar, count, n, sizes, x_steps, found_steps, out_steps, x_n, parts,
    STEP: tl.constexpr, MERGE: tl.constexpr, FINISH: tl.constexpr, START: tl.constexpr, KIND: tl.constexpr,
    STATE: tl.constexpr, FOLDED: tl.constexpr, AGAIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """States of parts are folded again, and the last finished."""
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = (tl.program_id(0) % parts).to(tl.int64)
    here = row < count
    x += offset(row, sizes, x_steps)[:, None]
    a = number(scalar, STATE)
    if found is None:
        p = tl.zeros((ROWS,), STATE)
    else:
        p = tl.load(found + offset(row, sizes, found_steps), here, other=0)
    s = tl.full((ROWS, BLOCK), START, STATE)
    for first in range(part * PART, min(part * PART + PART, n), BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = here[:, None] & (at < n)
        value = cast(tl.load(x + at * x_n, inside, other=0), KIND)
        after = MERGE(s, value) if AGAIN else STEP(s, value, p[:, None], a).to(STATE)
        s = tl.where(inside, after, s)
    s = FOLDED(s)
    if parts == 1:
        s = FINISH(s, p, a)
    tl.store(out + offset(row, sizes, out_steps) + part, cast(s, out.dtype.element_ty), here)


@triton.jit
def places_kernel(
    x, given, out, places, count, n, sizes, x_steps, given_steps, out_steps, place_steps, x_n, parts,
    MERGE: tl.constexpr, START: tl.constexpr, STATE: tl.constexpr, FOLDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """With `given`, `x` is what parts have found and `given` where."""
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = (tl.program_id(0) % parts).to(tl.int64)
    here = row < count
    x += offset(row, sizes, x_steps)[:, None]
    if given is not None:
        given += offset(row, sizes, given_steps)[:, None]
    s = tl.full((ROWS, BLOCK), START, STATE)
    k = tl.zeros((ROWS, BLOCK), tl.int64) + 0x7FFFFFFFFFFFFFFF
    for first in range(part * PART, min(part * PART + PART, n), BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = here[:, None] & (at < n)
        value = cast(tl.load(x + at * x_n, inside, other=0), STATE)
        if given is None:
            place = at + tl.zeros((ROWS, BLOCK), tl.int64)
        else:
            place = tl.load(given + at, inside, other=0)
        higher, better = MERGE(s, k, value, place)
        s, k = tl.where(inside, higher, s), tl.where(inside, better, k)
    s, k = FOLDED(s, k)
    if out is not None:
        tl.store(out + offset(row, sizes, out_steps) + part, cast(s, out.dtype.element_ty), here)
    tl.store(places + offset(row, sizes, place_steps) + part, k, here)


@triton.jit
def cumsum_kernel(
    x, sums, out, count, n, sizes, x_steps, sum_steps, out_steps, x_n, out_n, parts,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """With `sums`, those of all parts up to each, a part begins where the one before ends."""
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = (tl.program_id(0) % parts).to(tl.int64)
    here = row < count
    x += offset(row, sizes, x_steps)[:, None]
    out += offset(row, sizes, out_steps)[:, None]
    if sums is None:
        total = tl.zeros((ROWS,), STATE)
    else:
        total = tl.load(sums + offset(row, sizes, sum_steps) + part - 1, here & (part > 0), other=0)
    for first in range(part * PART, min(part * PART + PART, n), BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = here[:, None] & (at < n)
        value = cast(tl.load(x + at * x_n, inside, other=0), STATE)
        so_far = tl.cumsum(value, 1) + total[:, None]
        tl.store(out + at * out_n, cast(so_far, out.dtype.element_ty), inside)
        total = tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == BLOCK - 1, so_far, 0), 1)


def span(step: int) -> int:
    """How many elements of a row one program takes."""
    return PART if step == 1 else ACROSS


def tile(n: int, step: int, device: torch.device) -> dict[str, int]:
    """Rows and elements of each that a program has at once: few rows where elements lie side by side, else many."""
    size = fitted({"TILE": TILE}, device, lambda tile: HELD * tile["TILE"], ("TILE",))["TILE"]
    block = min(size if step == 1 else 16, triton.next_power_of_2(max(n, 16)))
    return {"ROWS": max(1, size // block), "BLOCK": block}


def lead(*tensors: torch.Tensor | None, shape: tuple[int, ...], own: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
    """Sizes of all axes of rows but the outermost, and steps of each tensor, from the innermost on.

    own: how many axes of its own each tensor has behind those; if not given, as many as it has more than `shape`.
    """
    given = [x for x in tensors if x is not None]
    kept = own or [max(0, x.dim() - len(shape)) for x in given]
    sizes, steps = merged(
        shape, [spread(tuple(x.shape), x.stride(), len(shape), k) for x, k in zip(given, kept, strict=True)]
    )
    each = iter([tuple(step[::-1]) for step in steps])
    return tuple(sizes[:0:-1]), [None if x is None else next(each) for x in tensors]


def start(fold: Fold, state: str) -> Any:
    return LIMITS[state][fold.start == "most"] if isinstance(fold.start, str) else fold.start


def fold(
    how: Fold, x: torch.Tensor, kind: str, state: str, out: torch.Tensor, scalar: Any = 0, found: Any = None,
    again: bool = False,
) -> None:  # fmt: skip
    """Reduce rows of `x`, brought to `kind`, into `out`."""
    *shape, n = x.shape
    count = math.prod(shape)
    if not count:
        return
    parts = max(1, triton.cdiv(n, span(x.stride(-1))))
    target = out if parts == 1 else out.new_empty((*shape, parts), dtype=getattr(torch, state))
    _folded(how, x, kind, state, target, scalar, found, again, parts)
    if parts > 1:
        fold(how, target, state, state, out, scalar, found, again=True)


def _folded(
    how: Fold, x: torch.Tensor, kind: str, state: str, target: torch.Tensor, scalar: Any = 0, found: Any = None,
    again: bool = False, parts: int = 1,
) -> None:  # fmt: skip
    """The state of each part of each row, or of one part the result."""
    *shape, n = x.shape
    count = math.prod(shape)
    sizes, (x_steps, found_steps, out_steps) = lead(x, found, target, shape=tuple(shape))
    shaped = tile(n, x.stride(-1), x.device)
    launch(
        fold_kernel, (triton.cdiv(count, shaped["ROWS"]) * parts,), x.device, x, found, target, bits(scalar, state),
        count, n, sizes, x_steps, found_steps, out_steps, x.stride(-1), parts, STEP=spelled(_folds, how.step),
        MERGE=spelled(_folds, how.merge), FINISH=spelled(_folds, how.finish), START=start(how, state),
        KIND=TYPES[kind], STATE=TYPES[state], FOLDED=folding(_folds, how.merge), AGAIN=again, PART=span(x.stride(-1)),
        num_warps=4, **shaped, **keeping_subnormals(x.device),
    )  # fmt: skip


def places(how: Fold, x: torch.Tensor, values: Any, indices: torch.Tensor, given: Any = None) -> None:
    """Where rows of `x` have what is looked for, and what it is if asked."""
    *shape, n = x.shape
    count = math.prod(shape)
    if not count:
        return
    state = "int64" if x.dtype == torch.bool else arithmetic(dtype_name(x))
    part = span(x.stride(-1))
    parts = triton.cdiv(n, part)
    to, where = (values, indices) if parts == 1 else (
        x.new_empty((*shape, parts), dtype=getattr(torch, state)), indices.new_empty((*shape, parts)),
    )  # fmt: skip
    sizes, (x_steps, given_steps, out_steps, place_steps) = lead(x, given, to, where, shape=tuple(shape))
    shaped = tile(n, x.stride(-1), x.device)
    launch(
        places_kernel, (triton.cdiv(count, shaped["ROWS"]) * parts,), indices.device, x, given, to, where, count, n,
        sizes, x_steps, given_steps, out_steps, place_steps, x.stride(-1), parts,
        MERGE=spelled(_folds, how.merge), START=start(how, state), STATE=TYPES[state],
        FOLDED=folding(_folds, how.merge, ("s", "k")), PART=part, num_warps=4, **shaped,
    )  # fmt: skip
    if parts > 1:
        places(how, to, values, indices, where)


def _reduction(name: str, how: Fold, of_bool: Fold | None = None) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
        acc = arithmetic(dtype)
        chosen = of_bool if of_bool and dtype == "bool" else how
        fold(chosen, x, acc, acc, out, x.shape[-1] if how.finish == "over" else 0)

    run.__name__ = name
    return run


EVERY_CARD = True

sum = _reduction("sum", ADD)
nansum = _reduction("nansum", Fold(0, "add_number", "plus"))
mean = _reduction("mean", MEAN)
prod = _reduction("prod", Fold(1, "times", "product"))
amax = _reduction("amax", HIGHEST, EITHER)
amin = _reduction("amin", LOWEST, BOTH)


def _place(name: str, how: Fold) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        places(how, x, None, out)

    run.__name__ = name
    return run


argmax = _place("argmax", FIRST_HIGHEST)
argmin = _place("argmin", FIRST_LOWEST)


def _extreme(name: str, how: Fold) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        places(how, x, *out)

    run.__name__ = name
    return run


max_dim = _extreme("max_dim", FIRST_HIGHEST)
min_dim = _extreme("min_dim", FIRST_LOWEST)


@kernel(deterministic=True, batch_invariant=True)
def any_(x: torch.Tensor, out: torch.Tensor) -> None:
    fold(EITHER, x, "bool", "bool", out)


@kernel(deterministic=True, batch_invariant=True)
def all_(x: torch.Tensor, out: torch.Tensor) -> None:
    fold(BOTH, x, "bool", "bool", out)


@kernel(deterministic=True, batch_invariant=True)
def count_nonzero(x: torch.Tensor, out: torch.Tensor) -> None:
    fold(COUNT, x, arithmetic(dtype_name(x)), "int64", out)


@kernel(deterministic=True, batch_invariant=True)
def vector_norm(x: torch.Tensor, dtype: str, ord: Any, out: torch.Tensor) -> None:
    acc = arithmetic(dtype)
    if ord == 0:
        fold(COUNT, x, acc, "int64", out)
    else:
        fold(NORMS.get(ord, POWERS), x, acc, acc, out, ord if math.isfinite(ord) else 0)


def _numbers(how: Fold, x: torch.Tensor, acc: str, scalar: Any = 0) -> torch.Tensor:
    made = x.new_empty(x.shape[:-1], dtype=getattr(torch, acc))
    fold(how, x, acc, acc, made, scalar)
    return made


@kernel(deterministic=True, batch_invariant=True)
def var(x: torch.Tensor, dtype: str, correction: Any, root: bool, out: torch.Tensor) -> None:
    """Rows are read twice, for their means first."""
    acc, n = arithmetic(dtype), x.shape[-1]
    how = SPREAD._replace(finish="root_over") if root else SPREAD
    fold(how, x, acc, acc, out, max(n - correction, 0), _numbers(MEAN, x, acc, n))


@kernel(deterministic=True, batch_invariant=True)
def logsumexp(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Rows are read twice, for their greatest first."""
    acc = arithmetic(dtype)
    tops = _numbers(HIGHEST._replace(finish="where_finite"), x, acc)
    fold(Fold(0, "add_exponential", "plus", "log_above"), x, acc, acc, out, 0, tops)


@kernel(deterministic=True, batch_invariant=True)
def cumsum(x: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Of rows of several parts these are summed first, and each goes on from the sum of those before it."""
    *shape, n = x.shape
    if not x.numel():
        return
    state, parts, sums = arithmetic(dtype), triton.cdiv(n, span(x.stride(-1))), None
    if parts > 1:
        sums = x.new_empty((*shape, parts), dtype=getattr(torch, state))
        _folded(ADD, x, state, state, sums, parts=parts)
        cumsum(sums, state, sums)
    sizes, (x_steps, sum_steps, out_steps) = lead(x, sums, out, shape=tuple(shape))
    shaped = tile(n, x.stride(-1), x.device)
    count = math.prod(shape)
    launch(
        cumsum_kernel, (triton.cdiv(count, shaped["ROWS"]) * parts,), out.device, x, sums, out, count, n, sizes,
        x_steps, sum_steps, out_steps, x.stride(-1), out.stride(-1), parts, STATE=TYPES[state], num_warps=4,
        PART=span(x.stride(-1)), **shaped,
    )  # fmt: skip
