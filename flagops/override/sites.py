"""The one kind of function that stands before a torch kernel: a site, made from the schema of its overload.

A call looks up the plan of its signature: shapes, strides, dtypes, devices and scalars, nothing else. The first call of
a signature runs the lowering and records what became of it, as a recipe of views, or why torch's kernel takes it.
"""

from __future__ import annotations

import functools
import keyword
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

from flagops import config
from flagops.arrays import dtype_name
from flagops.calls import generated, surroundings
from flagops.errors import OutOfRange, Unsupported

from .annotations import annotated
from .destinations import SAID, deliver, refuse_other_dtypes, shared
from .forms import DEVICES, Form
from .interpose import Counter, Registration, thread
from .lowering import MIXED, REFUSED, Lowering, Pass
from .recipes import Below, device_of, record, refuse_as_torch
from .steps import Steps
from .timing import Clock, timed, waiting

_PLANS_KEPT = 4096
_AS_THEY_ARE = ("copy_", "neg_")  # torch gives these negated and conjugated views, to others copies
_REFUSED = (Pass, Unsupported, OutOfRange)
"""What leaves a call to torch; of an index that is out of range its kernel says more."""


class Wish(Protocol):
    """What a site asks of a handle."""

    backend: str | tuple[str, ...] | None
    strict: bool
    timed: bool
    compare: bool

    def wants(self, name: str, key: str) -> bool: ...

    def counter(self, name: str, key: str, by: str, reason: str) -> Callable[[], int]: ...

    def clock(self, name: str, key: str, by: str, reason: str) -> Clock: ...


Plan = tuple["Callable[[tuple[Any, ...]], Any] | None", Callable[[], int]]
"""What becomes of the calls of one signature: what computes them, None where torch does, and what counts them."""


@functools.cache
def _plain() -> dict[int, tuple[str, bool]]:
    """Key sets of calls on tensors of a device and nothing else, and whether autograd is among them.

    Whatever else a call may mean adds a key: modes and tensor subclasses, transforms of `torch.func`, negative bits.
    """
    import torch

    plain = {}
    for device in DEVICES:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
        plain[keys.raw_repr()] = device, False
        plain[keys.add(getattr(torch._C.DispatchKey, f"Autograd{device}")).raw_repr()] = device, True
    return plain


_NOT_REPLACED = "flagops does not replace aten::{}, or was not asked to"

_CALL = """
def call(_keyset, {parameters}):
    _args = ({names},)
    if _thread.busy and {elsewhere}:
        return _site.below_with(_keyset, _args)
{aside}
    _plans, _signature = _site.plans, ({signature})
    _compute, _count = _plans.get(_signature) or _plan(_plans, _signature, _keyset, _args)
    if _profiler._is_profiler_enabled:
        _compute, _count = _annotated(_site, (_compute, _count), _args)
    if _compute is None:
        _count()
        return _site.below_with(_keyset, _args)
    _thread.busy = True
    try:
        _result = _compute(_args)
    except _refused as _error:
        _reason = _why(_error, _args)
    else:
        _count()
        return _result
    finally:
        _thread.busy = False
    return _left(_keyset, _args, _reason)
"""

_WHOLE = """
def call(_keyset, {parameters}):
    _args = ({names},)
    if _thread.busy and {elsewhere}:
        return _site.below_with(_keyset, _args)
    return _site.whole(_keyset, _args)
"""

_ASIDE = """
    _keys = _keyset.raw_repr()
    if _keys not in _plain:
        return _aside(_keyset, _args)
"""


def _exactly(x: Any) -> Any:
    """A number apart from those that equal it: 1 from 1.0, 0.0 from -0.0, and NaN as itself."""
    return (x.__class__, x) if x and x == x else (x.__class__, repr(x))


