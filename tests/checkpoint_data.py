"""Small quantised checkpoints, and what their tensors are: computed from the definitions, with none of flagops."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "compress_ratios": [0, 4, 128, 0],
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
    "torch_dtype": "bfloat16",
}  # fmt: skip


def fp4(rng, rows, columns, lead=(), low=100, high=140):
    """Packed bytes, e8m0 scales and the BF16 values."""
    codes = rng.integers(0, 16, (*lead, rows, columns), dtype=np.uint8)
    scale = rng.integers(low, high, (*lead, rows, columns // 32), dtype=np.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    values = E2M1[codes] * np.repeat(np.exp2(scale - 127.0), 32, axis=-1)
    return (
        torch.from_numpy(packed).view(torch.int8),
        torch.from_numpy(scale).view(torch.float8_e8m0fnu),
        bf16(values.astype(np.float32)),
    )


def fp8(rng, rows, columns, lead=(), floating=False, block=(128, 128)):
    """E4m3 codes, e8m0 or float32 scales and the BF16 values."""
    codes = rng.integers(0, 256, (*lead, rows, columns), dtype=np.uint8)
    codes[codes & 127 == 127] = 1
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    bits = rng.integers(100, 140, grid, dtype=np.uint8)
    factors = np.exp2(bits - 127.0).astype(np.float32)
    scale = torch.from_numpy(bits).view(torch.float8_e8m0fnu)
    if floating:
        factors *= rng.uniform(1, 2, grid).astype(np.float32)
        scale = torch.from_numpy(factors)
    wide = np.repeat(np.repeat(factors, block[0], axis=-2), block[1], axis=-1)[..., :rows, :columns]
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * wide
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), scale, bf16(values)


def bf16(values):
    return torch.from_numpy(values.astype(ml_dtypes.bfloat16).view(np.uint16)).view(torch.bfloat16)


def plain(rng):
    """Tensors that are not quantised, in many dtypes and shapes."""
    return {
        "norm.weight": torch.from_numpy(rng.normal(size=256).astype(np.float32)).bfloat16(),
        "layers.0.hc_attn_scale": torch.from_numpy(rng.normal(size=3).astype(np.float32)),
        "model.layers.0.attn_hc.scale": torch.from_numpy(rng.normal(size=3).astype(np.float32)),
        "layers.0.attn.compressor.ape": torch.from_numpy(rng.normal(size=(4, 256)).astype(np.float32)),
        "layers.0.attn.attn_sink": torch.tensor([1.0, float("-inf"), 0.5]),
        "layers.0.ffn.gate.tid2eid": torch.from_numpy(rng.integers(0, 4, (64, 2))),
        "odd.weight": torch.from_numpy(rng.normal(size=(7, 3)).astype(np.float32)).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 5),
        "half": torch.from_numpy(rng.normal(size=(3, 5)).astype(np.float16)),
    }


def write(folder, shards, config=CONFIG, others=True):
    """Shards (``{file: {name: tensor}}``) with index, configuration and other files."""
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weights = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    size = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if others:
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "generation_config.json").write_text("{}")
        (folder / "encoding").mkdir()
        (folder / "encoding" / "example.txt").write_text("text")
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
        (folder / ".gitattributes").write_text("")
    return folder


def spread(pairs, rest, count, seed):
    """Tensors over `count` shards at random, and every scale in another shard than its weight."""
    rng = np.random.default_rng(seed)
    shards = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": {} for i in range(count)}
    files = list(shards)
    for (weight, values), (scale, factors) in pairs:
        at = int(rng.integers(count))
        shards[files[at]][weight] = values
        shards[files[(at + 1) % count]][scale] = factors
    for name, values in rest.items():
        shards[files[int(rng.integers(count))]][name] = values
    return {name: tensors for name, tensors in shards.items() if tensors}


def mixed(folder, naming="original", seed=0, floating=False, count=3, config=CONFIG):
    """A checkpoint of all that is known in one naming, and what a conversion to BF16 must give."""
    rng = np.random.default_rng(seed)
    expected, pairs = plain(rng), []
    rest = dict(expected)

    def add(name, made):
        weight, scale, values = made
        if not name.endswith(".weight"):
            scaled = f"{name}_scale_inv"
        elif naming == "original" and not floating:
            scaled = name.removesuffix("weight") + "scale"
        else:
            scaled = f"{name}_scale_inv"
        pairs.append(((name, weight), (scaled, scale)))
        expected[name] = values

    shapes8 = [(130, 200), (1, 1), (128, 128), (300, 129), (256, 384), (3, 1000), (0, 128)]
    attention = "layers.0.attn" if naming == "original" else "model.layers.0.self_attn"
    for i, (rows, columns) in enumerate(shapes8):
        add(f"{attention}.p{i}.weight", fp8(rng, rows, columns, floating=floating))
    if floating:
        return write(folder, spread(pairs, rest, count, seed), config), expected
    for i, (rows, columns) in enumerate([(3, 32), (1, 64), (130, 96), (256, 512), (0, 32)]):
        name = f"layers.0.ffn.experts.{i}.w1.weight" if naming == "original" else f"model.layers.0.mlp.e.{i}.up.weight"
        add(name, fp4(rng, rows, columns))
    if naming == "transformers":
        add("model.layers.0.mlp.experts.gate_up_proj", fp4(rng, 64, 96, lead=(3,)))
        add("model.layers.0.mlp.shared.down_proj", fp8(rng, 130, 140, lead=(2,)))
    return write(folder, spread(pairs, rest, count, seed), config), expected


def experts(folder, count=2, shards=1, config=CONFIG, seed=0, rows=256, columns=384, low=120, high=130):
    """FP4 experts whose sizes divide into 128 x 128 blocks, and one FP8 matrix."""
    rng = np.random.default_rng(seed)
    pairs, expected, rest = [], {}, {"norm.weight": torch.ones(16, dtype=torch.bfloat16)}
    for i in range(count):
        name = f"layers.0.ffn.experts.{i}.w1"
        weight, scale, values = fp4(rng, rows, columns, low=low, high=high)
        pairs.append(((f"{name}.weight", weight), (f"{name}.scale", scale)))
        expected[f"{name}.weight"] = values
    weight, scale, expected["layers.0.attn.wq_a.weight"] = fp8(rng, 128, 256)
    pairs.append((("layers.0.attn.wq_a.weight", weight), ("layers.0.attn.wq_a.scale", scale)))
    return write(folder, spread(pairs, rest, shards, seed), config), expected | rest


def read(folder):
    """Every tensor of a checkpoint as the safetensors library reads it, and the index."""
    index = json.loads((folder / INDEX).read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        loaded = load_file(folder / shard)
        assert set(loaded) == {name for name, file in index["weight_map"].items() if file == shard}
        tensors |= loaded
    return tensors, index


def read_any(folder):
    """Every tensor of a folder, with or without an index."""
    return {name: x for shard in sorted(folder.glob("*.safetensors")) for name, x in load_file(shard).items()}


def changed(dst, name, at, by=1):
    """One bit of a tensor changed in place, its element's number given."""
    shard = dst / json.loads((dst / INDEX).read_text())["weight_map"][name]
    raw = bytearray(shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[8 + length + start + 2 * at] ^= by
    shard.write_bytes(raw)


def same(found, expected):
    """Bit by bit, with the name of the first tensor that differs."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw(found[name]) == raw(tensor), name


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
