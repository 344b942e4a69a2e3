"""Narrow weights of Qwen, gpt-oss, compressed-tensors and ModelOpt, held to decoders written from the definitions."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402
from checkpoint_crash import tree  # noqa: E402

from flagops import checkpoint  # noqa: E402

SHARD = "model-00001-of-00001.safetensors"
LAYER = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def minifloat(code, exponent, mantissa):
    """A sign, `exponent` bits with the usual bias and `mantissa` bits; infinities and NaN aside."""
    code = code.astype(np.int64)
    sign, high, low = (
        code >> exponent + mantissa & 1,
        code >> mantissa & (1 << exponent) - 1,
        code & (1 << mantissa) - 1,
    )
    scale = np.exp2(np.maximum(high, 1) - ((1 << exponent - 1) - 1.0))
    return (1 - 2 * sign) * (low / (1 << mantissa) + (high > 0)) * scale


def once(values):
    """To float32 and to bfloat16."""
    return data.bf16(values.astype(np.float32))


def spread(scale, rows, columns):
    """Scales for the equal blocks of a matrix, the last ones cut short by `block`."""
    return np.repeat(np.repeat(scale, -(-rows // scale.shape[-2]), -2), -(-columns // scale.shape[-1]), -1)


def floats(rng, shape, dtype="F32"):
    """Scales in a dtype, and their values."""
    made = torch.as_tensor(np.ldexp(rng.uniform(1, 2, shape), rng.integers(-12, 12, shape))).to(FLOATS[dtype])
    return made, made.double().numpy()


def codes8(rng, shape, invalid):
    code = rng.integers(0, 256, shape, dtype=np.uint8)
    code[code & invalid == invalid] = 1
    return code


def nibbles(rng, rows, columns, lead=()):
    """Codes of four bits, and the bytes that hold them, the low nibble first."""
    code = rng.integers(0, 16, (*lead, rows, columns), dtype=np.uint8)
    return code, torch.from_numpy(code[..., 0::2] | code[..., 1::2] << 4)


def section(method, **more):
    return {"quantization_config": {"quant_method": method, **more}, "torch_dtype": "bfloat16"}


def compressed(weights, form, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    return section("compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["lm_head"], **more)


def fp8(rng, shape, scale_shape, dtype="F32", name="weight_scale", bits=(4, 3), lead=(), config=None):
    rows, columns = shape
    code = codes8(rng, (*lead, rows, columns), 0x7F if bits == (4, 3) else 0x7C)
    scale, factors = floats(rng, scale_shape, dtype)
    grid = factors.reshape(factors.shape if len(scale_shape) > 1 else (-1, 1))
    if name == "weight_scale_inv":
        wide = np.repeat(np.repeat(grid, 128, -2), 128, -1)[..., :rows, :columns]
    else:
        wide = spread(grid, rows, columns)
    stored = torch.from_numpy(code).view(torch.float8_e4m3fn if bits == (4, 3) else torch.float8_e5m2)
    tensors = {f"{LAYER}.weight": stored, f"{LAYER}.{name}": scale}
    return tensors, {f"{LAYER}.weight": once(minifloat(code, *bits) * wide)}, config or section("fp8")


def blocks_of_groups(rng):
    tensors, expected, _ = fp8(rng, (128, 96), (2, 3), "BF16")
    return (
        tensors,
        expected,
        compressed(_FLOAT8 | {"strategy": "block", "block_structure": [64, 32]}, "float-quantized"),
    )


def static(rng):
    tensors, expected, _ = fp8(rng, (130, 70), ())
    tensors[f"{LAYER}.input_scale"] = torch.tensor(0.5)
    return tensors, expected, section("fp8", activation_scheme="static")


def plain(rng):
    code = codes8(rng, (33, 7), 0x7C)
    stored = torch.from_numpy(code).view(torch.float8_e5m2)
    vector = torch.from_numpy(code[0].copy()).view(torch.float8_e5m2)
    values = once(minifloat(code, 5, 2))
    return {"a.weight": stored, "a.bias": vector}, {"a.weight": values, "a.bias": values[0]}, {"dtype": "float8_e5m2"}


def plain_e4m3(rng):
    code = codes8(rng, (33, 7), 0x7F)
    stored = torch.from_numpy(code).view(torch.float8_e4m3fn)
    return {"a.weight": stored}, {"a.weight": once(minifloat(code, 4, 3))}, {"torch_dtype": "float8_e4m3fn"}


def int4(rng, group, dtype="BF16", rows=70, columns=192):
    """Eight in a word of 32 bits, the first in the lowest, 8 more than they are."""
    number = rng.integers(-8, 8, (rows, columns))
    word = np.zeros((rows, columns // 8), np.uint32)
    for i in range(8):
        word |= (number[:, i::8] + 8).astype(np.uint32) << 4 * i
    scale, factors = floats(rng, (rows, columns // group if group else 1), dtype)
    tensors = {
        f"{LAYER}.weight_packed": torch.from_numpy(word.view(np.int32)), f"{LAYER}.weight_scale": scale,
        f"{LAYER}.weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": group or None}
    return (
        tensors,
        {f"{LAYER}.weight": once(number * spread(factors, rows, columns))},
        compressed(weights, "pack-quantized"),
    )


def int8(rng, dtype="BF16", packed=False):
    number = rng.integers(-128, 128, (70, 64))
    scale, factors = floats(rng, (70, 1), dtype)
    stored = {f"{LAYER}.weight": torch.from_numpy(number.astype(np.int8))}
    if packed:
        words = (number + 128).astype(np.uint8).view(np.int32)
        stored = {f"{LAYER}.weight_packed": torch.from_numpy(words), f"{LAYER}.weight_shape": torch.tensor([70, 64])}
    config = compressed({"num_bits": 8, "type": "int"}, "pack-quantized" if packed else "int-quantized")
    return stored | {f"{LAYER}.weight_scale": scale}, {f"{LAYER}.weight": once(number * factors)}, config


def nvfp4(rng, modelopt):
    """e2m1 in groups of 16 under e4m3, which one float32 multiplies (ModelOpt) or divides (compressed-tensors)."""
    code, packed = nibbles(rng, 70, 96)
    grid = rng.integers(1, 0x7F, (70, 6), dtype=np.uint8)
    factor = np.float32(rng.uniform(1e-3, 1e-2) if modelopt else rng.uniform(100, 1000))
    scale = minifloat(grid, 4, 3) * factor if modelopt else minifloat(grid, 4, 3) / factor
    values = once(minifloat(code, 2, 1) * np.repeat(scale.astype(np.float32).astype(np.float64), 16, -1))
    ends = ("weight", "weight_scale_2", "input_scale")
    if not modelopt:
        ends = ("weight_packed", "weight_global_scale", "input_global_scale")
    tensors = {
        f"{LAYER}.{ends[0]}": packed, f"{LAYER}.weight_scale": torch.from_numpy(grid).view(torch.float8_e4m3fn),
        f"{LAYER}.{ends[1]}": torch.tensor(factor) if modelopt else torch.tensor([factor]),
        f"{LAYER}.{ends[2]}": torch.tensor(0.25),
    }  # fmt: skip
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    config = section("modelopt", quant_algo="NVFP4", config_groups={"group_0": {"weights": weights}})
    return tensors, {f"{LAYER}.weight": values}, config if modelopt else compressed(weights, "nvfp4-pack-quantized")


def gpt_oss(rng):
    """e2m1 in groups of 32 under a power of two; loaders want rows and columns exchanged."""
    tensors, expected = {}, {}
    for name, rows, depth in (("gate_up_proj", 70, 96), ("down_proj", 64, 32)):
        code, packed = nibbles(rng, rows, depth, (3,))
        scale = rng.integers(100, 140, (3, rows, depth // 32), dtype=np.uint8)
        values = minifloat(code, 2, 1) * np.repeat(np.exp2(scale - 127.0), 32, -1)
        tensors[f"{EXPERTS}.{name}_blocks"] = packed.reshape(3, rows, depth // 32, 16)
        tensors[f"{EXPERTS}.{name}_scales"] = torch.from_numpy(scale)
        bias = torch.from_numpy(rng.normal(size=(3, rows))).bfloat16()
        tensors[f"{EXPERTS}.{name}_bias"] = expected[f"{EXPERTS}.{name}_bias"] = bias
        expected[f"{EXPERTS}.{name}"] = once(np.swapaxes(values, -1, -2))
    return tensors, expected, section("mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])


def mxfp4(rng):
    """As compressed-tensors has it."""
    code, packed = nibbles(rng, 70, 96)
    scale = rng.integers(100, 140, (70, 3), dtype=np.uint8)
    values = minifloat(code, 2, 1) * np.repeat(np.exp2(scale - 127.0), 32, -1)
    tensors = {f"{LAYER}.weight_packed": packed, f"{LAYER}.weight_scale": torch.from_numpy(scale)}
    config = compressed({"num_bits": 4, "type": "float", "group_size": 32}, "mxfp4-pack-quantized")
    return tensors, {f"{LAYER}.weight": once(values)}, config


_BLOCKS = section("fp8", weight_block_size=[128, 128], modules_to_not_convert=["lm_head"])
_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_CHANNELS = compressed(_FLOAT8, "float-quantized")
FORMATS = {
    "Qwen3-FP8": lambda rng: fp8(rng, (300, 200), (3, 2), "BF16", "weight_scale_inv", config=_BLOCKS),
    "Qwen3-FP8, F16": lambda rng: fp8(rng, (300, 200), (3, 2), "F16", "weight_scale_inv", config=_BLOCKS),
    "a stack of blocks": lambda rng: fp8(rng, (130, 70), (2, 2, 1), "BF16", "weight_scale_inv", lead=(2,)),
    "FP8 in blocks, compressed-tensors": blocks_of_groups,
    "FP8 of a tensor": lambda rng: fp8(rng, (130, 70), (1,)),
    "FP8, static": static,
    "FP8 of channels": lambda rng: fp8(rng, (130, 70), (130, 1), "BF16", config=_CHANNELS),
    "FP8 of channels, a vector": lambda rng: fp8(rng, (130, 70), (130,), "F16"),
    "FP8 of columns": lambda rng: fp8(rng, (40, 70), (3, 1, 70), lead=(3,), config=section("fbgemm_fp8")),
    "E5M2 of a tensor": lambda rng: fp8(rng, (130, 70), (), bits=(5, 2)),
    "E5M2 in blocks": lambda rng: fp8(rng, (300, 200), (3, 2), "F32", "weight_scale_inv", (5, 2), config=_BLOCKS),
    "E5M2": plain,
    "E4M3 without scales": plain_e4m3,
    "INT4 of 32": lambda rng: int4(rng, 32),
    "INT4 of 64, F32": lambda rng: int4(rng, 64, "F32"),
    "INT4 of channels": lambda rng: int4(rng, 0, "F16"),
    "INT8": int8,
    "INT8, F32": lambda rng: int8(rng, "F32"),
    "INT8, packed": lambda rng: int8(rng, packed=True),
    "NVFP4, ModelOpt": lambda rng: nvfp4(rng, True),
    "NVFP4, compressed-tensors": lambda rng: nvfp4(rng, False),
    "MXFP4, gpt-oss": gpt_oss,
    "MXFP4, compressed-tensors": mxfp4,
}  # fmt: skip


def written(folder, made, other=True):
    tensors, expected, config = made
    rest = {"norm.weight": torch.ones(16, dtype=torch.bfloat16)} if other else {}
    return data.write(folder, {SHARD: tensors | rest}, config), expected | rest


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("backend", [None, "numpy"])
def test_bit_by_bit(tmp_path, rng, case, backend):
    made = FORMATS[case](rng)
    src, expected = written(tmp_path / "src", made)
    dst = tmp_path / "dst"
    summary = checkpoint.convert(src, dst, backend=backend)
    data.same(data.read(dst)[0], expected)
    data.same(dict(checkpoint.load(src, backend=backend)), expected)
    assert checkpoint.verify(src, dst, backend=backend).compared_tensors == len(expected)
    assert summary.dropped_scales == len(made[0]) + 1 - len(expected)
    config = json.loads((dst / "config.json").read_text())
    assert config in ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"})


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("limit", [128, 1000])
def test_slices_of_every_size(tmp_path, rng, monkeypatch, case, limit):
    src, expected = written(tmp_path / "src", FORMATS[case](rng))
    monkeypatch.setattr("flagops.checkpoint.work.SMALLEST", limit)
    monkeypatch.setattr("flagops.checkpoint.work.LARGEST", limit)
    checkpoint.convert(src, tmp_path / "dst")
    data.same(data.read(tmp_path / "dst")[0], expected)


def test_gpt_oss_as_transformers_expands_it(tmp_path, rng):
    mxfp4_of = pytest.importorskip("transformers.integrations.mxfp4")
    tensors, _, config = gpt_oss(rng)
    src, _ = written(tmp_path / "src", (tensors, {}, config))
    checkpoint.convert(src, tmp_path / "dst")
    found = data.read(tmp_path / "dst")[0]
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{EXPERTS}.{name}_{end}"] for end in ("blocks", "scales"))
        assert torch.equal(found[f"{EXPERTS}.{name}"], mxfp4_of.convert_moe_packed_tensors(blocks, scales))


def test_gpt_oss_as_gguf_expands_it(tmp_path, rng):
    """GGUF's MXFP4 is the same codes in another order: a block's scale, then its halves as low and as high nibbles."""
    mxfp4 = getattr(pytest.importorskip("gguf.quants"), "MXFP4", None) or pytest.skip("a gguf before MXFP4")
    tensors, _, config = gpt_oss(rng)
    src, _ = written(tmp_path / "src", (tensors, {}, config))
    checkpoint.convert(src, tmp_path / "dst")
    found = data.read(tmp_path / "dst")[0]
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{EXPERTS}.{name}_{end}"].numpy() for end in ("blocks", "scales"))
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(-1, 32)
        theirs = np.concatenate([scales.reshape(-1, 1), codes[:, :16] | codes[:, 16:] << 4], -1)
        wanted = torch.from_numpy(mxfp4.dequantize_blocks(theirs)).reshape(*blocks.shape[:2], -1)
        assert torch.equal(found[f"{EXPERTS}.{name}"].float(), wanted.transpose(1, 2))


LIBRARY = {
    "FP8 of channels": "float-quantized",
    "INT4 of 32": "pack-quantized",
    "INT8": "int-quantized",
    "NVFP4, compressed-tensors": "nvfp4-pack-quantized",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIBRARY)
def test_as_compressed_tensors_expands_it(tmp_path, rng, case):
    """What the format's own library makes of the same tensors, in bfloat16."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors, _, config = FORMATS[case](rng)
    group = config["quantization_config"]["config_groups"]["group_0"]
    strategy = {"group_size": group["weights"].get("group_size"), "strategy": "channel"}
    if strategy["group_size"]:
        strategy["strategy"] = "tensor_group" if case.startswith("NVFP4") else "group"
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"] | strategy)
    compressor = BaseCompressor.get_value_from_registry(LIBRARY[case])
    state = {name.removeprefix(f"{LAYER}."): x for name, x in tensors.items()}
    wanted = compressor.decompress(state, scheme)["weight"]
    src, _ = written(tmp_path / "src", (tensors, {}, config))
    checkpoint.convert(src, tmp_path / "dst")
    found = data.read(tmp_path / "dst")[0][f"{LAYER}.weight"]
    assert torch.equal(found, wanted.bfloat16())


