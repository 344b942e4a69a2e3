"""Backends in packages of others, laid out as the protocol has said since 0.1.0; when compiled code is stale; and what
flagops relies on in numba, on processors and releases of every kind."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from flagops.kernels.numba import _amx

import flagops
from flagops.__main__ import main
from flagops.backends import numba

sys.path.insert(0, str(Path(__file__).parent))
import other_versions

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


def run(script, folder, words=(), **environment):
    """In a process of its own, at a folder that comes first on its path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOPS_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean | environment,
    )


@pytest.mark.drawn
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


@pytest.mark.drawn
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
    compiled += [tmp_path / "flagops/backends" / name for name in ("_team.py", "_numba_internals.py")]
    others = [tmp_path / name for name in ("kernels/torch/norm.py", "kernels/triton/_common.py", "flagops/config.py")]
    script = f"""
        from pathlib import Path
        from flagops.backends import numba
        folder = lambda: numba._folder(numba.backend.kernels)
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


PROMISED = {
    "numba": None,  # all that it holds
    "numba.types": None,
    "numba.extending": None,
    "numba.core": {"cgutils", "types", "event"},
    "numba.core.cgutils": None,
    "numba.core.types": None,
    "llvmlite": None,
    "llvmlite.binding": None,
    "llvmlite.ir": None,
}
"""What the documentation of numba and llvmlite describes."""
WITHIN = {
    "_cache", "_compiler", "active_code_library", "add_linking_library", "call_internal", "call_internal_no_propagate",
    "codegen", "fndesc", "get_call_template", "get_compile_result", "magic_tuple", "overloads", "target_context",
    "targetctx", "targetdescr",
}  # fmt: skip
"""Attributes of numba's objects that it does not describe."""


def unpromised(source):
    """What a module uses of numba that numba does not promise."""
    if "numba" not in source and "llvmlite" not in source:
        return []
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name not in PROMISED]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {alias.name for alias in node.names}
            promised = PROMISED.get(node.module, set())
            if promised is not None:
                found += [f"{node.module}.{name}" for name in names - promised]
    found = [name for name in found if name.split(".")[0] in ("numba", "llvmlite")]
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found + (sorted(attributes & WITHIN) if "numba" in source else [])


