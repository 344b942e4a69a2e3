"""Narrow weights as they are stored: which tensors make one, by their names, and what it is, by dtypes and shapes.

What does not fit is refused, for a guess would give a model that loads and is wrong.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .configuration import Configuration
from .documents import Refused
from .source import BITS, CONFIG, Stored

FLOATS = ("F32", "BF16", "F16")
BLOCK_SCALES = ("F8_E8M0", "U8", "F32")
"""Dtypes that scales of FP8 in blocks have in DeepSeek's checkpoints."""
ROW = (1, 32)
"""Elements that share a scale in the MX formats, as in the Engram tables of DeepSeek-V4.1."""
_PACKED = ("I8", "U8", "F4")
_FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATIONS = ("input_scale", "input_global_scale", "input_scale_ub")
_PLAIN = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True, slots=True, eq=False)
class Format:
    """Codes of four bits, the low nibble first, or of eight.

    values: of each code. invalid: bits that are all set in codes that are no numbers, 0 if there are none.
    divides: whether the factor of a whole tensor divides its scales.
    """

    name: str
    values: NDArray[np.float32]
    invalid: int = 0
    divides: bool = False

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    def expand(self, codes: Any, scale: Any, block: tuple[int, int], row: int, out: Any) -> None:
        """``values[codes] * scale`` in float32, rounded again to the dtype of `out`, a matrix.

        scale: float32, for blocks of which the first begins `row` rows above the matrix, and at its first column.
        """
        rows, columns = out.shape
        band = (row + np.arange(rows)) // block[0]
        factors = scale[band] if scale.shape[1] == 1 else np.repeat(scale[band], block[1], axis=1)[:, :columns]
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = self._values(codes).reshape(rows, columns) * factors

    def _values(self, codes: Any) -> Any:
        if self.bits == 8:
            return self.values[codes]
        return np.stack([self.values[codes & 15], self.values[codes >> 4]], axis=-1)


