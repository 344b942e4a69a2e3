"""What every Triton kernel becomes for every chip, kept and compared: ``make portability``.

    make portability                       compile what changed, for every target; keep the results
    make portability ARGS="--only WORDS"   the programs whose names hold the words; nothing is kept

A program is compiled again when the sources that it is made of, its types, its tile or the compiler are others than in
``results/portability.json``. One that the compiler refuses, that spills, takes more shared memory than there is or
loses its matrix instruction, and did not so before, is an error, and a kernel that is never launched is one.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton_compile import CHIPS, COMMON, TARGETS, Launch, Row, faults, kernels, rows, tried

from flagops import registry
from flagops.tools.contract import Progress

RESULTS = Path(__file__).parent / "results" / "portability.json"
MEASURES = ("key", "registers", "spilled", "shared", "matrix", "halves", "refused")


def sources(family: str) -> set[Path]:
    """The files that say what a family launches: its kernels and what they import, and its references."""
    folder, names = Path(COMMON.__file__).parent, [family]
    found: set[Path] = set()
    while names:
        path = folder / f"{names.pop()}.py"
        if path not in found and path.exists():
            found.add(path)
            names += re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE)
    modules = {op.reference.__module__ for op in registry.cards().values() if op.family == family}
    return found | {Path(str(sys.modules[module].__file__)) for module in modules}


def digests() -> dict[str, str]:
    """Of each family that has Triton kernels: its sources, the measures of the chips, and the compiler."""
    found = {}
    for family in {op.family for op in registry.cards().values() if registry.written(op.name, "triton")}:
        text = hashlib.sha256(repr((triton.__version__, TARGETS)).encode())
        for path in sorted(sources(family)):
            text.update(path.read_bytes())
        found[family] = text.hexdigest()[:12]
    return found


def family(row: Row) -> str:
    return registry.operator(row.label.split()[0]).family


@dataclass
class Record:
    """What is kept: rows, targets that the compiler does not know, and the families of which all rows are there."""

    rows: list[Row]
    rejected: dict[str, str]
    families: dict[str, str]
    left: int = 0
    """How many programs more there are."""

    @classmethod
    def load(cls) -> "Record":
        if not RESULTS.exists():
            return cls([], {}, {})
        kept = json.loads(RESULTS.read_text())
        about = ("kernel", "label", "dtypes", "tile")
        table = [
            Row(**{word: program[word] for word in about}, target=target, **dict(zip(MEASURES, measures, strict=True)))
            for program in kept["programs"]
            for target, measures in program["targets"].items()
        ]
        return cls(table, kept["rejected"], kept["families"], kept["left"])

    def save(self) -> None:
        """A line for each program, with what each target makes of it."""
        programs: dict[Any, dict[str, Any]] = {}
        for row in sorted(self.rows, key=lambda row: row.name):
            about = {"kernel": row.kernel, "label": row.label, "dtypes": row.dtypes, "tile": row.tile}
            program = programs.setdefault(tuple(about.values()), {**about, "targets": {}})
            program["targets"][row.target] = [getattr(row, measure) for measure in MEASURES]
        head = {
            "triton": triton.__version__,
            "left": self.left,
            "rejected": self.rejected,
            "families": dict(sorted(self.families.items())),
        }
        lines = ",\n".join(f"  {json.dumps(program)}" for program in programs.values())
        RESULTS.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "programs": [\n{lines}\n ]\n}}\n')
        RESULTS.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [
            f"By Triton {triton.__version__} without a GPU: `make portability`. The figures are in portability.json.",
            f"{len(self.rows)} programs, each kernel on each target first; {self.left} are left to a next run.",
            "",
            "| target | chip | programs | with matrix instructions | spill | too much shared memory | refused |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        wrong: collections.Counter[Any] = collections.Counter()
        for target in TARGETS:
            chip = CHIPS[target]
            found = [row for row in self.rows if row.target == target]
            wrong.update((target, row.kernel, faults(row)) for row in found if faults(row))
            counts = (
                len(found), sum(row.matrix != "-" for row in found), sum(row.spilled > 0 for row in found),
                sum(row.shared > chip.shared for row in found), sum(bool(row.refused) for row in found),
            )  # fmt: skip
            said = self.rejected.get(target, "")
            lines.append(
                f"| {target} | {chip.name} | " + (said + " | " * 4 if said else " | ".join(map(str, counts))) + " |"
            )
        lines += ["", "| at fault | programs | fault |", "| --- | ---: | --- |"]
        lines += [
            f"| {target} {kernel} | {count} | {fault} |" for (target, kernel, fault), count in sorted(wrong.items())
        ]
        return "\n".join(lines) + "\n"


def breadth_first(todo: list[tuple[Row, Launch]]) -> list[tuple[Row, Launch]]:
    """Every kernel on every target, then in its second dtypes, and so on; then second tiles: a run may be cut short."""
    tiles: collections.Counter[Any] = collections.Counter()
    dtypes: dict[Any, list[str]] = {}
    order = []
    for row, _ in todo:
        seen = dtypes.setdefault((row.target, row.kernel), [])
        seen += [row.dtypes] * (row.dtypes not in seen)
        order.append((tiles[row.target, row.kernel, row.dtypes], seen.index(row.dtypes)))
        tiles[row.target, row.kernel, row.dtypes] += 1
    return [todo[at] for at in sorted(range(len(todo)), key=order.__getitem__)]


_queue: list[tuple[Row, Launch]] = []


def _measured(at: int) -> tuple[int, dict[str, Any]]:
    """In a process that was forked from this one: functions of Triton's cannot be sent."""
    row = tried(*_queue[at])
    return at, {measure: getattr(row, measure) for measure in MEASURES}


