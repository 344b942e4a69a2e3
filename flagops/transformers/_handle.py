"""What `flagops.patch` returns: the calls that a patched model makes, counted, and the way back."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch

import flagops
from flagops import registry
from flagops.call import of, run
from flagops.config import names
from flagops.errors import Unsupported
from flagops.operator import Operator
from flagops.override.handle import forks
from flagops.override.report import Report, Row
from flagops.override.timing import Clock, waiting

from ._binding import Binding

log = logging.getLogger("flagops")


@functools.cache
def _known(op: str) -> tuple[Operator, Callable[..., Any]]:
    """An operator by name, and the function that users call."""
    operator = registry.operator(op)
    return operator, of(operator)


def _key(x: torch.Tensor) -> str:
    return "CPU" if x.is_cpu else x.device.type.upper()


class Handle:
    """One `patch`; `disable` undoes it, in any order of several."""

    def __init__(
        self, ops: tuple[str, ...], backend: str | Sequence[str] | None, numerics: str, timed: bool = False
    ) -> None:
        self.ops = frozenset(ops)
        self.backend = backend
        self.official = numerics == "official"
        self.active, self.timed = True, timed
        self._wish = ",".join(names(backend or ()))
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._clocks: dict[tuple[str, str, str, str], Clock] = {}
        self._forks = forks.value()
        self._untouched: dict[str, int | None] = {}
        self._bindings: list[Binding] = []
        self._lock = threading.Lock()
        self.heads: list[Any] = []
        self._stays: str | None = None

    def install(self, bindings: Iterable[Binding]) -> None:
        for binding in bindings:
            binding.add(self)
            self._bindings.append(binding)

    def leave_alone(self, name: str, reason: str) -> None:
        """A module that keeps its own code, for the report."""
        self._untouched[f"{name}: {reason}"] = None

    def stay(self, reason: str) -> None:
        """Refuse from now on to be disabled."""
        self._stays = reason

    def disable(self) -> None:
        """Put the model back as it was; a second call does nothing. On a mesh every rank calls it, since it gathers
        the weights. Raises RuntimeError for a model that computes by its patch alone."""
        if self._stays:
            raise RuntimeError(f"disable: {self._stays}")
        if self.active:
            self.active = False
            for binding in self._bindings:
                binding.remove(self)
            for layer in self.heads:
                layer.restore()

    def report(self) -> Report:
        """Per operator the calls by backend and, by reason, those that ran transformers' own code; below them the
        modules that could not be patched. Graphs of `torch.compile` call the operators uncounted; `flagops.coverage`
        sees those calls too."""
        with self._lock:
            counts, clocks = dict(self._counts), dict(self._clocks)
        rows = []
        for op, key in dict.fromkeys(seen[:2] for seen in counts):
            mine = {seen[2:]: number for seen, number in counts.items() if seen[:2] == (op, key)}
            replaced = {backend: number for (backend, _), number in mine.items() if backend}
            times = {fate[2]: clock for fate, clock in clocks.items() if fate[:2] == (op, key)}
            rows.append(Row(op, key, replaced, {reason: n for (_, reason), n in mine.items() if reason}, times))
        return Report(
            tuple(rows),
            self._untouched.copy(),
            "modules left as they are:",
            uncalled=tuple(sorted(self.ops - {row.op for row in rows})),
            forks=forks.value() - self._forks,
        )

    def call(self, op: str, *args: Any, out: Any = None) -> Any:
        """One operator; None, counted with the reason, when no backend takes the call."""
        if torch.compiler.is_compiling():
            return getattr(torch.ops.flagops, op).default(*args, backend=self._wish)
        operator, ours = _known(op)
        args = (*args, *operator.defaults[len(args) : -1], out)
        start = perf_counter() if self.timed else 0.0
        public = getattr(flagops, op)
        try:
            if public is ours:
                result, ran = run(operator, args, self.backend)
            else:
                result, ran = public(*args, backend=self.backend), getattr(public, "__qualname__", str(public))
        except Unsupported as error:
            self.leave(op, args[0], str(error))
            return None
        number = self._count(op, args[0], ran or "torch.ops.flagops", "")
        if self.timed:
            self._time(op, args[0], ran or "torch.ops.flagops", start, first=number == 1)
        return result

    def round(self, op: str, *args: Any) -> Any:
        """A step of the official numerics, which no choice of backends turns off: the first that takes it."""
        result = self.call(op, *args)
        return getattr(flagops, op)(*args) if result is None else result

    def leave(self, op: str, like: torch.Tensor, reason: str) -> None:
        """Count a call that transformers' own code computes."""
        if torch.compiler.is_compiling():
            return
        if self._count(op, like, "", reason) == 1:
            log.info("%s is left to transformers: %s", op, reason)

    def _time(self, op: str, like: torch.Tensor, backend: str, start: float, first: bool) -> None:
        key = _key(like)
        waiting(key)()
        with self._lock:
            clock = self._clocks.setdefault((op, key, backend, ""), Clock())
        clock.note(perf_counter() - start, first=first)

    def _count(self, op: str, like: torch.Tensor, backend: str, reason: str) -> int:
        seen = (op, _key(like), backend, reason)
        with self._lock:
            self._counts[seen] += 1
            return self._counts[seen]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __reduce__(self) -> Any:
        return type(None), ()  # as a binding

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self
