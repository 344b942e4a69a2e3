"""A converted checkpoint loads in transformers, nothing missing, and answers as transformers' own dequantisation."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data  # noqa: E402

from flagops import checkpoint  # noqa: E402
from flagops.deepseek_v4.examples import random_deepseek_v4  # noqa: E402
from flagops.train.export import official  # noqa: E402

CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
QUANTIZATION = data.CONFIG["quantization_config"]


def model():
    """A random DeepSeek-V4 whose quantised dimensions are multiples of 128."""
    return random_deepseek_v4(
        0, vocab_size=64, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        head_dim=128, qk_rope_head_dim=64, q_lora_rank=128, o_lora_rank=128, n_routed_experts=4, num_experts_per_tok=2,
        index_n_heads=16, index_head_dim=128, index_topk=2, sliding_window=4, max_position_embeddings=1024,
        compress_ratios=[0, 4, 128, 0], compress_rate_hca=8, initializer_range=0.1,
    )  # fmt: skip


def power(values):
    """The e8m0 code of the power of two not below each value."""
    return (torch.log2(values.clamp_min(2.0**-100)).ceil() + 127).to(torch.uint8)


def to_fp4(x):
    groups = x.float().unflatten(-1, (-1, 32))
    scale = power(groups.abs().amax(-1) / 6)
    ratio = groups / torch.exp2(scale.float() - 127).unsqueeze(-1)
    codes = (ratio.unsqueeze(-1) - CODES).abs().argmin(-1).to(torch.uint8).flatten(-2)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int8), scale.view(torch.float8_e8m0fnu)


def to_fp8(x, floating=False):
    blocks = x.float().unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    largest = blocks.abs().amax((-1, -3)) / 448
    scale = power(largest)
    factor = largest if floating else torch.exp2(scale.float() - 127)
    codes = (blocks / factor.unsqueeze(-1).unsqueeze(-3)).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).flatten(-4, -3).flatten(-2).view(torch.float8_e4m3fn), (
        factor if floating else scale.view(torch.float8_e8m0fnu)
    )


def under_float_scales(tensors):
    """What V3, R1 and Qwen3 store: projections in FP8 with their scales, as pairs, and the rest."""
    pairs, rest = [], {}
    for name, x in tensors.items():
        if re.search(r"(_proj|_b|_a|_with_mqa)\.weight$", name) and not x.shape[0] % 128 and not x.shape[1] % 128:
            weight, scale = to_fp8(x, floating=True)
            pairs.append(((name, weight), (f"{name}_scale_inv", scale)))
        else:
            rest[name] = x if "correction_bias" in name else x.bfloat16()
    return pairs, rest


def named(stem, weight, scale, naming):
    if naming == "original":
        return (official(f"{stem}.weight"), weight), (
            official(f"{stem}.weight").removesuffix("weight") + "scale",
            scale,
        )
    return (f"{stem}.weight", weight), (f"{stem}.weight_scale_inv", scale)


def quantised(made, naming):
    """(weight, scale) pairs and the other tensors of a checkpoint of a model."""
    pairs, rest = [], {}
    for name, x in made.state_dict().items():
        x = x.contiguous()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            if naming == "stacked":
                weight, scale = to_fp4(x)
                pairs.append(((name, weight), (f"{name}_scale_inv", scale)))
                continue
            parts = {"w2": x} if name.endswith("down_proj") else dict(zip(("w1", "w3"), x.chunk(2, dim=1), strict=True))
            for part, stack in parts.items():
                for i, expert in enumerate(stack):
                    weight, scale = to_fp4(expert)
                    stem = f"{name.rpartition('.')[0]}.{i}.{part}"
                    pairs.append(named(stem, weight, scale, naming))
            continue
        if re.search(r"(self_attn\.(q_a|q_b|kv|o_a|o_b)_proj|indexer\.q_b_proj|shared_experts\.\w+)\.weight$", name):
            weight, scale = to_fp8(x)
            pairs.append(named(name.removesuffix(".weight"), weight, scale, naming))
        else:
            keep = x.dtype == torch.int64 or re.search(r"_hc\.|hc_head|sinks|position_bias|correction_bias", name)
            rest[official(name) if naming == "original" else name] = x if keep else x.bfloat16()
    return pairs, rest


def source(folder, naming):
    made = model()
    made.config.architectures = ["DeepseekV4ForCausalLM"]
    config = made.config.to_dict() | {"expert_dtype": "fp4", "quantization_config": QUANTIZATION, "dtype": "bfloat16"}
    pairs, rest = quantised(made, naming)
    return data.write(folder, data.spread(pairs, rest, 3, 0), config, others=False)


def loaded(folder):
    made, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.bfloat16
    )
    return made.eval(), info


def logits(made):
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return made(input_ids=ids).logits


@pytest.mark.parametrize("naming", ["original", "transformers", "stacked"])
def test_the_bf16_checkpoint_is_the_dequantised_model(naming, tmp_path):
    """transformers itself cannot dequantise stacked experts: these are held to what it makes of separate ones."""
    src = source(tmp_path / "src", naming)
    checkpoint.convert(src, tmp_path / "dst", shard_size="1MiB")
    theirs, _ = loaded(source(tmp_path / "separate", "original") if naming == "stacked" else src)
    ours, info = loaded(tmp_path / "dst")
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    assert not info["error_msgs"], info
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    answer = logits(ours)
    assert torch.isfinite(answer).all()
    assert answer.std() > 0.1
    np.testing.assert_array_equal(answer.float().numpy(), logits(theirs).float().numpy())


def test_the_fp8_checkpoint_is_the_same_model(tmp_path):
    src = source(tmp_path / "src", "original")
    checkpoint.convert(src, tmp_path / "dst", to="fp8", shard_size="1MiB")
    ours, info = loaded(tmp_path / "dst")
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    theirs, _ = loaded(src)
    np.testing.assert_array_equal(logits(ours).float().numpy(), logits(theirs).float().numpy())


def test_deepseek_v3(tmp_path):
    """float32 scales named weight_scale_inv, and no FP4."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=64,
        qk_nope_head_dim=64, v_head_dim=64, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, initializer_range=0.1, tie_word_embeddings=False, attn_implementation="eager",
        architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.DeepseekV3ForCausalLM(config).eval()
    made.save_pretrained(tmp_path / "plain")
    pairs, rest = under_float_scales(data.read_any(tmp_path / "plain"))
    assert len(pairs) > 10
    quantization = {k: v for k, v in QUANTIZATION.items() if k != "scale_fmt"}
    src = data.write(
        tmp_path / "src", data.spread(pairs, rest, 3, 0), config.to_dict() | {"quantization_config": quantization}
    )
    checkpoint.convert(src, tmp_path / "dst")
    ours, info = loaded(tmp_path / "dst")
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    theirs, _ = loaded(src)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    np.testing.assert_array_equal(logits(ours).float().numpy(), logits(theirs).float().numpy())