def test_what_numba_does_not_promise_stands_in_one_file():
    files = [path for folder in ("flagops", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    users = {path.relative_to(ROOT).as_posix(): unpromised(path.read_text()) for path in files}
    assert len(users) > 100
    assert {path for path, used in users.items() if used} == {"flagops/backends/_numba_internals.py"}, users
    for source in (
        "import numba.core.caching",
        "from numba.core import typing",
        "from numba.core.typing.templates import infer",
        "import numba\nnumba.njit(f)._cache",
    ):
        assert unpromised(source), source
    assert not unpromised("from numba.core import types\nfrom numba.extending import intrinsic\nimport numba")


def test_the_self_test_names_what_has_changed(monkeypatch):
    from flagops.backends import _numba_internals as internals

    assert numba.backend.self_test() == dict.fromkeys(
        ("release", "target", "code library", "address", "cache", "types", "locks")
    )

    def changed(*arguments):
        raise AttributeError("gone")

    def found():
        return {name for name, wrong in numba.backend.self_test().items() if wrong}

    for owner, name, failing in (
        (internals, "NEWEST", {"release"}),
        (internals, "target", {"target"}),
        (internals, "link", {"code library"}),
        (internals.CompileResult, "_rebuild", {"cache"}),
        (internals.CompileResult, "_reduce", {"cache"}),
        (internals, "_locks", {"locks"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, (0, 1) if name == "NEWEST" else changed)
            assert found() == failing, name
    with monkeypatch.context() as patch:
        patch.setattr(internals, "call", lambda context, builder, function, values: builder.not_(values[0].type(0)))
        assert "code library" in found()
    with monkeypatch.context() as patch:
        patch.setattr(internals, "_acquire", lambda: None)
        assert "locks" in found()


def test_doctor_shows_the_self_test(monkeypatch, capsys):
    from flagops.backends import _numba_internals as internals

    def said(code):
        assert main(["doctor", "--json"]) == code
        return json.loads(capsys.readouterr().out)["backends"]["numba"]["self_test"]

    good = said(0)
    assert not any(good.values())
    monkeypatch.setattr(internals, "_locks", lambda: 1 / 0)
    assert said(1) == good | {"locks": "ZeroDivisionError: division by zero"}


def test_the_bounds_are_those_that_are_tried():
    from flagops.backends import _numba_internals as internals

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"numba>={'.'.join(map(str, internals.OLDEST))}" in needed
    tried = [tuple(map(int, version.split(".")[:2])) for version in other_versions.LIBRARIES["numba"].versions]
    assert (min(tried), max(tried)) == (internals.OLDEST, internals.NEWEST)


def test_a_numba_that_does_not_fit_is_a_reason(tmp_path):
    script = """
        import sys, types
        import numba
        from flagops.backends.numba import backend
        if "numba.core.compiler_lock" == sys.argv[1]:
            sys.modules[sys.argv[1]] = types.ModuleType("other")
        else:
            numba.__version__ = sys.argv[1]
        print(backend.unavailable())
    """
    for change, reason in (
        ("0.61.2", "numba 0.61.2 is older than 0.62"),
        ("0.62.0", "None"),
        ("1.0.0rc1", "None"),
        ("numba.core.compiler_lock", f"numba {version('numba')} has not what flagops needs of it: cannot import name"),
    ):
        done = run(script, tmp_path, words=(change,))
        assert done.stdout.startswith(reason), (change, done.stdout, done.stderr)


def test_numba_that_may_not_compile_is_a_reason(tmp_path):
    script = """
        import numpy, flagops
        print(flagops.matmul(numpy.ones((2, 3)), numpy.ones((3, 2)))[0, 0])
        flagops.matmul(numpy.ones((2, 3)), numpy.ones((3, 2)), backend="numba")
    """
    done = run(script, tmp_path, NUMBA_DISABLE_JIT="1")
    assert done.stdout == "3.0\n", done.stderr
    assert "NUMBA_DISABLE_JIT is set" in done.stderr.splitlines()[-1]


PROCESSORS = {
    "haswell": ("+avx2,+fma,+f16c", 8, "ymm", "zmm"),
    "nehalem": ("+sse4.2,+popcnt", 4, "xmm", "ymm"),
}


@pytest.mark.drawn
@pytest.mark.skipif("+sse2" not in numba.features(), reason="not an x86")
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_with_narrower_registers(name, tmp_path):
    """Each is what the code was made for, and computes the same; without F16C float16 alone is refused."""
    features, lanes, used, unused = PROCESSORS[name]
    script = f"""
        import flagops, ml_dtypes, numpy
        from flagops.backends import numba
        from flagops.kernels.numba import _gemm, _ir
        assert numba.backend.facts()["cpu"] == {name!r}
        assert _ir.LANES == {lanes}, _ir.LANES
        a, b = numpy.random.default_rng({int.from_bytes(os.urandom(3))}).integers(-8, 9, (2, 70, 70)).astype("f")
        for right in (b, b.T):
            assert (flagops.matmul(a, right, backend="numba") == a @ right).all()
        codes, one = numpy.arange(256, dtype=numpy.uint8).reshape(2, 128), numpy.ones((1, 1), "f")
        codes[:, -1] = 0  # in place of NaN
        identity = 0x38 * numpy.eye(128, dtype=numpy.uint8)
        got = flagops.fp8_matmul(identity, one.repeat(128, 0), codes, one, "float32", backend="numba")
        assert (got == codes.view(ml_dtypes.float8_e4m3fn).astype("f").T).all()
        draw = numpy.random.default_rng(0).standard_normal
        q, k, v = (draw((1, heads, rows, 17), "f") for heads, rows in ((2, 130), (1, 300), (1, 300)))
        both = [flagops.scaled_dot_product_attention(q, k, v, backend=name) for name in ("numba", "numpy")]
        assert abs(both[0] - both[1]).max() < 1e-5  # rows that no tile is filled by, after a block of keys
        code = "".join(text for kernel in (_gemm._dot, _gemm._outer) for text in kernel.inspect_asm().values())
        assert "%{used}" in code and "%{unused}" not in code
        half = numpy.ones((2, 2), numpy.float16)
        try:
            print(flagops.matmul(half, half, backend="numba").sum())
        except flagops.Unsupported as reason:
            print(str(reason).splitlines()[-1])
    """
    done = run(script, tmp_path, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features, FLAGOPS_CACHE=os.devnull)
    expected = "8.0" if "+f16c" in features else "numba: a: the processor has no float16 conversions (F16C)"
    assert done.stdout.strip() == expected, done.stdout + done.stderr


UNITS = {
    "tiles": {},
    "pairs": {"NUMBA_CPU_NAME": "x86-64-v4", "NUMBA_CPU_FEATURES": "+avx512f,+avx512bw,+avx512vl,+avx512bf16"},
    "none": {"NUMBA_CPU_NAME": "x86-64-v4", "NUMBA_CPU_FEATURES": "+avx512f,+avx512bw,+avx512vl"},
}
"""What multiplies bfloat16, and the mask that leaves it."""


@pytest.mark.drawn
@pytest.mark.skipif("+avx512bf16" not in numba.features(), reason="no AVX512-BF16")
@pytest.mark.parametrize("units", UNITS)
def test_bfloat16_is_multiplied_by_the_units_that_are_not_masked(units, tmp_path):
    """All ways keep the bound that they declare, for products of subnormals too, which only one of them keeps."""
    script = f"""
        import flagops, ml_dtypes, numpy, sys
        from flagops import registry
        from flagops.judge.comparison import compare
        from flagops.kernels.numba import _amx, _gemm
        if {units == "tiles"} and not _amx.TILES:
            sys.exit("no tiles")
        rng = numpy.random.default_rng({int.from_bytes(os.urandom(3))})
        kernel = registry.find("matmul", "numba")
        assert kernel.paired == {units != "none"}
        assert _amx.TILES == {units == "tiles"}
        for m, n, k in (9, 9, 2100), (33, 50, 130), (1, 70, 31), (70, 1, 64), (600, 900, 40):
            a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((m, k), (n, k)))
            for left, right in (a, b.T), (a, b.T.copy()), (a.T.copy().T, b.T):
                got = flagops.matmul(left, right, backend="numba")
                compare(registry.operator("matmul"), dict(a=left, b=right), got, paired=kernel.paired)
        x = rng.standard_normal((40, 256)).astype(ml_dtypes.bfloat16)
        codes, scale = rng.integers(0, 256, (70, 128), numpy.uint8), rng.integers(120, 130, (70, 8), numpy.uint8)
        given = None, codes, scale.view(ml_dtypes.float8_e8m0fnu), "float32"
        rows, fp4 = flagops.fp4_matmul(x, *given, backend="numba"), registry.operator("fp4_matmul")
        compare(fp4, dict(zip(fp4.inputs, (x, *given))), rows, paired=registry.find("fp4_matmul", "numba").paired)
        for m in 1, 3, 16, 17, 33:
            assert (flagops.fp4_matmul(x[:m], *given, backend="numba") == rows[:m]).all()
        small = numpy.full((1, 2), 2.0**-127).astype(ml_dtypes.bfloat16)
        large = (1 / small.T).astype(ml_dtypes.bfloat16)
        assert flagops.matmul(small, large, backend="numba")[0, 0] == (2 if {units == "none"} else 0)
        kernels = [_gemm._grids] if _amx.TILES else [_gemm._dot, _gemm._outer]
        code = [text for kernel in kernels for text in kernel.inspect_asm().values()]
        word = dict(tiles="tdpbf16ps", pairs="vdpbf16ps").get({units!r}, "bf16ps")
        assert len(code) == len(kernels) and all((word in text) == kernel.paired for text in code)
    """
    done = run(script, tmp_path, FLAGOPS_CACHE=os.devnull, **UNITS[units])
    if "no tiles" in done.stderr:
        pytest.skip("the processor has no tile registers, or Linux does not lend them")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not _amx.TILES, reason="no tile registers")
def test_tiles_are_left_as_they_were_found(rng):
    """oneDNN remembers the shape that it gave a thread's registers: its products and ours alternate."""
    pairs = [(torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for m, n, k in ((40, 70, 96), (5, 33, 200))]
    alone = [torch.nn.functional.linear(*pair) for pair in pairs]
    for _ in range(20):
        for pair, before in zip(pairs, alone, strict=True):
            flagops.linear(*pair, backend="numba")
            assert torch.equal(torch.nn.functional.linear(*pair), before)


@pytest.mark.drawn
def test_kernels_lower_to_neon():
    """As they would be compiled on an aarch64: with fused multiply-adds, and without a call for one."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "lowering.py", "rms_norm", "fp8_dequantize", "int8_matmul"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(counts["calls"] and counts["vectors"] for counts in found.values()), found
    assert found["rms_norm"]["fused vectors"] > found["fp8_dequantize"]["fused vectors"] == 0
    assert found["int8_matmul"]["dot products"] > found["rms_norm"]["dot products"] == 0


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_what_torchs_library_misreads_is_copied(name):
    """Products of depth 1: MKL ends the process on some processors where a vector's elements are 2 GiB apart."""
    dtype = getattr(torch, name)
    step = (1 << 31) // dtype.itemsize + 2048
    weight = torch.empty(2 * step + 1, dtype=dtype).as_strided((3, 1), (step, 1))
    weight.copy_(torch.randint(-9, 9, (3, 1)))
    x, bias = torch.randint(-9, 9, (63, 1)).to(dtype), torch.randint(-9, 9, (3,)).to(dtype)
    assert torch.equal(flagops.linear(x, weight, bias, backend="torch"), x * weight.mT + bias)
    assert torch.equal(flagops.matmul(x, weight.mT, backend="torch"), x * weight.mT)
    assert torch.equal(flagops.matmul(weight, x.mT, backend="torch"), weight * x.mT)
