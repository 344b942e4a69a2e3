"""Random DeepSeek-V4 models of Hugging Face transformers, small enough for a laptop.

What an untrained model leaves at zero or one (sinks, position and routing biases, norms, the hash table) is random too,
so that an error in any of them changes the logits.
"""

from __future__ import annotations

from typing import Any


def small_deepseek_v4(seed: int = 0, **sizes: Any) -> Any:
    """60 000 parameters with sliding, CSA and HCA layers, hash and scored routing; windows that close early."""
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 2,
        "sliding_window": 4,
        "max_position_embeddings": 1024,
        "compress_ratios": [0, 4, 128, 0],
        "compress_rate_hca": 8,
        "initializer_range": 0.3,
    }
    return random_deepseek_v4(seed, **(small | sizes))


def long_deepseek_v4(seed: int = 0) -> Any:
    """Four layers with V4's own window, ratios and number of streams, for prompts of thousands of tokens.

    Up to 2048 tokens rounding decides nothing: experts are hashed, and the indexer selects every visible entry.
    """
    return random_deepseek_v4(
        seed,
        vocab_size=1024,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_lora_rank=64,
        n_routed_experts=16,
        num_experts_per_tok=6,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=520,
        num_hash_layers=4,
        sliding_window=128,
        max_position_embeddings=65536,
        compress_ratios=[0, 4, 128, 4, 0],
        initializer_range=0.1,
    )


def random_deepseek_v4(seed: int, **sizes: Any) -> Any:
    """A float32 `DeepseekV4ForCausalLM` of the given sizes, in evaluation mode."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        **{
            "num_key_value_heads": 1,
            "o_groups": 2,
            "num_hash_layers": 1,
            "hc_mult": 4,
            "routed_scaling_factor": 1.5,
            "rope_theta": 10000.0,
            "compress_rope_theta": 160000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": sizes["max_position_embeddings"] // 16,
            },
            "num_nextn_predict_layers": 1,
            "swiglu_limit": 10.0,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        | sizes
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(config).eval()
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf in ("sinks", "position_bias", "base", "hc_base", "e_score_correction_bias"):
                x.normal_()
            elif leaf == "tid2eid":
                x.copy_(torch.rand(x.shape[0], config.n_routed_experts).argsort(-1)[:, : x.shape[1]])
            elif "norm" in name:
                x.uniform_(0.5, 1.5)
    return model
