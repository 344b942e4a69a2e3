"""Picks a kernel for a call and can always say why.

A call whose dtypes, shapes, strides and devices were seen before runs a remembered plan; otherwise the operator binds
and validates the arguments, and the backends are asked in order. Choices and refusals are counted, and logged once.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import arrays, config, registry
from flagops.errors import Unsupported

if TYPE_CHECKING:
    from flagops.operator import Bound, Operator

log = logging.getLogger("flagops")

_data_ptr = methodcaller("data_ptr")
_PLAIN = frozenset((type(None), bool, int, float, str))

_PLANS_KEPT = 4096
_plans: dict[Any, Plan] = {}
_finished: Counter[tuple[str, str]] = Counter()
_refused: Counter[tuple[str, str, str]] = Counter()
_logged: set[tuple[str, ...]] = set()
_lock = threading.Lock()


@dataclass(eq=False, slots=True)
class Plan:
    """A kernel chosen for all calls of one signature; `run` takes the clean arguments, ``out`` last."""

    operator: Operator
    backend: str
    kernel: registry.Kernel
    bound: Bound
    run: Callable[..., None]
    views: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]
    out_spans: tuple[tuple[int, int, int], ...]
    makers: tuple[Callable[[], Any], ...]
    on_torch: bool
    through_torch: bool
    check_values: bool
    forwards_to: str
    refusals: dict[str, str]
    calls: int = field(default=0)

    def clean(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as kernels get them: normalised scalars, one-byte formats as uint8 codes, no neg bit."""
        clean = list(args)
        for position, value in zip(self.operator.scalar_positions, self.bound.scalars, strict=True):
            clean[position] = value
        for position in self.views:
            x = clean[position]
            clean[position] = arrays.codes(x.resolve_neg() if arrays.is_torch(x) else x)
        coded = self.operator.coded_results
        if coded and clean[-1] is not None:
            outs = [arrays.codes(x) if i in coded else x for i, x in enumerate(self.operator.each(clean[-1]))]
            clean[-1] = tuple(outs) if self.operator.several else outs[0]
        return clean


