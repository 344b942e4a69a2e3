"""A folder of safetensors, read without trust: index, headers and slices, each checked before it is used.

Slices are read with `os.preadv` into buffers that are used again. The safetensors library maps whole files, and the
pages of a mapping count as resident memory of the process, which is to stay bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from . import documents
from .documents import AGAIN, MOST, Refused, Stamp, shown, stamp, whole

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
JOURNAL = "flagops-journal.jsonl"
MANIFEST = "flagops-manifest.json"
OURS = frozenset({INDEX, CONFIG, JOURNAL, MANIFEST})

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_OTHER_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5",
                  ".msgpack", ".onnx", ".npz", ".tar", ".partial")  # fmt: skip
_QUIET = "repeat the command when nothing writes there"
_ELEMENTS = 1 << 56  # of a tensor: their bytes fit 64 bits in every dtype, also where a size of 0 leaves none
_AXES = 32  # of a tensor, as in every NumPy
_DEEPEST = 64  # folders in one another
_LONGEST = 240  # bytes of a name, which is longer while its file is written


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a shard; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"tensor {self.name!r} ({self.dtype} {list(self.shape)}) in {self.file}"


class Source:
    """A checkpoint to read: `tensors` in the order of the files, `config`, and the other files to copy.

    folder: holds ``model.safetensors.index.json`` and its shards, or one file ``model.safetensors``.

    memory: the most bytes that this process may take; documents that would need more are refused.
    stamps: of every file that is read, now or by a `Reader`; one that changes afterwards is refused by name.

    Links may lead to other places inside the folder, or, in a snapshot of the Hugging Face cache, to its ``blobs``.
    Raises Refused for all that the index, the headers and the files do not agree about.
    """

    def __init__(self, folder: str | os.PathLike[str], memory: int | None = None) -> None:
        self.folder = resolved(folder)
        if not self.folder.is_dir():
            raise Refused(f"{folder} is no folder; give one with safetensors and their index")
        self.memory = memory
        self.stamps: dict[str, Stamp] = {}
        self.declared_size: int | None = None
        self._headers: dict[str, str] = {}
        index = self._index()
        self.shards = sorted(set(index.values())) if index else self._single()
        found: dict[str, Stored] = {}
        for shard in self.shards:
            for tensor in self._header(shard):
                if tensor.name in found:
                    raise Refused(f"{tensor} is also in {found[tensor.name].file}; keep one of the two")
                found[tensor.name] = tensor
        if index is not None:
            self._agree(index, found)
        self.tensors = found
        self.config, self.config_bytes = None, b""
        if os.path.lexists(self.folder / CONFIG):  # a link to nowhere is a configuration that is missing
            self.config, self.config_bytes, self.stamps[CONFIG] = documents.configuration(self.path(CONFIG), memory)
        self.others, self.left_out = self._others()

    def path(self, name: str) -> Path:
        """Where a file of the checkpoint lies. Raises Refused if that is outside the checkpoint, or no file."""
        if (
            not name
            or "\0" in name
            or "\\" in name
            or PurePosixPath(name).is_absolute()
            or PureWindowsPath(name).drive
            or ".." in PurePosixPath(name).parts
        ):
            raise Refused(f"{self.folder}: the name {name!r} points outside the folder; only plain names are read")
        try:
            real = (self.folder / name).resolve(strict=True)
        except FileNotFoundError:
            raise Refused(f"{self.folder / name} is missing; {AGAIN}") from None
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
            raise Refused(f"{self.folder}: {name!r} cannot be reached: {error}") from None
        hub = self.folder.parents[1] / "blobs" if self.folder.parent.name == "snapshots" else None
        if not real.is_relative_to(self.folder) and real.parent != hub:
            raise Refused(f"{self.folder / name} is a link to {real}, outside the folder; put the file itself there")
        if not real.is_file():
            raise Refused(f"{self.folder / name} is no regular file; put one there, or remove it")
        return real

    def fingerprint(self) -> str:
        """A digest of the names, headers and sizes of the shards and of the configuration; no times, no paths."""
        facts = {"headers": self._headers, "sizes": {name: self.stamps[name][0] for name in self.shards}}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.config_bytes)
        return digest.hexdigest()

    def seen(self) -> str:
        """A digest of all stamps: where it is the same, nothing of the source has been written since."""
        return hashlib.sha256(json.dumps(self.stamps, sort_keys=True).encode()).hexdigest()

    def _index(self) -> dict[str, str] | None:
        names = sorted(name for name in os.listdir(self.folder) if name.endswith(".safetensors.index.json"))
        if INDEX in names:
            names = [INDEX]
        if not names:
            return None
        if len(names) > 1:
            raise Refused(f"{self.folder} holds several indices: {', '.join(names)}; keep one, or name it {INDEX}")
        name = names[0]
        raw, self.stamps[name] = documents.read(self.path(name), memory=self.memory)
        index = documents.parsed(self.folder / name, raw, self.memory)
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise Refused(f"{self.folder / name} has no weight_map; {AGAIN}")
        for tensor, shard in weights.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise Refused(f"{name}: tensor {tensor!r} is said to be in {shard!r}; only .safetensors are read")
        for shard in sorted(set(weights.values())):
            self.path(shard)
        metadata = index.get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        self.declared_size = size if whole(size) else None
        return weights

    def _single(self) -> list[str]:
        shards = sorted(name for name in os.listdir(self.folder) if name.endswith(".safetensors"))
        if len(shards) == 1:
            return shards
        if shards:
            raise Refused(f"{self.folder} holds {len(shards)} safetensors and no {INDEX}; {AGAIN}")
        raise Refused(f"{self.folder} holds no safetensors, and nothing else is read: pickled weights can run code")

    def _agree(self, index: dict[str, str], found: dict[str, Stored]) -> None:
        for name, shard in index.items():
            if name not in found:
                raise Refused(f"tensor {name!r} is missing from {shard}, where the index has it; {AGAIN}")
            if found[name].file != shard:
                raise Refused(f"{found[name]}, but the index has it in {shard}; correct the index")
        for name, tensor in found.items():
            if name not in index:
                raise Refused(f"{tensor} is not in the index; correct the index or remove the tensor")

    def _header(self, shard: str) -> list[Stored]:
        path = self.path(shard)
        with documents.opened(path) as handle, open(handle, "rb", closefd=False) as file:
            self.stamps[shard] = documents.settled(handle)
            size = self.stamps[shard].size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MOST, size - 8):
                raise Refused(f"{path} is cut short or has no safetensors header ({size} bytes); {AGAIN}")
            raw = file.read(length)
            if stamp(os.fstat(handle)) != self.stamps[shard]:
                raise Refused(f"{path} has changed while it was read; {_QUIET}")
        self._headers[shard] = hashlib.sha256(raw).hexdigest()
        header = documents.parsed(self.folder / shard, raw, self.memory)
        said = header.pop("__metadata__", {})
        if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
            raise Refused(f"{path}: __metadata__ is {shown(said)}, expected an object of texts; {AGAIN}")
        tensors = [self._tensor(shard, 8 + length, *item) for item in header.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
        end = 8 + length
        for tensor in tensors:
            if tensor.offset != end:
                what = "overlaps another" if tensor.offset < end else "follows a hole"
                raise Refused(f"{tensor} {what}: its data starts at {tensor.offset}, expected {end}; {AGAIN}")
            end += tensor.size
        if end != size:
            what = "is cut short" if size < end else "has bytes after its last tensor"
            raise Refused(f"{path} {what}: {size} bytes, its header promises {end}; {AGAIN}")
        return tensors

    def _tensor(self, shard: str, base: int, name: str, facts: Any) -> Stored:
        label = f"tensor {name!r} in {shard}: the header"
        facts = facts if isinstance(facts, dict) else {}
        dtype, shape, offsets = (facts.get(field) for field in ("dtype", "shape", "data_offsets"))
        for field, value, right, expected in (
            ("its name", name, name.isascii() or _encodable(name), "text in UTF-8"),
            ("dtype", dtype, isinstance(dtype, str), "a name"),
            ("shape", shape, _sizes(shape), "a list of sizes"),
            ("data_offsets", offsets, _sizes(offsets) and len(offsets) == 2, "two numbers"),
        ):
            if not right:
                raise Refused(f"{label} is damaged: {field} is {shown(value)}, expected {expected}; {AGAIN}")
        if dtype not in BITS:
            raise Refused(f"{label} has the unknown dtype {dtype!r}; a newer flagops may know it")
        start, stop = offsets
        count = elements(shape)
        if count is None:
            raise Refused(
                f"{label} has a shape that no array can have ({len(shape)} sizes, {shown(shape)}), expected at most "
                f"{_AXES} with a product, zeros aside, of at most {_ELEMENTS}; {AGAIN}"
            )
        size, rest = divmod(count * BITS[dtype], 8)
        if rest or stop - start != size:
            expected = f"{size}{'.5' * bool(rest)}"
            raise Refused(f"{label} gives {stop - start} bytes to {dtype} {shape}, expected {expected}; {AGAIN}")
        return Stored(name, dtype, tuple(shape), shard, base + start, size)

    def _others(self) -> tuple[list[str], list[str]]:
        copied, left = [], []
        for name in self._names():
            if name in self.shards or name in OURS:
                continue
            if name.endswith(_OTHER_WEIGHTS):
                left.append(name)
                continue
            if len(os.fsencode(name.rpartition("/")[2])) > _LONGEST:
                raise Refused(f"{self.folder / name}: the name has more than {_LONGEST} bytes; give it a shorter one")
            self.stamps[name] = documents.settled(self.path(name))
            copied.append(name)
        return sorted(copied), sorted(left)

    def _names(self) -> Iterator[str]:
        """All files but hidden ones, through real folders."""
        waiting = [PurePosixPath()]
        while waiting:
            folder = waiting.pop()
            if len(folder.parts) > _DEEPEST:
                raise Refused(f"{self.folder / folder} lies deeper than {_DEEPEST} folders; move or remove it")
            with os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    name = folder / entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                    elif entry.is_dir():
                        raise Refused(
                            f"{self.folder / name} is a link to a folder; put the folder itself there or remove it"
                        )
                    else:
                        yield name.as_posix()


class Reader:
    """Reads slices of a source for one thread, through few open files. Use as a context manager."""

    def __init__(self, source: Source, files: int = 8) -> None:
        self._source, self._files = source, files
        self._open: OrderedDict[str, int] = OrderedDict()
        self.count = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, file: str, offset: int, out: memoryview) -> None:
        """Fill `out` from a byte offset. Raises Refused if the file has changed or ends too soon, OSError.

        What is read is right only if `check` finds nothing afterwards.
        """
        handle = self._handle(file)
        done = 0
        while done < len(out):
            try:
                count = os.preadv(handle, [out[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._source.folder / file)) from None
            if count == 0:
                raise Refused(f"{self._source.folder / file} ends at byte {offset + done} while it is read; {AGAIN}")
            done += count
        self.count += done

    def check(self) -> None:
        """Refuse what has been read if its file has changed since it was planned with."""
        for file, handle in self._open.items():
            self._same(file, handle)

    def _same(self, file: str, handle: int) -> None:
        if stamp(os.fstat(handle)) != self._source.stamps[file]:
            raise Refused(f"{self._source.folder / file} has changed since the conversion was planned; {_QUIET}")

    def _handle(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= self._files:
            oldest, handle = next(iter(self._open.items()))
            self._same(oldest, handle)
            os.close(self._open.pop(oldest))
        handle = self._open[file] = documents.regular(self._source.path(file))
        self._same(file, handle)
        return handle


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(whole, value))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def elements(shape: list[int]) -> int | None:
    """How many elements a shape of non-negative sizes has; None if no array can have it, or one of no elements."""
    product = 1
    if len(shape) > _AXES:
        return None
    for size in shape:
        product *= size or 1
        if product > _ELEMENTS:
            return None
    return 0 if 0 in shape else product


def resolved(folder: str | os.PathLike[str]) -> Path:
    """A folder's path without links. Raises Refused for what is no path."""
    try:
        return Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        raise Refused(f"{os.fspath(folder)!r} cannot be reached: {error}; give another folder") from None
