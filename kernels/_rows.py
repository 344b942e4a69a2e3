"""Leading axes of several tensors walked together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Steps = Sequence[int]


def rows(shape: Steps, *steps: Steps) -> Iterator[tuple[list[int], tuple[int, ...], list[tuple[int, ...]]]]:
    """Blocks of three axes that cover all leading axes: element offsets, sizes, and strides of each tensor.

    Axes of size 1 are dropped and neighbours are merged where every tensor's strides allow it.
    """
    if 0 in shape:
        return
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, step in zip(shape, zip(*steps, strict=True), strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], step, strict=True)):
            axes[-1] = (axes[-1][0] * size, step)
        else:
            axes.append((size, step))
    while len(axes) < 3:
        axes.insert(0, (1, (0,) * len(steps)))
    outer, inner = axes[:-3], axes[-3:]
    sizes = tuple(size for size, _ in inner)
    strides = [tuple(axis[1][i] for axis in inner) for i in range(len(steps))]
    for place in itertools.product(*(range(size) for size, _ in outer)):
        offsets = [sum(at * axis[1][i] for at, axis in zip(place, outer, strict=True)) for i in range(len(steps))]
        yield offsets, sizes, strides