class Site(Registration):
    """One overload at one dispatch key, computed by our kernels where a handle wants it and a recipe can be made.

    lowering: None where calls are only counted.
    """

    def __init__(self, overload: str, key: str, lowering: Lowering | None) -> None:
        self.lowering, self.form = lowering, Form(overload, lowering.name if lowering else "")
        self.composite = lowering is not None and lowering.composite
        self.untaken = Counter()  # calls that no handle wanted to compute
        super().__init__(overload, key)

    def call(self) -> Callable[..., Any]:
        """The site as torch calls it, with the arguments by name: a loop over them would cost half a microsecond."""
        if self.lowering is None:
            return self._watch
        form = self.form
        out = form.schema.arguments[form.given].name if form.given is not None else None
        names, parameters, signature = [], [], ["_current()"]
        space: dict[str, Any] = {"_site": self, "_thread": thread, "_current": config.current}
        space |= {"_profiler": sys.modules["torch.autograd.profiler"], "_annotated": annotated}
        space |= {
            "_plan": self._plan,
            "_left": self._left,
            "_refused": _REFUSED,
            "_why": self._why,
            "_exactly": _exactly,
        }
        space["_plain_types"] = frozenset((int, float, bool, complex, type(None)))
        if self.composite:
            space |= {"_aside": self._aside, "_plain": _plain(), "_grad": surroundings.probes()[1]}
            space["_forward"] = sys.modules["torch.autograd.forward_ad"]
            signature += ["_keys", "_grad()", "_forward._current_level"]
        probes = self.lowering.state() if self.lowering.state else ()
        names_of = {argument.name for argument in form.schema.arguments}
        for i, probe in enumerate(probes):
            space[f"_state{i}"] = probe
            takes = [name for name in getattr(probe, "takes", ()) if name in names_of]
            signature.append(f"_state{i}({', '.join(takes)})")
        for i, argument in enumerate(form.schema.arguments):
            name = argument.name + "_" * keyword.iskeyword(argument.name)
            names.append(name)
            parameters += ["*"] if i == form.positional else []
            if argument.has_default_value():
                space[f"_default{i}"] = argument.default_value
                parameters.append(f"{name}=_default{i}")
            else:
                parameters.append(name)
            signature.append(self._facts(name, str(argument.type), out))
        elsewhere = self.owned or not self.lowering.aten
        words = {
            "elsewhere": "_site.below is not None" if elsewhere else "False",
            "parameters": ", ".join(parameters),
            "names": ", ".join(names),
            "signature": ", ".join(signature),
        }
        if self.lowering.whole:
            return generated.function(_WHOLE.format(**words), f"aten::{self.name}", space)
        source = _CALL.format(aside=_ASIDE if self.composite else "", **words)
        return generated.function(source, f"aten::{self.name}", space)

    def _facts(self, name: str, kind: str, out: str | None) -> str:
        """What a plan may depend on of an argument."""
        if kind in ("Tensor", "Optional[Tensor]"):
            facts = f"{name}.shape, {name}.stride(), {name}.dtype"
            facts += "" if self.key == "CPU" else f", {name}.get_device()"  # a device costs more to hash
            facts += f", {name}.requires_grad" if self.composite else ""
            facts += f", {name}.is_neg(), {name}.is_conj()" if self.name in _AS_THEY_ARE else ""
            facts += f", {name} is {out}" if out not in (None, name) else ""
            if self.lowering and self.lowering.aten and name != out:
                return f"_exactly({name}) if {name}.__class__ in _plain_types else ({facts})"
            return facts if kind == "Tensor" else f"None if {name} is None else ({facts})"
        if kind == "List[Tensor]":
            return f"tuple([({self._facts('_x', 'Tensor', out)}) for _x in {name}])"
        if "List[" in kind:
            return f"tuple({name})" if kind.startswith("List") else f"None if {name} is None else tuple({name})"
        return f"_exactly({name})" if kind in ("number", "Optional[number]", "float", "Optional[float]") else name

    def below_with(self, keyset: Any, args: Sequence[Any]) -> Any:
        """Torch's kernel. What a composite consists of is for the sites of its parts; other kernels are a whole."""
        if self.lowering is not None and self.lowering.aten:
            args = self.form.with_tensors(args)
        args, named = self.form.split(args)
        if self.composite:
            return self.torch(keyset, *args, **named)
        busy, thread.busy = thread.busy, True
        try:
            return self.torch(keyset, *args, **named)
        finally:
            thread.busy = busy

    def _ask(self, keyset: Any) -> Callable[[Sequence[Any]], Any] | None:
        return functools.partial(self.below_with, keyset) if self.below is not None else None

    def _watch(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not thread.busy:  # else it is a part of a call that is counted
            self.untaken.add()
            if any(handle.strict for handle in self.handles):
                raise Unsupported(f"strict: {_NOT_REPLACED.format(self.name)}")
        return self.torch(keyset, *args, **kwargs)

    def _aside(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        """A composite's call that is not one on plain tensors: whoever watches shall see what it consists of."""
        reason = self._why_not_plain(keyset, args)
        return self._left(keyset, args, reason) if reason else self.below_with(keyset, args)

    def _why_not_plain(self, keyset: Any, args: tuple[Any, ...]) -> str | None:
        import torch

        tensors = [x for x in self.form.inputs(args) if x is not None]
        key = torch._C.DispatchKey
        if keyset.has(key.PythonDispatcher) or all(x.device.type == "meta" for x in tensors):
            return None  # a graph is made, nothing is computed
        reason = surroundings.watched()
        if reason:
            return reason
        for x in tensors:
            if keyset.has(key.ZeroTensor) and x._is_zerotensor():
                return "a zero tensor without memory"
            if type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
                return f"{type(x).__name__} keeps no elements of its own"
            if x.layout is not torch.strided or x.is_nested:
                return "a layout other than strided"
        if keyset.has(key.Negative) or keyset.has(key.Conjugate):
            return "a negated or conjugated view"
        return f"torch dispatches it by {keyset}"

    def _left(self, keyset: Any, args: tuple[Any, ...], reason: str) -> Any:
        """A call that turned out not to be ours: counted, and torch's."""
        handle, key = self._decide(args)
        if handle:
            handle.counter(self.name, key, "", reason)()
        if self.below is None or (handle and handle.strict):
            self._nobody(reason, lambda: 0, args)
        return self.below_with(keyset, args)

    def _why(self, error: Exception, args: tuple[Any, ...]) -> str:
        """The reason in an error that leaves a call to torch. Raises that of an index where torch may not be asked."""
        if not isinstance(error, OutOfRange):
            return str(error)
        handle, _ = self._decide(args)
        if self.below is None or (handle and handle.strict):
            raise error
        return REFUSED

    def _refuse_unasked(self, key: str) -> None:
        """Raises where a strict handle that did not ask for this operator lets nobody else compute it."""
        if any(handle.strict and key in handle.keys for handle in self.handles.copy()):
            raise Unsupported(f"strict: {_NOT_REPLACED.format(self.name)}")

    def _nobody(self, reason: str, count: Callable[[], int], args: tuple[Any, ...]) -> None:
        """Raises: what we do not take has nowhere to go, or may not go there."""
        count()
        if self.below is not None:
            raise Unsupported(f"strict: no flagops kernel takes this call of aten::{self.name}: {reason}")
        refuse_as_torch(self.form, args)
        if reason in (REFUSED, MIXED):
            given = ", ".join(
                f"{self.form.schema.arguments[i].name} is {dtype_name(args[i])} {list(args[i].shape)}"
                for i in self.form.present(args)
            )
            raise RuntimeError(f"aten::{self.name} takes no such arguments: {given}")
        raise NotImplementedError(
            f"aten::{self.name} has no kernel at {self.key} but flagops', which does not take this call: {reason}"
        )

    def whole(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        """A call that its lowering computes itself, of which nothing is remembered."""
        handle, key = self._decide(args)
        if handle is None or self.lowering is None:
            self.untaken.add()
            self._refuse_unasked(key)
            return self.below_with(keyset, args)
        steps = Steps(self.form, handle.backend, args)
        start = perf_counter() if handle.timed else 0.0
        try:
            missing = self.form.without_memory(args)
            if missing:
                raise Pass(missing)
            refused = shared(self.form, args, self.lowering.over)
            if refused and self.below is None:
                raise RuntimeError(SAID[refused])
            if refused:
                raise Pass(refused)
            with steps.device():
                results: Any = self.lowering.function(steps, **self.form.named(args))
            made = self._brought(results, args, self.lowering.over, None if handle.strict else self._ask(keyset))
        except _REFUSED as error:
            return self._left(keyset, args, self._why(error, args))
        fate = self.name, key, steps.by(self.lowering.operator), ""
        handle.counter(*fate)()
        if handle.timed:
            waiting(key)()
            clock = handle.clock(*fate)
            clock.note(perf_counter() - start, first=not clock.first)
        return made

    def _brought(self, results: Any, args: tuple[Any, ...], over: Sequence[str] | None, ask: Any) -> Any:
        """What a whole lowering made, in the tensors that the call gives for it."""
        if not self.form.outs or results is None or any(results is args[i] for i in self.form.outs):
            return results
        several = isinstance(results, (tuple, list))
        outs, made = [args[i] for i in self.form.outs], results if several else (results,)
        refuse_other_dtypes(self.form, args, [x.dtype for x in made], ask)
        deliver(self.form, args, made, over)
        return tuple(outs) if several else outs[0]

    def _decide(self, args: tuple[Any, ...]) -> tuple[Wish | None, str]:
        """The newest handle that wants the call, and the dispatch key of the device."""
        name, key = self.form.base, self.key
        if self.composite:
            kind = device_of([args[i] for i in self.form.present(args)]).type
            key = {"cpu": "CPU", "cuda": "CUDA"}.get(kind, "PrivateUse1")
        wanted = (h for h in reversed(self.handles.copy()) if h.wants(name, key))
        return next(wanted, None), key

    def _plan(self, plans: dict[Any, Plan], signature: Any, keyset: Any, args: tuple[Any, ...]) -> Plan:
        handle, key = self._decide(args)
        plan: Plan
        missing = self.form.without_memory(args)
        if handle and missing:  # says nothing of the next call like it
            count = handle.counter(self.name, key, "", missing)
            return functools.partial(self._nobody, missing, count) if handle.strict else None, count
        if handle is None or self.lowering is None:
            self._refuse_unasked(key)
            plan = None, self.untaken.add
        else:
            compute: Callable[[tuple[Any, ...]], Any] | None = None
            by = reason = ""
            thread.busy = True
            try:
                below = Below(self.below is not None, self.owned, not handle.strict, self._ask(keyset))
                recipe = record(self.form, handle.backend, self.lowering, args, below)
                compute, by = recipe.compute, recipe.by
            except (Pass, Unsupported) as error:
                reason = str(error)
            finally:
                thread.busy = False
            count = handle.counter(self.name, key, by, reason)
            if compute is None and (self.below is None or handle.strict):
                compute = functools.partial(self._nobody, reason, count)
            elif handle.timed:
                compute = timed(self, compute, key, handle.clock(self.name, key, by, reason), handle.compare)
            plan = compute, count
        if len(plans) >= _PLANS_KEPT:
            plans.clear()
        plans[signature] = plan
        return plan


class Parts(Registration):
    """A list form, ``_foreach_add_``, of which a device has a kernel of its own: torch's composition instead, whose
    calls for each tensor are ours."""

    def call(self) -> Callable[..., Any]:
        import torch

        overload, key = Form(self.name).overload(), torch._C.DispatchKey.CompositeExplicitAutograd

        def compose(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if thread.busy or not self.handles:
                return self.torch(keyset, *args, **kwargs)
            return overload._op_dk(key, *args, **kwargs)

        return compose


class Refusal(Registration):
    """An overload that flagops does not replace, which a strict handle lets nobody compute."""

    computes = False

    def call(self) -> Callable[..., Any]:
        def refuse(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if thread.busy or not self.handles:
                return self.torch(keyset, *args, **kwargs)
            raise Unsupported(f"strict: {_NOT_REPLACED.format(self.name)}")

        return refuse
