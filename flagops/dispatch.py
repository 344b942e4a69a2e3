"""Picks a kernel for a call and can always say why.

A call whose dtypes, shapes, strides and devices were seen before runs a remembered plan; otherwise the operator binds
and validates the arguments, and the backends are asked in order. Choices and refusals are counted, and logged once.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flagops.calls.surroundings as surroundings
from flagops import arrays, config, order, registry
from flagops.calls import generated, memory
from flagops.calls.memory import Span
from flagops.calls.replay import Place, Replay
from flagops.errors import Unsupported

if TYPE_CHECKING:
    from flagops.operator import Bound, Operator

log = logging.getLogger("flagops")

_PLAIN = frozenset((type(None), bool, int, float, str))

_PLANS_KEPT = 4096
_plans: dict[Any, Plan] = {}
_finished: Counter[tuple[str, str]] = Counter()
_refused: Counter[tuple[str, str, str]] = Counter()
_logged: set[tuple[str, ...]] = set()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not inherit it from a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@dataclass(eq=False, slots=True)
class Plan:
    """A kernel chosen for all calls of one signature; `run` takes the clean arguments, ``out`` last."""

    operator: Operator
    backend: str
    kernel: registry.Kernel
    bound: Bound
    run: Callable[..., None]
    views: tuple[int, ...]
    copies: tuple[int, ...]
    as_given: bool
    places: tuple[Place, ...] | None
    spans: tuple[Span, ...]
    out_spans: tuple[Span, ...]
    makers: tuple[Callable[[], Any], ...]
    on_torch: bool
    above: bool
    through_torch: bool
    wish: str
    check_values: bool
    forwards_to: str
    refusals: dict[str, str]
    calls: int = field(default=0)
    ready: Callable[[Sequence[Any]], bool] = field(init=False)
    replay: Replay = field(init=False)

    def __post_init__(self) -> None:
        self.ready = self._ready
        clean = _as_given if self.as_given else self.clean
        self.replay = Replay(registry.backend(self.backend), self.run, clean, self.places)

    def _ready(self, args: Sequence[Any]) -> bool:
        """What `ready` is until it is asked for the first time."""
        self.ready = memory.ready_for(self.operator, args, self.spans, self.out_spans)
        return self.ready(args)

    def clean(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as kernels get them: normalised scalars, one-byte formats as uint8 codes, no neg bit, and what
        the backend's library misreads copied."""
        clean = list(args)
        for position in self.copies:
            clean[position] = arrays.compact(clean[position])
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


class Unfamiliar(Exception):
    """A tensor of a class of its own, whose attributes may be computed by it."""


familiar: set[type] = set()
"""The classes of arrays whose attributes are theirs, and of what is no array, once they were met."""


def _meet(kind: type) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(kind, torch.Tensor) and kind not in (torch.Tensor, torch.nn.Parameter):
        raise Unfamiliar(kind)
    familiar.add(kind)


def _signature(x: Any) -> Any:
    """What a plan may depend on; cheap, since every call computes it."""
    kind = type(x)
    if kind not in familiar:
        _meet(kind)
    try:
        if x.is_cpu:  # a device takes longer to hash than to ask for
            return kind, x.dtype, x.shape, x.stride(), x.requires_grad, x.is_neg()
        return kind, x.dtype, x.shape, x.stride(), x.requires_grad, x.is_neg(), x.device
    except (AttributeError, RuntimeError):  # no tensor, or one without strides
        if arrays.is_numpy(x):
            return kind, x.dtype, x.shape, x.strides, x.flags.writeable, x.flags.aligned
        return tuple(map(_signature, x)) if isinstance(x, (tuple, list)) else x


def plan(
    operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None = None, grad: bool | None = None
) -> Plan:
    """The plan for a call with all arguments by position (``out`` last, or None).

    grad: whether autograd records, for a call above torch's dispatcher; None below it, where every call is a
    computation. Raises ValueError or TypeError for arguments that do not fit, and Unsupported, with every backend's
    reason, when none can run the call.
    """
    if grad is not None and "torch" in sys.modules and surroundings.overseen() and on_torch(operator, args):
        return _choose(operator, args, _wished(backend), grad, {}, overseen=True)
    try:
        return look_up(operator, args, backend, grad)
    except Unfamiliar:
        return _choose(operator, args, _wished(backend), grad, {})


def look_up(
    operator: Operator, args: Sequence[Any], backend: str | Sequence[str] | None = None, grad: bool | None = None
) -> Plan:
    """`plan` where nothing that oversees calls is active: remembered by what the arguments look like.

    Raises `Unfamiliar` for a tensor of a class of its own.
    """
    wish = backend if type(backend) is str else _wished(backend)
    try:
        key = _key(operator, "torch" in sys.modules)(wish, grad, *args)
        return _plans[key]
    except KeyError:
        pass
    except (TypeError, RuntimeError):  # an unhashable argument, a tensor without strides: binding says what is wrong
        return _choose(operator, args, wish, grad, {})
    return _remember(key, _choose(operator, args, wish, grad, {}))


