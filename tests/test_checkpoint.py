"""`flagops convert`, `verify` and `checkpoint.load` on small checkpoints of all formats, namings and shapes."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.checkpoint.plan import slices  # noqa: E402
from flagops.checkpoint.source import MANIFEST  # noqa: E402

KINDS = [("original", False), ("transformers", False), ("original", True)]
EXPERT = "layers.0.ffn.experts.0.w1"
SHARD = "model-00001-of-00001.safetensors"


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
