"""`flagops bench`: backends at the named workloads, next to what people run today. A wrong result gets no speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, quantiles, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flagops import tables
from flagops.errors import Unsupported, suggestion

if TYPE_CHECKING:
    from flagops.operator import Operator
    from flagops.tools.measure import Call, Roofline, Row, Settings

NO_BF16 = "AVX512_CORE_VNNI"
"""The newest instructions without bfloat16 units, as oneDNN names them."""
QUICK = 5e9
"""Floating-point operations of the largest workload that ``--quick`` keeps."""


def run(argv: Sequence[str]) -> int:
    """The command; returns 1 if any result was wrong or any target missed."""
    options = _parser().parse_args(argv)
    if options.no_native_bf16:
        if "torch" in sys.modules:
            raise ValueError("--no-native-bf16 must be set before torch is loaded: run `flagops bench` by itself")
        os.environ["ONEDNN_MAX_CPU_ISA"] = NO_BF16
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("flagops bench compares with torch, which is not installed (pip install torch)")
    import torch

    from flagops.tools import measure

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = measure.Settings(device=device)
    if options.quick:
        settings = measure.Settings(seconds=0.2, rounds=3, most=20, device=device)
    tables.show("", ("", ""), measure.machine().items())
    if options.targets:
        return _targets(options, settings)
    return _bench(options, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flagops bench", description=__doc__)
    add = parser.add_argument
    add("operators", nargs="*", metavar="OP", help="operators, or aten or a family of it; those of models if none")
    add("--backend", action="append", metavar="B", help="a backend to run, may be repeated; default: all that are fast")
    add("--workload", metavar="W", help="the workload W, or all whose names contain it")
    add("--dtype", metavar="D", help="run the workloads in this dtype instead of their own")
    add("--device", metavar="DEV", help="cpu or a torch device type; default: a GPU if there is one")
    add("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    add("--quick", action="store_true", help=f"short timings, no workload above {QUICK:.0e} operations")
    add("--no-native-bf16", action="store_true", help=f"torch as on a CPU without bfloat16 units ({NO_BF16})")
    add("--json", type=Path, metavar="FILE", help="write every number, with the fields of pytest-benchmark")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="FILE.svg", help="write the ratios as a chart (needs matplotlib)")
    add("--targets", action="store_true", help="measure the promised speeds instead and say which were reached")
    return parser


def companion(name: str) -> ModuleType | None:
    """A module of the checkout's ``benchmarks/``; None where flagops is installed without it."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    full = f"flagops_benchmarks_{name}"
    if full not in sys.modules:
        if not path.is_file():
            return None
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def baselines(op: Operator) -> dict[str, Call]:
    """The yardsticks of an operator; none outside a checkout."""
    module = companion("aten_baselines" if op.aten else "baselines")
    return dict(module.BASELINES.get(op.name, {})) if module else {}


def _selected(options: argparse.Namespace) -> list[tuple[Operator, list[str]]]:
    from flagops import registry, testing

    chosen = []
    for op in registry.named(options.operators) or registry.operators().values():
        names = [options.workload] if options.workload in op.workloads else [*op.workloads]
        names = [name for name in names if options.workload is None or options.workload in name]
        if options.quick:
            names = [n for n in names if op.flops(dict((c := testing.workload(op, n)).dims), c.batch) <= QUICK]
        if names:
            chosen.append((op, names))
    if not chosen:
        known = {name for op in registry.cards().values() for name in op.workloads}
        raise ValueError(f"no workload contains {options.workload!r}{suggestion(str(options.workload), known)}")
    return chosen


HEAD = ("workload", "dtype", "by", "time", "spread", "GB/s", "GFLOP/s", "roofline", "x baseline", "extra", "match")


