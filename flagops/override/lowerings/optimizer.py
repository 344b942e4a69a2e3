"""Torch's fused optimizer steps, a parameter at a time, and what scales losses of halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flagops.arrays import parse_dtype

from ..lowering import REFUSED, Pass, lowers
from .movement import copied

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
        import torch

        if found_inf is not None and bool(found_inf):
            return
        lists = self, grads, exp_avgs, exp_avg_sqs
        if any(x.dtype != param.dtype for param, *others in zip(*lists, strict=True) for x in others):
            raise Pass(REFUSED)
        if not amsgrad and any(x.stride() != p.stride() for p, _, *both in zip(*lists, strict=True) for x in both):
            raise Pass("averages laid out in another way than their parameter")  # before any has been stepped
        rates = float(lr), beta1, beta2, weight_decay, eps, decoupled, maximize
        for i, (param, grad, average, square, count) in enumerate(zip(*lists, state_steps, strict=True)):
            if grad_scale is not None:
                grad.div_(grad_scale)
            if amsgrad:
                _by_parts(param, grad, average, square, max_exp_avg_sqs[i], float(count), *rates)
                continue
            laid = grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
            tensors = [_flat(x) for x in (param, laid, average, square)]
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


@lowers("_amp_foreach_non_finite_check_and_unscale_", to="aten.mul", whole=True)
def unscale(steps: Steps, self: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Gradients times a number, and whether any of theirs was infinite or NaN, for which nobody waits."""
    import torch

    if any(x.numel() != 1 or x.dtype != torch.float32 for x in (found_inf, inv_scale)):
        raise Pass(REFUSED)
    if not all(grad.is_floating_point() for grad in self):
        raise Pass(REFUSED)
    for grad in self:
        wide = parse_dtype(torch.promote_types(grad.dtype, torch.float32))
        nothing = steps.elementwise("aten.add", grad, grad, dtype=wide, scalars=(-1,))  # NaN of what is not finite
        strange = steps.elementwise("aten.ne", nothing, 0.0, dtype=wide).reshape(-1)
        found = steps.run("aten.any", strange, out=strange.new_empty(())).view(found_inf.shape)
        steps.run("aten.maximum", found_inf, found, "float32", out=found_inf)
        copied(steps, steps.elementwise("aten.mul", grad, inv_scale, dtype=wide), grad)


@lowers("_amp_update_scale_", to="aten.where", whole=True)
def update_scale(
    steps: Steps,
    self: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
    scale_growth_factor: float,
    scale_backoff_factor: float,
    growth_interval: int,
) -> Tensor:
    """Less where a gradient was not finite, more after so many steps in which all were, as far as it is finite then."""
    import torch

    if growth_tracker.dtype != torch.int32 or any(x.dtype != torch.float32 for x in (self, found_inf)):
        raise Pass(REFUSED)
    if any(x.numel() != 1 for x in (self, growth_tracker, found_inf)):
        raise Pass(REFUSED)
    count, found, grown = growth_tracker + 1, found_inf != 0, self * scale_growth_factor
    enough = count == growth_interval
    kept = torch.where(enough & ~(grown.isinf() | grown.isnan()), grown, self)
    self.copy_(torch.where(found, self * scale_backoff_factor, kept))
    growth_tracker.copy_(count.masked_fill(found | enough, 0))
    return self
