"""What `flagops demo` shows: a table for each model, and progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ALONE = "torch alone"
BOUND_BFLOAT16 = 1.5
"""A bfloat16 logit may be this many times further from float32 than those of torch's own bfloat16 are."""
MEASURED = 2
"""Tokens decoded, the prompt's own forward for the first, to see what share of the model's calls was replaced."""
HEADINGS = (
    "backend",
    "dtype",
    "same\ntokens?",
    "max |Δ\nlogit|",
    "prefill",
    "tokens/s",
    "memory",
    "replaced, of\nits operators",
    "of all\ncalls",
    "of CPU\ntime",
    "",
)


@dataclass
class Row:
    """One backend against torch alone.

    replaced, calls: of the operators that flagops replaces. of_computing, of_time: the share of flagops in all calls
    that compute and in the CPU time of all operators, see `flagops.tools.shares`; `computing` is the number of them.
    """

    backend: str
    dtype: str
    tokens: int
    same: int = 0
    delta: float | None = None
    bound: float | None = None
    rate: float | None = None
    first: float | None = None
    memory: int | None = None
    replaced: int = 0
    calls: int = 0
    computing: int | None = None
    of_computing: float | None = None
    of_time: float | None = None
    problem: str | None = None
    note: str | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass
class Part:
    """One model's table."""

    name: str
    prompt: str = ""
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problem and len(self.rows) > 1 and not any(row.problem for row in self.rows)


def show(part: Part) -> None:
    """The table of one model, and what its rows leave to be said."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(f"\n[bold]{part.name}[/bold]")
    if part.problem:
        console.print(f"[red]{escape(part.problem)}[/red]", soft_wrap=True)
        return
    console.print(f"[dim]prompt[/dim]  {escape(part.prompt)}\n[dim]answer[/dim]  {escape(part.text)}", highlight=False)
    alone = {row.dtype: row for row in part.rows if row.backend == ALONE}
    bounds = {row.dtype: row.bound for row in part.rows if row.bound is not None}
    rules = [f"at most {bound:.2g} in {dtype}{_RULE.get(dtype, '')}" for dtype, bound in bounds.items()]
    rules[-1:] = [f"{rules[-1]}; memory: beyond the model, at the peak"] if rules else []
    caption = f"ok: the same tokens, and a logit is off by {', '.join(rules)}\n{_SHARES}"
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    notes = []
    for row in part.rows:
        base = alone[row.dtype]
        compared = row.backend != ALONE
        verdict = "[red]FAILED[/red]" if row.problem else "[green]ok[/green]" if compared else ""
        table.add_row(
            row.backend,
            row.dtype,
            "" if not compared else f"yes, {row.tokens}" if row.same == row.tokens else f"{row.same} of {row.tokens}",
            "" if row.delta is None else f"{row.delta:.1e}",
            f"{row.first:.2f} s{_times(base.first if compared else None, row.first)}" if row.first else "",
            f"{row.rate:.1f}{_times(row.rate, base.rate if compared else None)}" if row.rate else "",
            "" if row.memory is None else f"{row.memory / 2**20:.0f} MiB",
            f"{row.replaced / row.calls:.0%} of {row.calls}" if row.calls else "",
            "" if row.of_computing is None else f"{row.of_computing:.0%}",
            "" if row.of_time is None else f"{row.of_time:.0%}",
            verdict,
        )
        if row.problem or row.note:
            style = "red" if row.problem else "dim"
            notes.append(f"[{style}]{row.backend}, {row.dtype}: {escape(row.problem or row.note or '')}[/{style}]")
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    for row in part.rows:
        for reason, times in row.fallbacks.items():
            text = " ".join(reason.split())
            console.print(f"[dim]{row.backend}: {times} calls left to torch: {escape(text)}[/dim]", highlight=False)
    for name, reason in part.left_out.items():
        console.print(f"[dim]{name} left out: {escape(reason)}[/dim]")


def _times(more: float | None, less: float | None) -> str:
    return f" ({more / less:.2f}x)" if more and less else ""


_RULE = {"bfloat16": f" ({BOUND_BFLOAT16} times what torch's own is off from float32)"}


_SHARES = f"""\
replaced: what flagops' kernels computed, of the calls of those operators that flagops replaces, of all calls that
compute something (views do not), and of the time that all operators take on the CPU; these two for the prompt and
{MEASURED - 1} more token, but for backends that are slow here"""


class Progress:
    """Steps on standard error: a bar on a terminal, else one plain line each."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    @contextmanager
    def step(self, label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        if self.quiet:
            yield lambda: None
        elif not sys.stderr.isatty():
            print(f"{label} ...", file=sys.stderr, flush=True)
            yield lambda: None
        else:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = [SpinnerColumn(), TextColumn("{task.description}")]
            columns += [BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()] if total else []
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(label, total=total)
                yield lambda: bar.advance(task)
