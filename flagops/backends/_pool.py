"""Threads of our own, for kernels that run without torch's OpenMP: they sleep in a queue until a call asks for them."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from typing import Any


class _Job:
    """A call: a row of chunks that its caller and any idle workers take from in turn."""

    __slots__ = ("active", "args", "chunk", "closed", "done", "error", "kernel", "lock", "starts", "tasks")

    def __init__(self, kernel: Any, tasks: int, args: tuple[Any, ...], chunk: int) -> None:
        self.kernel, self.tasks, self.args, self.chunk = kernel, tasks, args, chunk
        self.starts = itertools.count(0, chunk)
        self.active, self.closed = 0, False
        self.error: BaseException | None = None
        self.lock, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            for start in self.starts:
                if start >= self.tasks or self.error is not None:
                    return
                self.kernel(start, min(start + self.chunk, self.tasks), *self.args)
        except BaseException as error:
            self.error = error

    def help(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.active += 1
        self.run()
        with self.lock:
            self.active -= 1
            if self.closed and not self.active:
                self.done.release()

    def finish(self) -> None:
        """Wait for the workers that took part, and only for those: a worker that never came can hang nobody."""
        with self.lock:
            self.closed = True
            waiting = self.active > 0
        while waiting:
            try:
                self.done.acquire()
                waiting = False
            except BaseException as error:  # an interrupt must not free arrays that workers still write to
                self.error = error
        if self.error is not None:
            raise self.error


class _Pool:
    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.workers = 0
        self.lock = threading.Lock()

    def _work(self) -> None:
        while True:
            self.jobs.get().help()

    def post(self, job: _Job, helpers: int) -> None:
        if self.workers < helpers:
            with self.lock:
                while self.workers < helpers:
                    threading.Thread(target=self._work, name=f"flagops-{self.workers}", daemon=True).start()
                    self.workers += 1
        for _ in range(helpers):
            self.jobs.put(job)


_pool = _Pool()


def run(kernel: Any, threads: int, chunk: int, tasks: int, args: tuple[Any, ...]) -> None:
    """`kernel(start, stop, *args)` over range(tasks), some `chunk` at a time, by the caller and by idle workers."""
    job = _Job(kernel, tasks, args, chunk)
    with contextlib.suppress(RuntimeError):  # no thread can be started: the caller does it all
        _pool.post(job, threads - 1)
    job.run()
    job.finish()
