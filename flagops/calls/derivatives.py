"""Derivatives of every operator from one function, the backward that torch's kernel has.

With ``F`` the operator and ``J`` its Jacobian, ``f_backward`` gives ``u J``, which is linear in ``u`` and written in
torch's own operators. Differentiating it once more gives the rest: by ``u`` the forward derivative ``J v`` (``f_jvp``),
by the inputs the second derivative ``d(u J w)/dx`` (``f_second``). A Hessian is symmetric, so the forward derivative of
the backward is made of the same two. Derivatives of third order raise, and so does a second one in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from flagops import dispatch, registry
from flagops.calls import memory, surroundings
from flagops.errors import Unsupported
from flagops.operator import Operator

with torch._C._AutoDispatchBelowAutograd():
    _AUTOGRAD = torch._C._dispatch_tls_local_exclude_set()
_AUTOGRAD = _AUTOGRAD - torch._C._dispatch_tls_local_exclude_set()


@dataclass
class Ops:
    """What `torch.ops.flagops` has of one operator."""

    operator: Operator
    forward: Any
    out: Any
    backward: Any
    jvp: Any = None
    second: Any = None


def nothing(like: Any) -> Any:
    """Stands for a derivative that nobody asked for, or that an integer has not: an operator gives tensors alone."""
    return like.new_empty(0)


def jvp(operator: Operator, tangents: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """``J v``: the derivative by ``u`` of ``u J v``, whatever ``u`` is."""
    bound = operator.bind((*inputs, None))
    like = operator.like(inputs)
    zeros = [
        torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)
        for shape, dtype in zip(bound.shapes, bound.results, strict=True)
    ]
    wants = [x.is_floating_point() for x in zeros] + [False] * len(operator.tensors)
    found = second(operator, tangents, zeros, inputs, [t is not None for t in tangents], wants)
    return [x if x.dtype == zero.dtype else nothing(zero) for x, zero in zip(found, zeros, strict=False)]


def second(
    operator: Operator,
    weights: Sequence[Any],
    grads: Sequence[Any],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    wants: Sequence[bool],
) -> list[Any]:
    """The derivatives of ``sum(weights * backward(grads, inputs))`` by the grads and the tensors that are wanted.

    needs: the tensors whose gradient the backward computes; the others' weights are None.
    """
    inputs = list(inputs)
    leaves = [*grads, *(inputs[p] for p in operator.tensor_positions)]
    with _recorded():
        leaves = [x if x is None else x.detach().requires_grad_(want) for x, want in zip(leaves, wants, strict=True)]
        for position, x in zip(operator.tensor_positions, leaves[len(grads) :], strict=True):
            inputs[position] = x
        chosen = dispatch.plan(operator, (*inputs, None), "torch")
        given = tuple(leaves[: len(grads)]) if operator.several else leaves[0]
        found = dispatch.backward(operator, chosen.kernel)(given, *chosen.clean((*inputs, None))[:-1], tuple(needs))
        pairs = [(x, w) for x, w in zip(found, weights, strict=True) if x is not None and w is not None]
        pairs = [(x, w) for x, w in pairs if x.requires_grad]
        wanted = [x for x, want in zip(leaves, wants, strict=True) if want]
        sums, by = [x for x, _ in pairs], [w.to(x.dtype) for x, w in pairs]
        if sums:
            parts = iter(torch.autograd.grad(sums, wanted, by, allow_unused=True, materialize_grads=True))
        else:
            parts = iter([torch.zeros_like(x) for x in wanted])
    return [next(parts).detach().contiguous() if want else nothing(grads[0]) for want in wants]


@contextmanager
def _recorded() -> Iterator[None]:
    """Record what a kernel computes; it runs below autograd."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD), torch.enable_grad():
        yield


