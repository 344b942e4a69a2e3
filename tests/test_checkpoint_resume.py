"""A conversion that is killed, interrupted, starved of disk or fed a broken shard goes on, and ends byte-identical."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.checkpoint.source import JOURNAL, MANIFEST  # noqa: E402

SIZE = "60000"
CRASH = [sys.executable, str(Path(__file__).with_name("checkpoint_crash.py"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source, and what an uninterrupted conversion makes of it."""
    folder = tmp_path_factory.mktemp("resume")
    src, expected = data.mixed(folder / "src", "transformers")
    checkpoint.convert(src, folder / "reference", shard_size=SIZE)
    data.same(data.read(folder / "reference")[0], expected)
    return src, tree(folder / "reference")


def crash(*words, **more):
    return subprocess.run([*CRASH, *map(str, words)], capture_output=True, text=True, **more)


def whole_or_hidden(dst, reference):
    """Every file under a final name is what it should be; returns their number."""
    found = {n: text for n, text in tree(dst).items() if n != JOURNAL and not n.endswith(".partial")}
    for name, text in found.items():
        assert text == reference[name], name
    assert data.INDEX not in found or set(found) == set(reference)
    return len(found)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(source, tmp_path, step):
    src, _ = source
    seed = random.randrange(1000)
    done = crash("sweep", src, tmp_path, step, seed)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    swept = json.loads(done.stdout)
    assert swept["killed"] >= 0.9 * swept["calls"] / step
    assert swept["calls"] > 100


