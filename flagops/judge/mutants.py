"""`flagops check --mutants N`: small edits of the kernels judged, each a bug that the judge must notice.

What is not noticed is a place that the card's cases do not reach, or an edit that no result can tell: one looks at it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flagops import registry, tables
from flagops.errors import Unsupported
from flagops.tools import contract

from .derived import compiled, derived, mutate

PATIENCE = 300
"""Seconds that a mutant may take: its kernels are compiled anew."""


@dataclass(frozen=True)
class Mutant:
    """An edit of a source, none where `old` is empty; `module` is what it is loaded as, "" for a file by its path."""

    operator: str
    backend: str
    path: str
    module: str
    old: str
    new: str
    occurrence: int


def check(wish: dict[str, Any], count: int) -> int:
    """Try `count` mutants drawn from the seed; 0 if there are some and each was noticed."""
    every = list(_mutants(wish))
    if not every:
        raise ValueError("no mutants follow from these kernels: their source has no arithmetic, or lies in no file")
    chosen = random.Random(wish["seed"]).sample(every, min(count, len(every)))
    plain = list(dict.fromkeys(replace(m, old="", new="", occurrence=0) for m in chosen))
    todo, found = [*plain, *chosen], list[str]()
    with contract.Progress(len(todo)) as begin:
        while len(found) < len(todo):
            found += _tried(todo[len(found) :], wish["seed"], begin)
            for kernel, said in zip(plain, found, strict=False):
                if said != SURVIVED:  # whatever is done to it would be noticed
                    raise ValueError(
                        f"{kernel.operator} on {kernel.backend} is {said} as it is: check it without --mutants"
                    )
    verdicts = found[len(plain) :]
    rows = [
        (m.operator, m.backend, said, f"{m.old}\n{m.new}" if said == SURVIVED else "")
        for m, said in zip(chosen, verdicts, strict=True)
    ]
    columns = ("operator", "backend", "verdict", "the edit, where it was not noticed")
    tables.show(f"mutants, seed {wish['seed']}", columns, rows)
    noticed = sum(said.startswith((KILLED, ENDED)) for said in verdicts)
    print(f"{noticed} of {len(chosen)} noticed ({len(every)} follow from the kernels)")
    return 0 if noticed == len(chosen) else 1


KILLED, ENDED, SURVIVED = "killed", "ended", "survived"


def _mutants(wish: dict[str, Any]) -> Iterator[Mutant]:
    names = wish["operators"] or list(registry.operators())
    places = [(path, "", Path(path).stem, names) for path in wish["files"]]
    for backend in () if wish["files"] else wish["backends"]:
        for name in names:
            module = registry.home(name, backend)
            if module and registry.written(name, backend):
                spec = importlib.util.find_spec(module)
                assert spec is not None
                assert spec.origin is not None
                places.append((spec.origin, module, backend, [name]))
    for path, module, backend, operators in places:
        source = Path(path).read_text(encoding="utf-8")
        functions = [registry.operator(name).function for name in operators]
        known = dict(zip(functions, operators, strict=True))
        for function, old, new, occurrence in derived(source, functions, compiled(source)):
            yield Mutant(known[function], backend, path, module, old, new, occurrence)


def _tried(mutants: Sequence[Mutant], seed: int, begin: Callable[[str], None]) -> list[str]:
    """The verdicts of one process, up to the mutant that ends it."""
    text = json.dumps({"seed": seed, "mutants": [asdict(m) for m in mutants]})
    command = [sys.executable, "-W", "ignore", "-m", "flagops.judge.mutants", text]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "FLAGOPS_CACHE": os.devnull,  # an edited kernel must never meet, or leave, compiled code
    }
    begin(f"{mutants[0].operator} on {mutants[0].backend}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment, process_group=0
    )
    found: list[str] = []
    timer = threading.Timer(PATIENCE * len(mutants), process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                found.append(line.removeprefix(_MARK).strip())
                if len(found) < len(mutants):
                    begin(f"{mutants[len(found)].operator} on {mutants[len(found)].backend}")
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    return found if len(found) == len(mutants) else [*found, f"{ENDED} its process ({code})"]


_MARK = "verdict: "


def enter(module: str, path: Path) -> None:
    """Load a file in place of a module of kernels, and forget what was found before."""
    importlib.import_module(module.rpartition(".")[0])
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])
    forget()


def forget() -> None:
    """Find kernels anew."""
    from flagops import dispatch

    registry._module.cache_clear()
    registry.find.cache_clear()
    dispatch._plans.clear()


def verdict(operator: str, backend: str, seed: int = 0) -> str:
    """Run the suite, and where the kernel has a backward its gradients, until they notice what is loaded."""
    from flagops import testing

    from .session import hold_gradients

    op = registry.operator(operator)
    try:
        for more in range(8):
            ran, _ = testing.check(op, backend, 50, seed + more)
            if not ran:
                return "not run"
        hold_gradients(op, backend, 60, seed)
    except Unsupported as reason:
        return f"not run: {reason}"
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
        return f"{KILLED} by {type(error).__name__}"
    return SURVIVED


def main(text: str) -> None:
    """Try each mutant of the text in this process, and print its verdict."""
    from . import files

    wish = json.loads(text)
    with tempfile.TemporaryDirectory() as folder:
        for number, said in enumerate(wish["mutants"]):
            mutant = Mutant(**said)
            place = Path(folder) / str(number) / Path(mutant.path).name
            place.parent.mkdir()
            source = Path(mutant.path).read_text(encoding="utf-8")
            edited = mutate(source, mutant.old, mutant.new, mutant.occurrence) if mutant.old else source
            place.write_text(edited, encoding="utf-8")
            backend = mutant.backend
            try:
                if mutant.module:
                    enter(mutant.module, place)
                else:
                    backend = files.offer(str(place))
                    forget()
                found = verdict(mutant.operator, backend, wish["seed"])
            except Exception as error:  # an edit may be noticed as early as that
                found = f"{KILLED} by {type(error).__name__}"
            print(f"{_MARK}{found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
