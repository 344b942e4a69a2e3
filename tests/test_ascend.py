"""What `make ascend` keeps, and how it reads what Huawei's compilers say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import chips

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ascend.json"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="not a checkout")

sys.path.insert(0, str(ROOT / "benchmarks"))
import ascend  # noqa: E402


@pytest.fixture(scope="module")
def kept():
    return json.loads(RESULTS.read_text())


def test_every_program_reached_a_stage_or_says_why_not(kept):
    assert kept["programs"]
    for program in kept["programs"]:
        assert program["stage"] in ascend.STAGES
        assert bool(program["reason"]) == (program["stage"] != "hivm"), program


def test_the_table_of_chips_says_what_was_reached(kept):
    reached = {program["stage"] for program in kept["programs"]}
    for chip in chips.CHIPS:
        if chip.target == "Ascend910B":
            assert chip.state == ("lowered" if "hivm" in reached else "declared")
            kernels = {program["kernel"] for program in kept["programs"]}
            through = {program["kernel"] for program in kept["programs"] if program["stage"] == "hivm"}
            assert f"{len(through)} of {len(kernels)} Triton kernels" in chip.note


def test_what_models_call_fits_the_unified_buffer(kept):
    """At the tile that is chosen for it; of small drawn cases some do not."""
    assert not [p for p in kept["programs"] if "overflow" in p["reason"] and not p["label"].endswith("drawn")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            'loc("k.mlir":1:1): error: Failed to run BiShengHIR pipeline\n\nloc("k.mlir":2:3): error: ub overflow, '
            "requires 3155200 bits while 1572864 bits available! (possible reason: tiling)\n[INFO]: the cache",
            "ub overflow, requires 3155200 bits while 1572864 bits available!",
        ),
        ("///--[ERROR]\nk.mlir:3:4: error: 'tt.load' op is odd\nk.mlir:9:9: error: later", "'tt.load' op is odd"),
        ("CompilationError: at 20:16:\n   x = f(x)\n       ^\nno such thing", "no such thing"),
        (
            "a-opt: a/b.cpp:20: f(): Assertion `all_of' failed.\n0. Program arguments: /x/a-opt /y\n#0 0x5 (a)",
            "a-opt crashes: Assertion `all_of' failed.",
        ),
        ("error: Failed to run BiShengIR pipeline", "Failed to run BiShengIR pipeline"),
    ],
)
def test_a_reason_is_what_does_not_fit_or_the_first_error(text, reason):
    assert ascend.said(text) == reason


def test_an_environment_without_huaweis_compilers_is_told_what_it_lacks():
    done = subprocess.run([sys.executable, ascend.__file__], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "lacks what docs/ascend.md lists" in done.stderr
