"""``torch.ops.flagops.*`` from the cards: schema, shapes for tracing, and gradients.

Eager calls without gradients never come here; `torch.compile`, autograd and tensor subclasses do. Importing this module
defines every operator, so a compiled graph may name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flagops import arrays, dispatch, registry
from flagops.operator import Operator

_library: Any = torch.library.Library("flagops", "DEF")  # type: ignore[no-untyped-call]


def invoke(operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None) -> Any:
    """Call an operator with all arguments by position through ``torch.ops.flagops``."""
    *inputs, out = args
    inputs = [
        operator.scalars[name].parse(x) if name in operator.scalars else x
        for name, x in zip(operator.inputs, inputs, strict=True)
    ]
    wish = "" if backend is None else backend if isinstance(backend, str) else ",".join(backend)
    result = getattr(torch.ops.flagops, operator.name).default(*inputs, wish)
    if out is None:
        return result
    for place, one in zip(operator.each(out), operator.each(result), strict=True):
        place.copy_(one)
    return out


def schema(operator: Operator) -> str:
    """The operator's torch schema: its inputs, then the backends wished for, by comma."""
    words = []
    for name, parameter in operator.signature.parameters.items():
        if name in operator.tensors:
            words.append(f"Tensor{'?' if operator.tensors[name].optional else ''} {name}")
        elif name in operator.scalars:
            words.append(f"{operator.scalars[name].torch} {name}")
        if isinstance(parameter.default, str):
            words[-1] += f'="{parameter.default}"'
        elif isinstance(parameter.default, tuple):
            words[-1] += f"={list(parameter.default)}"
        elif name in operator.inputs and (parameter.default is None or isinstance(parameter.default, (int, float))):
            words[-1] += f"={parameter.default}"
    results = f"({', '.join(['Tensor'] * len(operator.results))})" if operator.several else "Tensor"
    return f"({', '.join(words)}, str backend='') -> {results}"


def _wish(backend: str) -> str | tuple[str, ...] | None:
    parts = tuple(backend.split(","))
    return (parts if len(parts) > 1 else parts[0]) if backend else None


def _split(operator: Operator, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], str]:
    """The inputs and the backends wished for; torch leaves out trailing arguments that have their default."""
    arity = len(operator.inputs)
    backend = arguments[arity] if len(arguments) > arity else ""
    return operator.fill(tuple(arguments[:arity]), {})[:-1], backend


def _tensors(operator: Operator, inputs: Sequence[Any]) -> list[Any]:
    return [inputs[position] for position in operator.tensor_positions]


def _define(operator: Operator) -> None:
    name = operator.name

    def run(*arguments: Any) -> Any:
        inputs, backend = _split(operator, arguments)
        args = (*inputs, None)
        return dispatch.execute(dispatch.plan(operator, args, _wish(backend)), args)

    def fake(*arguments: Any) -> Any:
        inputs, _ = _split(operator, arguments)
        bound, like = operator.bind((*inputs, None)), _tensors(operator, inputs)[0]
        made = [arrays.empty(*result, like) for result in zip(bound.shapes, bound.results, strict=True)]
        return tuple(made) if operator.several else made[0]

    def run_backward(grad: Any, *arguments: Any) -> list[Any]:
        *inputs, needs, backend = arguments
        chosen = dispatch.plan(operator, (*inputs, None), _wish(backend))
        backward = dispatch.backward(operator, chosen.kernel)
        grads = backward(tuple(grad) if operator.several else grad, *chosen.clean((*inputs, None))[:-1], tuple(needs))
        return [
            _nothing(grad) if gradient is None else gradient.to(x.dtype)
            for gradient, x in zip(grads, _tensors(operator, inputs), strict=True)
        ]

    def fake_backward(grad: Any, *arguments: Any) -> list[Any]:
        *inputs, needs, _ = arguments
        present = zip(_tensors(operator, inputs), needs, strict=True)
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else _nothing(grad) for x, n in present]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs, ctx.backend = _split(operator, inputs)
        tensors = _tensors(operator, inputs)
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.needs = [x is not None and x.is_floating_point() and x.requires_grad for x in tensors]

    def differentiate(ctx: Any, *grad: Any) -> tuple[Any, ...]:
        inputs = list(ctx.others)
        for position, x in zip(operator.tensor_positions, ctx.saved_tensors, strict=True):
            inputs[position] = x
        grads = getattr(torch.ops.flagops, f"{name}_backward").default(
            list(grad) if operator.several else grad[0], *inputs, ctx.needs, ctx.backend
        )
        result: list[Any] = [None] * (len(inputs) + 1)
        for position, gradient, needed in zip(operator.tensor_positions, grads, ctx.needs, strict=True):
            result[position] = gradient if needed else None
        return tuple(result)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"flagops.{name} has no second derivative")

    text = schema(operator)
    inner = text[1:].rpartition(", str backend")[0]
    _library.define(name + text)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flagops::{name}", fake, lib=_library)
    grad = "Tensor[] grad" if operator.several else "Tensor grad"
    _library.define(f"{name}_backward({grad}, {_without_defaults(inner)}, bool[] needs, str backend) -> Tensor[]")
    _library.impl(f"{name}_backward", run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flagops::{name}_backward", fake_backward, lib=_library)
    torch.library.register_autograd(f"flagops::{name}", differentiate, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"flagops::{name}_backward", refuse, lib=_library)


def _nothing(grad: Any) -> Any:
    """Stands for a gradient that nobody asked for: an operator's list of tensors holds no None."""
    return (grad[0] if isinstance(grad, (list, tuple)) else grad).new_empty(0)


def _without_defaults(words: str) -> str:
    return ", ".join(word.partition("=")[0] for word in words.split(", ") if " " in word)


for _operator in registry.operators().values():
    _define(_operator)