def register(ops: Ops, filled: Callable[[Sequence[Any]], tuple[Any, ...]], library: Any) -> None:
    """The kernels at torch's autograd keys."""
    operator = ops.operator
    name, results, tensors = operator.name, len(operator.results), len(operator.tensor_positions)

    def spread(inputs: Sequence[Any], found: Sequence[Any], asked: Sequence[bool]) -> list[Any]:
        """Derivatives of the tensors in the places of all inputs."""
        spread = [None] * len(inputs)
        for position, x in zip(operator.tensor_positions, found, strict=True):
            spread[position] = x if asked[position] else None
        return spread

    def asked(inputs: Sequence[Any], needed: Sequence[bool]) -> list[bool]:
        return [bool(needed[p]) and inputs[p].is_floating_point() for p in operator.tensor_positions]

    def moved(inputs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        return [tangents[p] if _float(inputs[p]) else None for p in operator.tensor_positions]

    def vjp_forward(arguments: Any, grads: Any, needed: Any) -> Any:
        *inputs, backend = arguments
        found = _each(ops.backward(*_whole(operator, inputs, grads), *inputs, asked(inputs, needed), backend))
        return [*spread(inputs, found, needed), None]

    def jvp_forward(arguments: Any, tangents: Any) -> Any:
        *inputs, _ = arguments
        found = _each(ops.jvp(*moved(inputs, tangents), *inputs))
        return [x if x.is_floating_point() else None for x in found]

    def vjp_backward(arguments: Any, weights: Any, needed: Any) -> Any:
        grads, inputs, (needs, _) = arguments[:results], arguments[results:-2], arguments[-2:]
        wants = [*needed[:results], *asked(inputs, needed[results:])]
        weights = [w if need else None for w, need in zip(weights, needs, strict=True)]
        found = _each(ops.second(*weights, *grads, *inputs, needs, wants))
        by_grads = [g if n else None for g, n in zip(found[:results], needed, strict=False)]
        return [*by_grads, *spread(inputs, found[results:], needed[results:]), None, None]

    def jvp_backward(arguments: Any, tangents: Any) -> Any:
        grads, inputs, (needs, backend) = arguments[:results], arguments[results:-2], arguments[-2:]
        of_grads, of_inputs = tangents[:results], moved(inputs, tangents[results:])
        parts: list[Any] = [None] * tensors
        if any(g is not None for g in of_grads):
            of_grads = [torch.zeros_like(g) if t is None else t for t, g in zip(of_grads, grads, strict=True)]
            parts = list(_each(ops.backward(*of_grads, *inputs, needs, backend)))
        if any(x is not None for x in of_inputs):
            wants = [False] * results + list(needs)
            found = _each(ops.second(*of_inputs, *grads, *inputs, [x is not None for x in of_inputs], wants))
            parts = [b if a is None else a + b for a, b in zip(parts, found[results:], strict=True)]
        return [part if need else nothing(grads[0]) for part, need in zip(parts, needs, strict=True)]

    def vjp_jvp(arguments: Any, grads: Any, needed: Any) -> Any:
        tangents, inputs = arguments[:tensors], arguments[tensors:]
        grads, present = _whole(operator, inputs, grads), [t is not None for t in tangents]
        by_tangents: list[Any] = [None] * tensors
        if any(needed[:tensors]):
            found = _each(ops.backward(*grads, *inputs, present, ""))
            by_tangents = [x if n else None for x, n in zip(found, needed, strict=False)]
        wants = [False] * results + asked(inputs, needed[tensors:])
        if not any(wants):
            return [*by_tangents, *[None] * len(inputs)]
        found = _each(ops.second(*tangents, *grads, *inputs, present, wants))
        return [*by_tangents, *spread(inputs, found[results:], needed[tensors:])]

    def possible(forward: bool) -> None:
        if forward and ops.jvp is None:
            raise NotImplementedError(
                f"flagops.{name} has no forward derivative; detach its inputs, or compute it outside of forward mode"
            )
        if not forward and ops.jvp is None and not _other_backward(operator):
            raise Unsupported(f"{name} has no backward; call it under torch.no_grad() or detach its inputs")

    def always(_: bool) -> None:
        """A backward may be recorded and its derivative never asked for: what there is none of raises when it is."""

    def third(*_: Any) -> Any:
        raise NotImplementedError(f"flagops.{name} has no third derivative")

    def no_second(*_: Any) -> Any:
        raise NotImplementedError(f"flagops.{name} has no second derivative")

    def second_forward(*_: Any) -> Any:
        raise NotImplementedError(
            f"flagops.{name} has no second derivative in forward mode; take the inner one by torch.func.grad or vjp"
        )

    def no_out(keyset: Any, *arguments: Any, **outs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments, **outs):
            given = [outs[key] for key in outs]
            memory.refuse_recorded(
                operator, (*filled(arguments)[:-1], tuple(given) if operator.several else given[0]), True
            )
        if surroundings.forward_level() and any(map(_has_tangent, (*arguments, *outs.values()))):
            raise ValueError(f"{name}: out= cannot be used where a tensor has a tangent; drop out=")
        with torch._C._AutoDispatchBelowAutograd():
            return ops.out.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **outs)

    rules: list[tuple[Any, Any, Any, Any, Any]] = [
        (ops.forward, filled, possible, vjp_forward, jvp_forward),
        (ops.backward, tuple, always, vjp_backward, jvp_backward),
        (ops.jvp, tuple, always, vjp_jvp, second_forward),
        (ops.second, tuple, always, third, third),
    ]
    if ops.second is None:
        rules = [*rules[:1], (ops.backward, tuple, always, no_second, no_second)]
    if all(isinstance(t.dtypes, tuple) and "float" not in t.dtypes[0] for t in operator.results.values()):
        rules = []  # indices have no gradient
    for op, fill, check, vjp, jvp in rules:
        library.impl(op._opname, _kernel(op, fill, check, vjp, jvp), "Autograd", with_keyset=True)
    library.impl(f"{name}.out", no_out, "Autograd", with_keyset=True)


