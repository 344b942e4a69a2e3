"""What is active around a call, and what a tensor has no memory for: why a call may be no plain computation of its own.

Types of tensors do not say it: a dispatch mode, a transform of `torch.func`, a tracer or a level of forward
differentiation changes what a call on plain tensors means.
"""

from __future__ import annotations

import sys
from typing import Any


def watched() -> str | None:
    """Why torch's dispatcher must see a call: something records, fakes or transforms it. None if nothing does."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch._C._len_torch_dispatch_stack():
        mode = torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1)
        return f"the dispatch mode {type(mode).__name__} is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if torch._C._get_tracing_state():
        return "torch.jit is tracing"
    return None


def forward_level() -> bool:
    """Whether a level of forward-mode differentiation is open, so that a tensor may carry a tangent."""
    forward_ad = sys.modules.get("torch.autograd.forward_ad")
    return forward_ad is not None and forward_ad._current_level >= 0


def without_memory(x: Any) -> str | None:
    """Why a torch tensor has no elements to read or write, or None: its kernels would follow a null pointer."""
    if not x.numel() or x.data_ptr() != x.storage_offset() * x.element_size():
        return None  # the address of freed or missing memory is 0, plus the tensor's offset
    return "a zero tensor without memory" if x._is_zerotensor() else "a tensor whose storage was freed"
