"""Sources that mean harm, are damaged or written to meanwhile: refused by name, in a line, or read as stamped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import convert, refused, tree  # noqa: E402
from checkpoint_mutations import inverted, reheaded, rewritten_in_place  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint import documents  # noqa: E402
from flagops.checkpoint.source import MANIFEST  # noqa: E402

pytest_plugins = ["checkpoint_worlds"]

# A source that is written to


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"]
)
@pytest.mark.parametrize("work", ["convert", "verify", "load"])
def test_a_source_changed_at_any_read(trio, monkeypatch, work, name):
    """In place, size and times put back: what was read is what was stamped, or the run ends with the file's name."""
    src, read, refusals = trio / "src", os.preadv, []
    whole = {path: path.read_bytes() for path in src.glob("*") if path.is_file()}
    right = list(checkpoint.load(src))

    def run(dst):
        if work == "convert":
            convert(src, dst, workers=1)
            assert tree(dst) == tree(trio / "finished")
        elif work == "verify":
            checkpoint.verify(src, trio / "finished", workers=1)
        else:
            for (first, x), (second, y) in zip(checkpoint.load(src), right, strict=True):
                assert first == second
                assert data.raw(x) == data.raw(y), first

    def ended(dst):
        """Whether the run was refused, which must be for that file."""
        try:
            run(dst)
        except checkpoint.Refused as refusal:
            return str(refusal).startswith(f"{src / name} has changed") or pytest.fail(str(refusal))
        return False

    for at in range(1, 100):
        calls = []

        def preadv(*args, at=at, calls=calls):
            calls.append(args)
            if len(calls) == at:
                rewritten_in_place(src / name, inverted)
            return read(*args)

        monkeypatch.setattr(os, "preadv", preadv)
        refusals += [at] if ended(trio / str(at)) else []
        monkeypatch.setattr(os, "preadv", read)
        if len(calls) < at:
            break
        (src / name).write_bytes(whole[src / name])
    assert refusals or (work, name) == ("load", "tokenizer.json")


@pytest.mark.parametrize("name", ["config.json", data.INDEX, "model-00002-of-00002.safetensors"])
def test_a_source_changed_while_it_is_planned_with(trio, monkeypatch, name):
    src, parsed = trio / "src", documents.parsed
    contents = documents.contents

    def change(path):
        if path.name == name:
            rewritten_in_place(path, lambda raw: raw[:-1] + b" ")

    def after(handle, path, *more, **options):
        found = contents(handle, path, *more, **options)
        change(path)
        return found

    def before(path, *more, **options):
        change(path) if name.startswith("model-") else None
        return parsed(path, *more, **options)

    monkeypatch.setattr(documents, "contents", after)
    monkeypatch.setattr(documents, "parsed", before)
    refused(lambda: convert(src, trio / "dst"), name, "has changed")


def test_a_source_changed_between_two_runs(trio):
    src, dst = trio / "src", trio / "stopped"
    rewritten_in_place(min(src.glob("*.safetensors")), inverted)
    refused(lambda: convert(src, dst), str(dst), ".safetensors was made of another SRC", "empty DST")
    assert not (dst / data.INDEX).exists()


def test_a_source_that_was_only_touched_is_gone_on_with(trio):
    src, dst = trio / "src", trio / "stopped"
    rewritten_in_place(min(src.glob("*.safetensors")), lambda raw: raw)
    before = {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}
    assert convert(src, dst).resumed_shards == len(before)
    assert {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")} == before
    assert tree(dst) == tree(trio / "finished")


def test_a_stamp_is_taken_when_a_later_change_gives_another(tmp_path):
    path = tmp_path / "file"
    for _ in range(20):
        path.write_bytes(b"text")
        found = documents.settled(path)
        rewritten_in_place(path, lambda raw: raw)
        now = documents.stamp(path.stat())
        assert now[:2] == found[:2]
        assert now != found


# Documents


def put(name, text):
    return lambda src: (src / name).write_text(text)


def link(name, target):
    def edit(src):
        (src / name).unlink()
        (src / name).symlink_to(target)

    return edit


def tensor(**facts):
    """A tensor of no elements in the header and the index, but for some facts."""

    def edit(src):
        shard = max(src.glob("*.safetensors"))

        def change(raw):
            header = json.loads(raw)
            end = max(facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__")
            header["odd"] = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]} | facts
            return json.dumps(header).encode()

        reheaded(shard, change)
        index = json.loads((src / data.INDEX).read_text())
        index["weight_map"]["odd"] = shard.name
        (src / data.INDEX).write_text(json.dumps(index))

    return edit


def block(*sizes):
    return put("config.json", json.dumps({"quantization_config": {"weight_block_size": sizes}}))


def deep(src):
    here = os.getcwd()
    os.chdir(src)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)


