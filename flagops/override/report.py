"""What became of torch's calls while `flagops.enable` was in force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

_HEAD = ("operator", "calls", "replaced by", "left to torch")


@dataclass(frozen=True)
class Row:
    """What became of the calls of one overload at one dispatch key."""

    op: str
    key: str
    replaced: dict[str, int]
    passed: dict[str, int]

    @property
    def calls(self) -> int:
        return sum(self.replaced.values()) + sum(self.passed.values())


@dataclass(frozen=True)
class Report:
    """Calls by overload; of what bypasses the replaced operators, calls where they can be counted, else None."""

    rows: tuple[Row, ...]
    bypassed: dict[str, int | None]
    elsewhere: str = "matrix products elsewhere, calls where they can be counted:"

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

    def _cells(self) -> list[tuple[str, str, str, str]]:
        def listed(counts: dict[str, int]) -> str:
            return "\n".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))

        cells = []
        for row in self.rows:
            name = row.op if row.key == "CPU" else f"{row.op} [{row.key}]"
            cells.append((name, str(row.calls), listed(row.replaced), listed(row.passed)))
        return cells

    def _notes(self) -> list[str]:
        notes = [f"{self.replaced} of {self.calls} calls replaced ({self.share:.0%})"]
        notes += [self.elsewhere] if self.bypassed else []
        return notes + [f"  {name}{'' if n is None else f': {n}'}" for name, n in self.bypassed.items()]

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
