"""`flagops.enable`: torch's matmul family and fused operators computed by flagops kernels, until it is disabled.

Each overload is registered once per dispatch key and process, however many handles want it; the newest handle decides.
What no kernel takes goes to the kernel that was there before, and is counted with its reason.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from flagops import config, machine, order, registry
from flagops.errors import Unsupported, suggestion
from flagops.override.report import Report, Row, Shares

from . import fuel, interpose, lowerings  # noqa: F401  (which declares them)
from .forms import forms, kind
from .interpose import COMPOSITE, Counter, Registration, lock
from .lowering import LOWERINGS
from .sites import Parts, Refusal, Site
from .timing import Clock

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

Their calls are counted and not changed; the word before a comma is the operator that they are a part of."""

COMPILED = 'graphs compiled by torch.compile without backend="flagops", but for products that inductor leaves to aten'
UNSEEN = (
    "linear layers that oneDNN holds prepacked (torch.utils.mkldnn, frozen graphs)",
    "convolutions",
)
"""What multiplies matrices where nobody can count it."""


forks = Counter()
"""Processes that this one has forked."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=forks.add)


class Handle:
    """Replacements in force until `disable`; of several handles that want an operator the newest has it."""

    def __init__(
        self,
        ops: dict[str, bool],
        backend: str | tuple[str, ...] | None,
        keys: tuple[str, ...],
        strict: bool = False,
        timed: bool = False,
        compare: bool = False,
    ) -> None:
        self.backend, self.keys, self.strict = backend, keys, strict
        self.timed, self.compare = timed or compare, compare
        every = strict or bool(backend or config.current().backend)
        self._places = {name: _wanted_at(name, keys, backend, named, every) for name, named in ops.items()}
        self.ops = tuple(name for name, places in self._places.items() if places)
        self._sites: list[Registration] = []
        self._counters: dict[tuple[str, str, str, str], Counter] = {}
        self._clocks: dict[tuple[str, str, str, str], Clock] = {}
        self._forks = forks.value()
        self._before: dict[Site, int] = {}
        self._bypassed: dict[str, int | None] | None = None
        self._graphs = _compiled_graphs()

    def _install(self) -> None:
        kept = {name for name, places in self._places.items() if not places}
        # a call that is only counted costs microseconds, and `kept` says already whose it is
        watched = (name for name, words in WATCHED.items() if kept.isdisjoint((name, words.partition(",")[0])))
        for name in dict.fromkeys((*self.ops, *watched)):
            lowering = LOWERINGS.get(name)
            wanted = lowering is not None and name in self.ops
            own = self._places.get(name) or self.keys
            keys = _places(name, own) if lowering and lowering.composite else own
            for overload in forms(name) if wanted else (name,):
                for key in keys:
                    if lowering and lowering.aten and interpose.composed(overload, key):
                        continue  # its parts are replaced
                    self._acquire(overload, key, functools.partial(Site, overload, key, lowering), wanted)
        self._compose_lists()
        if self.strict:
            self._refuse_others()

    def _compose_lists(self) -> None:
        """Stand before a device's own kernels for lists of tensors where those for one are replaced."""
        import torch

        has = torch._C._dispatch_has_kernel_for_dispatch_key
        for key in self.keys:
            wanted = {name.partition(".")[0] for name, places in self._places.items() if key in places}
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
                overload = name.removeprefix("aten::")
                base = overload.partition(".")[0].removeprefix("_foreach_").removesuffix("_")
                if overload.startswith("_foreach_") and base in wanted and has(name, "CompositeExplicitAutograd"):
                    self._acquire(overload, key, functools.partial(Parts, overload, key), wanted=True)

    def _refuse_others(self) -> None:
        """Stand before every other kernel that computes."""
        import torch

        places = {(site.name, site.key) for site in self._sites}
        for key in self.keys:
            for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
                overload = name.removeprefix("aten::")
                if name.startswith("aten::") and (overload, key) not in places and kind(overload) == "computing":
                    make = functools.partial(Refusal, overload, key)
                    refusal = interpose.acquire(overload, key, make, computes=False)
                    refusal.handles.append(self)
                    refusal.plans = {}
                    self._sites.append(refusal)

    def wants(self, name: str, key: str) -> bool:
        """Whether calls of a lowering at a dispatch key are ours to compute."""
        return key in self._places.get(name, ())

    def _acquire(self, overload: str, key: str, make: Callable[[], Registration], wanted: bool) -> None:
        site = interpose.acquire(overload, key, make, bare=wanted)
        if site is None:
            return
        site.handles.append(self)
        site.plans = {}
        self._sites.append(site)
        if overload in WATCHED and overload not in self.ops:
            self._before[site] = site.untaken.value()

    def counter(self, name: str, at: str, by: str, reason: str) -> Callable[[], int]:
        """What counts the calls of an overload at a dispatch key that were computed by `by`, or left for a reason."""
        key = (name, at, by, reason)
        with lock:
            if key not in self._counters:
                self._counters[key] = Counter()
                fate = f"left to torch: {reason}" if reason else f"computed by {by}"
                log.info("aten::%s at %s is %s", name, at, fate)
            return self._counters[key].add

    def clock(self, name: str, at: str, by: str, reason: str) -> Clock:
        """What sums the seconds of the calls that `counter` counts."""
        with lock:
            return self._clocks.setdefault((name, at, by, reason), Clock())

    def disable(self) -> None:
        """Put everything back as it was, whatever the order of several handles; a second call does nothing."""
        with lock:
            self._bypassed = self._bypassing()
            for site in self._sites:
                site.handles.remove(self)
                site.plans = {}
                if not site.handles:
                    interpose.release(site)
            self._sites = []
            interpose.sweep()

    def report(self, coverage: Shares | None = None) -> Report:
        """What was replaced, what was left to torch, why, and what to do about it, what bypasses the replaced operators
        and what was never called; times, if `enable` was asked for them.

        A call counts for the handle that decided it, the newest of those that want its operator.

        coverage: that of the same run (`flagops.coverage`), whose shares of all computing calls stand at the head.
        """
        with lock:
            counts = {key: counter.value() for key, counter in self._counters.items()}
            clocks = dict(self._clocks)
            bypassed = self._bypassing()
        times: dict[tuple[str, str], dict[str, Clock]] = defaultdict(dict)
        for (name, key, by, reason), clock in clocks.items():
            times[name, key][reason or by] = clock
        rows = {(name, key): Row(f"aten::{name}", key, {}, {}, times[name, key]) for name, key, _, _ in counts}
        for (name, key, by, reason), count in counts.items():
            row = rows[name, key]
            if count:
                (row.passed if reason else row.replaced)[reason or by] = count
        called = {name for (name, _), row in rows.items() if row.calls}
        uncalled = {name for name in self.ops if called.isdisjoint(forms(name))}
        # what a device may make of an operator that has a public name is not what was asked for
        asked = {LOWERINGS[name].operator for name in self.ops if name[0] != "_"}
        uncalled -= {name for name in uncalled if name[0] == "_" and LOWERINGS[name].operator in asked}
        return Report(
            tuple(row for row in rows.values() if row.calls),
            bypassed,
            uncalled=tuple(sorted(uncalled)),
            kept=tuple(name for name, places in self._places.items() if not places and not LOWERINGS[name].aten),
            forks=forks.value() - self._forks,
            coverage=coverage,
        )

    def _bypassing(self) -> dict[str, int | None]:
        if self._bypassed is not None:
            return self._bypassed
        found: dict[str, int | None] = {}
        for site, before in self._before.items():
            what = WATCHED[site.name]
            found[what] = (found.get(what) or 0) + site.untaken.value() - before
        graphs = _compiled_graphs() - self._graphs
        return found | {COMPILED: graphs or None} | dict.fromkeys(UNSEEN)

    def __enter__(self) -> Handle:
        if self._bypassed is not None:
            raise RuntimeError("this handle was disabled, nothing is replaced; call flagops.enable() for a new one")
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable(
    ops: str | Sequence[str] | None = None,
    backend: str | Sequence[str] | None = None,
    strict: bool = False,
    timed: bool = False,
    compare: bool = False,
) -> Handle:
    """Compute torch's operators with flagops kernels, in eager code of the whole process and in graphs of
    ``torch.compile(model, backend="flagops")``, until disabled. Gradients stay torch's or are flagops' own.

    ops: what to replace, as names joined by commas or in a list: ``"default"``, what makes whole models faster where
        torch has kernels of its own (products, rms_norm, attention) and everything on a device that has none;
        ``"all"``; a family (``pointwise``, ``reductions``, ...); flagops operators (``matmul``: ``mm bmm baddbmm mv
        dot``, ``linear``: ``addmm addmv``, ``grouped_matmul``: ``_grouped_mm``, ``fp8_matmul``: ``_scaled_mm``, ...) or
        aten's (``addmm``); a minus takes away, as in ``"all,-linear"``. With None the variable FLAGOPS_OPS decides,
        else ``"default"``. In-place and ``out=`` forms follow their operator, and so does what torch builds on them:
        ``linear``, ``matmul``, ``einsum``, ``_foreach_add_``, ...
    backend: as in every operator: None takes the best for each call, a name that one alone, a sequence the first that
        fits. A call that it does not take goes to torch's own kernel and is counted.
    strict: raise Unsupported at the first computing call that no flagops kernel takes, with its name and the reason.
    timed: also take the time of each call, which waits for a device that is not the CPU; the report shows it.
    compare: `timed`, and torch's own kernel computes each replaced call as well, for its time; what that
        calls in turn, and is replaced, counts too.

    Returns a `Handle`: a context manager with ``disable()`` and ``report()``. Handles may overlap and end in any order.

    Raises ValueError for a name that does not exist and Unsupported for a backend that cannot run here.
    """
    chosen = _selected(config.current().ops if ops is None else ops)
    if backend is not None and not isinstance(backend, str):
        backend = tuple(backend)
    with lock:
        fuel.fill(config.current().fuel)
        interpose.sweep()
        handle = Handle(chosen, backend, _keys(backend), strict, timed, compare)
        try:
            handle._install()
        except BaseException:
            handle.disable()
            raise
    log.info("enabled at %s: %s", ", ".join(handle.keys), " ".join(chosen) or "nothing")
    return handle


