"""`flagops.enable`: torch's matmul family and fused operators computed by flagops kernels, until it is disabled.

Each overload is registered once per dispatch key and process, however many handles want it; the newest handle decides.
What no kernel takes goes to the kernel that was there before, and is counted with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flagops import arrays, aten, config, dispatch, fused, interpose, registry
from flagops.errors import Unsupported, suggestion
from flagops.interpose import Counter, Registration, lock, thread
from flagops.report import Report, Row

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("flagops")

WATCHED = {
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention, fused",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention, fused",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention, fused",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention, fused",
    "_scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention, fused",
    "_addmm_activation": "linear and activation in one (TransformerEncoder in inference)",
    "_scaled_mm": "products of FP8 matrices",
    "_grouped_mm": "grouped products (mixture of experts)",
    "_int_mm": "products of int8 matrices",
    "mkldnn_rnn_layer": "LSTM layers in oneDNN",
}
"""Operators that, where a device has kernels for them, multiply matrices and bypass the replaced ones.

Their calls are counted and not changed."""

COMPILED = "graphs compiled by torch.compile, but for the products that inductor leaves to aten"
UNSEEN = (
    "linear layers that oneDNN holds prepacked (torch.utils.mkldnn, frozen graphs)",
    "convolutions",
)
"""What multiplies matrices where nobody can count it."""

_PLANS_KEPT = 4096


class _Fuel:
    """Lets the first `limit` replaced calls of the process through and remembers the last of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked = Counter()
        self.last: dict[str, Any] | None = None

    def take(self, plan: _Plan, tensors: Iterable[Tensor | None]) -> bool:
        number = self.asked.add() + 1
        if number <= self.limit:
            shapes = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors if x is not None]
            self.last = {"call": number, "op": plan.op, "by": plan.by, "arguments": shapes}
        return number <= self.limit


_fuel: _Fuel | None = None