def _kernel(
    op: Any,
    fill: Callable[[Sequence[Any]], tuple[Any, ...]],
    check: Callable[[bool], None],
    vjp: Callable[..., Sequence[Any]],
    jvp: Callable[..., Sequence[Any]],
) -> Callable[..., Any]:
    """An operator at torch's autograd keys, with its derivatives on the current level of `torch.func` alone.

    check: raises where there is no derivative, given whether it is a forward one.
    """

    def below(keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def lowered(given: Any, *arguments: Any) -> Any:
        keyset, recorded = given
        if not _transformed():
            return below(keyset, *arguments)
        with _lower_levels(recorded):
            return below(keyset, *arguments)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        arguments = inputs[1:]
        tensors = [x if isinstance(x, torch.Tensor) else None for x in arguments]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in arguments]
        ctx.mark_non_differentiable(*(x for x in _each(output) if not x.is_floating_point()))

    def saved(ctx: Any) -> list[Any]:
        return [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]

    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, *vjp(saved(ctx), grads, ctx.needs_input_grad[1:]))

    def forward(ctx: Any, _: Any, *tangents: Any) -> Any:
        if not _transformed():
            return _listed(jvp(saved(ctx), tangents))
        primals = [_primal(x) for x in saved(ctx)]
        with _lower_levels(torch.is_grad_enabled()):
            return _listed(jvp(primals, tangents))

    functions: dict[str, Any] = {"forward": lowered, "setup_context": setup, "backward": backward, "jvp": forward}
    derivative = type(op._opname, (_SingleLevelFunction,), {key: staticmethod(f) for key, f in functions.items()})

    def kernel(keyset: Any, *arguments: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        moving = surroundings.forward_level() and torch._C._is_fwd_grad_enabled() and any(map(_has_tangent, arguments))
        if not (recorded or moving):
            return below(keyset, *arguments)
        for forward in [False] * recorded + [True] * moving:
            check(forward)
        given = (keyset, torch.is_grad_enabled())
        if not _transformed():
            return derivative.apply(given, *fill(arguments))  # type: ignore[attr-defined]
        with enable_single_level_autograd_function():
            return derivative.apply(given, *fill(arguments))  # type: ignore[attr-defined]

    return kernel


def differentiable(operator: Operator) -> bool:
    """Whether torch's kernel has a backward: all other derivatives are made of it."""
    try:
        return registry.find(operator.name, "torch").backward is not None
    except Unsupported:
        return False


def _other_backward(operator: Operator) -> bool:
    """Whether a backend has a backward of its own, where torch has none."""
    for name in registry.backend_names():
        try:
            if registry.find(operator.name, name).backward is not None:
                return True
        except Unsupported:
            continue
    return False


def _whole(operator: Operator, inputs: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """Gradients of all results, zero where autograd has none."""
    if all(grad is not None for grad in grads):
        return list(grads)
    bound, like = operator.bind((*inputs, None)), operator.like(inputs)
    return [
        torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device) if grad is None else grad
        for grad, shape, dtype in zip(grads, bound.shapes, bound.results, strict=True)
    ]


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def _lower_levels(recorded: bool) -> Iterator[None]:
    """Autograd turns its modes off for this level of `torch.func`, not for those below it."""
    with torch.set_grad_enabled(recorded), forward_ad._set_fwd_grad_enabled(True):
        yield


def _primal(x: Any) -> Any:
    """A tensor without the tangent of this level."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and surroundings.tangent(x) is not None


def _float(x: Any) -> bool:
    return x is not None and x.is_floating_point()


def _each(found: Any) -> Sequence[Any]:
    return found if isinstance(found, (tuple, list)) else (found,)


def _listed(found: Sequence[Any]) -> Any:
    return tuple(found) if len(found) > 1 else found[0]
