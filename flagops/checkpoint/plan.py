"""What becomes of each tensor, and where it will lie: from the source and the options alone, before anything is read.

A weight of one byte is converted only if name, dtypes and the shape of its scale agree; every other one-byte tensor is
refused, for a guess would give a model that loads and is wrong.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from . import documents
from .configuration import Configuration, modules, statements
from .documents import Refused
from .source import BITS, CONFIG, INDEX, Source, Stored

LAYOUT = 1  # raised when the same source and options are laid out otherwise
TARGETS = ("bf16", "fp8")
COPY, FP4, FP8, RECODE, RECODED_SCALE, KEEP, KEPT_SCALE, STORED = (
    "copied", "FP4 to BF16", "FP8 to BF16", "FP4 to FP8", "scale of FP4 to FP8", "FP8 kept", "scale of FP8 kept",
    "kept as stored",
)  # fmt: skip
_FP4_DTYPES = ("I8", "U8", "F4")
_CODES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_WIDE = ("BF16", "F16", "F32")
_FP8_SCALES = ("F8_E8M0", "U8", "F32")
_ROW = (1, 32)  # elements of FP8 that share a scale in the MX formats, as in the Engram tables of DeepSeek-V4.1
_ELSEWHERE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write, and what it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    weight: Stored
    scale: Stored | None = None
    block: tuple[int, int] = (128, 128)

    @property
    def size(self) -> int:
        """Bytes."""
        return _count(self.shape) * BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Matrices, rows and columns, in elements."""
        *lead, rows, columns = self.shape
        return _count(lead), rows, columns


@dataclass(frozen=True)
class Shard:
    """A file to write: the header and then the tensors, in order."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def header(self) -> bytes:
        """Length and JSON, padded to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for out in self.outputs:
            entries[out.name] = {"dtype": out.dtype, "shape": out.shape, "data_offsets": (end, end + out.size)}
            end += out.size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data

    @cached_property
    def data(self) -> int:
        """Bytes of the tensors."""
        return sum(out.size for out in self.outputs)


