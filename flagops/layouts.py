"""How arrays of a call lie in memory: views with gaps, steps and orders, and the poisoned rooms around them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops import arrays

Array = NDArray[Any]
Allocate = Callable[[int], Array]
"""Bytes of memory, uint8."""

SPREAD = ("expanded", "expanded last", "expanded all")
"""A stride of 0: of the first axis with more than one element, of the last one, of all; inputs alone."""
FLIPPED = ("reversed", "flipped")
"""Negative strides, of the last axis or the first; NumPy alone has them."""
UNWRITABLE = (*SPREAD, "overlapping")
"""Several elements in one place: windows one element apart, as `unfold` gives them, besides."""
LAYOUTS = (
    "contiguous", "transposed", "strided", "offset", "expanded", "reversed", "padded", "swapped", "permuted",
    "stepped", "sliced", "batch gaps", "cut", "far", "expanded last", "expanded all", "flipped",
    "overlapping",
)  # fmt: skip
_FAR = (1 << 31) + (1 << 12)  # elements, and so bytes, from the first to the last
_NORESERVE = 0x4000 if hasattr(mmap, "MAP_ANONYMOUS") else 0  # Linux: no memory until it is touched


@dataclass(frozen=True)
class Place:
    """An array and the memory around it: ``cut(room)`` is the array, and of a mask like the room its part."""

    room: Array
    cut: Callable[[Array], Array]

    @property
    def view(self) -> Array:
        return self.cut(self.room)

    def fill(self, x: Array) -> None:
        """Give the array other values; of what has a stride of 0, those of its first row."""
        view = self.view
        steps = [slice(0, 1) if step == 0 and size > 1 else slice(None) for step, size in _axes(view)]
        view[(*steps, ...)] = x[(*steps, ...)]


def _axes(x: Array) -> list[tuple[int, int]]:
    return list(zip(x.strides, x.shape, strict=True))


def heap(size: int) -> Array:
    return np.empty(size, np.uint8)


def place(shape: tuple[int, ...], dtype: Any, layout: str, allocate: Allocate = heap) -> Place:
    """Memory for an array in a layout; a layout that the shape is too small for is a simpler one."""
    dtype, rank = np.dtype(dtype), len(shape)
    if layout == "far" and hasattr(mmap, "MAP_PRIVATE") and max(shape, default=0) > 1 and 0 not in shape:
        return _far(shape, dtype)
    if layout in SPREAD and max(shape, default=0) > 1 and 0 not in shape:
        return _spread(shape, dtype, layout, allocate)
    if layout == "overlapping" and rank > 1 and 0 not in shape:
        return _windows(shape, dtype, allocate)
    if layout == "offset":
        size = math.prod(shape)
        room = allocate((size + 6) * dtype.itemsize).view(dtype)
        return Place(room, lambda x: x[3 : 3 + size].reshape(shape))
    order, cuts = list(range(rank)), [(0, 1, 0)] * rank  # memory's axes, outermost first; before, step, after of each
    if layout == "transposed":
        order.reverse()
    elif layout == "swapped" and rank > 1:
        order[-2:] = order[:-3:-1]
    elif layout == "permuted":
        order[:-1] = order[-2::-1] if rank > 1 else []
    elif layout in ("strided", "cut"):  # three axes at most: each gap of an axis of size 1 multiplies the room
        for at in {0, rank - 2, rank - 1} & set(range(rank)):
            cuts[at] = (1, 2, 0) if layout == "strided" else (1, 1, 2)
    elif rank and layout in ("padded", "stepped", "sliced", "batch gaps"):
        at = {"sliced": max(rank - 2, 0), "batch gaps": 0}.get(layout, rank - 1)
        cuts[at] = {"padded": (0, 1, 3), "sliced": (1, 1, 2)}.get(layout, (0, 2, 1))
    sizes = [before + step * size + after for size, (before, step, after) in zip(shape, cuts, strict=True)]
    room = allocate(math.prod(sizes) * dtype.itemsize).view(dtype).reshape([sizes[i] for i in order])
    room = room.transpose(np.argsort(order)) if rank else room
    picks = [slice(b, b + step * size, step) for size, (b, step, _) in zip(shape, cuts, strict=True)]
    flip = {"reversed": rank - 1, "flipped": 0}.get(layout, -1) if rank else -1

    def cut(x: Array) -> Array:
        part: Array = x[(*picks, ...)]  # type: ignore[arg-type]
        return np.flip(part, flip) if flip >= 0 else part

    return Place(room, cut)


def _spread(shape: tuple[int, ...], dtype: Any, layout: str, allocate: Allocate) -> Place:
    """A stride of 0 over one axis, or over all."""
    long = [i for i, size in enumerate(shape) if size > 1]
    zero = long if layout == "expanded all" else [long[0] if layout == "expanded" else long[-1]]
    small = tuple(1 if i in zero else size for i, size in enumerate(shape))
    room = allocate(math.prod(small) * dtype.itemsize).view(dtype).reshape(small)
    return Place(room, lambda x: np.lib.stride_tricks.as_strided(x, shape, _steps(x, zero)))


def _windows(shape: tuple[int, ...], dtype: Any, allocate: Allocate) -> Place:
    """Rows of the last axis that begin one element after each other."""
    rows = (*shape[:-2], shape[-2] + shape[-1] - 1)
    room = allocate(math.prod(rows) * dtype.itemsize).view(dtype).reshape(rows)
    return Place(
        room, lambda x: np.lib.stride_tricks.as_strided(x, shape, (*x.strides[:-1], x.strides[-1], x.strides[-1]))
    )


def _steps(x: Array, zero: list[int]) -> tuple[int, ...]:
    return tuple(0 if i in zero else step for i, step in enumerate(x.strides))


def _far(shape: tuple[int, ...], dtype: Any) -> Place:
    """Rows of one axis so far apart that offsets pass 2^31, in elements too; one row's memory is touched around each.

    Raises OSError where the system has no room for the addresses.
    """
    at = next(i for i, size in enumerate(shape) if size > 1)
    inner = tuple(size + 2 if i == len(shape) - 1 and i != at else size for i, size in enumerate(shape) if i != at)
    step = max(-(-_FAR // (shape[at] - 1)), math.prod(inner))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    size = ((shape[at] - 1) * step + math.prod(inner)) * dtype.itemsize
    memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)
    rows = np.lib.stride_tricks.as_strided(
        memory, (shape[at], *inner), (step * dtype.itemsize, *np.empty(inner, dtype).strides)
    )
    room = np.moveaxis(rows, 0, at)
    padded = at != len(shape) - 1
    return Place(room, lambda x: x[..., 1:-1] if padded else x)


def put(x: Array, layout: str, allocate: Allocate = heap) -> Place:
    """An array's values in a layout, poison in the gaps; what has a stride of 0 repeats its first row."""
    found = place(x.shape, x.dtype, layout, allocate)
    if found.room.size != x.size:
        poison(found.room, x)
    found.fill(x)
    return found


def poison(room: Array, like: Array | None = None) -> None:
    """Fill memory with what nobody may read: NaN, of integers other elements, or bytes that no result looks like."""
    if arrays.dtype_name(room) in arrays.FLOATS:
        room[...] = np.nan
    elif like is not None and like.size:
        room[...] = np.resize(like.reshape(-1)[::-1], room.shape)
    else:
        bits(room)[...] = 0x5A5A5A5A5A5A5A5A & (2 ** (8 * room.itemsize) - 1)


def bits(x: Array) -> Array:
    """The bits of an array as unsigned integers."""
    return x.view(f"u{x.dtype.itemsize}")


def writable(shape: tuple[int, ...], dtype: str, layout: str, allocate: Allocate = heap) -> Place:
    """A poisoned array to write into, and all the memory around it: a kernel must fill the one and not the rest."""
    layout = "cut" if layout in UNWRITABLE else "offset" if layout == "contiguous" and allocate is heap else layout
    found = place(shape, arrays.numpy_dtype(dtype), layout, allocate)
    poison(found.room)
    return found
