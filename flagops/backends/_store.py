"""Files that hold code: trusted because nobody else can have written them, and only as they were written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger("flagops")

_DIGEST = hashlib.sha256().digest_size


class Refused(PermissionError):
    """A place where another user could put code."""


class Store:
    """A folder of files that are read only if this user, or root, wrote them and no bit has changed since.

    The folder is made if need be, for this user alone; one without permission to write is never written, not by root
    either. Raises Refused where another user owns it or a folder above it, or could write there; OSError where it
    cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        if not os.path.isabs(folder):
            raise Refused(f"{folder} is a relative path, another folder in each working directory")
        self.folder = Path(os.path.realpath(folder))
        for place in (*reversed(self.folder.parents), self.folder):  # below what is trusted nobody else makes links
            with contextlib.suppress(FileExistsError):
                if not place.exists():
                    place.mkdir(mode=0o700)
            status = place.lstat()
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(f"{place} is not a folder")
            _examine(place, status, shared=place != self.folder)
        self.writable = bool(status.st_mode & stat.S_IWUSR)

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None if nothing was, or something else stands there now."""
        content = self.raw(name)
        if content is None:
            return None
        digest, content = content[:_DIGEST], content[_DIGEST:]
        if digest != _digest(name, content):
            log.info("%s is damaged and is made again", self.folder / name)
            return None
        return content

    def raw(self, name: str) -> bytes | None:
        """A file of a name as it is, with no digest before it; None if it is none, or another user's."""
        path = self.folder / name
        try:
            with open(path, "rb", opener=_without_links) as f:
                _examine(path, os.fstat(f.fileno()))
                return f.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.info("not read: %s", error)
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replace the file of that name at once: who reads it meanwhile has the old one or the new one."""
        if not self.writable:
            raise PermissionError(errno.EACCES, "it is for reading alone", str(self.folder))
        handle, temporary = tempfile.mkstemp(dir=self.folder)
        try:
            with open(handle, "wb") as f:
                f.write(_digest(name, content) + content)
            os.replace(temporary, self.folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def _examine(path: Path, status: os.stat_result, shared: bool = False) -> None:
    """shared: where others may write, if none can remove what is not his own, as in /tmp."""
    if not hasattr(os, "geteuid"):
        return  # access lists decide there, which the mode does not show
    if status.st_uid not in (0, os.geteuid(), _root()):
        raise Refused(f"{path} belongs to user {status.st_uid}, who could put other code there")
    others = stat.S_IWOTH if _alone(status.st_gid) else stat.S_IWGRP | stat.S_IWOTH
    if status.st_mode & others and not (shared and status.st_mode & stat.S_ISVTX):
        mode = stat.S_IMODE(status.st_mode)
        raise Refused(f"{path} can be written by other users (mode {mode:04o}), who could put other code there")


@cache
def _root() -> int:
    """Who owns the root folder can replace everything; in a container without a real root it is another than 0."""
    return os.stat("/").st_uid


@cache
def _alone(group: int) -> bool:
    """Whether a group is this user's own, as where everyone has a group of his name and new folders are 0775."""
    import grp
    import pwd

    try:
        user, own = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and own.gr_name == user.pw_name and set(own.gr_mem) <= {user.pw_name}
