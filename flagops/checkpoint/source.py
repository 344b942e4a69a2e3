"""A folder of safetensors, read without trust: index, headers and slices, each checked before it is used.

Slices are read with `os.preadv` into buffers that are used again. The safetensors library maps whole files, and the
pages of a mapping count as resident memory of the process, which is to stay bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

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

_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_OTHER_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5",
                  ".msgpack", ".onnx", ".npz", ".tar", ".partial")  # fmt: skip
_AGAIN = "copy or download it again"


class Refused(ValueError):
    """A checkpoint, a folder or an option that cannot be converted; the message names it and the remedy."""


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

    Links may lead to other places inside the folder, or, in a snapshot of the Hugging Face cache, to its ``blobs``.
    Raises Refused for all that the index, the headers and the files do not agree about.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise Refused(f"{folder} is no folder; give one with safetensors and their index")
        self.stamps: dict[str, tuple[int, int]] = {}
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
        self.config_bytes = self._small(CONFIG) if (self.folder / CONFIG).exists() else None
        self.config = None if self.config_bytes is None else self._object(CONFIG, self.config_bytes)
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
            raise Refused(f"{self.folder / name} is missing; {_AGAIN}") from None
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
            raise Refused(f"{self.folder}: {name!r} cannot be reached: {error}") from None
        hub = self.folder.parents[1] / "blobs" if self.folder.parent.name == "snapshots" else None
        if not real.is_relative_to(self.folder) and real.parent != hub:
            raise Refused(f"{self.folder / name} is a link to {real}, outside the folder; put the file itself there")
        if not stat.S_ISREG(real.stat().st_mode):
            raise Refused(f"{self.folder / name} is no regular file")
        return real

    def fingerprint(self) -> str:
        """A digest of the names, headers and sizes of the shards and of the configuration; no times, no paths."""
        facts = {"headers": self._headers, "sizes": {name: self.stamps[name][0] for name in self.shards}}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.config_bytes or b"")
        return digest.hexdigest()

    def _index(self) -> dict[str, str] | None:
        names = sorted(p.name for p in self.folder.glob("*.safetensors.index.json"))
        if INDEX in names:
            names = [INDEX]
        if not names:
            return None
        if len(names) > 1:
            raise Refused(f"{self.folder} holds several indices: {', '.join(names)}; keep one, or name it {INDEX}")
        name = names[0]
        index = self._object(name, self._small(name))
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise Refused(f"{self.folder / name} has no weight_map; {_AGAIN}")
        for tensor, shard in weights.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise Refused(f"{name}: tensor {tensor!r} is said to be in {shard!r}; only .safetensors are read")
        for shard in sorted(set(weights.values())):
            self.path(shard)
        metadata = index.get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        self.declared_size = size if isinstance(size, int) else None
        return weights

    def _single(self) -> list[str]:
        shards = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if len(shards) == 1:
            return shards
        if shards:
            raise Refused(f"{self.folder} holds {len(shards)} safetensors and no {INDEX}; {_AGAIN}")
        raise Refused(f"{self.folder} holds no safetensors, and nothing else is read: pickled weights can run code")

    def _agree(self, index: dict[str, str], found: dict[str, Stored]) -> None:
        for name, shard in index.items():
            if name not in found:
                raise Refused(f"tensor {name!r} is missing from {shard}, where the index has it; {_AGAIN}")
            if found[name].file != shard:
                raise Refused(f"{found[name]}, but the index has it in {shard}; correct the index")
        for name, tensor in found.items():
            if name not in index:
                raise Refused(f"{tensor} is not in the index; correct the index or remove the tensor")

    def _header(self, shard: str) -> list[Stored]:
        path = self.path(shard)
        with open(path, "rb") as file:
            self.stamps[shard] = stamp(os.fstat(file.fileno()))
            whole = self.stamps[shard][0]
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_HEADER_LIMIT, whole - 8):
                raise Refused(f"{path} is cut short or has no safetensors header ({whole} bytes); {_AGAIN}")
            raw = file.read(length)
        self._headers[shard] = hashlib.sha256(raw).hexdigest()
        header = self._object(shard, raw)
        tensors = [self._tensor(shard, 8 + length, *item) for item in header.items() if item[0] != "__metadata__"]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
        end = 8 + length
        for tensor in tensors:
            if tensor.offset != end:
                what = "overlaps another" if tensor.offset < end else "follows a hole"
                raise Refused(f"{tensor} {what}: its data starts at {tensor.offset}, expected {end}; {_AGAIN}")
            end += tensor.size
        if end != whole:
            what = "is cut short" if whole < end else "has bytes after its last tensor"
            raise Refused(f"{path} {what}: {whole} bytes, its header promises {end}; {_AGAIN}")
        return tensors

    def _tensor(self, shard: str, base: int, name: str, facts: Any) -> Stored:
        label = f"tensor {name!r} in {shard}: the header"
        try:
            name.encode()
            dtype, shape, (start, stop) = facts["dtype"], facts["shape"], facts["data_offsets"]
            numbers = [*shape, start, stop]
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{label} is damaged; {_AGAIN}") from None
        if dtype not in BITS:
            raise Refused(f"{label} has the unknown dtype {dtype!r}; a newer flagops may know it")
        if any(type(n) is not int or n < 0 for n in numbers):
            raise Refused(f"{label} is damaged: {facts}; {_AGAIN}")
        bits = BITS[dtype]
        for n in shape:
            bits *= n
        if bits % 8 or stop - start != bits // 8:
            raise Refused(f"{label} gives {stop - start} bytes to {dtype} {shape}, expected {bits / 8:g}; {_AGAIN}")
        return Stored(name, dtype, tuple(shape), shard, base + start, stop - start)

    def _small(self, name: str) -> bytes:
        path = self.path(name)
        self.stamps[name] = stamp(path.stat())
        if self.stamps[name][0] > _HEADER_LIMIT:
            raise Refused(f"{path} is larger than {_HEADER_LIMIT} bytes, that is no {name}")
        return path.read_bytes()

    def _object(self, name: str, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
        except Refused as error:
            raise Refused(f"{self.folder / name}: {error}; correct it") from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{self.folder / name} holds no valid JSON ({error}); {_AGAIN}") from None
        if not isinstance(value, dict):
            raise Refused(f"{self.folder / name} holds no JSON object; {_AGAIN}")
        return value

    def _others(self) -> tuple[list[str], list[str]]:
        copied, left = [], []
        for name in self._names(self.folder):
            if name in self.shards or name in OURS:
                continue
            if name.endswith(_OTHER_WEIGHTS):
                left.append(name)
            else:
                self.stamps[name] = stamp(self.path(name).stat())
                copied.append(name)
        return copied, left

    def _names(self, folder: Path) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = Path(entry.path).relative_to(self.folder).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._names(Path(entry.path))
            elif entry.is_dir():
                raise Refused(f"{self.folder / name} is a link to a folder; put the folder itself there or remove it")
            else:
                yield name


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
        """Fill `out` from a byte offset. Raises Refused if the file has changed or ends too soon, OSError."""
        handle = self._handle(file)
        done = 0
        while done < len(out):
            try:
                count = os.preadv(handle, [out[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._source.folder / file)) from None
            if count == 0:
                raise Refused(f"{self._source.folder / file} ends at byte {offset + done} while it is read; {_AGAIN}")
            done += count
        self.count += done

    def _handle(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= self._files:
            os.close(self._open.popitem(last=False)[1])
        handle = os.open(self._source.path(file), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._open[file] = handle
        if stamp(os.fstat(handle)) != self._source.stamps[file]:
            raise Refused(f"{self._source.folder / file} has changed since the conversion was planned; start anew")
        return handle


def stamp(facts: os.stat_result) -> tuple[int, int]:
    """Size and time of last change: what shows that a file is no longer the one that was planned with."""
    return facts.st_size, facts.st_mtime_ns


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(f"{name!r} appears twice")
        found[name] = value
    return found
