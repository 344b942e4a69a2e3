"""Checkpoints of DeepSeek-V4 with a draft layer in official names: of random weights, and one that guesses well."""

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data
from test_checkpoint_transformers import QUANTIZATION, model, quantised, to_fp8

from flagops.deepseek_v4.examples import TRAINED, held_out, random_deepseek_v4, trained_deepseek_v4

__all__ = ["data", "fitted", "model", "random", "streams"]

SHARD = "model-00001-of-00001.safetensors"


def drawn(config, seed=1):
    """The tensors of a random draft layer, its matrices in FP4 and FP8: those of a model with one layer, renamed."""
    sizes = {
        key: getattr(config, key)
        for key in (
            "vocab_size", "hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim", "q_lora_rank",
            "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "qk_rope_head_dim", "sliding_window",
            "max_position_embeddings", "initializer_range",
        )
    }  # fmt: skip
    made = random_deepseek_v4(seed, **sizes, num_hidden_layers=1, num_hash_layers=0, compress_ratios=[0])
    pairs, rest = quantised(made, "original")
    tensors = {name: x for pair in pairs for name, x in pair} | rest
    found = {re.sub(r"^layers\.0\.", "", name): x for name, x in tensors.items()}
    found = {f"mtp.0.{name}": x for name, x in found.items() if not name.startswith(("embed.", "head."))}
    draw, width = torch.Generator().manual_seed(seed), config.hidden_size
    for name in ("enorm", "hnorm"):
        found[f"mtp.0.{name}.weight"] = (torch.rand(width, generator=draw) + 0.5).bfloat16()
    for name in ("e_proj", "h_proj"):
        found |= projection(name, torch.randn(width, width, generator=draw) / width**0.5)
    return found


def projection(name, x):
    return dict(zip((f"mtp.0.{name}.weight", f"mtp.0.{name}.scale"), to_fp8(x), strict=True))


def random(folder, edit=lambda tensors: None, **said):
    """A random model with its draft layer; `edit` changes its tensors, `said` its configuration."""
    made = model()
    pairs, rest = quantised(made, "original")
    tensors = {name: x for pair in pairs for name, x in pair} | rest | drawn(made.config)
    edit(tensors)
    config = made.config.to_dict() | {"expert_dtype": "fp4", "quantization_config": QUANTIZATION, "dtype": "bfloat16"}
    config |= {"architectures": ["DeepseekV4ForCausalLM"], "num_nextn_predict_layers": 1} | said
    return data.write(folder, {SHARD: tensors}, config, others=False)


def streams(made, ids):
    """The streams of a model before its head."""
    seen = []
    hook = made.model.hc_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        made(input_ids=ids)
    hook.remove()
    return seen[0]


def fitted(folder):
    """The trained model, and a draft layer of nothing but its two projections, which are fitted: the least squares of
    what the model's head gives its output layer one token later."""
    made, ids = trained_deepseek_v4(), held_out(256, "facts", 16)[8:]
    base = made.model
    with torch.no_grad():
        h = streams(made, ids)
        wanted = base.norm(base.hc_head(h))[:, 1:].flatten(0, 1)
        e = torch.nn.functional.rms_norm(base.embed_tokens(ids[:, 1:]), (256,), eps=1e-6)
        h = torch.nn.functional.rms_norm(h[:, :-1], (256,), eps=1e-6).sum(2)  # of all streams, which the head adds
        given = torch.cat([4 * e, h], -1).flatten(0, 1)
        found = torch.linalg.solve(given.T @ given + torch.eye(512), given.T @ wanted).T
    tensors = data.read_any(TRAINED) | drawn(made.config)
    for name, x in tensors.items():
        if name.startswith("mtp.0."):
            if re.search(r"norm\.weight$", name):
                tensors[name] = torch.ones_like(x)
            elif re.search(r"hc_(attn|ffn|head)_(fn|base)$", name):  # every stream is as good as another
                tensors[name] = torch.zeros_like(x)
            elif re.search(r"(wo_b|w2)\.weight$", name):  # what the block adds to them is nothing
                tensors[name] = torch.zeros_like(x.view(torch.uint8)).view(x.dtype)
    tensors |= projection("e_proj", found[:, :256]) | projection("h_proj", found[:, 256:])
    config = json.loads((TRAINED / "config.json").read_text())
    config |= {"compress_ratios": [*config["compress_ratios"], 0], "num_nextn_predict_layers": 1}
    return data.write(folder, {SHARD: tensors}, config, others=False)
