"""``torch.ops.flagops.*`` from the cards: schema, shapes for tracing, derivatives, batches, and FLOPs.

Eager calls of plain tensors without gradients never come here; `torch.compile`, autograd, transforms, modes and tensor
subclasses do. Importing this module defines every operator, so a compiled graph may name them. Beside operator ``f``
stand ``f.out`` and ``f_backward``, and where torch's kernel has a backward ``f_jvp`` and ``f_second``.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter

from flagops import arrays, dispatch, registry
from flagops.calls import batching, derivatives, memory, surroundings
from flagops.errors import Unsupported
from flagops.operator import Operator

_library: Any = torch.library.Library("flagops", "DEF")  # type: ignore[no-untyped-call]


class _Ran(threading.local):
    backend = ""
    """Who ran last below torch's dispatcher in this thread."""


_ran = _Ran()


def invoke(operator: Operator, args: Sequence[Any], wish: str, known: bool = False) -> tuple[Any, str]:
    """A call with all arguments by position through ``torch.ops.flagops``, and the backend that ran, "" if none did.

    wish: the backends wished for, by comma. known: whether the arguments are known to fit.
    """
    if not known:
        with surroundings.unseen():
            operator.bind(args)
            if args[-1] is not None:
                memory.refuse_out(operator, args)
    if operator.aten:
        raise Unsupported(
            f"{operator.name} computes values of plain tensors alone; for gradients, transforms and modes call torch's "
            "own operator under flagops.enable()"
        )
    *inputs, out = args
    _ran.backend = ""
    result = getattr(torch.ops.flagops, operator.name).default(*_parsed(operator, inputs), wish)
    if out is None:
        return result, _ran.backend
    for place, one in zip(operator.each(out), operator.each(result), strict=True):
        place.copy_(one)
    return out, _ran.backend


def trace(operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None) -> Any:
    """`invoke` as `torch.compile` traces it: what eager calls check, the operator checks when the graph is made."""
    *inputs, out = args
    wish = "" if backend is None else backend if isinstance(backend, str) else ",".join(backend)
    name = getattr(torch.ops.flagops, operator.name)
    reals = [name for name, scalar in operator.scalars.items() if scalar.torch.startswith("float")]
    inputs = _parsed(operator, inputs, reals)  # symbols, which the operator parses
    if out is None:
        return name.default(*inputs, wish)
    outs = dict(zip(_out_names(operator), operator.each(out), strict=True))
    name.out(*inputs, wish, **outs)
    return out


@torch.compiler.disable(reason="flagops.aten has no operators of torch's for a graph")  # type: ignore[no-untyped-call, untyped-decorator]
def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """A call that ends the graph that `torch.compile` traces."""
    return function(*args)


def _parsed(operator: Operator, inputs: Sequence[Any], left: Sequence[str] = ()) -> list[Any]:
    return [
        operator.scalars[name].parse(x) if name in operator.scalars and name not in left else x
        for name, x in zip(operator.inputs, inputs, strict=True)
    ]


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
    return f"({', '.join(words)}, str backend='') -> {_tensors(len(operator.results))}"


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _out_names(operator: Operator) -> tuple[str, ...]:
    return tuple(f"out_{name}" for name in operator.results) if operator.several else ("out",)


def _wish(backend: str) -> str | tuple[str, ...] | None:
    parts = tuple(backend.split(","))
    return (parts if len(parts) > 1 else parts[0]) if backend else None


def _results(operator: Operator, found: Sequence[Any]) -> Any:
    return tuple(found) if operator.several else found[0]


