"""How compressors walk over tokens: a few sequences at a time, in chunks that end with a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from flagops import config


class Chunk(NamedTuple):
    """Sequences and tokens from and to; tokens the window holds before; windows closed before and within."""

    first: int
    last: int
    start: int
    stop: int
    inside: int
    emitted: int
    windows: int


def chunks(
    batch: int, length: int, m: int, before: int, filled: int, row: int, most: int, share: int = 4
) -> Iterator[Chunk]:
    """Chunks whose tokens and `before` rows of the state, of `row` bytes each, fit a share of the budget and `most`."""
    room = min(config.budget() // share, most) // max(row, 1) - before
    together = max(1, min(batch, room // max(1, min(m, filled + length))))
    step = max(1, room // (together * m)) * m
    for first in range(0, batch if length else 0, together):
        start, inside, emitted = 0, filled, 0
        while start < length:
            stop = min(length, start + step - inside)
            windows = (inside + stop - start) // m
            yield Chunk(first, min(batch, first + together), start, stop, inside, emitted, windows)
            start, inside, emitted = stop, (inside + stop - start) % m, emitted + windows