def _selected(ops: str | Sequence[str]) -> dict[str, bool]:
    """The lowerings that `enable` was asked for, and whether by name."""
    wanted, known = config.names(ops), {name: lowering.operator for name, lowering in LOWERINGS.items()}
    chosen: dict[str, bool] = {}
    if wanted and wanted[0].startswith("-"):
        wanted = (*config.DEFAULT_OPS, *wanted)
    for word in wanted:
        name = word.removeprefix("-")
        everything = ("all", *config.DEFAULT_OPS)
        group = [
            op for op, operator in known.items() if name in (*everything, op, op.partition(".")[0], *_called(operator))
        ]
        if not group and name not in registry.cards():
            families = {card.family for card in registry.cards().values() if card.aten}
            names = [*everything, *known, *registry.cards(), *families]
            raise ValueError(f"enable: no operator is called {name!r}{suggestion(name, names)}")
        if not group and name == word:
            raise ValueError(f"enable: {name} replaces no operator of torch; call flagops.{name}, or see flagops.patch")
        for op in group:
            if name != word:
                chosen.pop(op, None)
            else:
                chosen[op] = chosen.get(op, False) or name not in config.DEFAULT_OPS
    return chosen


def _called(operator: str) -> tuple[str, str]:
    """What a lowering is known by besides its own name: its card, and of aten's the family."""
    return operator, registry.operator(operator).family if operator.startswith("aten.") else operator


