"""Which wrong kernels the judge catches: ``python tests/judge_table.py`` goes on where the last run of it ended.

Every wrong kernel is judged in as many default runs as ``--runs`` says, each with a seed of its own. Kept are the runs
in which it was caught, in benchmarks/results/judge.json, and a table by kind in judge.md beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "judge.json"
SOURCES = ("flagops/judge/*.py", "flagops/cases.py", "flagops/layouts.py", "tests/wrong_kernels/*.py")
TOGETHER = 16  # kernels judged by one process


def child(names: list[str], seed: int, seconds: float) -> None:
    """Judge some wrong kernels; one line for each, before and after."""
    import warnings

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    from wrong_kernels import kinds as wrong_kernels

    from flagops import dispatch, registry
    from flagops.judge import files
    from flagops.judge.process import Watch
    from flagops.judge.process import names as libraries
    from flagops.judge.session import Session
    from flagops.judge.worker import prepare

    prepare()
    watch = Watch(libraries)
    for name in names:
        kind, operator, backend = name.split()
        print(f"begin {name}", flush=True)
        offered = files.offer_functions(
            f"{backend}{kind}".replace("_", ""), wrong_kernels.make(kind, operator, backend)
        )
        dispatch._plans.clear()
        start = time.monotonic()
        record = Session(registry.operator(operator), offered, seed, guarded=True, libraries=watch).run(seconds)
        found = record.stage or record.result
        said = record.finding.splitlines()[0][:150] if record.finding else ""
        print(f"end {name}\t{record.result}\t{found}\t{time.monotonic() - start:.1f}\t{said}", flush=True)


def digest() -> str:
    text = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            text.update(path.read_bytes())
    return text.hexdigest()[:16]


def judge(names: list[str], seed: int, seconds: float) -> dict[str, list[str]]:
    """Result, stage, seconds and finding of each, from as many processes as they end."""
    found: dict[str, list[str]] = {}
    todo = list(names)
    while todo:
        command = [
            sys.executable,
            str(Path(__file__)),
            "--child",
            *todo,
            "--seed",
            str(seed),
            "--seconds",
            str(seconds),
        ]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=3600)
        for line in done.stdout.splitlines():
            if line.startswith("end "):
                name, *rest = line.removeprefix("end ").split("\t")
                found[name] = rest
            elif line.startswith("begin "):
                last = line.removeprefix("begin ")
        if done.returncode or last not in found:
            if last in found:
                raise SystemExit(done.stderr)
            found[last] = ["ENDED", "process", "0", f"exit code {done.returncode}"]
        todo = [name for name in todo if name not in found]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--kernels", type=int, help="so many of the list, which begins with every kind (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; each run has its own clock")
    parser.add_argument("--again", action="store_true", help="forget what was found by an older judge")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.seed, args.seconds)
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    from wrong_kernels import kinds as wrong_kernels

    names = [" ".join(key) for key in wrong_kernels.every() if args.only in " ".join(key)][: args.kernels]
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.again and kept.get("sources") != digest():
        kept = {}
    runs = kept.setdefault("runs", {})
    kept["sources"] = digest()
    groups = {k: g for k, (g, _, _) in wrong_kernels.KINDS.items()}
    parts = []
    for seed in range(args.seed, args.seed + args.runs):
        todo = [name for name in names if name not in runs.setdefault(str(seed), {})]
        parts += [(seed, todo[at : at + TOGETHER]) for at in range(0, len(todo), TOGETHER)]
    with ThreadPoolExecutor(args.jobs) as pool:
        judged = {pool.submit(judge, part, seed, args.seconds): seed for seed, part in parts}
        for future in as_completed(judged):
            done = runs[str(judged[future])]
            done.update(future.result())
            print(f"seed {judged[future]}: {len(done)} of {len(names)}", flush=True)
            RESULTS.write_text(json.dumps(kept, indent=0) + "\n")
            write(runs, groups)
    missed = sorted({name for done in runs.values() for name, found in done.items() if found[0] == "ok"})
    print(f"{len(names)} wrong kernels, {len(runs)} runs, {len(missed)} missed in any", *missed, sep="\n")
    return 1 if missed else 0


def write(runs: dict[str, dict[str, list[str]]], groups: dict[str, str]) -> None:
    """The table by kind."""
    rows: dict[str, list[list[str]]] = defaultdict(list)
    for done in runs.values():
        for name, found in done.items():
            rows[name.split()[0]].append([name, *found])
    lines = [
        "Wrong kernels that a default run of `flagops check` catches, by kind (`python tests/judge_table.py`).", "",
        "| group | kind | kernels | runs | caught | seconds to the finding (mean) | stages that found it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind, found in sorted(rows.items(), key=lambda item: (groups[item[0]], item[0])):
        caught = [row for row in found if row[1] != "ok"]
        stages = ", ".join(sorted({row[2] for row in caught}))
        mean = sum(float(row[3]) for row in caught) / max(len(caught), 1)
        share = f"{len(caught)}" if len(caught) == len(found) else f"**{len(caught)}**"
        kernels = len({row[0] for row in found})
        lines.append(f"| {groups[kind]} | {kind} | {kernels} | {len(found)} | {share} | {mean:.1f} | {stages} |")
    every = [row for found in rows.values() for row in found]
    names = {row[0] for row in every}
    always = sum(all(done[name][0] != "ok" for done in runs.values() if name in done) for name in names)
    lines += ["", f"{always} of {len(names)} wrong kernels were caught in each of their runs."]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
