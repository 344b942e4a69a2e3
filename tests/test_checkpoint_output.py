"""Outputs that are damaged, lead elsewhere or belong to others, and the systems they lie on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import SIZE, convert, refused, tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint.source import JOURNAL, MANIFEST  # noqa: E402

pytest_plugins = ["checkpoint_worlds"]

# What a conversion left


def journal(dst, change):
    lines = (dst / JOURNAL).read_bytes().splitlines(keepends=True)
    (dst / JOURNAL).write_bytes(b"".join(change(lines)))


def renamed(lines):
    record = json.loads(lines[-1])
    return [*lines[:-1], json.dumps(record | {"file": "ghost.safetensors"}).encode() + b"\n"]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines, b'{"x": 1}\n'],
        lambda lines: [lines[0], b'{"x": 1}\n', *lines[1:]],
        lambda lines: [*lines, b'{"file": [], "bytes": 1, "sha256": "x"}\n'],
        lambda lines: [*lines, b'{"file": "x", "bytes": 1e999, "sha256": "x"}\n'],
        lambda lines: [*lines, b"[" * 200_000 + b"\n"],
        renamed,
    ],
    ids=["x", "x before others", "types", "1e999", "brackets", "another name"],
)
def test_a_journal_with_other_lines(trio, change):
    """What follows is made again, and the result is that of an undisturbed conversion, for good."""
    src, dst = trio / "src", trio / "stopped"
    journal(dst, change)
    assert convert(src, dst).state == "converted"
    assert tree(dst) == tree(trio / "finished")
    assert checkpoint.verify(src, dst).state == "verified"
    assert convert(src, dst).state == "already finished"


def test_a_journal_of_something_else(trio):
    journal(trio / "stopped", lambda lines: [b'{"x": 1}\n'])
    refused(lambda: convert(trio / "src", trio / "stopped"), "another SRC", "empty the folder")


def entry(**facts):
    def edit(path):
        found = json.loads(path.read_text())
        found["files"]["config.json"] |= facts
        path.write_text(json.dumps(found).replace("Infinity", "1e999"))

    return edit


def extra(path):
    found = json.loads(path.read_text())
    found["files"]["ghost"] = found["files"]["config.json"]
    path.write_text(json.dumps(found))


MANIFESTS = {
    "brackets": (lambda path: path.write_text("[" * 200_000), "nested too deep"),
    "1e999 bytes": (entry(bytes=float("inf")), "no finite number"),
    "a list": (lambda path: path.write_text("[]"), "no JSON object"),
    "no files": (lambda path: path.write_text('{"identity": {}}'), "files is None"),
    "bytes in words": (entry(bytes="many"), "'config.json' has no bytes and sha256"),
    "a short hash": (entry(sha256="0"), "'config.json' has no bytes and sha256"),
    "another file": (extra, "'ghost'"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "no regular file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no regular file"),
    "a link": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is a link"),
}


@pytest.mark.parametrize("case", MANIFESTS)
@pytest.mark.parametrize("work", [convert, lambda src, dst: checkpoint.verify(src, dst)], ids=["convert", "verify"])
def test_a_damaged_manifest(trio, case, work):
    edit, said = MANIFESTS[case]
    edit(trio / "finished" / MANIFEST)
    with pytest.raises((checkpoint.Refused, checkpoint.Difference)) as refusal:
        work(trio / "src", trio / "finished")
    assert MANIFEST in str(refusal.value)
    assert said.strip("'") in str(refusal.value)


@pytest.mark.parametrize("name", [JOURNAL, "config.json", "encoding/example.txt", "tokenizer.json.partial"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_no_file_where_the_output_has_one(trio, name, what):
    dst, outside = trio / "stopped", trio / "outside"
    outside.write_text("mine")
    path = dst / name
    path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to(outside)}[what](path)
    refused(lambda: convert(trio / "src", dst), name, "remove it")
    assert outside.read_text() == "mine"


def test_a_folder_of_the_output_that_is_a_link_is_not_written_through(trio):
    dst, outside = trio / "stopped", trio / "outside"
    outside.mkdir()
    shutil.rmtree(dst / "encoding")
    (dst / "encoding").symlink_to(outside)
    refused(lambda: convert(trio / "src", dst), str(dst / "encoding"), "is a link")
    assert not list(outside.iterdir())


def test_files_of_others_stay(trio):
    dst, mine = trio / "stopped", trio / "mine"
    (dst / "thesis.partial").write_text("text")
    mine.write_text("text")
    os.link(mine, dst / "tokenizer.json.partial")  # its other name stays as it is
    convert(trio / "src", dst)
    assert (dst / "thesis.partial").read_text() == mine.read_text() == "text"
    assert not (dst / "tokenizer.json.partial").exists()


# The system


def test_a_clock_that_stands_still(trio, monkeypatch, capsys):
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 5.0)
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    assert main(["convert", str(trio / "src"), str(trio / "dst")]) == 0
    assert main(["verify", str(trio / "src"), str(trio / "dst")]) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loop", "nu\0ll"])
def test_folders_that_cannot_be_reached(trio, name):
    (trio / "loop").symlink_to("loop")
    for src, dst in [(trio / name, trio / "dst"), (trio / "src", trio / name)]:
        for work in (convert, checkpoint.verify):
            with pytest.raises((checkpoint.Refused, checkpoint.Difference)):
                work(src, dst)


def test_many_conversions_into_one_folder(trio):
    """One writes, the others are refused or find it finished; then there is one whole conversion."""
    src, dst = trio / "src", trio / "dst"
    running = []
    for i in range(4):
        options = ["--shard-size", SIZE] if i % 2 else ["--shard-size", "1MiB"]
        command = [sys.executable, "-m", "flagops", "convert", str(src), str(dst), "--quiet", *options]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    ends = [(process.communicate()[1], process.returncode) for process in running]
    assert {code for _, code in ends} <= {0, 2}, ends
    assert all("another conversion is writing" in said or "other options" in said for said, code in ends if code), ends
    assert checkpoint.verify(src, dst).state == "verified"


def test_a_disk_that_may_only_be_read(trio):
    src, dst = trio / "src", trio / "stopped"
    script = (
        f"mount --bind {dst} {dst} && mount -o remount,ro,bind {dst} && {sys.executable} -m flagops convert {src} {dst}"
    )
    try:
        probe = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode:
        pytest.skip(f"no mounts here: {probe.stderr.strip()}")
    before = tree(dst)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{script} --shard-size {SIZE}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(dst) == before


def test_nothing_of_a_checkpoint_is_run(trio):
    """Neither its Python files nor its pickles, nor what its configuration says is to be run."""
    src = trio / "src"
    ran = trio / "ran"
    (src / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')")
    (src / "sitecustomize.py").write_text(f"open({str(ran)!r}, 'w')")
    (src / "flagops.py").write_text(f"open({str(ran)!r}, 'w')")
    (src / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + os.fsencode(ran) + b"'\ntR.")
    config = data.CONFIG | {"auto_map": {"AutoModel": "modeling_x.X"}, "trust_remote_code": True}
    (src / "config.json").write_text(json.dumps(config))
    script = (
        "import sys; seen = []\n"
        "from flagops import checkpoint\n"
        "checkpoint.convert(sys.argv[3], sys.argv[4], backend='numpy')\n"
        "sys.addaudithook(lambda event, args: seen.append(event))\n"
        "checkpoint.convert(*sys.argv[1:3], backend='numpy'); checkpoint.verify(*sys.argv[1:3], backend='numpy')\n"
        "print(sorted({'exec', 'compile', 'pickle.find_class', 'marshal.loads', 'subprocess.Popen', 'os.system',"
        " 'import', 'socket.connect'} & set(seen)))"
    )
    warm, _ = data.experts(trio / "warm", rows=128, columns=128)
    command = [sys.executable, "-c", script, str(src), str(trio / "dst"), str(warm), str(trio / "warmed")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=trio)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert not ran.exists()
    assert (trio / "dst" / "modeling_x.py").read_text() == (src / "modeling_x.py").read_text()


def test_a_process_that_holds_much_is_refused_only_what_it_asked_for(tmp_path, rng, monkeypatch):
    """What nobody limited does not depend on the models that the process has loaded besides."""
    packed, scale, _ = data.fp4(rng, 128, 128)
    src = data.write(tmp_path / "src", {"m.safetensors": {"e.weight": packed, "e.scale": scale}}, data.CONFIG)
    for module in ("runs", "work"):
        monkeypatch.setattr(f"flagops.checkpoint.{module}.resident", lambda: 6 << 30)
    with pytest.raises(checkpoint.Refused, match="is too little"):
        checkpoint.convert(src, tmp_path / "dst", memory="4GiB")
    assert checkpoint.convert(src, tmp_path / "dst").state == "converted"
    assert checkpoint.verify(src, tmp_path / "dst").state == "verified"
