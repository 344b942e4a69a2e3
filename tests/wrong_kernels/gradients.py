"""Backwards that are wrong, beside a right kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flagops import registry

from .making import Kernel, dense, kind


def _backward(change: Callable[..., Any]) -> Callable[[Kernel, Any], dict[str, Any]]:
    def made(right: Kernel, op: Any) -> dict[str, Any]:
        true = registry.find(op.name, "torch").backward

        def wrong(grad: Any, *rest: Any) -> Any:
            return change(true, grad, *rest)

        return {op.name: right, f"{op.name}_backward": wrong}

    return made


def _each_gradient(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda true, grad, *rest: tuple(None if g is None else change(g) for g in true(grad, *rest))


def _dense_grad(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
    steps = grad.stride()
    padded = grad.dim() > 1 and 0 not in steps and steps[-1] == 1
    return true(grad.as_strided(grad.shape, dense(grad)) if padded else grad, *rest)


def _first_alone(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
    found = true(grad, *rest)
    return tuple(g if i == 0 or g is None or rest[-1][0] else torch.zeros_like(g) for i, g in enumerate(found))


def _same_buffer() -> Callable[..., Any]:
    kept: dict[Any, torch.Tensor] = {}

    def change(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
        def keep(i: int, g: torch.Tensor) -> torch.Tensor:
            return kept.setdefault((i, g.shape, g.dtype), torch.zeros_like(g)).add_(g)

        return tuple(None if g is None else keep(i, g) for i, g in enumerate(true(grad, *rest)))

    return change


def _half_only(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
    found = true(grad, *rest)
    return tuple(None if g is None else g * 0.5 if g.dtype == torch.float16 else g for g in found)


def _ones_grad(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
    return true(torch.ones_like(grad), *rest)


def _broadcast_halved(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
    found = true(grad, *rest)
    small = [x.dim() > 2 and x.shape[:-2] != grad.shape[:-2] for x in rest[: len(found)] if isinstance(x, torch.Tensor)]
    return tuple(g if g is None or not halved else g / 2 for g, halved in zip(found, small, strict=False))


for _name, _change in {
    "zero_gradient": _each_gradient(torch.zeros_like),
    "gradient_of_other_sign": _each_gradient(torch.neg),
    "gradient_off_by_a_percent": _each_gradient(lambda g: g * 1.01),
    "gradient_misses_the_last_row": _each_gradient(
        lambda g: g.index_fill(0, torch.tensor([len(g) - 1]), 0) if len(g) > 1 else g
    ),
    "padded_gradient_is_dense": _dense_grad,
    "one_gradient_without_the_other": _first_alone,
    "half_gradient_is_half": _half_only,
    "gradient_of_a_sum": _ones_grad,
}.items():
    _made = _backward(_change)
    _made.__name__ = _name
    kind("gradients", ("linear", "swiglu"))(_made)


@kind("gradients", ("rms_norm", "matmul"))
def gradients_add_up(right: Kernel, op: Any) -> dict[str, Any]:
    return _backward(_same_buffer())(right, op)


@kind("gradients", ("matmul",))
def shared_factor_gets_half(right: Kernel, op: Any) -> dict[str, Any]:
    return _backward(_broadcast_halved)(right, op)


@kind("gradients", ("rms_norm", "swiglu", "linear"))
def gradient_of_the_last_call(right: Kernel, op: Any) -> dict[str, Any]:
    """The backward takes what the last forward left, where shapes agree."""
    true = registry.find(op.name, "torch").backward
    left: list[Any] = []

    def forward(*args: Any) -> None:
        right(*args)
        left[:] = [x.clone() if isinstance(x, torch.Tensor) else x for x in args[:-1]]

    def backward(grad: Any, *rest: Any) -> Any:
        inputs = list(rest[:-1])
        for i, (x, old) in enumerate(zip(inputs, left, strict=False)):
            if isinstance(x, torch.Tensor) and isinstance(old, torch.Tensor) and old.shape == x.shape:
                inputs[i] = old.to(x.dtype)
        return true(grad, *inputs, rest[-1])

    return {op.name: forward, f"{op.name}_backward": backward}


@kind("gradients", ("rms_norm", "linear"))
def gradients_kept_by_address(right: Kernel, op: Any) -> dict[str, Any]:
    """A second backward of the same tensors gives the sum of both."""
    known: dict[Any, Any] = {}

    def change(true: Any, grad: torch.Tensor, *rest: Any) -> Any:
        found = true(grad, *rest)
        key = tuple((x.data_ptr(), x.shape) for x in (grad, *rest) if isinstance(x, torch.Tensor))
        if key in known:
            pairs = zip(found, known[key], strict=True)
            found = tuple(g if g is None or old is None else g + old for g, old in pairs)
        known[key] = found
        return found

    return _backward(change)(right, op)