def _define(operator: Operator) -> None:
    name, arity = operator.name, len(operator.inputs)
    inputs_of = operator.tensor_positions
    results, tensors = len(operator.results), len(inputs_of)

    def filled(arguments: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments; torch leaves out trailing ones that have their default."""
        backend = arguments[arity] if len(arguments) > arity else ""
        return (*operator.fill(tuple(arguments[:arity]), {})[:-1], backend)

    def run(*arguments: Any) -> Any:
        *inputs, backend = filled(arguments)
        args = (*inputs, None)
        result, _ran.backend = dispatch.execute(dispatch.plan(operator, args, _wish(backend)), args)
        return result

    def run_out(*arguments: Any, **outs: Any) -> None:
        *inputs, backend = filled(arguments)
        args = (*inputs, _results(operator, [outs[place] for place in _out_names(operator)]))
        dispatch.execute(dispatch.plan(operator, args, _wish(backend)), args)

    def run_backward(*arguments: Any) -> Any:
        grads, inputs, (needs, backend) = arguments[:results], arguments[results:-2], arguments[-2:]
        chosen = dispatch.plan(operator, (*inputs, None), _wish(backend))
        for argument, x in zip(("grad",) * results + operator.inputs, (*grads, *inputs), strict=True):
            if isinstance(x, torch.Tensor):
                memory.refuse_without_memory(operator, argument, x)
        backward = dispatch.backward(operator, chosen.kernel)
        found = backward(_results(operator, grads), *chosen.clean((*inputs, None))[:-1], tuple(needs))
        for position, gradient, need in zip(inputs_of, found, needs, strict=True):
            if need and gradient is None:
                raise NotImplementedError(f"{name}: {operator.inputs[position]} has no gradient here; detach it")
        return _listed([_fresh(g, x, grads) for g, x in zip(found, (inputs[p] for p in inputs_of), strict=True)])

    def run_jvp(*arguments: Any) -> Any:
        tangents, inputs = arguments[:tensors], arguments[tensors:]
        return _listed(derivatives.jvp(operator, tangents, inputs))

    def run_second(*arguments: Any) -> Any:
        weights, grads = arguments[:tensors], arguments[tensors : tensors + results]
        inputs, (needs, wants) = arguments[tensors + results : -2], arguments[-2:]
        return _listed(derivatives.second(operator, weights, grads, inputs, needs, wants))

    def fake(*arguments: Any) -> Any:
        *inputs, _ = filled(arguments)
        return _results(operator, _made(operator, inputs))

    def fake_out(*arguments: Any, **outs: Any) -> None:
        *inputs, _ = filled(arguments)
        args = (*inputs, _results(operator, [outs[place] for place in _out_names(operator)]))
        operator.bind(args)
        memory.refuse_traced_overlap(operator, args)

    def fake_backward(*arguments: Any) -> Any:
        inputs, needs = arguments[results:-2], arguments[-2]
        present = zip((inputs[p] for p in inputs_of), needs, strict=True)
        return _listed([_like(x) if need else derivatives.nothing(arguments[0]) for x, need in present])

    def fake_jvp(*arguments: Any) -> Any:
        made = _made(operator, arguments[tensors:])
        return _listed([x if x.is_floating_point() else derivatives.nothing(x) for x in made])

    def fake_second(*arguments: Any) -> Any:
        grads, inputs = arguments[tensors : tensors + results], arguments[tensors + results : -2]
        wanted = zip((*grads, *(inputs[p] for p in inputs_of)), arguments[-1], strict=True)
        return _listed([_like(x) if want else derivatives.nothing(grads[0]) for x, want in wanted])

    text = schema(operator)
    plain = ", ".join(w.partition("=")[0] for w in text[1:].rpartition(", str backend")[0].split(", ") if " " in w)
    grads = ", ".join(f"Tensor grad_{result}" for result in operator.results)
    each = [f"Tensor? of_{tensor}" for tensor in (operator.inputs[p] for p in inputs_of)]
    outs = ", ".join(f"Tensor({chr(97 + i)}!) {place}" for i, place in enumerate(_out_names(operator)))
    weights, both = ", ".join(each), f"{grads}, {plain}, bool[] needs"
    out_text = text.rpartition(") ->")[0]

    def add(suffix: str, signature: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
        _library.define(f"{name}{suffix}{signature}")
        _library.impl(name + suffix, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flagops::{name}{suffix}", shapes, lib=_library)
        packet = getattr(torch.ops.flagops, (name + suffix).removesuffix(".out"))
        return packet.out if suffix == ".out" else packet.default

    ops = derivatives.Ops(
        operator=operator,
        forward=add("", text, run, fake),
        out=add(".out", f"{out_text}, *, {outs}) -> ()", run_out, fake_out),
        backward=add("_backward", f"({both}, str backend) -> {_tensors(tensors)}", run_backward, fake_backward),
    )
    if derivatives.differentiable(operator):
        ops.jvp = add("_jvp", f"({weights}, {plain}) -> {_tensors(results)}", run_jvp, fake_jvp)
        every = _tensors(results + tensors)
        ops.second = add("_second", f"({weights}, {both}, bool[] wants) -> {every}", run_second, fake_second)
    derivatives.register(ops, filled, _library)
    batching.register(ops, filled, _library)
    _count_flops(ops, filled)


def _listed(found: Sequence[Any]) -> Any:
    return tuple(found) if len(found) > 1 else found[0]


def _made(operator: Operator, inputs: Sequence[Any]) -> list[Any]:
    """Results of the right shapes, for tracing."""
    bound = operator.bind((*inputs, None))
    like = operator.like(inputs)
    return [arrays.empty(*result, like) for result in zip(bound.shapes, bound.results, strict=True)]


def _like(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fresh(gradient: Any, x: Any, grads: Sequence[Any]) -> Any:
    """A gradient in the dtype of its tensor; an operator may not give back what it was given."""
    if gradient is None:
        return derivatives.nothing(grads[0])
    made = gradient.to(x.dtype).contiguous()
    return made.clone() if any(made is grad for grad in grads) else made


def _count_flops(ops: derivatives.Ops, filled: Callable[[Sequence[Any]], tuple[Any, ...]]) -> None:
    """Let `FlopCounterMode` count what the card says, a backward as once for each gradient up to two."""
    operator, results = ops.operator, len(ops.operator.results)

    def flops(inputs: Sequence[Any]) -> int:
        bound = operator.bind((*inputs, None))
        return int(operator.flops(bound.dims, bound.batch))

    def forward(*arguments: Any, out_val: Any = None, **_: Any) -> int:
        return flops(filled(arguments)[:-1])

    def backward(*arguments: Any, out_val: Any = None, **_: Any) -> int:
        return flops(arguments[results:-2]) * min(sum(arguments[-2]), 2)

    for op, formula in ((ops.forward, forward), (ops.backward, backward)):
        formula._get_raw = True  # type: ignore[attr-defined]  # the formula takes tensors, not shapes
        flop_counter.flop_registry[op.overloadpacket] = formula


def _tell_flop_counters() -> None:
    """A mode copies the table of formulas when it is made: those that were made before know ours from here."""
    ours = {packet: formula for packet, formula in flop_counter.flop_registry.items() if "flagops." in str(packet)}
    for counter in gc.get_referrers(flop_counter.FlopCounterMode):
        if isinstance(counter, flop_counter.FlopCounterMode):
            counter.flop_registry = ours | counter.flop_registry


for _operator in registry.operators().values():
    _define(_operator)
_tell_flop_counters()
