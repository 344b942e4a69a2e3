"""A float32 model as a checkpoint of DeepSeek-V4 holds it: packed FP4 experts, FP8 blocks, e8m0 scales, BF16."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import flagops

FP8_BLOCK, FP4_BLOCK = 128, 32
_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_FP8 = re.compile(
    r"\.self_attn\.(q_a|q_b|kv|o_a|o_b)_proj\.weight$|\.indexer\.q_b_proj\.weight$|\.shared_experts\.\w+_proj\.weight$"
)
_F32 = re.compile(r"(_hc\.(fn|base|scale)|hc_head\.hc_\w+|\.sinks|\.position_bias|\.e_score_correction_bias)$")


def form(name: str) -> str:
    """In which format a parameter of transformers' model lies in the checkpoint: fp4, fp8, f32 or bf16."""
    return next((f for f, rule in (("fp4", _EXPERTS), ("fp8", _FP8), ("f32", _F32)) if rule.search(name)), "bf16")


def blocks(weight: Tensor) -> Tensor:
    """``[n, k]`` as ``[n / 128, k / 128, 128 * 128]``: a row for each block that shares a scale."""
    n, k = weight.shape
    cut = weight.view(n // FP8_BLOCK, FP8_BLOCK, k // FP8_BLOCK, FP8_BLOCK).transpose(1, 2)
    return cut.reshape(n // FP8_BLOCK, k // FP8_BLOCK, FP8_BLOCK**2)


def unblocked(rows: Tensor) -> Tensor:
    """The inverse of `blocks`."""
    n, k, _ = rows.shape
    cut = rows.view(n, k, FP8_BLOCK, FP8_BLOCK).transpose(1, 2)
    return cut.reshape(n * FP8_BLOCK, k * FP8_BLOCK)


def narrowed(name: str, weight: Tensor) -> Tensor:
    """The values that the checkpoint holds for a parameter, in float32."""
    match form(name):
        case "fp4":
            return flagops.fp4_fake_quantize(weight, FP4_BLOCK)
        case "fp8":
            return unblocked(flagops.fp8_fake_quantize(blocks(weight), FP8_BLOCK**2))
        case "bf16":
            return weight.bfloat16().float()
    return weight


@contextmanager
def straight_through(model: Any) -> Iterator[None]:
    """Inside, parameters have the values of the checkpoint, and gradients are those there; after it their own again."""
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(narrowed(name, p))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(own[name])
