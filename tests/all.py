"""What is too long or too rare for ``make test``: a table of rows, each run again when what it depends on has changed.

``make test-all`` runs the rows whose sources differ from those of their last pass, ``ROWS="mutants kills"`` some rows,
``ARGS=--force`` those that have not changed too. Results are kept in benchmarks/results/test_all.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "test_all.json"
PYTEST = [sys.executable, "-m", "pytest"]
KERNELS = ("kernels/**/*.py", "reference/**/*.py", "flagops/backends/*.py", "flagops/*.py")
EVERYTHING = ("flagops/**/*.py", "kernels/**/*.py", "reference/**/*.py", "tests/**/*.py", "pyproject.toml")
FILES = sorted(str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("test_*.py"))
KEPT = 10  # results of a row


@dataclass(frozen=True)
class Row:
    """Commands that must all succeed, and the files whose change makes them worth running again."""

    about: str
    sources: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    busy: int | None = None  # which of the commands runs beside a busy process on every core


def pytest(*words: str, workers: int = 2) -> tuple[str, ...]:
    return (*PYTEST, "-q", "-n", str(workers), *words)


def processor_of(name: str, features: str) -> tuple[str, ...]:
    """All parity of numba's kernels, compiled for another processor than this one."""
    settings = (f"NUMBA_CPU_NAME={name}", f"NUMBA_CPU_FEATURES={features}", "FLAGOPS_CACHE={empty}")
    return ("env", *settings, *pytest("--backend", "numba", "tests/test_parity.py"))


ROWS = {
    "mutants": Row(
        "every edit of every kernel must be noticed by the parity suite",
        (*KERNELS, "tests/mutants.py", "tests/families/*.py"),
        (pytest("tests/test_mutants.py", "--mutants", "all"),),
    ),
    "judge": Row(
        "every wrong kernel must be caught in each of ten default runs of flagops check",
        ("flagops/judge/*.py", "flagops/cases.py", "flagops/layouts.py", "tests/wrong_kernels/*.py"),
        ((sys.executable, "tests/judge_table.py", "--again", "--jobs", "2"),),
    ),
    "accuracy": Row(
        "whatever edit of a kernel a trained DeepSeek-V4 tells by its loss, the parity suite must tell too",
        (*KERNELS, "flagops/accuracy/*.py", "tests/accuracy_mutants.py", "tests/mutants.py", "tests/families/*.py"),
        ((sys.executable, "tests/accuracy_mutants.py"),),
    ),
    "examples": Row(
        "1000 drawn examples where make test draws 50",
        (*KERNELS, "tests/test_parity.py"),
        (("env", "HYPOTHESIS_PROFILE=nightly", *pytest("tests/test_parity.py")),),
    ),
    "kills": Row(
        "conversions killed at every write, sync and rename, and 60 times at random moments",
        ("flagops/checkpoint/*.py", "tests/checkpoint_*.py", "tests/test_checkpoint_resume.py"),
        (pytest("-m", "slow", "tests/test_checkpoint_resume.py", workers=1),),
    ),
    "vault": Row(
        "5000 mutations of checkpoints; sources that change, full and read-only disks, conversions at once",
        ("flagops/checkpoint/*.py", "tests/checkpoint_*.py", "tests/test_checkpoint_*.py"),
        (
            pytest("-m", "slow", "tests/test_checkpoint_mutations.py", workers=1),
            pytest(*(f"tests/test_checkpoint_{name}.py" for name in ("trust", "output", "resume"))),
        ),
    ),
    "slow": Row(
        "all other tests marked slow: a full warmup, the demo in Triton's interpreter, long sweeps",
        EVERYTHING,
        (
            pytest(
                "-m",
                "slow",
                *(f"--ignore=tests/test_{n}.py" for n in ("checkpoint_resume", "checkpoint_mutations", "storms")),
            ),
        ),
    ),
    "distances": Row(
        "every test that compares by distance, 200 times with other draws, each for at most 20 s",
        EVERYTHING,
        tuple(pytest("--distances", "--repeat", "200", "--seconds", "20", file) for file in FILES),
    ),
    "thrice": Row(
        "the whole suite three times with other draws, the second beside a busy process on every core",
        EVERYTHING,
        (pytest(), pytest(), pytest()),
        busy=1,
    ),
    "order": Row(
        "the whole suite with its files in reverse order, an empty kernel cache and another home",
        EVERYTHING,
        (("env", "FLAGOPS_CACHE={empty}/cache", "HOME={empty}", *pytest("--dist", "worksteal", *reversed(FILES))),),
    ),
    "transformers": Row(
        "the patch tests on every transformers that is supported",
        ("flagops/**/*.py", "tests/*patch*.py", "tests/*transformers*.py", "tests/other_versions.py"),
        ((sys.executable, "tests/other_versions.py", "transformers"),),
    ),
    "numba": Row(
        "all parity, the threads and what is relied upon, on the oldest and the newest numba",
        (*KERNELS, "tests/test_threads.py", "tests/test_backends.py", "tests/other_versions.py", "pyproject.toml"),
        ((sys.executable, "tests/other_versions.py", "numba", "--", "-n", "2", "-k", ""),),
    ),
    "avx512": Row(
        "numba's kernels on a CPU with AVX-512 and without products of bfloat16",
        KERNELS,
        (processor_of("x86-64-v4", "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd,+f16c,+fma"),),
    ),
    "haswell": Row(
        "numba's kernels on a CPU without AVX-512",
        KERNELS,
        (processor_of("haswell", "+avx2,+fma,+f16c"),),
    ),
    "nehalem": Row(
        "numba's kernels on a CPU without AVX, fused multiply-adds and float16",
        KERNELS,
        (processor_of("nehalem", "+sse4.2,+popcnt"),),
    ),
    "neon": Row(
        "all of numba's kernels lowered to aarch64; nothing is run",
        (*KERNELS, "tests/lowering.py"),
        ((sys.executable, "tests/lowering.py"),),
    ),
    "portability": Row(
        "every Triton kernel compiled for every target that takes it, where its sources have changed",
        (*KERNELS, "benchmarks/portability.py", "benchmarks/triton_compile.py", "flagops/tools/programs.py"),
        ((sys.executable, "benchmarks/portability.py"),),
    ),
    "semantics": Row(
        "every Triton kernel run by another implementation of Triton, which sees stray accesses and races",
        (*KERNELS, "tests/semantics.py"),
        ((sys.executable, "tests/semantics.py"),),
    ),
    "bare": Row(
        "all models and phases on a device that owns no kernel, and its own tests",
        ("flagops/**/*.py", "kernels/**/*.py", "reference/**/*.py", "tests/bare/*"),
        ((sys.executable, "tests/bare/run.py"), pytest("tests/test_bare.py", workers=1)),
    ),
    "opinfo": Row(
        "PyTorch's own samples of every replaced overload, in every layout and form, on the CPU",
        ("flagops/**/*.py", "kernels/**/*.py", "tests/opinfo_*.py"),
        ((sys.executable, "tests/opinfo_judge.py"),),
    ),
    "torchcts": Row(
        "TorchCTS, another project's conformance suite, on the bare device, in an environment that it makes",
        ("flagops/**/*.py", "kernels/**/*.py", "tests/bare/*", "tests/torchcts_*.py"),
        ((sys.executable, "tests/torchcts_judge.py"),),
    ),
    "backendbench": Row(
        "BackendBench's construction over what is replaced, and the wrong kernels that it lets pass",
        ("flagops/**/*.py", "kernels/**/*.py", "tests/backendbench_judge.py", "tests/wrong_kernels/*.py"),
        ((sys.executable, "tests/backendbench_judge.py", "--wrong"),),
    ),
    "calls": Row(
        "1.6 million calls from 8 threads, 50,000 shapes in bounded memory, storms of forks and of new processes",
        (*KERNELS, "tests/test_storms.py"),
        (pytest("-m", "slow", "tests/test_storms.py", workers=1),),
    ),
}


