"""`flagops convert --to int8` and `--to w4a8`: what is quantised, its bits, the errors that are said, who loads it."""

import json
import math
import sys
from pathlib import Path

import ml_dtypes
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
LINEAR = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.3.up_proj"]
WIDE = ["model.embed_tokens", "lm_head", "model.layers.1.mlp.gate", "model.layers.0.input_layernorm"]
CONFIG = {"architectures": ["X"], "torch_dtype": "bfloat16"}


def wide(rng, *shape, dtype=torch.bfloat16):
    return torch.from_numpy(rng.standard_normal(shape) * np.exp2(rng.integers(-6, 3, (*shape[:-1], 1)))).to(dtype)


def model(folder, rng, shards=1, config=CONFIG):
    """Linear layers of several dtypes, and what nobody multiplies in integers."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tensors = {f"{name}.weight": wide(rng, 70 + i, 96, dtype=dtypes[i]) for i, name in enumerate(LINEAR)}
    tensors |= {f"{name}.weight": wide(rng, 12, 96) for name in WIDE[:-1]} | {f"{WIDE[-1]}.weight": wide(rng, 96)}
    tensors |= {f"{LINEAR[0]}.bias": wide(rng, 70), "model.layers.1.mlp.experts.stacked": wide(rng, 2, 32, 32)}
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = {name: dict(list(tensors.items())[i::shards]) for i, name in enumerate(files)}
    return data.write(folder, parts, config), tensors


def int8(values):
    """Codes and scales by their definition, of float32."""
    values = values.astype(np.float32)
    scale = np.maximum(abs(values).max(1, keepdims=True) / np.float32(127), np.float32(2.0**-126))
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8), scale


def int4(values):
    """As `int8`, 15 steps from -8 to 7 for 32 of a row, under scales of bfloat16."""
    groups = values.astype(np.float32).reshape(len(values), -1, 32)
    scale = (abs(groups).max(-1) / np.float32(7.5)).clip(2.0**-100).astype(ml_dtypes.bfloat16)
    codes = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7)
    return codes.reshape(values.shape).astype(np.int64), scale


def words(codes):
    """Eight in a word, the first in its lowest bits, 8 more than they are."""
    eights = (codes + 8).astype(np.uint32).reshape(len(codes), -1, 8)
    return np.bitwise_or.reduce(eights << 4 * np.arange(8, dtype=np.uint32), -1).view(np.int32)


def relative(values, codes, scale):
    exact = values.astype(np.float64)
    step = np.repeat(scale.astype(np.float64), codes.shape[1] // scale.shape[1], 1)
    return math.sqrt(np.square(exact - codes * step).sum() / np.square(exact).sum())


def expected(name, tensor, to):
    """The tensors of a weight, and its error."""
    values = tensor.float().numpy()
    if to == "int8":
        codes, scale = int8(values)
        made = {name: torch.from_numpy(codes), f"{name}_scale": torch.from_numpy(scale)}
    else:
        codes, scale = int4(values)
        made = {
            f"{name}_packed": torch.from_numpy(words(codes)), f"{name}_scale": data.bf16(scale),
            f"{name}_shape": torch.tensor(values.shape),
        }  # fmt: skip
    return made, relative(values, codes, scale)


@pytest.mark.parametrize("to", ["int8", "w4a8"])
@pytest.mark.parametrize("backend", [None, "torch", "numpy"])
def test_linear_layers_and_nothing_else(tmp_path, rng, to, backend):
    src, tensors = model(tmp_path / "src", rng)
    summary = checkpoint.convert(src, tmp_path / "dst", to=to, backend=backend)
    wanted, errors = {}, {}
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") in LINEAR:
            made, errors[name] = expected(name, tensor, to)
            wanted |= made
        else:
            wanted[name] = tensor
    data.same(data.read(tmp_path / "dst")[0], wanted)
    assert summary.errors == {name: float(f"{errors[name]:.6g}") for name in summary.errors}
    assert sorted(summary.errors) == sorted(errors)
    assert list(summary.errors.values()) == sorted(summary.errors.values(), reverse=True)
    manifest = json.loads((tmp_path / "dst" / MANIFEST).read_text())
    assert manifest["files"][SHARD]["errors"] == summary.errors
    assert checkpoint.verify(src, tmp_path / "dst", backend=backend).errors == summary.errors
    again = checkpoint.convert(src, tmp_path / "dst", to=to, backend=backend)
    assert (again.state, again.errors) == ("already finished", summary.errors)


@pytest.mark.parametrize(("to", "form", "bits"), [("int8", "int-quantized", 8), ("w4a8", "pack-quantized", 4)])
def test_the_configuration_is_that_of_compressed_tensors(tmp_path, rng, to, form, bits):
    src, _ = model(tmp_path / "src", rng)
    checkpoint.convert(src, tmp_path / "dst", to=to)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == CONFIG
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", form)
    assert sorted(section["ignore"]) == sorted(WIDE[:-1])
    (group,) = section["config_groups"].values()
    assert group["weights"]["num_bits"] == bits
    assert (group["input_activations"]["num_bits"], group["input_activations"]["strategy"]) == (8, "token")


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_the_output_depends_on_source_and_options_alone(tmp_path, rng, monkeypatch, to):
    src, _ = model(tmp_path / "src", rng, shards=2)
    checkpoint.convert(src, tmp_path / "first", to=to, shard_size=4000)
    assert not (tmp_path / "first" / JOURNAL).exists()
    for i, (limit, options) in enumerate(
        [(96, {"workers": 1}), (1000, {"backend": "numpy"}), (1 << 20, {"workers": 3})]
    ):
        monkeypatch.setattr("flagops.checkpoint.work.SMALLEST", limit)
        monkeypatch.setattr("flagops.checkpoint.work.LARGEST", limit)
        checkpoint.convert(src, tmp_path / str(i), to=to, shard_size=4000, **options)
        assert tree(tmp_path / str(i)) == tree(tmp_path / "first")


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_it_goes_on_with_the_errors_of_what_was_finished(tmp_path, rng, monkeypatch, to):
    from flagops.checkpoint.stream import Stream

    src, _ = model(tmp_path / "src", rng)
    whole = checkpoint.convert(src, tmp_path / "whole", to=to, shard_size=4000)
    read, count = Stream.output, 0

    def failing(self, out):
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(5, "Input/output error")
        return read(self, out)

    monkeypatch.setattr(Stream, "output", failing)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.convert(src, tmp_path / "dst", to=to, shard_size=4000, workers=1)
    monkeypatch.setattr(Stream, "output", read)
    resumed = checkpoint.convert(src, tmp_path / "dst", to=to, shard_size=4000)
    assert resumed.resumed_shards > 0
    assert resumed.errors == whole.errors
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_a_narrow_source_says_which_layers_are_linear(tmp_path, to):
    src, values = data.experts(tmp_path / "src", shards=2)
    checkpoint.convert(src, tmp_path / "dst", to=to)
    wanted = {}
    for name, tensor in values.items():
        wanted |= expected(name, tensor, to)[0] if name != "norm.weight" else {name: tensor}
    data.same(data.read(tmp_path / "dst")[0], wanted)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "expert_dtype" not in config


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_narrow_weights_that_stay_floats(tmp_path, rng, to):
    """Tables, and a grouped projection, become BF16 beside integers, and are named as such."""
    made = {
        name: data.fp8(rng, 128, 64) for name in ("layers.0.engram.embed", "layers.0.attn.wo_a", "layers.0.attn.wq_a")
    }
    tensors = {f"{n}.{end}": x for n, parts in made.items() for end, x in zip(("weight", "scale"), parts, strict=False)}
    src = data.write(tmp_path / "src", {SHARD: tensors})
    summary = checkpoint.convert(src, tmp_path / "dst", to=to)
    found = data.read(tmp_path / "dst")[0]
    floats = ["layers.0.engram.embed", "layers.0.attn.wo_a"]
    data.same({f"{n}.weight": found[f"{n}.weight"] for n in floats}, {f"{n}.weight": made[n][2] for n in floats})
    assert list(summary.errors) == ["layers.0.attn.wq_a.weight"]
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert sorted(config["quantization_config"]["ignore"]) == sorted(floats)
    assert checkpoint.verify(src, tmp_path / "dst").state == "verified"


@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_back_to_bf16(tmp_path, rng, to):
    src, tensors = model(tmp_path / "src", rng)
    checkpoint.convert(src, tmp_path / "dst", to=to)
    checkpoint.convert(tmp_path / "dst", tmp_path / "back")
    found = data.read(tmp_path / "back")[0]
    assert set(found) == set(tensors)
    for name in (f"{each}.weight" for each in LINEAR):
        codes, scale = (int8 if to == "int8" else int4)(tensors[name].float().numpy())
        step = np.repeat(scale.astype(np.float32), codes.shape[1] // scale.shape[1], 1)
        data.same({name: found[name]}, {name: data.bf16(codes.astype(np.float32) * step)})


def test_what_is_kept_stays_wide_and_is_named(tmp_path, rng, capsys):
    src, tensors = model(tmp_path / "src", rng)
    command = ["convert", str(src), str(tmp_path / "dst"), "--to", "int8", "--keep", "*.down_proj.*"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "relative error, 2 weights, the worst: " in said
    assert f"{LINEAR[0]}.weight 0." in said
    name = f"{LINEAR[1]}.weight"
    data.same({name: data.read(tmp_path / "dst")[0][name]}, {name: tensors[name]})
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert LINEAR[1] in config["quantization_config"]["ignore"]


def test_a_manifest_with_other_errors_is_a_difference(tmp_path, rng):
    src, _ = model(tmp_path / "src", rng)
    checkpoint.convert(src, tmp_path / "dst", to="int8")
    path = tmp_path / "dst" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][SHARD]["errors"][f"{LINEAR[0]}.weight"] *= 0.5
    path.write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Difference, match=rf"another error for tensor '{LINEAR[0]}\.weight'"):
        checkpoint.verify(src, tmp_path / "dst")


def narrow(folder, rng, config=data.CONFIG):
    return data.experts(folder, rows=64, columns=64, config=config)[0]


BAD = {
    "NaN": ({f"{LINEAR[0]}.weight": torch.full((3, 32), math.nan)}, {}, "int8", "has an infinity or NaN"),
    "infinite": ({f"{LINEAR[0]}.weight": torch.full((3, 32), math.inf)}, {}, "w4a8", "has an infinity or NaN"),
    "groups": ({f"{LINEAR[0]}.weight": torch.ones(3, 40)}, {}, "w4a8", "expected a multiple of 32, "),
    "too long": ({f"{LINEAR[0]}.weight": torch.ones(1, 131_072)}, {}, "int8", "from 1 to 131071"),
    "nothing": ({"lm_head.weight": torch.ones(3, 32)}, {}, "int8", "no tensor to convert from a linear layer"),
    "no configuration": ({f"{LINEAR[0]}.weight": torch.ones(3, 32)}, {"config": None}, "int8", "no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, case):
    tensors, options, to, said = BAD[case]
    src = data.write(tmp_path / "src", {SHARD: tensors}, **{"config": CONFIG} | options)
    with pytest.raises(checkpoint.Refused) as refusal:
        checkpoint.convert(src, tmp_path / "dst", to=to)
    assert said in str(refusal.value)
    if "config.json" not in said and "no tensor" not in said:
        assert LINEAR[0] in str(refusal.value)
    assert not (tmp_path / "dst" / data.INDEX).exists()


def test_narrow_weights_beside_integers_are_refused(tmp_path, rng):
    with pytest.raises(checkpoint.Refused, match=r"--keep leaves layers\.0\.ffn\.experts\.0\.w1\.weight in a format"):
        checkpoint.convert(narrow(tmp_path / "src", rng), tmp_path / "dst", to="int8", keep="*.experts.0.*")
    packed, scale, _ = data.fp4(rng, 32, 64, lead=(2,))
    tensors = {"e.gate_up_proj": packed, "e.gate_up_proj_scale_inv": scale}
    src = data.write(tmp_path / "stack", {SHARD: tensors})
    with pytest.raises(checkpoint.Refused, match=r"'e\.gate_up_proj' .* is a stack of matrices.*--to bf16"):
        checkpoint.convert(src, tmp_path / "dst", to="int8")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "w4a8"])
def test_transformers_loads_it(tmp_path, to):
    """With the format's own library: the weights are those that the codes stand for."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "src")
    checkpoint.convert(tmp_path / "src", tmp_path / "dst", to=to)
    checkpoint.convert(tmp_path / "dst", tmp_path / "back")
    wanted = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="bfloat16").state_dict()
    options = transformers.CompressedTensorsConfig(run_compressed=False)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "dst", dtype="bfloat16", quantization_config=options
    )
    found = {name: x for name, x in model.state_dict().items() if name in wanted}
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        assert torch.equal(found[name].bfloat16(), x), name
