"""Torch's fused optimizer steps, a parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..lowering import REFUSED, Pass, lowers

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


def _fused(decoupled: bool) -> Any:
    def step(
        steps: Steps,
        self: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        state_steps: Sequence[Tensor],
        *,
        lr: Any,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if found_inf is not None and bool(found_inf):
            return
        lists = self, grads, exp_avgs, exp_avg_sqs
        if any(x.dtype != param.dtype for param, *others in zip(*lists, strict=True) for x in others):
            raise Pass(REFUSED)
        rates = float(lr), beta1, beta2, weight_decay, eps, decoupled, maximize
        for i, (param, grad, average, square, count) in enumerate(zip(*lists, state_steps, strict=True)):
            if grad_scale is not None:
                grad.div_(grad_scale)
            if amsgrad:
                _by_parts(param, grad, average, square, max_exp_avg_sqs[i], float(count), *rates)
                continue
            if any(x.stride() != param.stride() for x in (grad, average, square)):
                raise Pass("a gradient or averages laid out in another way than their parameter")
            tensors = [_flat(x) for x in (param, grad, average, square)]
            places = tensors[0], *tensors[2:]
            steps.run("aten.adamw", *tensors, count, *rates, out=places)
            for x, place in zip((param, average, square), places, strict=True):
                if place.data_ptr() != x.data_ptr():
                    x.copy_(place.view_as(x))

    return step


def _by_parts(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    largest: Tensor,
    count: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """A step that divides by the largest of the averages so far, in torch's own operators."""
    import torch

    grad = -grad if maximize else grad
    if decoupled:
        param.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    torch.maximum(largest, exp_avg_sq, out=largest)
    root = largest.sqrt().div_((1 - beta2**count) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**count))


def _flat(x: Tensor) -> Tensor:
    """All elements on one axis, in the order in which they lie; a copy of a tensor with gaps."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    lying = x.permute(order)
    return lying.view(-1) if lying.is_contiguous() else x.reshape(-1)


for _name, _decoupled in (("_fused_adamw_", True), ("_fused_adam_", False)):
    lowers(_name, to="aten.adamw", whole=True)(_fused(_decoupled))
