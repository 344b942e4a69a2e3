"""Philox4x32-10 of numba kernels: the words of a block from its number, a seed and an offset."""

from __future__ import annotations

import numpy as np

from flagops.backends.numba import jit

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_LEFT, _RIGHT = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL, _OTHER = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@jit
def philox(a, b, c, d, key, other):
    """Four words from a counter of four and a key of two, each in 64 bits."""
    for _ in range(10):
        left, right = a * _LEFT, c * _RIGHT
        a, b, c, d = (right >> _HALF) ^ b ^ key, right & _LOW, (left >> _HALF) ^ d ^ other, left & _LOW
        key, other = (key + _WEYL) & _LOW, (other + _OTHER) & _LOW
    return a, b, c, d


@jit
def block_of(number, seed, offset):
    """The four words of a block of a state's stream."""
    n, s, o = np.uint64(number), np.uint64(seed), np.uint64(offset)
    return philox(n & _LOW, n >> _HALF, o & _LOW, o >> _HALF, s & _LOW, s >> _HALF)
