"""Scales of 1 x 32 as in DeepSeek-V4.1's Engram tables, and tensors that `--keep` leaves as they are stored."""

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
from flagops.__main__ import main  # noqa: E402
from flagops.checkpoint.source import JOURNAL, MANIFEST  # noqa: E402

SHARD = "model-00001-of-00001.safetensors"
TABLE = "layers.1.engram.embed"
CONFIG = {
    "model_type": "deepseek_v41",
    "text_config": {"model_type": "deepseek_v41_text", "engram_layers": [1]},
    "quantization_config": data.CONFIG["quantization_config"] | {"weight_block_size": [32, 32], "expert_dtype": "fp4"},
    "torch_dtype": "bfloat16",
}  # fmt: skip


def v41(folder, config=CONFIG, seed=0):
    """The formats and names of DeepSeek-V4.1: 32 x 32 blocks, tables of 1 x 32, FP4 experts; and their BF16 values."""
    rng = np.random.default_rng(seed)
    tensors, expected = {}, data.plain(rng)
    tensors |= expected
    made = {
        "layers.1.attn.wq_a": data.fp8(rng, 70, 96, block=(32, 32)),
        "layers.1.engram.wkv": data.fp8(rng, 64, 192, block=(32, 32)),
        TABLE: data.fp8(rng, 301, 256, block=(1, 32)),
        "layers.1.ffn.experts.0.w1": data.fp4(rng, 32, 64),
        "layers.1.ffn.experts.1.w1": data.fp4(rng, 32, 64),
        "layers.14.engram.embed": data.fp8(rng, 33, 64, block=(1, 32)),
        "mtp.0.main_proj": data.fp8(rng, 64, 64, block=(32, 32)),
    }
    for name, (weight, scale, values) in made.items():
        tensors |= {f"{name}.weight": weight, f"{name}.scale": scale}
        expected[f"{name}.weight"] = values
    return data.write(folder, {SHARD: tensors}, config), expected, tensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("backend", [None, "numba", "torch", "numpy"])
def test_rows_of_32_bit_by_bit(tmp_path, backend):
    src, expected, _ = v41(tmp_path / "src")
    checkpoint.convert(src, tmp_path / "dst", backend=backend)
    data.same(data.read(tmp_path / "dst")[0], expected)
    data.same(dict(checkpoint.load(src, backend=backend)), expected)
    assert checkpoint.verify(src, tmp_path / "dst", backend=backend).state == "verified"


@pytest.mark.parametrize("limit", [96, 257, 1000])
def test_rows_of_32_in_slices_of_every_size(tmp_path, monkeypatch, limit):
    src, expected, _ = v41(tmp_path / "src")
    monkeypatch.setattr("flagops.checkpoint.work.SMALLEST", limit)
    monkeypatch.setattr("flagops.checkpoint.work.LARGEST", limit)
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)


@pytest.mark.parametrize(("lead", "columns"), [((), 200), ((3,), 96), ((), 32), ((2, 2), 31)])
@pytest.mark.parametrize("floating", [False, True])
def test_rows_of_32_beside_blocks_of_128(tmp_path, lead, columns, floating):
    """Scales in e8m0, in bytes and in float32, stacked matrices, ragged columns."""
    weight, scale, values = data.fp8(np.random.default_rng(1), 130, columns, lead, floating, (1, 32))
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    expected = {"a.weight": values}
    if not floating:
        tensors |= {"b.weight": weight.clone(), "b.scale": scale.view(torch.uint8).clone()}
        expected["b.weight"] = values
    src = data.write(tmp_path / "src", {SHARD: tensors})
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)


