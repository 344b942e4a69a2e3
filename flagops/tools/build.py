"""`flagops build`: Triton's kernels compiled ahead of time, for chips that need not be here.

What the operators launch at named workloads is compiled and written into a cache folder, each under the key by which
Triton asks for it on that chip, with a manifest. Where FLAGOPS_CACHE names that folder nothing of it is compiled again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import __version__, chips, config, registry
from flagops.backends import missing
from flagops.errors import Unsupported, said, suggestion
from flagops.operator import Operator
from flagops.tools import contract

if TYPE_CHECKING:
    from flagops.tools.programs import Program

OLDEST = (3, 7)
"""Before it Triton makes a module in C for each signature."""


def run(argv: Sequence[str]) -> int:
    """The command; 0 when every program was compiled, 1 when the compiler refused one."""
    options = _parser().parse_args(argv)
    wanted = compilable(config.names(options.target))
    operators = registry.named(options.ops) if options.ops else list(registry.operators().values())
    workloads = named(operators, options.model)
    sizes = _sizes(options.size)
    folder = _writable(options.out or Path(config.cache_folder()))
    _needs(options.driver)
    with tempfile.TemporaryDirectory() as scratch, config.using(cache=str(folder.parent)):
        todo = _programs(wanted, workloads, options.dtype, sizes)
        return _build(folder, Path(scratch), wanted, todo, options)


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(
        prog="flagops build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, metavar="T", help="by comma, Triton's targets or chips: sm_90,gfx942,h200")
    add("--model", default="", metavar="M", help="named workloads of a model, such as v4-flash (default: all)")
    add("--ops", nargs="+", metavar="OP", help="operators, such as matmul or aten.add (default: models')")
    add("--dtype", default=None, metavar="D", help="in place of the workloads' own")
    sizes = "sizes of an axis besides the workloads', by its name in the card; batch is the first of the batch axes"
    add("--size", action="append", default=[], metavar="AXIS=N,N", help=sizes)
    add("--out", type=Path, metavar="DIR", help="the cache folder to write into (default: that of FLAGOPS_CACHE)")
    add("--jobs", type=contract.natural, default=os.cpu_count(), metavar="N", help="processes that compile")
    add("--no-driver", dest="driver", action="store_false", help="without the module in C that reaches a chip's driver")
    return parser


def compilable(words: Iterable[str]) -> list[chips.Chip]:
    """The chips that words name, of one target and measure once; a ValueError where Triton compiles nothing."""
    able = [chip for chip in chips.CHIPS if chip.target.startswith(("sm_", "gfx")) and chip.processors]
    found: dict[Any, chips.Chip] = {}
    for word in words:
        chosen = [chip for chip in chips.named([word]) if chip in able]
        if not chosen:
            known = ", ".join(dict.fromkeys(chip.target for chip in able))
            raise ValueError(f"Triton compiles nothing for {word!r} here; it does for {known}")
        for chip in chosen:
            found.setdefault((chip.target, chip.processors, chip.shared), chip)
    if not found:
        raise ValueError("--target names no chip; such as --target sm_90,gfx942")
    return list(found.values())


def named(operators: Sequence[Operator], model: str) -> dict[Operator, list[str]]:
    """The workloads of a model, by the word before their first dot, or of its family: v4-flash has those of v4."""
    known = {_model(name) for op in registry.operators().values() for name in op.workloads if "." in name}
    if model and model not in known:
        raise ValueError(f"no workload is of a model {model!r}{suggestion(model, known)}")
    found = {
        op: [name for name in op.workloads if not model or f"{model}-".startswith(f"{_model(name)}-")]
        for op in operators
    }
    if not any(found.values()):
        raise ValueError(f"{', '.join(op.name for op in operators)}: no workload is of {model}")
    return found


def _model(workload: str) -> str:
    return workload.partition(".")[0]


def _sizes(words: Sequence[str]) -> list[dict[str, int]]:
    """Every choice of sizes that ``AXIS=N,N`` allow, first the workloads' own."""
    axes: dict[str, list[int]] = {}
    for word in words:
        axis, _, numbers = word.partition("=")
        try:
            axes[axis] = [int(number) for number in config.names(numbers)]
        except ValueError:
            axes[axis] = []
        if not axes[axis] or min(axes[axis]) < 1:
            raise ValueError(f"--size {word}: expected an axis and its sizes, such as batch=1,17")
    choices = [[{}, *({axis: size} for size in sizes)] for axis, sizes in axes.items()]
    return [functools.reduce(lambda a, b: {**a, **b}, chosen, {}) for chosen in itertools.product(*choices)]


