"""What every command keeps.

What it cannot do is one line on standard error and exit code 2, said before the work begins, and so are an interrupt
and a closed pipe. Exit code 0 says that what the command claims holds, 1 that it does not. Work of more than a few
seconds says how far it is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from flagops.errors import Unsupported

REFUSED = 2


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the words of a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {' '.join(message.split())} ({self.prog} --help shows the usage)\n")


def keep(run: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; an error in what was asked for is a line, one of ours a traceback."""
    try:
        try:
            return int(run() or 0)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return refuse("nobody reads the output any more")
    except KeyboardInterrupt:
        return refuse("interrupted")
    except (ValueError, ModuleNotFoundError, OSError, Unsupported) as error:
        if os.environ.get("FLAGOPS_LOG", "").upper() == "DEBUG":
            raise
        if isinstance(error, OSError) and error.filename is not None:
            return refuse(f"{error.filename}: {error.strerror}")
        return refuse(str(error))


def refuse(text: str) -> int:
    """Print why a command ends, in one line; returns its exit code."""
    print(f"flagops: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return REFUSED


def output(text: str) -> Path:
    """A file that can be written, for `argparse`: asked before the work, not after it."""
    path = Path(text)
    place = path if path.exists() else path.absolute().parent
    problem = (
        f"{path} is a folder" if path.is_dir()
        else f"there is no folder {place}" if not place.exists()
        else f"{place} is no folder" if place != path and not place.is_dir()
        else "" if os.access(place, os.W_OK) else f"{place} cannot be written"
    )  # fmt: skip
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return path


def existing(text: str) -> Path:
    """A file that is there, for `argparse`."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def present(text: str) -> Path:
    """A file or folder that is there, for `argparse`."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {text}")
    return Path(text)


def natural(text: str) -> int:
    """A whole number above zero, for `argparse`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def device(name: str) -> str:
    """A device that torch has here; a ValueError that says why not."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(f"no device {name!r} here: {str(error).strip().splitlines()[0]}") from None
    return name


def script(path: str, words: Sequence[str]) -> int:
    """Run a file as ``python PATH WORDS`` would, and return its exit code: its error is shown from its own line on."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    sys.argv[:] = [path, *words]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        frames = error.__traceback__
        while frames and frames.tb_next and frames.tb_frame.f_code.co_filename != path:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


class Progress:
    """Once work takes longer than `PATIENCE` seconds: on standard error how much is done, and how long the rest takes.

    ``with Progress(total) as begin: begin("what comes next")``.
    """

    PATIENCE = 5.0
    INTERVAL = 10.0
    """Seconds between two lines of a log; a terminal's last line is written anew each second."""

    def __init__(self, total: int) -> None:
        self._total, self._begun, self._what = total, 0, ""
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Callable[[str], None]:
        self._thread.start()
        return self._next

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _next(self, what: str) -> None:
        self._begun, self._what = self._begun + 1, what

    def _watch(self) -> None:
        pause = self.PATIENCE
        while not self._over.wait(pause):
            pause = 1.0 if self._terminal else self.INTERVAL
            line = self.line(time.monotonic() - self._start)
            print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def line(self, seconds: float) -> str:
        """What is said after so many seconds."""
        done = max(0, self._begun - 1)
        left = f"about {seconds / done * (self._total - done):.0f} s left" if done else f"{seconds:.0f} s so far"
        return f"{done} of {self._total} done, {left}: {self._what}"
