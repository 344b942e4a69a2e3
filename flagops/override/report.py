"""What became of torch's calls under `flagops.enable`, how long they took, and what to do about those left to torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .timing import Clock

_HEAD = ("operator", "calls", "replaced by", "left to torch")
_NAMED = 12  # operators that were never called, before the rest is a number

REMEDIES = (
    (r"torch's own kernel .*faster", 'enable(backend="{backend}") takes it, `flagops tune` measures this machine'),
    (r"dtypes(,| differ)", "bring the operands to one dtype"),
    (r"dtype (bool|complex)", "no product of ours takes it: floats, integers, or torch's kernel"),
    (r"dropout", "model.eval(), or no dropout in attention"),
    (r"out may share memory", "give the call an out= of its own"),
    (r"heads that differ", "enable_gqa=True"),
    (r"its temporaries", "a larger FLAGOPS_BUDGET, or flagops.using(budget=...)"),
    (r"sdpa_kernel asks", "call it outside of sdpa_kernel"),
    (
        r"the dispatch mode|a transform of|a level of forward",
        "call it outside, or call flagops.{card} by its name there",
    ),
    (r"out of fuel", "unset FLAGOPS_FUEL"),
)
"""What can be done about a reason for which a call was left to torch; the first pattern that begins it."""

HINTS = {
    "rms_norm": "if the model has RMS norms, it writes them as pow, mean, rsqrt and mul, as most of transformers do: "
    "enable('all') replaces these four, flagops.patch a DeepSeek-V4's norms",
    "scaled_dot_product_attention": "attn_implementation='sdpa' calls it, 'eager' multiplies matrices",
    "_grouped_mm": "experts_implementation='grouped_mm' calls it, other experts multiply one by one",
}
"""Why a model may never call an operator that it seems to have."""


class Shares(Protocol):
    """What a report shows of `flagops.coverage`."""

    def total(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """What became of the calls of one overload at one dispatch key, and the clocks of whoever computed them."""

    op: str
    key: str
    replaced: dict[str, int]
    passed: dict[str, int]
    times: Mapping[str, Clock] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        return sum(self.replaced.values()) + sum(self.passed.values())

    def remedy(self, reason: str) -> str:
        """What to do about calls left for a reason; empty where nothing helps."""
        found = (text for pattern, text in REMEDIES if re.match(pattern, reason))
        backend, card = "numba" if self.key == "CPU" else "triton", self.op.removeprefix("aten::").partition(".")[0]
        return next(found, "").format(backend=backend, card=card)


@dataclass(frozen=True)
class Report:
    """Calls by overload; of what bypasses the replaced operators, calls where they can be counted, else None.

    uncalled: operators that were asked for and never called; kept: those that stay torch's on this machine, where
        nothing of ours was measured as faster.
    forks: processes that were forked meanwhile; what workers compute is counted in them, not here.
    coverage: every computing call of a run, for the shares of all of them.
    """

    rows: tuple[Row, ...]
    bypassed: dict[str, int | None]
    elsewhere: str = "matrix products elsewhere, calls where they can be counted:"
    uncalled: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    forks: int | None = None
    coverage: Shares | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: (row.op, row.key))))

    @property
    def calls(self) -> int:
        return sum(row.calls for row in self.rows)

    @property
    def replaced(self) -> int:
        return sum(sum(row.replaced.values()) for row in self.rows)

    @property
    def share(self) -> float:
        """Of the calls of replaced operators, the part that flagops kernels computed."""
        return self.replaced / self.calls if self.calls else 0.0

    @property
    def remedies(self) -> dict[str, str]:
        """By reason for which calls were left, what to do about it; empty where nothing helps."""
        return {reason: row.remedy(reason) for row in self.rows for reason in sorted(row.passed)}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values; seconds of calls and of torch's own kernel on the same, where they were taken."""
        rows = [
            {"op": row.op, "key": row.key, "replaced": row.replaced, "left": row.passed}
            | {"times": {name: asdict(clock) for name, clock in row.times.items()}}
            for row in self.rows
        ]
        totals = {name: getattr(self, name) for name in ("calls", "replaced", "share", "remedies", "bypassed")}
        totals |= {"uncalled": list(self.uncalled), "kept": list(self.kept), "forks": self.forks}
        return {"rows": rows} | totals | {"coverage": self.coverage.to_json() if self.coverage else None}

    def _cells(self) -> list[tuple[str, str, str, str]]:
        def listed(counts: dict[str, int], times: Mapping[str, Clock]) -> str:
            ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            return "\n".join(f"{count} {name}{_timed(times.get(name))}" for name, count in ordered)

        cells = []
        for row in self.rows:
            name = row.op if row.key == "CPU" else f"{row.op} [{row.key}]"
            cells.append((name, str(row.calls), listed(row.replaced, row.times), listed(row.passed, row.times)))
        return cells

    def _notes(self) -> list[str]:
        notes = [f"{self.replaced} of {self.calls} calls replaced ({self.share:.0%})"]
        notes += [self.coverage.total()] if self.coverage else []
        notes += self._times()
        remedies = [f"  {reason}: {text}" for reason, text in self.remedies.items() if text]
        notes += ["what to do about calls left to torch:", *remedies] if remedies else []
        if self.kept:
            names, table = ", ".join(self.kept), "the table of this class of machine (`flagops tune` makes its own)"
            notes.append(f"torch's, by {table}, until a backend is named: {names}")
        if self.uncalled:
            more = len(self.uncalled) - _NAMED
            names = ", ".join(self.uncalled[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            notes.append(f"asked for and never called: {names}")
            notes += [f"  {name}: {hint}" for name, hint in HINTS.items() if name in self.uncalled]
        if self.forks is not None:
            seen = f", {self.forks} forked meanwhile" if self.forks else ""
            notes.append(f"not counted: worker processes (DataLoader, multiprocessing){seen}")
        elsewhere = [f"  {name}{'' if n is None else f': {n}'}" for name, n in self.bypassed.items() if n != 0]
        notes += [self.elsewhere, *elsewhere] if elsewhere else []
        return notes

    def _times(self) -> list[str]:
        clocks = [clock for row in self.rows for clock in row.times.values()]
        beside, torchs = (sum(getattr(clock, name) for clock in clocks) for name in ("beside", "torchs"))
        first = sum(clock.first for clock in clocks)
        notes = []
        if torchs:
            took = f"{_duration(beside)}, by torch's own kernels {_duration(torchs)}"
            notes.append(f"the calls that were compared took {took}: {torchs / beside:.2f} times as fast")
            notes += _busy()
        if first:
            notes.append(f"first calls, which plan and may compile, took {_duration(first)} and are in no time above")
        return notes

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [_HEAD]
        for cells in self._cells():
            lines += itertools.zip_longest(*(cell.split("\n") for cell in cells), fillvalue="")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join([*table, *self._notes()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEAD)
        for cells in self._cells():
            table.add_row(*map(Text, cells))
        return Group(table, *map(Text, self._notes()))


def _busy() -> list[str]:
    """A word where other programs keep the processors busy: their threads then wait for each other in every call."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load < 2 * cores:
        return []
    remedy = "" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else "; OMP_WAIT_POLICY=passive helps"
    return [f"these times are disturbed: other programs use the processors too (load {load:.1f} on {cores}){remedy}"]


def _timed(clock: Clock | None) -> str:
    """The mean time of a call, and of torch's own kernel on the same calls."""
    if clock is None or not clock.calls:
        return ""
    torchs = f" (torch's {_duration(clock.torchs / clock.compared)})" if clock.compared else ""
    return f", {_duration(clock.seconds / clock.calls)} each{torchs}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )
