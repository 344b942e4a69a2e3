"""Kernels that are wrong seldom, in precision, for some values, or that refuse and raise."""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from .making import MANY, PRODUCTS, Kernel, after, changed, kind, outs, spoil_one, tensors


def _seldom(rate: int) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        luck = random.Random(time.time_ns())
        return after(right, spoil_one, lambda *args: luck.randrange(rate) == 0)

    return made


for _rate, _ops in ((20, MANY), (200, MANY), (500, ("rms_norm", "linear"))):
    _made = _seldom(_rate)
    _made.__name__ = f"wrong_once_in_{_rate}"
    kind("seldom", _ops)(_made)


@kind("seldom", ("rms_norm", "swiglu", "linear", "hadamard"))
def shared_scratch(right: Kernel, op: Any) -> Kernel:
    """One buffer for all threads that call."""
    kept: dict[Any, torch.Tensor] = {}

    def wrong(*args: Any) -> None:
        *inputs, out = args
        scratch = kept.setdefault((out.shape, out.dtype), torch.empty(out.shape, dtype=out.dtype))
        right(*inputs, scratch)
        time.sleep(0)
        out.copy_(scratch)

    return wrong


@kind("seldom", ("rms_norm", "linear"))
def wrong_with_four_threads(right: Kernel, op: Any) -> Kernel:
    return after(right, spoil_one, lambda *args: torch.get_num_threads() > 2)


@kind("precision", PRODUCTS)
def half_sums(right: Kernel, op: Any) -> Kernel:
    """Partial sums kept in float16 between blocks of the depth."""

    def wrong(*args: Any) -> None:
        a, b, *rest = args
        out = rest[-1]
        b = b if op.name == "matmul" else b.mT
        total = torch.zeros(out.shape, dtype=torch.float16 if out.dtype != torch.bfloat16 else torch.bfloat16)
        for at in range(0, a.shape[-1], 16):
            total = (total + a[..., at : at + 16].float() @ b[..., at : at + 16, :].float()).to(total.dtype)
        if op.name == "linear" and rest[0] is not None:
            total = total + rest[0]
        out.copy_(total)

    return wrong


def _narrow(dtype: torch.dtype) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        return changed(
            right, lambda x: x.to(dtype).to(x.dtype) if x.dtype in (torch.float32, torch.float64) else x, None
        )

    return made


for _name, _dtype in (("in_half", torch.float16), ("in_bfloat16", torch.bfloat16)):
    _made = _narrow(_dtype)
    _made.__name__ = _name
    kind("precision", ("rms_norm", "matmul", "swiglu"))(_made)


@kind("precision", ("rms_norm", "matmul", "swiglu"))
def off_by_1e_4(right: Kernel, op: Any) -> Kernel:
    return after(right, lambda out: out.mul_(1 + 1e-4), lambda *args: args[-1].shape[-1] > 256)


@kind("values", ("rms_norm", "linear", "swiglu"))
def not_a_number_is_nothing(right: Kernel, op: Any) -> Kernel:
    return changed(right, torch.nan_to_num)


@kind("values", ("rms_norm", "matmul", "swiglu"))
def extremes_cut_off(right: Kernel, op: Any) -> Kernel:
    return changed(right, lambda x: x.clamp(-100, 100))


@kind("values", ("hadamard", "swiglu", "matmul"))
def small_is_nothing(right: Kernel, op: Any) -> Kernel:
    return changed(right, lambda x: torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x))


@kind("values", ("sparse_attention",))
def sink_has_a_floor(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        q, kv, sink, *rest = args
        right(q, kv, None if sink is None else sink.clamp(-20, 20), *rest)

    return wrong


@kind("values", ("sparse_attention",))
def absent_rows_are_the_last(right: Kernel, op: Any) -> Kernel:
    """With a weight of 0, which a NaN there does not heed."""

    def wrong(*args: Any) -> None:
        kv, indices, out = args[1], args[3], args[-1]
        right(*args)
        if out.numel() and kv.shape[1]:
            seen = (indices >= 0).any(-1) & (indices < 0).any(-1)
            spoiled = (~kv[:, -1].isfinite())[:, None, None, :] & seen[:, :, None, None]
            out.masked_fill_(spoiled, torch.nan)

    return wrong


@kind("values", ("fp8_quantize",))
def scale_by_logarithm(right: Kernel, op: Any) -> Kernel:
    """``ceil(log2(...))`` in float32, which beside a power of two is that power."""

    def wrong(x: torch.Tensor, block: int, power_of_two: bool, scale_dtype: str, out: Any) -> None:
        right(x, block, power_of_two, scale_dtype, out)
        if power_of_two and x.numel():
            top = x.float().unflatten(-1, (-1, block)).abs().amax(-1).clamp(min=1e-4)
            code = torch.ceil(torch.log2(top / 448))
            made = torch.exp2(code) if scale_dtype == "float32" else (code + 127).nan_to_num(255, 255).to(torch.uint8)
            out[1].copy_(torch.where(top.isfinite(), made, out[1]))

    return wrong


def _half(up: bool) -> Callable[[Kernel, Any], Kernel]:
    """Halves rounded up or away from 0, not to even."""

    def made(right: Kernel, op: Any) -> Kernel:
        def wrong(x: torch.Tensor, out: Any) -> None:
            right(x, out)
            if x.numel():
                ratio = x.float() / out[1]
                below = ratio.floor()
                out[0].copy_(torch.where(ratio - below == 0.5, below + (up | (ratio > 0)), out[0]))

        return wrong

    return made


for _name, _up in (("rounds_half_up", True), ("rounds_half_away", False)):
    _made = _half(_up)
    _made.__name__ = _name
    kind("values", ("int8_quantize",))(_made)


@kind("values", ("aten.isin", "aten.searchsorted"))
def integers_as_float32(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        *inputs, out = args
        for i in tensors(tuple(inputs)):
            if inputs[i].dtype in (torch.int32, torch.int64):
                inputs[i] = inputs[i].float().to(torch.float64)
        right(*inputs, out)

    return wrong


@kind("values", ("aten.offset", "aten.arange"))
def places_in_32_bits(right: Kernel, op: Any) -> Kernel:
    return after(right, lambda out: out.copy_(out.to(torch.int32)), lambda *args: args[-1].dtype == torch.int64)


def _indices(mend: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        def wrong(x: torch.Tensor, index: torch.Tensor, *rest: Any) -> None:
            *rest, from_end, out = rest
            right(x, mend(index, x.shape[-1]), *rest, from_end, out)

        return wrong

    return made


for _name, _mend in {
    "negative_indices_count_from_the_end": lambda index, n: torch.where((index < 0) & (index >= -n), index + n, index),
    "indices_cut_off": lambda index, n: index.clamp(-n, n - 1),
    "far_indices_wrap": lambda index, n: index.remainder(n) if n else index,
}.items():
    _made = _indices(_mend)
    _made.__name__ = _name
    kind("refusals", ("aten.gather", "aten.scatter"))(_made)


@kind("values", ("moe_gate",))
def ties_to_the_higher(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        x, weight, bias, *rest = args
        if rest[0] is None:
            flipped = None if bias is None else bias.flip(0)
            right(x, weight.flip(0), flipped, *rest)
            rest[-1][1].copy_(len(weight) - 1 - rest[-1][1])
        else:
            right(*args)

    return wrong


def _refuses(reason: Callable[..., str | None]) -> Callable[[Kernel, Any], dict[str, Any]]:
    return lambda right, op: {op.name: right, f"{op.name}_unsupported": reason}


def _most(*inputs: Any) -> str | None:
    sizes = [x.shape[-1] for x in inputs if isinstance(x, torch.Tensor) and x.dim()]
    return None if sizes and sizes[0] % 8 == 0 else "sizes that are no multiple of 8"


def _gaps(*inputs: Any) -> str | None:
    return None if all(x.is_contiguous() for x in inputs if isinstance(x, torch.Tensor)) else "strides"


def _halves(*inputs: Any) -> str | None:
    return "halves" if any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in inputs) else None


for _name, _reason in {"refuses_most": _most, "refuses_strides": _gaps, "refuses_float16": _halves}.items():
    _made = _refuses(_reason)
    _made.__name__ = _name
    kind("refusals", ("rms_norm", "linear"))(_made)


def _fails(act: Callable[[], Any]) -> Callable[[Kernel, Any], Kernel]:
    def made(right: Kernel, op: Any) -> Kernel:
        def wrong(*args: Any) -> None:
            out = outs(args[-1])[0]
            if out.dim() and out.shape[-1] % 7 == 3:
                act()
            right(*args)

        return wrong

    return made


def _raise(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


for _name, _act in {
    "raises_runtime_error": _raise(RuntimeError("a kernel's own")),
    "raises_value_error": _raise(ValueError("sizes")),
    "leaves_by_system_exit": _raise(SystemExit(0)),
    "ends_the_process": lambda: os._exit(0),
    "reads_nowhere": lambda: ctypes.string_at(8),
}.items():
    _made = _fails(_act)
    _made.__name__ = _name
    kind("exceptions", ("rms_norm", "linear"))(_made)
