"""Small edits of the real kernels, each a bug that the parity suite must find.

``python tests/mutants.py BACKEND FILE:INDEX...`` tries those, such as ``numba numba/norm.py:0``; of a file alone, all.

One line is printed for each mutant. A mutant may read or write anywhere, so the caller runs this as a process of its
own and goes on behind a mutant that ended it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
import tempfile
from pathlib import Path

import interpreter

from flagops.backends.numba import features
from flagops.judge.derived import derived, mutate

TABLES = [runpy.run_path(str(path)) for path in sorted(Path(__file__).with_name("families").glob("*.py"))]

# Mutants that survive, by file and index, each with why no result can tell it apart.
EQUIVALENT: dict[tuple[str, int], str] = {k: v for t in TABLES for k, v in t.get("EQUIVALENT", {}).items()}
# Code for processors that add products of bfloat16 in pairs; of it, what tile registers replace, and what needs them.
_without = (
    {"IN_VECTORS"}
    if "+amx-bf16" in features()
    else {"IN_TILES"}
    if "+avx512bf16" in features()
    else {"PAIRED", "IN_VECTORS", "IN_TILES"}
)
EQUIVALENT |= {k: "the processor does not run it" for t in TABLES for name in _without for k in t.get(name, ())}


def kernels() -> Path:
    (folder,) = importlib.util.find_spec("flagops.kernels").submodule_search_locations
    return Path(folder)


def backend_of(file: str) -> str:
    """The backend in whose folder a file lies; of a helper above the folders, the first whose kernels import it."""
    folder, _, name = file.rpartition("/")
    lines = f"from ..{name[:-3]} import", f"from .. import {name[:-3]}"
    folders = (
        b
        for b in ("numba", "torch", "triton")
        if any(line in p.read_text() for p in kernels().glob(f"{b}/*.py") for line in lines)
    )
    return folder or next(folders)


def derivable(file: str) -> list[tuple[str, str, str, int]]:
    """The mutants that follow from a family's file."""
    from flagops import registry

    backend, _, name = file.partition("/")
    operators = [op.name for op in registry.operators().values() if f"{op.family}.py" == name]
    return derived((kernels() / file).read_text(), operators, backend != "torch")


def _all() -> dict[str, list[tuple[str, str, str, int]]]:
    """By file in kernels/: (operator that must notice, text, its replacement, which occurrence)."""
    listed = {file: edits for table in TABLES for file, edits in table["MUTANTS"].items()}
    files = (path.relative_to(kernels()).as_posix() for path in sorted(kernels().glob("*/[!_]*.py")))
    return listed | {file: derivable(file) for file in files if file not in listed}


MUTANTS = _all()


def verdict(file: str, index: int, folder: Path) -> str:
    """Load the kernels with one of them edited, and run the suite until it notices."""
    from flagops.judge import mutants

    name, *edit = MUTANTS[file][index]
    for module in [m for m in sys.modules if m.startswith("flagops.kernels.")]:
        del sys.modules[module]
    edited = folder / f"{file[:-3].replace('/', '_')}_{index}.py"
    edited.write_text(mutate((kernels() / file).read_text(), *edit))
    module = f"flagops.kernels.{file[:-3].replace('/', '.')}"
    mutants.enter(module, edited)
    package, _, own = module.rpartition(".")
    setattr(sys.modules[package], own, sys.modules[module])  # where `from .. import` looks first
    return mutants.verdict(name, backend_of(file))


def main(backend: str, *chosen: str) -> None:
    os.environ["FLAGOPS_CACHE"] = os.devnull  # an edited kernel must never meet, or leave, compiled code
    os.environ["NUMBA_OPT"] = "0"  # compiled for a few calls
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.quicken()
    with tempfile.TemporaryDirectory() as folder:
        for word in chosen:
            file, _, index = word.partition(":")
            for i in [int(index)] if index else range(len(MUTANTS[file])):
                print(f"{file}:{i} ", end="", flush=True)
                print(verdict(file, i, Path(folder)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
