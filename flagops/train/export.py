"""A model of transformers as a checkpoint of DeepSeek-V4: the published names, packed FP4, FP8 blocks, e8m0 scales."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import flagops

from .narrow import FP4_BLOCK, FP8_BLOCK, blocks, form, unblocked

NAMES = [
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.gate\.e_score_correction_bias", ".gate.bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.gate_proj\.", ".wgate."),
    (r"\.position_bias", ".ape"),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
]
"""transformers' names to those of the published checkpoints, in this order."""
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_KEYS = """
    vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    qk_rope_head_dim q_lora_rank o_groups o_lora_rank n_routed_experts n_shared_experts num_experts_per_tok
    routed_scaling_factor scoring_func norm_topk_prob swiglu_limit index_n_heads index_head_dim index_topk
    sliding_window hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps rope_theta compress_rope_theta
    max_position_embeddings num_nextn_predict_layers tie_word_embeddings bos_token_id eos_token_id hidden_act
    attention_bias attention_dropout initializer_range model_type use_cache
""".split()  # noqa: SIM905 (a list of one word a line is longer than the rest of this file)


def official(name: str) -> str:
    """The published name of a parameter or buffer of transformers' model, other than of routed experts."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def coded(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix in FP4 or FP8, and its scales: ``[n, k / 2]`` int8, ``[n, k / 32]``; ``[n, k]``, in blocks."""
    if kind == "fp4":
        packed, scale = flagops.fp4_quantize(weight, FP4_BLOCK)
        return packed.view(torch.int8), scale
    codes, scale = flagops.fp8_quantize(blocks(weight), FP8_BLOCK**2)
    return unblocked(codes.view(torch.uint8)).view(torch.float8_e4m3fn), scale.squeeze(-1)


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint of a float32 model, name by name."""
    for name, value in model.state_dict().items():
        kind = form(name)
        if kind == "fp4":
            stem = official(name).rpartition(".")[0]
            names = ("w2",) if name.endswith("down_proj") else ("w1", "w3")
            parts = dict(zip(names, value.chunk(len(names), 1), strict=True))
            matrices = {f"{stem}.{i}.{w}": x for w, experts in parts.items() for i, x in enumerate(experts)}
        elif kind == "fp8":
            matrices = {official(name).removesuffix(".weight"): value}
        else:
            yield official(name), value if kind == "f32" or not value.is_floating_point() else value.bfloat16()
            continue
        for stem, matrix in matrices.items():
            weight, scale = coded(kind, matrix.contiguous())
            yield f"{stem}.weight", weight
            yield f"{stem}.scale", scale


def configuration(config: Any) -> dict[str, Any]:
    """A configuration of transformers in the words of the published ones.

    Raises ValueError for compressors of other ratios than 4 and 128, which those words cannot say.
    """
    if config.compress_rates != config.default_compress_rates:
        raise ValueError(f"the checkpoint's format has compressors of 4 and 128 tokens, got {config.compress_rates}")
    scaling = config.rope_parameters["compress"]
    names = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    return {
        **{key: getattr(config, key) for key in _KEYS},
        "architectures": ["DeepseekV4ForCausalLM"],
        "compress_ratios": [_RATIOS[kind] for kind in config.layer_types],
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "topk_method": "noaux_tc",
        "rope_scaling": {"type": scaling["rope_type"]} | {name: scaling[name] for name in names},
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "activation_scheme": "dynamic",
        },
    }


def export(model: Any, folder: Path, about: str) -> int:
    """Write the checkpoint and a README that says what it is; returns the bytes of its tensors."""
    config = configuration(model.config)
    folder.mkdir(exist_ok=True)
    found = {name: x.contiguous() for name, x in tensors(model)}
    file = "model-00001-of-00001.safetensors"
    save_file(found, folder / file, {"format": "pt"})
    size = sum(x.nbytes for x in found.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(found, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(about)
    return size
