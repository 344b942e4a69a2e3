"""The folder of compiled code: nobody else can put code there, and what is damaged is compiled again."""

import contextlib
import grp
import itertools
import os
import pwd
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from flagops import config
from flagops.backends import _store
from flagops.backends._store import Refused, Store

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system's files have no owner and mode")


def given_away(path, monkeypatch):
    """A folder or file of another user."""
    if os.geteuid() == 0:
        os.chown(path, 1, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def test_what_was_written_is_read(tmp_path):
    store = Store(tmp_path / "made" / "here")
    assert store.read("code") is None
    for content in (b"", b"first", os.urandom(100_000)):
        store.write("code", content)
        assert store.read("code") == content
    assert os.listdir(store.folder) == ["code"], "a temporary file was left"


@posix
def test_folders_are_made_for_their_user_alone(tmp_path):
    before = os.umask(0)
    try:
        store = Store(tmp_path / "a" / "b")
        store.write("code", b"content")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b", store.folder / "code")]
    assert modes == [0o700, 0o700, 0o600]


def test_no_flipped_bit_is_read(tmp_path, rng):
    store = Store(tmp_path)
    content = rng.bytes(500)
    store.write("code", content)
    whole = (tmp_path / "code").read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "code").write_bytes(damaged)
        assert store.read("code") is None, bit
    for damaged in (*(whole[:size] for size in range(len(whole))), whole + b"\0", whole[32:], b"\0" * len(whole)):
        (tmp_path / "code").write_bytes(damaged)
        assert store.read("code") is None, len(damaged)
    (tmp_path / "code").write_bytes(whole)
    assert store.read("code") == content


def test_no_file_is_read_under_anothers_name(tmp_path):
    store = Store(tmp_path)
    store.write("code", b"content")
    (tmp_path / "code").rename(tmp_path / "other")
    assert store.read("other") is None


@posix
@pytest.mark.parametrize("mode", [0o770, 0o720, 0o707, 0o702, 0o777, 0o1777])
@pytest.mark.parametrize("place", ["cache", "cache/numba/1"])
def test_a_folder_that_others_can_write_is_refused(tmp_path, place, mode, monkeypatch):
    monkeypatch.setattr(_store, "_alone", lambda group: False)
    folder = Store(tmp_path / "cache" / "numba" / "1").folder
    (tmp_path / place).chmod(mode)
    if mode == 0o1777 and place == "cache":  # as in /tmp, nobody can take away what is not his
        Store(folder)
        return
    with pytest.raises(Refused, match=rf"{place} can be written by other users \(mode {mode:04o}\)"):
        Store(folder)


@posix
def test_a_group_of_one_is_nobody_else(tmp_path, monkeypatch):
    """Where everyone has a group of his own name, folders are made 0775."""
    user = pwd.getpwuid(os.geteuid())
    own, wheel = (user.pw_name, "x", user.pw_gid, []), (user.pw_name, "x", user.pw_gid, [user.pw_name, "other"])
    for entry, alone in ((own, True), (wheel, False), (("users", "x", user.pw_gid, []), False)):
        monkeypatch.setattr(grp, "getgrgid", lambda group, entry=entry: grp.struct_group(entry))
        _store._alone.cache_clear()
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache").chmod(0o770)
        with contextlib.nullcontext() if alone else pytest.raises(Refused, match="can be written by other users"):
            Store(tmp_path / "cache")
    monkeypatch.undo()
    _store._alone.cache_clear()


@posix
@pytest.mark.parametrize("place", ["cache", "cache/numba/1"])
def test_a_folder_of_another_user_is_refused(tmp_path, place, monkeypatch):
    folder = Store(tmp_path / "cache" / "numba" / "1").folder
    given_away(tmp_path / place, monkeypatch)
    with pytest.raises(Refused, match="belongs to user"):
        Store(folder)


@posix
def test_a_link_leads_to_where_it_is_examined(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "theirs").mkdir(mode=0o700)
    for name in ("mine", "theirs"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / name)
    assert Store(tmp_path / "to mine" / "numba").folder == tmp_path / "mine" / "numba"
    given_away(tmp_path / "theirs", monkeypatch)
    with pytest.raises(Refused, match="belongs to user"):
        Store(tmp_path / "to theirs" / "numba")