BAD = {
    "config: a link to nowhere": (link("config.json", "nowhere"), "config.json", "is missing"),
    "config: a loop": (link("config.json", "config.json"), "config.json", "cannot be reached"),
    "config: half a character": (put("config.json", '{"a": "\\ud800"}'), "config.json", "written again"),
    "config: digits": (put("config.json", '{"a": ' + "9" * 5000 + "}"), "config.json", "digits"),
    "config: a large block": (block(10**30, 128), "weight_block_size", "at most"),
    "config: a block of 64 bits": (block(1 << 40, 1 << 40), "weight_block_size", "at most"),
    "config: names": (
        put("config.json", '{"quantization_config": {"ignored_layers": 5}}'), "ignored_layers", "a list of names",
    ),
    "config: 2 MB": (put("config.json", json.dumps({"a": "x" * 2_000_000})), "config.json", "2,000,009 bytes"),
    "index: a link to nowhere": (link(data.INDEX, "nowhere"), data.INDEX, "is missing"),
    "index: not finite": (put(data.INDEX, '{"a": NaN}'), data.INDEX, "no finite number"),
    "index: 1e999": (put(data.INDEX, '{"a": 1e999}'), data.INDEX, "no finite number"),
    "header: dtype": (tensor(dtype=[]), "'odd'", "dtype is []"),
    "header: dtype of an object": (tensor(dtype={}), "'odd'", "dtype is {}"),
    "header: a size of 401 digits": (tensor(shape=[10**400]), "'odd'", "shape is ["),
    "header: a size of 31 digits beside 0": (tensor(shape=[10**30, 0]), "'odd'", "shape is ["),
    "header: sizes beside 0": (tensor(shape=[1 << 40, 1 << 40, 0]), "'odd'", "no array can have"),
    "header: 100,000 sizes": (tensor(shape=[1 << 60] * 100_000), "'odd'", "no array can have"),
    "header: 33 sizes": (tensor(shape=[0] * 33), "'odd'", "no array can have"),
    "header: a shape of an object": (tensor(shape={}), "'odd'", "shape is {}"),
    "header: offsets": (tensor(data_offsets=[10**400, 10**400]), "'odd'", "data_offsets is ["),
    "folders": (deep, "d/d", "deeper than 64"),
    "a name": (lambda src: (src / ("x" * 250)).write_text(""), "xxx", "shorter"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(trio, case):
    edit, *named = BAD[case]
    edit(trio / "src")
    start = time.monotonic()
    try:
        refused(lambda: convert(trio / "src", trio / "dst"), *named)
        assert time.monotonic() - start < 10
        assert not (trio / "dst").exists()
    finally:
        subprocess.run(["rm", "-rf", trio / "src"], check=True)  # folders deeper than Python removes


def test_matrices_without_rows_take_no_time(trio):
    """2^55 matrices of FP8 without elements, as a shape may say."""
    src = trio / "src"
    tensor(dtype="F8_E4M3", shape=[1 << 48, 0, 128])(src)
    shard = max(src.glob("*.safetensors"))

    def change(raw):
        header = json.loads(raw)
        header["odd_scale_inv"] = header["odd"] | {"dtype": "F8_E8M0", "shape": [1 << 48, 0, 1]}
        return json.dumps(header).encode()

    reheaded(shard, change)
    index = json.loads((src / data.INDEX).read_text())
    index["weight_map"]["odd_scale_inv"] = shard.name
    (src / data.INDEX).write_text(json.dumps(index))
    start = time.monotonic()
    convert(src, trio / "dst")
    assert time.monotonic() - start < 10
    assert data.read(trio / "dst")[0]["odd"].shape == (1 << 48, 0, 128)


def test_infinities_of_a_configuration_stay(trio):
    """`time_step_limit` of Mamba's is [0.0, Infinity]."""
    config = data.CONFIG | {"time_step_limit": [0.0, float("inf")]}
    (trio / "src" / "config.json").write_text(json.dumps(config))
    convert(trio / "src", trio / "dst")
    assert json.loads((trio / "dst" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def test_names_of_any_bytes_are_copied_and_printed_in_lines(trio, capfd):
    src, dst = trio / "src", trio / "dst"
    names = [b"a\nb.txt", b"\xff.txt", b"\x1b[31m.txt", b"left\nout.bin"]
    for name in names:
        (src / os.fsdecode(name)).write_bytes(name)
    assert main(["convert", str(src), str(dst)]) == 0
    for name in names[:3]:
        assert (dst / os.fsdecode(name)).read_bytes() == name
    assert main(["verify", str(src), str(dst)]) == 0
    shown = "".join(capfd.readouterr())
    assert "left\\nout.bin" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("where", "text"),
    [*(("index", text) for text in ("objects", "lists", "texts", "one character wide", "names")),
     ("header", "names"), ("manifest", "lists")],
)  # fmt: skip
def test_documents_stay_within_the_memory(trio, where, text):
    """Tens of MB of JSON are refused with what they need, not parsed beyond --memory."""
    made = {
        "objects": lambda: b"[" + b'{"a":1},' * 3_000_000 + b"1]",
        "lists": lambda: b"[" + b"[]," * 8_000_000 + b"1]",
        "texts": lambda: b"[" + '"\u0100",'.encode() * 4_000_000 + b"1]",
        "one character wide": lambda: b'["\xf0\x9f\x98\x80", "' + b"x" * 60_000_000 + b'"]',
        "names": lambda: b"{" + b",".join(b'"%d":0' % i for i in range(2_000_000)) + b"}",
    }[text]()
    raw = b'{"metadata": ' + made + b"}"
    src = trio / "src"
    if where == "index":
        (src / data.INDEX).write_bytes(raw)
    elif where == "header":
        reheaded(min(src.glob("*.safetensors")), lambda _: raw)
    else:
        (trio / "finished" / MANIFEST).write_bytes(raw)
    script = (
        "import sys; from flagops import checkpoint; from flagops.checkpoint.memory import peak\n"
        "try: checkpoint.convert(*sys.argv[1:], memory='400MiB', backend='numpy')\n"
        "except checkpoint.Refused as refusal: print(peak() >> 20, refusal)"
    )
    command = [sys.executable, "-c", script, str(src), str(trio / "finished")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most, _, said = done.stdout.partition(" ")
    assert int(most) <= 400, said
    assert "MiB of --memory" in said
