"""What a lowering did, once, as a recipe that is replayed: a kernel, and each of its arguments as a view of the call's.

An argument that lies in the memory of no argument of the call was computed; then the call is lowered again each time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flagops import arrays, config, dispatch, machine, order, registry
from flagops.calls import memory, surroundings
from flagops.calls.replay import Replay

from . import fuel
from .destinations import AN_INPUT, ITSELF, SAID, deliver, overlaps_itself, refuse_other_dtypes, refuse_product, shared
from .forms import Form, Part, Spread, View, form_of
from .iteration import laid_out
from .lowering import REFUSED, Call, Lowered, Lowering, Pass, To

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("flagops")


@dataclass(frozen=True)
class Recipe:
    """``compute(args)`` makes the result of a call; `by` names operator and backend."""

    compute: Callable[[tuple[Any, ...]], Any]
    by: str


@dataclass(frozen=True)
class Below:
    """Torch's kernel for a call.

    exists: where there is none, what torch's shape function refuses is refused to the caller.
    whole: it does not consist of calls that meet us again.
    wanted: it may compute the call; a strict handle lets nobody.
    ask: calls it, None where it does not exist.
    """

    exists: bool
    whole: bool
    wanted: bool
    ask: Callable[[Sequence[Any]], Any] | None = None

    @property
    def alone(self) -> bool:
        """Whether nobody but us computes the call."""
        return not (self.exists and self.whole)


def record(form: Form, backend: Any, lowering: Lowering, args: tuple[Any, ...], below: Below) -> Recipe:
    """The recipe for calls like this one. Raises Pass or Unsupported with the reason why torch should take them."""
    if form.lists and not isinstance(form, Spread):
        return _recorded_spread(Spread(form, args), backend, lowering, args, below)
    given = form.given
    if given is None:
        return _recorded(form, backend, lowering, args, below)
    if lowering.into and form.arguments[given].is_out:

        def filled(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return form.with_default(args, "dtype", args[given].dtype)

        recipe = _recorded(form, backend, lowering, filled(args), below)
        return Recipe(lambda args: recipe.compute(filled(args)), recipe.by)
    if lowering.uniform and 0 in args[given].stride() and form.present(args) == [given]:

        def once(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*args[:given], _once(args[given]), *args[given + 1 :])

        own = _recorded(form, backend, lowering, once(args), below)
        return Recipe(lambda args: (own.compute(once(args)), args[given])[1], own.by)
    return _recorded(form, backend, lowering, args, below)


def _recorded_spread(form: Spread, backend: Any, lowering: Lowering, args: tuple[Any, ...], below: Below) -> Recipe:
    if not form.present(form.spread(args)):
        raise Pass(REFUSED)
    ask, spread = below.ask, form.spread
    below = replace(below, ask=ask and (lambda args: ask(form.packed(args))))
    recipe = record(form, backend, lowering, spread(args), below)
    return Recipe(lambda args: recipe.compute(spread(args)), recipe.by)


def _once(x: Tensor) -> Tensor:
    """A view without the elements that are repeated."""
    for axis, step in enumerate(x.stride()):
        x = x.narrow(axis, 0, min(x.shape[axis], 1)) if step == 0 else x
    return x


def _recorded(form: Form, backend: Any, lowering: Lowering, args: tuple[Any, ...], below: Below) -> Recipe:
    import torch

    tensors = [args[i] for i in form.present(args)]
    here = device_of(tensors)
    needs_grad = lowering.composite and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if lowering.composite and surroundings.forward_level():
        raise Pass("a level of forward-mode differentiation is open")
    written = None if form.given is None else args[form.given]
    for x in tensors:
        a_number = lowering.aten and is_number(x) and x is not written
        if x.layout != torch.strided or (x.device != here and not a_number):
            raise Pass("devices or layouts differ")
        if x.is_neg() or x.is_conj():
            raise Pass("a negated or conjugated view")
    choice = below.exists and below.wanted and not lowering.aten
    measured = choice and not (backend or config.current().backend)
    with torch.no_grad():
        if lowering.aten:
            _refuse_shared(form, args, lowering, below)
        make = _maker(form, lowering, args, here, below)
        roles = _apart(args, form)
        destination = make() if form.given is None else roles[form.given]
        if measured:
            backend = _taken(lowering.operator, destination, needs_grad)
        if form.given is not None:
            like = make()
            other = _unlike(args[form.given], like)
            if other and lowering.factors:
                alone = below.alone and here.type not in ("cpu", "cuda")  # where what torch composes it of refuses it
                refuse_product(form, args[form.given], like, other, alone)
                return _delivered(form, backend, lowering, args, below)
            if other and (below.alone or lowering.aten):
                refuse_other_dtypes(form, args, [like.dtype], below.ask if below.wanted else None)
                return _delivered(form, backend, lowering, args, below)
            if other:
                raise Pass(other)
            if any(args[i] is args[form.given] for i in form.places(lowering.factors)):
                return _delivered(form, backend, lowering, args, below)
        chosen: list[dispatch.Plan] = []

        def step(operator: str, *values: Any, out: Tensor) -> None:
            chosen.append(choose(operator, (*values, out), backend, below))

        to = To(destination, form.given is not None, step)
        kernels = []
        for call in _each(lowering.function(to, **form.named(roles))):
            if isinstance(call, Call):
                step(call.operator, *call.inputs, out=call.out)
                kernels.append(_kernel(chosen[-1], call, (*roles, destination, *to.numbers), form.given))
            else:
                call()
                kernels.append(None)
        plan = chosen[-1]
    by = f"{plan.operator.name}/{plan.backend}"
    goal = _Destination(form, by, make, _ready(form, lowering, args))
    if form.given is not None and lowering.factors:
        others = _ready(form, lowering, args, but=form.places(lowering.factors))
        goal = replace(goal, others=others, apart=functools.partial(_apart_from, form, backend, lowering, below))
    guard = guard_of(here)
    known = [kernel for kernel in kernels if kernel]
    if len(known) < len(kernels):
        if needs_grad:
            raise Pass("a layout that would be copied, where a gradient is recorded")
        return Recipe(functools.partial(_lowered_again, form, lowering, backend, below, goal, guard), by)
    compute = _replayed(known, tuple(to.numbers), goal, guard)
    if needs_grad:
        from .gradients import differentiable

        orders = lowering.gradients(**form.named(args)) if lowering.gradients else {}
        (kernel,) = known
        compute = differentiable(form, plan, kernel.parts, kernel.constants, compute, orders)
    return Recipe(compute, by)


def _taken(operator: str, result: Tensor, training: bool) -> tuple[str, ...] | None:
    """The backends that take a call from torch's kernel, as measured; None, for the default order, on a device that
    torch itself has no table for. Raises Pass if torch's kernel is faster."""
    table, card = order.of(result), registry.operator(operator)
    rows = order.rows_of(card, result.shape)
    taken = table.replaces(operator, arrays.dtype_name(result), rows, training)
    if not taken:
        what = "kernel and its backward are" if training else "kernel is"
        raise Pass(f"torch's own {what} faster for {rows} row{'s' * (rows != 'one')}, says {table.source}")
    return taken if machine.torchs_own(machine.kind(result)) else None


