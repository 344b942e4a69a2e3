"""Conversion in memory: the tensors of a checkpoint one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flagops import arrays

from .documents import Refused
from .plan import Plan
from .source import Source
from .stream import Kernels, Stream

_SLICE = 2 << 20  # elements; enough for the kernels to use all processors
_OUTPUTS = ("bfloat16", "float16", "float32")
_NUMPY = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "BOOL": "bool"}
_NO_ARRAYS = ("F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def load(
    src: Any,
    dtype: Any = "bfloat16",
    *,
    keep: str | Iterable[str] = (),
    framework: str = "torch",
    backend: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Named tensors of a checkpoint one by one, narrow weights dequantised, in the order of its files.

    Args:
        src: a folder with safetensors and their index.
        dtype: what narrow weights become, ``"bfloat16"``, ``"float16"`` or ``"float32"``; others stay as they are.
        keep: patterns of the names of tensors to yield as they are stored, scales included, as in `convert`.
        framework: ``"torch"`` for tensors on the CPU, ``"numpy"`` for arrays (of ml_dtypes where NumPy has no dtype).
        backend: of the kernels; None for the fastest.

    Yields:
        ``(name, tensor)``. One tensor is in memory at a time if the caller keeps none.

    Raises:
        Refused: (a ValueError) as in `convert`, also where a value overflows `dtype`.
    """
    name = arrays.parse_dtype(dtype)
    if name not in _OUTPUTS:
        raise Refused(f"dtype {name}: expected {', '.join(_OUTPUTS)}")
    if framework not in ("torch", "numpy"):
        raise Refused(f"framework {framework!r}: expected 'torch' or 'numpy'")
    plan = Plan(Source(src), keep=keep)
    for out in plan.outputs:
        if out.dtype in _NO_ARRAYS:
            raise Refused(f"keep: {out.weight} is of a dtype that arrays lack here; leave it to `convert`")
    return _load(plan, name, framework, Kernels(plan, backend))


def _load(plan: Plan, dtype: str, framework: str, kernels: Kernels) -> Iterator[tuple[str, Any]]:
    with Stream(plan, kernels, _SLICE, dtype) as stream:
        for out in plan.outputs:
            kind = dtype if out.made else _NUMPY.get(out.dtype) or _numpy_name(out.dtype)
            array = np.empty(out.shape, arrays.numpy_dtype(kind))
            raw, filled = array.reshape(-1).view(np.uint8), 0
            for piece in stream.output(out):
                raw[filled : filled + len(piece)] = piece
                filled += len(piece)
            yield out.name, arrays.as_torch(array) if framework == "torch" else array


def _numpy_name(dtype: str) -> str:
    kinds = {"F": "float", "I": "int", "U": "uint", "C": "complex"}
    return kinds[dtype[0]] + dtype[1:]
