"""What the samples of PyTorch's OpInfos gave, by overload, and the file of it that several runs make together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import strangers_results

from flagops import tables
from flagops.override.forms import forms
from flagops.override.lowering import LOWERINGS

SHOWN = 3  # failures and reasons of an overload in the table
VERDICTS = ("strict", "basic", "kept", "failed", "untested")


@dataclass
class Tally:
    """What the samples of one overload gave."""

    ours: int = 0
    left: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    failed: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        self.failures += 1
        self.failed = [*self.failed, text][:SHOWN]

    def add(self, other: dict[str, Any]) -> None:
        self.ours += other["ours"]
        self.left.update(other["left"])
        self.failures += other["failures"]
        self.failed = [*self.failed, *other["failed"]][:SHOWN]

    def verdict(self, kept: bool) -> str:
        if self.failures:
            return "failed"
        if self.ours:
            return "basic" if self.left else "strict"
        return "kept" if kept else "untested"


def summed(units: dict[str, Any], reaching: dict[str, list[str]], ops: list[str]) -> dict[str, Tally]:
    """By overload, what the units (an OpInfo and a dtype) gave; the end of a process counts against all it reaches."""
    tallies = {overload: Tally() for name in ops for overload in forms(name)}
    for unit, answer in units.items():
        name, dtype = unit.rsplit(" ", 1)
        for overload, found in answer.get("overloads", {}).items():
            tallies.setdefault(overload, Tally()).add(found)
        for op in reaching[name] if "crash" in answer else ():
            for overload in forms(op) if op in ops else ():
                tallies[overload].fail(f"{name}, {dtype}: the process {answer['crash']}")
    return tallies


def report(facts: dict[str, Any], tallies: dict[str, Tally], units: dict[str, Any]) -> dict[str, Any]:
    """What one run found, of which `facts` say when, where and of how many samples.

    On a device of torch's own an operator that draws numbers is kept: a program's seed gives torch's.
    """
    torchs = facts["device"] in ("cpu", "cuda")
    kept = {overload for name, lowering in LOWERINGS.items() if lowering.random and torchs for overload in forms(name)}
    answers = units.values()
    run = facts | {
        "units": len(units),
        "checks": sum(answer["checks"] for answer in answers),
        "unstable": sum(answer["unstable"] for answer in answers),
        "torch dies": {unit: answer["torch"] for unit, answer in units.items() if "torch" in answer},
        "stray": [text for answer in answers for text in answer.get("stray", ())],
    }
    rows = {
        overload: {"verdict": tally.verdict(overload in kept), **vars(tally), "run": facts["when"]}
        for overload, tally in tallies.items()
    }
    return {"runs": {facts["when"]: run}, "overloads": rows}


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A file with the rows of a run in place of those that it had; runs without a row are forgotten, and so are rows
    of what is replaced no longer, and of another device or backend than the new ones'. What a run that did not end has
    not reached yet keeps the row that it had."""
    (new,) = now["runs"].values()
    alike = {
        when: run
        for when, run in before.get("runs", {}).items()
        if all(run[word] == new[word] for word in ("device", "backend"))
    }
    known = {overload for name in LOWERINGS for overload in forms(name)}
    old = {name: row for name, row in before.get("overloads", {}).items() if name in known and row.get("run") in alike}
    whole = new["units"] >= new["wanted"]
    made = {x: row for x, row in now["overloads"].items() if whole or x not in old or row["verdict"] != "untested"}
    rows = dict(sorted((old | made).items()))
    has = {row["run"] for row in rows.values()}
    verdicts = Counter(row["verdict"] for row in rows.values())
    return {
        "verdicts": {word: verdicts[word] for word in VERDICTS if verdicts[word]},
        "runs": {when: run for when, run in (alike | now["runs"]).items() if when in has},
        "overloads": rows,
    }


def written(path: Path, now: dict[str, Any]) -> None:
    """Join a run to the file at `path`, and write the table of it in Markdown beside that."""
    found = joined(json.loads(path.read_text()) if path.exists() else {}, now)
    path.write_text(json.dumps(found, indent=1) + "\n")
    shown(path)


def shown(path: Path) -> None:
    """Write the table of the file at `path` beside it, and below what other judges have kept in its folder."""
    if not path.exists():  # a run that is kept elsewhere
        return
    lines = [*_text(json.loads(path.read_text())), *strangers_results.text(path.parent)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _samples(run: dict[str, Any]) -> str:
    most, seed = run["samples"], run.get("seed")
    return "all" if most is None else f"the first {most}" if seed is None else f"{most} drawn by seed {seed}"


def _text(found: dict[str, Any]) -> Iterable[str]:
    runs = list(found["runs"].values())
    totals = ", ".join(f"{found['verdicts'].get(word, 0)} {word}" for word in VERDICTS)
    where = f"{runs[0]['device']} under `enable(backend={runs[0]['backend']!r})`"
    yield f"PyTorch's samples (OpInfo) on {where}: {totals}."
    yield f"Again: `python tests/opinfo_judge.py --device {runs[0]['device']} --backend {runs[0]['backend']}`, whose"
    yield "text says what is checked and what the verdicts mean. A row is of one of these runs:"
    yield ""
    heads = ("run", "samples of an OpInfo", "OpInfos and dtypes", "checks", "torch gave two answers",
             "differed where none was ours", "torch alone dies of what these write", "where")  # fmt: skip
    yield tables.markdown(
        heads,
        [
            (
                run["when"],
                _samples(run),
                f"{run['units']} of {run['wanted']}",
                run["checks"],
                run["unstable"],
                len(run["stray"]),
                ", ".join(run["torch dies"]),
                f"torch {run['torch']}, {run['cpu']}",
            )
            for run in runs
        ],
    )
    yield ""
    rows = []
    for overload, row in found["overloads"].items():
        why = [f"{n} {reason}" for reason, n in Counter(row["left"]).most_common(SHOWN)] + row["failed"]
        numbers = row["ours"], sum(row["left"].values()), row["failures"]
        rows.append((f"`{overload}`", row["verdict"], *numbers, row["run"], "\n".join(why).replace("|", "\\|")))
    yield tables.markdown(("overload", "verdict", "ours", "left to torch", "wrong", "run", "reasons"), rows)
