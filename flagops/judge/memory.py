"""Memory for the arrays of a judged call: it ends at pages nobody may touch, and inputs can be made read-only.

A kernel that goes beyond an array, or writes an input and puts it back, ends its process there.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NONE, _READ, _WRITE = 0, 1, 3
_GUARD = 16  # pages


@cache
def _mprotect() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _protect(address: int, size: int, how: int) -> None:
    if size and _mprotect()(address, size, how):
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """Allocates bytes that end, or begin where `front` says so, at pages without access."""

    def __init__(self, front: bool = False) -> None:
        self.front = front
        self.blocks: list[tuple[int, int]] = []

    def __call__(self, size: int) -> NDArray[Any]:
        page, guard = mmap.PAGESIZE, _GUARD * mmap.PAGESIZE
        whole = -(-size // page) * page
        block = np.frombuffer(mmap.mmap(-1, whole + 2 * guard), np.uint8)
        address = block.__array_interface__["data"][0]
        _protect(address, guard, _NONE)
        _protect(address + guard + whole, guard, _NONE)
        self.blocks.append((address + guard, whole))
        start = guard if self.front else guard + whole - size
        return block[start : start + size]

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Writes to what was allocated end the process while this lasts."""
        for address, size in self.blocks:
            _protect(address, size, _READ)
        try:
            yield
        finally:
            for address, size in self.blocks:
                _protect(address, size, _WRITE)
