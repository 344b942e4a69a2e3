"""What DeepSeek-V4 on a CPU was promised, against transformers' eager code in the same run: `flagops bench --targets`.

Attention layers have V4-Flash's dimensions, random float32 weights, and run in a process of their own each, so that
peak memory is theirs alone; both sides are called through transformers' own attention module and mask function.

``python benchmarks/targets_v4.py MEASURE patched|eager`` is such a process; it prints JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import flagops
from flagops import registry
from flagops.deepseek_v4.examples import random_deepseek_v4
from flagops.tools import companions, measure, results
from flagops.tools.measure import Call, Settings

promise = companions.load("promise")
Result, ratio_of = promise.Result, promise.ratio

V4_FLASH = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "vocab_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 1,
    "num_hash_layers": 0,
    "compress_ratios": [4],
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 0,
}
SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 64,
    "sliding_window": 128,
    "vocab_size": 1024,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4],
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 65536,
}
CONTEXT = 32768


def csa_layer(settings: Settings) -> Iterator[Any]:
    ours, theirs = _process("prefill", "patched", 4096), _process("prefill", "eager", 4096)
    detail = f"{results.seconds(ours['seconds'])} against {results.seconds(theirs['seconds'])}, "
    detail += f"{ours['extra'] / 1e9:.2f} against {theirs['extra'] / 1e9:.2f} GB above the weights"
    worst = _difference(ours, theirs)
    ratio = theirs["seconds"] / ours["seconds"]
    yield Result("CSA layer, V4-Flash, 4096 tokens, f32, to transformers eager", ratio, 5.0, detail=detail + worst)
    yield Result("the same, memory above the weights", ours["extra"] / 1e9, 1.5, most=True, unit="GB")
    long = _process("prefill", "patched", 16384)
    detail = f"{results.seconds(long['seconds'])}, {long['extra'] / 1e9:.2f} GB above the weights"
    yield Result("CSA layer at 16384 tokens completes", float(long["finite"]), 1.0, unit="", detail=detail)


def csa_decode(settings: Settings) -> Iterator[Any]:
    ours, theirs = _process("decode", "patched", CONTEXT), _process("decode", "eager", CONTEXT)
    ratio = theirs["seconds"] / ours["seconds"]
    detail = (
        f"{results.seconds(ours['seconds'])} against {results.seconds(theirs['seconds'])}{_difference(ours, theirs)}"
    )
    yield Result("CSA layer, one token after 32768, to transformers eager", ratio, 20.0, detail=detail)


def sinkhorn(settings: Settings) -> Iterator[Any]:
    """The mixing weights of 4096 tokens from 24 numbers each, to the steps of transformers' hyper-connection."""
    mix, scale, base = torch.randn(4096, 24), torch.randn(3), torch.randn(24)
    outs = tuple(torch.empty(shape) for shape in ((4096, 4), (4096, 4), (4096, 4, 4)))
    calls: dict[str, Call] = {
        "ours": lambda out: flagops.hc_split_sinkhorn(mix, scale, base, out=out),
        "eager": lambda out: _eager_sinkhorn(mix, scale, base),
    }
    flagops.hc_split_sinkhorn(mix, scale, base, out=outs)
    for got, expected in zip(outs, _eager_sinkhorn(mix, scale, base), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    times = measure.alternate(calls, [()], outs, settings)
    ratio, detail = ratio_of(times, "ours", "eager")
    yield Result("hc_split_sinkhorn, 4096 tokens, to transformers' eager steps", ratio, 20.0, detail=detail)


def fp4_token(settings: Settings) -> Iterator[Any]:
    """The product of one token with packed weights, against torch's with the weights expanded to bfloat16."""
    op = registry.operator("fp4_matmul")
    for workload in (n for n in op.workloads if n.startswith("v4-flash.") and n.endswith(".1")):
        trial = measure.prepare(op, workload, settings.device)
        backends = measure.candidates(op, measure.usable(settings.device))
        rows = measure.compare(trial, backends, companions.baselines(op), settings)
        found = max((row for row in rows if not row.baseline and row.ratio), key=lambda row: row.ratio)
        yield Result(f"fp4_matmul {workload} to torch bf16 on expanded weights", found.ratio, 1.5, detail=found.name)


def generate(settings: Settings) -> Iterator[Any]:
    for tokens in (256, 2048):
        ours, theirs = _process("generate", "patched", tokens), _process("generate", "eager", tokens)
        ratio = theirs["seconds"] / ours["seconds"]
        same = "same tokens" if ours["tokens"] == theirs["tokens"] else "tokens differ"
        detail = f"{ours['rate']:.1f} against {theirs['rate']:.1f} tokens/s, {same}"
        yield Result(f"generate of a small V4, {tokens}-token prompt, to transformers eager", ratio, 2.0, detail=detail)


TARGETS = (csa_layer, csa_decode, sinkhorn, fp4_token, generate)


def _process(name: str, side: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, name, side, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    worst = max(abs(x - y) for x, y in zip(ours["sample"], theirs["sample"], strict=True))
    largest = max(abs(x) for x in theirs["sample"])
    return f", results differ by {worst:.1e} of {largest:.1e}"


def _eager_sinkhorn(mix: torch.Tensor, scale: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operations of transformers' hyper-connection between projection and collapse, one torch call each."""
    eps, n = 1e-6, 4
    pre_w, post_w, comb_w = mix.split([n, n, n * n], dim=-1)
    pre_b, post_b, comb_b = base.split([n, n, n * n])
    comb = torch.softmax(comb_w.view(-1, n, n) * scale[2] + comb_b.view(n, n), dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(19):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return torch.sigmoid(pre_w * scale[0] + pre_b) + eps, 2 * torch.sigmoid(post_w * scale[1] + post_b), comb


def _attend(model: Any, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
    """One attention layer as the model calls it, its mask included."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    inner = model.model
    past = cache.get_seq_length() if cache is not None else 0
    positions = torch.arange(hidden.shape[1])[None] + past
    mask = create_sliding_window_causal_mask(
        config=inner.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=cache,
        position_ids=positions,
    )
    tables = {kind: inner.rotary_emb(hidden, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
    return inner.layers[0].self_attn(
        hidden, position_embeddings=tables, position_ids=positions, attention_mask=mask, past_key_values=cache
    )[0]


def _prefill(model: Any, tokens: int) -> dict[str, Any]:
    torch.manual_seed(1)
    if tokens <= 4096:  # compiled kernels and thread pools are there before the clock starts
        _attend(model, torch.randn(1, 640, 4096), None)
    hidden = torch.randn(1, tokens, 4096)
    seconds, results = [], []

    def call() -> None:
        start = time.perf_counter()
        results.append(_attend(model, hidden, None))
        seconds.append(time.perf_counter() - start)

    extra = measure.extra_memory(call)
    for _ in range(tokens <= 4096):
        results.clear()
        call()
    return {
        "seconds": min(seconds),
        "extra": extra,
        "finite": bool(results[-1].isfinite().all()),
        **_sample(results[-1]),
    }


def _decode(model: Any, tokens: int) -> dict[str, Any]:
    """One token after a long context, whose cache is filled with random keys: a prefill of it would not fit eager."""
    from transformers import DynamicCache

    torch.manual_seed(1)
    cache = DynamicCache(config=model.config)
    _attend(model, torch.randn(1, 128, 4096), cache)
    kept = cache.layers[0]
    kept.cumulative_length = tokens
    for name in ("compressor", "indexer"):
        width = kept.compressed_kv[name].shape[-1]
        kept.compressed_kv[name] = torch.randn(1, tokens // 4, width)
        kept.entry_count[name] = tokens // 4
    seconds, results = [], []
    for _ in range(9):
        hidden = torch.randn(1, 1, 4096)
        start = time.perf_counter()
        results.append(_attend(model, hidden, cache))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), **_sample(torch.cat(results, 1))}


def _generate(model: Any, tokens: int) -> dict[str, Any]:
    torch.manual_seed(1)
    prompt = torch.randint(2, 1024, (1, tokens))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=8, **options)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = model.generate(prompt, max_new_tokens=128, **options)
        seconds.append(time.perf_counter() - start)
    fastest = min(seconds)
    return {"seconds": fastest, "rate": 128 / fastest, "tokens": result[0].tolist()}


def _sample(result: torch.Tensor) -> dict[str, Any]:
    flat = result.flatten()
    return {"sample": flat[:: max(1, len(flat) // 1000)].tolist()}


MEASURES = {"prefill": (_prefill, V4_FLASH), "decode": (_decode, V4_FLASH), "generate": (_generate, SMALL)}


def main(name: str, side: str, tokens: str) -> None:
    function, sizes = MEASURES[name]
    model = random_deepseek_v4(0, **sizes)
    with torch.no_grad():
        if side == "patched":
            with flagops.patch(model):
                found = function(model, int(tokens))
        else:
            found = function(model, int(tokens))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
