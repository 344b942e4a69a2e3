"""The suite must notice small edits of the real kernels; those that no result can tell apart are listed with why.

A run draws a few, each of another kernel file, from its seed; ``make mutants`` tries all.
"""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import registry

SCRIPT = Path(__file__).with_name("mutants.py")
_spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
mutants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutants)


def verdicts(backend, chosen, **environment):
    """The lines of as many processes as it takes: a mutant may end the one that runs it, which is noticing it too."""
    found, todo = {}, [f"{file}:{index}" for file, index in chosen]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))} | environment
    while todo:
        command = [sys.executable, "-W", "ignore", str(SCRIPT), backend, *todo]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=60 * len(todo) + 300)
        for line in done.stdout.splitlines():
            name, _, said = line.partition(" ")
            found[name] = said or f"crashed ({done.returncode})"
        assert todo[0] in found, done.stderr
        todo = [name for name in todo if name not in found]
    return found


@pytest.mark.parametrize(
    ("backend", "share"), [("numba", 0), ("numba", 1), ("torch", 0), ("triton", 0), ("triton", 1)]
)  # some files a process: importing everything costs as much as two mutants
def test_mutants_are_killed(backend, share, request):
    wanted = request.config.getoption("--mutants")
    files = sorted(file for file in mutants.MUTANTS if mutants.backend_of(file) == backend)
    files = files if backend == "torch" else files[share::2]
    if wanted == "all":
        chosen = [(file, index) for file in files for index in range(len(mutants.MUTANTS[file]))]
    else:
        telling = {f: [i for i in range(len(mutants.MUTANTS[f])) if (f, i) not in mutants.EQUIVALENT] for f in files}
        telling = {file: indices for file, indices in telling.items() if indices}
        some = random.sample(sorted(telling), min(int(wanted), len(telling)))
        chosen = [(file, random.choice(telling[file])) for file in some]
    survivors = [
        (mutants.MUTANTS[file][int(index)][:3], said)
        for (file, _, index), said in ((name.partition(":"), said) for name, said in verdicts(backend, chosen).items())
        if not said.startswith(("killed", "crashed")) and (file, int(index)) not in mutants.EQUIVALENT
    ]
    assert not survivors


# Of torch's own operators: no mutants of these have been tried yet.
UNTRIED = {
    "numba/_elementwise.py", "numba/_fold_bodies.py", "numba/_numbers.py", "numba/_reduce.py", "numba/_routines.py",
    "numba/_row_loops.py", "numba/_terms.py", "numba/pointwise.py", "triton/_elementwise.py", "triton/_spelling.py",
    "triton/_words.py", "triton/movement.py", "triton/optimizer.py", "triton/pointwise.py", "triton/reductions.py",
    "triton/rows.py",
}  # fmt: skip


def test_every_kernel_file_has_mutants():
    """A family's follow from its syntax where none are listed; a helper's are listed."""
    without = {"numba/qmatmul.py", *UNTRIED}  # the first only names what _qmatmul does
    # no tile changes a result, here no kernel is rewritten, and without its source none runs
    without |= {"triton/_room.py", "triton/_older.py", "triton/_source.py"}
    folder = mutants.kernels()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert files - without == {file for file, edits in mutants.MUTANTS.items() if edits}
    listed = [file for table in mutants.TABLES for file in table["MUTANTS"]]
    assert len(listed) == len(set(listed)), "two tables name one file"
    assert {file for file, _ in mutants.EQUIVALENT} <= set(mutants.MUTANTS)


@pytest.mark.parametrize("file", mutants.MUTANTS)
def test_every_edit_is_one_of_its_file(file):
    source = (mutants.kernels() / file).read_text()
    for operator, *edit in mutants.MUTANTS[file]:
        assert registry.written(operator, mutants.backend_of(file))
        assert mutants.mutate(source, *edit) != source, edit