_BYTES = np.arange(256, dtype=np.uint8)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP4 = Format("FP4", _E2M1)
FP8 = Format("FP8", _BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32), invalid=0x7F)
_E5M2 = Format("FP8 E5M2", _BYTES.view(ml_dtypes.float8_e5m2).astype(np.float32), invalid=0x7C)
_NVFP4, _NVFP4_DIVIDED = Format("NVFP4", _E2M1), Format("NVFP4", _E2M1, divides=True)
_INT8 = Format("INT8", _BYTES.view(np.int8).astype(np.float32))
_OFFSET = {bits: Format(f"INT{bits}", np.arange(1 << bits, dtype=np.float32) - (1 << bits - 1)) for bits in (4, 8)}


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one narrow weight, and the name that it has when it is wide.

    factor: scales the scales. size: says rows and columns. activations: what the weight's inputs were scaled by.
    """

    name: str
    weight: Stored
    scale: Stored | None = None
    factor: Stored | None = None
    size: Stored | None = None
    activations: tuple[Stored, ...] = ()

    def beside(self) -> Iterator[Stored]:
        """All but the weight."""
        yield from (part for part in (self.scale, self.factor, self.size) if part is not None)
        yield from self.activations


@dataclass(frozen=True, slots=True)
class Layout:
    """What a narrow weight is: its format, its shape when it is wide, and the rows and columns that share a scale."""

    format: Format
    shape: tuple[int, ...]
    block: tuple[int, int]
    transposed: bool = False


def parts(tensor: Stored, tensors: dict[str, Stored], said: Configuration) -> Parts | None:
    """Of a weight that its name and dtype show to be narrow; None for another tensor, or one that nothing scales."""
    for end in ("_packed", "_blocks"):
        if tensor.name.endswith(end) and tensor.dtype in (*_PACKED, "I32"):
            return _packed(tensor, tensor.name.removesuffix(end), tensors)
    if tensor.dtype not in (*_PACKED, *_FP8):
        return None
    names = [f"{tensor.name}_scale_inv", f"{tensor.name}_scale"]
    if tensor.name.endswith(".weight"):
        names.append(f"{tensor.name.removesuffix('.weight')}.scale")
    scales = [tensors[name] for name in names if name in tensors]
    if len(scales) > 1:
        raise Refused(f"{tensor} has two scales, {scales[0]} and {scales[1]}; keep one of them")
    if scales:
        factor = tensors.get(f"{tensor.name}_scale_2")
        return Parts(tensor.name, tensor, scales[0], factor, activations=_activations(tensor, tensors))
    plain = not said.sections and _PLAIN.get(tensor.dtype, "") in said.dtypes
    return Parts(tensor.name, tensor) if plain else None


def _packed(tensor: Stored, name: str, tensors: dict[str, Stored]) -> Parts | None:
    for end in ("_zero_point", "_g_idx"):
        if f"{name}{end}" in tensors:
            raise Refused(f"{tensor} has {tensors[f'{name}{end}']}, which flagops does not read; {remedy(tensor)}")
    scale = tensors.get(f"{name}_scale") or tensors.get(f"{name}_scales")
    if scale is None:
        return None
    factor, size = tensors.get(f"{name}_global_scale"), tensors.get(f"{name}_shape")
    return Parts(name, tensor, scale, factor, size, _activations(tensor, tensors))


def _activations(tensor: Stored, tensors: dict[str, Stored]) -> tuple[Stored, ...]:
    module = tensor.name.rpartition(".")[0]
    return tuple(tensors[name] for end in _ACTIVATIONS if (name := f"{module}.{end}") in tensors)


def layout(made: Parts, said: Configuration) -> Layout:
    """What a narrow weight is. Raises Refused if its tensors and the configuration do not agree."""
    weight, scale = made.weight, made.scale
    if scale is None:
        rows, columns = (1, 1, *weight.shape)[-2:]
        return Layout(_E5M2 if weight.dtype == "F8_E5M2" else FP8, weight.shape, (max(1, rows), max(1, columns)))
    if len(weight.shape) < 2:
        raise Refused(f"{weight} is no matrix, scaled by {scale}; {remedy(weight)}")
    if made.factor is not None and (made.factor.dtype != "F32" or math.prod(made.factor.shape) != 1):
        raise Refused(f"{weight}: {made.factor} scales its scales, expected one F32; {remedy(weight)}")
    if made.size is not None and (made.size.dtype not in ("I64", "I32") or made.size.shape != (2,)):
        raise Refused(f"{weight}: {made.size} says its size, expected two I64; {remedy(weight)}")
    if weight.dtype in _FP8 and made.factor is None:
        return _fp8(weight, scale, said.block)
    if weight.dtype == "I32":
        return _integers(weight, scale, said)
    if weight.dtype == "I8" and scale.dtype in FLOATS and scale.name == f"{weight.name}_scale":
        return _of(weight, scale, _INT8, weight.shape)
    if made.factor is not None and scale.dtype == "F8_E4M3" and weight.dtype in _PACKED:
        divided = made.factor.name.endswith("_global_scale")
        return _of(weight, scale, _NVFP4_DIVIDED if divided else _NVFP4, _halves(weight), 16)
    return _fp4(weight, scale, made.factor)


def _halves(weight: Stored) -> tuple[int, ...]:
    *lead, last = weight.shape
    return (*lead, last if weight.dtype == "F4" else 2 * last)


def _integers(weight: Stored, scale: Stored, said: Configuration) -> Layout:
    if said.bits not in _OFFSET:
        raise Refused(
            f"{weight} is packed, and {CONFIG} does not say in its quantization_config that weights have 4 or 8 "
            f"num_bits, the same in all groups; correct it, or {remedy(weight)}"
        )
    *lead, last = weight.shape
    return _of(weight, scale, _OFFSET[said.bits], (*lead, 32 // said.bits * last))


def _of(weight: Stored, scale: Stored, form: Format, shape: tuple[int, ...], group: int = 0) -> Layout:
    """A scale for each `group` of a row, or, where that is 0, for as many as the shape of the scales says."""
    *lead, rows, columns = shape
    block = _shared(shape, scale.shape)
    if not group and block is None and scale.shape[:-1] == (*lead, rows):
        count = scale.shape[-1]
        block = (1, columns // count) if count and columns % count == 0 else None
    elif group:
        block = (1, group) if scale.shape == (*lead, rows, columns / group) else None
    if block is None or scale.dtype not in (("F8_E4M3",) if group else FLOATS):
        each = (
            f"F8_E4M3 {[*lead, rows, columns / group]}" if group else f"F32, BF16 or F16 {[*lead, rows]}, with groups"
        )
        raise Refused(f"{weight} is scaled by {scale}, expected for {form.name} {each} of a row; {remedy(weight)}")
    return Layout(form, shape, block)


def _fp8(weight: Stored, scale: Stored, block: tuple[int, int]) -> Layout:
    """FP8 in the blocks of the configuration, in rows of 32, or in whole rows, columns or matrices, as scales lie."""
    fitting = (each for each in (block, ROW) if scale.shape == blocks(weight.shape, each))
    found = next(fitting, None)
    if found is None and scale.dtype in FLOATS:
        found = _shared(weight.shape, scale.shape)
    if found is None or scale.dtype not in (*BLOCK_SCALES, *FLOATS):
        height, width = block
        shapes = f"{list(blocks(weight.shape, block))}: one scale for each {height} x {width} block"
        shapes += f", or {list(blocks(weight.shape, ROW))}: one for each 1 x 32"
        raise Refused(f"{weight} is scaled by {scale}, expected F8_E8M0, F32, BF16 or F16 {shapes}; {remedy(weight)}")
    return Layout(_E5M2 if weight.dtype == "F8_E5M2" else FP8, weight.shape, found)


def _shared(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """The block of scales for whole rows, columns or matrices."""
    *lead, rows, columns = shape
    whole = max(1, rows), max(1, columns)
    if not lead and scales in ((), (1,)):
        return whole
    if scales == (*lead, rows, 1) or (not lead and scales == (rows,)):
        return 1, whole[1]
    return {(*lead, 1, columns): (whole[0], 1), (*lead, 1, 1): whole}.get(scales)


def _fp4(weight: Stored, scale: Stored, factor: Stored | None) -> Layout:
    """MXFP4: a power of two for 32 of a row; where these stand in an axis of their own, loaders want it transposed."""
    apart = weight.name.endswith("_blocks")
    shape = _halves(weight)
    if apart and len(shape) > 2:
        shape = (*shape[:-2], shape[-2] * shape[-1])
    *lead, rows, columns = shape
    right = scale.dtype in ("F8_E8M0", "U8") and columns % 32 == 0 and scale.shape == (*lead, rows, columns // 32)
    if not right or factor is not None or weight.dtype in _FP8 or (apart and weight.shape[-1] != 16):
        raise Refused(
            f"{weight} is scaled by {scale}, expected F8_E8M0 {[*lead, rows, columns / 32]}: "
            f"one scale for 32 of K = {columns}; {remedy(weight)}"
        )
    return Layout(FP4, (*lead, columns, rows) if apart else shape, ROW, apart)


def blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks a matrix, or each of several, has in rows and columns."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def unscaled(tensor: Stored) -> None:
    """Refuse a narrow tensor without its scale, and a scale without its weight."""
    packed = tensor.name.endswith("_packed") and tensor.dtype == "I32"
    if (BITS[tensor.dtype] <= 8 and tensor.dtype != "BOOL") or packed:
        missing = "no weight of one byte" if tensor.dtype == "F8_E8M0" else "no scale"
        raise Refused(f"{tensor} has one byte for an element or less, and {missing} belongs to it; {remedy(tensor)}")
    for end in ("_scale_inv", "_scale"):
        if tensor.name.endswith(f".weight{end}") or tensor.name.endswith("_scale_inv"):
            raise Refused(f"{tensor} is a scale, but {tensor.name.removesuffix(end)!r} is not of one byte")


def remedy(tensor: Stored) -> str:
    return (
        f"flagops knows narrow weights of DeepSeek, Qwen, gpt-oss, compressed-tensors and ModelOpt: leave the tensor "
        f"as it is stored with --keep '{glob.escape(tensor.name)}', or convert it by other means"
    )
