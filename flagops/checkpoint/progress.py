"""Progress for people: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from flagops.backends import missing

from .documents import line
from .work import Progress, Silent

_INTERVAL = 10.0  # seconds between two lines of a log


def watcher(quiet: bool) -> Progress:
    """What fits standard error: silence, a bar, or lines."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() and missing("rich") is None else Lines()


def amount(count: float) -> str:
    """Bytes in decimal units, as disks are sold: ``"166.9 GB"``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Lines:
    """Plain lines on standard error, at most one in ten seconds, with rate and time left."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._start = self._last = time.monotonic()

    def begin(self, total: int, what: str) -> None:
        self._total, self._done = total, 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int, name: str) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= _INTERVAL:
            self._last = now
            self._line(now, name)

    def note(self, text: str) -> None:
        print(line(text), file=sys.stderr, flush=True)

    def end(self) -> None:
        return

    def _line(self, now: float, name: str) -> None:
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else float("inf")
        print(
            f"{self._done / max(self._total, 1):6.1%} of {amount(self._total)}, {amount(rate)}/s, "
            f"{left:.0f} s left, {name!r}",
            file=sys.stderr,
            flush=True,
        )


class Bar:
    """rich's bar on standard error: share, rate, time left and the tensor at hand."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[tensor]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def begin(self, total: int, what: str) -> None:
        self._task = self._bar.add_task(what, total=total, tensor="")
        self._bar.start()

    def advance(self, count: int, name: str) -> None:
        self._bar.update(self._task, advance=count, tensor=ascii(name)[1:-1])

    def note(self, text: str) -> None:
        self._bar.console.print(line(text), markup=False, highlight=False)

    def end(self) -> None:
        self._bar.stop()
