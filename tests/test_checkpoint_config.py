"""Every place of a configuration that describes quantisation, at any depth, is rewritten or refused by name."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.checkpoint.source import MANIFEST  # noqa: E402

SHARD = "model-00001-of-00001.safetensors"
QUANTIZATION = data.CONFIG["quantization_config"]
NESTED = {"text_config": {"quantization_config": QUANTIZATION, "expert_dtype": "fp4", "torch_dtype": "float8_e4m3fn"}}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def blocks(folder, block, config):
    """A checkpoint of one FP8 matrix in blocks, and its values."""
    weight, scale, values = data.fp8(np.random.default_rng(0), 130, 200, block=block)
    return data.write(folder, {SHARD: {"a.weight": weight, "a.scale": scale}}, config), {"a.weight": values}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (NESTED, {"text_config": {"torch_dtype": "bfloat16"}, "torch_dtype": "bfloat16"}),
        (
            {"a": {"b": {"c": NESTED["text_config"] | {"x": 1}}}, "dtype": "float16"},
            {"a": {"b": {"c": {"torch_dtype": "bfloat16", "x": 1}}}, "dtype": "bfloat16"},
        ),
        (
            data.CONFIG | {"stages": [{"expert_dtype": "fp4"}, [{"dtype": "float32", "quantization_config": {}}], 3]},
            {k: v for k, v in data.CONFIG.items() if k not in ("quantization_config", "expert_dtype")}
            | {"stages": [{}, [{"dtype": "bfloat16"}], 3]},
        ),
        (
            {"text_config": {"dtype": None, "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}, "dtype": None},
            {"text_config": {"dtype": None}, "dtype": "bfloat16"},
        ),
        (
            {"text_config": {"quantization_config": None, "expert_dtype": None}, "compression_config": None},
            {"text_config": {}, "compression_config": None, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_nested_places_are_rewritten(tmp_path, given, expected):
    src, _ = data.experts(tmp_path / "src", config=given)
    summary = checkpoint.convert(src, tmp_path / "dst")
    assert config_of(tmp_path / "dst") == expected
    if given is NESTED:
        assert summary.config_changes == [
            "remove text_config.quantization_config",
            "remove text_config.expert_dtype",
            "set text_config.torch_dtype to 'bfloat16'",
            "set torch_dtype to 'bfloat16'",
        ]
    assert checkpoint.verify(src, tmp_path / "dst").state == "verified"


def test_innocent_words_are_left(tmp_path):
    config = {"num_quantizers": 8, "quantile": 0.9, "_name_or_path": "x/V4-FP8", "fmt": "png", "is_quantized": False}
    src, _ = data.experts(tmp_path / "src", config=config)
    checkpoint.convert(src, tmp_path / "dst")
    assert config_of(tmp_path / "dst") == config | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "nest", [lambda q: {"text_config": {"quantization_config": q}}, lambda q: {"parts": [{"t": q}]}]
)
@pytest.mark.parametrize("block", [(32, 32), (64, 100)])
def test_a_nested_block_size_is_read(tmp_path, block, nest):
    src, expected = blocks(tmp_path / "src", block, nest({"weight_block_size": list(block)}))
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)
    data.same(dict(checkpoint.load(src)), expected)
    src, _ = blocks(tmp_path / "other", block, {"text_config": {}})
    with pytest.raises(checkpoint.Refused, match="each 128 x 128 block"):
        checkpoint.convert(src, tmp_path / "no")


REFUSED = {
    "two block sizes": (
        {"quantization_config": QUANTIZATION, "text_config": {"quantization_config": {"weight_block_size": [32, 32]}}},
        r"text_config\.quantization_config\.weight_block_size is \[32, 32\], but quantization_config\.weight_block",
    ),
    "two expert dtypes": (
        {"expert_dtype": "fp4", "text_config": {"quantization_config": QUANTIZATION | {"expert_dtype": "fp8"}}},
        r"text_config\.quantization_config\.expert_dtype is 'fp8', but expert_dtype is 'fp4'",
    ),
    "two scale formats": (
        {"quantization_config": QUANTIZATION, "text_config": {"scale_fmt": "float"}},
        r"text_config\.scale_fmt is 'float', but quantization_config\.scale_fmt is 'ue8m0'",
    ),
    "two methods": (
        {"quantization_config": QUANTIZATION, "a": [{"quantization_config": {"quant_method": "deepseek_v4_fp8"}}]},
        r"a\[0\]\.quantization_config\.quant_method",
    ),
    "method": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"text_config.*quant_method 'awq'"),
    "format": ({"text_config": {"quantization_config": {"fmt": "e3m4"}}}, r"text_config.*fmt 'e3m4'.*e4m3 or e5m2"),
    "scales": ({"quantization_config": {"scale_fmt": "e4m3"}}, r"scale_fmt 'e4m3'.*ue8m0 or float"),
    "activations": ({"quantization_config": {"activation_scheme": "lazy"}}, r"activation_scheme 'lazy'.*or static"),
    "experts": ({"text_config": {"expert_dtype": "int4"}}, r"text_config\.expert_dtype 'int4'.*fp4 or fp8"),
    "block": ({"text_config": {"weight_block_size": [32]}}, r"text_config\.weight_block_size is \[32\]"),
    "no object": ({"text_config": {"quantization_config": "fp8"}}, r"text_config\.quantization_config is 'fp8'"),
    "dtype": ({"text_config": {"dtype": {"": "float8_e4m3fn"}}}, r"text_config\.dtype is .*name of a dtype"),
    "compressed": ({"text_config": {"compression_config": {"format": "x"}}}, r"text_config\.compression_config"),
    "unknown section": ({"vision": {"quantization": {"bits": 8}}}, r"vision\.quantization describes a format"),
    "unknown flag": ({"vision": [{"load_quantized": True}]}, r"vision\[0\]\.load_quantized describes a format"),
    "unknown value": ({"text_config": {"weights": "mxfp4"}}, r"text_config\.weights describes a format \(mxfp4\)"),
    "value in a list": ({"formats": ["float8_e4m3fn"]}, r"formats\[0\] describes a format"),
    "deep": (json.loads('{"a":' * 100 + "1" + "}" * 100), "lies deeper than 64 levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rewritten_is_refused_before_anything_is_written(tmp_path, case):
    config, said = REFUSED[case]
    src, _ = data.experts(tmp_path / "src", config=config)
    with pytest.raises(checkpoint.Refused, match=said) as refusal:
        checkpoint.convert(src, tmp_path / "dst")
    assert "config.json" in str(refusal.value)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"text_config": {"quantization_config": QUANTIZATION, "expert_dtype": "fp4"}},
            ["text_config", "expert_dtype"],
        ),
        ({"text_config": {"quantization_config": QUANTIZATION}}, ["text_config", "expert_dtype"]),
        (
            {"a": [{"quantization_config": QUANTIZATION | {"expert_dtype": "fp4"}}]},
            ["a", 0, "quantization_config", "expert_dtype"],
        ),
    ],
)
def test_fp8_in_nested_places(tmp_path, given, expected):
    src, _ = data.experts(tmp_path / "src", config=given)
    checkpoint.convert(src, tmp_path / "dst", to="fp8")
    made = config_of(tmp_path / "dst")
    holder = made
    for key in expected[:-1]:
        holder = holder[key]
    assert holder[expected[-1]] == "fp8"
    assert "fp4" not in json.dumps(made)


def test_fp8_sets_the_format_of_its_scales(tmp_path):
    src, _ = data.experts(tmp_path / "src", config={"quantization_config": {"quant_method": "fp8"}})
    checkpoint.convert(src, tmp_path / "dst", to="fp8")
    expected = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}, "expert_dtype": "fp8"}
    assert config_of(tmp_path / "dst") == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"torch_dtype": "bfloat16"}, "no quantization_config with a quant_method"),
        ({"quantization_config": {"weight_block_size": [128, 128]}}, "no quantization_config with a quant_method"),
        ({"quantization_config": QUANTIZATION | {"scale_fmt": "float"}}, "scale_fmt is 'float', but.*e8m0"),
    ],
)
def test_fp8_refuses_a_configuration_that_would_describe_something_else(tmp_path, config, said):
    src, _ = data.experts(tmp_path / "src", config=config)
    with pytest.raises(checkpoint.Refused, match=said):
        checkpoint.convert(src, tmp_path / "dst", to="fp8")
    assert not (tmp_path / "dst").exists()


def test_fp8_refuses_scales_of_two_kinds(tmp_path):
    rng = np.random.default_rng(0)
    packed, scale, _ = data.fp4(rng, 128, 128, low=120, high=121)
    weight, factor, _ = data.fp8(rng, 128, 128, floating=True)
    tensors = {"a.weight": packed, "a.scale": scale, "b.weight": weight, "b.weight_scale_inv": factor}
    src = data.write(tmp_path / "src", {SHARD: tensors})
    for keep in ((), "b.weight"):
        with pytest.raises(checkpoint.Refused, match=r"b\.weight_scale_inv keeps scales of float32, but.*e8m0"):
            checkpoint.convert(src, tmp_path / "dst", to="fp8", keep=keep)


def test_what_others_would_believe_beside_the_configuration(tmp_path):
    src, _ = data.experts(tmp_path / "src")
    (src / "inference").mkdir()
    (src / "inference" / "config.json").write_text('{"dtype": "fp8", "scale_fmt": "ue8m0", "dim": 4096}')
    (src / "encoding" / "config.json").write_text("no JSON")
    notes = checkpoint.convert(src, tmp_path / "dst", dry_run=True).notes
    assert "inference/config.json is copied as it is and still says dtype 'fp8', scale_fmt 'ue8m0'" in notes
    (src / "quantize_config.json").write_text("{}")
    with pytest.raises(checkpoint.Refused, match=r"quantize_config\.json describes a quantisation"):
        checkpoint.convert(src, tmp_path / "dst")


def overwrite(dst, config, manifest):
    """Another configuration, and on demand a manifest that has it as right."""
    text = json.dumps(config).encode()
    (dst / "config.json").write_bytes(text)
    if manifest:
        found = json.loads((dst / MANIFEST).read_text())
        found["files"]["config.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (dst / MANIFEST).write_text(json.dumps(found))


@pytest.mark.parametrize("manifest", [False, True])
def test_a_place_that_was_left_is_seen(tmp_path, manifest):
    """As a conversion that looked at the outermost level alone would have left it."""
    src, _ = data.experts(tmp_path / "src", config=NESTED)
    dst = tmp_path / "dst"
    checkpoint.convert(src, dst)
    overwrite(dst, NESTED | {"torch_dtype": "bfloat16"}, manifest)
    with pytest.raises(checkpoint.Difference, match=r"config\.json is missing or not what SRC gives"):
        checkpoint.verify(src, dst)
    before = tree(dst)
    with pytest.raises(checkpoint.Refused, match=r"config\.json (was written by another|is missing or not whole)"):
        checkpoint.convert(src, dst)
    assert tree(dst) == before