def device_of(tensors: Sequence[Tensor]) -> Any:
    """Where a call computes; numbers of the host go wherever the others are."""
    return next((x for x in tensors if not is_number(x)), tensors[0]).device


def is_number(x: Tensor) -> bool:
    """What torch lets stand beside tensors of another device; kernels (`arrays.is_number`) also take it repeated."""
    return x.dim() == 0 and x.device.type == "cpu"


def _delivered(form: Form, backend: Any, lowering: Lowering, args: tuple[Any, ...], below: Below) -> Recipe:
    """A result that is made apart, and brought to a destination of another dtype, shape or one that overlaps itself."""
    made = form_of(form.functional(), form.base)
    wants = [a.name for a in made.schema.arguments]

    def of(args: tuple[Any, ...]) -> tuple[Any, ...]:
        named = form.named(args)
        return tuple(named[name] for name in wants)

    recipe = record(made, backend, lowering, of(args), below)
    given = form.given

    def compute(args: tuple[Any, ...]) -> Any:
        if not lowering.factors:  # whose results are made apart
            _refuse_shared(form, args, lowering, below)
        deliver(form, args, [recipe.compute(of(args))], lowering.over)
        return args[given]  # type: ignore[index]

    return Recipe(compute, recipe.by)


def _apart_from(form: Form, backend: Any, lowering: Lowering, below: Below, args: tuple[Any, ...]) -> Any:
    """A call whose destination lies over one of its factors, which is not a matter of its signature."""
    return _delivered(form, backend, lowering, args, below).compute(args)


