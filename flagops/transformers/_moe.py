"""The router, the experts and the shared expert of transformers' DeepSeek-V4."""

from __future__ import annotations

from typing import Any

import torch

from ._binding import NAME, Binding, hooked, mixed


def moe_block(module: Any, hidden_states: torch.Tensor, input_ids: Any = None) -> torch.Tensor:
    """Stands for DeepseekV4SparseMoeBlock.forward: a router that nobody watches is asked for no logits."""
    gate = module.gate
    if "_flagops" not in gate.__dict__ or hooked(gate) or "_hf_hook" in gate.__dict__:
        return type(module).forward(module, hidden_states, input_ids)
    ids = (input_ids,) if module.is_hash else ()
    found = _route(gate, hidden_states, *ids)
    weights, indices = found or type(gate).forward(gate, hidden_states, *ids)[1:]
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    routed = module.experts(flat, indices, weights).view(hidden_states.shape)
    return routed + module.shared_experts(hidden_states)


def router(module: Any, hidden_states: torch.Tensor, input_ids: Any = None) -> Any:
    """Stands for the forward of DeepseekV4TopKRouter and DeepseekV4HashRouter: ``(logits, weights, indices)``."""
    found = _route(module, hidden_states, input_ids)
    if found is None:
        return type(module).forward(module, hidden_states, *(() if input_ids is None else (input_ids,)))
    weights, indices = found
    logits = torch.nn.functional.linear(hidden_states.reshape(-1, module.hidden_dim), module.weight)
    return logits, weights.to(logits.dtype), indices


def _route(gate: Any, hidden_states: torch.Tensor, input_ids: Any = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    handle = gate._flagops.use("moe_gate")
    if handle is None:
        return None
    x = hidden_states.reshape(-1, gate.hidden_dim)
    bias, table, tokens = None, None, None
    if input_ids is None:
        bias = gate.e_score_correction_bias
        reason = mixed(x, gate.weight)
        if bias.dtype not in (x.dtype, torch.float32):
            bias = bias.to(x.dtype)
    else:
        table, tokens = gate.tid2eid, input_ids.reshape(-1)
        reason = mixed(x, gate.weight)
    if reason:
        handle.leave("moe_gate", x, reason)
        return None
    result = handle.call("moe_gate", x, gate.weight, bias, table, tokens, gate.top_k, gate.routed_scaling_factor)
    return None if result is None else (result[0], result[1].long())


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function registered with transformers."""
    binding: Binding | None = module.__dict__.get("_flagops")
    handle = binding.use("moe_experts") if binding else None
    x = hidden_states
    if handle:
        reason = "experts lie on other devices as well" if module._is_expert_parallel else None
        reason = reason or mixed(x, module.gate_up_proj, module.down_proj)
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
    config = binding.config if binding else module.config
    chosen = config._experts_implementation
    function = own if chosen in (None, NAME) else ExpertsInterface().get_interface(chosen, own)
    return function(module, x, top_k_index, top_k_weights.to(x.dtype))


def shared_expert(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for DeepseekV4MLP.forward."""
    handle = module._flagops.use("swiglu")
    if handle is None:
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    fresh = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or hooked(module.gate_proj))
    result = handle.call("swiglu", gate, up, None, module.limit, out=gate if fresh else None)
    if result is None:
        gate, up = gate.clamp(max=module.limit), up.clamp(min=-module.limit, max=module.limit)
        result = module.act_fn(gate) * up
    return module.down_proj(result)
