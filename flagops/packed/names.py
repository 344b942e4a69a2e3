"""The names of a checkpoint's tensors as transformers' modules have them: V4's official ones, and each expert apart."""

from __future__ import annotations

import re
from collections.abc import Collection

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
"""The layer of experts, the expert, and its projection."""

_OFFICIAL = [
    (r"^embed\.", "embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"(^|\.)hc_head_", r"\1hc_head.hc_"),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.self_attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.(compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_([ab])\.", r".q_\1_proj."),
    (r"\.wo_([ab])\.", r".o_\1_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\bmtp\.(\d+)\.(self_attn|mlp|input_layernorm|post_attention_layernorm|attn_hc|ffn_hc)\.", r"mtp.\1.block.\2."),
]
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def renamed(name: str, known: Collection[str], prefix: str, model_type: str) -> str | None:
    """The parameter or buffer of a model that a tensor is, None for none.

    known: those that the model has. prefix: of the base model, which official names leave out.
    """
    name = re.sub(
        r"(\.experts\.\d+|\.shared_experts)\.(w[123])\.", lambda found: f"{found[1]}.{_PARTS[found[2]]}.", name
    )
    if model_type == "deepseek_v4":
        for pattern, replacement in _OFFICIAL:
            name = re.sub(pattern, replacement, name)
    for candidate in (name, f"{prefix}.{name}"):
        expert = EXPERT.fullmatch(candidate)
        if candidate in known or (expert and f"{expert[1]}.gate_up_proj" in known):
            return candidate
    return None
