"""``flagops bench --html``: a run as one page that needs nothing else: machine, ratios, roofline, every row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from flagops.tools import measure, results

if TYPE_CHECKING:
    from flagops.tools.measure import Roofline, Row

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #6b6b70; --rule: #d9d9de; --paper: #ffffff;
  --s0: #2f6fd0; --s1: #c8501e; --s2: #1c8a5a; --s3: #8a4fbf; --s4: #a8791a; --s5: #b83a72; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --faint: #a0a0a8; --rule: #3c3c42; --paper: #17171a;
  --s0: #6ea8ff; --s1: #ff9a66; --s2: #5fd0a0; --s3: #c59bf5; --s4: #e3bb55; --s5: #f58ab8; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.machine { display: grid; grid-template-columns: max-content 1fr max-content 1fr; gap: .2rem 1rem; margin: 0; }
.machine dt { color: var(--faint); } .machine dd { margin: 0; }
.scroll { overflow-x: auto; } .scroll td, .scroll th { white-space: nowrap; }
@media (max-width: 40rem) { .machine { grid-template-columns: max-content 1fr; } }
p.note { color: var(--faint); max-width: 50rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .faint { fill: var(--faint); } svg .rule { stroke: var(--rule); } svg .line { stroke: var(--ink); fill: none; }
.key { display: inline-block; margin-right: 1.2rem; } .key svg { width: 12px; height: 12px; vertical-align: -1px; }
"""
SERIES = 6
WIDTH = 900


def write(path: Path, rows: Sequence[Row], roofline: Roofline, versions: Mapping[str, str]) -> None:
    """The page of a run; a workload that was not timed stands in the table alone, with its reason."""
    timed = [row for row in rows if row.times]
    whose = list(dict.fromkeys(_whose(row) for row in timed))
    colours = {who: f"var(--s{i % SERIES})" for i, who in enumerate(whose)}
    keys = "".join(
        f'<span class="key"><svg viewBox="-6 -6 12 12">{_dot(0, 0, colours[who], who[1], "")}</svg>'
        f" {escape(who[0])}</span>"
        for who in whose
    )
    facts = {**measure.machine(), **versions, "measured": datetime.now(UTC).isoformat(timespec="minutes")}
    machine = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    head = "".join(f"<th>{escape(word)}</th>" for word in ("operator", *results.HEAD))
    body = "".join(_line([row.operator, *results.cells(row, roofline)]) for row in rows)
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>flagops bench</title><style>{STYLE}</style>",
        f"<h1>flagops bench: {escape(_subject(rows))}</h1>",
        f'<dl class="machine">{machine}</dl>',
        '<h2>Times as fast as a baseline</h2><p class="note">The median over rounds of two times taken side by side, '
        "on inputs that take turns beyond the caches; right of the line flagops is faster.</p>",
        _bars(timed, colours),
        f'<h2>Roofline</h2><p class="note">What this machine was measured to reach in the same run: {roofline}. '
        "Filled points are flagops, hollow ones baselines.</p>",
        _roofline(timed, roofline, colours),
        f"<p>{keys}</p>",
        '<h2>Every row</h2><p class="note">A result outside its bound has no time. ~ marks times that spread widely, '
        "! a speed above the roofline, which no speed can be.</p>",
        f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div></html>\n',
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _whose(row: Row) -> tuple[str, bool]:
    """Who computes a row, and whether that is a baseline: all of one project's kernels have one colour."""
    return (row.name.split()[0] if row.baseline else row.name), row.baseline


def _subject(rows: Sequence[Row]) -> str:
    operators = dict.fromkeys(row.operator for row in rows)
    return next(iter(operators)) if len(operators) == 1 else f"{len(operators)} operators"


def _line(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>".replace("\n", "<br>") for cell in cells) + "</tr>"


def _dot(x: float, y: float, colour: str, hollow: bool, title: str) -> str:
    fill = "var(--paper)" if hollow else colour
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2">'
        f"<title>{escape(title)}</title></circle>"
    )


