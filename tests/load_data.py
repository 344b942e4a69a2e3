"""Small quantised checkpoints of several models, and how a loaded model is held to the references."""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data
from test_checkpoint_transformers import QUANTIZATION, source, under_float_scales

from flagops import testing
from flagops.deepseek_v4.examples import packed_deepseek_v4
from flagops.transformers._handle import Handle

__all__ = ["data", "floating", "generated", "held", "logits", "quantised_by_transformers", "source"]

_SHAPE = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.1, "attn_implementation": "eager",
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
MODELS = {
    "v3": lambda: transformers.DeepseekV3Config(
        **_SHAPE, **_EXPERTS, q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=64, qk_nope_head_dim=64,
        v_head_dim=64, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, tie_word_embeddings=False,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=64, tie_word_embeddings=True),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_SHAPE, **_EXPERTS, head_dim=64, num_experts=4, tie_word_embeddings=False
    ),
}  # fmt: skip


def logits(model, count=40):
    ids = torch.randint(2, 64, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def floating(folder, name):
    """A checkpoint in FP8 with float32 scales of 128 x 128 blocks, as V3, R1 and Qwen3 have."""
    config = MODELS[name]()
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    made.save_pretrained(folder / "plain")
    pairs, rest = under_float_scales(data.read_any(folder / "plain"))
    said = config.to_dict() | {"architectures": [type(made).__name__], "dtype": "bfloat16"}
    said["quantization_config"] = {key: value for key, value in QUANTIZATION.items() if key != "scale_fmt"}
    return data.write(folder / "src", data.spread(pairs, rest, 3, 0), said, others=False)


class held:
    """Within it, each operator on packed weights is held to its reference on the very arguments that a model gives.

    calls: how many of each there were.
    """

    def __init__(self, monkeypatch):
        self.calls = {}
        for name in ("round", "call"):
            monkeypatch.setattr(Handle, name, self._wrapped(getattr(Handle, name)))

    def _wrapped(self, method):
        def call(handle, op, *args, **kwargs):
            result = method(handle, op, *args, **kwargs)
            watched = ("fp8_matmul", "fp4_matmul", "fp8_quantize", "moe_experts", "grouped_output_projection")
            if op in watched and result is not None:
                self.calls[op] = self.calls.get(op, 0) + 1
                testing.assert_of(op, result, *args)
            return result

        return call


def quantised_by_transformers(path, state):
    """The model of a checkpoint on transformers' own quantised modules, which it makes where there is a GPU."""
    from transformers.quantizers.auto import AutoHfQuantizer

    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        blank = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(blank)
    blank.load_state_dict(state, assign=True)
    for module in blank.modules():
        if any(x is not None and x.is_meta for x in module._buffers.values()):
            module._buffers.update(type(module)(module.config)._buffers)
    return blank.eval()


def generated(folder, **sizes):
    """A checkpoint most of which is FP4 experts, and the bytes of its tensors."""
    return folder, packed_deepseek_v4(folder, **sizes)
