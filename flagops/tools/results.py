"""What `flagops bench` leaves behind: JSON that pytest-benchmark reads, Markdown, a chart; its page is `tools.page`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import TYPE_CHECKING, Any

from flagops import tables
from flagops.tools import measure

if TYPE_CHECKING:
    from flagops.tools.measure import Roofline, Row


HEAD = ("workload", "dtype", "by", "time", "spread", "GB/s", "GFLOP/s", "roofline", "x baseline", "extra", "match")


def cells(row: Row, roofline: Roofline) -> list[str]:
    """A row of the table; a result that was wrong or refused shows why in place of a speed."""
    head = [row.workload, row.dtype, row.name]
    if not row.times:
        return [*head, "WRONG" if row.wrong else "-", *[""] * 6, row.problem.strip().rpartition("\n")[2].strip()]
    low, high = row.spread
    several = len(row.ratios) > 1
    return [
        *head,
        seconds(row.median),
        f"{(high - low) / row.median:.0%}{' ~' if row.disturbed else ''}",
        f"{row.bytes / row.median / 1e9:.1f}",
        f"{row.flops / row.median / 1e9:.1f}",
        f"{roofline.share(row):.0%}{' !' if roofline.exceeded(row) else ''}",
        "\n".join(f"{ratio:.2f} {name if several else ''}".strip() for name, ratio in row.ratios.items()),
        f"{row.memory / 2**20:.0f} MiB" if row.memory is not None else "?",
        f"{row.match}; {row.differs}" if row.differs else row.match,
    ]


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def write_json(path: Path, rows: Iterable[Row], roofline: Roofline, about: Mapping[str, Any]) -> None:
    """Every number of a run as ``pytest-benchmark compare`` reads it; what has no time stands under ``not_timed``.

    about: what else is said of the run, as the versions of its baselines.
    """
    timed: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for row in rows:
        name = f"{row.operator}[{row.workload}-{row.dtype}-{row.name}]"
        entry: dict[str, Any] = {
            "group": f"{row.operator} {row.workload} {row.dtype}",
            "name": name,
            "fullname": f"flagops bench::{name}",
            "params": {"workload": row.workload, "dtype": row.dtype, "by": row.name},
            "param": f"{row.workload}-{row.dtype}-{row.name}",
            "extra_info": {
                "operator": row.operator,
                "baseline": row.baseline,
                "match": row.match,
                "wrong": row.wrong,
                "problem": row.problem,
                "differs": row.differs,
                "flops": row.flops,
                "bytes": row.bytes,
                "ratio": row.ratio,
                "ratios": row.ratios,
                "extra_memory": row.memory,
                "disturbed": bool(row.times) and row.disturbed,
                "of_roofline": roofline.share(row) if row.times else None,
            },
        }
        if row.times:
            entry |= {"options": {"timer": "perf_counter", "warmup": True}, "stats": _statistics(row.times)}
        (timed if row.times else others).append(entry)
    found = measure.machine()
    result = {
        "machine_info": found,
        "commit_info": {},
        "roofline": {
            "bytes_per_second": roofline.bandwidth, "float32_flops": roofline.matmul,
            "bfloat16_flops": roofline.half, "int8_operations": roofline.int8,
        },
        "about": dict(about),
        "benchmarks": timed,
        "not_timed": others,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": found["flagops"],
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")


def _statistics(times: list[float]) -> dict[str, Any]:
    """The fields of pytest-benchmark, their meaning as there; ``data`` has the seconds of each round."""
    ordered, middle = sorted(times), mean(times)
    q1, median, q3 = quantiles(times, n=4) if len(times) > 1 else times * 3
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    apart = stdev(times) if len(times) > 1 else 0.0
    beyond = sum(abs(t - middle) > apart for t in times), sum(not low <= t <= high for t in times)
    return {
        "min": ordered[0], "max": ordered[-1], "mean": middle, "stddev": apart, "rounds": len(times), "iterations": 1,
        "median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "ops": 1 / middle, "total": sum(times),
        "stddev_outliers": beyond[0], "iqr_outliers": beyond[1], "outliers": f"{beyond[0]};{beyond[1]}",
        "ld15iqr": min(t for t in ordered if t >= low), "hd15iqr": max(t for t in ordered if t <= high), "data": times,
    }  # fmt: skip


def write_markdown(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]], note: str) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in measure.machine().items())
    path.write_text(f"{facts}\n\n{note}\n\n{tables.markdown(head, rows)}\n")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """The ratios to the baseline, one bar a workload and backend; raises ValueError where there are none."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [row for row in rows if row.ratio is not None and not row.baseline][::-1]
    if not shown:
        raise ValueError(f"nothing to plot in {path}: no row has a baseline (they lie in a checkout's benchmarks/)")
    baselines = {f"{row.operator} {row.workload}": row.name for row in reversed(rows) if row.baseline}
    figure = Figure(figsize=(10, 1.6 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    names = sorted({row.name for row in shown})
    for i, row in enumerate(shown):
        axes.barh(i, row.ratio or 0.0, color=f"C{names.index(row.name)}")
    labels = [f"{row.operator} {row.workload} {row.dtype}" for row in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ratios = [row.ratio or 1.0 for row in shown]
    low, high = min(0.5, *ratios) / 1.2, max(2.0, *ratios) * 1.2
    axes.set_xlim(low, high)
    steps = [t * 10.0**e for e in range(-6, 7) for t in ((1, 2, 5) if high / low < 100 else (1,))]
    axes.set_xticks([t for t in steps if low <= t <= high], [f"{t:g}" for t in steps if low <= t <= high])
    axes.minorticks_off()
    yardsticks = sorted(set(baselines.values()))
    axes.set_xlabel(f"times as fast as the baseline ({', '.join(yardsticks)}), which is 1")
    operators = sorted({row.operator for row in shown})
    figure.suptitle(f"{operators[0] if len(operators) == 1 else f'{len(operators)} operators'} of flagops, by backend")
    handles = [Patch(color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path)
