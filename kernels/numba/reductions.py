"""One number of each row: every reduction of the family by its fold, bound by memory.

Spreads and sums of exponentials read a row twice, for its mean or its greatest first.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flagops.arrays import HALF, arithmetic, dtype_name
from flagops.backends.numba import jit, parallel
from flagops.registry import kernel

from ._blocks import alive, at, place, scratch, walk
from ._ir import STORAGE, TAGS
from ._reduce import Fold, reduce
from ._routines import call, mover, routine
from ._vectors import BYTE, load, store

ADD = Fold(0, "add", "plus")
MEAN = Fold(0, "add", "plus", "over")
NANSUM = Fold(0, "add_number", "plus")
PROD = Fold(1, "times", "product")
COUNT = Fold(0, "count", "plus")
HIGHEST, LOWEST = Fold("least", "highest", "greater"), Fold("most", "lowest", "less")
TOP = HIGHEST._replace(finish="where_finite")
EITHER, BOTH = Fold(False, "either", "any_of"), Fold(True, "both", "all_of")
FIRST_HIGHEST = Fold("least", "first_highest", "merged_highest", indexed=True)
FIRST_LOWEST = Fold("most", "first_lowest", "merged_lowest", indexed=True)
SPREAD = Fold(0, "add_deviation", "plus", "over")
EXPONENTIALS = Fold(0, "add_exponential", "plus", "log_above")
NORMS = {
    math.inf: Fold(0, "highest_magnitude", "greater"),
    -math.inf: Fold("most", "lowest_magnitude", "less"),
    1: Fold(0, "add_magnitude", "plus"),
    2: Fold(0, "add_square", "plus", "root"),
}
POWERS = Fold(0, "add_power", "plus", "inverse_power")
_PIECE = 4096  # elements of a row that are brought elsewhere at once
_GRAIN = 1 << 14  # elements worth a thread
_LONG = np.int64(0)


def _tags(x: Any, dtype: str, out: Any) -> tuple[str, str, str]:
    """How rows are read, states are kept and results are made."""
    own, acc, result = dtype_name(x), arithmetic(dtype), dtype_name(out)
    halves = own in HALF and acc == "float32"
    return own if halves else acc, acc, result if result in HALF and acc == "float32" else acc


def _reduction(name: str, fold: Fold, of_bool: Fold | None = None) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: Any, dtype: str, out: Any) -> None:
        scalar = x.shape[-1] if fold.finish == "over" else 0
        reduce(of_bool if of_bool and dtype == "bool" else fold, x, _tags(x, dtype, out), out, scalar)

    run.__name__ = name
    return run


EVERY_CARD = True

sum = _reduction("sum", ADD)
nansum = _reduction("nansum", NANSUM)
mean = _reduction("mean", MEAN)
prod = _reduction("prod", PROD)
amax = _reduction("amax", HIGHEST, EITHER)
amin = _reduction("amin", LOWEST, BOTH)


def _place(name: str, fold: Fold) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: Any, out: Any) -> None:
        _places(fold, x, out)

    run.__name__ = name
    return run


def _places(fold: Fold, x: Any, out: Any) -> None:
    dtype = "int64" if dtype_name(x) == "bool" else dtype_name(x)
    tag, state, _ = _tags(x, dtype, x)
    reduce(fold, x, (tag, state, "int64"), out)


argmax = _place("argmax", FIRST_HIGHEST)
argmin = _place("argmin", FIRST_LOWEST)


@kernel(deterministic=True, batch_invariant=True)
def any_(x: Any, out: Any) -> None:
    """Elements are brought to bool before."""
    reduce(EITHER, x, ("bool", "bool", "bool"), out)


@kernel(deterministic=True, batch_invariant=True)
def all_(x: Any, out: Any) -> None:
    reduce(BOTH, x, ("bool", "bool", "bool"), out)


@kernel(deterministic=True, batch_invariant=True)
def count_nonzero(x: Any, out: Any) -> None:
    """Numbers are counted as they are, so that rows that lie side by side stay there."""
    reduce(COUNT, x, (dtype_name(x), "int64", "int64"), out)


@kernel(deterministic=True, batch_invariant=True)
def vector_norm(x: Any, dtype: str, ord: Any, out: Any) -> None:
    tags = _tags(x, dtype, out)
    if ord == 0:
        reduce(COUNT, x, (tags[0], "int64", "int64"), out)
    else:
        reduce(NORMS.get(ord, POWERS), x, tags, out, ord)


@kernel(deterministic=True, batch_invariant=True)
def var(x: Any, dtype: str, correction: Any, root: bool, out: Any) -> None:
    tag, acc, result = _tags(x, dtype, out)
    n = x.shape[-1]
    means = reduce(MEAN, x, (tag, acc, acc), None, n)
    fold = SPREAD._replace(finish="root_over") if root else SPREAD
    reduce(fold, x, (tag, acc, result), out, max(n - correction, 0), means)


@kernel(deterministic=True, batch_invariant=True)
def logsumexp(x: Any, dtype: str, out: Any) -> None:
    tag, acc, result = _tags(x, dtype, out)
    tops = reduce(TOP, x, (tag, acc, acc))
    reduce(EXPONENTIALS, x, (tag, acc, result), out, 0, tops, work=8)


def _extreme(name: str, fold: Fold) -> Any:
    @kernel(deterministic=True, batch_invariant=True)
    def run(x: Any, out: Any) -> None:
        values, indices = out
        _places(fold, x, indices)
        *lead, _ = x.shape
        dtype = dtype_name(x)
        given = mover(dtype, dtype), STORAGE[dtype].size
        for sizes, own in walk(lead, (1, 0, 0), x, indices, values):
            parallel(_pick, math.prod(sizes), *given, sizes, *own, minimum=_GRAIN // 8)

    run.__name__ = name
    return run


@jit
def _pick(start, stop, move, size, sizes, x, places, out):
    """The element of each row that stands at its place."""
    for task in range(start, stop):
        k = load(_LONG, places[0] + 8 * place(task, sizes, places[1]))
        source = x[0] + (place(task, sizes, x[1]) + k * x[2][0]) * size
        call(move, 1, out[0] + place(task, sizes, out[1]) * size, source, size, size, 0)


max_dim = _extreme("max_dim", FIRST_HIGHEST)
min_dim = _extreme("min_dim", FIRST_LOWEST)


@kernel(deterministic=True, batch_invariant=True)
def cumsum(x: Any, dtype: str, out: Any) -> None:
    """A row is summed in its order, by one thread."""
    *lead, n = x.shape
    own, acc, result = dtype_name(x), arithmetic(dtype), dtype_name(out)
    sizes = STORAGE[own].size, STORAGE[acc].size, STORAGE[result].size
    for tasks, (source, target) in walk(lead if n else (0,), (1, 1), x, out):
        routines = mover(own, acc), _running(acc), mover(acc, result)
        parallel(_scan, math.prod(tasks), n, tasks, source, target, routines, sizes, minimum=-(-_GRAIN // n))


def _sums(n, out, carry, b, c, more):
    """Each of n numbers with the sum of those before it, of which `carry` has what came earlier."""
    total = load(S, carry)
    for i in range(n):
        total += load(S, out + i * S_SIZE)
        store(S, out + i * S_SIZE, total)
    store(S, carry, total)
    return 0


@cache
def _running(acc: str) -> int:
    return routine(_sums, acc, S=TAGS[acc], S_SIZE=STORAGE[acc].size)


@jit
def _scan(start, stop, n, tasks, x, out, routines, sizes):
    memory, (room, few) = scratch(BYTE, ((1, 8 * _PIECE), (1, 8)))
    piece, carry = at(room, 0, 0), at(few, 0, 0)
    for task in range(start, stop):
        source = x[0] + place(task, tasks, x[1]) * sizes[0]
        target = out[0] + place(task, tasks, out[1]) * sizes[2]
        store(_LONG, carry, _LONG)
        for i in range(0, n, _PIECE):
            some = min(_PIECE, n - i)
            call(routines[0], some, piece, source + i * x[2][0] * sizes[0], sizes[1], x[2][0] * sizes[0], 0)
            call(routines[1], some, piece, carry, 0, 0, 0)
            call(routines[2], some, target + i * out[2][0] * sizes[2], piece, out[2][0] * sizes[2], sizes[1], 0)
    return alive(memory)
