"""TorchCTS judges the bare device under flagops: ``python tests/torchcts_judge.py`` (the result: docs/enable.md).

The suite (PyPI's torchcts, made for the conformance of any device) runs in an environment of its own, which borrows all
else, on tests/bare: a device without kernels, under `flagops.enable`, as tests/torchcts_device.py declares it. Each of
its files runs in a process; where one dies or hangs, the test that it was in has failed, and another goes on behind it.

What fails runs again twice without flagops: on torch's CPU, and on the device with torch's own kernels behind it.

    passed    the suite is content
    ours      it fails under flagops alone
    device    it fails on the device with torch's kernels too
    suite     it fails on torch's CPU too
    unclaimed its error names an overload of torch's that flagops does not replace, and so does not claim

Strict is passed in all but `suite` and `unclaimed`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flagops import config
from flagops.override.forms import forms
from flagops.override.lowering import LOWERINGS

sys.path.insert(0, str(Path(__file__).parent))
from all import processor
from opinfo_results import shown
from strangers_results import kept

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results" / "torchcts.json"
VERSION = "0.4.1"
PATIENCE = 600  # seconds without a word
SUITES = (
    *("operators", "generated", "autograd", "rng", "strides", "dtypes", "training", "workloads", "memory"),
    *("device_api", "serialization", "errors", "stress", "opinfo"),
)
KERNELS = {"device": "torch", "suite": "host"}  # who computes where what has failed is tried again


def environment() -> Path:
    """The interpreter of an environment that has the suite, without the torch that it asks for."""
    folder = Path(sys.prefix) / "torchcts" / VERSION
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, symlinks=True, with_pip=False)
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        Path(folder, "lib", name, "site-packages", "borrowed.pth").write_text(
            "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
        )
        install = ("install", "-q", "--no-deps", f"torchcts=={VERSION}")
        subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
        ready.touch()
    return python


class Journal:
    """A file's tests and what they gave, which a process that dies leaves behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def note(self, **what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def dead(self) -> str | None:
        """The test that was begun last, if it did not end."""
        lines = [line for line in self.lines() if "began" in line or "status" in line]
        return lines[-1]["began"] if lines and "began" in lines[-1] else None

    def answers(self) -> dict[str, dict[str, Any]]:
        return {line["node"]: line for line in self.lines() if "status" in line}


class Suite:
    """The suite's files, each run by processes one after another."""

    def __init__(self, python: Path, options: argparse.Namespace) -> None:
        self.python, self.options = python, options
        found = subprocess.run(
            [python, "-c", "import torchcts; print(*torchcts.__path__)"], text=True, capture_output=True, check=True
        )
        self.room = Path(found.stdout.strip())
        self.work = Path(config.cache_folder()) / "torchcts" / f"level-{options.level}"
        self.until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "manifest.py").write_text("from torchcts_device import manifest\n")

    def files(self) -> list[str]:
        found = [
            str(path.relative_to(self.room))
            for suite in SUITES
            for path in sorted((self.room / suite).glob("test_*.py"))
        ]
        return [file for file in found if any(part in file for part in self.options.only or [""])]

    def journal(self, kernels: str, file: str) -> Journal:
        return Journal(self.work / kernels / f"{file.replace('/', '-')}.jsonl")

    def judge(self, kernels: str, file: str, only: set[str] | None = None) -> bool:
        """Runs what the journal lacks of a file; whether all of it has ended."""
        journal = self.journal(kernels, file)
        if only is not None:
            if not only - journal.answers().keys():
                return True
            for node in only - {line.get("only") for line in journal.lines()}:
                journal.note(only=node)
        while not any("ended" in line for line in journal.lines()) or only is not None:
            if time.monotonic() > self.until:
                return False
            how = self._run(kernels, file, journal)
            if how == "time":
                return False
            node = journal.dead()
            if how == "0":
                journal.note(ended=True)
                return True
            if node is None:
                raise RuntimeError(f"the suite itself fails at {file}: {how}; see {self.work / 'said.txt'}")
            journal.note(node=node, status="CRASH", error=f"the process {how}", seconds=0, suite=file.partition("/")[0])
            print(f"{node}: the process {how}", flush=True)
        return True

    def _run(self, kernels: str, file: str, journal: Journal) -> str:
        words = ("-q", "--tb=no", "-p", "no:cacheprovider", "-p", "torchcts_device", "--rootdir", str(self.room))
        level = ("--device", "cpu" if kernels == "host" else "bare", "--level", str(self.options.level))
        given = {
            "TORCHCTS_KERNELS": kernels,
            "TORCHCTS_JOURNAL": str(journal.path),
            "PYTHONPATH": str(HERE),
        }
        with (self.work / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [self.python, "-m", "pytest", *words, *level, str(self.room / file)],
                cwd=self.work, env=os.environ | given, stdout=said, stderr=said,
            )  # fmt: skip
            began = time.time()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(1)
                    # 1: some tests failed; 5: none were left
                    return "0" if code in (0, 1, 5) else f"ended with {code}"
                heard = journal.path.stat().st_mtime if journal.path.exists() else began
                late = time.time() - max(began, heard) > PATIENCE
                if late or time.monotonic() > self.until:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return f"took more than {PATIENCE} s" if late else "time"


