import os
import subprocess
import sys
from pathlib import Path

import pytest

from flagops.tools.bisect import bisect

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


def test_finds_the_call_that_changes_the_output(folder, capfd):
    assert bisect([str(folder / "script.py"), "2", "3", "7", "5"]) == 1
    out = capfd.readouterr().out
    assert "8 replaced calls, exit code 0; without them 0" in out
    assert "call 5 of 8 changes the result: aten::addmm(float32[7], float32[2, 4], float32[4, 7])" in out
    assert "replaced by linear/crooked; leave it out with FLAGOPS_OPS=all,-addmm" in out


def test_finds_the_call_that_changes_the_exit_code(folder, capfd):
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("y @ y.t()", "y.t() @ y").replace("print(n, y.tolist())", ""))
    assert bisect([str(script), "2", "13", "7", "13"]) == 1
    out = capfd.readouterr().out
    assert "exit code 3; without them 0" in out
    assert "call 4 of 4 changes the result: aten::mm(float32[13, 2], float32[2, 13])" in out


def test_what_is_left_out_changes_nothing(folder, capfd, monkeypatch):
    monkeypatch.setenv("FLAGOPS_OPS", "default,-addmm")
    assert bisect([str(folder / "script.py"), "2", "7"]) == 0
    assert "2 replaced calls" in capfd.readouterr().out


def test_a_script_without_torch(folder, capfd):
    script = folder / "other.py"
    script.write_text("print('hello')")
    assert bisect([str(script)]) == 0
    assert "0 replaced calls" in capfd.readouterr().out


def test_a_script_that_is_not_reproducible(folder, capfd):
    script = folder / "random.py"
    script.write_text("import os\nprint(os.getpid())")
    assert bisect([str(script)]) == 2
    assert "not reproducible" in capfd.readouterr().out


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


def test_usage(capsys):
    assert bisect([]) == 2
    assert "usage" in capsys.readouterr().err
