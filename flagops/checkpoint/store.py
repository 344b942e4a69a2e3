"""Files that appear whole or not at all, and the journal that lets the same conversion go on after any end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from . import documents
from .documents import Refused, shown, whole
from .source import JOURNAL, MANIFEST

PARTIAL = ".partial"
_IGNORED = frozenset({"lost+found"})
_ANEW = "empty DST and convert again"


@dataclass(frozen=True)
class Entry:
    """A finished file.

    errors: relative, of the tensors in it that became integers.
    """

    bytes: int
    sha256: str
    errors: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """As a journal or manifest has them."""
        return {"bytes": self.bytes, "sha256": self.sha256} | ({"errors": self.errors} if self.errors else {})


def place(folder: Path, name: str, make: bool = False) -> Path:
    """Where a file of the output lies or will lie. Raises Refused if a link or no folder is on the way, or at its end.

    make: also the folders on the way.
    """
    *parents, last = PurePosixPath(name).parts
    path = folder
    for part in parents:
        path /= part
        mode = _mode(path)
        if mode is None and make:
            path.mkdir(exist_ok=True)
        elif mode is not None and not stat.S_ISDIR(mode):
            raise Refused(f"{path} is a link or a file where DST needs a folder; remove it or choose another DST")
    path /= last
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise Refused(f"{path} is a link or no regular file; remove it or choose another DST")
    return path


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


class Writer:
    """A file written under a temporary name, and under its own only when it is whole and on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._final = place(folder, name, make=True)
        self._temporary = place(folder, name + PARTIAL)
        self._temporary.unlink(missing_ok=True)  # it may be another name of a file that is to stay
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the temporary file unless `finish` has renamed it: on a full disk that makes room."""
        if self._file >= 0:
            os.close(self._file)
        self._temporary.unlink(missing_ok=True)

    def write(self, data: Any) -> None:
        """Append bytes. Raises OSError, of which a full disk is the most likely."""
        view = memoryview(data)
        self._digest.update(view)
        while len(view):
            try:
                count = os.write(self._file, view)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._temporary)) from None
            self._size += count
            view = view[count:]

    def finish(self) -> Entry:
        """Sync, rename, and sync the folders."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        os.replace(self._temporary, self._final)
        for parent in self._final.parents:
            sync_folder(parent)
            if parent == self._folder:
                break
        return Entry(self._size, self._digest.hexdigest())


class Journal:
    """What has been finished in a folder, appended and synced line by line; one conversion at a time holds it.

    identity: what the output is made of and how; an interrupted conversion of something else is refused.
    seen: stamps of the source in short. What was finished under others may be of other bytes: it is not in `sure`.
    names: files that the conversion makes; what the journal has of others is passed over.
    memory: the most bytes that this process may take.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], seen: str, names: Collection[str], memory: int) -> None:
        self._path, self._seen = place(folder, JOURNAL), seen
        self._lock = threading.Lock()
        self.done: dict[str, Entry] = {}
        self.sure: set[str] = set()
        self._file = self._locked()
        try:
            self.resumed = self._load(identity, names, memory)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def record(self, name: str, entry: Entry) -> None:
        """Note a file as finished, once it has its own name."""
        with self._lock:
            self._append({"file": name, "seen": self._seen} | entry.facts)
            self.done[name] = entry

    def remove(self) -> None:
        """The last step of a conversion, after the manifest and the index are in place."""
        self._path.unlink()
        sync_folder(self._path.parent)

    def _locked(self) -> int:
        import fcntl

        while True:
            file = documents.regular(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise Refused(f"{self._path.parent}: another conversion is writing there; wait for it") from None
            if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                return file
            os.close(file)  # another conversion has just finished and removed it

    def _load(self, identity: dict[str, Any], names: Collection[str], memory: int) -> bool:
        raw = documents.contents(self._file, self._path, memory=memory, remedy=_ANEW)
        records, length = _records(self._path, raw)
        if length < len(raw):
            os.ftruncate(self._file, length)
        if not records:
            self._append({"journal": "flagops convert", "identity": identity})
            sync_folder(self._path.parent)
            return False
        self.done = _finished(self._path.parent, records, identity, names)
        last = {r["file"]: r.get("seen") for r in records[1:]}
        self.sure = {name for name in self.done if last[name] == self._seen}
        return True

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        start = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(28, os.strerror(28), str(self._path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, start)  # no torn line stands before a later one
            raise


def unfinished(folder: Path, identity: dict[str, Any], names: Collection[str], memory: int) -> dict[str, Entry]:
    """What the journal of an interrupted conversion has as finished; refuses that of another, and changes nothing."""
    raw = _contents(folder, JOURNAL, memory)
    records = _records(folder / JOURNAL, raw)[0] if raw else []
    return _finished(folder, records, identity, names) if records else {}


def _finished(
    folder: Path, records: list[dict[str, Any]], identity: dict[str, Any], names: Collection[str]
) -> dict[str, Entry]:
    same_made(folder, records[0].get("identity"), identity)
    entries = {r["file"]: _entry(r) for r in records[1:] if r["file"] in names}
    return {name: entry for name, entry in entries.items() if entry}


def _records(path: Path, raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal and their length, up to where a crash cut it or something else stands in it."""
    records: list[dict[str, Any]] = []
    length = 0
    for line in raw.splitlines(keepends=True):
        try:
            record = documents.parsed(path, line)
        except Refused:
            break
        if not line.endswith(b"\n") or (records and not (isinstance(record.get("file"), str) and _entry(record))):
            break
        records.append(record)
        length += len(line)
    return records, length


