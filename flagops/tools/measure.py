"""Timing that can be believed: results are checked before and after, candidates alternate, inputs rotate.

Candidates run in ABBA order on inputs that together do not fit in the caches, into an output that is full of NaN before
each timing. A ratio of two candidates is the median over rounds of the two times taken side by side.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from flagops import arrays, registry
from flagops.call import of
from flagops.errors import Unsupported
from flagops.machine import cpu_model, torch_has_native_bf16
from flagops.operator import Operator
from flagops.tools import workloads

COLD = 128 << 20
"""Bytes of inputs that take turns, so that each call finds its own out of the caches, as a model's layers do."""
SPREAD = 0.3
"""The share of its median that the middle of a row's times may spread over; beyond, something disturbed them."""
LARGE = 512 << 20
"""Inputs of which one set is enough to be cold."""

Call = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """How long to measure: seconds a candidate, the fewest rounds and the most; and by which clock: that of the process
    counts all its threads' work, and stands while others have the processor."""

    seconds: float = 1.0
    rounds: int = 5
    most: int = 100
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter


@dataclass
class Row:
    """One candidate at one workload; times in seconds a call, one for each round."""

    operator: str
    workload: str
    dtype: str
    name: str
    baseline: bool = False
    match: str = ""
    problem: str = ""
    wrong: bool = False
    times: list[float] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    ratio: float | None = None
    memory: int | None = None

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """The times that a fifth of the rounds stay below, and above."""
        ordered = sorted(self.times)
        fifth = len(ordered) // 5
        return ordered[fifth], ordered[-1 - fifth]

    @property
    def disturbed(self) -> bool:
        low, high = self.spread
        return high - low > SPREAD * self.median


@dataclass(frozen=True)
class Roofline:
    """The best that this machine reached in this run: bytes a second of reading, copying or adding arrays that exceed
    its caches, FLOP/s of products in float32 and, where it has units for it, bfloat16."""

    bandwidth: float
    matmul: float
    half: float = 0.0

    def share(self, row: Row) -> float:
        """Of what bounds a row, how much it reached; above 1 one of the two was measured wrong."""
        flops = self.matmul if row.dtype in ("float32", "float64") else max(self.matmul, self.half)
        return max(row.flops / flops, row.bytes / self.bandwidth) / row.median

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.1f} GB/s, products {self.matmul / 1e9:.0f} GFLOP/s in float32, "
            f"{self.half / 1e9:.0f} in bfloat16"
        )


def roofline(settings: Settings) -> Roofline:
    import torch

    one, two = (torch.ones(64 << 20, device=settings.device) for _ in range(2))
    whole = [torch.rand(2048, 2048, device=settings.device) for _ in range(3)]
    half = [x.bfloat16() for x in whole]
    calls: dict[str, Call] = {
        "read": lambda out: one.sum(),
        "copy": lambda out: out.copy_(one),
        "triad": lambda out: torch.add(one, two, alpha=3.0, out=out),
        "float32": lambda out: torch.matmul(whole[0], whole[1], out=whole[2]),
        "bfloat16": lambda out: torch.matmul(half[0], half[1], out=half[2]),
    }
    times = alternate(calls, [()], torch.empty_like(one), settings, poisoned=False)
    best = {name: min(found) for name, found in times.items()}
    bandwidth = max(one.nbytes * arrays / best[name] for name, arrays in (("read", 1), ("copy", 2), ("triad", 3)))
    return Roofline(bandwidth, 2 * 2048**3 / best["float32"], 2 * 2048**3 / best["bfloat16"])


def synchronizer(device: str) -> Callable[[], Any]:
    import torch

    return torch.get_device_module(device).synchronize if device != "cpu" else lambda: None


