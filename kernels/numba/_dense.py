"""What dense attention and its backward read alike: matrices of a batch, and logits under masks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from flagops.arrays import dtype_name
from flagops.backends.numba import jit, pointer, strides

from ._blocks import get, put, vget, vput
from ._vectors import BYTE, cast, lanes, load, size, vload, vload_mask, where

NONE, _BOOL, _ADDED = 0, 1, 2  # kinds of masks


def matrices(x: Any, lead: tuple[int, ...]) -> tuple[int, Any, int, int]:
    """Address, and `places_of`."""
    return pointer(x), *places_of(tuple(x.shape), strides(x), lead)


def places_of(shape: tuple[int, ...], steps: tuple[int, ...], lead: tuple[int, ...]) -> tuple[Any, int, int]:
    """Where each matrix starts, in elements, with batch axes that broadcast to `lead`; strides in a matrix."""
    return _starts(shape[:-2], steps[:-2], lead), steps[-2], steps[-1]


@lru_cache(maxsize=256)
def _starts(shape: tuple[int, ...], steps: tuple[int, ...], lead: tuple[int, ...]) -> Any:
    """One table for all calls alike, which none may write."""
    places = np.zeros(lead, np.int64)
    for axis, (extent, step) in enumerate(zip(shape, steps, strict=True), len(lead) - len(shape)):
        if extent > 1:
            places += (np.arange(extent) * step).reshape(-1, *[1] * (len(lead) - axis - 1))
    return places.reshape(-1)


def alike(x: Any) -> Any:
    """An array of the same shape, dtype and library, whose axes lie in memory in the same order."""
    if not hasattr(x, "new_empty"):
        return np.empty_like(x)
    import torch

    return torch.empty_like(x)


@jit
def row_of(tag, x, matrix, row):
    """The address of a row of one of `matrices`."""
    address, places, step, _ = x
    return address + (places[matrix] + row * step) * size(tag)


def mask_of(mask: Any, lead: tuple[int, ...]) -> tuple[Any, ...]:
    """As `matrices`, and of which kind it is; None for none."""
    if mask is None:
        return 0, *mask_places(None, lead)
    return pointer(mask), *mask_places((dtype_name(mask), tuple(mask.shape), strides(mask)), lead)


def mask_places(mask: Any, lead: tuple[int, ...]) -> tuple[Any, int, int, int]:
    """Of a mask's dtype, shape and strides, or of none, what `mask_of` says behind the address."""
    if mask is None:
        return _starts((), (), (1,)), 0, 0, NONE
    name, shape, steps = mask
    return *places_of(shape, steps, lead), _BOOL if name == "uint8" else _ADDED


@jit
def cover(tag, line, begin, seen, t, scale, mask, matrix):
    """The first products of a line to logits: times the scale, plus the mask, -inf where a key does not count."""
    address, places, row, column, kind = mask
    real, step, item = line.tag, lanes(line.tag), 1 if kind == _BOOL else size(tag)
    origin, factor = address + (places[matrix] + t * row + begin * column) * item, cast(line.tag, scale)
    for j in range(0, seen, step):
        vput(line, 0, j, vget(line, 0, j) * factor)
    whole = seen - seen % step if column == 1 else 0
    if kind == _BOOL:
        for j in range(0, whole, step):
            vput(line, 0, j, where(vload_mask(real, origin + j), vget(line, 0, j), -np.inf))
        for j in range(whole, seen):
            if load(BYTE, origin + j * column) == 0:
                put(line, 0, j, -np.inf)
    elif kind == _ADDED:
        for j in range(0, whole, step):
            vput(line, 0, j, vget(line, 0, j) + vload(tag, origin + j * item))
        for j in range(whole, seen):
            put(line, 0, j, get(line, 0, j) + load(tag, origin + j * column * item))
