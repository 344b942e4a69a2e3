"""Leading axes of several tensors walked together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

Steps = tuple[int, ...]


def rows(shape: Sequence[int], *steps: Sequence[int]) -> Iterator[tuple[list[int], Steps, list[Steps]]]:
    """Blocks of three axes that cover all leading axes: element offsets, sizes, and strides of each tensor.

    Axes of size 1 are dropped and neighbours are merged where every tensor's strides allow it.
    """
    if 0 in shape:
        return
    outer, sizes, strides = _merged(tuple(shape), *map(tuple, steps))
    for place in itertools.product(*(range(size) for size, _ in outer)):
        offsets = [sum(at * step[i] for at, (_, step) in zip(place, outer, strict=True)) for i in range(len(steps))]
        yield offsets, sizes, strides


@lru_cache(maxsize=1024)
def _merged(shape: Steps, *steps: Steps) -> tuple[list[tuple[int, Steps]], Steps, list[Steps]]:
    """The axes beyond three, and the sizes and strides of those three."""
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
    inner = axes[-3:]
    strides = [tuple(step[i] for _, step in inner) for i in range(len(steps))]
    return axes[:-3], tuple(size for size, _ in inner), strides