OVERLOAD = re.compile(r"aten::([\w.]+)' with arguments|(DispatchStub: missing kernel)")


def missing(answer: dict[str, Any]) -> str | None:
    """The overload without a kernel that an error names, if flagops does not replace it."""
    found = OVERLOAD.search(f"{answer['error']} {answer.get('said', '')}")
    if not found:
        return None
    overload = next(filter(None, found.groups()))
    return None if overload in REPLACED else overload


REPLACED = {overload for name in LOWERINGS for overload in forms(name)}


def reasons(suite: Suite, files: list[str]) -> Iterator[dict[str, Any]]:
    """Every test's answer with its verdict, and for what has failed the reason."""
    for file in files:
        answers = suite.journal(suite.options.backend, file).answers()
        again = {who: suite.journal(kernels, file).answers() for who, kernels in KERNELS.items()}
        for node, answer in answers.items():
            verdict = "passed" if answer["status"] == "PASS" else "left out" if answer["status"] == "SKIP" else "ours"
            if verdict == "ours":
                tried = {who: found.get(node, {}).get("status") for who, found in again.items()}
                verdict = next((who for who in ("suite", "device") if tried[who] not in (None, "PASS")), verdict)
                if verdict != "suite" and missing(answer):
                    verdict = "unclaimed"
            yield answer | {"verdict": verdict, "missing": missing(answer) if verdict == "unclaimed" else None}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--level", type=int, default=8, help="of the suite's eight (default: 8, all)")
    made.add_argument("--backend", default="numba")
    made.add_argument("--only", nargs="*", metavar="WORD", help="files whose names have one of these")
    made.add_argument("--minutes", type=float, help="end after so long; --again goes on")
    made.add_argument("--again", action="store_true", help="go on where the last run ended")
    made.add_argument("--json", type=Path, default=RESULTS, help="what is written; coverage.md beside it shows it")
    return made


def main() -> int:
    options = parser().parse_args()
    suite = Suite(environment(), options)
    files = suite.files()
    if not options.again:
        for kernels in (options.backend, *KERNELS.values()):
            for file in files:
                suite.journal(kernels, file).path.unlink(missing_ok=True)
    whole = []
    for file in files:
        if suite.judge(options.backend, file):
            whole.append(file)
            answers = suite.journal(options.backend, file).answers().values()
            print(f"{file}: {dict(Counter(answer['status'] for answer in answers))}", flush=True)
    for file in files:
        answers = suite.journal(options.backend, file).answers()
        bad = {node for node, x in answers.items() if x["status"] not in ("PASS", "SKIP") and not missing(x)}
        for kernels in KERNELS.values():
            suite.judge(kernels, file, bad)
    found = list(reasons(suite, files))
    facts = {
        "when": datetime.datetime.now().isoformat(timespec="minutes"),
        "torchcts": VERSION,
        "torch": torch.__version__,
        "python": sysconfig.get_python_version(),
        "cpu": processor(),
        "backend": options.backend,
        "level": options.level,
        "files": f"{len(whole)} of {len(files)}",
    }
    options.json.write_text(json.dumps(kept(facts, found), indent=1) + "\n")
    shown(options.json.with_name("coverage.json"))
    return int(any(answer["verdict"] == "ours" for answer in found))


if __name__ == "__main__":
    sys.exit(main())
