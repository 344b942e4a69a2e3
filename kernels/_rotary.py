"""The angles of YaRN's table, one for each pair of channels; and the pair swap for vectors."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=64)
def frequencies(dim: int, base: float, factor: float, original: float, fast: float, slow: float) -> Any:
    """float32 [dim / 2], each step rounded to float32."""
    one = np.float32(1)
    pair = np.arange(0, dim, 2)
    plain = one / (float(np.float32(base)) ** (pair / max(dim, 1))).astype(np.float32)
    if factor == 1:
        return plain
    edges = [dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
    width = np.float32(high - low or 0.001)
    ramp = np.minimum(np.maximum((pair // 2 - np.float32(low)).astype(np.float32) / width, 0), 1)
    return plain / np.float32(factor) * ramp + plain * (one - ramp)
