"""The suite must notice small edits of the real kernels; those that no result can tell apart are listed with why.

A run draws a few of each kernel file, other ones each time; ``make mutants`` tries all.
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


def verdicts(file, chosen):
    """The lines of as many processes as it takes: a mutant may end the one that runs it, which is noticing it too."""
    found = {}
    todo = list(chosen)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    while todo:
        command = [sys.executable, "-W", "ignore", str(SCRIPT), file, *map(str, todo)]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=1500)
        for line in done.stdout.splitlines():
            index, _, said = line.partition(": ")
            found[int(index)] = said or f"crashed ({done.returncode})"
        assert todo[0] in found, done.stderr
        todo = [index for index in todo if index not in found]
    return found


@pytest.mark.parametrize("file", mutants.MUTANTS)
def test_mutants_are_killed(file, request):
    wanted, every = request.config.getoption("--mutants"), range(len(mutants.MUTANTS[file]))
    chosen = every if wanted == "all" else random.SystemRandom().sample(every, min(int(wanted), len(every)))
    survivors = {
        index: said
        for index, said in verdicts(file, chosen).items()
        if not said.startswith(("killed", "crashed")) and (file, index) not in mutants.EQUIVALENT
    }
    assert not survivors, {mutants.MUTANTS[file][index][:3]: said for index, said in survivors.items()}


def test_every_kernel_file_has_mutants():
    # every numba kernel runs through _simd and _attention_simd; two files only name what _gemm and _qmatmul do
    without = {f"numba/{name}.py" for name in ("_simd", "_attention_simd", "matmul", "qmatmul")}
    folder = mutants.kernels()
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} - without == set(mutants.MUTANTS)
    assert sum(len(table["MUTANTS"]) for table in mutants.TABLES) == len(mutants.MUTANTS), "two tables name one file"
    assert {file for file, _ in mutants.EQUIVALENT} <= set(mutants.MUTANTS)


@pytest.mark.parametrize("file", mutants.MUTANTS)
def test_every_edit_is_one_of_its_file(file):
    source = (mutants.kernels() / file).read_text()
    for operator, *edit in mutants.MUTANTS[file]:
        assert registry.written(operator, mutants.backend_of(file))
        assert mutants.mutate(source, *edit) != source, edit
