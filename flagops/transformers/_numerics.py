"""Rotation, and what DeepSeek's inference code rounds: the official numerics, whichever operators are replaced."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import torch

from ._binding import Binding, binding_of
from ._fit import MODELING


def rotate(
    binding: Binding, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False, fresh: bool = False
) -> torch.Tensor:
    """The rotary embedding of x ``[b, s, h, d]``; in place where nobody else has seen it."""
    handle = binding.use("rotary_embedding")
    if handle:
        real = torch.promote_types(x.dtype, torch.float32)
        out = x if fresh and x.is_contiguous() else None
        result = handle.call("rotary_embedding", x, cos.to(real), sin.to(real), inverse, out=out)
        if result is not None:
            return result
    return sys.modules[MODELING].apply_rotary_pos_emb(x, cos, -sin if inverse else sin, unsqueeze_dim=2)


def stored(binding: Binding, x: torch.Tensor, rotated: int) -> torch.Tensor:
    """Keys and entries as the inference code stores them: the channels before those that are `rotated` go through FP8.
    A gradient passes straight through."""
    handle, channels = binding.official, x.shape[-1] - rotated
    if handle is None or not channels:
        return x
    result = handle.round("fp8_fake_quantize", x.detach()[..., :channels], math.gcd(channels, 64), True)
    rounded: torch.Tensor = _Straight.apply(  # type: ignore[no-untyped-call]
        x, torch.cat([result, x.detach()[..., channels:]], -1)
    )
    return rounded


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def turned(binding: Binding, x: torch.Tensor) -> torch.Tensor:
    """The indexer's queries and keys as the inference code compares them: after a Hadamard transform, in FP4."""
    handle = binding.official
    if handle is None:
        return x
    return handle.round("fp4_fake_quantize", handle.round("hadamard", x, None), math.gcd(x.shape[-1], 32))


def scorer(module: Any, q: torch.Tensor, compressed_kv: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4IndexerScorer.forward: the official numerics turn the queries, and round the weights of
    heads to the dtype of the activations."""
    binding = binding_of(module)
    if not binding.official:
        return type(module).forward(module, q, compressed_kv, hidden_states)
    q, keys = turned(binding, q), compressed_kv.mT.unsqueeze(1)
    real = torch.promote_types(q.dtype, torch.float32)
    weights = module.weights_proj(hidden_states) * (module.softmax_scale * module.weights_scaling)
    return (torch.matmul(q.to(real), keys.to(real)).relu() * weights.to(real).unsqueeze(-1)).sum(2)


class _Rounding:
    """A cache's layer as transformers' own compressor shall see it: entries are rounded on their way in."""

    def __init__(self, layer: Any, binding: Binding, rotated: int) -> None:
        self.layer, self.binding, self.rotated = layer, binding, rotated

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        if compressed.shape[1]:
            indexed = name == "indexer"
            compressed = turned(self.binding, compressed) if indexed else stored(self.binding, compressed, self.rotated)
        return self.layer.update_compressor_states(name, compressed)


class _Layers(SimpleNamespace):
    """Of a cache what a compressor reads."""


def rounding(module: Any, binding: Binding, cache: Any, layer_idx: int) -> Any:
    """The cache that transformers' own compressor is given: in the official numerics one that rounds its entries."""
    if not binding.official or isinstance(cache, _Layers):
        return cache
    modeling, config = sys.modules[MODELING], module.rotary_emb.config
    if cache is None:  # one forward's worth of state, in which the compressor starts from nothing as without a cache
        overlapping = module.position_bias.shape[1] > module.head_dim
        layer = (modeling.DeepseekV4CSACache if overlapping else modeling.DeepseekV4HCACache)(config)
    else:
        layer = cache.layers[layer_idx]
    return _Layers(layers={layer_idx: _Rounding(layer, binding, config.qk_rope_head_dim)})


def unwrapped(layer: Any) -> Any:
    """A cache's layer behind what `rounding` made of it."""
    return layer.layer if isinstance(layer, _Rounding) else layer
