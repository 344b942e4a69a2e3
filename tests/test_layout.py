"""Packaging: what is imported, what is shipped, and what must not be shadowed."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flagops
from flagops import registry
from flagops._moved import MOVED
from flagops.tools import stubs

ROOT = Path(__file__).parents[1]
IN_CHECKOUT = (ROOT / "kernels").is_dir() and Path(flagops.__file__).parents[1] == ROOT


def python(script, *options, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, cwd=cwd, env=clean | environment
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


@pytest.mark.drawn
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


OPEN = """
import importlib, sys
from importlib.util import find_spec
from pathlib import Path
import flagops
from flagops import registry

kernels = [Path(folder).resolve() for folder in importlib.import_module("flagops.kernels").__path__]
assert not {Path(entry or ".").resolve() for entry in sys.path} & {at for k in kernels for at in (k, *k.iterdir())}
homes = set()
for library in filter(find_spec, ("numba", "torch", "triton")):
    homes |= {registry.home(op, library) for op in registry.operators() if registry.written(op, library)}
    loaded = Path(importlib.import_module(library).__file__).resolve()
    assert not any(loaded.is_relative_to(folder) for folder in kernels), loaded
assert homes
for home in sorted(homes):
    at = Path(importlib.import_module(home).__file__).resolve()
    assert any(at.is_relative_to(folder) for folder in kernels), at
"""
"""Opens every kernel whose library is here, and says which folders and libraries it met."""


@pytest.mark.drawn
def test_no_folder_shadows_a_library(tmp_path):
    """kernels/numba, torch and triton are no packages, and no path leads to them: not even to `kernels`."""
    if not IN_CHECKOUT:
        pytest.skip("not a checkout")
    assert {path.name for path in (ROOT / "kernels").iterdir() if path.is_dir()} >= {"numba", "torch", "triton"}
    for folder in ("kernels", "reference", "tests", "benchmarks"):
        found = [path for path in (ROOT / folder).rglob("__init__.py") if path.parent != ROOT / "tests" / "bare"]
        assert not found, f"{found} would make a top-level package, or one named as a library"
    found = python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)", cwd=ROOT)
    assert found in ("None", ""), "kernels/ must stay a namespace that a real `kernels` package beats"
    exec(OPEN, {})  # as pytest's importlib mode has it
    python(OPEN, cwd=ROOT)
    nearest = OPEN.replace("assert not {Path", "{Path")
    python(nearest, cwd=ROOT / "kernels")  # where a library of the same name is found all the same


def test_transformers_imports_from_the_root():
    pytest.importorskip("transformers")
    script = "import sys, transformers; print([m for m in sys.modules if m.partition('.')[0] == 'kernels'])"
    assert python(script, cwd=ROOT, HF_HUB_OFFLINE="1") == "[]"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution of this checkout; a wheel and an editable installation of what it unpacks to."""
    if not IN_CHECKOUT:
        pytest.skip("not a checkout")
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    build = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
    python(build.format("sdist", str(folder)), cwd=folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    for kind in ("wheel", "editable"):
        (folder / kind).mkdir()
        python(build.format(kind, str(folder / kind)), cwd=source)
        (wheel,) = (folder / kind).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder / kind / "site")
    return source, folder / "wheel" / "site", folder / "editable" / "site"


@pytest.mark.drawn
def test_a_wheel_holds_one_package_with_everything(built):
    source, site, _ = built
    shipped = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    shipped = {name for name in shipped if ".dist-info/" not in name}
    expected = {
        "flagops/py.typed",
        "flagops/__init__.pyi",
        *(f"flagops/train/{path.name}" for path in (ROOT / "flagops" / "train").glob("topics.*")),
        *(f"flagops/orders/{path.name}" for path in (ROOT / "flagops" / "orders").glob("*.json")),
        *(f"flagops/data/small_v4/{path.name}" for path in (ROOT / "flagops" / "data" / "small_v4").iterdir()),
    }
    for folder, target in (("flagops", "flagops"), ("kernels", "flagops/kernels"), ("reference", "flagops/reference")):
        files = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert files == {path.relative_to(source / folder).as_posix() for path in (source / folder).rglob("*.py")}
        expected |= {f"{target}/{name}" for name in files}
    assert shipped == expected
    script = (
        "import flagops; assert 'site' in flagops.__file__; from flagops.__main__ import main;"
        "raise SystemExit(main(['check', 'matmul', '--backend', 'numpy', '--backend', 'torch', '--examples', '5']))"
    )
    assert "WRONG" not in python(script, cwd=site.parent, PYTHONPATH=str(site))


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_installation_opens_every_kernel(built, kind):
    """With nothing on the path but what pip would install and the libraries that are installed here."""
    source, wheel, editable = built
    site, home = (wheel, wheel) if kind == "wheel" else (editable, source)
    libraries = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
    said = "print(Path(flagops.__file__).parents[1].resolve())\nprint(sorted(homes))"
    script = f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {libraries!r}\n{OPEN}{said}"
    found, homes = python(script, "-S", cwd=site.parent).splitlines()
    assert found == str(home.resolve())
    exec(OPEN, here := {})
    assert homes == str(sorted(here["homes"]))


@pytest.mark.parametrize(("name", "room"), sorted(MOVED.items()))
def test_a_module_that_has_moved_is_found_under_its_old_name(name, room):
    pytest.importorskip("torch")
    new = importlib.import_module(f"flagops.{room}.{name}")
    assert importlib.import_module(f"flagops.{name}") is new
    assert new.__spec__.name == new.__name__ == f"flagops.{room}.{name}"
    assert importlib.util.find_spec(f"flagops.{name}").origin == new.__file__


def test_what_was_pickled_before_a_move_loads():
    old = pickle.dumps(flagops.AttentionConfig(), protocol=0).replace(b"flagops.deepseek_v4.cache", b"flagops.cache")
    assert b"cflagops.cache\n" in old
    assert pickle.loads(old) == flagops.AttentionConfig()


def test_a_module_that_has_moved_runs_as_a_command():
    script = "import runpy; print(runpy.run_module('flagops.stubs')['PATH'])"
    assert python(script).strip() == str(stubs.PATH)


def test_the_stub_is_current():
    assert stubs.PATH.read_text() == stubs.text(), "run python -m flagops.tools.stubs"


def test_every_public_name_loads():
    for name in (*flagops._HOMES, *registry.operators()):
        assert getattr(flagops, name) is not None
        assert name in dir(flagops)