def _wanted_at(name: str, keys: tuple[str, ...], backend: Any, named: bool, every: bool) -> tuple[str, ...]:
    """The dispatch keys at which a name is replaced. Where torch has kernels of its own, ours of `flagops.aten` stand
    before them only for who names them, and others only where a call of theirs was measured as faster: a call that is
    then left to torch costs it microseconds."""
    lowering = LOWERINGS[name]
    if not lowering.aten:
        return tuple(key for key in keys if named or every or _faster(lowering.operator, key))
    wish = (backend,) if isinstance(backend, str) else backend or config.current().backend or registry.backend_names()
    able = [b for b in wish if _has(lowering.operator, b)]
    places = {key for b in able for key in registry.backend(b).dispatch_keys}
    named = named and not lowering.random
    return tuple(key for key in keys if key in places and (named or key == "PrivateUse1"))


def _faster(operator: str, key: str) -> bool:
    """Whether a call of an operator was measured as faster than torch's at a dispatch key, or torch has none there."""
    kind = {"CPU": machine.cpu_kind(), "CUDA": "cuda"}.get(key)
    return kind is None or order.table(kind).replaces_any(operator)


@functools.cache
def _has(operator: str, backend: str) -> bool:
    try:
        registry.find(operator, backend)
    except Unsupported:
        return False
    return True


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


def _places(composite: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Where to replace a composition: there itself, and where another library put a kernel before it."""
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    above = (place for key in keys for place in (key, f"Autograd{key}"))
    return COMPOSITE, *(place for place in above if has(f"aten::{composite}", place))


def _compiled_graphs() -> int:
    """How many graphs Dynamo has made, but for those that keep the replaced operators (`compiled.backend`)."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] - dynamo.counters["flagops"]["graphs"] if dynamo else 0