class Plan:
    """The files that a conversion writes. Raises Refused for what cannot be converted, naming it.

    keep: patterns of the names of tensors that are left as they are stored, a weight and its scale together.
    """

    def __init__(
        self, source: Source, to: str = "bf16", shard_size: int = 5 << 30, keep: str | Iterable[str] = ()
    ) -> None:
        if to not in TARGETS:
            raise Refused(f"--to {to}: expected {' or '.join(TARGETS)}")
        self.source, self.to, self.shard_size = source, to, shard_size
        self.keep = sorted({keep} if isinstance(keep, str) else set(keep))
        self.kept = _kept(source.tensors, self.keep)
        self.said = Configuration(source.config)
        self.outputs = outputs(source.tensors, to, self.said.block, self.kept)
        wanted = (FP4, FP8) if to == "bf16" else (RECODE,)
        if not any(out.action in wanted for out in self.outputs):
            beyond = f" beyond --keep {' '.join(self.keep)}" if self.keep else ""
            raise Refused(
                f"{source.folder} holds no tensor to convert from {' or '.join(wanted)}{beyond}; use it as it is"
            )
        groups = _groups(self.outputs, shard_size)
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        self.shards = [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
        self.data = sum(shard.data for shard in self.shards)
        self.counts = dict(Counter(out.action for out in self.outputs))
        self.dropped = len(source.tensors) - len({out.name for out in self.outputs} & source.tensors.keys())

    @cached_property
    def notes(self) -> list[str]:
        """What copied files go on to say."""
        return _beside(self.source)

    @cached_property
    def configuration(self) -> tuple[dict[str, Any] | None, list[str]]:
        """That of the output, and what was changed in it, in words."""
        tensors = {name: self.source.tensors[name] for name in self.kept}
        packed = [t for t in tensors.values() if t.dtype in _FP4_DTYPES and _scales(t, tensors)]
        if self.to == "fp8":
            if packed:
                raise Refused(f"--keep: {packed[0]} would stay FP4 beside FP4 made FP8; use --to bf16")
            scales = {scale.name for t in tensors.values() for scale in _scales(t, tensors)}
            scales |= {out.name for out in self.outputs if out.action == KEPT_SCALE}
            wide = (name for name in sorted(scales) if self.source.tensors[name].dtype == "F32")
            return self.said.in_fp8(next(wide, None))
        left = {t.name for t in packed} | {t.name for t in tensors.values() if t.dtype in _CODES}
        converted = [out.name for out in self.outputs if out.action in (FP4, FP8)]
        plain = [
            out.name
            for out in self.outputs
            if out.dtype in _WIDE and out.name.endswith(".weight") and len(out.shape) > 1
        ]
        others, kept = modules(converted, plain, sorted(left))
        return self.said.in_bf16(kept, others, bool(packed))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a finished or interrupted conversion must have been made of to be this one."""
        made = {"source": self.source.fingerprint(), "to": self.to, "shard_size": self.shard_size, "layout": LAYOUT}
        return made | ({"keep": self.keep} if self.keep else {})

    @cached_property
    def texts(self) -> dict[str, bytes]:
        """The small files that are written rather than copied; the index comes last."""
        index = {
            "metadata": {"total_size": self.data},
            "weight_map": {name: shard.name for name, shard in sorted(self._places())},
        }
        texts = {INDEX: (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()}
        config, _ = self.configuration
        if config is not None:
            texts = {CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()} | texts
        return texts

    @cached_property
    def total(self) -> int:
        """Bytes of all files of the output, but for the manifest."""
        copied = sum(self.source.stamps[name].size for name in self.source.others)
        return sum(shard.size for shard in self.shards) + copied + sum(map(len, self.texts.values()))

    def _places(self) -> Iterator[tuple[str, Shard]]:
        for shard in self.shards:
            for out in shard.outputs:
                yield out.name, shard


def outputs(
    tensors: dict[str, Stored], to: str, block: tuple[int, int] = (128, 128), kept: Iterable[str] = ()
) -> list[Output]:
    """What becomes of each tensor, in the order of the source; a scale that is kept follows its weight."""
    kept = set(kept)
    rest = [tensor for tensor in tensors.values() if tensor.name not in kept]
    scales = {t.name: scale for t in rest if (scale := _scale(t, tensors)) is not None}
    claimed: dict[str, str] = {}
    for weight, scale in scales.items():
        if scale.name in claimed or scale.name in scales:
            raise Refused(f"{scale} would scale {weight!r} and {claimed.get(scale.name, 'be scaled itself')!r}")
        claimed[scale.name] = weight
    made: list[Output] = []
    for tensor in tensors.values():
        if tensor.name in claimed:
            continue
        if tensor.name in kept:
            made.append(Output(tensor.name, tensor.dtype, tensor.shape, STORED, tensor))
        elif tensor.name in scales:
            made += _converted(tensor, scales[tensor.name], to, block)
        elif BITS[tensor.dtype] <= 8 and tensor.dtype != "BOOL":
            missing = "no weight of one byte" if tensor.dtype == "F8_E8M0" else "no scale"
            raise Refused(
                f"{tensor} has one byte for an element or less, and {missing} belongs to it; {_remedy(tensor)}"
            )
        elif tensor.name.endswith("_scale_inv"):
            raise Refused(f"{tensor} is a scale, but {tensor.name.removesuffix('_scale_inv')!r} is not of one byte")
        else:
            made.append(Output(tensor.name, tensor.dtype, tensor.shape, COPY, tensor))
    return made


def _kept(tensors: dict[str, Stored], patterns: Sequence[str]) -> list[str]:
    """The names that patterns match, a weight and its scale together, in the order of the files."""
    found = set()
    for pattern in patterns:
        matched = {name for name in tensors if fnmatchcase(name, pattern)}
        if not matched:
            raise Refused(f"--keep {pattern}: no tensor has such a name; did you mean {_nearest(pattern, tensors)!r}?")
        found |= matched
    for tensor in tensors.values() if found else ():
        pair = {tensor.name, *(scale.name for scale in _scales(tensor, tensors))}
        found |= pair if pair & found else set()
    return [name for name in tensors if name in found]


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The name most like a pattern, its numbers replaced; one that holds the pattern's longest word, if any does."""
    kinds = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    longest = max(re.split(r"[*?.\[\]]+", pattern), key=len)
    holding = sorted(kind for kind in kinds if longest in kind) or sorted(kinds)
    return difflib.get_close_matches(pattern, holding, n=1, cutoff=0)[0]


def _beside(source: Source) -> list[str]:
    """Notes on copied files that still describe the formats of the source; refuses one that others would believe."""
    notes = []
    for name in source.others:
        last = name.rpartition("/")[2]
        if name in _ELSEWHERE:
            raise Refused(
                f"{source.folder / name} describes a quantisation beside {CONFIG}: say it there, or remove it"
            )
        if last == CONFIG:
            try:
                found = statements(documents.configuration(source.path(name), source.memory)[0])
            except Refused as error:
                notes.append(f"{name} is copied as it is, unread: {error}")
            else:
                notes += [f"{name} is copied as it is and still says {', '.join(found[:4])}"] if found else []
    return notes


def _remedy(tensor: Stored) -> str:
    return (
        f"flagops knows FP4 and FP8 blocks of DeepSeek checkpoints: leave the tensor as it is stored with "
        f"--keep '{glob.escape(tensor.name)}', or convert it by other means"
    )


def slices(rows: int, columns: int, unit: tuple[int, int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles (first row, last row, first column, last column) of at most `limit` elements that cover a matrix.

    Each is contiguous and in order: whole bands of `unit` rows, rows inside one band, or columns of one row, these in
    whole units. Where one unit of columns is more than `limit`, it is taken whole.
    """
    height, width = unit
    if not rows or not columns:
        return
    if columns <= limit:
        step = limit // columns
        if step >= height:
            step -= step % height
        else:
            step = -(-height // -(-height // step))  # equal parts of a band
        for band in range(0, rows, max(step, height)):
            last = min(band + max(step, height), rows)
            for row in range(band, last, step):
                yield row, min(row + step, last), 0, columns
    else:
        step = max(width, limit - limit % width)
        for row in range(rows):
            for column in range(0, columns, step):
                yield row, row + 1, column, min(column + step, columns)


def _scales(tensor: Stored, tensors: dict[str, Stored]) -> list[Stored]:
    """What scales a tensor by its name, for `X.weight` in either naming and for stacked experts."""
    if tensor.dtype not in (*_FP4_DTYPES, "F8_E4M3"):
        return []
    names = [f"{tensor.name}_scale_inv"]
    if tensor.name.endswith(".weight"):
        names.append(f"{tensor.name.removesuffix('.weight')}.scale")
    return [tensors[name] for name in names if name in tensors]


def _scale(tensor: Stored, tensors: dict[str, Stored]) -> Stored | None:
    found = _scales(tensor, tensors)
    if len(found) > 1:
        raise Refused(f"{tensor} has two scales, {found[0]} and {found[1]}; keep one of them")
    return found[0] if found else None


def _converted(weight: Stored, scale: Stored, to: str, block: tuple[int, int]) -> list[Output]:
    if len(weight.shape) < 2:
        raise Refused(f"{weight} is no matrix, scaled by {scale}; {_remedy(weight)}")
    if weight.dtype == "F8_E4M3":
        return _fp8(weight, scale, to, block)
    *lead, rows, last = weight.shape
    columns = last if weight.dtype == "F4" else 2 * last
    if scale.dtype not in ("F8_E8M0", "U8") or columns % 32 or scale.shape != (*lead, rows, columns // 32):
        raise Refused(
            f"{weight} is scaled by {scale}, expected F8_E8M0 {[*lead, rows, columns / 32]}: "
            f"one scale for 32 of K = {columns}; {_remedy(weight)}"
        )
    shape = (*lead, rows, columns)
    if to == "bf16":
        return [Output(weight.name, "BF16", shape, FP4, weight, scale)]
    if rows % 128 or columns % 128 or block != (128, 128):
        raise Refused(f"{weight} does not divide into 128 x 128 blocks of FP8 ({block} in {CONFIG}); use --to bf16")
    return [
        Output(weight.name, "F8_E4M3", shape, RECODE, weight, scale),
        Output(scale.name, "F8_E8M0", _blocks(shape, block), RECODED_SCALE, weight, scale),
    ]


def _fp8(weight: Stored, scale: Stored, to: str, block: tuple[int, int]) -> list[Output]:
    """FP8 in the blocks of the configuration, or in rows of 32 where the shape of the scale says so."""
    fitting = (each for each in (block, _ROW) if scale.shape == _blocks(weight.shape, each))
    found = next(fitting, None)
    if found is None or scale.dtype not in _FP8_SCALES:
        height, width = block
        shapes = f"{list(_blocks(weight.shape, block))}: one scale for each {height} x {width} block"
        shapes += f", or {list(_blocks(weight.shape, _ROW))}: one for each 1 x 32"
        raise Refused(f"{weight} is scaled by {scale}, expected F8_E8M0 or F32 {shapes}; {_remedy(weight)}")
    if to == "bf16":
        return [Output(weight.name, "BF16", weight.shape, FP8, weight, scale, found)]
    return [
        Output(weight.name, weight.dtype, weight.shape, KEEP, weight, scale),
        Output(scale.name, scale.dtype, scale.shape, KEPT_SCALE, scale),
    ]


def _groups(outputs: list[Output], shard_size: int) -> list[list[Output]]:
    """Shards filled in order, a kept scale with its weight; in each, wide elements first, which keeps all aligned."""
    groups: list[list[Output]] = []
    filled = shard_size
    for group in _pairs(outputs):
        size = sum(out.size for out in group)
        if not groups or filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1] += group
        filled += size
    return [sorted(group, key=lambda out: -BITS[out.dtype]) for group in groups]


def _pairs(outputs: Iterable[Output]) -> Iterator[list[Output]]:
    group: list[Output] = []
    for out in outputs:
        if group and out.action not in (RECODED_SCALE, KEPT_SCALE):
            yield group
            group = []
        group.append(out)
    if group:
        yield group


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def _count(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
