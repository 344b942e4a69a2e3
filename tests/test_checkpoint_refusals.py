"""What `flagops convert` refuses: a change to a good checkpoint, and words that the message must hold."""

import json
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.errors import Unsupported  # noqa: E402

EXPERT = "layers.0.ffn.experts.0.w1"
SHARD = "model-00001-of-00001.safetensors"


def shard_of(src, name=f"{EXPERT}.weight"):
    return src / json.loads((src / data.INDEX).read_text())["weight_map"][name]


def edit_index(change):
    def edit(src):
        index = json.loads((src / data.INDEX).read_text())
        change(src, index)
        (src / data.INDEX).write_text(json.dumps(index))

    return edit


def edit_header(change):
    def edit(src):
        raw = (src / SHARD).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (src / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return edit


def edit_tensors(change):
    def edit(src):
        from safetensors.torch import load_file, save_file

        tensors = load_file(src / SHARD)
        change(tensors)
        save_file(tensors, src / SHARD)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
        (src / data.INDEX).write_text(json.dumps(index))

    return edit


def edit_bytes(change):
    return lambda src: (src / SHARD).write_bytes(change((src / SHARD).read_bytes()))


def points(where):
    return edit_index(lambda src, index: index["weight_map"].update({f"{EXPERT}.weight": where}))


def outside(src, index):
    (src.parent / "elsewhere.safetensors").write_bytes((src / SHARD).read_bytes())
    (src / "link.safetensors").symlink_to(src.parent / "elsewhere.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "link.safetensors")


def fifo(src, index):
    os.mkfifo(src / "pipe.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pipe.safetensors")


def raw_index(text):
    return lambda src: (src / data.INDEX).write_text(text)


def put(name, tensor):
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def poke(name, value, dtype=torch.uint8):
    """One element of a tensor overwritten by its bits."""
    return edit_tensors(lambda tensors: tensors[name].view(dtype).view(-1).__setitem__(3, value))


def scale_to(name, tensor):
    return edit_tensors(lambda t: t.update({name: tensor}))


def e8m0(*shape, value=127):
    return torch.full(shape, value, dtype=torch.uint8).view(torch.float8_e8m0fnu)


FP8 = "layers.0.attn.wq_a"
BAD = {
    "no scale: FP4": (edit_tensors(lambda t: t.pop(f"{EXPERT}.scale")), f"{EXPERT}.weight", "no scale"),
    "no scale: FP8": (edit_tensors(lambda t: t.pop(f"{FP8}.scale")), f"{FP8}.weight", "no scale"),
    "unknown: uint8": (put("extra", torch.zeros(4, dtype=torch.uint8)), "extra", "no scale"),
    "unknown: e5m2": (put("extra", torch.zeros(4, 4).to(torch.float8_e5m2)), "extra", "no scale"),
    "no weight: e8m0": (put("extra.scale", e8m0(2, 2)), "extra.scale", "no weight"),
    "no weight: float32": (put("extra.weight_scale_inv", torch.ones(2, 2)), "extra.weight_scale_inv", "is not of one"),
    "two scales": (put(f"{FP8}.weight_scale_inv", torch.ones(1, 2)), f"{FP8}.weight", "two scales"),
    "K: FP4": (scale_to(f"{EXPERT}.scale", e8m0(256, 11)), f"{EXPERT}.weight", "K = 384"),
    "rows: FP4": (scale_to(f"{EXPERT}.scale", e8m0(255, 12)), f"{EXPERT}.weight", "expected F8_E8M0 [256, 12"),
    "dtype: FP4": (scale_to(f"{EXPERT}.scale", torch.ones(256, 12)), f"{EXPERT}.weight", "expected F8_E8M0"),
    "blocks: FP8": (scale_to(f"{FP8}.scale", e8m0(2, 2)), f"{FP8}.weight", "each 128 x 128 block"),
    "dtype: FP8": (scale_to(f"{FP8}.scale", torch.ones(1, 2).double()), f"{FP8}.weight", "F32, BF16 or F16"),
    "a vector": (
        edit_tensors(lambda t: t.update({f"{FP8}.weight": t[f"{FP8}.weight"][0], f"{FP8}.scale": e8m0(2)})),
        f"{FP8}.weight", "no matrix",
    ),
    "NaN scale: FP4": (poke(f"{EXPERT}.scale", 255), f"{EXPERT}.scale", "0xFF (NaN)"),
    "NaN scale: FP8": (scale_to(f"{FP8}.scale", e8m0(1, 2, value=255)), f"{FP8}.scale", "0xFF (NaN)"),
    "NaN scale: float32": (scale_to(f"{FP8}.scale", torch.full((1, 2), torch.nan)), f"{FP8}.scale", "not finite"),
    "infinite scale": (scale_to(f"{FP8}.scale", torch.full((1, 2), -torch.inf)), f"{FP8}.scale", "not finite"),
    "NaN code": (poke(f"{FP8}.weight", 255), f"{FP8}.weight", "0xFF (NaN)"),
    "NaN code, positive": (poke(f"{FP8}.weight", 127), f"{FP8}.weight", "0x7F"),
    "overflow: FP4": (scale_to(f"{EXPERT}.scale", e8m0(256, 12, value=254)), f"{EXPERT}.weight", "overflows bfloat16"),
    "overflow: FP8": (scale_to(f"{FP8}.scale", e8m0(1, 2, value=254)), f"{FP8}.weight", "overflows bfloat16"),
    "overflow: float32": (scale_to(f"{FP8}.scale", torch.full((1, 2), 3e38)), f"{FP8}.weight", "overflows bfloat16"),
    "path: up": (points("../x.safetensors"), "../x.safetensors", "outside"),
    "path: absolute": (points("/etc/x.safetensors"), "/etc/x.safetensors", "outside"),
    "path: backslash": (points("..\\x.safetensors"), "x.safetensors", "outside"),
    "path: drive": (points("C:x.safetensors"), "C:x.safetensors", "outside"),
    "path: link": (edit_index(outside), "link.safetensors", "outside"),
    "path: pipe": (edit_index(fifo), "pipe.safetensors", "no regular file"),
    "path: not a name": (points(7), f"{EXPERT}.weight", "only .safetensors"),
    "path: pickle": (points("pytorch_model.bin"), "pytorch_model.bin", "only .safetensors"),
    "path: missing": (points("absent.safetensors"), "absent.safetensors", "missing"),
    "index: no tensor": (edit_index(lambda s, i: i["weight_map"].update(ghost=SHARD)), "'ghost'", "missing"),
    "index: an extra one": (edit_index(lambda s, i: i["weight_map"].pop("norm.weight")), "'norm.weight'", "not in the"),
    "index: twice": (raw_index(f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}'), "'a'", "appears twice"),
    "index: no JSON": (raw_index("{"), data.INDEX, "no valid JSON"),
    "index: a list": (raw_index("[]"), data.INDEX, "no JSON object"),
    "index: deep": (raw_index("[" * 100_000), data.INDEX, "no valid JSON"),
    "index: no map": (raw_index("{}"), data.INDEX, "no weight_map"),
    "config: no JSON": (lambda src: (src / "config.json").write_bytes(b"\xff"), "config.json", "no valid JSON"),
    "config: method": (
        lambda src: (src / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
        "gptq", "is not known",
    ),
    "config: block": (
        lambda src: (src / "config.json").write_text('{"quantization_config": {"weight_block_size": [128]}}'),
        "weight_block_size", "two positive",
    ),
    "truncated": (edit_bytes(lambda raw: raw[:-1]), SHARD, "is cut short"),
    "truncated header": (edit_bytes(lambda raw: raw[:40]), SHARD, "is cut short"),
    "empty": (edit_bytes(lambda raw: b""), SHARD, "is cut short"),
    "too long": (edit_bytes(lambda raw: raw + b"x"), SHARD, "after its last tensor"),
    "header: length": (edit_bytes(lambda raw: b"\xff" * 8 + raw[8:]), SHARD, "no safetensors header"),
    "header: no JSON": (edit_bytes(lambda raw: raw[:9] + b"\x00" + raw[10:]), SHARD, "no valid JSON"),
    "header: twice": (
        edit_bytes(lambda raw: raw[:8] + raw[8:].replace(b"experts.1.", b"experts.0.", 1)), f"{EXPERT}.", "twice",
    ),
    "header: dtype": (edit_header(lambda h: h["norm.weight"].update(dtype="F3")), "'norm.weight'", "unknown dtype"),
    "header: shape": (edit_header(lambda h: h["norm.weight"].update(shape=[17])), "'norm.weight'", "expected 34"),
    "header: negative": (edit_header(lambda h: h["norm.weight"].update(shape=[-4, -4])), "'norm.weight'", "damaged"),
    "header: no number": (edit_header(lambda h: h["norm.weight"].update(shape=[1.6e1])), "'norm.weight'", "damaged"),
    "header: no offsets": (edit_header(lambda h: h["norm.weight"].pop("data_offsets")), "'norm.weight'", "damaged"),
    "header: overlap": (edit_header(
        lambda h: h["norm.weight"].update(data_offsets=[o + 2 for o in h["norm.weight"]["data_offsets"]])
    ), SHARD, "starts at"),
    "no safetensors": (lambda src: [p.unlink() for p in src.glob("*.safetensors*")], "src", "no safetensors"),
    "other: link": (lambda src: (src / "notes.txt").symlink_to("/etc/hostname"), "notes.txt", "outside"),
    "other: folder link": (lambda src: (src / "notes").symlink_to("/etc"), "notes", "link to a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, case):
    edit, named, said = BAD[case]
    src, _ = data.experts(tmp_path / "src")
    edit(src)
    dst = tmp_path / "dst"
    with pytest.raises(checkpoint.Refused) as refusal:
        checkpoint.convert(src, dst)
    assert named in str(refusal.value)
    assert said in str(refusal.value)
    left = {p.name for p in dst.rglob("*")} if dst.exists() else set()
    assert data.INDEX not in left
    assert "config.json" not in left
    assert not any(name.endswith(".partial") for name in left)


def test_the_checkpoint_of_the_bad_cases_is_good(tmp_path):
    src, expected = data.experts(tmp_path / "src")
    edit_tensors(lambda t: None)(src)
    edit_header(lambda h: None)(src)
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)


def test_a_tensor_in_two_shards(tmp_path):
    src, _ = data.experts(tmp_path / "src", shards=2)
    first, second = sorted(src.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(checkpoint.Refused, match=r"is also in model-00001-of-00002"):
        checkpoint.convert(src, tmp_path / "dst")


def test_large_scales_that_overflow_nothing_are_converted(tmp_path):
    src, _ = data.experts(tmp_path / "src", low=252, high=253)
    checkpoint.convert(src, tmp_path / "dst")
    zeros = edit_tensors(
        lambda t: t.update({f"{EXPERT}.weight": torch.zeros(256, 192, dtype=torch.int8),
                            f"{EXPERT}.scale": e8m0(256, 12, value=254)})
    )  # fmt: skip
    zeros(src)
    checkpoint.convert(src, tmp_path / "zero")
    assert not data.read(tmp_path / "zero")[0][f"{EXPERT}.weight"].any()


def test_nothing_to_convert(tmp_path):
    src = data.write(tmp_path / "src", {SHARD: {"a": torch.ones(3)}})
    with pytest.raises(checkpoint.Refused, match="no tensor to convert"):
        checkpoint.convert(src, tmp_path / "dst")
    src, _ = data.mixed(tmp_path / "v3", floating=True)
    with pytest.raises(checkpoint.Refused, match="no tensor to convert from FP4"):
        checkpoint.convert(src, tmp_path / "dst", to="fp8")


@pytest.mark.parametrize("dst", ["src", "src/inside", "."])
def test_dst_and_src_apart(tmp_path, dst):
    src, _ = data.experts(tmp_path / "src")
    before = tree(tmp_path)
    with pytest.raises(checkpoint.Refused, match="apart"):
        checkpoint.convert(src, tmp_path / dst)
    (tmp_path / "link").symlink_to(src)
    with pytest.raises(checkpoint.Refused, match="apart"):
        checkpoint.convert(src, tmp_path / "link" / "inside")
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


def test_a_dst_of_something_else(tmp_path):
    src, _ = data.experts(tmp_path / "src")
    other, _ = data.experts(tmp_path / "other", count=3)
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.txt").write_text("text")
    with pytest.raises(checkpoint.Refused, match=r"thesis\.txt"):
        checkpoint.convert(src, dst)
    assert tree(dst) == {"thesis.txt": b"text"}
    (dst / "thesis.txt").unlink()
    (dst / "lost+found").mkdir()
    checkpoint.convert(src, dst)
    before = tree(dst)
    assert checkpoint.convert(src, dst).state == "already finished"
    for options, said in [({"to": "fp8"}, "fp8"), ({"shard_size": "1MiB"}, "1048576")]:
        with pytest.raises(checkpoint.Refused, match=f"other options.*{said}"):
            checkpoint.convert(src, dst, **options)
    with pytest.raises(checkpoint.Refused, match="another SRC"):
        checkpoint.convert(other, dst)
    assert tree(dst) == before
    (dst / "file").write_text("")
    with pytest.raises(checkpoint.Refused, match="is a file"):
        checkpoint.convert(src, dst / "file")


@pytest.mark.parametrize("changed", ["src", "dst"])
def test_finished_is_said_of_what_was_compared(tmp_path, changed, capsys):
    """One bit, in a file of the same size and time."""
    src, _ = data.experts(tmp_path / "src")
    dst = tmp_path / "dst"
    checkpoint.convert(src, dst)
    assert checkpoint.convert(src, dst).compared_tensors
    path = max((tmp_path / changed).glob("*.safetensors"), key=lambda p: p.stat().st_size)
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(checkpoint.Refused, match=r"differs.*empty DST and convert again"):
        checkpoint.convert(src, dst)
    assert checkpoint.convert(src, dst, dry_run=True).state.startswith("finished, by the names")
    who = "SRC has changed since" if changed == "src" else "DST was damaged or SRC changed since"
    with pytest.raises(checkpoint.Difference, match=rf"differs.*{who}.*empty DST and convert again"):
        checkpoint.verify(src, dst)


def test_a_finished_dst_that_lost_a_file(tmp_path):
    src, _ = data.experts(tmp_path / "src")
    checkpoint.convert(src, tmp_path / "dst")
    (tmp_path / "dst" / SHARD).unlink()
    with pytest.raises(checkpoint.Refused, match=SHARD):
        checkpoint.convert(src, tmp_path / "dst")


def test_links_of_the_hub_cache(tmp_path):
    """Snapshots there are links to ../../blobs; a link anywhere else is refused."""
    plain, expected = data.experts(tmp_path / "plain")
    src = tmp_path / "models--a--b" / "snapshots" / "main"
    blobs = tmp_path / "models--a--b" / "blobs"
    src.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(p for p in plain.iterdir() if p.is_file()):
        path.rename(blobs / str(i))
        (src / path.name).symlink_to(f"../../blobs/{i}")
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(checkpoint.Refused, match="outside"):
        checkpoint.convert(src, tmp_path / "dst2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "int4"}, "expected bf16 or fp8 or int8 or w4a8"),
        ({"shard_size": "5 bananas"}, "5 bananas"),
        ({"memory": "1MiB"}, "give at least"),
        ({"memory": "lots"}, "lots"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 10**6}, "give at least"),
        ({"backend": "nunba"}, "did you mean 'numba'"),
    ],
)
def test_options_are_refused(tmp_path, options, said):
    src, _ = data.experts(tmp_path / "src")
    with pytest.raises(ValueError, match=said):
        checkpoint.convert(src, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_a_backend_that_cannot_run_says_why(tmp_path, monkeypatch):
    from flagops import registry

    src, _ = data.experts(tmp_path / "src")
    monkeypatch.setattr(registry, "written", lambda op, name: False)
    with pytest.raises(Unsupported, match=r"numba: has no kernel of fp4_dequantize, fp8_dequantize; torch: "):
        checkpoint.convert(src, tmp_path / "dst")