def _refuse_shared(form: Form, args: Sequence[Any], lowering: Lowering, below: Below) -> None:
    """Raise what torch raises of a destination that overlaps an input or itself; Pass where its kernel says so."""
    refused = shared(form, args, lowering.over)
    if refused and not below.exists:
        raise RuntimeError(SAID[refused])
    if refused:
        raise Pass(refused)


def _apart(args: tuple[Any, ...], form: Form) -> list[Any]:
    """The arguments with memory of their own each: whose view a kernel's argument is shall not hang on this call.

    A destination is never the caller's, since a lowering that takes several steps writes it while it is recorded. Where
    an argument *is* the destination it stays so; signatures tell such calls apart.
    """
    import torch

    out = None if form.given is None else args[form.given]
    seen: set[int] = set()
    roles = list(args)
    for i in form.present(args):
        x = args[i]
        memory = x.untyped_storage()._cdata
        if memory in seen or x is out:
            roles[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        seen.add(memory)
    if form.given is not None:
        for i in form.present(args):
            roles[i] = roles[form.given] if args[i] is out else roles[i]
    return roles


@dataclass(frozen=True)
class _Destination:
    """Where a call's result goes, and whether it can be written there."""

    form: Form
    by: str
    make: Callable[[], Tensor]
    ready: Callable[[tuple[Any, ...]], bool]
    others: Callable[[tuple[Any, ...]], bool] | None = None
    apart: Callable[[tuple[Any, ...]], Any] | None = None

    def look_closer(self, args: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], Any] | None:
        """What computes a call that is not ready only since its destination lies over a factor; None for one that is.

        Raises Pass for others that are not, and for what is beyond the fuel where that is limited.
        """
        if not self.ready(args):
            if self.others and self.others(args):
                return self.apart
            raise Pass(self.form.without_memory(args) or AN_INPUT)
        if fuel.tank is not None and not fuel.tank.take(self.form.name, self.by, self.form.inputs(args)):
            raise Pass("out of fuel")
        return None

    def of(self, args: tuple[Any, ...]) -> Tensor:
        return self.make() if self.form.given is None else args[self.form.given]


@dataclass(frozen=True)
class _Kernel:
    """A kernel whose arguments are views of a call's values, the destination's last, and constants behind these."""

    plan: dispatch.Plan
    parts: Sequence[Part]
    constants: Sequence[Any]

    def clean(self, held: Sequence[Any]) -> Sequence[Any]:
        """Its arguments, of the values of a call."""
        held = (*held, *self.constants)
        return [held[source] if view is None else view(held[source]) for source, view, _ in self.parts]

    def replay(self, in_place: bool) -> Replay:
        """in_place: whether it may be started with addresses, without that anybody makes the views."""
        as_they_are = not self.constants and all(p.source == at and p.view is None for at, p in enumerate(self.parts))
        clean = _as_they_are if as_they_are else self.clean
        places = [((part.source,), part.behind) for part in self.parts if part.behind is not None]
        return Replay(registry.backend(self.plan.backend), self.plan.run, clean, places if in_place else None)

    @property
    def values(self) -> Callable[..., str | None] | None:
        """What has to look at the values of its arguments before it runs."""
        return self.plan.operator.values if self.plan.check_values else None


def _as_they_are(held: Sequence[Any]) -> Sequence[Any]:
    return held


