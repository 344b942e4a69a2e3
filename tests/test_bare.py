"""The bare device and the models run on it, in processes of their own: a device cannot be taken back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("bare")


def run(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("file", ["checks.py", pytest.param("products.py", marks=pytest.mark.drawn)])
def test_the_device(file, request):
    """Memory, views, copies, storages, seeds, autocast, and what has no kernel; products of every kind."""
    options = ("-q", "-p", "no:cacheprovider", "--seed", request.config.option.seed)
    done = run("-m", "pytest", *options, FOLDER / file, PYTHONPATH=str(FOLDER.parent))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.drawn
def test_models_run_with_the_cpu_s_kernels_and_stop_without():
    """With the fallback each phase gives what the CPU gives; without flagops and without it the first call is named."""
    rows = ("--models", "qwen2,vit", "--phases", "forward,greedy,train-foreach")
    done = run(FOLDER / "run.py", *rows, "--fallback", "count", "--backend", "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aten::mul.out" in done.stdout
    done = run(FOLDER / "run.py", *rows, "--backend", "numba")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(FOLDER / "run.py", *rows, "--backend", "")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no index_select" in done.stdout
    assert "no convolution_overrideable" in done.stdout


LISTS = """
import bare, torch, flagops
from flagops.errors import Unsupported
bare.load()
torch.bare.host_memory = True
called, library = [], torch.library.Library("aten", "IMPL")
def vendors(name):
    def compute(tensors, *rest): called.append(name); return list(tensors)
    library.impl(name, compute, "PrivateUse1")
for name in ("_foreach_add.Scalar", "_foreach_addcmul.Scalar", "_foreach_tan"): vendors(name)
def run():
    called.clear()
    return torch._foreach_add(x, 2.0), torch._foreach_addcmul(x, x, x, 3.0)
x = [torch.ones(3).to("bare"), torch.ones(2, 2).to("bare")]
with flagops.enable(backend="numba", strict=True) as handle:
    sums, products = run()
    try: torch._foreach_tan(x)
    except Unsupported as error: assert "_foreach_tan" in str(error)
    else: raise AssertionError("the device's own kernel computed under strict")
assert called == [], called
assert [y.cpu().unique().tolist() for y in (*sums, *products)] == [[3.0]] * 2 + [[4.0]] * 2
rows = {row.op: sum(row.replaced.values()) for row in handle.report().rows}
assert rows["aten::add.Scalar"] == rows["aten::addcmul"] == 2, rows
run()
assert called == ["_foreach_add.Scalar", "_foreach_addcmul.Scalar"], called
with flagops.enable("default,-add", backend="numba"):
    run()
assert called == ["_foreach_add.Scalar"], called
"""


def test_lists_of_tensors_are_computed_one_by_one_before_a_device_s_own_kernels():
    done = run("-W", "ignore", "-c", LISTS, PYTHONPATH=str(FOLDER.parent))
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_said(tmp_path):
    places = {"PATH": str(tmp_path), "FLAGOPS_CACHE": str(tmp_path)}
    done = run(FOLDER / "run.py", "--models", "vit", **places)
    assert done.returncode == 1
    assert "g++" in done.stderr
    assert "ninja" in done.stderr
    assert shutil.which("g++"), "no compiler: the bare device is not tested here"