@pytest.mark.parametrize("shape", [(130, 3), (130, 5), (5, 7), (65, 4), (130,)])
def test_other_shapes_of_scales_are_refused(tmp_path, shape):
    weight, _, _ = data.fp8(np.random.default_rng(1), 130, 128)
    scale = torch.full(shape, 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    src = data.write(tmp_path / "src", {SHARD: {"a.weight": weight, "a.scale": scale}})
    said = (
        r"'a.weight' .*\[2, 1\]: one scale for each 128 x 128 block, or \[130, 4\]: one for each 1 x 32.*--keep 'a\.w"
    )
    with pytest.raises(checkpoint.Refused, match=said):
        checkpoint.convert(src, tmp_path / "dst")


def test_fp8_keeps_rows_of_32(tmp_path):
    weight, scale, _ = data.fp8(np.random.default_rng(1), 130, 128, block=(1, 32))
    packed, factor, _ = data.fp4(np.random.default_rng(1), 128, 128, low=120, high=121)
    tensors = {"t.weight": weight, "t.scale": scale, "e.weight": packed, "e.scale": factor}
    src = data.write(tmp_path / "src", {SHARD: tensors})
    checkpoint.convert(src, tmp_path / "dst", to="fp8")
    found, _ = data.read(tmp_path / "dst")
    data.same({n: found[n] for n in ("t.weight", "t.scale")}, {n: tensors[n] for n in ("t.weight", "t.scale")})


# What --keep leaves as it is stored


@pytest.mark.parametrize("pattern", [f"{TABLE}.*", f"{TABLE}.weight", f"{TABLE}.scale", "*.1.engram.embed.w*"])
def test_a_weight_and_its_scale_are_kept_together(tmp_path, pattern):
    src, expected, tensors = v41(tmp_path / "src")
    pair = [f"{TABLE}.weight", f"{TABLE}.scale"]
    summary = checkpoint.convert(src, tmp_path / "dst", keep=[pattern])
    expected |= {name: tensors[name] for name in pair}
    data.same(data.read(tmp_path / "dst")[0], expected)
    assert sorted(summary.kept) == sorted(pair)
    assert summary.tensors["kept as stored"] == 2
    assert json.loads((tmp_path / "dst" / MANIFEST).read_text())["identity"]["keep"] == [pattern]
    checked = checkpoint.verify(src, tmp_path / "dst")
    assert (checked.state, checked.keep, checked.kept) == ("verified", [pattern], summary.kept)
    data.same(dict(checkpoint.load(src, keep=pattern)), expected)


def test_the_configuration_goes_on_to_describe_what_is_kept(tmp_path):
    src, _, _ = v41(tmp_path / "src")
    checkpoint.convert(src, tmp_path / "dst", keep=["*.engram.embed.*"])
    section = config_of(tmp_path / "dst")["quantization_config"]
    names = section.pop("modules_to_not_convert")
    assert section == {k: v for k, v in CONFIG["quantization_config"].items() if k != "expert_dtype"}
    bare = ["layers.1.attn.wq_a", "layers.1.engram.wkv", "layers.1.ffn.experts", "mtp.0", "odd"]
    assert sorted(names) == sorted([*bare, *(f"model.{name}" for name in bare)])
    assert config_of(tmp_path / "dst")["torch_dtype"] == "bfloat16"
    checkpoint.convert(src, tmp_path / "fp4", keep=["layers.*.ffn.experts.*"])
    section = config_of(tmp_path / "fp4")["quantization_config"]
    assert section["expert_dtype"] == "fp4"
    assert "layers.14.engram.embed" not in section["modules_to_not_convert"]
    assert "layers.14" in section["modules_to_not_convert"]
    assert not any("ffn" in name for name in section["modules_to_not_convert"])


@pytest.mark.parametrize("name", ["modules_to_not_convert", "ignored_layers"])
def test_modules_named_before_stay_named(tmp_path, name):
    quantization = CONFIG["quantization_config"] | {name: ["head"]}
    src, _, _ = v41(tmp_path / "src", {"text_config": {"quantization_config": quantization}})
    checkpoint.convert(src, tmp_path / "dst", keep=["*.engram.*"])
    section = config_of(tmp_path / "dst")["text_config"]["quantization_config"]
    assert section[name][:1] == ["head"]
    assert "layers.1.ffn.experts" in section[name]
    assert len({"modules_to_not_convert", "ignored_layers"} & section.keys()) == 1


def test_what_is_of_no_known_format_can_be_kept(tmp_path):
    """Without a scale, of another FP8, a lone scale, a NaN: as the messages that refuse them advise."""
    src, expected, tensors = v41(tmp_path / "src")
    odd = {
        "table": torch.arange(7, dtype=torch.uint8),
        "a[0].weight": torch.zeros(4, 4).to(torch.float8_e5m2),
        "b.scale": torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "c.weight": torch.full((2, 2), 127, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "c.weight_scale_inv": torch.ones(3),
    }
    (src / SHARD).unlink()
    src = data.write(tmp_path / "odd", {SHARD: tensors | odd}, CONFIG)
    keep = []
    for _ in range(4):
        with pytest.raises(checkpoint.Refused, match="--keep '") as refusal:
            checkpoint.convert(src, tmp_path / "dst", keep=keep)
        keep.append(str(refusal.value).partition("--keep '")[2].partition("'")[0])
    checkpoint.convert(src, tmp_path / "dst", keep=keep)
    data.same(data.read(tmp_path / "dst")[0], expected | odd)
    assert checkpoint.verify(src, tmp_path / "dst").state == "verified"
    with pytest.raises(checkpoint.Refused, match=r"a\[0\]\.weight.*dtype that arrays lack"):
        next(checkpoint.load(src, keep=keep))


def test_a_pattern_that_matches_nothing(tmp_path):
    src, _, _ = v41(tmp_path / "src")
    for pattern, nearest in [
        ("*.engrm.embed.weight", "layers.*.engram.embed.weight"), ("engram", "layers.*.engram."), ("", ""),
        ("LAYERS.1.engram.*", "layers.*.engram"), ("layers.99.attn.wq_a.*", "layers.*.attn.wq_a"),
    ]:  # fmt: skip
        with pytest.raises(checkpoint.Refused) as refusal:
            checkpoint.convert(src, tmp_path / "dst", keep=["*.engram.*", pattern])
        assert f"--keep {pattern}: no tensor has such a name; did you mean '" in str(refusal.value)
        assert nearest in str(refusal.value)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("keep", "to", "config", "said"),
    [
        (["*"], "bf16", CONFIG, r"no tensor to convert from four or eight bits to BF16 beyond --keep \*"),
        (["*.experts.0.*"], "bf16", CONFIG, r"layers\.1\.ffn\.experts.*cannot tell apart; keep both or neither"),
        (["*.engram.*"], "bf16", {"torch_dtype": "float32"}, "no quantization_config that describes.*engram"),
        (["*.experts.0.*"], "fp8", CONFIG, r"experts\.0\.w1\.weight.*would stay FP4 beside FP4 made FP8"),
    ],
)
def test_what_no_configuration_could_describe_is_refused(tmp_path, keep, to, config, said):
    if config is not CONFIG:
        config = config | {"text_config": {"weight_block_size": [32, 32]}}
    src, _, _ = v41(tmp_path / "src", config)
    if to == "fp8":
        src, _ = data.experts(tmp_path / "experts")
    with pytest.raises(checkpoint.Refused, match=said):
        checkpoint.convert(src, tmp_path / "dst", keep=keep, to=to)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("config", [CONFIG, {"text_config": {"weight_block_size": [32, 32]}}])
def test_what_is_loaded_needs_no_configuration(tmp_path, config):
    src, expected, tensors = v41(tmp_path / "src", config)
    kept = {name: x for name, x in tensors.items() if ".experts.0." in name}
    data.same(dict(checkpoint.load(src, keep="*.experts.0.*")), expected | kept)


def test_going_on_with_other_patterns_is_refused(tmp_path, monkeypatch):
    src, _, _ = v41(tmp_path / "src")
    dst = tmp_path / "dst"
    monkeypatch.setattr(checkpoint.conversion.Conversion, "_finish", lambda self, journal: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.convert(src, dst, keep=["*.engram.*", "norm.*"])
    monkeypatch.undo()
    assert (dst / JOURNAL).exists()
    before = tree(dst)
    for other, shown in [
        ([], "instead of None"),
        (["*.engram.*"], r"keep \['\*\.engram\.\*', 'norm\.\*'\] instead of \['\*\.engram\.\*'\]"),
    ]:
        with pytest.raises(checkpoint.Refused, match=f"other options.*{shown}"):
            checkpoint.convert(src, dst, keep=other)
    assert tree(dst) == before
    checkpoint.convert(src, dst, keep=["norm.*", "*.engram.*", "norm.*"])
    checkpoint.convert(src, tmp_path / "whole", keep=["*.engram.*", "norm.*"])
    assert tree(dst) == tree(tmp_path / "whole")
    assert checkpoint.convert(src, dst, keep=["*.engram.*", "norm.*"]).state == "already finished"
    with pytest.raises(checkpoint.Refused, match="other options"):
        checkpoint.convert(src, dst)
    plain = tmp_path / "plain"
    checkpoint.convert(src, plain)
    with pytest.raises(checkpoint.Refused, match="other options"):
        checkpoint.convert(src, plain, keep="*.engram.*")


def test_the_commands_say_what_is_kept(tmp_path, capsys):
    src, _, _ = v41(tmp_path / "src")
    command = ["convert", str(src), str(tmp_path / "dst"), "--keep", "*.engram.embed.*", "--keep", "mtp.*"]
    said = "kept as stored by --keep '*.engram.embed.*' 'mtp.*': 6 tensors ("
    assert main([*command, "--dry-run"]) == 0
    assert said in capsys.readouterr().out
    assert main([*command]) == 0
    assert said in capsys.readouterr().out
    assert main(["verify", str(src), str(tmp_path / "dst")]) == 0
    assert said in capsys.readouterr().out
    assert main([*command[:3], "--keep", "engram"]) == 2
    assert "did you mean 'layers.*.engram" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "--keep PATTERN" in capsys.readouterr().out


def test_verify_sees_a_kept_tensor_that_differs(tmp_path):
    src, _, _ = v41(tmp_path / "src")
    checkpoint.convert(src, tmp_path / "dst", keep="*.engram.*")
    data.changed(tmp_path / "dst", f"{TABLE}.scale", 3)
    with pytest.raises(checkpoint.Difference, match=rf"'{TABLE}\.scale'.*differs at element \[0, 6\]"):
        checkpoint.verify(src, tmp_path / "dst")
    manifest = json.loads((tmp_path / "dst" / MANIFEST).read_text())
    del manifest["identity"]["keep"]
    (tmp_path / "dst" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Difference, match=r"config\.json"):
        checkpoint.verify(src, tmp_path / "dst")
