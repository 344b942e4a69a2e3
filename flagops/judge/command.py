"""``flagops check``: kernels judged in a process of their own, a table of what was found, and a report to keep."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from flagops import __version__, registry, tables
from flagops.tools import contract

from . import mutants
from .session import LEAST_SHARE, Record

PATIENCE = 600
"""Seconds without a word after which a kernel hangs; the first calls of a kernel may compile."""

_LEGEND = (
    "cases: drawn, computed and compared; small calls: of a few cases over and over, for state and seldom errors; ran: "
    "of the drawn cases,\nthose that the backend took; of its bound: the largest error to what is allowed there; time: "
    "by the clock, compiling included"
)


def duration(text: str) -> float:
    """Seconds: ``60s``, ``2m``, ``1.5h``, or a number of seconds. Raises ValueError."""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ValueError(f"expected a time such as 60s, 2m or 1.5h, got {text!r}")
    return seconds


@dataclass
class Outcome:
    """What the workers said."""

    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(args: argparse.Namespace) -> int:
    """Every kernel against its reference, in all the ways in which kernels go wrong."""
    files = [word for word in args.operators if word.endswith(".py")]
    words = [word for word in args.operators if word not in files]
    operators = [op.name for op in registry.named(words)]
    each = bool(words) and registry.cards().keys() >= set(words)  # a group may have operators without a kernel
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
    if files and args.backend:
        raise ValueError("a file of kernels is a backend of its own; leave out --backend")
    outcome = Outcome()
    backends = args.backend or [n for n in registry.backend_names() if registry.backend(n).unavailable() is None]
    usable = []
    for name in backends:
        reason = registry.backend(name).unavailable()
        usable += [] if reason else [name]
        outcome.problems += [f"{name}: {reason}"] if reason else []
    wish = {
        "files": files, "operators": operators, "backends": usable, "replay": args.replay, "examples": args.examples,
        "seconds": duration(args.time), "seed": int(time.time()) if args.seed is None else args.seed,
        "strict": args.strict, "least": LEAST_SHARE if args.least is None else args.least,
    }  # fmt: skip
    if args.mutants:
        if args.report or args.junit or outcome.problems:
            raise ValueError(
                "; ".join(outcome.problems) or "--mutants prints its verdicts: leave out --report and --junit"
            )
        return mutants.check(wish, args.mutants)
    if args.replay:
        wish["operators"] = [_replayed(args.replay)]
    if usable or files:
        with contract.Progress(_expected(wish)) as begin:
            _judge(wish, outcome, bool(args.replay or (each and (args.backend or files))), begin)
    _show(outcome, wish)
    if args.junit:
        args.junit.write_text(junit(outcome, wish))
    if args.report:
        args.report.write_text(json.dumps(report(outcome, wish), indent=1) + "\n")
    wrong = [r for r in outcome.records if r["result"] != "ok"]
    return 1 if wrong or outcome.problems or not outcome.records else 0


def _replayed(text: str) -> str:
    from flagops.cases import parse

    from .session import STAGES

    stage, colon, case = text.partition(": ")
    if not colon or stage not in {s.name for s in STAGES}:
        raise ValueError(f"--replay takes 'STAGE: Case(...)', with a stage of {', '.join(s.name for s in STAGES)}")
    return parse(case).operator


def _expected(wish: dict[str, Any]) -> int:
    """How many kernels are to be judged; of a file of functions it is known once it is loaded."""
    names = wish["operators"] or list(registry.operators())
    if wish["files"]:
        return len(wish["files"]) * max(1, len(wish["operators"]))
    return sum(registry.written(name, b) for b in wish["backends"] for name in names) or 1


def _judge(wish: dict[str, Any], outcome: Outcome, all_wanted: bool, begin: Callable[[str], None]) -> None:
    """Run workers, one after the other where a kernel ends one, until every kernel is judged."""
    absent: dict[str, None] = {}
    while True:
        last: dict[str, Any] = {}
        started = time.monotonic()
        ended = "says nothing any more"
        for message in _worker(wish | {"skip": len(outcome.records)}):
            if "begin" in message:
                last, started = {"operator": message["begin"][0], "backend": message["begin"][1]}, time.monotonic()
                begin("checking {operator} on {backend}".format(**last))
            elif "record" in message:
                outcome.records.append(message["record"])
                last = {}
            elif "absent" in message:
                absent[f"{message['absent'][0]} on {message['absent'][1]}: {message['absent'][2]}"] = None
            elif "faulty" in message:
                outcome.problems += [message["faulty"]] * (message["faulty"] not in outcome.problems)
            elif "failed" in message:
                outcome.problems.append(message["failed"])
                return
            elif "ended" in message:
                ended = message["ended"]
            elif "done" in message:
                outcome.problems += absent if all_wanted else []
                return
            else:
                last |= message
        if not last:
            outcome.problems.append(f"the process that judges ended between kernels: it {ended}")
            return
        record = Record(last["operator"], last["backend"], wish["seed"], "ENDED", seconds=time.monotonic() - started)
        record.finding = (
            f"the kernel ended its process: it {ended}. Inputs are read-only, and all memory ends at pages that "
            "nobody may touch"
        )
        record.stage, record.case = last.get("stage", ""), last.get("case", "")
        outcome.records.append(vars(record))


def _worker(wish: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of one process; how it ended is the last if it did so by itself."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "flagops.judge.worker", json.dumps(wish | {"to": writing})]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        command, pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=2, env=environment, process_group=0
    )
    os.close(writing)
    text = b""
    try:
        while select.select([reading], [], [], PATIENCE)[0]:
            part = os.read(reading, 1 << 16)
            *lines, text = (text + part).split(b"\n")
            yield from map(json.loads, lines)
            if not part:
                code = process.wait(PATIENCE)
                with contextlib.suppress(ValueError):
                    yield {"ended": f"ended with {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"}
                return
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def _show(outcome: Outcome, wish: dict[str, Any]) -> None:
    rows = []
    for r in outcome.records:
        ran, asked = r["ran"].get("all", 0), r["asked"].get("all", 0)
        cases = sum(r["cases"].values())
        worst = max(r["worst"].values(), default=0)
        share = f"{ran / asked:.0%}" if asked else ""
        bound = f"{worst:.2f}" if r["result"] == "ok" else ""  # what is wrong is in no case that was compared
        counts = (cases, r["calls"] or "", share, bound, f"{r['seconds']:.1f} s")
        rows.append((r["operator"], r["backend"], r["result"], *counts))
    columns = ("operator", "backend", "result", "cases", "small calls", "ran", "of its bound", "time")
    if rows:
        tables.show(f"judged, seed {wish['seed']}", columns, rows)
        print(_LEGEND)
    calls = min((r["calls"] for r in outcome.records if r["calls"]), default=0)
    if calls:
        often, seldom = ((1 - 1 / rate) ** calls for rate in (200, 1000))
        print(f"Of errors in 1 small call of 200 a run misses {often:.0e}, in 1 of 1000 {seldom:.0e} (probabilities).")
    for problem in outcome.problems:
        print(problem, file=sys.stderr)
    for r in outcome.records:
        if r["result"] != "ok":
            where = f", {r['stage']}" if r["stage"] else ""
            print(f"{r['result']}: {r['operator']} on {r['backend']}{where}\n{r['finding']}", file=sys.stderr)
            print(f"again: {again(r, wish)}", file=sys.stderr)


def again(record: dict[str, Any], wish: dict[str, Any]) -> str:
    """The command that repeats a finding: of one case where there is one, else of the whole run."""
    where = wish["files"] or ["--backend", record["backend"]]
    if record["case"]:
        one = f"{record['stage']}: {record['case']}".replace("'", '"')  # which a shell leaves alone between quotes
        return shlex.join(["flagops", "check", *where, "--replay", one])
    more = ["--strict"] if wish["strict"] else []
    return shlex.join(["flagops", "check", record["operator"], *where, "--seed", str(wish["seed"]), *more])


def report(outcome: Outcome, wish: dict[str, Any]) -> dict[str, Any]:
    """What a run found, as plain data: the certificate of each kernel."""
    libraries = {}
    for name in ("numpy", "ml_dtypes", "torch", "numba", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    sources = {name: _digest(modules) for name, modules in _homes(outcome).items()}
    for path in wish["files"]:
        sources[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    for record in outcome.records:
        shares = {w: round(record["ran"].get(w, 0) / n, 4) for w, n in sorted(record["asked"].items())}
        missed = {f"1 in {n}": (1 - 1 / n) ** record["calls"] for n in (20, 200, 1000, 10000)}
        record |= {"share that ran": shares, "probability of missing an error of": missed}
    return {
        "flagops": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "libraries": libraries, "devices": {name: registry.backend(name).facts() for name in wish["backends"]},
        "sources": sources, "date": time.strftime("%Y-%m-%d"), "seed": wish["seed"], "seconds": wish["seconds"],
        "kernels": outcome.records, "problems": outcome.problems,
    }  # fmt: skip


def _homes(outcome: Outcome) -> dict[str, set[str]]:
    """The modules in which the judged kernels of each backend lie, and the references that they were held to."""
    homes: dict[str, set[str]] = {}
    for r in outcome.records:
        if r["operator"] in registry.cards():
            homes.setdefault("references", set()).add(registry.operator(r["operator"]).reference.__module__)
            if r["backend"] in registry.backend_names():
                homes.setdefault(r["backend"], set()).add(registry.home(r["operator"], r["backend"]))
    return homes


def _digest(modules: Iterable[str]) -> str:
    """Of the files of modules and of all that lies beside them, which they may share."""
    specs = [importlib.util.find_spec(module) for module in modules if module]
    folders = {Path(spec.origin).parent for spec in specs if spec and spec.origin}
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def junit(outcome: Outcome, wish: dict[str, Any]) -> str:
    """What a run found as the XML that CI services show: a case for each kernel, an error for what was not judged."""
    suite = ElementTree.Element("testsuite", name="flagops check", tests=str(len(outcome.records)))
    for r in outcome.records:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"flagops.{r['backend']}", name=r["operator"], time=f"{r['seconds']:.3f}"
        )
        if r["result"] != "ok":
            failure = ElementTree.SubElement(case, "failure", type=r["result"], message=r["finding"].partition("\n")[0])
            failure.text = f"{r['finding']}\nagain: {again(r, wish)}"
    for problem in outcome.problems:
        case = ElementTree.SubElement(suite, "testcase", classname="flagops", name=problem.partition(":")[0])
        ElementTree.SubElement(case, "error", message=problem)
    cases = {word: len(suite.findall(f"testcase/{word}")) for word in ("failure", "error")}
    suite.attrib |= {"tests": str(len(suite)), "failures": str(cases["failure"]), "errors": str(cases["error"])}
    text = ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
    return "".join(c for c in text if c in "\t\n" or c >= " ") + "\n"  # XML has no other control characters


def certificates(path: Path) -> dict[tuple[str, str], str]:
    """What a report says of each kernel, for a table."""
    kernels: Sequence[dict[str, Any]] = json.loads(path.read_text())["kernels"]
    found = {}
    for r in kernels:
        worst = max(r["worst"].values(), default=0)
        found[r["operator"], r["backend"]] = (
            f"{r['result']}: {sum(r['cases'].values())} cases, {r['calls']} calls, {worst:.2f} of its bound"
        )
    return found
