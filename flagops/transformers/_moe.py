"""The router, the experts and the shared expert of transformers' DeepSeek-V4."""

from __future__ import annotations

from typing import Any

import torch

from ._binding import NAME, binding_of
from ._fit import kept, mixed


def moe_block(module: Any, hidden_states: torch.Tensor, input_ids: Any = None) -> torch.Tensor:
    """Stands for DeepseekV4SparseMoeBlock.forward: a router that nobody watches is asked for no logits."""
    gate, router = module.gate, "DeepseekV4HashRouter" if module.is_hash else "DeepseekV4TopKRouter"
    if not binding_of(module).awake or kept(module, "gate", router) or not binding_of(gate).awake:
        return type(module).forward(module, hidden_states, input_ids)
    ids = (input_ids,) if module.is_hash else ()
    found = _route(gate, hidden_states, *ids)
    weights, indices = found or type(gate).forward(gate, hidden_states, *ids)[1:]
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    routed = module.experts(flat, indices, weights).view(hidden_states.shape)
    return routed + module.shared_experts(hidden_states)


def router(module: Any, hidden_states: torch.Tensor) -> Any:
    """Stands for DeepseekV4TopKRouter.forward: ``(logits, weights, indices)``."""
    return _logits(module, hidden_states)


def hash_router(module: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> Any:
    """Stands for DeepseekV4HashRouter.forward: ``(logits, weights, indices)``."""
    return _logits(module, hidden_states, input_ids)


def _logits(gate: Any, hidden_states: torch.Tensor, *ids: torch.Tensor) -> Any:
    found = _route(gate, hidden_states, *ids)
    if found is None:
        return type(gate).forward(gate, hidden_states, *ids)
    weights, indices = found
    logits = torch.nn.functional.linear(hidden_states.reshape(-1, gate.hidden_dim), gate.weight)
    return logits, weights.to(logits.dtype), indices


def _route(gate: Any, hidden_states: torch.Tensor, *ids: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights and experts of each token, by scores or, with the tokens' `ids`, by the table; None where transformers'
    own code must run."""
    if ids and ids[0] is None:
        raise ValueError(
            f"a {type(gate).__name__} looks the experts up by token ids, and input_ids is None; "
            "expected input_ids: inputs_embeds alone do not say which tokens they are"
        )
    handle = binding_of(gate).use("moe_gate")
    if handle is None:
        return None
    x = hidden_states.reshape(-1, gate.hidden_dim)
    bias, table, tokens = None, None, None
    if ids:
        table, tokens = gate.tid2eid, ids[0].reshape(-1)
    else:
        bias = gate.e_score_correction_bias
        if bias.dtype not in (x.dtype, torch.float32):
            bias = bias.to(x.dtype)
    reason = kept(gate, "score_fn", "sqrtsoftplus") or mixed(x, gate.weight)
    if reason:
        handle.leave("moe_gate", x, reason)
        return None
    result = handle.call("moe_gate", x, gate.weight, bias, table, tokens, gate.top_k, gate.routed_scaling_factor)
    return None if result is None else (result[0], result[1].long())


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function registered with transformers."""
    binding = binding_of(module)
    handle = binding.use("moe_experts")
    x = hidden_states
    if handle:
        reason = "experts lie on other devices as well" if module._is_expert_parallel else None
        reason = reason or kept(module, "act_fn", "silu") or mixed(x, module.gate_up_proj, module.down_proj)
        if reason:
            handle.leave("moe_experts", x, reason)
        else:
            weights = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
            result = handle.call(
                "moe_experts",
                x,
                weights,
                top_k_index.to(torch.int32),
                module.gate_up_proj,
                module.down_proj,
                None,
                None,
                module.limit,
            )
            if result is not None:
                return result
    from transformers.integrations.moe import ExpertsInterface

    own = type(module).forward.__wrapped__
    config = binding.config or module.config
    chosen = config._experts_implementation
    function = own if chosen in (None, NAME) else ExpertsInterface().get_interface(chosen, own)
    return function(module, x, top_k_index, top_k_weights.to(x.dtype))


def shared_expert(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4MLP.forward."""
    handle = binding_of(module).use("swiglu")
    reason = kept(module, "act_fn", "silu") if handle else None
    if handle and reason:
        handle.leave("swiglu", x, reason)
    if handle is None or reason:
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    unrecorded = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    fresh = unrecorded and not kept(module, "gate_proj", "Linear")
    result = handle.call("swiglu", gate, up, None, module.limit, out=gate if fresh else None)
    if result is None:
        gate, up = gate.clamp(max=module.limit), up.clamp(min=-module.limit, max=module.limit)
        result = module.act_fn(gate) * up
    return module.down_proj(result)