def test_every_life_keeps_what_the_one_before_finished(source, tmp_path):
    done = crash("relay", source[0], tmp_path, 60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lives"] > 2


@pytest.mark.drawn
@pytest.mark.parametrize("times", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(source, tmp_path, times):
    src, reference = source
    killed = 0
    for i in range(times):
        dst = tmp_path / str(i)
        command = [*CRASH, "slow", "0.03", "convert", str(src), str(dst), "--shard-size", SIZE, "--quiet"]
        for last in (0.4, 2.0):  # seconds from the first file, or from a start with files that are there already
            process = subprocess.Popen(command)
            while process.poll() is None and not (dst / JOURNAL).exists():
                time.sleep(0.002)
            time.sleep(random.uniform(0, last))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            whole_or_hidden(dst, reference)
        assert subprocess.run(command).returncode == 0
        assert tree(dst) == reference
    assert killed


def test_interrupted_by_the_user(source, tmp_path):
    src, reference = source
    dst = tmp_path / "dst"
    command = ["convert", str(src), str(dst), "--shard-size", SIZE]
    process = subprocess.Popen([*CRASH, "slow", "0.2", *command], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(dst.glob("*.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "repeat the same command" in said
    assert not list(dst.rglob("*.partial")), "an interrupt leaves no partial files"
    assert 0 < whole_or_hidden(dst, reference) < len(reference)
    summary = checkpoint.convert(src, dst, shard_size=SIZE)
    assert summary.resumed_shards > 0
    assert tree(dst) == reference


def test_a_quota(source, tmp_path):
    src, reference = source
    dst = tmp_path / "dst"
    command = ["convert", src, dst, "--shard-size", SIZE, "--workers", "1"]
    done = crash("limited", 40_000, *command)
    assert done.returncode == 3, done.stderr
    assert re.search(r"File too large.*\.safetensors\.partial.*repeat the same command", done.stderr)
    assert not list(dst.rglob("*.partial"))
    whole_or_hidden(dst, reference)
    assert crash("limited", 10_000_000, *command).returncode == 0
    assert tree(dst) == reference


def test_a_full_disk(source, tmp_path):
    src, _ = source
    dst = tmp_path / "dst"
    dst.mkdir()
    apart = ["unshare", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run([*apart, "mount", "-t", "tmpfs", "tmpfs", str(dst)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode:
        pytest.skip(f"no mounts here: {probe.stderr.strip()}")
    done = subprocess.run([*apart, *CRASH, "full", str(src), str(dst)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bytes free" in done.stderr
    assert "No space left on device" in done.stderr
    assert int(re.search(r"finished before: (\d+)", done.stdout)[1]) > 0
    assert json.loads(done.stdout[done.stdout.index("{") :])["resumed_shards"] > 0


@pytest.fixture(scope="module")
def quota(source, tmp_path_factory):
    """A conversion that ended after some shards, for copies of it."""
    dst = tmp_path_factory.mktemp("quota") / "dst"
    done = crash("limited", 70_000, "convert", source[0], dst, "--shard-size", SIZE, "--workers", "1")
    assert done.returncode == 3, done.stderr
    return dst


@pytest.fixture
def stopped(source, quota, tmp_path):
    """Source, unfinished output, its shards so far and what it must become; free to be changed."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(source[0], src)  # times of last change included
    shutil.copytree(quota, dst)
    shards = sorted(p.name for p in dst.glob("*.safetensors"))
    assert shards
    return src, dst, shards, source[1]


def test_finished_shards_are_not_made_again(stopped):
    src, dst, shards, reference = stopped
    before = {name: (dst / name).stat().st_ino for name in shards}
    summary = checkpoint.convert(src, dst, shard_size=SIZE)
    assert summary.resumed_shards == len(shards)
    assert {name: (dst / name).stat().st_ino for name in shards} == before
    assert tree(dst) == reference


def test_a_dry_run_counts_what_is_finished(stopped):
    src, dst, shards, reference = stopped
    (dst / f"{shards[-1]}.partial").write_bytes(b"x" * 1000)
    before = tree(dst)
    summary = checkpoint.convert(src, dst, shard_size=SIZE, dry_run=True)
    finished = set(reference) & set(before)
    assert finished > set(shards)
    written = sum(len(text) for name, text in reference.items() if name not in finished | {MANIFEST})
    assert summary.needed_disk == written
    with pytest.raises(checkpoint.Refused, match="other options"):
        checkpoint.convert(src, dst, shard_size="50000", dry_run=True)
    assert tree(dst) == before


def test_a_finished_shard_that_has_changed_is_made_again(stopped):
    src, dst, shards, reference = stopped
    raw = bytearray((dst / shards[0]).read_bytes())
    raw[-1] ^= 1
    (dst / shards[0]).write_bytes(raw)
    (dst / shards[-1]).unlink()
    checkpoint.convert(src, dst, shard_size=SIZE)
    assert tree(dst) == reference


@pytest.mark.parametrize("tail", [b'{"file": "model-0', b"\0" * 100, b'{"file": "x"}'], ids=["half", "zeros", "line"])
def test_a_torn_journal(stopped, tail):
    src, dst, _, reference = stopped
    with open(dst / JOURNAL, "ab") as file:
        file.write(tail)
    checkpoint.convert(src, dst, shard_size=SIZE)
    assert tree(dst) == reference


def test_an_empty_journal(source, tmp_path):
    src, reference = source
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / JOURNAL).write_text("")
    checkpoint.convert(src, tmp_path / "dst", shard_size=SIZE)
    assert tree(tmp_path / "dst") == reference


@pytest.mark.parametrize("change", ["shard size", "target", "tensor", "config", "tokenizer"])
def test_going_on_with_something_else_is_refused(stopped, change):
    src, dst, _, _ = stopped
    options = {"shard size": {"shard_size": "50000"}, "target": {"to": "fp8"}}.get(change, {})
    if change == "target":  # FP8 wants blocks of 128 x 128
        src, _ = data.experts(src.parent / "experts")
    if change == "tensor":
        shard = min(src.glob("*.safetensors"))
        raw = shard.read_bytes()
        shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif change in ("config", "tokenizer"):
        with open(src / f"{change}.json", "a") as file:
            file.write("\n")
    before = tree(dst)
    with pytest.raises(checkpoint.Refused, match=r"another SRC|other options"):
        checkpoint.convert(src, dst, **({"shard_size": SIZE} | options))
    assert tree(dst) == before


def test_two_conversions_at_once(stopped):
    src, dst, _, _ = stopped
    with open(dst / JOURNAL, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(checkpoint.Refused, match="another conversion"):
            checkpoint.convert(src, dst, shard_size=SIZE)


def test_a_shard_cut_short_while_it_is_read(source, tmp_path, monkeypatch):
    """Seen, named, and nothing made of it; once it is whole again the conversion goes on."""
    src, reference = tmp_path / "src", source[1]
    shutil.copytree(source[0], src)
    shards = sorted(src.glob("*.safetensors"))
    whole = {shard: (shard.read_bytes(), shard.stat()) for shard in shards}
    read, calls = os.preadv, []

    def preadv(*args):
        calls.append(args)
        if len(calls) == 12:
            for shard in shards:
                os.truncate(shard, 200)
        return read(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    dst = tmp_path / "dst"
    with pytest.raises(checkpoint.Refused, match=r"model-0000\d-of-00003\.safetensors (ends at byte|has changed)"):
        checkpoint.convert(src, dst, shard_size=SIZE, workers=1)
    monkeypatch.undo()
    assert not list(dst.rglob("*.partial"))
    assert whole_or_hidden(dst, reference) < len(reference)
    for shard, (text, facts) in whole.items():
        shard.write_bytes(text)
        os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    checkpoint.convert(src, dst, shard_size=SIZE)
    assert tree(dst) == reference


@pytest.mark.parametrize("name", [data.INDEX, MANIFEST])
def test_killed_between_the_last_files(source, tmp_path, name, monkeypatch):
    src, reference = source
    replace = os.replace

    def fail(old, new):
        if Path(new).name == name:
            raise OSError(5, "Input/output error", str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    dst = tmp_path / "dst"
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.convert(src, dst, shard_size=SIZE)
    monkeypatch.undo()
    assert not (dst / data.INDEX).exists()
    assert not list(dst.rglob("*.partial"))
    with pytest.raises(checkpoint.Difference, match="not finished"):
        checkpoint.verify(src, dst)
    assert checkpoint.convert(src, dst, shard_size=SIZE).resumed_shards > 0
    assert tree(dst) == reference