def _needs(driver: bool) -> None:
    """Raises ModuleNotFoundError or ValueError with what to install or to unset."""
    for package in ("torch", "triton"):
        if reason := missing(package):
            raise ModuleNotFoundError(f"flagops build needs the compiler of Triton: {reason}")
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        raise ValueError(f"flagops build needs triton >= {'.'.join(map(str, OLDEST))}, not {triton.__version__}")
    if config.interpreting():
        raise ValueError("TRITON_INTERPRET=1 turns kernels into Python functions: unset it")
    if not driver:
        return
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ValueError("no C compiler for the module that reaches a chip's driver: install gcc, or say --no-driver")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise ValueError(f"there is no {header}: install python3-dev, or say --no-driver")


def _writable(folder: Path) -> Path:
    """Where artefacts go, trusted as a process that reads them will ask for. Raises OSError."""
    from flagops.backends import _built
    from flagops.backends._store import Store

    store = Store(_built.place(folder.absolute()))
    if not os.access(store.folder, os.W_OK) or not store.writable:
        raise ValueError(f"{store.folder} cannot be written")
    return store.folder


def calls(op: Operator, names: Iterable[str], dtype: str | None, sizes: Iterable[Mapping[str, int]]) -> Iterator[Any]:
    """What an operator is called with at workloads, each with what is said of it."""
    from flagops.tools import workloads
    from flagops.tools.programs import zeros

    seen = set()
    for workload, other in itertools.product(names, sizes):
        with contextlib.suppress(Unsupported):
            case = workloads.case(op, workload, dtype, other)
            if case not in seen:
                seen.add(case)
                words = (op.name, workload, dtype, *(f"{axis}={size}" for axis, size in other.items()))
                yield " ".join(filter(None, words)), workloads.made(op, case, zeros)


def _programs(
    wanted: Sequence[chips.Chip], workloads: Mapping[Operator, Sequence[str]], dtype: str | None,
    sizes: Sequence[Mapping[str, int]],
) -> list[tuple[str, str, Program]]:  # fmt: skip
    """What the chips are asked for, each once: the target, the call that asks first, and the program."""
    from flagops.tools.programs import asked_for, ready

    found: dict[Any, tuple[str, str, Program]] = {}
    operators = [op for op in workloads if registry.written(op.name, "triton")]
    with contract.Progress(len(operators)) as begin:
        for op in operators:
            begin(f"what {op.name} launches")
            for label, made in calls(op, workloads[op], dtype, sizes):
                launch = ready(op, made)
                if launch is None:
                    continue
                for chip in wanted:
                    with asked_for(chip) as programs:
                        launch()
                    for program in programs:
                        found.setdefault(program.key, (chip.target, label, program))
    if not found:
        raise ValueError("there is nothing to build: no Triton kernel takes these workloads in this dtype")
    return list(found.values())


