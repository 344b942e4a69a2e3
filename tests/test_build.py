"""`flagops build`: what it writes is what a launch on the chip asks for, which then compiles nothing.

Without the chip a launch goes as far as its driver: Triton specialises the call, asks its cache and hands the binary to
the driver, which stands in here. What a GPU would make of the binary is not tried.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import chips
from flagops.__main__ import main
from flagops.tools import build

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
OPERATORS = ("rms_norm", "hadamard")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


def process(*command, **settings):
    """A process that has a compiler of Triton and none of its interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | settings, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder that was built, and moved, and can only be read."""
    folder = tmp_path_factory.mktemp("build")
    words = ("--target", "sm_90,gfx942", "--model", "v4-flash", "--ops", *OPERATORS, "--size", "batch=17")
    done = process("-m", "flagops", "build", *words, "--out", str(folder / "made"))
    assert done.returncode == 0, done.stderr
    shutil.move(folder / "made", folder / "image")
    permit(folder / "image", 0o500)
    yield folder / "image"
    permit(folder / "image", 0o700)


def permit(folder, mode):
    for place in (folder, *[path for path in folder.rglob("*") if path.is_dir()]):
        place.chmod(mode)


LAUNCHES = """
import hashlib, json, sys
from flagops import chips, registry
from flagops.backends import _built
from flagops.errors import Uncompiled
from flagops.tools import build, programs
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

def never(*_):
    raise AssertionError("the compiler was called")

CUDABackend.add_stages = HIPBackend.add_stages = never

class Driver:
    def __getattr__(self, name):
        return getattr(programs.Absent, name).__get__(self)

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name, binary, shared, device):
        loaded.append([chip.target, name, hashlib.sha256(binary).hexdigest()])
        return None, None, 0, 0, 1024

programs.Absent.utils = Utils()
programs.Absent.launcher_cls = lambda self, source, metadata: lambda *_: None
_built.serve()
loaded, said = [], []
for word in ("h200", "mi300x"):
    chip, = build.compilable([word])
    for name in OPERATORS:
        op = registry.operator(name)
        for label, made in build.calls(op, build.named([op], "v4-flash")[op], DTYPE, [{"batch": 17}]):
            with programs.standing_in(chip):
                try:
                    programs.ready(op, made)()
                except Uncompiled as error:
                    said.append(str(error))
print(json.dumps([loaded, said]))
"""


def launched(folder, dtype=None):
    """The binaries that launches handed to a driver, and what they said where they could not, without any compiler."""
    nowhere = {"PATH": "", "CC": "/dev/null", "TRITON_HOME": "/dev/null"}
    script = f"OPERATORS, DTYPE = {OPERATORS!r}, {dtype!r}\n{LAUNCHES}"
    done = process("-c", script, FLAGOPS_CACHE=str(folder), FLAGOPS_JIT="error", **nowhere)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.drawn
def test_launches_on_the_chip_find_what_was_built_and_compile_nothing(image):
    manifest = json.loads((image / "triton/manifest.json").read_text())
    built = {
        digest
        for program in manifest["programs"].values()
        for name, digest in program["files"].items()
        if not name.endswith(".json")
    }
    before = sorted(image.rglob("*"))
    loaded, said = launched(image)
    assert not said
    assert {target for target, _, _ in loaded} == {"sm_90", "gfx942"}
    assert {digest for _, _, digest in loaded} <= built
    assert {name for _, name, _ in loaded} == {"norm_kernel", "hadamard_kernel"}
    assert sorted(image.rglob("*")) == before


@pytest.mark.drawn
def test_what_was_not_built_is_named_with_its_sizes(image):
    loaded, said = launched(image, dtype="float32")
    assert not loaded
    named = r"FLAGOPS_JIT=error: norm\.\w+_kernel\(x=float32,.* count=17, N=4096,.* would be compiled: "
    assert any(re.match(named, x) for x in said), said
    assert all("not one of the" in x and "`flagops build` makes them" in x for x in said)


def test_a_changed_binary_is_not_used(image, tmp_path):
    shutil.copytree(image, tmp_path / "copy")
    permit(tmp_path / "copy", 0o700)
    for file in (tmp_path / "copy").rglob("*.hsaco"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    loaded, said = launched(tmp_path / "copy")
    assert {target for target, _, _ in loaded} == {"sm_90"}
    assert said


def test_a_folder_of_others_is_not_used(image, tmp_path):
    shutil.copytree(image, tmp_path / "copy")
    permit(tmp_path / "copy", 0o700)
    (tmp_path / "copy" / "triton").chmod(0o777)
    loaded, said = launched(tmp_path / "copy")
    assert not loaded
    assert all("can be written by other users" in x for x in said)


def test_a_second_build_compiles_nothing(image, tmp_path):
    shutil.copytree(image, tmp_path / "copy")
    permit(tmp_path / "copy", 0o700)
    code = """
