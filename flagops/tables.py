"""Tables for terminals and logs: rich where it is installed, aligned text where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flagops.backends import missing


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table. Cells may hold several lines."""
    cells = [[str(cell) for cell in row] for row in rows]
    if missing("rich") is None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        class Piped(Console):
            def on_broken_pipe(self) -> None:  # rich would end the process with code 1 and not a word
                raise BrokenPipeError

        console = Piped()
        table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        if not console.is_terminal:  # a log has no right edge: do not fold cells
            console.width = max(console.width, 200)
        console.print(table)
        return
    lines = [list(columns)] + [part for row in cells for part in _split(row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(title)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("\n", "<br>") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _split(row: Sequence[str]) -> list[list[str]]:
    parts = [cell.split("\n") for cell in row]
    height = max(map(len, parts), default=1)
    return [[part[i] if i < len(part) else "" for part in parts] for i in range(height)]
