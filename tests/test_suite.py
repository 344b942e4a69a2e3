"""What a newcomer may expect of the suite itself: no outcome hangs on a draw that cannot be repeated, or on taste."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name != Path(__file__).name)

# Tolerances and seeds of taste, and where they may stand, each for its reason.
TASTE = {
    r"\b(allclose|isclose|assert_allclose|approx)\(": {
        "test_muon.py": "steps of an optimizer, seeded: an iteration that amplifies what it is given",
        "test_torch_ops.py": "gradients in half precision, to show that they are no other function's",
    },
    r"\bassert_close\((?!.*\batol=BOUND\b)": {
        "test_opinfo.py": "of whole numbers, where it is equality",
        "backendbench_judge.py": "by another project's tolerance, whose blindness is what is shown",
    },
    r"\b(default_rng\(\)|SystemRandom\(|Random\(\)|(?<!\.)\bGenerator\(\)(?!\.manual_seed))": {
        "conftest.py": "the seed of a run"
    },
}


@pytest.mark.parametrize("pattern", TASTE, ids=("tolerances", "assert_close", "draws"))
def test_comparisons_have_computed_bounds_and_draws_have_seeds(pattern):
    found = {path.name for path in FILES if re.search(pattern, path.read_text())}
    assert found <= TASTE[pattern].keys(), "use testing.assert_of or assert_near, whole numbers, or the fixture rng"


@pytest.mark.drawn
def test_a_seed_repeats_every_draw(tmp_path):
    """NumPy's, torch's and hypothesis's; another seed or another test draws otherwise; a failure says how to repeat."""
    for name in ("conftest.py", "interpreter.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "test_draws.py").write_text(
        "import random, torch\n"
        "from hypothesis import given, strategies as st\n"
        "def show(*draws): print('drew', *draws)\n"
        "def test_one(rng): show(random.random(), torch.rand(1).item(), rng.random())\n"
        "def test_other(rng): show(random.random(), torch.rand(1).item(), rng.random())\n"
        "@given(st.integers(0, 1 << 60))\n"
        "def test_examples(n): show(n)\n"
        "def test_wrong(): assert False\n"
    )

    def run(*options):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-s",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            *options,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    def draws(text):
        return re.findall(r"drew (.*)", text)

    first, again, other = run("--seed", "3"), run("--seed", "3"), run("--seed", "4")
    assert len(draws(first)) > 10
    assert draws(first) == draws(again)
    assert not set(draws(first)[:2]) & set(draws(other)[:2])
    assert draws(first)[0] != draws(first)[1]
    assert re.search(r"pytest --seed 3 '.*test_draws.py::test_wrong'", first)
    assert "draws: --seed 4" in other
