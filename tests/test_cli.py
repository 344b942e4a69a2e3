"""The commands, as a new user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import aten, registry
from flagops.__main__ import main
from flagops.tools import stubs

ROOT = Path(__file__).parents[1]


def flagops(*words, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    command = [sys.executable, "-m", "flagops", *words]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_doctor_names_every_backend(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) >= {"numba", "torch", "triton", "numpy"}
    for backend in report["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    assert report["libraries"]["numpy"]


def test_doctor_says_why_triton_cannot_run():
    import torch

    if torch.cuda.is_available():
        pytest.skip("it can")
    report = json.loads(flagops("doctor", "--json").stdout)
    assert "TRITON_INTERPRET=1" in report["backends"]["triton"]["reason"]


def test_doctor_shows_settings():
    report = json.loads(flagops("doctor", "--json", FLAGOPS_BUDGET="1MiB").stdout)
    assert report["settings"] == {"FLAGOPS_BUDGET": 1 << 20}


def test_ops_covers_every_operator_and_backend(capsys):
    assert main(["ops", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert set(table) == set(registry.operators())
    for row in table.values():
        assert all(row[name]["kernel"] for name in ("numba", "torch", "numpy"))


def test_operators_of_torch_are_listed_apart(capsys):
    assert main(["ops", "--aten", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {name.removeprefix("aten.") for name in table} == set(dir(aten))
    assert all(row[name]["kernel"] for row in table.values() for name in ("numba", "numpy"))


@pytest.mark.parametrize("file", stubs.TABLES)
def test_the_readme_and_its_pages_show_the_tables_of_today(file):
    assert stubs.current(file) == (ROOT / file).read_text(), "run python -m flagops.tools.stubs"


def test_words_name_operators_and_families():
    families = ["reductions", "aten.add", "matmul", "aten.sum"]
    names = [op.name for op in registry.named(families)]
    assert len(names) == len(set(names))
    assert {*names} == {"aten.add", "matmul"} | {
        name for name, card in registry.cards().items() if card.aten and card.family == "reductions"
    }
    assert {op.name for op in registry.named(["aten"])} == {f"aten.{name}" for name in dir(aten)}
    with pytest.raises(ValueError, match=r"did you mean 'aten[.]softplus'"):
        registry.named(["aten.softplu"])


@pytest.mark.drawn
def test_check_takes_operators_of_torch_by_name_and_by_family(capsys):
    words = ["--backend", "numpy", "--examples", "2"]
    assert main(["check", "aten.add", "optimizer", *words]) == 0
    said = capsys.readouterr().out
    assert "aten.add" in said
    assert "aten.adamw" in said
    assert main(["check", "aten.add", "--backend", "torch", "--examples", "2"]) == 1, "torch has no kernel of it"
    assert "torch has no kernel for aten.add" in capsys.readouterr().err


def test_check_passes_and_can_be_repeated(capsys):
    assert main(["check", "matmul", "--backend", "numpy", "--examples", "5", "--seed", "7"]) == 0
    assert "seed 7" in capsys.readouterr().out


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "matmull"], "did you mean 'matmul'"),
        (["warmup", "matmull"], "did you mean 'matmul'"),
        (["check", "--backend", "nunba"], "did you mean 'numba'"),
        (["bench", "matmull"], "did you mean 'matmul'"),
        (["run"], "usage"),
        (["bisect"], "usage"),
        (["bench", "--workload", "no-such-load"], "no-such-load"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(words, said):
    done = flagops(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_without_a_usable_backend_fails():
    import torch

    if torch.cuda.is_available():
        pytest.skip("triton is usable")
    done = flagops("check", "matmul", "--backend", "triton")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.drawn
def test_run_replaces_what_the_settings_say(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, flagops\n"
        "a = torch.ones(4, 4)\n"
        "a @ a\n"
        "print(sys.argv[1:], flagops.coverage('matmul')['calls'])\n"
    )
    done = flagops("run", str(script), "-x", "1", FLAGOPS_BACKEND="numba")
    assert done.stdout.split("\n")[0].startswith("['-x', '1']")
    done = flagops("run", str(script), FLAGOPS_BACKEND="numba", FLAGOPS_OPS="default,-mm")
    assert done.returncode == 0, done.stderr


NORM = "flagops.rms_norm(a, backend='numba')"
PRODUCTS = "flagops.matmul(a, b, backend='numba'); flagops.linear(a, b.T, backend='numba')"


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("operators", "call"), [(("rms_norm",), NORM), pytest.param((), PRODUCTS, marks=pytest.mark.slow, id="all")]
)
def test_warmup_fills_the_cache(tmp_path, operators, call):
    assert flagops("warmup", *operators, "--backend", "numba", FLAGOPS_CACHE=str(tmp_path)).returncode == 0
    compiled = set(tmp_path.rglob("*.nbc"))
    assert compiled
    script = (
        "import torch, flagops\n"
        "for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):\n"
        "    a = torch.ones(33, 65).to(dtype); b = torch.ones(65, 17).to(dtype)\n"
        f"    {call}\n"
    )
    environment = os.environ | {"FLAGOPS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert set(tmp_path.rglob("*.nbc")) == compiled, "a call compiled what warmup should have"
