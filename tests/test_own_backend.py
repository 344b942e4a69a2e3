"""Packages of others: docs/own_backend.md, done as it says; and what is wrong with one, said where it belongs."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_backend.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")
torch = pytest.importorskip("torch")


def blocks(language):
    """The files of the page: blocks that begin with their own path."""
    found = re.findall(rf"^```{language}\n# (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


def installed(folder, edit=None):
    """The page's package as pip would install it; `edit` changes its files, a name to its text."""
    files = blocks("python")
    files |= {"mychip/__init__.py": "", "mychip/kernels/__init__.py": ""}
    files["mychip/kernels/norm_mychip.py"] = files["chip_kernels.py"]
    groups = tomllib.loads(blocks("toml")["pyproject.toml"])["project"]["entry-points"]
    points = "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for group, e in groups.items())
    files["mychip-1.dist-info/entry_points.txt"] = points
    files["mychip-1.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: mychip\nVersion: 1\n"
    for name, text in (files | (edit(files) if edit else {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


SCRIPT = """
import contextlib, io, json, sys
from flagops.tools import contract
from flagops.__main__ import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        code = main(words)
    print(json.dumps([code, said[0].getvalue(), said[1].getvalue()]))
"""


def run(folder, *words, script=SCRIPT):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder, capture_output=True, text=True,
        env=clean | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
    )  # fmt: skip


def commands(folder, *lines):
    """Exit code, output and errors of each command, all in one process that has the package."""
    words = [shlex.split(line) for line in lines]
    done = run(folder, json.dumps(words))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.drawn
def test_the_page(tmp_path):
    folder = installed(tmp_path)
    lines = [line.partition("  #")[0] for line in re.findall(r"^\$ flagops (.*)$", PAGE.read_text(), re.M)]
    assert len(lines) == 8
    said = dict(zip(lines, commands(folder, *lines), strict=True))
    assert all(code == 0 for code, _, _ in said.values()), said
    assert sum("noticed" in out for _, out, _ in said.values()) == 3
    doctor = next(out for line, (_, out, _) in said.items() if line == "doctor")
    assert re.search(r"mychip +yes +version 1", doctor)
    assert f"threads {torch.get_num_threads()}, torch OpenMP" in doctor, "the threads that users of torch have"
    families = next(out for line, (_, out, _) in said.items() if line == "ops --families")
    assert re.search(r"softsign +softsign +mychip[.]softsign .* mychip[.]softsign_torch ", families)
    assert "mychip.kernels.norm_mychip" in families
    suite = ElementTree.parse(folder / "mychip.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "0")
    assert suite.find("testcase").attrib.items() >= {"classname": "flagops.mychip", "name": "rms_norm"}.items()
    done = run(folder, script=CALLS)
    assert done.returncode == 0, done.stderr


CALLS = """
import numpy as np, torch, flagops
x = torch.arange(-6.0, 6).view(3, 4).t()
assert torch.equal(flagops.softsign(x), x / (1 + x.abs()))
assert np.array_equal(flagops.softsign(x.numpy()), flagops.softsign(x).numpy())
assert "softsign" in dir(flagops)
flagops.rms_norm(x)
assert "mychip" not in flagops.coverage("rms_norm")["calls"], "installed, and not named"
flagops.rms_norm(x, backend="mychip")
assert flagops.coverage("rms_norm")["calls"]["mychip"] == 1
with flagops.using(backend=["mychip", "torch"]):
    flagops.rms_norm(x.half(), stepwise=True)
assert flagops.coverage("rms_norm")["calls"]["mychip"] == 1, "its refusal is a reason to take the next"
"""

DESCRIPTOR, KERNELS = "mychip/backend.py", "mychip/kernels/norm_mychip.py"
UNAVAILABLE = '"""Why it cannot run on this machine, or None. Import your library here, not above."""\n        '
FAULTS = {
    "lacks refuses": (DESCRIPTOR, "def refuses", "def refusing"),
    "raised in unavailable(): RuntimeError: 'no driver'": (
        DESCRIPTOR, f"{UNAVAILABLE}return None", "raise RuntimeError('\\'no driver\\'')"
    ),
    "refuses of other parameters than (array)": (DESCRIPTOR, "def refuses(self, array)", "def refuses(self)"),
    "calls itself 'yours'": (DESCRIPTOR, 'name = "mychip"', 'name = "yours"'),
    "SyntaxError": (DESCRIPTOR, "class Backend:", "class Backend"),
    "rms_norm takes (x, out), but the operator's card says (x, weight, eps, stepwise, out)": (
        KERNELS, "def rms_norm(x, weight, eps, stepwise, out)", "def rms_norm(x, out)"
    ),
    "NameError: name 'touch' is not defined": (KERNELS, "import torch\n", "import torch\ntouch.zeros\n"),
    "ModuleNotFoundError: No module named 'chiplib'": (KERNELS, "import torch\n", "import torch\nimport chiplib\n"),
    "raised in facts() or self_test(): OSError": (DESCRIPTOR, 'return {"version": "1"}', "raise OSError"),
}  # fmt: skip
ABSENT = {
    "has no kernel for rms_norm: {0}.kernels.norm_{0} has no function rms_norm": (KERNELS, "def rms_norm(", "def no("),
    "has no kernel for rms_norm: there is no module {0}.kernel.norm_{0}": (DESCRIPTOR, ".kernels", ".kernel"),
    "raised in refuses(): ModuleNotFoundError: No module named 'chiplib'": (
        DESCRIPTOR, "        import torch\n", "        import chiplib\n"
    ),
}  # fmt: skip

SOMEBODYS_CALL = """
import contextlib, io, json, sys
import torch, flagops
from flagops.__main__ import main
a = torch.arange(12.0).view(3, 4)  # sums are exact
assert torch.equal(flagops.matmul(a, a.t()), a @ a.t())
with flagops.enable():
    torch.nn.functional.rms_norm(a, (4,))
    assert torch.equal(a @ a.t(), flagops.matmul(a, a.t(), backend="numpy"))
said = {}
for name in sys.argv[1:]:
    try:
        flagops.rms_norm(a, backend=name)
    except flagops.Unsupported as reason:
        said[name] = str(reason)
with contextlib.redirect_stdout(io.StringIO()) as doctor:
    code = main(["doctor", "--json"])
print(json.dumps([code, said, json.loads(doctor.getvalue())]))
"""


def test_what_is_wrong_is_a_row_and_never_an_error_of_others(tmp_path):
    """A package for each mistake, all installed at once."""
    names = {f"chip{chr(97 + i)}": (said, *edit) for i, (said, edit) in enumerate((FAULTS | ABSENT).items())}
    for name, (_, path, old, new) in names.items():

        def edit(files, path=path, old=old, new=new):
            assert files[path].count(old) == 1, (old, files[path])
            return {path: files[path].replace(old, new), "mychip/softsign.py": "import chiplib\n"}

        for file in installed(tmp_path / name, edit).rglob("*"):
            if file.is_file():
                target = tmp_path / "site" / str(file.relative_to(tmp_path / name)).replace("mychip", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(file.read_text().replace("mychip", name))
    done = run(tmp_path / "site", *names, script=SOMEBODYS_CALL)
    assert done.returncode == 0, done.stderr
    code, said, doctor = json.loads(done.stdout)
    assert code == 1
    for name, (expected, *_) in names.items():
        faults = " ".join(doctor["backends"][name]["faults"].values())
        assert expected in FAULTS or not faults
        assert expected.format(name) in (faults if expected in FAULTS else said[name])
        assert "chiplib" in doctor["operators"][f"{name}.softsign"]
    unusable = {name for name, (expected, *_) in names.items() if "facts()" not in expected}
    assert set(said) == unusable, "a named backend that cannot run says so"


@pytest.mark.drawn
def test_a_mutant_that_survives_is_a_failure(tmp_path):
    """An edit that no result can tell: of what is multiplied by nothing."""
    kernel = blocks("python")["chip_kernels.py"] + "\n    out.add_(0 * (len(x) - 1))\n"
    (tmp_path / "chip_kernels.py").write_text(kernel)
    ((code, out, _),) = commands(tmp_path, "check chip_kernels.py --mutants 99")
    assert code == 1
    assert "survived" in out
    assert "out.add_(0 * (len(x) + 1))" in out


@pytest.mark.drawn
def test_a_failure_is_one_in_junit(tmp_path):
    kernel = blocks("python")["chip_kernels.py"].replace("+ eps", "- eps")
    (tmp_path / "chip_kernels.py").write_text(kernel)
    ((code, _, _),) = commands(tmp_path, "check chip_kernels.py --examples 40 --junit out.xml")
    assert code == 1
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert suite.get("failures") == "1"
    assert "again: flagops check" in suite.find("testcase/failure").text
