"""`flagops convert`, `verify` and `checkpoint.load` on small checkpoints of all formats, namings and shapes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint.plan import slices  # noqa: E402
from flagops.checkpoint.source import JOURNAL, MANIFEST  # noqa: E402
from flagops.errors import Unsupported  # noqa: E402

KINDS = [("original", False), ("transformers", False), ("original", True)]
EXPERT = "layers.0.ffn.experts.0.w1"
SHARD = "model-00001-of-00001.safetensors"


def flagops(*words, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-m", "flagops", *map(str, words)], capture_output=True, text=True, env=clean, **more
    )


@pytest.mark.parametrize("backend", [None, "numba", "torch", "numpy"])
@pytest.mark.parametrize(("naming", "floating"), KINDS)
def test_bit_by_bit(tmp_path, naming, floating, backend):
    src, expected = data.mixed(tmp_path / "src", naming, floating=floating)
    summary = checkpoint.convert(src, tmp_path / "dst", shard_size=100_000, backend=backend)
    found, index = data.read(tmp_path / "dst")
    data.same(found, expected)
    assert summary.state == "converted"
    assert summary.shards == len(set(index["weight_map"].values())) > 2
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in expected.values())}
    assert summary.peak_memory > 0
    assert any("NaN in them: layers.0.attn.attn_sink" in note for note in summary.notes), "an infinite sink is legal"
    checked = checkpoint.verify(src, tmp_path / "dst", backend=backend)
    assert (checked.state, checked.compared_tensors) == ("verified", len(expected))


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_backend_for_another_device(tmp_path, monkeypatch, to):
    """Slices go there and results come back; the way is tried with tensors that stay on the CPU."""
    from flagops import arrays
    from flagops.checkpoint.stream import Kernels

    src, _ = data.experts(tmp_path / "src")
    checkpoint.convert(src, tmp_path / "here", to=to)
    monkeypatch.setattr(Kernels, "_place", lambda self, name: "elsewhere")
    monkeypatch.setattr(Kernels, "_given", lambda self, array: arrays.as_torch(array).clone())
    checkpoint.convert(src, tmp_path / "there", to=to, backend="torch")
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_triton(tmp_path):
    from flagops import registry

    reason = registry.backend("triton").unavailable()
    if reason:
        pytest.skip(reason)
    src, expected = data.experts(tmp_path / "src", rows=128, columns=128)
    checkpoint.convert(src, tmp_path / "dst", backend="triton")
    data.same(data.read(tmp_path / "dst")[0], expected)


def test_what_lies_beside_the_tensors(tmp_path):
    src, _ = data.mixed(tmp_path / "src")
    summary = checkpoint.convert(src, tmp_path / "dst", shard_size=100_000)
    files = tree(tmp_path / "dst")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert set(files) - set(shards) == {
        data.INDEX, "config.json", MANIFEST, "tokenizer.json", "generation_config.json", "encoding/example.txt"
    }  # fmt: skip
    for name in ("tokenizer.json", "generation_config.json", "encoding/example.txt"):
        assert files[name] == (src / name).read_bytes()
    assert summary.left_out == ["pytorch_model.bin"]
    config = json.loads(files["config.json"])
    kept = {k: v for k, v in data.CONFIG.items() if k not in ("quantization_config", "expert_dtype")}
    assert config == kept
    for name in shards:
        length = int.from_bytes(files[name][:8], "little")
        header = json.loads(files[name][8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert length % 8 == 0
        for facts in header.values():
            wide = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1}[facts["dtype"]]
            assert facts["data_offsets"][0] % wide == 0, "not aligned"
    manifest = json.loads(files[MANIFEST])["files"]
    import hashlib

    assert manifest == {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in files.items()
        if name != MANIFEST
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "x": 1}, {"torch_dtype": "bfloat16", "x": 1}),
        ({"quantization_config": {"weight_block_size": [128, 128]}}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_config(tmp_path, given, expected):
    src, _ = data.experts(tmp_path / "src", config=given)
    checkpoint.convert(src, tmp_path / "dst")
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == expected


def test_the_output_depends_on_source_and_options_alone(tmp_path):
    src, _ = data.mixed(tmp_path / "src")
    trees = []
    options = [
        {},
        {"workers": 1, "backend": "numpy"},
        {"workers": 5, "backend": "torch"},
        {"memory": "1TiB", "workers": 2},
    ]
    for i, option in enumerate(options):
        checkpoint.convert(src, tmp_path / str(i), shard_size=60_000, **option)
        trees.append(tree(tmp_path / str(i)))
    assert all(tree == trees[0] for tree in trees)
    checkpoint.convert(src, tmp_path / "other", shard_size=50_000)
    assert tree(tmp_path / "other") != trees[0]


def test_slices_of_every_size_give_the_same(tmp_path, monkeypatch):
    """Rows inside a block, and columns inside a row."""
    src, expected = data.mixed(tmp_path / "src", "transformers")
    for limit in (128, 257, 1000, 128 * 130):
        monkeypatch.setattr("flagops.checkpoint.work.SMALLEST", limit)
        monkeypatch.setattr("flagops.checkpoint.work.LARGEST", limit)
        checkpoint.convert(src, tmp_path / str(limit))
        data.same(data.read(tmp_path / str(limit))[0], expected)


@given(
    st.integers(0, 40), st.integers(0, 40), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 200)
)  # fmt: skip
def test_slices_cover_a_matrix_in_order(rows, columns, unit, limit):
    covered = []
    for r0, r1, c0, c1 in slices(rows, columns, unit, limit):
        assert r1 > r0
        assert c1 > c0
        assert (r1 - r0) * (c1 - c0) <= max(limit, unit[1])
        assert (c0, c1) == (0, columns) or (r1 == r0 + 1 and c0 % unit[1] == 0)
        assert r0 % unit[0] == 0 or (r1 - 1) // unit[0] == r0 // unit[0]
        covered += [row * columns + column for row in range(r0, r1) for column in range(c0, c1)]
    assert covered == list(range(rows * columns))


def test_one_file_without_an_index(tmp_path):
    src, expected = data.experts(tmp_path / "src")
    (src / SHARD).rename(src / "model.safetensors")
    (src / data.INDEX).unlink()
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)


@pytest.mark.parametrize("backend", [None, "numpy"])
def test_fp8(tmp_path, backend):
    src, expected = data.experts(tmp_path / "src", shards=2)
    summary = checkpoint.convert(src, tmp_path / "dst", to="fp8", shard_size="200KiB", backend=backend)
    found, index = data.read(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert summary.tensors["FP4 to FP8"] == 2
    for name, values in expected.items():
        if ".experts." not in name:
            continue
        scale = found[name.removesuffix("weight") + "scale"]
        assert scale.dtype == torch.float8_e8m0fnu
        factor = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(found[name].float() * factor, values.float()), name
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config == data.CONFIG | {"expert_dtype": "fp8"}
    assert checkpoint.verify(src, tmp_path / "dst").compared_tensors == len(found)
    assert checkpoint.verify(src, tmp_path / "dst", sample=0.3, seed=1).compared_tensors < len(found)
    checkpoint.convert(tmp_path / "dst", tmp_path / "again")
    data.same(data.read(tmp_path / "again")[0], expected)


def test_fp8_config_of_the_newer_kind(tmp_path):
    config = {"quantization_config": data.CONFIG["quantization_config"] | {"expert_dtype": "fp4"}}
    src, _ = data.experts(tmp_path / "src", config=config)
    checkpoint.convert(src, tmp_path / "dst", to="fp8")
    made = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert made == {"quantization_config": data.CONFIG["quantization_config"] | {"expert_dtype": "fp8"}}


def test_fp8_refuses_what_would_lose(tmp_path):
    src, _ = data.experts(tmp_path / "src", low=100, high=140)
    with pytest.raises(checkpoint.Refused, match=r"experts\.\d\.w1\.weight.*without loss.*--to bf16"):
        checkpoint.convert(src, tmp_path / "dst", to="fp8")
    assert not any(p.name.endswith((data.INDEX, ".partial")) for p in (tmp_path / "dst").iterdir())
    src, _ = data.experts(tmp_path / "odd", rows=96)
    with pytest.raises(checkpoint.Refused, match=r"experts\.\d\.w1\.weight.*128 x 128.*--to bf16"):
        checkpoint.convert(src, tmp_path / "dst2", to="fp8")
    assert not (tmp_path / "dst2").exists()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", torch.float32])
def test_load(tmp_path, dtype, framework):
    src, expected = data.mixed(tmp_path / "src", "transformers")
    found = {}
    for name, tensor in checkpoint.load(src, dtype=dtype, framework=framework):
        from flagops import arrays

        found[name] = arrays.as_torch(tensor) if framework == "numpy" else tensor
    wide = {name for name in expected if name.startswith("model.") and expected[name].dtype == torch.bfloat16}
    assert wide
    if dtype != "bfloat16":
        expected = {n: x.float() if n in wide else x for n, x in expected.items()}
    data.same(found, expected)


def test_load_refuses_what_overflows(tmp_path):
    src, _ = data.experts(tmp_path / "src", low=150, high=151)
    with pytest.raises(checkpoint.Refused, match=r"\.weight' .*overflows float16; use bfloat16"):
        dict(checkpoint.load(src, dtype="float16"))
    with pytest.raises(checkpoint.Refused, match="float64"):
        checkpoint.load(src, dtype="float64")
    with pytest.raises(checkpoint.Refused, match="jax"):
        checkpoint.load(src, framework="jax")


# What is refused: a change to a good checkpoint, and words that the message must hold.


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
    "dtype: FP8": (scale_to(f"{FP8}.scale", torch.ones(1, 2).half()), f"{FP8}.weight", "expected F8_E8M0 or F32"),
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
        ({"to": "int8"}, "expected bf16 or fp8"),
        ({"shard_size": "5GB"}, "5GB"),
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


# verify


def changed(dst, name, at, by=1):
    """One bit of a tensor changed in place, its element's number given."""
    shard = dst / json.loads((dst / data.INDEX).read_text())["weight_map"][name]
    raw = bytearray(shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[8 + length + start + 2 * at] ^= by
    shard.write_bytes(raw)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    src, expected = data.mixed(folder / "src")
    checkpoint.convert(src, folder / "dst", shard_size=100_000)
    return src, folder / "dst", expected


@pytest.fixture
def copied(converted, tmp_path):
    src, dst, expected = converted
    for name, text in tree(dst).items():
        (tmp_path / "dst" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dst" / name).write_bytes(text)
    return src, tmp_path / "dst", expected


@pytest.mark.parametrize("sample", [1.0, 0.05])
def test_verify_names_the_tensor(copied, sample):
    src, dst, expected = copied
    name = "layers.0.ffn.experts.3.w1.weight"
    assert expected[name].shape == (256, 512)
    changed(dst, name, 512 * 17 + 5)
    with pytest.raises(checkpoint.Difference, match=rf"'{name}'.*differs at element \[17, 5\]"):
        checkpoint.verify(src, dst, sample=sample, seed=0)


def test_verify_names_the_first_of_several(copied):
    src, dst, _ = copied
    index = json.loads((dst / data.INDEX).read_text())["weight_map"]
    names = sorted((shard, name) for name, shard in index.items() if ".experts.3." in name or ".p4." in name)
    for _, name in names:
        changed(dst, name, 0)
    assert names[0][0] < names[-1][0]
    for _ in range(5):
        with pytest.raises(checkpoint.Difference, match=names[0][1]):
            checkpoint.verify(src, dst, workers=3)


@pytest.mark.parametrize("name", ["config.json", data.INDEX, "tokenizer.json", "encoding/example.txt", MANIFEST])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_verify_names_the_file(copied, name, how):
    src, dst, _ = copied
    if how == "missing":
        (dst / name).unlink()
    else:
        (dst / name).write_bytes((dst / name).read_bytes().replace(b"e", b"f", 1))
    with pytest.raises((checkpoint.Difference, checkpoint.Refused), match=name if how == "changed" else f"{name}|man"):
        checkpoint.verify(src, dst)


def shard_edit(change):
    def edit(dst):
        shard = sorted(dst.glob("*.safetensors"))[1]
        change(shard)

    return edit


def swap_manifest_hash(dst):
    manifest = json.loads((dst / MANIFEST).read_text())
    name = sorted(n for n in manifest["files"] if n.endswith(".safetensors"))[1]
    manifest["files"][name]["sha256"] = "0" * 64
    (dst / MANIFEST).write_text(json.dumps(manifest))


def drop_from_manifest(dst):
    manifest = json.loads((dst / MANIFEST).read_text())
    del manifest["files"]["tokenizer.json"]
    (dst / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (shard_edit(lambda p: p.unlink()), "model-00002.*is missing"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes()[:-1])), "tensor .*model-00002.*ends inside"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes() + b"x")), "model-00002.*bytes after"),
        (shard_edit(lambda p: p.write_bytes(p.read_bytes().replace(b'"pt"', b'"np"'))), "header of .*model-00002"),
        (swap_manifest_hash, "another hash"),
        (drop_from_manifest, r"tokenizer\.json is missing"),
        (lambda dst: (dst / JOURNAL).write_text(""), "not finished"),
        (lambda dst: (dst / MANIFEST).rename(dst / JOURNAL), "is not finished"),
    ],
)
def test_verify_sees(copied, edit, said):
    src, dst, _ = copied
    edit(dst)
    with pytest.raises(checkpoint.Difference, match=said):
        checkpoint.verify(src, dst)


def test_verify_of_another_source(copied, tmp_path):
    _, dst, _ = copied
    other, _ = data.mixed(tmp_path / "other", seed=1)
    with pytest.raises(checkpoint.Difference, match="was not made of"):
        checkpoint.verify(other, dst)


def test_verify_mentions_strangers(copied):
    src, dst, _ = copied
    (dst / "more.txt").write_text("")
    assert any("more.txt" in note for note in checkpoint.verify(src, dst).notes)
    with pytest.raises(checkpoint.Refused, match="sample"):
        checkpoint.verify(src, dst, sample=0)


# The commands


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
    changed(dst, "odd.weight", 1)
    assert main(["verify", str(src), str(dst), "--json", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "'odd.weight'" in shown.err
    assert json.loads(shown.out)["exit_code"] == 1
    assert main(["verify", str(src), str(tmp_path / "none")]) == 1
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