@functools.cache
def _key(operator: Operator, with_torch: bool) -> Callable[..., tuple[Any, ...]]:
    """What makes the key of a plan, ``key(wish, grad, *args)``: `_signature` of each argument, written out for tensors.

    A device takes longer to hash than to ask for; whoever keeps elements elsewhere has another type.
    """
    names: dict[str, Any] = {"name": operator.name, "plain": _PLAIN, "signature": _signature}
    tensors = set(operator.tensor_positions) if with_torch else set()
    if with_torch:
        names["Tensor"] = sys.modules["torch"].Tensor
    parameters, facts = [f"x{i}" for i in range(len(operator.parameters))], []
    for i, x in enumerate(parameters):
        other = f"{x} if type({x}) in plain else signature({x})"
        if i in tensors or (with_torch and i == len(parameters) - 1):
            own = f"{x}.dtype, {x}.shape, {x}.stride(), {x}.requires_grad, {x}.is_neg()"
            other = f"({own}) if type({x}) is Tensor and {x}.is_cpu else {other}"
        facts.append(other)
    source = f"def key(wish, grad, {', '.join(parameters)}):\n    return name, wish, grad, {', '.join(facts)}\n"
    return generated.function(source, operator.name, names)


def _wished(backend: str | Sequence[str] | None) -> str | tuple[str, ...]:
    """One backend by name, or the first that works of several; of all in the default order if there are none."""
    if backend is None:
        return config.current().backend
    return backend if isinstance(backend, str) else tuple(backend)


def wish(backend: str | Sequence[str] | None) -> str:
    """The backends wished for here and now as `torch.ops.flagops` takes them: names by comma."""
    wished = _wished(backend)
    return wished if isinstance(wished, str) else ",".join(wished)


def on_torch(operator: Operator, args: Sequence[Any]) -> bool:
    """Whether a call computes with torch tensors."""
    return any(arrays.is_torch(args[position]) for position in operator.tensor_positions)


def execute(plan: Plan, args: Sequence[Any]) -> tuple[Any, str]:
    """Run a plan on the arguments it was made for; returns ``out``, allocated if None, and the backend that ran.

    Raises `Elsewhere` for tensors whose elements torch's dispatcher has to find.
    """
    operator, out = plan.operator, args[-1]
    written: Sequence[Any] = operator.each(out) if plan.on_torch and out is not None else ()
    if not plan.ready(args):
        written = _look_closer(plan, args, written)
    if plan.check_values and operator.values:
        problem = operator.values(*args[:-1])
        if problem:
            raise ValueError(f"{operator.name}: {problem}")
    held, replay = args, plan.replay
    if out is None:
        out = tuple([make() for make in plan.makers]) if operator.several else plan.makers[0]()
        held = (*args[:-1], out)
    try:
        (replay.known.get(replay.environment()) or replay.first)(held)
    except Unsupported as error:
        return execute(_without(plan, args, str(error)), args)
    if written:  # kernels that write by address cannot tell autograd
        sys.modules["torch"]._C._increment_version(written)
    plan.calls += 1
    return out, plan.backend


class Elsewhere(Exception):
    """A call is for torch's dispatcher: a tensor keeps its elements where no address points."""


def _look_closer(plan: Plan, args: Sequence[Any], outs: Sequence[Any]) -> Sequence[Any]:
    """Raises what stands against a call that is not ready to run; returns those of its outs that count versions.

    A tensor that has no elements to point at is for torch's dispatcher, which finds them, or for nobody.
    """
    operator = plan.operator
    reasons = {operator.parameters[p]: surroundings.without_memory(args[p]) for p, *_ in plan.spans}
    counted = [out for out in outs if not out.is_inference()]
    for out in outs:
        reasons["out"] = reasons.get("out") or surroundings.unwritable(out)
    for argument, reason in reasons.items():
        if plan.above and reason == surroundings.ELSEWHERE:
            raise Elsewhere
        if reason:
            raise ValueError(f"{operator.name}: {argument} is {reason}")
    if args[-1] is not None:
        memory.refuse_overlap(plan.on_torch, operator, args, plan.spans, plan.out_spans)
    return counted


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