def _replayed(
    kernels: Sequence[_Kernel],
    numbers: tuple[Tensor, ...],
    destination: _Destination,
    guard: Callable[[], Any] | None,
) -> Callable[[tuple[Any, ...]], Any]:
    """The call of kernels, one after the other."""
    given, make, ready = destination.form.given, destination.make, destination.ready
    replay, *others = [kernel.replay(in_place=not guard) for kernel in kernels]
    known, environment, first = replay.known, replay.environment, replay.first
    checks = [(kernel.values, kernel.clean) for kernel in kernels if kernel.values]

    def compute(args: tuple[Any, ...]) -> Any:
        if fuel.tank is not None or not ready(args):
            apart = destination.look_closer(args)
            if apart:
                return apart(args)
        out = make() if given is None else args[given]
        held = (*args, out, *numbers) if numbers else (*args, out)
        for values, clean in checks:
            _refuse(values(*clean(held)[:-1]))
        (known.get(environment()) or first)(held)
        for other in others:
            (other.known.get(other.environment()) or other.first)(held)
        return out

    if guard is None:
        return compute

    def guarded(args: tuple[Any, ...]) -> Any:
        with guard():
            return compute(args)

    return guarded


def _refuse(problem: str | None) -> None:
    if problem:
        raise Pass(problem)


def _maker(form: Form, lowering: Lowering, args: tuple[Any, ...], here: Any, below: Below) -> Callable[[], Tensor]:
    """What makes a tensor as torch's result is, by what the lowering says or torch's own shape function."""
    import torch

    named, first = form.named(args), args[form.present(args)[0]]
    shape, strides, dtype = (*((lowering.result and lowering.result(**named)) or (None, None)), None)[:3]
    if shape is None and lowering.elementwise:
        shape, strides, dtype = _elementwise(lowering, named, first)
    # where there is nothing, torch's own kernels lay it out as they like
    if shape is None or (0 in shape and not lowering.aten and here.type in ("cpu", "cuda")):
        like = _torchs_result(form, named, "meta" if shape is None else here, refuse=not below.exists)
        shape, strides, dtype = tuple(like.shape), like.stride(), like.dtype
    if strides is None:
        strides = torch.empty(shape, device="meta").stride()
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype or first.dtype, device=here)


def _elementwise(lowering: Lowering, named: dict[str, Any], first: Tensor) -> tuple[Any, Any, Any]:
    """Shape, strides and dtype of an elementwise result; what it is computed in says the lowering."""
    import torch

    call = lowering.function(To(first, False, _not_yet), **named)
    assert isinstance(call, Call)
    card = registry.operator(call.operator)
    computed = call.inputs[card.positions["dtype"]]
    try:
        shape, strides = laid_out([x for x in named.values() if isinstance(x, torch.Tensor)], computed)
    except RuntimeError:
        raise Pass(REFUSED) from None
    return shape, strides, getattr(torch, card.result_dtype({}, {"dtype": computed}))


def _not_yet(operator: str, *inputs: Any, out: Tensor) -> None:
    raise TypeError(f"{operator} is called while torch's result is asked for")


