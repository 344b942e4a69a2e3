"""Packaging: what is imported, what is shipped, and what must not be shadowed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flagops
from flagops import registry, stubs

ROOT = Path(__file__).parents[1]
IN_CHECKOUT = (ROOT / "kernels").is_dir() and Path(flagops.__file__).parents[1] == ROOT


def python(script, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, env=clean | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_framework_and_prints_nothing(tmp_path):
    heavy = ["numpy", "ml_dtypes", "torch", "numba", "triton", "llvmlite", "transformers", "rich", "safetensors"]
    script = f"import sys, flagops; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(script, cwd=tmp_path) == "[]"
    assert not list(tmp_path.iterdir())


def test_names_load_their_own_libraries_only():
    assert python("import sys, flagops; flagops.Unsupported, flagops.using; print('numpy' in sys.modules)") == "False"
    numpy_only = (
        "import sys, numpy as np, flagops; a = np.ones((2, 2)); flagops.matmul(a, a, backend='numpy');"
        "print([m for m in ('torch', 'numba', 'triton', 'transformers') if m in sys.modules])"
    )
    assert python(numpy_only) == "[]"


BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise {error}
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("error", ["ModuleNotFoundError(name=name)", "OSError('a library is broken')"])
def test_with_numpy_and_ml_dtypes_alone(error):
    """An absent or broken torch, numba, triton, rich or safetensors is a reason, never an exception."""
    names = {"torch", "numba", "llvmlite", "triton", "rich", "safetensors", "transformers", "hypothesis"}
    hidden = BLOCK.format(names=names, error=error)
    script = hidden + (
        "from flagops.__main__ import main\n"
        "assert main(['doctor']) == 0 and main(['doctor', '--json']) == 0\n"
        "assert main(['ops']) == 0 and main(['ops', '--markdown']) == 0\n"
        "assert main(['check', 'matmul', 'fp4_dequantize', '--examples', '5']) == 0\n"
        "assert main(['check', 'matmul', '--backend', 'numba', '--examples', '5']) == 1\n"
        "assert main(['warmup', '--backend', 'numba']) == 1\n"
        "import numpy as np, flagops\n"
        "print(flagops.matmul(np.ones((2, 3)), np.ones((3, 2)))[0, 0])\n"
    )
    assert python(script).splitlines()[-1] == "3.0"


def test_no_folder_shadows_a_library():
    if not IN_CHECKOUT:
        pytest.skip("not a checkout")
    for folder in ("kernels", "reference", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would make a top-level package"
    for path in (ROOT / "kernels").glob("*.py"):
        assert path.stem not in ("torch", "numba", "triton", "numpy")
    found = python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", cwd=ROOT)
    assert found in ("None", ""), "kernels/ must stay a namespace that a real `kernels` package beats"


def test_transformers_imports_from_the_root():
    pytest.importorskip("transformers")
    script = "import sys, transformers; print([m for m in sys.modules if m.partition('.')[0] == 'kernels'])"
    assert python(script, cwd=ROOT, HF_HUB_OFFLINE="1") == "[]"


def test_a_wheel_holds_one_package_with_everything(tmp_path):
    if not IN_CHECKOUT:
        pytest.skip("not a checkout")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in shipped if ".dist-info" not in name} == {"flagops"}
    for folder, target in (("flagops", "flagops"), ("kernels", "flagops/kernels"), ("reference", "flagops/reference")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / folder)}" in shipped
    assert {"flagops/py.typed", "flagops/__init__.pyi", "flagops/order.json"} <= shipped
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import flagops; assert 'site' in flagops.__file__; from flagops.__main__ import main;"
        "raise SystemExit(main(['check', 'matmul', '--backend', 'numpy', '--backend', 'torch', '--examples', '5']))"
    )
    assert "WRONG" not in python(script, cwd=tmp_path, PYTHONPATH=str(site))


def test_the_stub_is_current():
    assert stubs.PATH.read_text() == stubs.text(), "run python -m flagops.stubs"


def test_every_public_name_loads():
    for name in (*flagops._HOMES, *registry.operators()):
        assert getattr(flagops, name) is not None
        assert name in dir(flagops)
