"""What share of all that a model computes flagops served: calls and their time, by torch's profiler.

Counted is what the dispatcher sees, each call once, where it is outermost: a convolution that torch makes of products
is one call, a `linear` that it makes of `addmm` is that `addmm`. A call **computes** if its schema takes a tensor and
gives one that is no view of it, or writes into one; and if it took memory for what it gives, without which a tensor is
a view that the schema does not tell of. `arange` and the like, which take no tensor, are not counted, nor is `item`.
Times are those of the calling thread.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flagops
from flagops import registry
from flagops.override.report import Report

_MARK = "flagops::"
_REFUSED = "flagops: refused"


@dataclass
class Shares:
    """Calls that compute and microseconds of operators, all of them and those that flagops served."""

    calls: float = 0.0
    served_calls: float = 0.0
    time: float = 0.0
    served_time: float = 0.0

    @property
    def of_calls(self) -> float:
        return self.served_calls / self.calls if self.calls else 0.0

    @property
    def of_time(self) -> float:
        return self.served_time / self.time if self.time else 0.0


def measure(run: Callable[[], Any], report: Callable[[], Report]) -> Shares:
    """Profile ``run()``; ``report()`` then says which calls of torch's operators were replaced."""
    import torch

    names = torch._C._profiler._ExperimentalConfig(capture_overload_names=True)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _marked(), torch.profiler.profile(activities=cpu, profile_memory=True, experimental_config=names) as seen:
        run()
    replaced = _replaced(report())
    shares = Shares()
    for event in seen.events() or ():
        if event.cpu_parent is None and event.name.startswith(("aten::", _MARK)):
            shares.time += event.cpu_time_total
            _count(event, replaced, shares)
    return shares


def _count(event: Any, replaced: dict[str, float], shares: Shares) -> None:
    """Add an outermost call that computes, or look for such within it."""
    ours = event.name.startswith(_MARK) and not any(child.name == _REFUSED for child in event.cpu_children)
    part = 1.0 if ours else replaced.get(event.name, 0.0)
    kind = _kind(event.name, event.overload_name)
    if part or kind == "writes" or (kind == "gives" and event.cpu_memory_usage > 0):
        shares.calls += 1
        shares.served_calls += part
        shares.served_time += part * event.cpu_time_total
    elif kind != "makes":
        for child in event.cpu_children:
            _count(child, replaced, shares)


def _replaced(report: Report) -> dict[str, float]:
    """Of the operators of torch that were replaced, by name, the part of the calls that flagops computed."""
    served, calls = Counter[str](), Counter[str]()
    for row in report.rows:
        name = row.op.split(".")[0]
        served[name] += sum(row.replaced.values())
        calls[name] += row.calls
    return {name: served[name] / calls[name] for name in calls if served[name] and name.startswith("aten::")}


@functools.cache
def _kind(name: str, overload: str) -> str | None:
    """Whether an operator ``"gives"`` a tensor, ``"writes"`` one or ``"makes"`` one of numbers; None for the others:
    views, questions, and composites of operators that follow."""
    import torch

    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    function = getattr(packet, overload or "default", None)
    if not name.startswith("aten::") or function is None:
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        return None
    if torch.Tag.inplace_view in function.tags:
        return None
    schema = function._schema
    kinds = {_result(result) for result in schema.returns}
    kind = next((kind for kind in ("writes", "gives") if kind in kinds), None)
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return kind if reads or kind is None else "makes"


def _result(value: Any) -> str | None:
    if "Tensor" not in str(value.type):
        return None
    if value.alias_info is None:
        return "gives"
    return "writes" if value.alias_info.is_write else None


@contextmanager
def _marked() -> Iterator[None]:
    """Calls of flagops' own operators, which torch's dispatcher does not see, stand in the profile too."""
    from torch.autograd.profiler import record_function

    def marked(name: str, public: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"{_MARK}{name}"):
                try:
                    return public(*args, **kwargs)
                except BaseException:
                    with record_function(_REFUSED):
                        raise

        return call

    before = {name: getattr(flagops, name) for name in registry.operators()}
    try:
        for name, public in before.items():
            setattr(flagops, name, marked(name, public))
        yield
    finally:
        for name, public in before.items():
            setattr(flagops, name, public)
