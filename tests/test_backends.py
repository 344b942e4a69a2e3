"""Backends in packages of others, laid out as the protocol has said since 0.1.0; and when compiled code is stale."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import flagops

ROOT = Path(__file__).parents[1]

PACKAGE = {
    "oldchip/__init__.py": "",
    "oldchip/_units.py": "UNIT = 1.0\n",
    "oldchip/flagops_backend.py": """
        import numpy

        class Backend:
            name = "oldchip"
            kernels = "oldchip.kernels"
            dispatch_keys = ()

            def unavailable(self):
                return None

            def refuses(self, array):
                return None if isinstance(array, numpy.ndarray) else "takes NumPy arrays"

            def facts(self):
                return {"version": "1"}

            def synchronize(self):
                pass

        backend = Backend()
    """,
    "oldchip/kernels/__init__.py": "",
    "oldchip/kernels/_words.py": """
        from flagops.backends.numba import jit

        @jit
        def times(x, y):
            return x * y * 1.0
    """,
    "oldchip/kernels/norm_oldchip.py": "ONE = 1.0\n",
    "oldchip/kernels/matmul_oldchip.py": """
        import numpy

        from flagops.backends.numba import jit

        from .._units import UNIT
        from ._words import times
        from .norm_oldchip import ONE

        @jit
        def scaled(values):
            for i in range(len(values)):
                values[i] = times(values[i], UNIT * ONE) * 1.0

        def matmul(a, b, out):
            found = numpy.ascontiguousarray(a.astype(float) @ b.astype(float))
            scaled(found.reshape(-1))
            out[...] = found.astype(out.dtype)
    """,
    # the package's own, no kernels: a family's name alone says nothing in a package of others
    "oldchip/kernels/quantize.py": """
        def fp8_quantize(x, block, scale_format, out):
            raise SystemExit("no kernel")
    """,
    "oldchip-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: oldchip\nVersion: 1\n",
    "oldchip-1.dist-info/entry_points.txt": "[flagops.backends]\noldchip = oldchip.flagops_backend\n",
}


@pytest.fixture
def oldchip(tmp_path):
    """An installed package that was written for flagops 0.1.0."""
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "site"


def run(script, folder, **environment):
    """In a process of its own, at a folder that comes first on its path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOPS_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean | environment,
    )


def test_a_package_written_for_the_first_release(oldchip, tmp_path):
    script = """
        import numpy, flagops
        from flagops import registry
        from flagops.__main__ import main
        assert registry.home("matmul", "oldchip") == "oldchip.kernels.matmul_oldchip"
        assert [op for op in registry.operators() if registry.written(op, "oldchip")] == ["matmul"]
        a = numpy.ones((2, 128), numpy.float32)
        assert flagops.matmul(a, a.T, backend="oldchip").tolist() == [[128, 128], [128, 128]]
        assert flagops.coverage("matmul")["calls"] == {"oldchip": 1}
        assert main(["check", "matmul", "--backend", "oldchip", "--examples", "20"]) == 0
        flagops.fp8_quantize(a, backend="oldchip")
    """
    done = run(script, oldchip, FLAGOPS_CACHE=str(tmp_path / "cache"))
    assert "oldchip has no kernel for fp8_quantize" in done.stderr, done.stderr


def test_its_compiled_code_is_never_older_than_what_it_calls(oldchip, tmp_path):
    """Each edit changes the result by its factor: of the kernel, a helper, a sibling family, and the package above."""
    script = "import numpy, flagops; print(flagops.matmul(*[numpy.ones((1, 1))] * 2, backend='oldchip')[0, 0])"
    expected = 1.0
    for file, factor in (
        ("", 1),
        ("kernels/matmul_oldchip.py", 2),
        ("kernels/_words.py", 3),
        ("kernels/norm_oldchip.py", 5),
        ("_units.py", 7),
    ):
        if file:
            path = oldchip / "oldchip" / file
            path.write_text(path.read_text().replace("1.0", f"{factor}.0"))
        expected *= factor
        done = run(script, oldchip, FLAGOPS_CACHE=str(tmp_path / "cache"))
        assert done.stdout == f"{expected}\n", (file, done.stdout, done.stderr)
    assert list((tmp_path / "cache").rglob("*.nbc")), "nothing was cached"


def test_an_edited_source_means_another_cache_folder(tmp_path):
    """For our own kernels: each file they can compile, and no other."""
    if not (ROOT / "kernels").is_dir() or Path(flagops.__file__).parents[1] != ROOT:
        pytest.skip("not a checkout")
    for folder in ("flagops", "kernels", "reference"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    compiled = [*(tmp_path / "kernels/numba").glob("*.py"), *(tmp_path / "kernels").glob("*.py")]
    compiled.append(tmp_path / "flagops/backends/_team.py")
    others = [tmp_path / name for name in ("kernels/torch/norm.py", "kernels/triton/_common.py", "flagops/config.py")]
    script = f"""
        from pathlib import Path
        from flagops.backends import numba
        folder = lambda: numba._cache_folder.__wrapped__(numba.backend.kernels)
        def edited(path):
            before = folder()
            Path(path).write_text(Path(path).read_text() + "# edited")
            return before != folder()
        assert {str(tmp_path)!r} in numba.__file__
        print([path for path in {[*map(str, compiled)]} if not edited(path)])
        print([path for path in {[*map(str, others)]} if edited(path)])
    """
    done = run(script, tmp_path, FLAGOPS_CACHE=str(tmp_path / "cache"))
    assert done.stdout == "[]\n[]\n", done.stdout + done.stderr
