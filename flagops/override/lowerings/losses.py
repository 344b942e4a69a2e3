"""Torch's losses by pointwise cards, one after the other: what torch computes for each element, then its sum or mean.

Halves are computed in float32, and a result is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flagops.arrays import parse_dtype

from ..lowering import REFUSED, Pass, lowers
from .movement import copied
from .pointwise import real
from .rows import MEAN, NONE

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


class _Elements:
    """Cards on the elements of operands of one dtype, in its arithmetic. Raises Pass for other operands."""

    def __init__(self, steps: Steps, *operands: Tensor) -> None:
        import torch

        own = operands[0].dtype
        if any(x.dtype != own for x in operands):
            raise Pass("operands of several dtypes")
        if not own.is_floating_point:
            raise Pass(f"dtype {parse_dtype(own)}")
        real(own)
        self.steps, self.own = steps, own
        self.dtype = parse_dtype(torch.promote_types(own, torch.float32))

    def __call__(self, card: str, *operands: Any, scalars: tuple[Any, ...] = ()) -> Tensor:
        return self.steps.elementwise(f"aten.{card}", *operands, dtype=self.dtype, scalars=scalars)

    def apart(self, x: Tensor, y: Tensor) -> Tensor:
        return self("add", x, y, scalars=(-1,))

    def within(self, x: Tensor, least: float, most: float) -> Tensor:
        return self("clamp", x, least, most)

    def rounded(self, x: Tensor) -> Tensor:
        import torch

        if x.dtype == self.own:
            return x
        return copied(self.steps, x, torch.empty_like(x, dtype=self.own))

    def reduced(self, losses: Tensor, reduction: int) -> Tensor:
        """The result of a loss, of each element or of all."""
        if reduction == NONE:
            return self.rounded(losses)
        card = "aten.mean" if reduction == MEAN else "aten.sum"
        return self.rounded(self.steps.run(card, losses.reshape(-1), self.dtype, out=losses.new_empty(())))

    def gradient(self, slope: Tensor, grad: Tensor, reduction: int) -> Tensor:
        """The gradient of what `reduced` gave of an element with this slope, row by row as torch has it."""
        share = 1 / max(slope.numel(), 1) if reduction == MEAN else 1.0
        return self.rounded(self("mul", self("mul", slope, share), grad)).contiguous()


@lowers("mse_loss", to="aten.mul", whole=True)
def mse_loss(steps: Steps, self: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    on = _Elements(steps, self, target)
    apart = on.apart(self, target)
    return on.reduced(on("mul", apart, apart), reduction)


@lowers("mse_loss_backward", to="aten.mul", whole=True)
def mse_loss_backward(steps: Steps, grad_output: Tensor, self: Tensor, target: Tensor, reduction: int) -> Tensor:
    on = _Elements(steps, self, target, grad_output)
    return on.gradient(on("mul", on.apart(self, target), 2.0), grad_output, reduction)


@lowers("smooth_l1_loss", to="aten.mul", whole=True)
def smooth_l1_loss(steps: Steps, self: Tensor, target: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    if beta < 0:
        raise Pass(REFUSED)
    on = _Elements(steps, self, target)
    size = on("abs", on.apart(self, target))
    if not beta:
        return on.reduced(size, reduction)
    near = on("mul", on("mul", size, size), 0.5 / beta)
    return on.reduced(on("where", on("lt", size, beta), near, on("add", size, -0.5 * beta, scalars=(1,))), reduction)


@lowers("smooth_l1_loss_backward", to="aten.mul", whole=True)
def smooth_l1_loss_backward(
    steps: Steps, grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, beta: float
) -> Tensor:
    on = _Elements(steps, self, target, grad_output)
    apart = on.apart(self, target)
    slope = on.within(on("div", apart, beta), -1.0, 1.0) if beta else on("sign", apart)
    return on.gradient(slope, grad_output, reduction)


@lowers("huber_loss", to="aten.mul", whole=True)
def huber_loss(steps: Steps, self: Tensor, target: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    if delta <= 0:
        raise Pass(REFUSED)
    on = _Elements(steps, self, target)
    size = on("abs", on.apart(self, target))
    near = on("mul", on("mul", size, size), 0.5)
    far = on("mul", on("add", size, -0.5 * delta, scalars=(1,)), delta)
    return on.reduced(on("where", on("le", size, delta), near, far), reduction)


@lowers("huber_loss_backward", to="aten.mul", whole=True)
def huber_loss_backward(
    steps: Steps, grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, delta: float
) -> Tensor:
    on = _Elements(steps, self, target, grad_output)
    return on.gradient(on.within(on.apart(self, target), -delta, delta), grad_output, reduction)


@lowers("binary_cross_entropy", to="aten.log", whole=True)
def binary_cross_entropy(
    steps: Steps, self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """Logarithms are -100 at least; the losses of elements lie as `self` does."""
    import torch

    on = _Elements(steps, self, target, *([] if weight is None else [weight]))
    if self.shape != target.shape:
        raise Pass(REFUSED)
    if self.numel() and not bool(((self >= 0) & (self <= 1)).all()):
        raise RuntimeError("all elements of input should be between 0 and 1")
    yes, no = (on("maximum", x, -100.0) for x in (on("log", self), on("log1p", on("neg", self))))
    rest = on("mul", on("add", target, -1.0, scalars=(1,)), no)
    losses = on.apart(rest, on("mul", target, yes))
    losses = losses if weight is None else on("mul", losses, weight)
    return copied(steps, losses, torch.empty_like(self)) if reduction == NONE else on.reduced(losses, reduction)


@lowers("binary_cross_entropy_backward", to="aten.div", whole=True)
def binary_cross_entropy_backward(
    steps: Steps,
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    on = _Elements(steps, self, target, grad_output, *([] if weight is None else [weight]))
    spread = on("maximum", on("mul", on.apart(self.new_ones(()), self), self), 1e-12)
    slope = on("div", on.apart(self, target), spread)
    return on.gradient(slope if weight is None else on("mul", slope, weight), grad_output, reduction)


@lowers("log_sigmoid_forward", to="aten.log1p", whole=True)
def log_sigmoid(steps: Steps, self: Tensor) -> tuple[Tensor, Tensor]:
    """The exponential is of what is below 0; the CPU's backward takes it from the second result."""
    import torch

    on = _Elements(steps, self)
    for out in steps.given[: 2 if self.device.type == "cpu" else 1]:
        if out is not None and out.shape != self.shape:
            out.resize_(self.shape)  # of which torch does not warn here
    x = self.contiguous()
    small = on("exp", on("neg", on("abs", x)))
    made = on.apart(on("minimum", x, 0.0), on("log1p", small))
    buffer = on.rounded(small) if self.device.type == "cpu" else torch.empty(0, dtype=self.dtype, device=self.device)
    return on.rounded(made), buffer


@lowers("log_sigmoid_backward", to="aten.sigmoid", whole=True)
def log_sigmoid_backward(steps: Steps, grad_output: Tensor, self: Tensor, buffer: Tensor) -> Tensor:
    on = _Elements(steps, grad_output, self)
    return on.rounded(on("mul", grad_output, on("sigmoid", on("neg", self))))
