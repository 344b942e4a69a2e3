"""DeepSeek-V4 models of Hugging Face transformers, small enough for a laptop: a trained one, random ones, and quantised
checkpoints.

What an untrained model leaves at zero or one (sinks, position and routing biases, norms, the hash table) is random too,
so that an error in any of them changes the logits.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
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


TRAINED = Path(__file__).parents[1] / "data" / "small_v4"
"""The checkpoint that comes with flagops: 4.8 million parameters, trained on bytes by `flagops train`, FP4 and FP8."""


def trained_deepseek_v4() -> Any:
    """The trained model, expanded to float32, in evaluation mode."""
    import torch
    import transformers

    from flagops import checkpoint

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="flagops-") as place:
        checkpoint.convert(TRAINED, Path(place) / "expanded")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(place) / "expanded", dtype=torch.float32).eval()


def held_out(length: int, kind: str = "text", rows: int = 1) -> Any:
    """Beginnings of documents that the trained model has not seen, ``[rows, length]``, of a kind of `flagops.train`."""
    import torch

    from flagops.train.corpus import Corpus, shipped

    return torch.from_numpy(Corpus(shipped()).batch(0, 0, rows, length, (kind,), held=True)[0])


def read(tokens: Any) -> str:
    """Tokens of the trained model as text."""
    return bytes(x for x in tokens if x < 256).decode(errors="replace")


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


_FP8 = re.compile(r"(self_attn\.(q_a|q_b|kv|o_a|o_b)_proj|indexer\.q_b_proj|shared_experts\.\w+_proj)\.weight$")
_F32 = re.compile(r"_hc\.|hc_head|sinks|position_bias|correction_bias")


def packed_deepseek_v4(folder: Path, seed: int = 0, **sizes: Any) -> int:
    """Write a checkpoint of random codes: FP4 experts, projections in FP8 blocks, e8m0 scales; returns its bytes.

    No wide weight is made and one layer is in memory at a time, so that it may have the proportions of a real one.
    Widths are multiples of 128.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    small = {
        "vocab_size": 64, "hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_lora_rank": 128,
        "o_groups": 2, "n_routed_experts": 16, "num_experts_per_tok": 4, "index_n_heads": 16, "index_head_dim": 128,
        "index_topk": 2, "sliding_window": 4, "max_position_embeddings": 1024, "compress_ratios": [0, 4, 128],
        "compress_rate_hca": 8, "num_hash_layers": 1, "architectures": ["DeepseekV4ForCausalLM"],
    }  # fmt: skip
    config = DeepseekV4Config(**(small | sizes))
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in blank:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    folder.mkdir(parents=True)
    random, places, total = torch.Generator().manual_seed(seed), dict[str, str](), 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(
            made for name in names for made in _drawn(name, blank[name].shape, config.n_routed_experts, random)
        )
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }  # fmt: skip
    said = config.to_dict() | {"expert_dtype": "fp4", "quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(said))
    return total


def _drawn(name: str, shape: Any, experts: int, random: Any) -> Iterator[tuple[str, Any]]:
    """The stored tensors of a parameter or buffer; what is a matrix keeps the size of what it multiplies."""
    import torch

    def power(size: float, *shape: int) -> Any:
        code = 127 + round(size) + torch.randint(-1, 2, shape, generator=random)
        return code.to(torch.uint8).view(torch.float8_e8m0fnu)

    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        _, rows, columns = shape
        halves = ("w2",) if name.endswith("down_proj") else ("w1", "w3")
        for stem in (f"{name.rpartition('.')[0]}.{i}.{half}.weight" for i in range(experts) for half in halves):
            part = rows // len(halves)
            codes = torch.randint(0, 256, (part, columns // 2), generator=random, dtype=torch.uint8)
            yield stem, codes.view(torch.int8)
            yield f"{stem}_scale_inv", power(-1.3 - columns.bit_length() / 2, part, columns // 32)
    elif _FP8.search(name):
        rows, columns = shape
        yield name, torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
        yield f"{name}_scale_inv", power(0.5 - columns.bit_length() / 2, -(-rows // 128), -(-columns // 128))
    elif name.endswith("tid2eid"):
        table = torch.rand(shape[0], experts, generator=random).argsort(-1)[:, : shape[1]]
        yield name, table.contiguous()
    else:
        made = torch.randn(shape, generator=random)
        made = made.abs() + 0.5 if "norm" in name else made / shape[-1] ** 0.5 if len(shape) > 1 else made
        yield name, made if _F32.search(name) else made.bfloat16()
