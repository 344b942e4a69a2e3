"""What the judges of other projects are told and how their answers are counted; they are rows of test_all."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import backendbench_judge as backendbench
from strangers_results import kept, text
from torchcts_judge import Journal, missing

FACTS = {"when": "2026-11-30T18:00", "torchcts": "0.4.1", "torch": "2.13", "cpu": "2 x", "backend": "numba", "level": 8}


def case(node, verdict, error="", missing=None):
    return {"node": node, "suite": node.partition("/")[0], "verdict": verdict, "error": error, "missing": missing}


def test_strict_is_what_passed_of_what_is_claimed(tmp_path):
    found = [
        *(case(f"operators/test.py::{i}", "passed") for i in range(7)),
        case("operators/test.py::gelu", "ours", "AssertionError: NaN"),
        case("generated/test.py::mode", "device", "RuntimeError: no mode\nand a traceback"),
        case("generated/test.py::old", "suite", "TypeError: changed"),
        case("generated/test.py::fft", "unclaimed", "NotImplementedError", "_fft_r2c"),
        case("errors/test.py::skipped", "left out"),
    ]
    whole = kept(FACTS | {"files": "3 of 3"}, found)
    assert whole["suites"]["operators"] == {"ours": 1, "passed": 7}
    assert whole["unclaimed"] == {"_fft_r2c": 1}
    assert [x["verdict"] for x in whole["cases"]] == ["ours", "device", "suite"]
    assert "infinity" in whole["cases"][0]["reason"]
    assert whole["cases"][1]["reason"] == "RuntimeError: no mode"
    (tmp_path / "torchcts.json").write_text(json.dumps(whole))
    shown = "\n".join(text(tmp_path))
    assert "Of 9 cases that the device claims 7 passed, 77.78% strict;\nof all 11 that ran 63.6%." in shown
    assert "`_fft_r2c` 1" in shown
    assert list(text(tmp_path / "empty")) == []


@pytest.mark.parametrize(
    ("error", "overload"),
    [
        ("Could not run 'aten::atan2.out' with arguments from the 'bare' backend", "atan2.out"),
        ("Could not run 'aten::add.out' with arguments from the 'bare' backend", None),  # which flagops replaces
        ("aten::add.out has no kernel at PrivateUse1 but flagops', which does not take this call", None),
        ("AssertionError: values differ", None),
    ],
)
def test_what_nobody_claims_is_told_from_its_error(error, overload):
    assert missing({"error": error}) == overload


def test_a_test_that_was_begun_and_did_not_end_has_killed_its_process(tmp_path):
    journal = Journal(tmp_path / "a" / "file.jsonl")
    assert journal.dead() is None
    journal.note(began="one")
    journal.note(node="one", status="PASS")
    assert journal.dead() is None
    journal.note(began="two")
    assert journal.dead() == "two"
    assert journal.answers().keys() == {"one"}


def test_a_hundredth_is_near_enough_for_backendbench():
    x = torch.tensor([1.0, 100.0, float("nan"), 0.0])
    assert backendbench.close(x, x * 1.009)
    assert backendbench.close([x, 1], [x + 0.009, 1])
    assert not backendbench.close(x, x + 0.05)
    assert not backendbench.close(x, x.double())
    assert not backendbench.close(x, (x, x))


def test_backendbench_takes_samples_that_one_overload_computes(monkeypatch):
    few = [op for op in backendbench.op_db if op.name in ("mm", "nn.functional.linear", "linalg.norm")]
    monkeypatch.setattr(backendbench, "op_db", few)
    found = backendbench.tests(torch.float32)
    assert {"mm", "addmm"} >= {backendbench.named(overload) for overload in found} >= {"mm"}
    rows = backendbench.score(["mm"], "numba", {torch.ops.aten.mm.default: found[torch.ops.aten.mm.default]})
    assert rows["mm"]["right"] == rows["mm"]["samples"] == rows["mm"]["ours"] > 0
