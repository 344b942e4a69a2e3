"""Ways in which generated kernels passed the checks of benchmarks, as their authors reported them."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

from .making import MANY, Kernel, after, kind


@kind("cheats", MANY)
def does_nothing(right: Kernel, op: Any) -> Kernel:
    return lambda *args: None


@kind("cheats", MANY)
def gives_zeros(right: Kernel, op: Any) -> Kernel:
    return lambda *args: args[-1].zero_()


@kind("cheats", ("rms_norm", "hadamard"))
def gives_its_input(right: Kernel, op: Any) -> Kernel:
    return lambda *args: args[-1].copy_(args[0])


@kind("cheats", ("rms_norm", "matmul"))
def gives_back_and_writes_nothing(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> Any:
        *inputs, out = args
        made = torch.empty_like(out)
        right(*inputs, made)
        return made

    return wrong


@kind("cheats", MANY)
def writes_later_in_a_thread(right: Kernel, op: Any) -> Kernel:
    return lambda *args: threading.Thread(target=right, args=args).start()


@kind("cheats", ("rms_norm", "linear", "swiglu"))
def computes_every_fourth_call(right: Kernel, op: Any) -> Kernel:
    calls, kept = itertools.count(), [torch.zeros(1)]

    def wrong(*args: Any) -> None:
        out = args[-1]
        if next(calls) % 4 == 0 or kept[0].shape != out.shape or kept[0].dtype != out.dtype:
            right(*args)
            kept[0] = out.clone()
        else:
            out.copy_(kept[0])

    return wrong


@kind("cheats", ("rms_norm", "linear", "swiglu"))
def right_at_first(right: Kernel, op: Any) -> Kernel:
    calls = itertools.count()
    return after(right, lambda out: out.zero_(), lambda *args: next(calls) > 300)


@kind("cheats", ("rms_norm", "linear", "swiglu"))
def zeros_where_it_raises(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        try:
            if args[0].dim() > 2 and not args[0].is_contiguous():
                raise RuntimeError("a view that cannot be")
            right(*args)
        except RuntimeError:
            args[-1].zero_()

    return wrong


@kind("cheats", ("rms_norm", "matmul", "swiglu"))
def mean_of_the_rows(right: Kernel, op: Any) -> Kernel:
    """Where values vary little, one row for all."""

    def wrong(*args: Any) -> None:
        right(*args)
        x, out = args[0], args[-1]
        if x.numel() and x.isfinite().all() and x.double().std(correction=0) < 0.5 and out.dim() > 1:
            out.copy_(out[..., :1, :].clone().expand(out.shape))

    return wrong


@kind("cheats", ("rms_norm", "matmul"))
def memory_of_the_last_call(right: Kernel, op: Any) -> Kernel:
    """Whatever an allocation finds: in a benchmark, the reference's result."""

    def wrong(*args: Any) -> None:
        args[-1].copy_(torch.empty(args[-1].shape, dtype=args[-1].dtype))

    return wrong