def _entry(facts: Any) -> Entry | None:
    """Size and hash as a journal or manifest has them, None for anything else."""
    if not isinstance(facts, dict) or not whole(facts.get("bytes")):
        return None
    digest = facts.get("sha256")
    errors = facts.get("errors", {})
    right = isinstance(errors, dict) and all(isinstance(error, float | int) for error in errors.values())
    if not (right and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        return None
    return Entry(facts["bytes"], digest, errors)


def same_made(folder: Path, found: Any, identity: dict[str, Any]) -> None:
    """Refuse a folder whose journal or manifest is of another source or other options."""
    if found == identity:
        return
    found = found if isinstance(found, dict) else {}
    names = [name for name in identity | found if found.get(name) != identity.get(name)]
    what = "another SRC, or one changed since" if {"source", "stamps"} & set(names) else "other options"
    options = [name for name in names if name in ("to", "keep", "shard_size")]
    said = ", ".join(f"{name} {shown(found.get(name))} instead of {shown(identity.get(name))}" for name in options)
    raise Refused(
        f"{folder} holds a conversion of {what}{f' ({said})' if said else ''}; "
        "repeat that very command, empty the folder or choose another"
    )


def manifest(identity: dict[str, Any], files: dict[str, Entry]) -> bytes:
    """The text of a manifest: what the output is made of, and size and hash of every file but itself."""
    entries = {name: entry.facts for name, entry in sorted(files.items())}
    return (json.dumps({"identity": identity, "files": entries}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path, memory: int | None = None) -> tuple[dict[str, Any], dict[str, Entry]] | None:
    """Identity and files, or None where there is no manifest. Raises Refused for a damaged one."""
    raw = _contents(folder, MANIFEST, memory)
    if raw is None:
        return None
    path = folder / MANIFEST
    found = documents.parsed(path, raw, memory, _ANEW)
    for part in ("identity", "files"):
        if not isinstance(found.get(part), dict):
            raise Refused(f"{path} is damaged: {part} is {shown(found.get(part))}, expected an object; {_ANEW}")
    entries = {}
    for name, facts in found["files"].items():
        entry = _entry(facts)
        if entry is None:
            raise Refused(f"{path} is damaged: {name!r} has no bytes and sha256, but {shown(facts)}; {_ANEW}")
        entries[name] = entry
    return found["identity"], entries


def _contents(folder: Path, name: str, memory: int | None) -> bytes | None:
    path = place(folder, name)
    if not path.exists():
        return None
    with documents.opened(path) as handle:
        return documents.contents(handle, path, memory=memory, remedy=_ANEW)


def foreign(folder: Path) -> list[str]:
    """What lies in a folder that a conversion did not put there, if it has neither journal nor manifest."""
    if not folder.exists() or any(place(folder, name).exists() for name in (JOURNAL, MANIFEST)):
        return []
    return sorted(p.name for p in folder.iterdir() if p.name not in _IGNORED)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