def _build(
    folder: Path, scratch: Path, wanted: Sequence[chips.Chip], todo: list[tuple[str, str, Program]],
    options: argparse.Namespace,
) -> int:  # fmt: skip
    import triton

    from flagops.backends import _built

    triton.knobs.cache.dir = str(scratch)
    _built.serve()  # what is there already is not compiled again
    manifest: dict[str, Any] = {"programs": {}, "drivers": {}}
    place = folder / _built.MANIFEST
    if place.exists():
        try:
            manifest |= json.loads(place.read_text())
        except ValueError:
            raise ValueError(f"{place} is damaged: remove it") from None
    manifest |= {"flagops": __version__, "triton": triton.__version__, "python": sys.implementation.cache_tag}
    refused: dict[str, list[str]] = {}
    counts: collections.Counter[str] = collections.Counter()
    try:
        for backend in {"cuda" if chip.target.startswith("sm_") else "hip" for chip in wanted if options.driver}:
            manifest["drivers"] |= _driver(backend, scratch, folder)
        for at, key, found in _compiled(todo, options.jobs, folder):
            target, label, program = todo[at]
            if key:
                about = {"kernel": program.kernel, "call": label, "target": target, "parameters": program.parameters}
                manifest["programs"][key] = {**about, "files": found}
                counts[target] += 1
            else:
                refused.setdefault(f"{target}: {found}", []).append(f"{program.kernel} ({label})")
    finally:  # what was compiled before an interrupt is kept
        place.with_suffix(".new").write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(place.with_suffix(".new"), place)
    for target, count in counts.items():
        print(f"{target}: {count} programs")
    for reason, names in refused.items():
        print(f"refused, {len(names)} of {reason}: {', '.join(dict.fromkeys(names))}"[:300], file=sys.stderr)
    print(f"{folder}: read where FLAGOPS_CACHE={folder.parent} is set")
    return int(bool(refused))


_queue: list[tuple[str, str, Any]] = []


def _compile(place: tuple[int, Path]) -> tuple[int, str, Any]:
    """In a process that was forked from this one: functions of Triton's cannot be sent."""
    at, folder = place
    program = _queue[at][2]
    try:
        made = program.compiled()
    except Exception as error:  # whatever the compiler raises is its reason
        return at, "", said(error)[:160]
    kept = [Path(path) for name, path in made.metadata_group.items() if name.endswith((".json", ".cubin", ".hsaco"))]
    return at, kept[0].parent.name, _copied(kept, folder)


def _compiled(todo: Sequence[Any], jobs: int, folder: Path) -> Iterator[tuple[int, str, Any]]:
    """Of each program its key and its files with their digests, or none and why not."""
    _queue[:] = todo
    with multiprocessing.get_context("fork").Pool(jobs) as pool, contract.Progress(len(todo)) as begin:
        for found in pool.imap_unordered(_compile, [(at, folder) for at in range(len(todo))]):
            begin(" ".join(todo[found[0]][:2]))
            yield found


def _copied(files: Sequence[Path], folder: Path) -> dict[str, str]:
    """Files into the folder of their key, and their digests."""
    target = folder / files[0].parent.name
    target.mkdir(mode=0o700, exist_ok=True)
    for file in files:
        if not (target / file.name).exists() or not (target / file.name).samefile(file):
            shutil.copyfile(file, target / file.name)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _driver(backend: str, scratch: Path, folder: Path) -> dict[str, Any]:
    """The module in C by which Triton reaches the driver of a vendor's chips, made and keyed by Triton itself.

    It links to the driver's library by names alone: a hollow one will do here.
    """
    import triton
    from triton.backends.amd.driver import HIPUtils
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import build

    make = {"cuda": CudaUtils, "hip": HIPUtils}[backend]
    with triton.knobs.nvidia.scope():
        if backend == "cuda":
            triton.knobs.nvidia.libcuda_path = str(hollow(scratch))
        for linkage in ("ELF", ""):  # a part of the key, which Python asks of the program `file`, if there is one
            words = (platform.machine(), platform.system(), platform.architecture()[0], linkage)
            build.platform_key = lambda words=words: ",".join(words)
            try:
                make()
            except ImportError:
                continue  # it is made, and cannot be loaded without a chip
            except RuntimeError as error:
                print(f"{backend}: no module that reaches its driver: {error}"[:200], file=sys.stderr)
                return {}
    name = f"{backend}_utils"
    made = list(scratch.glob(f"*/{name}*"))
    return {file.parent.name: {"module": name, "files": _copied([file], folder)} for file in made}


def hollow(folder: Path) -> Path:
    """NVIDIA's driver library as a linker sees it: the functions that Triton's module names, each of which fails."""
    from triton.backends.nvidia.driver import dirname

    functions = sorted(set(re.findall(r"\bcu[A-Z]\w+", Path(dirname, "driver.c").read_text())))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in functions))
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)], check=True
    )
    return folder