def _choose(
    operator: Operator,
    args: Sequence[Any],
    wish: Any,
    grad: bool | None,
    refusals: dict[str, str],
    overseen: bool = False,
) -> Plan:
    settings = config.current()
    bound = operator.bind(args)
    tensors = {operator.parameters[p]: args[p] for p in operator.tensor_positions if args[p] is not None}
    outs = () if args[-1] is None else operator.each(args[-1])
    present = tensors | dict(zip(operator.results, outs, strict=False))
    placed = {n: x for n, x in present.items() if not (operator.aten and arrays.is_number(x))} or present
    first = next(iter(placed.values()))
    wrapped = overseen or any(surroundings.is_wrapper(x) for x in (*tensors.values(), *outs) if arrays.is_torch(x))
    if any(out.is_neg() for out in outs if arrays.is_torch(out)):
        if grad is None:
            raise Unsupported(f"{operator.name}: the memory of out holds the opposite sign")
        wrapped = True
    needs_grad = bool(grad) and any(getattr(x, "requires_grad", False) for x in tensors.values())
    needs_grad = needs_grad and any("float" in dtype for dtype in bound.results)  # indices have no gradient
    memory.refuse_recorded(operator, args, grad)
    explicit = isinstance(wish, str)
    candidates = (wish,) if explicit else wish or order.order(operator, bound.dtype, bound.shapes[0], first)
    refusals = dict(refusals)
    for name in candidates:
        if name in refusals:
            continue
        try:
            kernel = _supported(operator, name, args, placed, needs_grad, wrapped)
        except Unsupported as reason:
            refusals[name] = str(reason)
            _refused[operator.name, name, str(reason)] += 1
            _log_once(logging.DEBUG, operator.name, f"{name} refused", str(reason))
            continue
        _log_once(logging.INFO, operator.name, f"{name} runs", f"{bound.dtype}")
        on_cpu = not arrays.is_torch(first) or first.device.type == "cpu"
        spans = () if wrapped else memory.spans(operator, args)
        views, misreads = _views(operator, args), getattr(registry.backend(name), "misreads", None)
        copies = tuple(operator.positions[n] for n, x in tensors.items() if misreads and not wrapped and misreads(x))
        out_spans = memory.out_spans(operator, args) if outs and not wrapped else ()
        return Plan(
            operator=operator,
            backend=name,
            kernel=kernel,
            bound=bound,
            run=kernel.function,
            views=views,
            copies=copies,
            as_given=not (views or copies or bound.scalars or operator.coded_results),
            places=None if wrapped else _places(operator, args),
            spans=spans,
            out_spans=out_spans,
            makers=tuple(arrays.maker(*each, first) for each in zip(bound.shapes, bound.results, strict=True)),
            on_torch=arrays.is_torch(first),
            above=grad is not None,
            through_torch=grad is not None and (wrapped or needs_grad),
            wish=",".join(candidates if wrapped else candidates[candidates.index(name) :]),
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
    placed: Mapping[str, Any],
    needs_grad: bool,
    wrapped: bool,
) -> registry.Kernel:
    kernel = registry.find(operator.name, name)
    if not wrapped:
        for argument, x in placed.items():
            reason = registry.refusal(name, x)
            if reason:
                raise Unsupported(f"{argument}: {reason}")
    reason = kernel.unsupported(*args[:-1]) if kernel.unsupported else None
    if reason:
        raise Unsupported(reason)
    if needs_grad and not operator.aten:
        backward(operator, kernel)
    return kernel


def backward(operator: Operator, kernel: registry.Kernel) -> Callable[..., tuple[Any, ...]]:
    """The kernel's own backward, or torch's, which also takes what that leaves by giving NotImplemented.

    Raises Unsupported if the operator has neither.
    """
    own = kernel.backward
    if own is None:
        return surroundings.uncast(_torchs(operator))

    def first(*args: Any) -> tuple[Any, ...]:
        found = own(*args)
        return _torchs(operator)(*args) if found is NotImplemented else found

    return surroundings.uncast(first)


def _torchs(operator: Operator) -> Callable[..., tuple[Any, ...]]:
    found = registry.find(operator.name, "torch").backward
    if found is None:
        raise Unsupported(f"{operator.name} has no backward; call it under torch.no_grad() or detach its inputs")
    return found


def _places(operator: Operator, args: Sequence[Any]) -> tuple[Place, ...] | None:
    """Where the tensors of a call lie in memory that is its own; None where there are arrays or negated views."""
    present = [p for p in sorted(operator.tensor_positions) if args[p] is not None]
    if any(not arrays.is_torch(args[p]) or args[p].is_neg() for p in present):
        return None
    last = len(args) - 1
    outs = [(last, i) for i in range(len(operator.results))] if operator.several else [(last,)]
    return tuple([(path, 0) for path in (*((p,) for p in present), *outs)])


def _as_given(args: Sequence[Any]) -> Sequence[Any]:
    return args


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
