"""The road of a call that a user makes: straight to a kernel where it is a computation of its own, else to torch.

Autograd, compilers, transforms, dispatch modes and tensors that keep their elements elsewhere see one operator,
``torch.ops.flagops.<name>``; everything else skips torch's dispatcher.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import flagops.calls.surroundings as surroundings
import flagops.dispatch as dispatch

if TYPE_CHECKING:
    from flagops.operator import Operator


@cache
def of(operator: Operator) -> Callable[..., Any]:
    """The function that users call: the reference's name and documentation, with ``out=`` and ``backend=``."""
    most, defaults = len(operator.inputs), operator.defaults[:-1]

    def call(*args: Any, out: Any = None, backend: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        count = len(args)
        if kwargs or not operator.required <= count <= most:
            args = operator.fill(args, kwargs if out is None else kwargs | {"out": out})
        else:
            args = (*args, *defaults[count:], out)
        torch = sys.modules.get("torch")
        if torch is None:
            return dispatch.execute(dispatch.plan(operator, args, backend), args)[0]
        if torch.compiler.is_compiling():
            from flagops import torch_ops

            if operator.aten:
                return torch_ops.untraced(run, operator, args, backend)[0]
            return torch_ops.trace(operator, args, backend)
        return run(operator, args, backend)[0]

    call.__name__ = call.__qualname__ = operator.name
    call.__module__ = "flagops"
    call.__doc__ = operator.reference.__doc__
    parameters = list(operator.signature.parameters.values())
    choice = type(parameters[0])("backend", type(parameters[0]).KEYWORD_ONLY, default=None)
    vars(call).update(operator=operator, __signature__=operator.signature.replace(parameters=[*parameters, choice]))
    return call


def run(operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None = None) -> tuple[Any, str]:
    """A call above torch's dispatcher with all arguments by position, ``out`` last; torch is imported.

    Returns the result and the backend that ran, "" where torch's dispatcher made nobody compute.
    """
    overseen, recording = surroundings.probes()
    if overseen() and dispatch.on_torch(operator, args):
        return _through_torch(operator, args, dispatch.wish(backend))
    try:
        plan = dispatch.look_up(operator, args, backend, recording())
    except dispatch.Unfamiliar:
        return _run_subclass(operator, args, backend)
    if not plan.through_torch:
        try:
            return dispatch.execute(plan, args)
        except dispatch.Elsewhere:
            pass
    return _through_torch(operator, args, plan.wish, known=args[-1] is None)


def _through_torch(operator: Operator, args: Sequence[Any], wish: str, known: bool = False) -> tuple[Any, str]:
    from flagops import torch_ops

    return torch_ops.invoke(operator, args, wish, known)


def _run_subclass(operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None) -> tuple[Any, str]:
    """A tensor that keeps its elements goes to kernels as a plain one and gives results of its class, as in torch."""
    torch = sys.modules["torch"]
    outs = operator.each(args[-1]) if args[-1] is not None else ()
    tensors = [x for x in (*args[:-1], *outs) if isinstance(x, torch.Tensor)]
    with torch._C.DisableTorchFunctionSubclass():
        wrapped = any(map(surroundings.is_wrapper, tensors))
        if not wrapped:
            plain = [x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in args]
            result, ran = run(operator, plain, backend)
            if args[-1] is not None:
                return args[-1], ran
            kind = next(type(x) for x in tensors if type(x) not in dispatch.familiar)
            made = [x.as_subclass(kind) for x in operator.each(result)]
            return tuple(made) if operator.several else made[0], ran
    return _through_torch(operator, args, dispatch.wish(backend))
