"""What becomes of each tensor and where it will lie: from the source and the options, before anything is read."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from . import documents, formats
from .configuration import Configuration, modules, statements
from .documents import Refused
from .formats import Format, Parts, blocks
from .integers import INTEGERS, Integers, fitting, floating, linear
from .source import BITS, CONFIG, INDEX, Source, Stored

LAYOUT = 1  # raised when the same source and options are laid out otherwise
TARGETS = ("bf16", "fp8", *INTEGERS)
COPY, FP4, FP8, RECODE, RECODED_SCALE, KEEP, KEPT_SCALE, STORED = (
    "copied", "FP4 to BF16", "FP8 to BF16", "FP4 to FP8", "scale of FP4 to FP8", "FP8 kept", "scale of FP8 kept",
    "kept as stored",
)  # fmt: skip
_CODES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_WIDE = ("BF16", "F16", "F32")
_MODELOPT = "hf_quant_config.json"  # what ModelOpt writes beside the configuration
_ELSEWHERE = (_MODELOPT, "quantize_config.json", "quant_config.json", "quantization_config.json")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write, and what it is made of.

    of: the numbers whose codes, scale or size it is, as `part` says, where they become integers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    weight: Stored
    scale: Stored | None = None
    block: tuple[int, int] = (128, 128)
    parts: Parts | None = None
    format: Format | None = None
    transposed: bool = False
    of: Output | None = None
    part: str = ""

    @property
    def made(self) -> bool:
        """Whether the numbers are computed, and not copied."""
        return self.action not in (COPY, STORED, KEEP, KEPT_SCALE)

    @property
    def size(self) -> int:
        """Bytes."""
        return _count(self.shape) * BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Matrices, rows and columns, in elements; less than a matrix is one row."""
        *lead, rows, columns = self.shape if len(self.shape) > 1 else (1, _count(self.shape))
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
        self.integers = INTEGERS.get(to)
        self.keep = sorted({keep} if isinstance(keep, str) else set(keep))
        self.said = Configuration(source.config)
        self.kept = _kept(source.tensors, self.keep, self.said)
        self.outputs = outputs(source.tensors, to, self.said, self.kept)
        if not any(out.of if self.integers else out.made for out in self.outputs):
            wanted = {"bf16": "four or eight bits to BF16", "fp8": RECODE}.get(to, f"a linear layer to {to}")
            beyond = f" beyond --keep {' '.join(self.keep)}" if self.keep else ""
            raise Refused(f"{source.folder} holds no tensor to convert from {wanted}{beyond}; use it as it is")
        groups = _groups(self.outputs, shard_size)
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        self.shards = [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
        self.data = sum(shard.data for shard in self.shards)
        self.counts = dict(Counter(out.action for out in self.outputs))
        used = {name for out in self.outputs for name in (out.name, out.weight.name)}
        self.dropped = len(source.tensors.keys() - used)

    @cached_property
    def copied(self) -> list[str]:
        """The files that are copied as they are; that of ModelOpt goes when nothing is left that it describes."""
        narrow = self._narrow()
        return [name for name in self.source.others if name != _MODELOPT or narrow or self.to == "fp8"]

    @cached_property
    def notes(self) -> list[str]:
        """What copied files go on to say, and what is not copied."""
        gone = sorted(set(self.source.others) - set(self.copied))
        return [f"{name} describes what is converted, and is left out" for name in gone] + _beside(
            self.source, self.copied
        )

    def _wide(self) -> list[str]:
        """Modules whose matrices stay as they are beside integers."""
        names = (out.name for out in self.outputs if not out.of and out.dtype in _WIDE and len(out.shape) > 1)
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    def _narrow(self) -> list[str]:
        """Tensors that are kept and narrow."""
        tensors = {name: self.source.tensors[name] for name in self.kept}
        return [t.name for t in tensors.values() if t.dtype in _CODES or formats.parts(t, tensors, self.said)]

    @cached_property
    def configuration(self) -> tuple[dict[str, Any] | None, list[str]]:
        """That of the output, and what was changed in it, in words."""
        tensors = {name: self.source.tensors[name] for name in self.kept}
        narrow = [part for t in tensors.values() if (part := formats.parts(t, tensors, self.said))]
        packed = [part.weight for part in narrow if part.weight.dtype not in _CODES or part.weight.dtype == "F4"]
        if self.to == "fp8":
            if packed:
                raise Refused(f"--keep: {packed[0]} would stay FP4 beside FP4 made FP8; use --to bf16")
            scales = {part.scale.name for part in narrow if part.scale}
            scales |= {out.name for out in self.outputs if out.action == KEPT_SCALE}
            wide = (name for name in sorted(scales) if self.source.tensors[name].dtype == "F32")
            return self.said.in_fp8(next(wide, None))
        left = set(self._narrow())
        if self.integers:
            return self.said.in_integers(self.integers, sorted(left), self._wide())
        converted = [out.name for out in self.outputs if out.made]
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
        copied = sum(self.source.stamps[name].size for name in self.copied)
        return sum(shard.size for shard in self.shards) + copied + sum(map(len, self.texts.values()))

    def _places(self) -> Iterator[tuple[str, Shard]]:
        for shard in self.shards:
            for out in shard.outputs:
                yield out.name, shard


def outputs(tensors: dict[str, Stored], to: str, said: Configuration, kept: Iterable[str] = ()) -> list[Output]:
    """What becomes of each tensor, in the order of the source; a scale that is kept follows its weight."""
    kept = set(kept)
    found = {
        t.name: parts
        for t in tensors.values()
        if t.name not in kept and (parts := formats.parts(t, tensors, said)) is not None
    }
    claimed: dict[str, str] = {}
    for weight, parts in found.items():
        for part in parts.beside():
            if part in parts.activations and to == "fp8":
                continue
            shared = part.name in claimed and part not in parts.activations
            if shared or part.name in found:
                raise Refused(f"{part} would scale {weight!r} and {claimed.get(part.name, 'be scaled itself')!r}")
            claimed[part.name] = weight
        if parts.name != weight and parts.name in tensors:
            raise Refused(f"{parts.weight} would become {tensors[parts.name]}; keep one of the two")
    made: list[Output] = []
    integers = INTEGERS.get(to)
    for tensor in tensors.values():
        if tensor.name in kept:
            made.append(Output(tensor.name, tensor.dtype, tensor.shape, STORED, tensor))
        elif tensor.name in claimed:
            continue
        elif tensor.name in found:
            made += _converted(found[tensor.name], to, said)
        elif integers and not found and tensor.dtype in _WIDE and linear(tensor.name, tensor.shape):
            made += _integers(Output(tensor.name, tensor.dtype, tensor.shape, COPY, tensor), integers)
        else:
            formats.unscaled(tensor)
            made.append(Output(tensor.name, tensor.dtype, tensor.shape, COPY, tensor))
    return made


def _kept(tensors: dict[str, Stored], patterns: Sequence[str], said: Configuration) -> list[str]:
    """The names that patterns match, a weight and its scale together, in the order of the files."""
    found = set()
    for pattern in patterns:
        matched = {name for name in tensors if fnmatchcase(name, pattern)}
        if not matched:
            raise Refused(f"--keep {pattern}: no tensor has such a name; did you mean {_nearest(pattern, tensors)!r}?")
        found |= matched
    for tensor in tensors.values() if found else ():
        parts = formats.parts(tensor, tensors, said)
        group = {tensor.name, *(part.name for part in parts.beside())} if parts else set()
        found |= group if group & found else set()
    return [name for name in tensors if name in found]


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The name most like a pattern, its numbers replaced; one that holds the pattern's longest word, if any does."""
    kinds = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    longest = max(re.split(r"[*?.\[\]]+", pattern), key=len)
    holding = sorted(kind for kind in kinds if longest in kind) or sorted(kinds)
    return difflib.get_close_matches(pattern, holding, n=1, cutoff=0)[0]


def _beside(source: Source, copied: Sequence[str]) -> list[str]:
    """Notes on copied files that still describe the formats of the source; refuses one that others would believe."""
    notes = []
    for name in copied:
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


def _converted(parts: Parts, to: str, said: Configuration) -> list[Output]:
    weight, scale = parts.weight, parts.scale
    lies = formats.layout(parts, said)
    if to != "fp8":
        action = f"{lies.format.name} to BF16"
        wide = Output(
            parts.name, "BF16", lies.shape, action, weight, scale, lies.block, parts, lies.format, lies.transposed
        )  # fmt: skip
        return _integers(wide, INTEGERS[to]) if to in INTEGERS and not floating(parts.name) else [wide]
    if (
        lies.format is formats.FP8
        and scale
        and scale.dtype in formats.BLOCK_SCALES
        and lies.block in (said.block, formats.ROW)
    ):
        return [
            Output(weight.name, weight.dtype, weight.shape, KEEP, weight, scale),
            Output(scale.name, scale.dtype, scale.shape, KEPT_SCALE, scale),
        ]
    if lies.format is not formats.FP4 or scale is None or parts.name != weight.name:
        raise Refused(
            f"{weight}, scaled by {scale}, is {lies.format.name} of a kind that --to fp8 leaves; use --to bf16"
        )
    *_, rows, columns = lies.shape
    if rows % 128 or columns % 128 or said.block != (128, 128):
        raise Refused(
            f"{weight} does not divide into 128 x 128 blocks of FP8 ({said.block} in {CONFIG}); use --to bf16"
        )
    return [
        Output(weight.name, "F8_E4M3", lies.shape, RECODE, weight, scale),
        Output(scale.name, "F8_E8M0", blocks(lies.shape, said.block), RECODED_SCALE, weight, scale),
    ]


def _integers(of: Output, to: Integers) -> list[Output]:
    """The tensors of a weight in integers; each is made without the others."""
    action = f"{of.action.removesuffix(' to BF16') if of.made else of.dtype} to {to.name}"
    stored = to.stored(of.name, fitting(to, of.weight, of.shape))
    return [
        Output(name, dtype, shape, action if part == "codes" else f"{part} of {to.name}", of.weight, of=of, part=part)
        for part, name, shape, dtype in stored
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
        if group and out.action not in (RECODED_SCALE, KEPT_SCALE) and out.part in ("", "codes"):
            yield group
            group = []
        group.append(out)
    if group:
        yield group


def _count(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
