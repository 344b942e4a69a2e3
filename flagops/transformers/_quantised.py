"""Layers on packed weights: those of `flagops.load`, and FP8Linear, FP8GroupedLinear and FP8Experts of transformers."""

from __future__ import annotations

from typing import Any

import torch

from flagops.packed.products import BLOCK, POWERS, Stacked, Weight, grouped, linear, routed, run

from ._binding import Wish, binding_of
from ._fit import FINEGRAINED, MODULES, rebound, unusable

LINEAR: frozenset[str] = frozenset({"fp8_matmul", "fp4_matmul"})
EXPERTS: frozenset[str] = LINEAR | {"moe_experts"}


def packed(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for PackedLinear.forward."""
    handle = _wish(module, module.weight)
    result: torch.Tensor = module.compute(x, handle.round if handle else run)
    return result


def packed_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stands for the forward of PackedExperts and StackedExperts."""
    handle = binding_of(module).use("moe_experts")
    call = handle.round if handle else run
    result: torch.Tensor = module.compute(hidden_states, top_k_index, top_k_weights, call)
    return result


def fp8_linear(module: Any, input: torch.Tensor) -> torch.Tensor:
    """Stands for FP8Linear.forward: quantised activations, with scales of the weight's kind."""
    handle = _wish(module, module.weight)
    reason = _unlike(module, module.weight, input) if handle else None
    if handle is None or reason:
        return _own(module, handle, reason, input)
    weight = Weight(module.weight, module.weight_scale_inv)
    return linear(input, weight, module.bias, _scales(module.weight_scale_inv), handle.round)


def fp8_grouped(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for FP8GroupedLinear.forward."""
    handle = _wish(module, module.weight)
    reason = _unlike(module, module.weight, x) if handle else None
    reason = reason or ("it has a bias" if module.bias is not None else None)
    if handle is None or reason:
        return _own(module, handle, reason, x)
    return grouped(x, Weight(module.weight, module.weight_scale_inv), handle.round)


def fp8_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stands for FP8Experts.forward."""
    handle = binding_of(module).use("moe_experts")
    inputs = hidden_states, top_k_index, top_k_weights
    reason = _strange(module, hidden_states) if handle else None
    if handle is None or reason:
        return _own(module, handle, reason, *inputs)
    stacked = module.gate_up_proj, module.down_proj, module.gate_up_proj_scale_inv, module.down_proj_scale_inv
    return routed(Stacked(stacked, module.limit, _scales(module.gate_up_proj_scale_inv)), *inputs, handle.round)


def operand(layer: Any, x: torch.Tensor, quantised: bool) -> tuple[Any, Any] | str:
    """A packed layer's FP8 codes and scales for an operator that takes them, or why it cannot.

    quantised: whether that operator quantises the layer's activations, by powers of two.
    """
    weight, scale = layer.weight, layer.weight_scale_inv
    if weight.dtype is not torch.float8_e4m3fn:
        return "a projection is FP4"
    scales = layer.scales if type(layer).__module__ == MODULES else _scales(scale)
    if quantised and scales != POWERS:
        how = "left as they are" if scales is None else "quantised by float32 scales"
        return f"activations are {how}: the two layers are multiplied one by one"
    if weight.device != x.device:
        return f"weights are on {weight.device}"
    return unusable(layer) or rebound(layer) or (weight, scale)


def is_packed(layer: Any) -> bool:
    """Whether a linear layer holds codes and scales."""
    return hasattr(layer, "weight_scale_inv") and type(layer).__module__ in (MODULES, FINEGRAINED)


def _wish(module: Any, weight: torch.Tensor) -> Wish | None:
    return binding_of(module).use("fp8_matmul" if weight.dtype is torch.float8_e4m3fn else "fp4_matmul")


def _own(module: Any, handle: Wish | None, reason: str | None, *inputs: Any) -> torch.Tensor:
    """What transformers computes, counted with the reason."""
    if handle and reason:
        handle.leave("moe_experts" if len(inputs) > 1 else "fp8_matmul", inputs[0], reason)
    result: torch.Tensor = type(module).forward(module, *inputs)
    return result


def _scales(scale: torch.Tensor) -> str:
    """The scales of activations are of the kind of those of weights, as transformers has them."""
    return "float32" if scale.dtype is torch.float32 else POWERS


def _unlike(module: Any, weight: torch.Tensor, x: torch.Tensor) -> str | None:
    """Why a quantised layer of transformers is not what packed products compute, or None."""
    if weight.dtype.itemsize > 1:
        return "its weight is not quantised"
    if module.activation_scheme != "dynamic":
        return f"its activations are scaled by a {module.activation_scheme} scheme"
    if weight.dtype is torch.float8_e4m3fn and tuple(module.block_size or ()) != (BLOCK, BLOCK):
        return f"its weight is scaled in blocks of {module.block_size}"
    if x.requires_grad and torch.is_grad_enabled():
        return "packed weights have no backward"
    return None


def _strange(module: Any, x: torch.Tensor) -> str | None:
    """Why experts of transformers are not those of `flagops.moe_experts`, or None."""
    weight = module.gate_up_proj if module.has_gate else None
    if weight is None or getattr(module, "gate_softcap", None) or getattr(module, "swiglu_alpha", None):
        return "its experts are not gated by silu"
    if type(module.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"its activation is {type(module.act_fn).__name__}"
    if getattr(module, "_is_expert_parallel", False):
        return "experts lie on other devices as well"
    half = weight.shape[1] // 2
    if weight.dtype is torch.float8_e4m3fn and half % BLOCK and _scales(module.gate_up_proj_scale_inv) != POWERS:
        return f"blocks of {BLOCK} do not divide the {half} rows of a gate"
    return _unlike(module, weight, x)
