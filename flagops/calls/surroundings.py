"""What is active around a call, and what a tensor has no memory for: why a call may be no plain computation of its own.

Types of tensors do not say it: a dispatch mode, a transform of `torch.func`, a tracer or a level of forward
differentiation changes what a call on plain tensors means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
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


def overseen() -> bool:
    """Whether a call above torch's dispatcher must go through it: `watched`, a tangent, or a torch function mode."""
    return probes()[0]()


def recording() -> bool:
    """Whether autograd records what is computed from tensors that require a gradient."""
    return probes()[1]()


@cache
def probes() -> tuple[Callable[[], bool], Callable[[], bool]]:
    """`overseen` and `recording` as every call asks for them: with nothing left to look up.

    `torch.device` as a context is a function mode that many programs have; kernels must not allocate under it.
    """
    torch = sys.modules["torch"]
    functions, modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
    transform, tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
    forward_ad = torch.autograd.forward_ad

    def overseen() -> bool:
        return bool(
            functions() or modes() or forward_ad._current_level >= 0 or transform() is not None or tracing() is not None
        )

    return overseen, torch._C.is_grad_enabled


def casting() -> Callable[[], bool]:
    """What tells whether `torch.autocast` is in force."""
    torch = sys.modules.get("torch")
    return torch._C._is_any_autocast_enabled if torch is not None else _never


def _never() -> bool:
    return False


def uncast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of torch's operators as it runs under `torch.autocast` too: what is computed in which dtype says the
    card, and autocast would have the products inside of it in bfloat16."""
    inside, active = sys.modules["torch"]._C, casting()

    @wraps(function)
    def call(*args: Any) -> Any:
        if not active():
            return function(*args)
        with inside._DisableAutocast():
            return function(*args)

    return call


def tangent(x: Any) -> Any:
    """The tangent that a tensor carries at the innermost level of forward-mode differentiation, or None."""
    return sys.modules["torch"].autograd.forward_ad.unpack_dual(x).tangent


def is_wrapper(x: Any) -> bool:
    """A torch tensor whose type gives its elements another meaning than those in its memory have.

    FakeTensor and DTensor, one on the meta device, or a class with a ``__torch_function__`` of its own.
    """
    torch, kind = sys.modules["torch"], type(x)
    if x.device.type == "meta":
        return True
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return False
    known = torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl
    function = kind.__torch_function__
    return (
        kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        or getattr(function, "__func__", function) not in known
    )


ELSEWHERE = "a tensor without memory of its own"
ESCAPED = "a tensor that left the torch.vmap it belongs to"


def allocated(x: Any) -> bool:
    """Whether a tensor's elements lie in its storage; a device of somebody else's may keep them where it likes."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and x.device.type in ("cpu", "cuda")


def without_memory(x: Any) -> str | None:
    """Why a torch tensor has not all elements to read or write, or None: kernels would follow a wild pointer."""
    if not allocated(x):
        return None
    try:
        storage = x.untyped_storage()
        held, address = storage.nbytes(), storage.data_ptr()
    except (RuntimeError, NotImplementedError):  # batched, or wrapped for differentiation by torch.func
        functorch = sys.modules["torch"]._C._functorch
        escaped = functorch.is_batchedtensor(x) and functorch.peek_interpreter_stack() is None
        return ESCAPED if escaped else ELSEWHERE
    if address and held >= (x.storage_offset() + x.numel()) * x.element_size() and x.is_contiguous():
        return None
    if not x.numel():
        return None
    end = sum([(size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)]) + 1
    if (x.storage_offset() + end) * x.element_size() > held:
        return "a tensor whose storage was made smaller than it" if held else "a tensor whose storage was freed"
    return None if address else ELSEWHERE  # a zero tensor, or one that torch functionalizes


def unwritable(x: Any) -> str | None:
    """Why a torch tensor cannot be written to as the result of a call, or None."""
    if x.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
        return "an inference tensor, which can be written to in inference mode alone"
    return without_memory(x)


@contextmanager
def unseen() -> Iterator[None]:
    """Look at tensors without that a function mode, a subclass or the tracer of torch.jit takes it for the program."""
    core = sys.modules["torch"]._C
    state = core._get_tracing_state()
    core._set_tracing_state(None)
    try:
        with core.DisableTorchFunction():
            yield
    finally:
        core._set_tracing_state(state)