# What is refused


def changed_in(case, **change):
    """A format with tensors put in place of others, or taken away."""

    def made(rng):
        tensors, expected, config = FORMATS[case](rng)
        for end, tensor in change.items():
            name = f"{LAYER}.{end}"
            tensors = {n: x for n, x in tensors.items() if n != name}
            tensors |= {} if tensor is None else {name: tensor}
        return tensors, expected, config

    return made


def configured(case, config):
    return lambda rng: (*FORMATS[case](rng)[:2], config)


ODD = torch.ones(70, 5)
BAD = {
    "INT4: no scale": (changed_in("INT4 of 32", weight_scale=None), "weight_packed", "no scale"),
    "INT4: groups": (changed_in("INT4 of 32", weight_scale=ODD), "weight_packed", "expected for INT4"),
    "INT4: size": (
        changed_in("INT4 of 32", weight_shape=torch.tensor([70, 190])), "weight_shape", "is [70, 190], but",
    ),
    "INT4: size of another kind": (
        changed_in("INT4 of 32", weight_shape=torch.tensor([70.0, 192.0])), "weight_shape", "expected two I64",
    ),
    "E4M3: no scale": (configured("E4M3 without scales", section("fp8")), "a.weight", "no scale"),
    "INT4: zeros": (
        changed_in("INT4 of 32", weight_zero_point=torch.zeros(9, 6, dtype=torch.int32)), "weight_zero_point",
        "does not read",
    ),
    "INT4: order": (
        changed_in("INT4 of 32", weight_g_idx=torch.zeros(192, dtype=torch.int32)), "weight_g_idx", "does not read",
    ),
    "INT4: no bits": (configured("INT4 of 32", section("compressed-tensors")), "weight_packed", "4 or 8 num_bits"),
    "INT4: bits": (
        configured("INT4 of 32", compressed({"num_bits": 3}, "pack-quantized")), "weight_packed", "4 or 8 num_bits",
    ),
    "INT4: bits in words": (configured("INT4 of 32", compressed({"num_bits": "4"}, "x")), "num_bits", "a number of"),
    "INT8: scales": (changed_in("INT8", weight_scale=torch.ones(69, 1)), "weight", "expected for INT8"),
    "INT8: infinite": (changed_in("INT8", weight_scale=torch.full((70, 1), math.inf)), "weight_scale", "not finite"),
    "NVFP4: no factor": (changed_in("NVFP4, ModelOpt", weight_scale_2=None), "weight", "expected F8_E8M0"),
    "NVFP4: many factors": (changed_in("NVFP4, ModelOpt", weight_scale_2=torch.ones(2)), "weight_scale_2", "one F32"),
    "NVFP4: zero": (
        changed_in("NVFP4, compressed-tensors", weight_global_scale=torch.zeros(1)), "weight_global_scale",
        "other than 0",
    ),
    "NVFP4: NaN": (
        changed_in("NVFP4, ModelOpt", weight_scale=torch.full((70, 6), math.nan).to(torch.float8_e4m3fn)),
        "weight_scale", "not finite",
    ),
    "NVFP4: groups": (
        changed_in("NVFP4, ModelOpt", weight_scale=torch.ones(70, 3).to(torch.float8_e4m3fn)), "weight",
        "expected for NVFP4",
    ),
    "E5M2: infinite": (
        changed_in("E5M2 of a tensor", weight=torch.full((130, 70), math.inf).to(torch.float8_e5m2)), "weight",
        "an infinity or NaN",
    ),
    "E5M2: overflow": (changed_in("E5M2 of a tensor", weight_scale=torch.tensor(3e38)), "weight", "overflows bfloat16"),
    "FP8: scales": (changed_in("FP8 of channels", weight_scale=torch.ones(131, 1)), "weight", "each 128 x 128 block"),
    "FP8: two scales": (changed_in("FP8 of channels", weight_scale_inv=torch.ones(2, 1)), "weight", "two scales"),
    "a scale alone": (changed_in("FP8 of channels", weight=torch.ones(2, 2)), "weight_scale", "is a scale, but"),
    "a wide one beside": (changed_in("INT4 of 32", weight=torch.ones(2, 2)), "weight_packed", "would become"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, rng, case):
    make, named, said = BAD[case]
    src, _ = written(tmp_path / "src", make(rng))
    with pytest.raises(checkpoint.Refused) as refusal:
        checkpoint.convert(src, tmp_path / "dst")
    assert named in str(refusal.value)
    assert said in str(refusal.value)
    assert not (tmp_path / "dst" / data.INDEX).exists()


@pytest.mark.parametrize("case", ["FP8 of channels", "INT4 of 32", "NVFP4, ModelOpt", "MXFP4, gpt-oss"])
def test_what_fp8_cannot_keep(tmp_path, rng, case):
    src, _ = written(tmp_path / "src", FORMATS[case](rng))
    with pytest.raises(checkpoint.Refused, match=r"--to bf16"):
        checkpoint.convert(src, tmp_path / "dst", to="fp8")


def test_fp8_keeps_the_scales_of_activations(tmp_path, rng):
    packed, scale, _ = data.fp4(rng, 128, 128, low=120, high=121)
    weight, factor, _ = data.fp8(rng, 128, 128)
    tensors = {"e.weight": packed, "e.scale": scale, "a.weight": weight, "a.scale": factor}
    tensors |= {"a.input_scale": torch.tensor(0.5)}
    src, _ = written(tmp_path / "src", (tensors, {}, data.CONFIG))
    checkpoint.convert(src, tmp_path / "dst", to="fp8")
    found = data.read(tmp_path / "dst")[0]
    data.same(
        {name: found[name] for name in tensors if name[0] == "a"}, {n: x for n, x in tensors.items() if n[0] == "a"}
    )


def test_what_a_kept_weight_shares_is_kept(tmp_path, rng):
    tensors = {}
    for name in ("up", "down"):
        weight, scale, _ = data.fp8(rng, 130, 70, floating=True)
        tensors |= {f"experts.{name}": weight, f"experts.{name}_scale_inv": scale}
    tensors["experts.input_scale"] = torch.tensor(0.5)
    src, _ = written(tmp_path / "src", (tensors, {}, _BLOCKS))
    found = data.read(checkpointed(src, tmp_path / "dst"))[0]
    assert "experts.input_scale" not in found
    assert "experts.input_scale" in dict(checkpoint.load(src, keep="experts.up"))


def checkpointed(src, dst):
    checkpoint.convert(src, dst)
    return dst


def test_keep_beside_groups_is_refused(tmp_path, rng):
    tensors, expected, config = int4(rng, 32)
    more = {name.replace("down_proj", "up_proj"): x.clone() for name, x in tensors.items()}
    src, _ = written(tmp_path / "src", (tensors | more, expected, config))
    with pytest.raises(checkpoint.Refused, match=r"up_proj.*quant_method is 'compressed-tensors'"):
        checkpoint.convert(src, tmp_path / "dst", keep="*.up_proj.weight_packed")


def test_all_parts_of_a_weight_are_kept_together(tmp_path, rng):
    tensors, expected, _ = fp8(rng, (300, 200), (3, 2), "BF16", "weight_scale_inv")
    more = {name.replace("down_proj", "up_proj"): x.clone() for name, x in static(rng)[0].items()}
    src, _ = written(tmp_path / "src", (tensors | more, expected, _BLOCKS))
    summary = checkpoint.convert(src, tmp_path / "dst", keep="*.up_proj.weight")
    assert sorted(summary.kept) == sorted(more)
    found = data.read(tmp_path / "dst")[0]
    data.same({name: found[name] for name in more}, more)


def test_the_description_of_modelopt_goes_with_what_it_describes(tmp_path, rng):
    src, _ = written(tmp_path / "src", nvfp4(rng, True))
    (src / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    summary = checkpoint.convert(src, tmp_path / "dst")
    assert "hf_quant_config.json describes what is converted, and is left out" in summary.notes
    assert "hf_quant_config.json" not in tree(tmp_path / "dst")
    assert checkpoint.verify(src, tmp_path / "dst").state == "verified"


def test_memory_of_what_is_turned_is_planned(tmp_path, rng):
    """A matrix is held packed: 8 MB of it do not fit where 4 MB are left."""
    blocks = torch.zeros(1, 4096, 128, 16, dtype=torch.uint8)
    tensors = {f"{EXPERTS}.down_proj_blocks": blocks, f"{EXPERTS}.down_proj_scales": torch.ones(1, 4096, 128).byte()}
    src, _ = written(tmp_path / "src", (tensors, {}, section("mxfp4")))
    planned = checkpoint.convert(src, tmp_path / "dst", workers=1, dry_run=True).planned_memory
    small, _ = written(tmp_path / "small", gpt_oss(rng))
    assert planned - checkpoint.convert(small, tmp_path / "other", workers=1, dry_run=True).planned_memory > 8 << 20
