"""A finished conversion made again, in memory, and compared with what lies on the disk."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np

from . import store
from .conversion import PIECE, Conversion, entry_of
from .documents import line, opened
from .plan import Output, Plan, Shard
from .source import BITS, MANIFEST
from .store import Entry
from .stream import Stream
from .work import Stopped

ANEW = "DST was damaged or SRC changed since: empty DST and convert again"
CHANGED = "DST is as it was written, so SRC has changed since: restore SRC, or empty DST and convert again"


class Difference(ValueError):
    """A converted checkpoint is not what its source gives; the message names the first tensor or file that differs."""

    def __init__(self, text: str, remedy: str = ANEW) -> None:
        self.text = text
        super().__init__(line(f"{text}; {remedy}"))


def hold(conversion: Conversion, identity: dict[str, Any], entries: dict[str, Entry], chosen: set[str]) -> set[str]:
    """Compare a finished conversion with what its source gives now, the `chosen` tensors bit by bit; returns its files.

    Raises Difference for the first that is not right, with the remedy.
    """
    files = _expected(conversion, identity, entries)
    compare = _Compare(conversion, entries, chosen)
    conversion.progress.begin(conversion.total, "check")
    try:
        conversion.team.run(enumerate(conversion.tasks), compare)
    finally:
        conversion.progress.end()
    if compare.found:
        raise compare.found[min(compare.found)]
    return files


def every(plan: Plan) -> set[str]:
    """The tensors of a plan, for `hold`."""
    return {out.name for out in plan.outputs}


def _expected(conversion: Conversion, identity: dict[str, Any], entries: dict[str, Entry]) -> set[str]:
    """The files that a conversion must have, after the manifest, configuration and index have been held to it."""
    plan, dst = conversion.plan, conversion.dst
    for name in sorted(plan.identity | identity):
        if identity.get(name) != plan.identity.get(name):
            raise Difference(
                f"{dst} was not made of {plan.source.folder}: its manifest has another {name}",
                "give the SRC it was made of, or empty DST and convert again",
            )
    expected = {*plan.copied, *plan.texts, *(shard.name for shard in plan.shards)}
    for name in sorted(expected ^ set(entries)):
        raise Difference(f"{dst / MANIFEST}: {name} is {'missing' if name in expected else 'not of SRC'}")
    for name, text in plan.texts.items():
        if conversion.hash(name) != entries[name] or entries[name] != entry_of(text):
            raise Difference(f"{dst / name} is missing or not what SRC gives")
    return expected


class _Compare:
    """Compares files of the destination with what the source gives; keeps the first difference of each."""

    def __init__(self, conversion: Conversion, entries: dict[str, Entry], chosen: set[str]) -> None:
        self._conversion, self._entries, self._chosen = conversion, entries, chosen
        self._lock = threading.Lock()
        self.found: dict[int, Difference] = {}

    def __call__(self, task: tuple[int, str | Shard], stream: Stream) -> None:
        number, what = task
        try:
            if isinstance(what, str):
                self._copied(what, stream)
            else:
                self._shard(number, what, stream, self._chosen)
            stream.reader.check()
        except Difference as error:
            stream.reader.check()  # of a source that is written to anything may differ
            name = what if isinstance(what, str) else what.name
            if self._conversion.hash(name) == self._entries[name]:
                error = Difference(error.text, CHANGED)
            with self._lock:
                self.found[number] = error

    def _copied(self, name: str, stream: Stream) -> None:
        conversion = self._conversion
        path = store.place(conversion.dst, name)
        size = conversion.plan.source.stamps[name].size
        if not path.exists() or conversion.hash(name) != self._entries[name] or self._entries[name].bytes != size:
            raise Difference(f"{path} is missing or not the file that was written")
        with opened(path) as handle, open(handle, "rb", buffering=0, closefd=False) as file:
            for start in range(0, size, PIECE):
                piece = bytearray(min(PIECE, size - start))
                stream.reader.read(name, start, memoryview(piece))
                if file.read(len(piece)) != piece:
                    raise Difference(f"{path} differs from {name} in SRC")
                conversion.team.advance(len(piece), name)

    def _shard(self, number: int, shard: Shard, stream: Stream, chosen: set[str]) -> None:
        conversion = self._conversion
        path = store.place(conversion.dst, shard.name)
        if not path.exists():
            raise Difference(f"{path} is missing")
        digest, buffer = hashlib.sha256(), np.empty(PIECE, np.uint8)
        with opened(path) as handle, open(handle, "rb", buffering=0, closefd=False) as file:
            self._same(file, digest, np.frombuffer(shard.header, np.uint8), buffer, f"the header of {path}", None, 0)
            conversion.team.advance(len(shard.header), shard.name)
            for out in shard.outputs:
                if any(other < number for other in list(self.found)):
                    raise Stopped  # tasks are taken in order: nothing that this thread would find can be the first
                done = 0
                label = f"tensor {out.name!r} in {path}"
                if out.name in chosen:
                    for piece in stream.output(out):
                        self._same(file, digest, piece, buffer, label, out, done)
                        done += len(piece)
                        conversion.team.advance(len(piece), out.name)
                while done < out.size:
                    piece = self._take(file, min(PIECE, out.size - done), buffer, label)
                    digest.update(piece)
                    done += len(piece)
                    conversion.team.advance(len(piece), out.name)
            if file.read(1):
                raise Difference(f"{path} has bytes after its last tensor {shard.outputs[-1].name!r}")
        entry = self._entries[shard.name]
        for out in shard.outputs:
            name = out.of.name if out.of and out.part == "codes" else ""
            if name and out.name in chosen and stream.errors.pop(name) != entry.errors.get(name):
                raise Difference(f"{MANIFEST} has another error for tensor {name!r} than SRC gives")
        if Entry(shard.size, digest.hexdigest()) == entry:
            return
        everything = {out.name for out in shard.outputs}
        if chosen & everything != everything:
            self._shard(number, shard, stream, everything)  # to name the tensor
        raise Difference(f"{path} is what SRC gives, but {MANIFEST} has another hash for it")

    def _take(self, file: Any, count: int, buffer: Any, label: str) -> Any:
        filled = 0
        while filled < count:
            got = file.readinto(memoryview(buffer)[filled:count])
            if not got:
                raise Difference(f"{label}: the file ends inside it")
            filled += got
        return buffer[:count]

    def _same(
        self, file: Any, digest: Any, piece: Any, buffer: Any, label: str, out: Output | None, done: int
    ) -> None:  # fmt: skip
        for start in range(0, len(piece), PIECE):
            right = piece[start : start + PIECE]
            found = self._take(file, len(right), buffer, label)
            digest.update(found)
            if not np.array_equal(found, right):
                at = int(np.argmax(found != right))
                where = f"byte {done + start + at}"
                if out is not None:
                    index = np.unravel_index((done + start + at) * 8 // BITS[out.dtype], out.shape)
                    where = f"element {[int(i) for i in index]}"
                raise Difference(f"{label} differs at {where}: byte {found[at]:#04x}, expected {right[at]:#04x}")