def _bench(options: argparse.Namespace, settings: Settings) -> int:
    from flagops.tools import measure

    selected = _selected(options)
    backends = options.backend or measure.usable(settings.device)
    progress("roofline")
    roofline = measure.roofline(settings)
    print(f"roofline: copy {roofline.copy / 1e9:.1f} GB/s, float32 2048^3 {roofline.matmul / 1e9:.0f} GFLOP/s")
    rows: list[Row] = []
    for op, names in selected:
        shown = len(rows)
        for name in names:
            progress(f"{op.name} {name}")
            try:
                trial = measure.prepare(op, name, settings.device, options.dtype)
            except Unsupported as reason:
                print(reason)
                break
            rows += measure.compare(trial, measure.candidates(op, backends), baselines(op), settings)
        if rows[shown:]:
            tables.show(op.name, HEAD, [cells(row, roofline) for row in rows[shown:]])
    if options.json:
        write_json(options.json, rows, roofline)
    if options.markdown:
        write_markdown(options.markdown, HEAD, [cells(row, roofline) for row in rows], str(roofline))
    if options.plot:
        plot(options.plot, rows)
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"WRONG: {row.operator} {row.workload} on {row.name}: {row.problem}")
    return 1 if wrong else 0


def progress(text: str) -> None:
    """What is being measured, on a terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


def cells(row: Row, roofline: Roofline) -> list[str]:
    """A row of the table; a result that was wrong or refused shows why in place of a speed."""
    head = [row.workload, row.dtype, row.name]
    if not row.times:
        return [*head, "WRONG" if row.wrong else "-", *[""] * 6, row.problem.strip().rpartition("\n")[2].strip()]
    low, high = row.spread
    return [
        *head,
        seconds(row.median),
        f"{(high - low) / row.median:.0%}",
        f"{row.bytes / row.median / 1e9:.1f}",
        f"{row.flops / row.median / 1e9:.1f}",
        f"{roofline.share(row):.0%}",
        f"{row.ratio:.2f}" if row.ratio else "",
        f"{row.memory / 2**20:.0f} MiB" if row.memory is not None else "?",
        row.match,
    ]


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def write_json(path: Path, rows: Iterable[Row], roofline: Roofline) -> None:
    """Every number of a run, in the fields that pytest-benchmark writes; `data` holds the raw times."""
    from flagops.tools import measure

    benchmarks = []
    for row in rows:
        entry: dict[str, Any] = {
            "group": row.operator,
            "name": f"{row.operator}[{row.workload}-{row.dtype}-{row.name}]",
            "fullname": f"flagops bench::{row.operator}[{row.workload}-{row.dtype}-{row.name}]",
            "params": {"workload": row.workload, "dtype": row.dtype, "by": row.name},
            "stats": None,
            "extra_info": {
                "baseline": row.baseline,
                "match": row.match,
                "wrong": row.wrong,
                "problem": row.problem,
                "flops": row.flops,
                "bytes": row.bytes,
                "ratio": row.ratio,
                "extra_memory": row.memory,
                "of_roofline": roofline.share(row) if row.times else None,
            },
        }
        if row.times:
            first, middle, third = quantiles(row.times, n=4) if len(row.times) > 1 else row.times * 3
            entry["stats"] = {
                "min": min(row.times), "max": max(row.times), "mean": mean(row.times), "median": middle,
                "stddev": stdev(row.times) if len(row.times) > 1 else 0.0, "rounds": len(row.times),
                "q1": first, "q3": third, "iqr": third - first, "ops": 1 / mean(row.times), "data": row.times,
            }  # fmt: skip
        benchmarks.append(entry)
    found = measure.machine()
    result = {
        "machine_info": found,
        "roofline": {"copy_bytes_per_second": roofline.copy, "float32_flops": roofline.matmul},
        "benchmarks": benchmarks,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": found["flagops"],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_markdown(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]], note: str) -> None:
    from flagops.tools import measure

    facts = ", ".join(f"{name} {value}" for name, value in measure.machine().items())
    path.write_text(f"{facts}\n\n{note}\n\n{tables.markdown(head, rows)}\n")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """The ratios to the baseline, one bar a workload and backend."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib (pip install flagops[bench])")
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ratio is not None and not row.baseline][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(sorted({row.name for row in shown}))}
    for i, row in enumerate(shown):
        axes.barh(i, row.ratio or 0.0, color=colours[row.name])
    axes.set_yticks(range(len(shown)), [f"{r.operator} {r.workload} {r.name}" for r in shown], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the baseline")
    figure.savefig(path)


def _targets(options: argparse.Namespace, settings: Settings) -> int:
    module = companion("targets")
    if module is None:
        raise ModuleNotFoundError("--targets needs a checkout: targets and baselines lie in its benchmarks/ folder")
    return int(module.run(settings, options.json, options.markdown))
