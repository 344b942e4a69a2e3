"""The gradient of a composite that a kernel of ours computed: our backward, or torch's where ours cannot serve.

Second derivatives, batched gradients and whatever else watches the backward take the composition of torch, computed
again from the saved inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flagops import dispatch
from flagops.calls import surroundings

from .forms import Form, Part
from .interpose import thread


def differentiable(
    form: Form,
    plan: dispatch.Plan,
    parts: Sequence[Part],
    constants: Sequence[Any],
    compute: Callable[[tuple[Any, ...]], Any],
    orders: Mapping[str, tuple[int, ...]],
) -> Callable[[tuple[Any, ...]], Any]:
    """`compute` with gradients, laid out in memory in `orders` of their axes. Raises Unsupported for an operator that
    has no backward."""
    backward = dispatch.backward(plan.operator, plan.kernel)
    own = _Backward(form, plan, parts[:-1], constants, backward, compute, orders)
    return lambda args: _apply(own, *args)


class _Backward:
    def __init__(
        self,
        form: Form,
        plan: dispatch.Plan,
        parts: Sequence[Part],
        constants: Sequence[Any],
        backward: Callable[..., Any],
        compute: Callable[[tuple[Any, ...]], Any],
        orders: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.form, self.parts, self.constants = form, parts, constants
        self.backward, self.compute = backward, compute
        self.shape = plan.bound.shape
        self.tensors = plan.operator.tensor_positions
        self.orders = [orders.get(argument.name) for argument in form.schema.arguments]

    def ours(self, grad: torch.Tensor, args: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
        """Gradients of the kernel's arguments, brought back through the views to those of the call."""
        held = (*args, None, *self.constants)
        leaves: dict[int, torch.Tensor] = {}
        clean: list[Any] = []
        for i, view, _ in self.parts:
            x = held[i]
            if view is not None:
                with torch.enable_grad():
                    if needs[i]:
                        x = leaves.setdefault(i, x.detach().requires_grad_())
                    x = view(x)
            clean.append(x)
        wanted = tuple(i < len(needs) and needs[i] for i in (self.parts[p].source for p in self.tensors))
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in clean]
        found = self.backward(grad.reshape(self.shape), *plain, wanted)
        result: list[Any] = [None] * len(args)
        for position, gradient, need in zip(self.tensors, found, wanted, strict=True):
            if not need:
                continue
            i, view, _ = self.parts[position]
            if gradient.dtype != held[i].dtype:
                gradient = gradient.to(held[i].dtype)
            if view is not None:
                (gradient,) = torch.autograd.grad(clean[position], leaves[i], gradient, retain_graph=True)
            result[i] = gradient if result[i] is None else result[i] + gradient
        return [
            x if x is None or order is None else _laid(x, order) for x, order in zip(result, self.orders, strict=True)
        ]

    def torchs(self, grad: torch.Tensor, args: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
        """Gradients through what torch composes, which can be differentiated and transformed again."""
        busy, thread.busy = thread.busy, True
        try:
            with torch.enable_grad():  # views, since one tensor may be several arguments
                args = [x.view_as(x) if need else x for x, need in zip(args, needs, strict=True)]
                positional, named = self.form.split(args)
                y = self.form.functional()(*positional, **named)
        finally:
            thread.busy = busy
        wanted = [x for x, need in zip(args, needs, strict=True) if need]
        again = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again, allow_unused=True))
        return [next(found) if need else None for need in needs]


def _laid(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A tensor whose memory has its axes in an order, from the slowest to the fastest."""
    turned = x.permute(*order)
    if turned.is_contiguous():
        return x
    back = [order.index(axis) for axis in range(len(order))]
    return turned.contiguous().permute(*back)


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: _Backward, *args: Any) -> torch.Tensor:
        ctx.own = own
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in args]
        ctx.saved = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.saved))
        return own.compute(args)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        args = list(ctx.others)
        for i, x in zip(ctx.saved, ctx.saved_tensors, strict=True):
            args[i] = x
        needs = ctx.needs_input_grad[1:]
        return (None, *(ctx.own.ours if _plain(grad) else ctx.own.torchs)(grad, args, needs))


_apply: Any = super(torch.autograd.Function, _Own).apply
"""What `Function.apply` comes to where no transform of `torch.func` is active, and there a site computes nothing."""


def _plain(grad: torch.Tensor) -> bool:
    """Whether a backward is numbers alone: not recorded, watched or transformed."""
    if torch.is_grad_enabled() or surroundings.watched() or surroundings.forward_level():
        return False
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # jacobian(vectorize=True), is_grads_batched
        return False
    return type(grad).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
