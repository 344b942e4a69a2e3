"""Files that appear whole or not at all, and the journal that lets the same conversion go on after any end."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import JOURNAL, MANIFEST, Refused

PARTIAL = ".partial"
_IGNORED = frozenset({"lost+found"})


@dataclass(frozen=True)
class Entry:
    """A finished file."""

    bytes: int
    sha256: str


class Writer:
    """A file written under a temporary name, and under its own only when it is whole and on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._final = folder / name
        self._temporary = folder / (name + PARTIAL)
        self._final.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self._file = os.open(self._temporary, flags, 0o666)
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

    identity: what the output is made of and how. An interrupted conversion of something else is refused, as is a folder
        that holds other files and no journal.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._path = folder / JOURNAL
        self._lock = threading.Lock()
        self.done: dict[str, Entry] = {}
        self._file = self._locked()
        try:
            self.resumed = self._load(identity)
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
            self._append({"file": name, "bytes": entry.bytes, "sha256": entry.sha256})
            self.done[name] = entry

    def remove(self) -> None:
        """The last step of a conversion, after the manifest and the index are in place."""
        self._path.unlink()
        sync_folder(self._path.parent)

    def _locked(self) -> int:
        import fcntl

        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise Refused(f"{self._path.parent}: another conversion is writing there; wait for it") from None
            if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                return file
            os.close(file)  # another conversion has just finished and removed it

    def _load(self, identity: dict[str, Any]) -> bool:
        raw = self._path.read_bytes()
        records, whole = _records(raw)
        if whole < len(raw):
            os.ftruncate(self._file, whole)
        if not records:
            self._append({"journal": "flagops convert", "identity": identity})
            sync_folder(self._path.parent)
            return False
        self.done = _finished(self._path.parent, records, identity)
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


def unfinished(folder: Path, identity: dict[str, Any]) -> dict[str, Entry]:
    """What the journal of an interrupted conversion has as finished; refuses that of another, and changes nothing."""
    path = folder / JOURNAL
    records = _records(path.read_bytes())[0] if path.exists() else []
    return _finished(folder, records, identity) if records else {}


def _finished(folder: Path, records: list[dict[str, Any]], identity: dict[str, Any]) -> dict[str, Entry]:
    same_made(folder, records[0].get("identity"), identity)
    return {r["file"]: Entry(r["bytes"], r["sha256"]) for r in records[1:]}


def _records(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal and their length, up to where a crash cut it."""
    records: list[dict[str, Any]] = []
    whole = 0
    for line in raw.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        records.append(record)
        whole += len(line)
    return records, whole


def same_made(folder: Path, found: Any, identity: dict[str, Any]) -> None:
    """Refuse a folder whose journal or manifest is of another source or other options."""
    if found == identity:
        return
    found = found if isinstance(found, dict) else {}
    names = [name for name in identity | found if found.get(name) != identity.get(name)]
    what = "another SRC, or one changed since" if {"source", "stamps"} & set(names) else "other options"
    options = [name for name in names if name in ("to", "keep", "shard_size")]
    shown = ", ".join(f"{name} {found.get(name)} instead of {identity.get(name)}" for name in options)
    raise Refused(
        f"{folder} holds a conversion of {what}{f' ({shown})' if shown else ''}; "
        "repeat that very command, empty the folder or choose another"
    )


def manifest(identity: dict[str, Any], files: dict[str, Entry]) -> bytes:
    """The text of a manifest: what the output is made of, and size and hash of every file but itself."""
    entries = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(files.items())}
    return (json.dumps({"identity": identity, "files": entries}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]] | None:
    """Identity and files, or None where there is no manifest. Raises Refused for a damaged one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        files = {name: Entry(int(facts["bytes"]), str(facts["sha256"])) for name, facts in found["files"].items()}
        return dict(found["identity"]), files
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{path} is damaged ({error!r}); convert again into another folder") from None


def foreign(folder: Path) -> list[str]:
    """What lies in a folder that a conversion did not put there, if it has neither journal nor manifest."""
    if not folder.exists() or (folder / JOURNAL).exists() or (folder / MANIFEST).exists():
        return []
    return sorted(p.name for p in folder.iterdir() if p.name not in _IGNORED)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
