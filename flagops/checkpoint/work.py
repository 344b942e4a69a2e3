"""Threads over the files of a plan within a bound of memory, and what they report."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..backends import numba
from .documents import Refused
from .memory import resident
from .plan import RECODE, Plan
from .stream import BAND, BLOCK, LARGEST, SMALLEST, Kernels, Stream

_WORKER = 6 << 20  # bytes: a thread's stack, its allocator and what checks and comparisons take
_MARGIN = 16 << 20
Task = TypeVar("Task")


class Progress(Protocol):
    """Told by the threads, one at a time, how far they are."""

    def begin(self, total: int, what: str) -> None:
        """So many bytes will be written or checked, as `what` says."""

    def advance(self, count: int, name: str) -> None:
        """So many bytes more are done; `name` is the tensor or file at hand."""

    def note(self, text: str) -> None:
        """Something that a log should hold."""

    def end(self) -> None:
        """No more will come."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, total: int, what: str) -> None:
        return

    def advance(self, count: int, name: str) -> None:
        return

    def note(self, text: str) -> None:
        return

    def end(self) -> None:
        return


@dataclass(frozen=True)
class Share:
    """How the memory is divided: `workers` threads with slices of `limit` elements, about `bytes` at the peak."""

    workers: int
    limit: int
    base: int
    bytes: int


class Stopped(Exception):
    """Ends a thread whose work is no longer wanted."""


def share(plan: Plan, kernels: Kernels, memory: int, workers: int | None, tasks: int) -> Share:
    """Divide `memory` bytes, less what the process holds already, among threads.

    workers: how many, or None for one a processor as far as tasks and memory go.
    Raises Refused if it is too little, saying how much is needed.
    """
    turned = [out.matrix for out in plan.outputs if out.transposed and out.size]
    each = 3 + kernels.temporaries + (2 if turned else 0)  # a byte in, two out, and two turned
    recoded = [BLOCK * out.shape[-1] for out in plan.outputs if out.action == RECODE and out.size]
    if plan.integers:  # four bytes in, four that they become
        each, longest = 8 + kernels.temporaries, max((out.of.shape[-1] for out in plan.outputs if out.of), default=0)
        recoded.append(longest)
    smallest = max([SMALLEST, *recoded, *(BAND * rows for _, _, rows in turned)])
    worker = _WORKER + max((depth * rows * 17 // 32 for _, depth, rows in turned), default=0)  # a matrix and its scales
    base = resident() + _MARGIN
    need = worker + each * smallest
    wanted = workers or max(1, min(processors(), tasks))
    count = wanted if workers else max(1, min(wanted, (memory - base) // need))
    if memory < base + count * need:
        raise Refused(
            f"--memory of {memory >> 20} MiB is too little: the process takes {base >> 20} MiB and each of {count} "
            f"workers {-(-need >> 20)} MiB; give at least {-(-(base + count * need) >> 20)}MiB"
        )
    limit = max(smallest, min(LARGEST, ((memory - base) // count - worker) // each))
    return Share(count, limit, base, base + count * (worker + each * limit))


class Team:
    """Runs tasks on threads that each own a `Stream`; the first error stops all and is raised.

    stop: set to end every thread at its next slice, as an error or an interrupt does.
    """

    def __init__(self, plan: Plan, kernels: Kernels, shares: Share, progress: Progress) -> None:
        self._plan, self._kernels, self._shares = plan, kernels, shares
        self._progress = progress
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.read = 0
        self.not_finite: set[str] = set()

    def run(self, tasks: Iterable[Task], work: Callable[[Task, Stream], None]) -> None:
        """Call ``work(task, stream)`` for each."""
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)

        def serve() -> None:
            own = numba.at_most(max(1, processors() // self._shares.workers))
            with own, Stream(self._plan, self._kernels, self._shares.limit) as stream:
                try:
                    while not self.stop.is_set():
                        try:
                            task = waiting.get_nowait()
                        except queue.Empty:
                            return
                        work(task, stream)
                except Stopped:
                    return
                except BaseException:
                    self.stop.set()
                    raise
                finally:
                    with self._lock:
                        self.read += stream.reader.count
                        self.not_finite |= stream.not_finite

        with ThreadPoolExecutor(self._shares.workers, "flagops-convert") as pool:
            futures = [pool.submit(serve) for _ in range(self._shares.workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()  # an interrupt ends the wait; without one all threads are done or must stop
        for future in futures:
            future.result()

    def advance(self, count: int, name: str) -> None:
        """Report bytes done; ends the thread if the work is no longer wanted."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._progress.advance(count, name)

    def note(self, text: str) -> None:
        with self._lock:
            self._progress.note(text)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folders(src: Path, dst: Path) -> None:
    """Refuse an output that would lie in its input, or the other way round."""
    if dst == src or dst.is_relative_to(src) or src.is_relative_to(dst):
        raise Refused(f"DST {dst} and SRC {src} lie in one another; choose a DST apart")
    if dst.exists() and not dst.is_dir():
        raise Refused(f"DST {dst} is a file; choose a folder")


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start