import sys
from triton.backends.nvidia.compiler import CUDABackend
def never(*_): raise AssertionError("the compiler was called")
CUDABackend.add_stages = never
from flagops.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    words = ("build", "--target", "sm_90", "--model", "v4-flash", "--ops", *OPERATORS, "--out", str(tmp_path / "copy"))
    before = (tmp_path / "copy/triton/manifest.json").read_text()
    done = process("-c", code, *words)
    assert done.returncode == 0, done.stderr
    now = json.loads((tmp_path / "copy/triton/manifest.json").read_text())
    assert set(now["programs"]) == set(json.loads(before)["programs"])


DRIVER = """
import os, sys
from flagops.backends import _built
from triton import knobs
_built.serve()
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().launch.__name__)
"""


def test_the_module_that_reaches_the_driver_needs_no_compiler(image, tmp_path):
    """It is loaded beside a library that has the driver's functions and no GPU."""
    build.hollow(tmp_path)
    here = {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    there = {"PATH": "", "CC": "/dev/null", "TRITON_HOME": "/dev/null"}
    done = process("-c", DRIVER, FLAGOPS_CACHE=str(image), **here, **there)
    assert done.stdout == "launch\n", done.stderr
    assert process("-c", DRIVER, FLAGOPS_CACHE=str(tmp_path / "none"), **here, **there).returncode == 1


def test_no_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert main(["build", "--target", "sm_90"]) == 2
    assert "install gcc" in capsys.readouterr().err
    monkeypatch.setattr(build, "missing", lambda name: "triton is not installed" if name == "triton" else None)
    assert main(["build", "--target", "sm_90"]) == 2
    assert "triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--target sm_91", "did you mean 'sm_90'"),
        ("--target gfx936", "Triton compiles nothing for 'gfx936' here; it does for sm_75, sm_80"),
        ("--target sm_90 --model v4-flsh", "did you mean 'v4-flash'"),
        ("--target sm_90 --ops matmull", "did you mean 'matmul'"),
        ("--target sm_90 --size s=0", "expected an axis and its sizes"),
        ("--target sm_90 --size s=many", "expected an axis and its sizes"),
        ("--target sm_90 --ops moe_gate --model qwen3-8b", "moe_gate: no workload is of qwen3-8b"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_is_meant(words, said, capsys):
    assert main(["build", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_chips_of_one_target_and_other_measures_are_built_apart():
    assert [chip.name for chip in build.compilable(["sm_90", "h200"])] == ["H100"]
    assert [chip.name for chip in build.compilable(["nvidia"])][:2] == ["T4", "A100"]
    assert {chip.target for chip in build.compilable(["a100", "gfx942"])} == {"sm_80", "gfx942"}
    assert chips.named(["h200"])[0].target == "sm_90"


def test_workloads_of_a_model_are_its_own_and_its_familys():
    from flagops import registry

    op = registry.operator("rms_norm")
    found = build.named([op], "v4-flash")[op]
    assert found
    assert all(name.startswith("v4-flash.") for name in found)
    kv = registry.operator("fp8_fake_quantize")
    assert "v4.kv.decode" in build.named([kv], "v4-flash")[kv]
    assert build.named([op], "")[op] == list(op.workloads)
