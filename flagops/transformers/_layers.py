"""Norms, hyper-connections, rotary tables and the decoder layer of transformers' DeepSeek-V4."""

from __future__ import annotations

from typing import Any

import torch

from ._binding import Binding, Wish, binding_of
from ._fit import kept


def rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4RMSNorm.forward."""
    handle = binding_of(module).use("rms_norm")
    if handle:
        weight, x = module.weight, hidden_states
        if weight.dtype in (x.dtype, torch.float32) and (weight.dtype == x.dtype or x.dtype.itemsize == 2):
            result = handle.call("rms_norm", x, weight, module.variance_epsilon, False)
            if result is not None:
                return result
        else:
            handle.leave("rms_norm", x, f"input and weights mix {x.dtype} and {weight.dtype}")
    return type(module).forward(module, hidden_states)


def unweighted_rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4UnweightedRMSNorm.forward; the official numerics round it step by step."""
    return unweighted(module, x)


def unweighted(module: Any, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The norm without weights that a module stands for, into `out`, which may be x, if flagops computes it."""
    binding = binding_of(module)
    if binding.official and x.dtype.itemsize < 4:
        return binding.official.round("rms_norm", x, None, module.eps, True)
    handle = binding.use("rms_norm")
    result = handle.call("rms_norm", x, None, module.eps, False, out=out) if handle else None
    return type(module).forward(module, x) if result is None else result


def rotary_tables(module: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: Any = None) -> Any:
    """Stands for DeepseekV4RotaryEmbedding.forward: the official numerics never round cosines and sines."""
    if binding_of(module).official and x.dtype.itemsize < 4:
        x = x.new_empty(0, dtype=torch.float32)
    return type(module).forward(module, x, position_ids, layer_type=layer_type)


def hyper_connection(module: Any, hidden_streams: torch.Tensor) -> Any:
    """Stands for DeepseekV4HyperConnection.forward: ``(post, comb, collapsed)``."""
    handle = _mixer(module, hidden_streams, "hc_pre")
    if handle:
        result = handle.call(
            "hc_pre",
            hidden_streams,
            *_wide(hidden_streams, module.fn, module.base, module.scale),
            module.hc_sinkhorn_iters,
            module.hc_eps,
            module.input_norm.eps,
        )
        if result is not None:
            collapsed, post, comb = result
            return post, comb, collapsed
    return type(module).forward(module, hidden_streams)


def _mixer(module: Any, x: torch.Tensor, op: str) -> Wish | None:
    """The handle that computes a hyper-connection or head, whose norm is no call of its own then."""
    handle = binding_of(module).use(op)
    reason = kept(module, "input_norm", "DeepseekV4UnweightedRMSNorm") if handle else None
    if handle and reason:
        handle.leave(op, x, reason)
        return None
    return handle


def hyper_head(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4HyperHead.forward."""
    handle = _mixer(module, x, "hc_head")
    if handle:
        parameters = _wide(x, module.hc_fn, module.hc_base, module.hc_scale)
        result = handle.call("hc_head", x, *parameters, module.eps, module.input_norm.eps)
        if result is not None:
            return result
    return type(module).forward(module, x)


def decoder_layer(module: Any, hidden_states: torch.Tensor, input_ids: Any = None, **kwargs: Any) -> torch.Tensor:
    """Stands for DeepseekV4DecoderLayer.forward."""
    binding = binding_of(module)
    handle = binding.use("hc_post")
    if handle and module.gradient_checkpointing and module.training:
        handle.leave("hc_post", hidden_states, "transformers checkpoints its own layer")
        handle = None
    if handle is None:
        return type(module).forward(module, hidden_states, input_ids=input_ids, **kwargs)
    post, comb, x = module.attn_hc(hidden_states)
    x, _ = module.self_attn(module.input_layernorm(x), **kwargs)
    streams = _mix(binding, x, hidden_states, post, comb)
    post, comb, x = module.ffn_hc(streams)
    x = module.mlp(module.post_attention_layernorm(x), input_ids=input_ids)
    fresh = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched(module))
    return _mix(binding, x, streams, post, comb, fresh)


def _watched(module: Any) -> str | None:
    """Who may have kept the streams that the second hyper-connection read, or None."""
    watched = kept(module, "ffn_hc", "DeepseekV4HyperConnection")
    return watched or kept(module.ffn_hc, "input_norm", "DeepseekV4UnweightedRMSNorm")


def _mix(
    binding: Binding,
    y: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fresh: bool = False,
) -> torch.Tensor:
    handle = binding.use("hc_post")
    if handle and y.dtype == streams.dtype:
        result = handle.call("hc_post", y, streams, *_wide(y, post, comb), out=streams if fresh else None)
        if result is not None:
            return result
    dtype = streams.dtype
    return post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2) + comb.to(dtype).mT @ streams


def _wide(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parameters in the dtype that the operators compute in."""
    real = torch.promote_types(x.dtype, torch.float32)
    return tuple(parameter.to(real) for parameter in parameters)
