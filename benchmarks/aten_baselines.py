"""Torch's own operator beside each card of `flagops.aten`: functions of the card's inputs and ``out``.

An overload of the card's name that takes the same tensors in the same order, and all else by the same names, is it;
what differs is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from flagops import registry
from flagops.operator import Operator

Call = Callable[..., Any]


def overload(op: Operator) -> Call | None:
    """The overload of torch's that takes what the card takes."""
    packet = getattr(torch.ops.aten, op.name.removeprefix("aten."), None)
    for name in packet.overloads() if packet else ():
        schema = getattr(packet, name)._schema
        tensors = [x.name for x in schema.arguments if not x.is_out and "Tensor" in str(x.type)]
        others = [x for x in schema.arguments if not x.is_out and x.name not in tensors]
        outs = [x.name for x in schema.arguments if x.is_out]
        known = all(x.name in op.scalars or x.has_default_value() for x in others)
        if known and len(tensors) == len(op.tensors) and len(outs) == len(op.results):
            return partial(_call, op, getattr(packet, name), tensors, {x.name for x in others} & {*op.scalars}, outs)
    return None


def _call(op: Operator, function: Call, tensors: list[str], scalars: set[str], outs: list[str], *args: Any) -> None:
    named = dict(zip(op.inputs, args[:-1], strict=True))
    given = {theirs: named[ours] for theirs, ours in zip(tensors, op.tensors, strict=True)}
    given |= {name: getattr(torch, named[name]) if name == "dtype" else named[name] for name in scalars}
    function(**given, **dict(zip(outs, op.each(args[-1]), strict=True)))


def _along(name: str) -> Call:
    """A function of each row."""
    return lambda x, *scalars: getattr(torch, name)(x, -1, out=scalars[-1])


def _of_softmax(name: str) -> Call:
    call = getattr(torch.ops.aten, name).out
    key = "grad_input" if name == "_softmax_backward_data" else "out"
    return lambda grad, output, dtype, out: call(grad, output, -1, grad.dtype, **{key: out})


def _adamw(param: Any, grad: Any, mean: Any, square: Any, step: Any, *scalars: Any) -> None:
    lr, beta1, beta2, decay, eps, decoupled, maximize, out = scalars
    held = [to.copy_(x) for to, x in zip(out, (param, mean, square), strict=True)]
    lists = [[held[0]], [grad], [held[1]], [held[2]], [], [step.clone()]]
    (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
        *lists, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=maximize
    )


ROWS = "sum nansum mean prod amax amin argmax argmin any all logsumexp cumsum"

OWN: dict[str, Call] = {
    **{name: _along(name) for name in ROWS.split()},
    "max_dim": lambda x, out: torch.max(x, -1, out=out),
    "min_dim": lambda x, out: torch.min(x, -1, out=out),
    "linalg_vector_norm": lambda x, dtype, order, out: torch.linalg.vector_norm(x, order, -1, out=out),
    "var": lambda x, dtype, correction, root, out: torch.var(x, -1, correction=correction, out=out),
    "count_nonzero": lambda x, out: torch.ops.aten.count_nonzero.dim_IntList_out(x, [-1], out=out),
    "copy": lambda x, dtype, out: out.copy_(x),
    "flip": lambda x, axes, out: torch.ops.aten.flip.out(x, range(max(-axes, -x.dim()), 0), out=out),
    "trunc_divide": lambda x, y, dtype, out: torch.div(x, y, rounding_mode="trunc", out=out),
    "lerp_scalar": lambda x, y, dtype, weight, out: torch.lerp(x, y, weight, out=out),
    "gelu": lambda x, dtype, tanh, out: torch.ops.aten.gelu.out(x, approximate="tanh" if tanh else "none", out=out),
    "gather": lambda x, index, from_end, out: torch.gather(x, -1, index, out=out),
    "_softmax": lambda x, dtype, out: torch._softmax(x, -1, False, out=out),
    "_log_softmax": lambda x, dtype, out: torch._log_softmax(x, -1, False, out=out),
    "_softmax_backward_data": _of_softmax("_softmax_backward_data"),
    "_log_softmax_backward_data": _of_softmax("_log_softmax_backward_data"),
    "adamw": _adamw,
    "searchsorted": lambda to, x, right, out: torch.searchsorted(to, x, right=right, out=out),
    "histc": lambda x, bins, least, most, out: torch.histc(x, bins, least, most, out=out),
    "sort": lambda x, descending, out: torch.sort(x, dim=-1, descending=descending, stable=True, out=out),
}  # fmt: skip


def _found() -> Iterator[tuple[str, dict[str, Call]]]:
    for name, card in registry.cards().items():
        call = OWN.get(name.removeprefix("aten.")) or overload(card)
        if call and card.aten and card.family != "random":  # whose numbers are its own
            yield name, {"torch": call}


BASELINES = dict(_found())