@dataclass(eq=False, slots=True)
class _Plan:
    """What becomes of the calls of one signature; `run` is None where torch's own kernel takes them."""

    op: str
    by: str
    run: aten.Run | None
    count: Callable[[], int]
    spans: tuple[int, int, int, int] = (0, 0, 0, 0)

    def clash(self, added: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> bool:
        """Whether `out` may share memory with an input that is not itself."""
        start, pointer = out.data_ptr(), a.data_ptr()
        own, first, second, third = self.spans
        if start < pointer + first and pointer < start + own:
            return True
        pointer = b.data_ptr()
        if start < pointer + second and pointer < start + own:
            return True
        if added is None or added is out:
            return False
        pointer = added.data_ptr()
        return start < pointer + third and pointer < start + own


class _Site(Registration):
    """An overload of the matmul family that our kernels compute."""

    def __init__(self, op: str, suffix: str, key: str) -> None:
        self.op, self.suffix, self.shown = op, suffix, key
        super().__init__(op + suffix, key)

    def call(self) -> Callable[..., Any]:
        current, pass_on, plan_for, run = config.current, self.pass_on, self.plan, self.run

        def two(keyset: Any, a: Tensor, b: Tensor, *, out: Any = None) -> Any:
            if thread.busy or not self.handles:
                return pass_on(keyset, None, a, b, 1, 1, out)
            signature: Any = (current(), a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device)
            if out is not None:
                signature = signature, out.shape, out.stride(), out.dtype, out.device
            plans = self.plans
            plan = plans.get(signature) or plan_for(plans, signature, None, a, b, 1, 1, out)
            return run(plan, keyset, None, a, b, 1, 1, out)

        def three(
            keyset: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None
        ) -> Any:
            if inplace:
                out = added
            if thread.busy or not self.handles:
                return pass_on(keyset, added, a, b, beta, alpha, out)
            signature: Any = (
                *(current(), a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device),
                *(added.shape, added.stride(), added.dtype, added.device, beta, alpha),
            )
            if out is not None:
                signature = signature, out is added or (out.shape, out.stride(), out.dtype, out.device)
            plans = self.plans
            plan = plans.get(signature) or plan_for(plans, signature, added, a, b, beta, alpha, out)
            return run(plan, keyset, added, a, b, beta, alpha, out)

        inplace = self.suffix == "_"
        return three if self.op.startswith(("add", "badd")) else two

    def pass_on(
        self, keyset: Any, added: Tensor | None, a: Tensor, b: Tensor, beta: Any, alpha: Any, out: Tensor | None
    ) -> Any:
        target = {"out": out} if self.suffix == ".out" else {}
        busy, thread.busy = thread.busy, True
        try:
            if added is None:
                return self.torch(keyset, a, b, **target)
            return self.torch(keyset, added, a, b, beta=beta, alpha=alpha, **target)
        finally:
            thread.busy = busy

    def run(
        self, plan: _Plan, keyset: Any, added: Any, a: Tensor, b: Tensor, beta: Any, alpha: Any, out: Tensor | None
    ) -> Any:
        run, reason = plan.run, ""
        if run is not None:
            if out is not None and plan.clash(added, a, b, out):
                reason = "out may share memory with an input"
            elif _fuel is not None and not _fuel.take(plan, (added, a, b)):
                reason = "out of fuel"
            else:
                thread.busy = True
                try:
                    result = run(added, a, b, out)
                    plan.count()
                    return result
                except Unsupported as error:
                    reason = str(error)
                finally:
                    thread.busy = False
        if reason:
            handles = self.handles
            if handles:
                handles[-1].counter(self, "", reason)()
        else:
            plan.count()
        return self.pass_on(keyset, added, a, b, beta, alpha, out)

    def plan(
        self, plans: dict[Any, _Plan], signature: Any, added: Any, a: Tensor, b: Tensor, beta: Any, alpha: Any, out: Any
    ) -> _Plan:
        import torch

        handles = self.handles
        if not handles:  # disabled by another thread, this moment
            return _Plan(self.name, "", None, int)
        handle, by = handles[-1], ""

        def choose(operator: str, args: Sequence[Any]) -> Callable[..., None]:
            nonlocal by
            wish = handle.backend or config.current().backend
            if not wish and dispatch.left_to_torch(operator, args[0]):
                raise aten.Pass("torch's own kernel is faster on this device")
            chosen = dispatch.plan(registry.operator(operator), args, handle.backend)
            if chosen.forwards_to == "aten":
                raise aten.Pass("torch's own kernel is the choice")
            if chosen.through_torch:
                raise aten.Pass(f"{type(args[0]).__name__} keeps no elements of its own")
            by = f"{operator}/{chosen.backend}"
            return chosen.run

        thread.busy = True
        try:
            with torch.no_grad():
                run = _guarded(aten.recipe(self.op, added, a, b, beta, alpha, out, choose), a)
            plan = _Plan(self.name, by, run, handle.counter(self, by, ""))
            if out is not None:
                plan.spans = _span(out), _span(a), _span(b), _span(added)
        except (aten.Pass, Unsupported) as reason:
            plan = _Plan(self.name, "", None, handle.counter(self, "", str(reason)))
        finally:
            thread.busy = False
        if len(plans) >= _PLANS_KEPT:
            plans.clear()
        plans[signature] = plan
        return plan


def _span(x: Tensor | None) -> int:
    """Bytes from the first element of a tensor to behind its last."""
    if x is None or not x.numel():
        return 0
    if not x.data_ptr():
        raise aten.Pass("a tensor without memory as out")
    return arrays.span(x)[1]


def _guarded(run: aten.Run, x: Tensor) -> aten.Run:
    """Kernels start on the current device; make it that of their tensors."""
    import torch

    if x.device.type != "cuda" or torch.cuda.device_count() < 2:
        return run

    def guarded(added: Any, a: Tensor, b: Tensor, out: Any) -> Tensor:
        with torch.cuda.device(a.device):
            return run(added, a, b, out)

    return guarded


def compute(
    site: fused.Site,
    handle: Handle,
    operator: Any,
    adapt: Callable[..., fused.Adapted],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    above: bool,
) -> Any:
    """A fused operator by a kernel of ours. Raises `aten.Pass` or Unsupported where torch should do it.

    above: whether we stand above autograd, and gradients are recorded here.
    """
    import torch

    inputs, shaped = adapt(*args, **kwargs)
    chosen = fused.plan(operator, inputs, handle.backend, above and torch.is_grad_enabled())
    by = f"{operator.name}/{chosen.backend}"
    plan = _Plan(site.name, by, None, handle.counter(site, by, ""))
    if _fuel is not None and not _fuel.take(plan, [x for x in inputs if isinstance(x, torch.Tensor)]):
        raise aten.Pass("out of fuel")
    thread.busy = True
    try:
        with torch.cuda.device(inputs[0].device) if inputs[0].is_cuda else contextlib.nullcontext():
            result = shaped(dispatch.execute(chosen, (*inputs, None)))
    finally:
        thread.busy = False
    plan.count()
    return result


class _Watch(Registration):
    """An overload whose calls are counted and go to torch."""

    def __init__(self, name: str, key: str) -> None:
        self.calls = Counter()
        super().__init__(name, key)

    def call(self) -> Callable[..., Any]:
        def watch(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.add()
            return self.torch(keyset, *args, **kwargs)

        return watch


class Handle:
    """Replacements in force until `disable`; of several handles that want an operator the newest has it."""

    def __init__(self, ops: tuple[str, ...], backend: str | tuple[str, ...] | None) -> None:
        self.ops, self.backend = ops, backend
        self._registrations: list[Registration] = []
        self._counters: dict[tuple[str, str, str, str], Counter] = {}
        self._before: dict[_Watch | fused.Site, int] = {}
        self._bypassed: dict[str, int | None] | None = None
        self._graphs = _compiled_graphs()

    def _acquire(self, name: str, key: str, make: Callable[[], Registration]) -> None:
        registration = interpose.acquire(name, key, make)
        if registration is None:
            return
        registration.handles.append(self)
        registration.plans = {}
        self._registrations.append(registration)
        if isinstance(registration, (_Watch, fused.Site)) and name in WATCHED and name not in self.ops:
            self._before[registration] = registration.calls.value()

    def _install(self, keys: Iterable[str]) -> None:
        import torch

        for key in keys:
            for suffix, ops in aten.FORMS.items():
                for op in ops:
                    if op in self.ops:
                        self._acquire(op + suffix, key, functools.partial(_Site, op, suffix, key))
            for name in fused.OPERATORS:
                composite = name in fused.COMPOSITE
                if name in self.ops or (not composite and name in WATCHED):
                    for place in (f"Autograd{key}", key) if composite else (key,):
                        self._acquire(name, place, functools.partial(fused.Site, name, place))
            for name in WATCHED.keys() - fused.OPERATORS.keys():
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
                    self._acquire(name, key, functools.partial(_Watch, name, key))

    def counter(self, site: _Site | fused.Site, by: str, reason: str) -> Callable[[], int]:
        key = (site.name, site.shown, by, reason)
        with lock:
            if key not in self._counters:
                self._counters[key] = Counter()
                fate = f"left to torch: {reason}" if reason else f"computed by {by}"
                log.info("aten::%s at %s is %s", site.name, site.shown, fate)
            return self._counters[key].add

    def disable(self) -> None:
        """Put everything back as it was, whatever the order of several handles; a second call does nothing."""
        with lock:
            self._bypassed = self._bypassing()
            for registration in self._registrations:
                registration.handles.remove(self)
                registration.plans = {}
                if not registration.handles:
                    interpose.release(registration)
            self._registrations = []
            interpose.sweep()

    def report(self) -> Report:
        """What was replaced, what was left to torch and why, and what bypasses the replaced operators.

        A call counts for the handle that decided it, the newest of those that want its operator.
        """
        with lock:
            counts = {key: counter.value() for key, counter in self._counters.items()}
            bypassed = self._bypassing()
        rows = {(name, key): Row(f"aten::{name}", key, {}, {}) for name, key, _, _ in counts}
        for (name, key, by, reason), count in counts.items():
            row = rows[name, key]
            if count:
                (row.passed if reason else row.replaced)[reason or by] = count
        return Report(tuple(row for row in rows.values() if row.calls), bypassed)

    def _bypassing(self) -> dict[str, int | None]:
        if self._bypassed is not None:
            return self._bypassed
        found: dict[str, int | None] = {}
        for watch, before in self._before.items():
            what = WATCHED[watch.name]
            found[what] = (found.get(what) or 0) + watch.calls.value() - before
        graphs = _compiled_graphs() - self._graphs
        return found | {COMPILED: graphs or None} | dict.fromkeys(UNSEEN)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable(ops: str | Sequence[str] | None = None, backend: str | Sequence[str] | None = None) -> Handle:
    """Compute torch's matmul family, rms_norm, scaled_dot_product_attention, _grouped_mm and _scaled_mm with flagops
    kernels, in eager code of the whole process, until disabled. Gradients stay torch's or are flagops' own.

    ops: what to replace. ``"all"``, or names joined by commas or in a list, of flagops operators (``matmul``:
        ``mm bmm baddbmm mv dot``, ``linear``: ``addmm addmv``, ``grouped_matmul``: ``_grouped_mm``, ``fp8_matmul``:
        ``_scaled_mm``, ``rms_norm``, ...) or of aten's (``addmm``); a minus takes away, as in
        ``"all,-linear"``. With None the variable FLAGOPS_OPS decides, else ``"all"``. In-place and ``out=`` forms
        follow their operator, and so does what torch builds on them: ``linear``, ``matmul``, ``einsum``, ``vdot``, ...
    backend: as in every operator: None takes the best for each call, a name that one alone, a sequence the first that
        fits. A call that it does not take goes to torch's own kernel and is counted.

    Returns a `Handle`: a context manager with ``disable()`` and ``report()``. Handles may overlap and end in any order.

    Raises ValueError for a name that does not exist and Unsupported for a backend that cannot run here.
    """
    global _fuel
    chosen = _selected(config.current().ops if ops is None else ops)
    if backend is not None and not isinstance(backend, str):
        backend = tuple(backend)
    with lock:
        limit = config.current().fuel
        if limit is None or _fuel is None or _fuel.limit != limit:
            _fuel = None if limit is None else _Fuel(limit)
        interpose.sweep()
        handle = Handle(chosen, backend)
        try:
            keys = _keys(backend)
            handle._install(keys)
        except BaseException:
            handle.disable()
            raise
    log.info("enabled at %s: %s", ", ".join(keys), " ".join(chosen) or "nothing")
    return handle


def spent() -> dict[str, Any]:
    """Replaced calls that asked for fuel so far (FLAGOPS_FUEL), and the last that got some."""
    return {"calls": _fuel.asked.value() if _fuel else 0, "last": _fuel.last if _fuel else None}


def _selected(ops: str | Sequence[str]) -> tuple[str, ...]:
    """Names of aten, without suffix, for what `enable` was asked to replace."""
    wanted, known = config.names(ops), aten.OPERATORS | fused.OPERATORS
    chosen: dict[str, None] = {}
    if wanted and wanted[0].startswith("-"):
        chosen.update(dict.fromkeys(known))
    for word in wanted:
        name = word.removeprefix("-")
        group = [op for op, operator in known.items() if name in ("all", op, operator)]
        if not group and name not in registry.operators():
            names = ["all", *known, *registry.operators()]
            raise ValueError(f"enable: no operator is called {name!r}{suggestion(name, names)}")
        if not group and name == word:
            raise ValueError(f"enable: {name} replaces no operator of torch; call flagops.{name}, or see flagops.patch")
        for op in group:
            chosen.pop(op, None) if name != word else chosen.setdefault(op)
    return tuple(chosen)


def _keys(backend: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The dispatch keys of the backends that can run, as far as torch has devices for them."""
    import torch

    wish = (backend,) if isinstance(backend, str) else backend or config.current().backend
    reasons = {name: registry.backend(name).unavailable() for name in wish or registry.backend_names()}
    if wish and all(reasons.values()):
        raise Unsupported("enable: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    custom = hasattr(torch, torch._C._get_privateuse1_backend_name())
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    usable = (name for name, reason in reasons.items() if not reason)
    keys = dict.fromkeys(key for name in usable for key in registry.backend(name).dispatch_keys)
    return tuple(key for key in keys if (custom if key == "PrivateUse1" else has("aten::mm", key)))


def _compiled_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
