import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flagops.tools.bisect import bisect, distance

CROOKED = '''
class backend:
    """A backend whose linear is wrong for 7 columns and whose matmul ends the process for 13."""
    name, dispatch_keys = "crooked", ("CPU",)

    @staticmethod
    def kernels(operator):
        def matmul(a, b, out):
            if out.shape[-1] == 13:
                raise SystemExit(3)
            out.copy_(a @ b)

        def linear(x, weight, bias, out):
            out.copy_(x @ weight.t() + bias + (len(weight) == 7))

        return {"matmul": matmul, "linear": linear}.get(operator.name)

    @staticmethod
    def unavailable():
        return None

    @staticmethod
    def refuses(array):
        return None

    @staticmethod
    def facts():
        return {}

    @staticmethod
    def synchronize():
        pass
'''

SCRIPT = """
import sys
assert "torch" not in sys.modules, "the script comes first"
assert sys.path[0] == __import__("os").path.dirname(__file__)
import torch
x = torch.ones(2, 4)
for n in map(int, sys.argv[1:]):
    y = torch.nn.functional.linear(x, torch.ones(n, 4), torch.ones(n))
    y @ y.t()
    print(n, y.tolist())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "crooked.py").write_text(CROOKED)
    info = tmp_path / "crooked-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crooked\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[flagops.backends]\ncrooked = crooked:backend\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), root, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("FLAGOPS_BACKEND", "crooked")
    return tmp_path


@pytest.mark.drawn
def test_finds_the_call_that_changes_the_output(folder, capfd):
    assert bisect([str(folder / "script.py"), "2", "3", "7", "5"]) == 1
    out = capfd.readouterr().out
    assert "8 replaced calls, exit code 0; without them 0" in out
    assert "call 5 of 8 changes the result: aten::addmm(float32[7], float32[2, 4], float32[4, 7])" in out
    assert "replaced by linear/crooked; leave it out with FLAGOPS_OPS=all,-addmm" in out


@pytest.mark.drawn
def test_finds_the_call_that_changes_the_exit_code(folder, capfd):
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("y @ y.t()", "y.t() @ y").replace("print(n, y.tolist())", ""))
    assert bisect([str(script), "2", "13", "7", "13"]) == 1
    out = capfd.readouterr().out
    assert "exit code 3; without them 0" in out
    assert "call 4 of 4 changes the result: aten::mm(float32[13, 2], float32[2, 13])" in out


@pytest.mark.drawn
def test_what_is_left_out_changes_nothing(folder, capfd, monkeypatch):
    monkeypatch.setenv("FLAGOPS_OPS", "default,-addmm")
    assert bisect([str(folder / "script.py"), "2", "7"]) == 0
    assert "2 replaced calls" in capfd.readouterr().out


def test_of_a_script_without_replaced_calls_nothing_is_known(folder, capfd):
    script = folder / "other.py"
    script.write_text("print('hello')")
    assert bisect([str(script)]) == 2
    said = capfd.readouterr().out
    assert "0 replaced calls" in said
    assert "nothing is known" in said
    assert "no replacement changes" not in said


def test_a_script_that_is_not_reproducible(folder, capfd):
    script = folder / "random.py"
    script.write_text("import os\nprint(os.getpid())")
    assert bisect([str(script)]) == 2
    assert "not reproducible" in capfd.readouterr().out


@pytest.mark.drawn
def test_a_script_that_fails_by_itself(folder, capfd):
    script = folder / "fails.py"
    script.write_text("import torch\ntorch.ones(2, 2) @ torch.ones(2, 2)\nraise SystemExit(4)")
    assert bisect([str(script)]) == 0
    assert "exit code 4; without them 4" in capfd.readouterr().out


def test_run_is_the_script_with_replacements(folder):
    code = "import sys\nfrom flagops.tools.bisect import run\nrun(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder / "script.py"), "7"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0
    assert "aten::mm" in result.stderr, result.stderr
    assert "calls replaced" in result.stderr
    assert result.stdout == f"7 {[[6.0] * 7] * 2}\n"


@pytest.mark.drawn
def test_rounding_is_no_change_and_the_bound_is_the_users(folder, capfd):
    (folder / "crooked.py").write_text(CROOKED.replace("(len(weight) == 7)", "1e-5 * (len(weight) == 7)"))
    script = str(folder / "script.py")
    assert bisect([script, "7"]) == 0
    assert re.search(r"numbers within \d\S+ \(--within 0.0001\)", capfd.readouterr().out)
    assert bisect(["--within", "1e-7", script, "7"]) == 1
    said = capfd.readouterr().out
    assert "apart, more than --within 1e-07" in said
    assert "call 1 of 2 changes the result: aten::addmm" in said


@pytest.mark.parametrize(
    ("one", "two", "apart"),
    [
        ("loss 1.25 at 10", "loss 1.25 at 10", 0),
        ("loss 2.0", "loss 2.5", 0.2),
        ("a 100.0 b 0.001", "a 100.0 b 0.003", (0.003 - 0.001) / 100),  # a small one may be what cancels
        ("1.5e-05", "1.2e-05", (1.5e-05 - 1.2e-05) / 1.5e-05),
        ("tensor([0.1234])", "tensor([0.1235])", 0),  # the last digit printed
        ("6.0", "6.5", 0.5 / 6.5),  # all its digits, so no rounding of the last
        ("token 12", "token 13", math.inf),
        ("loss 1.0", "less 1.0", math.inf),
        ("1.0 nan", "1.0 2.0", math.inf),
        ("1.0", "1.0\n", math.inf),
        ("1.0 2.0", "1.0", math.inf),
    ],
)
def test_how_far_outputs_lie_apart(one, two, apart):
    assert distance(one, two) == distance(two, one)
    assert distance(one, two) == apart


def test_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        bisect([])
    assert "usage" in capsys.readouterr().err
