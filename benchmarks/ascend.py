"""What Huawei's compilers make of every Triton kernel, without an NPU: ``make ascend PYTHON=ENVIRONMENT/bin/python``.

The environment has triton-ascend, which is the module `triton` there, ascendnpu-ir, and what flagops needs; see
docs/ascend.md. A kernel goes through Triton's front end (*ttir*), to linalg (*linalg*), and through the pipeline of
bishengir-compile (*hivm*), which plans the on-chip buffers and synchronises; its last step, hivmc, is in no wheel.
"""

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "ascend.json"
CHIP, TARGET = "Ascend 910B", "Ascend910B3"
STAGES = ("nothing", "ttir", "linalg", "hivm")
"""What a program reached; hivm is all that can be reached here."""
WHOLE = "External hivmc run fails"
"""Said by bishengir-compile when its own pipeline is through and it looks for the compiler that comes after."""
PACKAGES = ("triton-ascend", "ascendnpu-ir", "torch")
DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of the environment that has triton-ascend (default: this one)")
    parser.add_argument("--only", default="", metavar="PART", help="programs whose name holds it; nothing is kept")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of compiling; the rest is left to a next run"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.python and options.python.absolute() != Path(sys.executable).absolute():
        here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        words = [word for word in sys.argv[1:] if word not in ("--python", str(options.python))]
        return subprocess.run([str(options.python), __file__, *words], env=here).returncode
    try:
        prepare()
    except (ImportError, metadata.PackageNotFoundError) as error:
        print(f"{sys.executable} lacks what docs/ascend.md lists: {error}", file=sys.stderr)
        return 2
    kept = json.loads(RESULTS.read_text())["programs"] if RESULTS.exists() and not options.only else []
    known = {row["key"]: row for row in kept if row["stage"] != "nothing"}  # the front end takes no time
    everything = programs(options.only)
    found = [known[row["key"]] for row, _ in everything if row["key"] in known]
    todo = [entry for entry in everything if entry[0]["key"] not in known]
    for row, reached in lowered(todo, options.jobs, time.monotonic() + options.seconds):
        found.append(row | reached)
        if options.only:
            print(" ".join(map(str, (row | reached).values())), flush=True)
    if not options.only:
        keep(found, len(everything) - len(found))
    counts = collections.Counter(row["stage"] for row in found)
    reached = ", ".join(f"{counts[stage]} reached {stage}" for stage in STAGES)
    print(f"{len(everything)} programs, {reached}, {len(everything) - len(found)} left")
    return int(len(found) < len(everything))


def prepare() -> None:
    """Let Triton compile for a chip that is not here, with the compiler of the wheel. Raises ImportError."""
    import ascendnpuir

    for package in PACKAGES:
        metadata.version(package)
    os.environ["PATH"] = f"{Path(ascendnpuir.__file__).parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # else the linalg of a file is another one in each folder
    from triton.backends import backends

    class Utils:
        """Of the driver, which asks the NPU."""

        def get_arch(self) -> str:
            return TARGET

    backends["ascend"].compiler.add_stages.__globals__["NPUUtils"] = Utils


def programs(only: str) -> list[tuple[dict[str, str], Any]]:
    """Each kernel in each dtype, at the first tile of a named workload or a drawn case; every kernel first."""
    import triton_compile as compiler

    from flagops import chips, registry

    chip = next(chip for chip in chips.CHIPS if chip.name == CHIP)
    compiler.TARGETS[TARGET] = None, compiler.COMMON.Chip("cuda", 1, chip.shared, False, chips.warps(chip.device))
    compiler.DTYPES, compiler.DRAWS = DTYPES, 20
    found: dict[str, dict[str, tuple[dict[str, str], Any]]] = {}
    for launch, label in compiler.launches([TARGET], list(registry.cards()))[TARGET].items():
        tile = compiler.words(launch.tile)
        row = {"kernel": launch.name, "label": label, "dtypes": launch.dtypes, "tile": tile, "key": launch.key(TARGET)}
        if "fp64" not in launch.dtypes and only in " ".join(row.values()):  # the chip has no float64
            found.setdefault(launch.name, {}).setdefault(launch.dtypes, (row, launch))
    rounds = itertools.zip_longest(*(kinds.values() for kinds in found.values()))
    return [entry for entries in rounds for entry in entries if entry]


_queue: list[tuple[dict[str, str], Any]] = []


