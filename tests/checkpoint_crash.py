"""Conversions that end badly, each in a process of its own: ``python checkpoint_crash.py MODE ...``.

A conversion writes, syncs and renames through ``os``; these functions are wrapped so that a process dies, slows down or
fails at a chosen call.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from flagops import checkpoint
from flagops.__main__ import main
from flagops.checkpoint.source import INDEX, JOURNAL, MANIFEST

SIZE = "60000"


def tree(folder):
    """Every file below a folder and its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Deadly:
    """Kills this process at its `at`-th write, sync, rename or removal; a write then has written half."""

    def __init__(self, at):
        self.at, self.count, self.lock = at, 0, threading.Lock()
        for name in ("write", "fsync", "replace", "ftruncate", "unlink", "open"):
            setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, function):
        def call(*args, **kwargs):
            with self.lock:
                self.count += 1
                if self.count == self.at:
                    if name == "write":
                        function(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def child(work):
    """Run in a forked process; returns its wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def interrupted(convert, src, dst):
    """A conversion that has made all but its manifest and index."""
    replace = os.replace

    def fail(old, new):
        if Path(new).name == MANIFEST:
            raise OSError(5, "Input/output error", str(new))
        replace(old, new)

    os.replace = fail
    try:
        convert(src, dst)
    except OSError:
        return dst
    finally:
        os.replace = replace
    raise AssertionError("no manifest was written")


def convert(src, dst, **options):
    return checkpoint.convert(src, dst, **({"shard_size": SIZE, "workers": 2} | options))


def refused(work, *named):
    """The message of a refusal, one line that holds all that is named."""
    try:
        work()
    except checkpoint.Refused as refusal:
        text = str(refusal)
    else:
        raise AssertionError("not refused")
    assert text.isprintable()
    for name in named:
        assert name in text, text
    return text


def check(dst, reference):
    """Nothing half-written has a final name, and what has an index is whole."""
    found = {n: text for n, text in tree(dst).items() if n != JOURNAL and not n.endswith(".partial")}
    for name, text in found.items():
        assert text == reference[name], f"{name} is half-written"
    if INDEX in found:
        assert set(found) == set(reference), set(reference) - set(found)
    return len(found)


def sweep(src, work, step, seed):
    """Die at every step-th call, look at what is left, go on, and compare with an uninterrupted conversion."""
    src, work, step = Path(src), Path(work), int(step)
    convert(src, work / "reference")
    reference = tree(work / "reference")
    dst, counted = work / "dst", work / "count"

    def count():
        calls = Deadly(0)
        convert(src, dst)
        counted.write_text(str(calls.count))

    assert child(count) == 0
    assert tree(dst) == reference
    total = int(counted.read_text())
    killed = 0
    for at in range(1 + random.Random(seed).randrange(step), total + 1, step):
        shutil.rmtree(dst)
        status = child(lambda at=at: (Deadly(at), convert(src, dst)))
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if dst.exists():
            check(dst, reference)
        assert child(lambda: convert(src, dst)) == 0, f"not resumed after call {at} of {total}"
        assert tree(dst) == reference, f"after call {at} of {total}"
    print(json.dumps({"calls": total, "killed": killed}))


def relay(src, work, calls):
    """Each process lives for so many calls; together they must finish, so each keeps what the one before finished."""
    src, work = Path(src), Path(work)
    convert(src, work / "reference")
    reference = tree(work / "reference")
    dst, most, lives = work / "dst", 0, 0
    while (status := child(lambda: (Deadly(int(calls)), convert(src, dst)))) != 0:
        assert os.WIFSIGNALED(status), status
        lives += 1
        assert lives < 200, "no progress"
        finished = check(dst, reference) if dst.exists() else 0
        assert finished >= most, "a finished file was lost"
        most = finished
    assert tree(dst) == reference
    print(json.dumps({"lives": lives}))


def slow(seconds, *command):
    """A command whose syncs take longer, and that can be interrupted even as the background job of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sync = os.fsync
    os.fsync = lambda file: (time.sleep(float(seconds)), sync(file))[1]
    return main(list(command))


def limited(size, *command):
    """A command that may write no file larger than `size` bytes: what a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    return main(list(command))


def full(src, dst):
    """In a mount namespace of its own: a disk that fills up, then grows."""
    command = ["convert", src, dst, "--shard-size", SIZE]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", dst], check=True)
    assert main(command) == 3, "the plan must see that the disk is too small"
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: type("usage", (), {"free": 1 << 40})
    assert main(command) == 3
    shutil.disk_usage = usage
    left = os.listdir(dst)
    assert not [name for name in left if name.endswith((".partial", INDEX))], left
    print("finished before:", len([name for name in left if name.endswith(".safetensors")]))
    subprocess.run(["mount", "-o", "remount,size=50m", dst], check=True)
    assert main([*command, "--json", "--quiet"]) == 0
    assert main(["verify", src, dst, "--quiet"]) == 0


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    sys.exit(globals()[mode](*words))