def digest(row: Row) -> str:
    """Of the names and contents of a row's sources."""
    found = sorted({path for pattern in row.sources for path in glob.glob(pattern, root_dir=ROOT, recursive=True)})
    text = hashlib.sha256()
    for path in found:
        text.update(f"{path}\0".encode() + (ROOT / path).read_bytes())
    return text.hexdigest()[:16]


def processor() -> str:
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{len(names)} x {names[0].partition(': ')[2]}" if names else platform.processor()
    return platform.processor()


@contextlib.contextmanager
def beside_a_busy_process() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(name: str, more: list[str]) -> dict[str, object]:
    """The dated result of one row."""
    row, start, failed = ROWS[name], time.monotonic(), []
    with tempfile.TemporaryDirectory() as empty:
        for index, command in enumerate(row.commands):
            words = [word.replace("{empty}", empty) for word in command] + more
            print(f"{name}: {shlex.join(words)}", flush=True)
            with beside_a_busy_process() if index == row.busy else contextlib.nullcontext():
                code = subprocess.run(words, cwd=ROOT).returncode
            if code not in (0, 5):  # 5: a file has no such test
                failed.append(shlex.join(words))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "cpu": processor(),
        "seconds": round(time.monotonic() - start),
        "outcome": "failed" if failed else "passed",
        "failed": failed,
        "sources": digest(row),
    }


def write(results: dict[str, list[dict[str, object]]]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    lines = ["What `make test-all` found last, row by row.", "", "| row | date | commit | CPU | time | outcome |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        last = found[-1]
        took = f"{int(str(last['seconds'])) / 60:.1f} min"
        lines.append(f"| {name} | {last['date']} | {last['commit']} | {last['cpu']} | {took} | {last['outcome']} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    table = "\n".join(f"  {name:10} {row.about}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="make test-all", description=__doc__, epilog=f"rows:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run (default: all)")
    parser.add_argument(
        "--force", action="store_true", help="also rows whose sources have not changed since they passed"
    )
    parser.add_argument("--pytest", default="", metavar="WORDS", help="more options of pytest, such as '--seed 7'")
    args = parser.parse_args()
    unknown = set(args.rows) - ROWS.keys()
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failures = 0
    for name in args.rows or ROWS:
        last = results.get(name, [])[-1:]
        if not args.force and last and last[0]["outcome"] == "passed" and last[0]["sources"] == digest(ROWS[name]):
            print(f"{name}: passed on {last[0]['date']}, nothing it depends on has changed")
            continue
        found = run(name, shlex.split(args.pytest))
        print(f"{name}: {found['outcome']} after {found['seconds']} s", flush=True)
        failures += found["outcome"] != "passed"
        results[name] = [*results.get(name, []), found][-KEPT:]
        write(results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