def alternate(
    calls: Mapping[str, Call],
    sets: Sequence[Sequence[Any]],
    out: Any,
    settings: Settings,
    poisoned: bool = True,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of each candidate, ``call(*set, out)``, one number for each round; forwards, then backwards.

    within: the contexts that candidates run in, entered anew each round and not timed.
    """
    wait = synchronizer(settings.device)
    turn = itertools.cycle(sets)
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    names = list(calls)
    begun = math.inf
    for count in range(-1, settings.most):  # the first round warms up and is thrown away
        for name in names if count % 2 else reversed(names):
            if poisoned:
                poison(out)
            call, given = calls[name], [next(turn) for _ in range(repeats[name])]
            with (within or {}).get(name, nullcontext)():
                wait()
                start = settings.clock()
                for one in given:
                    call(*one, out)
                wait()
                elapsed = (settings.clock() - start) / len(given)
            if count < 0:
                repeats[name] = max(1, min(1000, math.ceil(1e-3 / elapsed)))
            else:
                times[name].append(elapsed)
        begun = min(begun, time.perf_counter())
        if count + 1 >= settings.rounds and time.perf_counter() - begun > settings.seconds * len(names):
            break
    return times


def poison(out: Any) -> None:
    """Fill an output, or a tuple of them, with NaN; one-byte formats and integers with bytes of 0x5A."""
    for x in out if isinstance(out, tuple) else (out,):
        whole = x.dtype.itemsize == 1 or not x.is_floating_point()
        (arrays.codes(x) if x.dtype.itemsize == 1 else x).fill_(0x5A if whole else math.nan)


def extra_memory(call: Callable[[], Any], device: str = "cpu", calls: int = 1) -> int | None:
    """Bytes that a call held beyond what was there, at its peak; None where the system does not say.

    Other threads and the allocator only ever add to it, so the smallest of several `calls` is nearest the call's own.
    """
    return min((peak for _ in range(calls) if (peak := _peak(call, device)) is not None), default=None)


def _peak(call: Callable[[], Any], device: str) -> int | None:
    if device != "cpu":
        import torch

        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        call()
        return int(module.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[name].split()[0]) << 10


@dataclass(frozen=True)
class Trial:
    """A workload ready to run: input sets that take turns, and the output that all candidates share."""

    op: Operator
    workload: str
    dtype: str
    sets: list[list[Any]]
    out: Any
    flops: float
    bytes: int

    def row(self, name: str, baseline: bool = False) -> Row:
        return Row(self.op.name, self.workload, self.dtype, name, baseline, flops=self.flops, bytes=self.bytes)


def turns(used: int) -> int:
    """How many sets of inputs of so many bytes it takes for each call to find its own out of the caches."""
    return 1 if used >= LARGE else min(64, max(2, -(-COLD // max(used, 1))))


def prepare(op: Operator, workload: str, device: str = "cpu", dtype: str | None = None, cold: bool = True) -> Trial:
    """Draw as many sets of inputs as it takes to find each cold. Raises Unsupported for a dtype it cannot run in."""
    import torch

    of = workloads.case(op, workload, dtype)
    sets = [workloads.inputs(op, of, 0, device)]
    used = sum(x.nbytes for x in sets[0] if arrays.is_torch(x))
    if cold:
        sets += [workloads.inputs(op, of, seed, device) for seed in range(1, turns(used))]
    bound = op.bind((*sets[0], None))
    outs = tuple(
        torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for shape, dtype in zip(bound.shapes, bound.results, strict=True)
    )
    work = float(op.flops(bound.dims, bound.batch))
    moved = used + sum(x.nbytes for x in outs)
    return Trial(op, workload, bound.dtype, sets, outs if op.several else outs[0], work, moved)


def compare(trial: Trial, calls: Mapping[str, Call], baselines: Mapping[str, Call], settings: Settings) -> list[Row]:
    """Check, then time every candidate at a workload; all are called as ``call(*inputs, out)``.

    A candidate that is wrong, before or after it was timed, has no times; ratios are to the first baseline. A candidate
    may have `prepare(*inputs)`, which is run on every set before, for what is not to be timed.
    """
    import torch

    sets, out, every = trial.sets, trial.out, {**calls, **baselines}
    rows = {name: trial.row(name, name in baselines) for name in every}
    with torch.no_grad():
        for name, call in every.items():
            _attempt(trial, rows[name], call, 0)
            if not rows[name].problem:
                rows[name].memory = extra_memory(lambda call=call: call(*sets[0], out), settings.device)  # type: ignore[misc]
        able = {name: call for name, call in every.items() if not rows[name].problem}
        for call in able.values():
            prepare = getattr(call, "prepare", lambda *_: None)
            for given in sets:
                prepare(*given)
        times = alternate(able, sets, out, settings)
        for name, call in able.items():
            _attempt(trial, rows[name], call, -1)
            if not rows[name].problem:
                rows[name].times = times[name]
    yardstick = next((times[name] for name in baselines if name in able), None)
    for name in able:
        if yardstick and rows[name].times:
            rows[name].ratio = median(b / t for b, t in zip(yardstick, times[name], strict=True))
    return list(rows.values())


def _attempt(trial: Trial, row: Row, call: Call, which: int) -> None:
    given, out = trial.sets[which], trial.out
    poison(out)
    try:
        call(*given, out)
        row.match = workloads.verify(trial.op, given, out)
    except Unsupported as reason:
        row.problem = str(reason)
    except Exception as error:
        row.wrong = not row.baseline
        row.problem = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def candidates(op: Operator, backends: Sequence[str]) -> dict[str, Call]:
    """Explicit calls of an operator, by backend."""

    def on(backend: str) -> Call:
        return lambda *args: of(op)(*args, backend=backend)

    return {backend: on(backend) for backend in backends}


def usable(device: str) -> list[str]:
    """Backends whose speed on a device means something: not the references, not Triton's interpreter."""
    import torch

    sample = torch.empty(1, device=device)
    slow = {"numpy", "triton"} if device == "cpu" else {"numpy"}
    names = [name for name in registry.backend_names() if name not in slow]
    return [n for n in names if not (registry.backend(n).unavailable() or registry.refusal(n, sample))]


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, load, threads, versions, and what instructions torch may use."""
    import torch

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "unset"),
        "torch bfloat16": "native" if torch_has_native_bf16() else "emulated",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    for package in ("torch", "numba", "llvmlite", "triton", "numpy", "flagops"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    for index in range(torch.cuda.device_count()):
        facts[f"gpu {index}"] = torch.cuda.get_device_name(index)
    return facts
