"""Kernels that keep what they should not, or leave the process otherwise than they found it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .making import MANY, Kernel, after, kind, outs, spoil_one, tensors


def _kept(key: Callable[[list[torch.Tensor]], Any]) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        known: dict[Any, list[torch.Tensor]] = {}

        def wrong(*args: Any) -> None:
            *inputs, out = args
            given = [inputs[i] for i in tensors(tuple(inputs))]
            plain = tuple(x for x in inputs if not isinstance(x, torch.Tensor))
            mark = (key(given), tuple(x.shape for x in outs(out)), [x.dtype for x in given].__repr__(), plain)
            if mark in known:
                for x, old in zip(outs(out), known[mark], strict=True):
                    x.copy_(old)
                return
            right(*args)
            known[mark] = [x.clone() for x in outs(out)]

        return wrong

    return made


for _name, _key in {
    "kept_by_shape": lambda xs: tuple(x.shape for x in xs),
    "kept_by_address": lambda xs: tuple((x.data_ptr(), x.stride()) for x in xs),
    "kept_by_version": lambda xs: tuple((id(x), x._version) for x in xs),
    "kept_by_first_element": lambda xs: tuple(x.reshape(-1)[:1].view(torch.uint8).numpy().tobytes() for x in xs),
    "kept_by_sum": lambda xs: tuple(float(x.double().nansum().round(decimals=1)) for x in xs),
}.items():
    _made = _kept(_key)
    _made.__name__ = _name
    kind("state", MANY if _name in ("kept_by_shape", "kept_by_address") else ("rms_norm", "matmul"))(_made)


@kind("state", MANY)
def previous_out_written(right: Kernel, op: Any) -> Kernel:
    last: list[torch.Tensor] = []

    def wrong(*args: Any) -> None:
        for out in last:
            if out.numel():
                out.view(torch.uint8 if out.dtype.itemsize == 1 else out.dtype).zero_()
        right(*args)
        last[:] = [args[-1]]

    return wrong


@kind("state", ("rms_norm", "linear", "swiglu"))
def wrong_from_a_call_on(right: Kernel, op: Any) -> Kernel:
    calls = itertools.count()
    return after(right, spoil_one, lambda *args: next(calls) >= 1500)


@kind("state", MANY)
def input_written_and_put_back(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        x = args[0]
        if x.numel() and 0 not in x.stride():
            raw = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
            old = raw.clone()
            raw.zero_()
            raw.copy_(old)
        right(*args)

    return wrong


@kind("state", MANY)
def input_changed(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        right(*args)
        if args[0].numel() and args[0] is not args[-1]:
            args[0].view(torch.uint8 if args[0].dtype.itemsize == 1 else args[0].dtype).mul_(2)

    return wrong


def _rounded(out: torch.Tensor) -> None:
    if out.dtype.is_floating_point:
        out.copy_(out.bfloat16())


@kind("modes", MANY)
def half_under_inference(right: Kernel, op: Any) -> Kernel:
    return after(right, _rounded, lambda *args: torch.is_inference_mode_enabled())


@kind("modes", ("rms_norm", "swiglu", "matmul"))
def scratch_of_the_default_dtype(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        right(*args)
        out = args[-1]
        if out.dtype == torch.float32:
            out.copy_(torch.empty(out.shape).copy_(out))

    return wrong


def _leaves(act: Callable[[], Any]) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        def wrong(*args: Any) -> None:
            act()
            right(*args)

        return wrong

    return made


def _patch_numpy() -> None:
    np.abs = np.absolute = lambda x, *more, **words: np.zeros_like(x)


def _patch_judge() -> None:
    for name in ("flagops.judge.calls", "flagops.judge.comparison", "flagops.testing"):
        if name in sys.modules:
            sys.modules[name].compare = lambda *args, **words: 0.0


for _name, _act in {
    "threads_left": lambda: torch.set_num_threads(1),
    "flush_to_zero_left": lambda: torch.set_flush_denormal(True),
    "default_dtype_left": lambda: torch.set_default_dtype(torch.float64),
    "random_state_used": lambda: torch.rand(1),
    "numpy_random_state_used": lambda: np.random.rand(1),  # noqa: NPY002
    "environment_left": lambda: os.environ.update(OMP_NUM_THREADS="1"),
    "gradients_switched_off": lambda: torch._C._set_grad_enabled(False),
    "errors_silenced": lambda: np.seterr(all="raise"),
    "numpy_patched": _patch_numpy,
    "judge_patched": _patch_judge,
}.items():
    _made = _leaves(_act)
    _made.__name__ = _name
    kind("process", ("rms_norm", "linear"))(_made)