def lowered(
    todo: list[tuple[dict[str, str], Any]], jobs: int, until: float
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Programs with the stage that each reached, and why no further, those that a time allows."""
    from flagops.tools.contract import Progress

    _queue[:] = todo
    with multiprocessing.get_context("fork").Pool(jobs) as pool, Progress(len(todo)) as begin:
        for at, reached in pool.imap_unordered(_lowered, range(len(todo))):
            begin(todo[at][0]["kernel"])
            yield todo[at][0], reached
            if time.monotonic() > until:
                pool.terminate()
                return


def _lowered(at: int) -> tuple[int, dict[str, str]]:
    """In a process that was forked: kernels cannot be sent."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.compiler.errors import MLIRCompilationError

    launch = _queue[at][1]
    try:
        source = ASTSource(launch.kernel, *specialised(launch))
        with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
            os.environ["TRITON_CACHE_DIR"] = cache
            compile(source, target=GPUTarget("npu", TARGET, 0), options=dict(launch.options))
        raise AssertionError("hivmc was found: this script knows no stage behind it")
    except MLIRCompilationError as error:
        text = str(error)
        if WHOLE in text:
            return at, {"stage": "hivm", "reason": ""}
        return at, {"stage": "linalg" if "[ConvertLinalgRToBinary]" in text else "ttir", "reason": said(text)}
    except AssertionError:
        raise
    except Exception as error:  # whatever the front end raises is its reason, which the innermost call knows
        inner: BaseException = error
        while inner.__cause__:
            inner = inner.__cause__
        return at, {"stage": "nothing", "reason": said(f"{type(inner).__name__}: {inner}")}


def specialised(launch: Any) -> tuple[dict[str, str], dict[str, Any], Any]:
    """Types, constants and attributes of a launch as Triton 3.2 takes them. Raises TypeError for what it has not."""
    from triton.backends import backends

    if any(isinstance(kind, tuple) for _, kind in launch.signature):
        raise TypeError("a tuple among a kernel's arguments, which is newer than Triton 3.2")
    constants = {launch.kernel.params[path[0]].name: value for path, value in launch.constants}
    for name, value in constants.items():
        if any(map(callable, value if isinstance(value, tuple) else (value,))):
            raise TypeError(f"a function as the constant {name}, which is newer than Triton 3.2")
    given = [param for param in launch.kernel.params if not param.is_constexpr]
    types = {name: "*i8" if constants.get(name, 0) is None else kind for name, kind in launch.signature}
    descriptor = backends["ascend"].compiler.get_attrs_descriptor.__globals__["AscendAttrsDescriptor"]
    properties = {
        "tt.divisibility": [path[0] for path in launch.divisible],
        "tt.equal_to": [param.num for param in given if constants.get(param.name) == 1],
    }
    attributes = descriptor.from_dict({"arg_properties": properties, "cls": descriptor.__name__})
    return {p.name: "i32" if types[p.name] == "constexpr" else types[p.name] for p in given}, constants, attributes


def said(text: str) -> str:
    """The reason among what a compiler prints: what does not fit, else its first error, or where it crashed, or its
    last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("[INFO]", "///"))]
    errors = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    errors = [line for line in errors if not line.startswith("Failed to run")] or errors
    crashed, why = re.search(r"Program arguments: \S*?([\w-]+) ", text), re.search(r"Assertion .*", text)
    crashes = [f"{crashed[1]} crashes{f': {why[0]}' if why else ''}"] if crashed else []
    chosen = [line for line in errors if "overflow" in line] or errors or crashes or lines[-1:]
    return re.sub(r" \(possible reason.*", "", chosen[0])[:200]


def keep(found: list[dict[str, str]], left: int) -> None:
    """The results by program, and a table by kernel."""
    versions = {package: metadata.version(package) for package in PACKAGES} | {"python": platform.python_version()}
    found = sorted(found, key=lambda row: (row["kernel"], row["dtypes"], row["label"]))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
    head = json.dumps({"target": TARGET, "versions": versions, "left": left}, indent=1)[:-2]
    RESULTS.write_text(f'{head},\n "programs": [\n{lines}\n ]\n}}\n')
    by_kernel: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_kernel.setdefault(row["kernel"], []).append(row)
    counts = collections.Counter(row["stage"] for row in found)
    words = ", ".join(f"{package} {version}" for package, version in versions.items())
    text = [
        f"For {TARGET} by {words}, without an NPU: `make ascend`. Of {len(found)} programs, each kernel first, "
        f"{', '.join(f'{counts[stage]} reached {stage}' for stage in STAGES)}; {left} are left to a next run.",
        "",
        "| kernel | dtypes | reached | what stops it |",
        "| --- | --- | --- | --- |",
    ]
    for kernel, rows in by_kernel.items():
        for stage in STAGES:
            reasons: dict[str, list[str]] = {}
            for row in rows:
                if row["stage"] == stage:
                    reasons.setdefault(re.sub(r"\|", "/", row["reason"]), []).append(row["dtypes"])
            for reason, dtypes in reasons.items():
                kinds = list(dict.fromkeys(dtypes))
                listed = ", ".join(kinds) if len(kinds) < 8 else f"{kinds[0]} and {len(kinds) - 1} others"
                text.append(f"| {kernel} | {listed} | {stage} | {reason} |")
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
