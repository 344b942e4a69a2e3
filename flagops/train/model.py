"""The small model: every kind of layer that DeepSeek-V4 has, in sizes that its checkpoint's format can hold."""

from __future__ import annotations

from typing import Any

from .corpus import START, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 64,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4],
    "hc_mult": 4,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "max_position_embeddings": 65536,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "bos_token_id": START,
    "eos_token_id": START,
}
"""DeepSeek-V4's own window, ratios and number of streams; every projection is a multiple of an FP8 block of 128."""


def build(seed: int, **sizes: Any) -> Any:
    """A float32 `DeepseekV4ForCausalLM` before its first step, the same for the same seed.

    Streams begin apart: a combination starts near the identity, not at the mean of all, which no gradient parts.
    """
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(attn_implementation="eager", initializer_range=0.03, **(SIZES | sizes))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(config).train()
        streams = config.hc_mult
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf == "tid2eid":
                tensor.copy_(torch.rand(tensor.shape[0], config.n_routed_experts).argsort(-1)[:, : tensor.shape[1]])
            elif leaf == "base":
                tensor[2 * streams :].copy_(4 * torch.eye(streams).flatten())
            elif leaf in ("scale", "hc_scale"):
                tensor.fill_(0.1)
    return model


def csa_layers(model: Any) -> list[Any]:
    """The attention layers whose entries an indexer selects."""
    return [x.self_attn for x in model.model.layers if x.self_attn.layer_type == "compressed_sparse_attention"]