def test_a_nested_configuration(tmp_path):
    """FP8 described in text_config alone, where transformers finds it too; a vision tower that is not quantised."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**shape, vocab_size=64, num_key_value_heads=2, initializer_range=0.1),
        vision_config=transformers.CLIPVisionConfig(**shape, image_size=28, patch_size=14),
        image_token_index=63, architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).eval().save_pretrained(tmp_path / "plain")
    pairs, rest = [], {}
    for name, x in data.read_any(tmp_path / "plain").items():
        if re.search(r"language_model.*_proj\.weight$", name):
            weight, scale = to_fp8(x)
            pairs.append(((name, weight), (f"{name}_scale_inv", scale)))
        else:
            rest[name] = x.bfloat16()
    assert len(pairs) == 14
    said = config.to_dict()
    said["text_config"] |= {"quantization_config": QUANTIZATION, "dtype": "float8_e4m3fn"}
    src = data.write(tmp_path / "src", data.spread(pairs, rest, 2, 0), said, others=False)
    checkpoint.convert(src, tmp_path / "dst")

    def load(folder, **more):
        return transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **more)

    ours, info = load(tmp_path / "dst", dtype="auto")
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert getattr(ours.config.get_text_config(), "quantization_config", None) is None
    assert {x.dtype for x in ours.parameters()} == {torch.bfloat16}
    theirs = load(src, dtype=torch.bfloat16)[0].state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("keep", [["*.attn.wq_b.*"], ["*.experts.*"], ["layers.1.attn.*", "*.shared_experts.*"]])
def test_a_checkpoint_with_kept_tensors_is_the_same_model(tmp_path, keep):
    """On a CPU, dequantised as it is loaded; where it would not be, only modules that were kept are quantised ones."""
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
    from transformers.quantizers.auto import AutoHfQuantizer

    src = source(tmp_path / "src", "original")
    kept = checkpoint.convert(src, tmp_path / "dst", keep=keep, shard_size="1MiB").kept
    ours, info = loaded(tmp_path / "dst")
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    theirs, _ = loaded(src)
    np.testing.assert_array_equal(logits(ours).float().numpy(), logits(theirs).float().numpy())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dst")
    with torch.device("meta"):
        blank = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(blank)
    quantised = {name for name, module in blank.named_modules() if isinstance(module, FP8Linear | FP8Experts)}
    wanted = {name.removesuffix(".scale") for name in kept if name.endswith(".scale")}
    wanted = {re.sub(r"\.experts\..*", ".experts", name) for name in wanted}
    assert {official(f"{name}.weight").removesuffix(".weight") for name in quantised} == wanted
