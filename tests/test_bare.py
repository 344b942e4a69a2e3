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


def test_a_missing_compiler_is_said(tmp_path):
    places = {"PATH": str(tmp_path), "FLAGOPS_CACHE": str(tmp_path)}
    done = run(FOLDER / "run.py", "--models", "vit", **places)
    assert done.returncode == 1
    assert "g++" in done.stderr
    assert "ninja" in done.stderr
    assert shutil.which("g++"), "no compiler: the bare device is not tested here"
