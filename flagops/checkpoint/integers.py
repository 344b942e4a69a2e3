"""Weights as integers for W8A8 and W4A8: symmetric, rounded to nearest, as compressed-tensors stores them.

A source of narrow weights says with them which layers are linear; of wide ones all matrices are taken. Embeddings,
heads and routers stay floats, as nobody serves them in integers, and grouped projections, which are several matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .documents import Refused

_FLOATING = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|head|output|gate|router|\w*norm\w*|wo_a|o_a_proj)\.weight$")
_GROUP = 32  # elements of INT4 that share a scale
_LEAST = np.float32(2.0**-100)  # a scale of bfloat16, far from its subnormals
DEEPEST = 131_071
"""Products whose sum 32 bits hold (`flagops.int8_matmul`)."""

Quantize = Callable[[Any, Any, Any], None]
"""`flagops.int8_quantize` of its first argument into the others."""


@dataclass(frozen=True, slots=True)
class Integers:
    """A format to write: bits of a code, elements of a row under one scale (0: all), and the scales' dtype."""

    name: str
    bits: int
    group: int
    scale: str
    packing: str

    def stored(self, name: str, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...], str]]:
        """The tensors of a weight: which part each is, its name, shape and dtype; the codes come first."""
        rows, columns = shape
        if self.bits == 8:
            return [("codes", name, shape, "I8"), ("scale", f"{name}_scale", (rows, 1), self.scale)]
        return [
            ("codes", f"{name}_packed", (rows, columns // 8), "I32"),
            ("scale", f"{name}_scale", (rows, columns // self.group), self.scale),
            ("size", f"{name}_shape", (2,), "I64"),
        ]

    def quantize(self, values: Any, by: Quantize) -> tuple[Any, Any]:
        """Codes of int8 ``[rows, columns]`` and scales of whole rows of float32; not finite where a value is not."""
        if self.bits == 8:
            codes, scale = np.empty(values.shape, np.int8), np.empty((len(values), 1), np.float32)
            by(values, codes, scale)
            return codes, scale
        scale = self.scales(values, by)
        groups = values.reshape(len(values), -1, self.group)
        with np.errstate(invalid="ignore", over="ignore"):
            codes = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7).astype(np.int8)
        return codes.reshape(values.shape), scale

    def scales(self, values: Any, by: Quantize) -> Any:
        """What `quantize` gives besides codes."""
        if self.bits == 8:
            return self.quantize(values, by)[1]
        top = np.abs(values).reshape(len(values), -1, self.group)
        while top.shape[-1] > 1:  # halves are compared as vectors, a row of 32 one by one
            half = top.shape[-1] // 2
            top = np.maximum(top[..., :half], top[..., half:])
        with np.errstate(invalid="ignore", over="ignore"):  # from -8 to 7 are 15 steps
            return np.maximum(top[..., 0] / np.float32(7.5), _LEAST).astype(ml_dtypes.bfloat16)

    def packed(self, codes: Any) -> Any:
        """Codes as they are stored."""
        if self.bits == 8:
            return codes
        nibbles = (codes + 8).astype(np.uint8)
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4

    def restored(self, codes: Any, scale: Any) -> Any:
        """The values that codes stand for, float64."""
        groups = codes.reshape(*scale.shape, -1) * scale.astype(np.float64)[..., None]
        return groups.reshape(codes.shape)

    def section(self, left: Sequence[str]) -> dict[str, Any]:
        """A quantization_config; `left` are the modules that are not quantised."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors", "format": self.packing, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(left),
        }  # fmt: skip


INTEGERS = {
    "int8": Integers("INT8", 8, 0, "F32", "int-quantized"),
    "w4a8": Integers("INT4", 4, _GROUP, "BF16", "pack-quantized"),
}


def linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a wide tensor is a weight to quantise, by its name and shape."""
    return len(shape) == 2 and 0 not in shape and name.endswith(".weight") and not floating(name)


def floating(name: str) -> bool:
    """Whether a weight is one that stays a float, by its name."""
    return bool(_FLOATING.search(name))


def fitting(to: Integers, weight: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a weight that can be quantised. Raises Refused with the remedy."""
    if len(shape) != 2:
        raise Refused(f"{weight} is a stack of matrices, of which loaders take no integers; use --to bf16")
    rows, columns = shape
    if not 0 < columns <= DEEPEST or (to.group and columns % to.group):
        expected = f"a multiple of {to.group}, " if to.group else ""
        raise Refused(
            f"{weight}: rows of {columns} elements cannot be {to.name}, expected {expected}from 1 to {DEEPEST}; "
            "use --to bf16"
        )
    return rows, columns


class Errors:
    """The relative error of a tensor: that of its rows is summed exactly, so that slices of any size give the same."""

    def __init__(self) -> None:
        self._lost: list[float] = []
        self._all: list[float] = []

    def add(self, values: Any, restored: Any) -> None:
        exact = values.astype(np.float64)
        self._lost += np.square(exact - restored).sum(1).tolist()
        self._all += np.square(exact).sum(1).tolist()

    @property
    def relative(self) -> float:
        """The root of the sum of squares, of the error by that of the values; to six digits."""
        whole = math.fsum(self._all)
        return float(f"{math.sqrt(math.fsum(self._lost) / whole):.6g}") if whole else 0.0
