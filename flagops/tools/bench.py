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

from flagops import contract, registry, tables
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
    device = contract.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    selected = [] if options.targets or options.roofline else _selected(options)
    for name in options.backend or ():
        registry.backend(name)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib (pip install flagops[bench])")
    settings = measure.Settings(device=device)
    if options.quick:
        settings = measure.Settings(seconds=0.2, rounds=3, most=20, device=device)
    tables.show("", ("", ""), measure.machine().items())
    if options.targets:
        return _targets(options, settings)
    if options.roofline:
        return _roofline(options, settings)
    return _bench(options, settings, selected)


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(prog="flagops bench", description=__doc__)
    add = parser.add_argument
    add("operators", nargs="*", metavar="OP", help="operators, or aten or a family of it; those of models if none")
    add("--backend", action="append", metavar="B", help="a backend to run, may be repeated; default: all that are fast")
    add("--workload", metavar="W", help="the workload W, or all whose names contain it")
    add("--dtype", metavar="D", help="run the workloads in this dtype instead of their own")
    add("--device", metavar="DEV", help="cpu or a torch device type; default: a GPU if there is one")
    add("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    add("--quick", action="store_true", help=f"short timings, no workload above {QUICK:.0e} operations")
    add("--no-native-bf16", action="store_true", help=f"torch as on a CPU without bfloat16 units ({NO_BF16})")
    add("--json", type=contract.output, metavar="FILE", help="write every number, with the fields of pytest-benchmark")
    add("--markdown", type=contract.output, metavar="FILE", help="write the tables")
    add("--plot", type=contract.output, metavar="FILE.svg", help="write the ratios as a chart (needs matplotlib)")
    add("--targets", action="store_true", help="measure the promised speeds instead and say which were reached")
    add("--roofline", action="store_true", help="measure instead what this machine reads and multiplies: flagops plan")
    add("--disk", type=contract.present, metavar="PATH", help="with --roofline: read this file, or the largest in it")
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
    from flagops import testing

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


def _bench(options: argparse.Namespace, settings: Settings, selected: Sequence[tuple[Operator, list[str]]]) -> int:
    from flagops.tools import measure

    backends = options.backend or measure.usable(settings.device)
    rows: list[Row] = []
    with contract.Progress(1 + sum(len(names) for _, names in selected)) as begin:
        begin("roofline")
        roofline = measure.roofline(settings)
        print(f"roofline: {roofline}")
        for op, names in selected:
            shown = len(rows)
            for name in names:
                begin(f"{op.name} {name}")
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
    noisy = [row for row in rows if row.times and row.disturbed]
    if noisy:
        print(
            f"DISTURBED: the times of {len(noisy)} of {len(rows)} rows (marked ~) spread over more than "
            f"{measure.SPREAD:.0%} of their median: other programs ran; believe no smaller difference"
        )
    beyond = [row for row in rows if row.times and roofline.share(row) > 1]
    if beyond:
        print(
            f"WRONG ROOFLINE: {len(beyond)} rows (marked !) were faster than what this machine was measured to reach; "
            "it was disturbed while that was measured, or their data stayed in caches: their shares mean nothing"
        )
    if not any(row.times for row in rows):
        print("NOTHING MEASURED: no backend ran any of these workloads")
        return 1
    return 1 if wrong or beyond else 0


def cells(row: Row, roofline: Roofline) -> list[str]:
    """A row of the table; a result that was wrong or refused shows why in place of a speed."""
    head = [row.workload, row.dtype, row.name]
    if not row.times:
        return [*head, "WRONG" if row.wrong else "-", *[""] * 6, row.problem.strip().rpartition("\n")[2].strip()]
    low, high = row.spread
    return [
        *head,
        seconds(row.median),
        f"{(high - low) / row.median:.0%}{' ~' if row.disturbed else ''}",
        f"{row.bytes / row.median / 1e9:.1f}",
        f"{row.flops / row.median / 1e9:.1f}",
        f"{roofline.share(row):.0%}{' !' if roofline.share(row) > 1 else ''}",
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
                "disturbed": bool(row.times) and row.disturbed,
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
        "roofline": {"bytes_per_second": roofline.bandwidth, "float32_flops": roofline.matmul},
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


def _roofline(options: argparse.Namespace, settings: Settings) -> int:
    from flagops.plan import machine
    from flagops.tools import measure, roofline

    found = roofline.machine(settings, options.disk)
    tables.show(found.name, ("figure", "measured", "of"), machine.described(found))
    if options.json:
        said = {"machine_info": measure.machine(), "roofline": machine.written(found)}
        options.json.write_text(json.dumps(said, indent=1) + "\n")
        print(f"flagops plan --machine {options.json} counts with these")
    return 0


def _targets(options: argparse.Namespace, settings: Settings) -> int:
    module = companion("targets")
    if module is None:
        raise ModuleNotFoundError("--targets needs a checkout: targets and baselines lie in its benchmarks/ folder")
    return int(module.run(settings, options.json, options.markdown))
