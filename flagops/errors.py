"""The one exception that dispatch may answer with another backend, others of ours, and the words of a helpful error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Unsupported(NotImplementedError):
    """A backend cannot run this call; the message is the reason. A caller's mistake is a ValueError or TypeError."""


class Faulty(Unsupported):
    """A package offers a backend, kernel or operator that is not what the protocol asks for; the message says where."""


class Uncompiled(RuntimeError):
    """A kernel would have been compiled where FLAGOPS_JIT=error forbids it; the message names it and its arguments."""


class OutOfRange(IndexError, RuntimeError):
    """An index that is out of range; of torch's operators some raise the one and some the other."""


def said(error: BaseException) -> str:
    """An error in one line: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'matmul'?"`` when a known name is close, else the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
