"""A plan carried out: shards first, then configuration, manifest and, last, the index that makes it a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagops.config import size as parse_size

from . import store, work
from .documents import Refused, opened
from .memory import peak
from .plan import Plan, Shard
from .source import INDEX, JOURNAL, MANIFEST, Source, resolved
from .store import Entry, Journal, Writer
from .stream import Kernels, Stream
from .work import Progress, Team

PIECE = 1 << 20  # bytes copied, hashed or compared together


FINISHED = "finished, by the names and sizes of its files"


class NoSpace(OSError):
    """The disk is too small for what is planned."""


@dataclass
class Summary:
    """What was planned or done. Sizes are in bytes, `rate` in bytes written or compared a second of wall time."""

    source: str
    destination: str
    to: str
    tensors: dict[str, int]
    dropped_scales: int
    shards: int
    output_bytes: int
    total_size: dict[str, int | None]
    free_disk: int
    needed_disk: int
    memory: int
    planned_memory: int
    workers: int
    backend: str
    keep: list[str]
    kept: list[str]
    config_changes: list[str]
    copied: list[str]
    left_out: list[str]
    state: str = "planned"
    resumed_shards: int = 0
    compared_tensors: int = 0
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    peak_memory: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Conversion:
    """One source, one destination and their plan."""

    def __init__(
        self,
        src: Any,
        dst: Any,
        to: str,
        keep: str | Iterable[str],
        shard_size: str | int,
        memory: str | int,
        workers: int | None,
        backend: str | None,
        progress: Progress,
    ) -> None:
        self.clock = work.Clock()
        if workers is not None and workers < 1:
            raise Refused(f"--workers {workers}: expected at least 1")
        self.memory, self.dst = parse_size(memory), resolved(dst)
        work.folders(resolved(src), self.dst)
        self.plan = Plan(Source(src, self.memory), to, parse_size(shard_size), keep)
        self.total = self.plan.total  # also makes the texts, before anything is compiled and memory is divided
        self.kernels = Kernels(self.plan, backend)
        self.kernels.warm()
        self.tasks: list[str | Shard] = [*self.plan.copied, *self.plan.shards]
        self.made = [task if isinstance(task, str) else task.name for task in self.tasks]
        self.peak = peak()
        self.share = work.share(self.plan, self.kernels, self.memory, workers, len(self.tasks))
        self.progress = progress
        self.team = Team(self.plan, self.kernels, self.share, progress)

    def summary(self) -> Summary:
        plan, source = self.plan, self.plan.source
        return Summary(
            source=str(source.folder),
            destination=str(self.dst),
            to=plan.to,
            tensors=plan.counts,
            dropped_scales=plan.dropped,
            shards=len(plan.shards),
            output_bytes=self.total,
            total_size={"source": source.declared_size, "output": plan.data},
            free_disk=_free(self.dst),
            needed_disk=self.total,
            memory=self.memory,
            planned_memory=self.share.bytes,
            workers=self.share.workers,
            backend=self.kernels.backend,
            keep=plan.keep,
            kept=plan.kept,
            config_changes=plan.configuration[1],
            copied=plan.copied,
            left_out=source.left_out,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        source = self.plan.source
        notes = [f"{len(source.left_out)} files left out: {', '.join(source.left_out[:8])}"] if source.left_out else []
        if source.config is None:
            notes.append("SRC has no config.json: blocks of 128 x 128 are assumed, and the output has none either")
        return notes + self.plan.notes

    def convert(self, dry_run: bool) -> Summary:
        """Plan and, unless it is a dry run or `FINISHED`, write."""
        plan, summary = self.plan, self.summary()
        if (found := self.finished()) is not None:
            summary.state, summary.needed_disk = FINISHED, 0
            summary.errors = worst(found[1])
            return summary
        strangers = store.foreign(self.dst)
        if strangers:
            raise Refused(
                f"DST {self.dst} holds other files ({', '.join(strangers[:4])}) and no conversion to go on with; "
                "choose an empty folder"
            )
        stamps = {name: [stamp.size, stamp.modified] for name, stamp in sorted(plan.source.stamps.items())}
        identity = plan.identity | {"stamps": stamps}
        self._room(summary, store.unfinished(self.dst, identity, set(self.made), self.memory))
        if dry_run:
            return summary
        self.dst.mkdir(parents=True, exist_ok=True)
        store.sync_folder(self.dst.parent)
        with Journal(self.dst, identity, plan.source.seen(), set(self.made), self.memory) as journal:
            if not journal.resumed and (other := store.read_manifest(self.dst, self.memory)):
                store.same_made(self.dst, other[0], plan.identity)  # another conversion has just finished here
            for partial in self._partials():
                partial.unlink()
            before = set(journal.done)
            self.progress.begin(self.total, "write")
            try:
                self.team.run(self.tasks, lambda task, stream: self._make(task, stream, journal))
                self._finish(journal)
            finally:
                self.progress.end()
        summary.state, summary.errors = "converted", worst(journal.done)
        summary.resumed_shards = sum(shard.name in before for shard in plan.shards)
        return self.measured(summary, self.total)

    def finished(self) -> tuple[dict[str, Any], dict[str, Entry]] | None:
        """The manifest of a conversion of these very options whose files have the sizes that it says."""
        found = store.read_manifest(self.dst, self.memory)
        if found is None or store.place(self.dst, JOURNAL).exists():
            return None
        identity, entries = found
        store.same_made(self.dst, identity, self.plan.identity)
        for name in sorted({*self.made, *self.plan.texts} ^ entries.keys()):
            raise Refused(f"{self.dst / MANIFEST}: {name!r} is missing or not of SRC; empty DST and convert again")
        for name, entry in entries.items():
            path = store.place(self.dst, name)
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise Refused(f"{path} is missing or not whole, in a finished conversion; empty DST and convert again")
        for name, text in self.plan.texts.items():
            if entries[name] != entry_of(text):
                raise Refused(
                    f"{self.dst / name} was written by another flagops, and SRC now gives another one; "
                    "empty DST and convert again"
                )
        return found

    def _room(self, summary: Summary, done: dict[str, Entry]) -> None:
        present = {name for name in done if store.place(self.dst, name).exists()}
        summary.needed_disk = self.total - sum(done[name].bytes for name in present)
        summary.free_disk = _free(self.dst) + sum(path.stat().st_size for path in self._partials())
        if summary.needed_disk > summary.free_disk:
            raise NoSpace(
                f"the disk of {self.dst} has {summary.free_disk:,} bytes free, {summary.needed_disk:,} are needed; "
                "make room or choose another DST"
            )

    def _partials(self) -> list[Path]:
        """What an interrupted conversion may have left; such files of others stay."""
        names = [*self.made, *self.plan.texts, MANIFEST]
        places = (store.place(self.dst, name + store.PARTIAL) for name in names)
        return [path for path in places if path.exists()]

    def _make(self, task: str | Shard, stream: Stream, journal: Journal) -> None:
        name = task if isinstance(task, str) else task.name
        entry = journal.done.get(name)
        if entry is not None:
            sure = name in journal.sure
            if self.hash(name, count=sure) == entry:
                if not sure:
                    self._still(task, stream, entry)
                    journal.record(name, entry)
                return
            self.team.note(f"{name} is not what the journal says; it is made again")
        with Writer(self.dst, name) as writer:
            for piece in self._pieces(task, stream):
                writer.write(piece)
            stream.reader.check()
            made = writer.finish()
        made = dataclasses.replace(made, errors=self._errors(task, stream))
        journal.record(name, made)
        self.team.note(f"{name} written, {made.bytes:,} bytes")

    def _errors(self, task: str | Shard, stream: Stream) -> dict[str, float]:
        """Of the tensors of a file that became integers, as the stream has found them."""
        names = [] if isinstance(task, str) else [out.of.name for out in task.outputs if out.of and out.part == "codes"]
        return {name: stream.errors.pop(name) for name in names}

    def _still(self, task: str | Shard, stream: Stream, entry: Entry) -> None:
        """Hold a finished file to a source that was written to since, though its sizes and times are the same."""
        digest = hashlib.sha256()
        for piece in self._pieces(task, stream):
            digest.update(piece)
        stream.reader.check()
        if digest.hexdigest() != entry.sha256:
            name = task if isinstance(task, str) else task.name
            raise Refused(
                f"{self.dst / name} was made of another SRC, or one changed since with its times kept; "
                "empty DST and convert again"
            )

    def _pieces(self, task: str | Shard, stream: Stream) -> Iterator[Any]:
        """The bytes of a file in order; what a piece is of is told to the progress after its use."""
        if isinstance(task, str):
            size = self.plan.source.stamps[task].size
            for start in range(0, size, PIECE):
                piece = bytearray(min(PIECE, size - start))
                stream.reader.read(task, start, memoryview(piece))
                yield piece
                self.team.advance(len(piece), task)
            return
        yield task.header
        self.team.advance(len(task.header), task.name)
        for out, made in stream.shard(task):
            yield made
            self.team.advance(len(made), out.name)

    def _finish(self, journal: Journal) -> None:
        """Configuration, manifest, and the index last: without it nothing loads the folder."""
        texts = self.plan.texts
        entries = {name: journal.done[name] for name in self.made} | {
            name: entry_of(text) for name, text in texts.items()
        }
        for name, text in (texts | {MANIFEST: store.manifest(self.plan.identity, entries)}).items():
            if name != INDEX:
                self._write(name, text)
        self._write(INDEX, texts[INDEX])
        journal.remove()
        for name, text in texts.items():
            self.progress.advance(len(text), name)

    def _write(self, name: str, text: bytes) -> None:
        with Writer(self.dst, name) as writer:
            writer.write(text)
            writer.finish()

    def hash(self, name: str, count: bool = False) -> Entry | None:
        """Size and hash of a finished file, None where there is none."""
        path = store.place(self.dst, name)
        if not path.exists():
            return None
        digest, size = hashlib.sha256(), 0
        with opened(path) as handle, open(handle, "rb", buffering=0, closefd=False) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                size += len(piece)
                if count:
                    self.team.advance(len(piece), name)
        return Entry(size, digest.hexdigest())

    def measured(self, summary: Summary, count: int) -> Summary:
        summary.seconds = self.clock()
        summary.rate = count / summary.seconds if summary.seconds > 0 else 0.0
        summary.bytes_read, summary.peak_memory = self.team.read, peak()
        odd = sorted(self.team.not_finite)
        if odd:
            summary.notes.append(f"{len(odd)} tensors were copied with infinities or NaN in them: {', '.join(odd[:8])}")
        if summary.peak_memory > self.memory:
            before = "before it began (compilation, or the caller)" if self.peak > self.memory else "while it ran"
            summary.notes.append(f"the process took more than --memory {before}")
        return summary


def entry_of(text: bytes) -> Entry:
    """Size and hash of a small file."""
    return Entry(len(text), hashlib.sha256(text).hexdigest())


def worst(entries: dict[str, Entry]) -> dict[str, float]:
    """The relative errors of all tensors that became integers, the largest first."""
    errors = [item for entry in entries.values() for item in entry.errors.items()]
    return dict(sorted(errors, key=lambda item: (-item[1], item[0])))


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