def public(operator: Operator) -> Callable[..., Any]:
    """The function that users call: the reference's name and documentation, with ``out=`` and ``backend=``."""
    arity = len(operator.parameters)

    def call(*args: Any, backend: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            from flagops import torch_ops

            return torch_ops.invoke(operator, operator.fill(args, kwargs), backend)
        if kwargs or len(args) != arity:
            args = operator.fill(args, kwargs)
        grad = torch is not None and (
            torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
        )
        return execute(plan(operator, args, backend, grad), args)

    call.__name__ = call.__qualname__ = operator.name
    call.__module__ = "flagops"
    call.__doc__ = operator.reference.__doc__
    parameters = list(operator.signature.parameters.values())
    choice = type(parameters[0])("backend", type(parameters[0]).KEYWORD_ONLY, default=None)
    vars(call).update(operator=operator, __signature__=operator.signature.replace(parameters=[*parameters, choice]))
    return call


def _signature(x: Any) -> Any:
    """What a plan may depend on; cheap, since every call computes it."""
    if type(x) in _PLAIN:
        return x
    try:
        if x.is_cpu:  # a device takes longer to hash than to ask for
            return type(x), x.dtype, x.shape, x.stride(), x.requires_grad, x.is_neg()
        return type(x), x.dtype, x.shape, x.stride(), x.requires_grad, x.is_neg(), x.device
    except (AttributeError, RuntimeError):  # no tensor, or one without strides
        if arrays.is_numpy(x):
            return type(x), x.dtype, x.shape, x.strides, x.flags.writeable, x.flags.aligned
        return tuple(map(_signature, x)) if isinstance(x, (tuple, list)) else x


def plan(
    operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None = None, grad: Any = False
) -> Plan:
    """The plan for a call with all arguments by position (``out`` last, or None).

    grad: whether autograd may be recording; below it, pass False. Raises ValueError or TypeError for arguments that do
    not fit, and Unsupported, with every backend's reason, when none can run the call.
    """
    if backend is None:
        wish: Any = config.current().backend
    else:
        wish = backend if isinstance(backend, str) else tuple(backend)
    key = (operator.name, wish, grad, *[_signature(x) for x in args])
    try:
        return _plans[key]
    except KeyError:
        pass
    except TypeError:  # an unhashable argument: binding says what is wrong with it
        return _choose(operator, args, wish, grad, {})
    return _remember(key, _choose(operator, args, wish, grad, {}))


def execute(plan: Plan, args: Sequence[Any]) -> Any:
    """Run a plan on the arguments it was made for; returns ``out``, allocated if None."""
    operator = plan.operator
    if plan.through_torch:
        from flagops import torch_ops

        return torch_ops.invoke(operator, args, plan.backend)
    if plan.check_values and operator.values:
        problem = operator.values(*args[:-1])
        if problem:
            raise ValueError(f"{operator.name}: {problem}")
    out = args[-1]
    if out is None:
        out = tuple([make() for make in plan.makers]) if operator.several else plan.makers[0]()
        args = (*args[:-1], out)
    else:
        _refuse_overlap(plan, args)
    try:
        if plan.views or plan.bound.scalars or operator.coded_results:
            plan.run(*plan.clean(args))
        else:
            plan.run(*args)
    except Unsupported as error:
        return execute(_without(plan, args, str(error)), args)
    plan.calls += 1
    return out


def _refuse_overlap(plan: Plan, args: Sequence[Any]) -> None:
    """Results may share no memory with an input, but for the very tensor that the card lets them take the place of."""
    address = _data_ptr if plan.on_torch else arrays.address
    operator = plan.operator
    taken: list[tuple[int, int]] = []
    for out, (same, low, high) in zip(operator.each(args[-1]), plan.out_spans, strict=False):
        origin = address(out)
        start, stop = origin + low, origin + high
        for position, first, last in plan.spans:
            there = address(args[position])
            if there + first < stop and start < there + last and not (position == same and there == origin):
                raise ValueError(f"{operator.name}: out shares memory with {operator.parameters[position]}")
        if taken and any(first < stop and start < last for first, last in taken):
            raise ValueError(f"{operator.name}: results share memory with each other")
        taken.append((start, stop))


def _without(plan: Plan, args: Sequence[Any], reason: str) -> Plan:
    """The next choice after a kernel refused while it ran."""
    for key, known in list(_plans.items()):
        if known is plan:
            refusals = plan.refusals | {plan.backend: reason}
            return _remember(key, _choose(plan.operator, args, key[1], key[2], refusals))
    raise Unsupported(f"{plan.operator.name}: {plan.backend}: {reason}")


def _remember(key: Any, plan: Plan) -> Plan:
    with _lock:
        if len(_plans) >= _PLANS_KEPT:
            _finished.update(_running())
            _plans.clear()
        old = _plans.get(key)
        if old is not None:
            _finished[old.operator.name, old.backend] += old.calls
        _plans[key] = plan
    return plan


def _running() -> Counter[tuple[str, str]]:
    calls: Counter[tuple[str, str]] = Counter()
    for plan in list(_plans.values()):
        calls[plan.operator.name, plan.backend] += plan.calls
    return calls


def coverage(operator: str | None = None) -> dict[str, dict[str, Any]]:
    """Which kernels ran and which were refused, by operator: ``{"matmul": {"calls": {...}, "refused": {...}}}``."""
    seen: dict[str, dict[str, Any]] = {}
    for (name, backend), calls in (_finished + _running()).items():
        seen.setdefault(name, {"calls": {}, "refused": {}})["calls"][backend] = calls
    for (name, backend, reason), times in _refused.items():
        seen.setdefault(name, {"calls": {}, "refused": {}})["refused"].setdefault(backend, {})[reason] = times
    return seen if operator is None else seen.get(registry.operator(operator).name, {"calls": {}, "refused": {}})


def _choose(operator: Operator, args: Sequence[Any], wish: Any, grad: bool, refusals: dict[str, str]) -> Plan:
    settings = config.current()
    bound = operator.bind(args)
    tensors = {operator.parameters[p]: args[p] for p in operator.tensor_positions if args[p] is not None}
    torch = sys.modules.get("torch")
    wrapped = torch is not None and torch._C._functorch.peek_interpreter_stack() is not None
    wrapped = wrapped or any(_is_wrapper(x) for x in tensors.values())
    needs_grad = grad and any(getattr(x, "requires_grad", False) for x in tensors.values())
    if needs_grad and args[-1] is not None:
        raise ValueError(f"{operator.name}: out= cannot be used where a gradient is recorded; drop out= or use no_grad")
    explicit = isinstance(wish, str)
    candidates = (wish,) if explicit else wish or default_order(operator, bound, next(iter(tensors.values())))
    refusals = dict(refusals)
    for name in candidates:
        if name in refusals:
            continue
        try:
            kernel = _supported(operator, name, args, tensors, needs_grad, wrapped)
        except Unsupported as reason:
            refusals[name] = str(reason)
            _refused[operator.name, name, str(reason)] += 1
            _log_once(logging.DEBUG, operator.name, f"{name} refused", str(reason))
            continue
        _log_once(logging.INFO, operator.name, f"{name} runs", f"{bound.dtype}")
        first = next(iter(tensors.values()))
        on_cpu = not arrays.is_torch(first) or first.device.type == "cpu"
        return Plan(
            operator=operator,
            backend=name,
            kernel=kernel,
            bound=bound,
            run=kernel.function,
            views=_views(operator, args),
            spans=tuple(
                (p, *arrays.span(args[p])) for p in operator.tensor_positions if not wrapped and args[p] is not None
            ),
            out_spans=_out_spans(operator, args) if not wrapped and args[-1] is not None else (),
            makers=tuple(arrays.maker(*each, first) for each in zip(bound.shapes, bound.results, strict=True)),
            on_torch=arrays.is_torch(first),
            through_torch=wrapped or needs_grad,
            check_values=operator.values is not None and (on_cpu or settings.check),
            forwards_to=kernel.forwards_to(*args[:-1]) if callable(kernel.forwards_to) else kernel.forwards_to,
            refusals=refusals,
        )
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in refusals.items())
    raise Unsupported(f"{operator.name}: no backend can run this call:{reasons}")


