"""A finished conversion made again, in memory, and compared with what lies on the disk."""

from __future__ import annotations

import hashlib
import random
import threading
from typing import Any

import numpy as np

from flagops.config import size as parse_size

from . import store
from .conversion import PIECE, Conversion, Summary, entry_of
from .documents import Refused, line, opened, whole
from .plan import RECODED_SCALE, TARGETS, Output, Plan, Shard
from .source import BITS, JOURNAL, MANIFEST, OURS, resolved
from .store import Entry
from .stream import Stream
from .work import Progress, Silent, Stopped


class Difference(ValueError):
    """A converted checkpoint is not what its source gives; the message names the first tensor or file that differs."""

    def __init__(self, text: str) -> None:
        super().__init__(line(text))


def verify(
    src: Any,
    dst: Any,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    memory: str | int = "4GiB",
    workers: int | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make every file of a finished conversion again, in memory, and compare: bit by bit, and with the manifest.

    Args:
        src: the folder that was converted.
        dst: the folder that was written; its manifest says with which options.
        sample: share of the tensors to compute again, above 0 and up to 1; all bytes are held to the manifest anyway.
        seed: chooses the sample; drawn if None.
        memory, workers, backend, progress: as for `convert`. ``backend="numpy"`` computes with the reference.

    Returns:
        A `Summary`.

    Raises:
        Difference: (a ValueError) names the first tensor or file that is not right.
        Refused: (a ValueError) the source or an option cannot be used.
        OSError, Unsupported: as for `convert`.
    """
    if not 0 < sample <= 1:
        raise Refused(f"--sample {sample}: expected a share above 0 and up to 1")
    dst = resolved(dst)
    for folder in (resolved(src), dst):
        if not folder.is_dir():
            raise Refused(f"{folder} is no folder; give the SRC and the DST of a finished conversion")
    found, going = store.read_manifest(dst, parse_size(memory)), store.place(dst, JOURNAL).exists()
    if found is None:
        state = "is not finished; repeat the command that began it" if going else "has no manifest"
        raise Difference(f"{dst} {state}: only a finished conversion of flagops can be verified")
    if going:
        raise Difference(f"{dst} is not finished: {JOURNAL} is still there; repeat the command that began it")
    identity, entries = found
    to, shard_size, keep = identity.get("to"), identity.get("shard_size", 0), identity.get("keep", [])
    texts = isinstance(keep, list) and all(isinstance(name, str) for name in keep)
    if to not in TARGETS or not whole(shard_size, 1) or not texts:
        raise Difference(f"{dst / MANIFEST} does not say with which options it was made; convert again")
    conversion = Conversion(src, dst, to, keep, shard_size, memory, workers, backend, progress or Silent())
    summary = conversion.summary()
    files = _expected(conversion, identity, entries)
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    chosen = _sample(conversion.plan, sample, seed)
    if sample < 1:
        summary.notes.append(f"sample of {len(chosen)} tensors, seed {seed}")
    compare = _Compare(conversion, entries, chosen)
    conversion.progress.begin(conversion.total, "check")
    try:
        conversion.team.run(enumerate(conversion.tasks), compare)
    finally:
        conversion.progress.end()
    if compare.found:
        raise compare.found[min(compare.found)]
    extra = sorted(p.name for p in dst.iterdir() if p.name not in files | OURS)
    summary.notes += [f"not of this conversion: {', '.join(extra)}"] if extra else []
    summary.state, summary.compared_tensors = "verified", len(chosen)
    return conversion.measured(summary, conversion.total)


def _expected(conversion: Conversion, identity: dict[str, Any], entries: dict[str, Entry]) -> set[str]:
    """The files that a conversion must have, after the manifest, configuration and index have been held to it."""
    plan, dst = conversion.plan, conversion.dst
    for name in sorted(plan.identity | identity):
        if identity.get(name) != plan.identity.get(name):
            raise Difference(f"{dst} was not made of {plan.source.folder}: its manifest has another {name}")
    expected = {*plan.source.others, *plan.texts, *(shard.name for shard in plan.shards)}
    for name in sorted(expected ^ set(entries)):
        raise Difference(f"{dst / MANIFEST}: {name} is {'missing' if name in expected else 'not of SRC'}")
    for name, text in plan.texts.items():
        if conversion.hash(name) != entries[name] or entries[name] != entry_of(text):
            raise Difference(f"{dst / name} is missing or not what SRC gives")
    return expected


def _sample(plan: Plan, sample: float, seed: int) -> set[str]:
    names = [out.name for out in plan.outputs if out.action != RECODED_SCALE]
    chosen = set(random.Random(seed).sample(names, max(1, round(sample * len(names)))))
    scales = {out.name for out in plan.outputs if out.action == RECODED_SCALE and out.weight.name in chosen}
    return chosen | scales


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
        if Entry(shard.size, digest.hexdigest()) == self._entries[shard.name]:
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
