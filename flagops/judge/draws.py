"""Which cases a kernel is tried on: all pairs of what a case can be, sizes of every order, and the kernel's own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flagops.cases import Case, Scope, draw_case
from flagops.operator import Operator

Feature = tuple[str, Any]

SMALL = (1, 2, 3, 7)
LONG = tuple(size for power in range(16, 3, -1) for size in (2**power + 3, 2**power))
"""Sizes of one long axis, tried in this order until one is legal and small enough in all."""
ELEMENTS, WORK = 1 << 20, 1 << 22
"""Of the tensors of one case together, and its floating-point operations; four times as much for those beyond 2^20."""
EMPTY = 8
"""One draw in so many may have an axis of no elements."""
PATIENCE = 0.3
"""Seconds of this thread that a case of one long axis should take: other programs do not count."""


@dataclass
class Coverage:
    """What cases have been tried: features, and pairs of them."""

    seen: set[Any] = field(default_factory=set)
    features: set[Feature] = field(default_factory=set)

    def best(self, candidates: Sequence[Case]) -> Case:
        """The candidate with the most pairs that no case had; it counts as tried."""
        pairs = [set(itertools.combinations(features(case), 2)) for case in candidates]
        chosen = max(range(len(candidates)), key=lambda i: len(pairs[i] - self.seen))
        self.seen |= pairs[chosen]
        self.features |= set(features(candidates[chosen]))
        return candidates[chosen]


def features(case: Case) -> list[Feature]:
    """What can matter of a case, in classes."""
    found: list[Feature] = [(f"dtype of {name}", dtype) for name, dtype in case.dtypes]
    found += [(f"layout of {name}", layout) for name, layout in case.layouts]
    found += [(f"size of {name}", order(size)) for name, size in case.dims]
    found += [(name, value) for name, value in case.scalars if name not in dict(case.dims)]
    found += [("batch axes", len(case.batch)), ("values", case.values), ("kind", case.kind), ("mode", case.mode)]
    return [*found, ("absent", case.absent), ("in place", case.inplace), ("budget", case.budget)]


def order(size: int) -> str:
    """The order of magnitude of a size."""
    return str(size) if size < 4 else f"below 2^{4 * -(-size.bit_length() // 4)}"


@dataclass
class Draws:
    """Draws cases of one operator for one backend.

    choose: takes one of several options, at random; everything follows from it.
    """

    op: Operator
    choose: Callable[[Sequence[Any]], Any]
    within: Scope
    kinds: Sequence[str]
    coverage: Coverage = field(default_factory=Coverage)
    longest: dict[str, int] = field(default_factory=dict)
    """The sizes of axes that are tried in about `PATIENCE`, once that is known."""

    def draw(
        self, within: Scope | None = None, fixed: Mapping[str, int] | None = None, batch: tuple[int, ...] | None = None
    ) -> Case:
        """The best of a few random cases."""
        scope = within or self.within
        cases = [draw_case(self.op, self.choose, scope, self.kinds, fixed, batch) for _ in range(EMPTY)]
        if fixed or batch or self.choose(range(EMPTY)):  # of many axes one is often 0, and such a call tells little
            cases = [case for case in cases if not empty(case)] or cases
        return self.coverage.best(cases[:4])

    def drawn(self) -> Iterator[Case]:
        """Cases of the card's sizes, four small ones to a large one."""
        while True:
            for volume in (1 << 10, 1 << 12, 1 << 10, 1 << 14):
                yield self.draw(dataclasses.replace(self.within, volume=min(volume, self.within.volume)))
            yield self.draw()

    def small(self) -> Iterator[Case]:
        """Cases that take microseconds."""
        while True:
            yield self.draw(Scope((3, 2, 5), 1 << 7, 1), {})

    @property
    def axes(self) -> list[str]:
        """The axes whose sizes are free, ``...`` for the batch."""
        words = [w for t in self.op.tensors.values() for w in t.axes.split()]
        names = sorted({f for word in words for f in word.split("*") if not f.isdecimal()} - {"..."})
        derived = self._derived()
        scalars = {s.axis for s in self.op.scalars.values()}
        free = [n for n in names if n not in derived and (len(self.op.sizes.get(n, (1, 2))) > 1 or n in scalars)]
        return [*free, *(["..."] if "..." in words else [])]

    def _derived(self) -> set[str]:
        if not self.op.derived:
            return set()
        case = draw_case(self.op, lambda options: options[0])
        return set(self.op.derived(dict(case.dims), dict(case.scalars)))

    def long(self) -> Iterator[Case]:
        """One axis after the other at its longest, then two together for more than 2^20 elements; over again."""
        return _again(self._long)

    def _long(self) -> Iterator[Case]:
        for axis in self.axes:
            yield from self._sized(axis, (1031, 1024))  # which shows how long a longer one takes
            yield from self._sized(axis, LONG)
        for one, two in itertools.combinations(self.axes, 2):
            yield from self._sized(one, [1031, 1024], {two: 1021}, 4)

    def around(self, numbers: Sequence[int]) -> Iterator[Case]:
        """Each axis, and the number of elements, just above the numbers, at them and below; over again."""
        ordered = sorted(numbers, key=lambda number: number < 8)  # which every other draw is around
        return _again(lambda: self._around(ordered))

    def _around(self, numbers: Sequence[int]) -> Iterator[Case]:
        for shift, number in itertools.product((1, 0, -1), numbers):
            for axis in self.axes:
                if number + shift <= ELEMENTS:
                    yield from self._sized(axis, [number + shift])
            if shift > 0 and 1 << 10 <= number <= ELEMENTS and len(self.axes) > 1:
                one, two = self.choose(list(itertools.permutations(self.axes, 2)))
                part = self.choose([size for size in (16, 64, 130, 520) if size < number])
                yield from self._sized(one, [number // part + 1], {two: part})

    def _sized(
        self, axis: str, sizes: Sequence[int], others: Mapping[str, int] | None = None, room: int = 1
    ) -> Iterator[Case]:
        """A case with an axis of the first of these sizes that is not too large in all, the others small."""
        for size, _ in itertools.product(sizes, range(3)):  # the others may be drawn too large
            if size > self.longest.get(axis, size):
                continue
            fixed = {**(others or {}), axis: size}
            batch = (fixed.pop("..."),) if "..." in fixed else None
            case = self.draw(Scope(SMALL, 1 << 10, 1), fixed, batch)
            if fits(self.op, case, room) and legal(self.op, case):
                start = time.thread_time()
                yield case
                if size >= 1024:
                    self.longest[axis] = int(size * max(PATIENCE / (time.thread_time() - start), 0.5))
                return


def _again(cases: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The cases over and over, until there are none."""
    while True:
        case = None
        for case in cases():
            yield case
        if case is None:
            return


def empty(case: Case) -> bool:
    """Whether an axis has no elements."""
    return 0 in (*dict(case.dims).values(), *case.batch)


def fits(op: Operator, case: Case, room: int = 1) -> bool:
    """Whether a case is small enough for an exact reference, and has results."""
    dims = dict(case.dims)
    if empty(case) or any(dims[name] > most for name, most in op.most.items()):
        return False
    return elements(op, case) <= room * ELEMENTS and op.flops(dims, case.batch) <= room * WORK


def elements(op: Operator, case: Case) -> int:
    tensors = [t for n, t in op.tensors.items() if n not in case.absent]
    return sum(math.prod(op.shape(t, dict(case.dims), case.batch)) for t in (*tensors, *op.results.values()))


def legal(op: Operator, case: Case) -> bool:
    """Whether the card allows what a case gives."""
    try:
        op.bind((*case.values_drawn().values(), None))
    except (ValueError, TypeError, ArithmeticError, LookupError):
        return False
    return op.values is None or op.values(*case.values_drawn().values()) is None