def _supported(
    operator: Operator,
    name: str,
    args: Sequence[Any],
    tensors: Mapping[str, Any],
    needs_grad: bool,
    wrapped: bool,
) -> registry.Kernel:
    kernel = registry.find(operator.name, name)
    if not wrapped:
        outs = () if args[-1] is None else operator.each(args[-1])
        for argument, x in (*tensors.items(), *zip(operator.results, outs, strict=False)):
            reason = registry.backend(name).refuses(x)
            if reason:
                raise Unsupported(f"{argument}: {reason}")
    reason = kernel.unsupported(*args[:-1]) if kernel.unsupported else None
    if reason:
        raise Unsupported(reason)
    if needs_grad:
        backward(operator, kernel)
    return kernel


def backward(operator: Operator, kernel: registry.Kernel) -> Callable[..., tuple[Any, ...]]:
    """The kernel's own backward or torch's. Raises Unsupported if the operator has neither."""
    found = kernel.backward or registry.find(operator.name, "torch").backward
    if found is None:
        raise Unsupported(f"{operator.name} has no backward; call it under torch.no_grad() or detach its inputs")
    return found


def _is_wrapper(x: Any) -> bool:
    """A tensor without memory of its own, such as FakeTensor or DTensor, or one on the meta device."""
    if not arrays.is_torch(x):
        return False
    torch = sys.modules["torch"]
    return x.device.type == "meta" or type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _out_spans(operator: Operator, args: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """For each result the position of the input it may be, -1 if none, and the bytes it spans."""

    def steps(x: Any) -> Any:
        return x.stride() if arrays.is_torch(x) else x.strides

    spans = []
    for out, same in zip(operator.each(args[-1]), operator.aliases, strict=True):
        like = (
            same >= 0 and args[same] is not None and args[same].shape == out.shape and steps(args[same]) == steps(out)
        )
        spans.append((same if like else -1, *arrays.span(out)))
    return tuple(spans)


def _views(operator: Operator, args: Sequence[Any]) -> tuple[int, ...]:
    coded = {operator.positions[name] for name, tensor in operator.tensors.items() if tensor.codes}
    present = [p for p in operator.tensor_positions if args[p] is not None]
    return tuple(
        p
        for p in present
        if (p in coded and arrays.codes(args[p]) is not args[p]) or (arrays.is_torch(args[p]) and args[p].is_neg())
    )


def _log_once(level: int, *event: str) -> None:
    if event not in _logged:
        _logged.add(event)
        log.log(level, "%s: %s (%s)", *event)


@functools.cache
def _order_table() -> Mapping[str, Mapping[str, Sequence[str]]]:
    table = json.loads((Path(__file__).parent / "order.json").read_text())
    return table


def _order_row(x: Any) -> Mapping[str, Sequence[str]]:
    rows = _order_table()
    return rows.get(arrays.device_class(x)) or rows["other"]


def left_to_torch(operator: str, x: Any, training: bool = False) -> bool:
    """Whether `flagops.enable` leaves an operator's calls to torch where no backend is named: measured as faster.

    training: whether a gradient is recorded, so that the backward counts as well.
    """
    row = _order_row(x).get("left to torch", ())
    return f"{operator}.{arrays.dtype_name(x)}" in row or (training and f"{operator}.training" in row)


def default_order(operator: Operator, bound: Bound, x: Any) -> tuple[str, ...]:
    """Backends from the measured table for the device class, then the others, the reference last."""
    row = _order_row(x)
    listed = row.get(f"{operator.name}.{bound.dtype}") or row.get(operator.name) or row["*"]
    others = [name for name in registry.backend_names() if name not in listed and name not in registry.BUILT_IN]
    return (*others, *listed)