def measured(todo: list[tuple[Row, Launch]], jobs: int, until: float) -> Iterator[Row]:
    """Rows as compiled, those that a time allows."""
    _queue[:] = todo
    with multiprocessing.get_context("fork").Pool(jobs) as pool, Progress(len(todo)) as begin:
        for at, measures in pool.imap_unordered(_measured, range(len(todo))):
            row = dataclasses.replace(todo[at][0], **measures)
            begin(row.name)
            yield row
            if time.monotonic() > until:
                pool.terminate()
                return


def trial(todo: list[tuple[Row, Launch]]) -> dict[str, str]:
    """What the compiler has against the first program of each target."""
    first = {row.target: (row, launch) for row, launch in reversed(todo)}
    return {target: tried(*entry).refused for target, entry in first.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART", help="rows whose name holds it; nothing is kept")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of compiling; the rest is left to the next run"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    before = Record.load()
    now = digests()
    stale = {name for name in now if arguments.only or before.families.get(name) != now[name]}
    changed = [op.name for op in registry.cards().values() if op.family in stale]
    kept = {row.at: row for row in before.rows if family(row) in now.keys() - stale}
    known = {} if arguments.only else {(row.target, row.key): row for row in before.rows if not row.refused}
    todo = []
    for row, launch in rows(arguments.only, names=changed) if changed else ():
        if same := known.get((row.target, row.key)):
            kept.setdefault(row.at, dataclasses.replace(same, label=row.label))
        elif row.at not in kept:
            todo.append((row, launch))
    rejected = {target: said for target, said in trial(todo).items() if "unsupported target" in said}
    todo = breadth_first([entry for entry in todo if entry[0].target not in rejected])
    made = []
    for row in measured(todo, arguments.jobs, time.monotonic() + arguments.seconds):
        made.append(row)
        if arguments.only:
            numbers = f"{row.registers} registers, {row.spilled} spilled, {row.shared} shared, {row.matrix}"
            print(f"{row.name}: {numbers} {faults(row)}", flush=True)
    left = {row.at for row, _ in todo} - {row.at for row in made}
    table = [*kept.values(), *made]
    if not arguments.only:
        undone = {family(row) for row, _ in todo if row.at in left}
        Record(table, rejected, {name: now[name] for name in now.keys() - undone}, len(left)).save()
    was = set() if arguments.only else {row.at for row in before.rows if faults(row)}
    worse = [row for row in table if faults(row) and row.at not in was]
    absent = set() if arguments.only or left else kernels() - {row.kernel for row in table}
    for line in [f"never launched: {name}" for name in sorted(absent)] + [
        f"{row.name}: {faults(row)}" for row in worse
    ]:
        print(line)
    print(f"{len(table)} programs, {len(made)} compiled now, {len(left)} left, {len(worse)} newly at fault")
    return bool(worse or absent or left)


if __name__ == "__main__":
    sys.exit(main())