@posix
def test_a_file_of_others_or_elsewhere_is_not_read(tmp_path, monkeypatch):
    store = Store(tmp_path / "cache")
    store.write("code", b"content")
    (store.folder / "code").chmod(0o602)
    assert store.read("code") is None
    (store.folder / "code").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o600)
    (store.folder / "code").symlink_to(tmp_path / "elsewhere")
    assert store.read("code") is None
    store.write("code", b"again")
    assert store.read("code") == b"again"
    assert not (store.folder / "code").is_symlink()
    given_away(store.folder / "code", monkeypatch)
    assert store.read("code") is None


def test_relative_paths_are_refused(tmp_path, monkeypatch):
    with pytest.raises(Refused, match="relative"):
        Store("cache")
    with pytest.raises(ValueError, match="expected an absolute path, got 'cache'"):
        config.using(cache="cache").__enter__()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    if sys.platform == "linux":
        assert config.cache_folder() == str(tmp_path / ".cache" / "flagops")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("code", b"content")
    monkeypatch.setattr(os, "replace", lambda *paths: os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        store.write("code", b"other")
    assert os.listdir(tmp_path) == ["code"]
    assert store.read("code") == b"content"


def test_writers_and_readers_at_once(tmp_path):
    store, contents = Store(tmp_path), [bytes([i]) * (1000 + 7919 * i) for i in range(4)]
    store.write("code", contents[0])
    wrong, stop = [], threading.Event()

    def write(i):
        for _ in range(100):
            store.write("code", contents[i])

    def read():
        while not stop.is_set():
            if store.read("code") not in contents:
                wrong.append(1)

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong


CALLS = """
    import sys
    from numba.core import event
    import numpy, flagops
    numbers = numpy.arange(12.0).reshape(3, 4)
    for dtype in sys.argv[1].split():
        with event.install_recorder("numba:compile") as recorder:
            x = numbers.astype(dtype)
            assert (flagops.matmul(x, x.T, backend="numba") == numbers @ numbers.T).all()
    print(len(recorder.buffer))
"""


def compiled(cache, dtypes="float32", folder=ROOT, wait=True, stderr=None, **settings):
    """How many functions a process compiled for its last dtype."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOPS_")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CALLS), dtypes],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=folder,
        env=environment | {"FLAGOPS_CACHE": str(cache)} | settings,
    )
    return ended(process) if wait else process


def ended(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return int(out)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache with what a product of float32 needs."""
    cache = tmp_path_factory.mktemp("warm")
    assert compiled(cache) > 0
    assert compiled(cache) == 0
    return cache


@pytest.mark.drawn
def test_damaged_code_is_compiled_again(warm, tmp_path, rng):
    """Of every file a bit is flipped, or the end is lost; the next process has all of it again."""
    shutil.copytree(warm, tmp_path / "cache", copy_function=shutil.copy)
    files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for damage in ("flip", "truncate"):
        for path in files:
            content = bytearray(path.read_bytes())
            at = int(rng.integers(len(content)))
            content[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(content if damage == "flip" else content[:at])
        assert compiled(tmp_path / "cache") > 0
        assert compiled(tmp_path / "cache") == 0, damage


@pytest.mark.drawn
def test_a_cache_serves_at_another_path(warm, tmp_path):
    """As in an image: the cache and the installation were both copied."""
    shutil.copytree(warm, tmp_path / "image" / "cache")
    tree = tmp_path / "image" / "site"
    for name in ("flagops", "kernels", "reference"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compiled(tmp_path / "image" / "cache", folder=tree) == 0


@pytest.mark.drawn
def test_a_cache_that_cannot_be_written_serves(warm, tmp_path, monkeypatch):
    shutil.copytree(warm, tmp_path / "cache")
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert compiled(tmp_path / "cache") == 0
        assert compiled(tmp_path / "cache", "float64") > 0
    finally:
        for folder in folders:
            folder.chmod(0o700)


@posix
def test_a_folder_for_reading_alone_is_not_written_by_root_either(tmp_path):
    Store(tmp_path).write("code", b"content")
    tmp_path.chmod(0o500)
    try:
        store = Store(tmp_path)
        assert store.read("code") == b"content"
        with pytest.raises(PermissionError, match="reading alone"):
            store.write("code", b"other")
        assert os.listdir(tmp_path) == ["code"]
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.drawn
@posix
def test_what_is_shipped_is_enough_or_the_lack_is_named(warm, tmp_path):
    """A cache as in an image, where nothing may be compiled or written."""
    shutil.copytree(warm, tmp_path / "cache")
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert compiled(tmp_path / "cache", FLAGOPS_JIT="error") == 0
        lacking = compiled(tmp_path / "cache", "float64", wait=False, stderr=subprocess.PIPE, FLAGOPS_JIT="error")
        said = lacking.communicate(timeout=300)[1].splitlines()[-1]
        assert compiled(tmp_path / "cache", "float64") > 0
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert lacking.returncode == 1
    assert re.search(r"Uncompiled: FLAGOPS_JIT=error: flagops\.kernels\.numba\.[\w.-]+ would be compiled for \(", said)
    assert str(tmp_path / "cache") in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_what_cannot_be_kept_is_named_as_well(tmp_path):
    script = """
        from flagops.backends.numba import jit
        @jit
        def constant():
            return 1
        constant()
    """
    environment = os.environ | {"FLAGOPS_CACHE": str(tmp_path), "FLAGOPS_JIT": "error"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FLAGOPS_JIT=error: __main__.constant" in done.stderr.splitlines()[-1]


@pytest.mark.drawn
def test_processes_that_compile_at_once_serve_the_next(tmp_path):
    dtypes = ["float16", "float32", "float64"]
    first = [compiled(tmp_path, dtype, wait=False) for dtype in dtypes]
    assert all(ended(process) > 0 for process in first)
    for order in itertools.islice(itertools.permutations(dtypes), 2):
        assert compiled(tmp_path, " ".join(order)) == 0


def test_one_folder_for_what_code_depends_on(tmp_path):
    """Processor, each feature and each lack of one."""
    script = "from flagops.backends import numba; print(numba._folder(numba.backend.kernels))"
    folders = set()
    for name, features in (("haswell", "+avx2"), ("haswell", "-avx2"), ("haswell", "-fma"), ("znver3", "+avx2")):
        processor = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "FLAGOPS_CACHE": str(tmp_path)}
        command = [sys.executable, "-c", script]
        folders.add(subprocess.check_output(command, env=os.environ | processor, cwd=ROOT))
    assert len(folders) == 4


def test_nothing_is_kept_of_a_script(tmp_path):
    """Whose constants may change where its name, its line and its bytecode do not."""
    script = """
        from flagops.backends.numba import jit
        @jit
        def constant():
            return 1
        print(constant())
    """
    command, environment = [sys.executable, "-c"], os.environ | {"FLAGOPS_CACHE": str(tmp_path)}
    for number in "12":
        text = textwrap.dedent(script).replace("return 1", f"return {number}")
        assert subprocess.check_output([*command, text], env=environment, cwd=ROOT, text=True) == f"{number}\n"


@posix
def test_why_nothing_is_kept_is_said(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    script = "from flagops.backends import numba; print(numba.backend.facts()['cache'])"
    environment = os.environ | {"FLAGOPS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "none, " in done.stdout, done.stderr
    assert "can be written by other users (mode 0777)" in done.stdout
    assert "compiled numba kernels are not cached" in done.stderr, "a warning"


def test_an_edited_copy_of_a_module_leaves_no_code(tmp_path):
    """As mutants are: under the module's own name, from another file."""
    script = """
        import os, sys
        from pathlib import Path
        import numpy, flagops
        from flagops.judge.mutants import enter
        from flagops.kernels.numba import rotary
        copy = Path(sys.argv[1]) / "rotary.py"
        copy.write_text(Path(rotary.__file__).read_text().replace("a * cosine - b * sine", "a * cosine + b * sine"))
        enter("flagops.kernels.numba.rotary", copy)
        x, angle = numpy.ones((1, 1, 2), numpy.float32), numpy.ones((1, 1), numpy.float32)
        flagops.rotary_embedding(x, angle, angle, backend="numba")
    """
    environment = os.environ | {"FLAGOPS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = [path.name for path in (tmp_path / "cache").rglob("*.nbc")]
    assert any("_blocks" in name for name in kept)
    assert not any(".rotary." in name for name in kept)
