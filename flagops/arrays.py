"""torch tensors and NumPy arrays seen alike, without importing the library that a caller does not use."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

HALF = ("float16", "bfloat16")
FLOATS = (*HALF, "float32", "float64")


@lru_cache(maxsize=None)
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else str(getattr(dtype, "name", dtype))


def dtype_name(x: Any) -> str:
    """The dtype of an array by the name that torch, NumPy and ml_dtypes share, such as ``"bfloat16"``."""
    return _name(x.dtype)


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_numpy(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)