class Scale:
    """A logarithmic axis from the least to the greatest of some values, onto pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, room: float = 1.5) -> None:
        self.low, self.high = min(values) / room, max(values) * room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers along it, the fewer the longer it is."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = (1, 2, 5) if self.high / self.low < 200 else (1,)
        return [t * 10.0**e for e in decades for t in every if self.low <= t * 10.0**e <= self.high]


def _bars(rows: Sequence[Row], colours: Mapping[tuple[str, bool], str]) -> str:
    """A group for each workload, in it a bar for each of ours and each baseline."""
    shown = [(row, name, ratio) for row in rows if not row.baseline for name, ratio in row.ratios.items()]
    if not shown:
        return "<p>No row has a baseline.</p>"
    scale = Scale([0.5, 2.0, *(ratio for *_, ratio in shown)], 290, WIDTH - 300, 1.1)
    drawn, y, before = [], 8.0, ""
    for row, name, ratio in shown:
        label = f"{row.operator} {row.workload} {row.dtype}"
        if label != before:
            y += 8
            drawn.append(f'<text x="282" y="{y + 11:.0f}" text-anchor="end">{escape(label)}</text>')
            before = label
        left, right = sorted((scale(1), scale(ratio)))
        title = f"{label}: {row.name} {ratio:.2f} times as fast as {name}"
        drawn.append(
            f'<rect x="{left:.1f}" y="{y:.0f}" width="{max(right - left, 1):.1f}" height="13" rx="2" '
            f'fill="{colours[_whose(row)]}"><title>{escape(title)}</title></rect>'
            f'<text x="{right + 6:.1f}" y="{y + 11:.0f}">{ratio:.2f}'
            f'<tspan class="faint"> {escape(row.name)} to {escape(name)}</tspan></text>'
        )
        y += 17
    ticks = "".join(
        f'<line class="{"line" if tick == 1 else "rule"}" x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" y1="8" '
        f'y2="{y:.0f}"/><text class="faint" x="{scale(tick):.1f}" y="{y + 16:.0f}" text-anchor="middle">{tick:g}</text>'
        for tick in scale.ticks()
    )
    return f'<svg viewBox="0 0 {WIDTH} {y + 24:.0f}" role="img" aria-label="ratios">{ticks}{"".join(drawn)}</svg>'


def _roofline(rows: Sequence[Row], roofline: Roofline, colours: Mapping[tuple[str, bool], str]) -> str:
    """Operations a second over operations a byte, both logarithmic, below the roofs that were measured."""
    points = [(row, row.flops / row.bytes, row.flops / row.median) for row in rows if row.flops and row.bytes]
    if not points:
        return "<p>Nothing here multiplies.</p>"
    peaks = {"float32": roofline.matmul, "bfloat16": roofline.half, "int8": roofline.int8}
    if not any(row.operator.startswith("int8") for row, *_ in points):
        del peaks["int8"]
    peaks = {name: peak for name, peak in peaks.items() if peak}
    top = max(peaks.values())
    x = Scale([*(i for _, i, _ in points), top / roofline.bandwidth * 2], 60, WIDTH - 20)
    y = Scale([*(speed for *_, speed in points), top], 360, 12)
    drawn = [
        f'<line class="rule" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="12" y2="360"/>'
        f'<text class="faint" x="{x(t):.1f}" y="376" text-anchor="middle">{t:g}</text>'
        for t in x.ticks()
    ] + [
        f'<line class="rule" x1="60" x2="{WIDTH - 20}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="faint" x="54" y="{y(t) + 4:.1f}" text-anchor="end">{t / 1e9:g}</text>'
        for t in y.ticks()
    ]
    first = max(x.low, y.low / roofline.bandwidth)
    for name, peak in peaks.items():
        knee = max(peak / roofline.bandwidth, x.low)
        path = f"M{x(first):.1f} {y(first * roofline.bandwidth):.1f} " if knee > first else ""
        path += f"{'L' if path else 'M'}{x(knee):.1f} {y(peak):.1f} L{x(x.high):.1f} {y(peak):.1f}"
        drawn.append(f'<path class="line" stroke-width="1.5" d="{path}"/>')
        drawn.append(f'<text x="{WIDTH - 24}" y="{y(peak) - 5:.1f}" text-anchor="end">{name}, {peak / 1e9:.0f}</text>')
    for row, intensity, speed in points:
        title = f"{row.operator} {row.workload} on {row.name}: {speed / 1e9:.1f} GFLOP/s, {results.seconds(row.median)}"
        drawn.append(_dot(x(intensity), y(speed), colours[_whose(row)], row.baseline, title))
    drawn.append(f'<text class="faint" x="{WIDTH - 20}" y="394" text-anchor="end">operations a byte</text>')
    drawn.append('<text class="faint" x="60" y="394">10^9 operations a second, upwards</text>')
    return f'<svg viewBox="0 0 {WIDTH} 400" role="img" aria-label="roofline">{"".join(drawn)}</svg>'
