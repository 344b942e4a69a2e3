"""`flagops convert` and `flagops verify` as commands: what they print, their exit codes, progress and memory."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint.source import MANIFEST  # noqa: E402

SHARD = "model-00001-of-00001.safetensors"


def flagops(*words, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-m", "flagops", *map(str, words)], capture_output=True, text=True, env=clean, **more
    )


def test_dry_run(tmp_path, capsys):
    src, _ = data.mixed(tmp_path / "src")
    assert main(["convert", str(src), str(tmp_path / "dst"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "planned",
        "5 FP4 to BF16",
        "12 scales dropped",
        "remove quantization_config",
        "free",
        "pytorch_model",
    ):
        assert word in shown, word
    assert not (tmp_path / "dst").exists()
    assert main(["convert", str(src), str(tmp_path / "dst"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["convert", str(src), str(tmp_path / "dst"), "--json", "--quiet"]) == 0
    done = capsys.readouterr()
    assert not done.err
    assert json.loads(done.out)["output_bytes"] == plan["needed_disk"] == plan["output_bytes"]
    written = sum(len(text) for name, text in tree(tmp_path / "dst").items() if name != MANIFEST)
    assert written == plan["needed_disk"]


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    src, _ = data.mixed(tmp_path / "src")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    for more in (["--dry-run"], []):
        assert main(["convert", str(src), str(tmp_path / "dst"), *more]) == 3
        assert "1,000 bytes free" in capsys.readouterr().err
        assert not (tmp_path / "dst").exists()


def test_exit_codes(tmp_path, capsys):
    src, _ = data.mixed(tmp_path / "src")
    dst = tmp_path / "dst"
    assert main(["convert", str(src), str(dst), "--shard-size", "100000"]) == 0
    lines = capsys.readouterr()
    assert "model-00001" in lines.err
    assert "converted" in lines.out
    assert main(["verify", str(src), str(dst)]) == 0
    assert "verified" in capsys.readouterr().out
    data.changed(dst, "odd.weight", 1)
    assert main(["verify", str(src), str(dst), "--json", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "'odd.weight'" in shown.err
    assert json.loads(shown.out)["exit_code"] == 1
    assert main(["verify", str(src), str(tmp_path / "none")]) == 2
    assert main(["convert", str(tmp_path / "none"), str(dst)]) == 2
    assert main(["convert", str(src), str(tmp_path / "x"), "--backend", "nunba"]) == 2
    for command in ("convert", "verify"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert "examples:" in shown
        assert "exit codes:" in shown


def test_a_log_gets_lines_and_a_terminal_a_bar(tmp_path):
    src, _ = data.mixed(tmp_path / "src")
    done = flagops("convert", src, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert "model-00001-of-00001.safetensors written" in done.stderr
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "flagops", "convert", str(src), str(tmp_path / "bar")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    os.close(leader)
    assert process.returncode == 0
    assert b"write" in shown
    assert b"\x1b[" in shown


def test_rate_and_time_left(capsys, monkeypatch):
    from flagops.checkpoint import progress

    now = iter([0.0, 0.0, 5.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    lines = progress.Lines()
    lines.begin(4_000_000, "write")
    lines.advance(500_000, "a")
    lines.advance(500_000, "b.weight")
    assert capsys.readouterr().err == " 25.0% of 4.0 MB, 50.0 kB/s, 60 s left, 'b.weight'\n"


@pytest.mark.drawn
@pytest.mark.parametrize("options", [("--to", "bf16", "--workers", "2"), ("--to", "fp8", "--workers", "1")])
def test_memory_stays_under_the_limit(tmp_path, options):
    """Tensors larger than the whole limit, one shard, and the peak that the system counted."""
    rng = np.random.default_rng(0)
    rows = 16384
    weight = torch.from_numpy(rng.integers(0, 256, (rows, 2048), dtype=np.uint8)).view(torch.int8)
    scale = torch.from_numpy(rng.integers(120, 130, (rows, 128), dtype=np.uint8)).view(torch.float8_e8m0fnu)
    tensors = {"a.weight": weight, "a.scale": scale, "b": torch.zeros(120 << 20, dtype=torch.bfloat16)}
    src = data.write(tmp_path / "src", {SHARD: tensors})

    warm, _ = data.experts(tmp_path / "warm")
    checkpoint.convert(warm, tmp_path / "warmed", to=options[1])  # the kernels are compiled and in the cache folder
    limit = 256
    done = flagops("convert", src, tmp_path / "dst", "--memory", f"{limit}MiB", "--json", "--quiet", *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["peak_memory"] <= limit << 20
    assert summary["planned_memory"] <= limit << 20
    assert summary["output_bytes"] > limit << 20


def test_nothing_is_unpickled_and_no_library_is_needed_that_is_not_there(tmp_path):
    """A conversion with numba imports neither torch, safetensors nor pickle's machinery for it."""
    src, _ = data.experts(tmp_path / "src")
    script = (
        "import sys; from flagops import checkpoint; checkpoint.convert(*sys.argv[1:], backend='numba');"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(src), str(tmp_path / "dst")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
