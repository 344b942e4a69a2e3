"""What the kernels of a mixture of experts share: the formats of weights."""

from __future__ import annotations

import sys
from typing import Any

from flagops.arrays import FLOATS, dtype_name

BLOCK, GROUP = 128, 32


def quantised(weights: Any) -> bool:
    """Whether weights are FP8 or FP4 rather than plain; kernels get the codes of both as bytes."""
    return dtype_name(weights) not in FLOATS


def refusal(x: Any, weights: Any, gate_up: Any, shared: Any) -> str | None:
    """Why FP8 and FP4 experts cannot take a call: their activations are FP8, which float64 and gradients do not fit."""
    if not quantised(gate_up):
        return None
    if dtype_name(x) == "float64":
        return "float64 hidden states with FP8 or FP4 experts"
    torch = sys.modules.get("torch")
    asked = any(getattr(y, "requires_grad", False) for y in (x, weights, shared) if y is not None)
    if torch is not None and asked and torch.is_grad_enabled():
        return "FP8 and FP4 experts have no backward; their activations are quantised"
    return None