def _torchs_result(form: Form, named: dict[str, Any], device: Any, refuse: bool) -> Tensor:
    """The result of torch's own functional form on tensors laid out alike. What it refuses it raises, or Pass."""
    import torch

    elsewhere = any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in named.values())

    def alike(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [alike(y) for y in x]
        if not isinstance(x, torch.Tensor) or (elsewhere and is_number(x)):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    try:
        result: Tensor = form.functional()(**{name: alike(x) for name, x in named.items()})
    except Exception as error:  # whatever it raises, torch's kernel raises it better
        log.debug("aten::%s is refused by torch's shape function: %s", form.name, error)
        if refuse:
            raise
        raise Pass(REFUSED) from None
    return result


def refuse_as_torch(form: Form, args: tuple[Any, ...]) -> None:
    """Raise what torch raises for a call that it refuses; nothing is raised for others, nor for one that only writes,
    whose schema has no form without a destination."""
    if form.inputs(args):
        _torchs_result(form, form.named(args), "meta", refuse=True)


def _unlike(out: Tensor, like: Tensor) -> str | None:
    """Why a result cannot be written to a destination as it is, or None."""
    if out.dtype != like.dtype or out.device != like.device or out.layout != like.layout:
        return "dtypes, devices or layouts differ"
    if out.shape != like.shape:
        return "out has another shape than the result"
    return ITSELF if out.numel() and overlaps_itself(out) else None


def choose(operator: str, values: Sequence[Any], backend: Any, below: Below | None = None) -> dispatch.Plan:
    """Who computes a step; whoever comes after torch's kernel where that is none to ask. Raises Pass for torch's."""
    try:
        plan = dispatch.plan(registry.operator(operator), values, backend)
    except (TypeError, ValueError) as error:
        raise Pass(str(error)) from None
    if plan.forwards_to == "aten":
        others = plan.wish.split(",")[1:]
        if others and below and (below.alone or not below.wanted):
            return choose(operator, values, others, below)
        raise Pass("torch's own kernel is the choice")
    return plan


def _ready(
    form: Form, lowering: Lowering, args: tuple[Any, ...], but: Sequence[int] = ()
) -> Callable[[Sequence[Any]], bool]:
    """Whether the tensors of a call have memory, and its destination shares none with an input, but for one that it
    *is*: that the lowering has seen; and for those at some positions."""
    spans = {i: ((i,), *arrays.span(args[i])) for i in form.present(args)}
    own = None if form.given is None else args[form.given]
    needs = [
        (path, args[i].element_size(), high)
        for i, (path, _, high) in spans.items()
        if high and surroundings.allocated(args[i])
    ]
    others = [i for i in spans if own is not None and args[i] is not own and i not in but]
    apart = [
        (spans[form.given], spans[i], lowering.elementwise and _laid_alike(own, args[i]))
        for i in others
        if form.given is not None and spans[i][2]
    ]
    return memory.ready(needs, [pair for pair in apart if pair[0][2]], zeros=False)


def _laid_alike(x: Any, y: Any) -> bool:
    return x.shape == y.shape and x.stride() == y.stride() and x.element_size() == y.element_size()


def _kernel(plan: dispatch.Plan, call: Call, held: tuple[Any, ...], given: int | None) -> _Kernel | None:
    """A kernel with its arguments as views of a call's values; None if one of them is a computed tensor."""
    import torch

    owners = [(i, x) for i, x in enumerate(held) if isinstance(x, torch.Tensor) and i != given]
    constants: list[Any] = []
    parts: list[Part] = []
    for x in plan.clean((*call.inputs, call.out)):
        if not isinstance(x, torch.Tensor):
            parts.append(Part(len(held) + len(constants), None, None))
            constants.append(x)
            continue
        source = next((i for i, y in owners if x is y or _same_memory(x, y)), None)
        if source is None:
            return None
        y = held[source]
        behind = x.data_ptr() - y.data_ptr() if x.numel() and x is not y else 0
        parts.append(Part(source, None if x is y else _view(y, x), behind))
    return _Kernel(plan, parts, constants)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _view(source: Tensor, x: Tensor) -> View:
    """What makes a view like x of tensors like `source`."""
    shape, strides, dtype = tuple(x.shape), x.stride(), x.dtype
    if dtype != source.dtype:
        inner = _view(source, x.view(source.dtype))
        return lambda y: inner(y).view(dtype)
    offset = x.storage_offset() - source.storage_offset()
    if x.dim() == source.dim() == 2 and not offset and (shape, strides) == (source.shape[::-1], source.stride()[::-1]):
        return lambda y: y.t()  # costs half of as_strided
    return lambda y: y.as_strided(shape, strides, y.storage_offset() + offset)


def _each(lowered: Lowered) -> Sequence[Call | Callable[[], None]]:
    """What a lowering gave, one by one."""
    return lowered if isinstance(lowered, list) else [lowered]


def _lowered_again(
    form: Form,
    lowering: Lowering,
    backend: Any,
    below: Below,
    goal: _Destination,
    guard: Callable[[], Any] | None,
    args: tuple[Any, ...],
) -> Any:
    """A call whose kernels get computed tensors."""

    def run(operator: str, *values: Any, out: Tensor) -> None:
        plan = choose(operator, (*values, out), backend, below)
        if plan.check_values and plan.operator.values:
            _refuse(plan.operator.values(*values))
        surroundings.uncast(plan.run)(*plan.clean((*values, out)))

    apart = goal.look_closer(args)
    if apart:
        return apart(args)
    out = goal.of(args)
    with guard() if guard else contextlib.nullcontext():
        for call in _each(lowering.function(To(out, form.given is not None, run), **form.named(args))):
            if isinstance(call, Call):
                run(call.operator, *call.inputs, out=call.out)
            else:
                call()
    return out


def guard_of(device: Any) -> Any:
    """Kernels start on the current device: what makes it that of their tensors, None where it is."""
    import torch

    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    return functools.partial(torch.cuda.device, device)
