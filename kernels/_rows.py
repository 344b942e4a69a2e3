"""Leading axes of several tensors walked together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import mul

Steps = tuple[int, ...]


def rows(shape: Sequence[int], *steps: Sequence[int]) -> Iterable[tuple[list[int], Steps, list[Steps]]]:
    """Blocks of three axes that cover all leading axes: element offsets, sizes, and strides of each tensor.

    Axes of size 1 are dropped and neighbours are merged where every tensor's strides allow it.
    """
    if 0 in shape:
        return ()
    extents, outer, sizes, strides = _merged(tuple(shape), *map(tuple, steps))
    places = itertools.product(*map(range, extents))
    return (([sum(map(mul, place, step)) for step in outer], sizes, strides) for place in places)


@lru_cache(maxsize=1024)
def _merged(shape: Steps, *steps: Steps) -> tuple[Steps, list[Steps], Steps, list[Steps]]:
    """Sizes and strides of the axes beyond three, and of those three."""
    axes: list[tuple[int, Steps]] = []
    for size, step in zip(shape, zip(*steps, strict=True), strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], step, strict=True)):
            axes[-1] = (axes[-1][0] * size, step)
        else:
            axes.append((size, step))
    while len(axes) < 3:
        axes.insert(0, (1, (0,) * len(steps)))
    sizes = tuple(size for size, _ in axes)
    strides = [tuple(step[i] for _, step in axes) for i in range(len(steps))]
    return sizes[:-3], [step[:-3] for step in strides], sizes[-3:], [step[-3:] for step in strides]


@lru_cache(maxsize=1024)
def spread(shape: Steps, steps: Steps, axes: int, kept: int) -> Steps:
    """Strides of all but the last `kept` axes, brought to so many `axes`: 0 where one is missing or broadcast."""
    lead = [0 if n == 1 else step for n, step in zip(shape, steps, strict=True)][: len(shape) - kept]
    return (*(0,) * (axes - len(lead)), *lead)


def merged(shape: tuple[int, ...], steps: Sequence[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and steps of as few axes as there can be, the last the one along which the result lies closest."""
    axes = [axis for axis in zip(shape, *steps, strict=True) if axis[0] != 1]
    axes.sort(key=lambda axis: [abs(step) for step in axis[1:]], reverse=True)
    joined: list[tuple[int, ...]] = []
    for n, *own in axes:
        if joined and all(outer == n * inner for outer, inner in zip(joined[-1][1:], own, strict=True)):
            n *= joined.pop()[0]
        joined.append((n, *own))
    joined = joined or [(1, *[0] * len(steps))]
    return [axis[0] for axis in joined], [[axis[k + 1] for axis in joined] for k in range(len(steps))]
