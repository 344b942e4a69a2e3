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

sys.path.insert(0, str(Path(__file__).parent))
from derived import derived

TABLES = [runpy.run_path(str(path)) for path in sorted(Path(__file__).with_name("families").glob("*.py"))]

# Mutants that survive, by file and index, each with why no result can tell it apart.
EQUIVALENT: dict[tuple[str, int], str] = {k: v for t in TABLES for k, v in t.get("EQUIVALENT", {}).items()}


def kernels() -> Path:
    (folder,) = importlib.util.find_spec("flagops.kernels").submodule_search_locations
    return Path(folder)


def backend_of(file: str) -> str:
    """The backend in whose folder a file lies; of a helper above the folders, the first whose kernels import it."""
    folder, _, name = file.rpartition("/")
    line = f"from ..{name[:-3]} import"
    folders = (
        b for b in ("numba", "torch", "triton") if any(line in p.read_text() for p in kernels().glob(f"{b}/*.py"))
    )
    return folder or next(folders)


def derivable(file: str) -> list[tuple[str, str, str, int]]:
    """The mutants that follow from a family's file."""
    from flagops import registry

    backend, _, name = file.partition("/")
    operators = [op.name for op in registry.operators().values() if f"{op.family}.py" == name]
    return derived((kernels() / file).read_text(), operators, compiled=backend != "torch")


def mutate(source: str, old: str, new: str, occurrence: int) -> str:
    parts = source.split(old)
    if len(parts) < occurrence + 2:
        raise SystemExit(f"the kernel has changed: {old!r} occurs {len(parts) - 1} times")
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


def _all() -> dict[str, list[tuple[str, str, str, int]]]:
    """By file in kernels/: (operator that must notice, text, its replacement, which occurrence)."""
    listed = {file: edits for table in TABLES for file, edits in table["MUTANTS"].items()}
    files = (path.relative_to(kernels()).as_posix() for path in sorted(kernels().glob("*/[!_]*.py")))
    return listed | {file: derivable(file) for file in files if file not in listed}


MUTANTS = _all()


def verdict(file: str, index: int, folder: Path) -> str:
    """Load the kernels with one of them edited, and run the suite until it notices."""
    from flagops import dispatch, registry, testing
    from flagops.errors import Unsupported

    name, old, new, occurrence = MUTANTS[file][index]
    for module in [m for m in sys.modules if m.startswith("flagops.kernels.")]:
        del sys.modules[module]
    edited = folder / f"{file[:-3].replace('/', '_')}_{index}.py"
    edited.write_text(mutate((kernels() / file).read_text(), old, new, occurrence))
    spec = importlib.util.spec_from_file_location(f"flagops.kernels.{file[:-3].replace('/', '.')}", edited)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    registry._module.cache_clear()
    registry.find.cache_clear()
    dispatch._plans.clear()
    backend = backend_of(file)
    for seed in range(8):
        try:
            ran, _ = testing.check(registry.operator(name), backend, 50, seed)
        except Unsupported as reason:
            return f"not run: {reason}"
        except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
            return f"killed by {type(error).__name__}"
        if not ran:
            return "not run"
    return "survived"


def main(backend: str, *chosen: str) -> None:
    os.environ["FLAGOPS_CACHE"] = os.devnull  # an edited kernel must never meet, or leave, compiled code
    os.environ["NUMBA_OPT"] = "0"  # compiled for a few calls
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for word in chosen:
            file, _, index = word.partition(":")
            for i in [int(index)] if index else range(len(MUTANTS[file])):
                print(f"{file}:{i} ", end="", flush=True)
                print(verdict(file, i, Path(folder)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
