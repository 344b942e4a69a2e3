"""Files read without trust: opened as regular files only, within limits, and whole or not at all.

All JSON of a checkpoint and of a conversion comes through here, so what is too large, too deep or no JSON is refused in
one way. What a document must hold is for its reader to say, with `whole` for numbers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import reprlib
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .memory import resident

MOST = 100_000_000  # bytes of a document, as in the safetensors library
LARGEST = (1 << 63) - 1
AGAIN = "copy or download it again"
_CONFIG = 1 << 20  # bytes; the published ones have some thousands
_TOKEN = 100  # bytes of memory for each value that JSON separates from the next, its place in a list or object included
_INDENTED = 128  # bytes of memory for a byte of a configuration, which is also copied, walked and written with indents
_MARGIN = 1 << 20  # bytes
_SECOND = 1_000_000_000  # ns
_TICK = 20_000_000  # ns: file systems take times from a clock that may stand still for 10 ms
_LONGEST = 2000  # characters of a message


class Refused(ValueError):
    """A checkpoint, a folder or an option that cannot be converted; the message names it and the remedy, in a line."""

    def __init__(self, text: str) -> None:
        super().__init__(line(text))


class Stamp(NamedTuple):
    """What shows that a file has been changed: nobody can set `changed`, the time that the system keeps for itself."""

    size: int
    modified: int
    changed: int
    inode: int


def line(text: str) -> str:
    """A text as one line that any terminal takes: names of files and tensors may hold whatever their author liked."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def stamp(facts: os.stat_result) -> Stamp:
    return Stamp(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


def settled(file: int | Path) -> Stamp:
    """The stamp of an open file or a path, taken when whatever changes it from now on gives it another.

    Not seen is what another machine writes while its clock is behind, and what a program writes to a mapping that it
    has written to before.
    """
    facts = os.stat(file)
    tick = _TICK if facts.st_ctime_ns % _SECOND else 2 * _SECOND  # some file systems keep whole seconds
    if abs(time.time_ns() - facts.st_ctime_ns) < tick:
        time.sleep(tick / _SECOND)
        facts = os.stat(file)
    return stamp(facts)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A regular file to read; neither a link nor a pipe, which might never answer. Raises Refused, OSError."""
    handle = regular(path)
    try:
        yield handle
    finally:
        os.close(handle)


def regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """An open file, as `opened`; to be closed."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise Refused(f"{path} is no regular file; put one there, or remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Refused(f"{path} is no regular file; put one there, or remove it")
    return handle


def contents(handle: int, path: Path, most: int = MOST, memory: int | None = None, remedy: str = AGAIN) -> bytes:
    """All bytes of an open file. Raises Refused where there are more than `most` or more than fit in memory."""
    size = os.fstat(handle).st_size
    if size > most:
        raise Refused(f"{path} has {size:,} bytes, which is more than the {most:,} it may have; {remedy}")
    _fits(path, 2 * size, memory)
    with open(handle, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(most)


def read(path: Path, most: int = MOST, memory: int | None = None) -> tuple[bytes, Stamp]:
    """A file of at most so many bytes, and its stamp. Raises Refused where it is larger or is changed meanwhile."""
    with opened(path) as handle:
        before = settled(handle)
        raw = contents(handle, path, most, memory)
        if stamp(os.fstat(handle)) != before:
            raise Refused(f"{path} has changed while it was read; repeat this when nothing writes there")
    return raw, before


def configuration(path: Path, memory: int | None = None) -> tuple[dict[str, Any], bytes, Stamp]:
    """A ``config.json``, its bytes and stamp. Infinities are left in it: published models have some, not in JSON."""
    raw, found = read(path, _CONFIG)
    _fits(path, _INDENTED * len(raw), memory)
    value = _object(path, raw, AGAIN)
    if b"\\u" in raw:
        _writable(path, value)
    return value, raw, found


def parsed(path: Path, raw: bytes, memory: int | None = None, remedy: str = AGAIN) -> dict[str, Any]:
    """The JSON object of a document. Raises Refused with the remedy.

    memory: the most bytes that this process may take.
    """
    wide = 1 if raw.isascii() and b"\\u" not in raw else 4  # one such character makes all of a text as wide
    tokens = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))
    _fits(path, 2 * wide * len(raw) + _TOKEN * tokens, memory)
    return _object(path, raw, remedy, parse_constant=_finite, parse_float=_finite)


def whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    """Whether a value is an integer, and no truth value, between bounds."""
    return type(value) is int and least <= value <= most


def shown(value: Any) -> str:
    """A value in words, however large or deep it is."""
    return reprlib.repr(value)


def _fits(path: Path, need: int, memory: int | None) -> None:
    """Refuse what is too large for the memory left; what is small lies in a margin that is planned for."""
    if memory is not None and need > max(_MARGIN, memory - (held := resident())):
        raise Refused(
            f"{path} takes up to {need >> 20} MiB when it is read, and this process {held >> 20} MiB already: "
            f"give at least {-(-(need + held) >> 20)}MiB of --memory, or another {path.name}"
        )


def _object(path: Path, raw: bytes, remedy: str, **more: Any) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, **more)
    except Refused as error:
        raise Refused(f"{path}: {error}; {remedy}") from None
    except RecursionError:
        raise Refused(f"{path} holds no valid JSON (nested too deep); {remedy}") from None
    except ValueError as error:
        raise Refused(f"{path} holds no valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object; {remedy}")
    return value


def _writable(path: Path, value: Any) -> None:
    """Refuse half a pair of surrogates, which is no text in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise Refused(f"{path} holds what cannot be written again ({error}); correct it") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise Refused(f"{text[:40]} is no finite number")
    return number


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(f"{name!r} appears twice")
        found[name] = value
    return found
