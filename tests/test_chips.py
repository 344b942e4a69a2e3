"""The table of chips: what its rows must hold, the command, and what a process says of the device that it has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import chips
from flagops.__main__ import main
from flagops.judge import command

ROOT = Path(__file__).parents[1]
FIGURES = ("processors", "shared", "bandwidth", "rate", "width")


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_a_row_names_its_page_and_the_source_of_its_figures(chip):
    assert chip.state in chips.STATES
    assert all(source.startswith(("https://", "http://")) for source in chip.sources)
    assert chip.sources or chip.device == "cpu", "a figure without a source is unknown"
    assert all(getattr(chip, figure) is None or getattr(chip, figure) > 0 for figure in FIGURES)
    if chip.state == "compiled":
        assert None not in (chip.processors, chip.shared, chip.matrix), "tiles are chosen by them"


def test_no_two_rows_have_one_name():
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)


@pytest.mark.parametrize(
    ("word", "found"), [("h100", ["H100"]), ("SM_90", ["H100", "H200"]), ("npu", ["Ascend 910B", "Ascend 910C"])]
)
def test_chips_are_named_by_themselves_their_device_or_target(word, found, capsys):
    assert main(["chips", word, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == found


def test_what_is_unknown_says_so(capsys):
    assert main(["chips", "P800", "--markdown"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[5:10] == ["?", "1", "?", "?", "?"]


def test_a_program_takes_no_more_than_the_least_chip_of_its_device_has():
    assert chips.shared("npu") == 192 << 10
    assert chips.shared("musa") == chips.shared("never heard of") == chips.LEAST_SHARED


@pytest.mark.parametrize(
    ("name", "hip", "page"),
    [
        ("NVIDIA H100 80GB HBM3", False, "nvidia"),
        ("AMD Instinct MI300X", True, "amd"),
        ("MetaX C500", False, "vendors"),
    ],
)
def test_a_device_that_torch_calls_cuda_is_known_by_its_own_name(name, hip, page):
    assert chips.cuda_page(name, hip) == page


HERE = """
import importlib, json, sys
import torch
name = sys.argv[1]
torch.utils.rename_privateuse1_backend(name)
from flagops import chips
from flagops.__main__ import main
from flagops.judge import command
common = importlib.import_module("flagops.kernels.triton._common")
print(common.chip(torch.device(name)).shared)
sys.exit(main(["doctor", "--json"]))
"""


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("device", "page"), [("npu", "ascend"), ("musa", "vendors"), ("mlu", "vendors"), ("mine", "vendors")]
)
def test_doctor_points_to_the_page_of_a_device_and_tiles_fit_it(device, page):
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", HERE, device], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    shared, _, report = run.stdout.partition("\n")
    assert int(shared) == chips.shared(device)
    devices = json.loads(report)["devices"]
    assert {where for what, where in devices.items() if what.startswith(f"{device} ")} == {f"docs/{page}.md"}


def test_a_report_says_which_sources_ran_on_which_device(tmp_path):
    """It can be taken as the evidence for a row: another source gives another digest."""
    file = tmp_path / "report.json"
    assert main(["check", "rms_norm", "--backend", "numba", "--examples", "3", "--report", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["devices"]["numba"]
    assert set(report["sources"]) == {"references", "numba"}
    assert all(len(digest) == 16 for digest in report["sources"].values())
    (tmp_path / "one.py").write_text("1")
    sys.path.insert(0, str(tmp_path))
    try:
        first = command._digest(["one"])
        (tmp_path / "one.py").write_text("2")
        assert command._digest(["one"]) != first
    finally:
        sys.path.remove(str(tmp_path))


def test_the_page_shows_the_table_and_every_row_has_its_page(capsys):
    assert main(["chips", "--markdown"]) == 0
    text = (ROOT / "docs/chips.md").read_text(encoding="utf-8")
    assert f"<!-- flagops chips --markdown -->\n{capsys.readouterr().out}<!-- end -->" in text
    for chip in chips.CHIPS:
        page = (ROOT / "docs" / f"{chip.page}.md").read_text(encoding="utf-8")
        assert chip.vendor in page or f"flagops chips {chip.vendor.lower()}" in page or chip.device == "cpu"
