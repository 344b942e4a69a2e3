"""Timing that can be believed: results are checked before and after, candidates alternate, inputs rotate.

Candidates run in ABBA order on inputs that together do not fit in the caches, into an output that is full of NaN before
each timing. A ratio of two candidates is the median over rounds of the two times taken side by side.

A baseline may say more than its call: ``prepare(*inputs)`` is run on every set before, for what is not to be timed, as
the packing of weights; ``held(*inputs)`` gives the call of the card that its result is held to, where it computes
another, ``beyond(arguments)`` what further roundings of its own add to the bound, and ``differs`` says in what;
``elapsed(inputs, out, clock)`` takes the time of calls elsewhere; ``backend`` is the only one of ours that it is
compared with. It may return its result in place of writing into ``out``.
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
from dataclasses import astuple, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from flagops import arrays, registry
from flagops.call import of
from flagops.errors import Unsupported
from flagops.machine import cpu_features, cpu_model, last_level_cache, torch_has_native_bf16
from flagops.operator import Operator
from flagops.tools import workloads

COLD = 128 << 20
"""Bytes of inputs that take turns at least, so that each call finds its own out of the caches, as a model's layers do.
Where the last caches are large, four times their size."""
SETS = 4096
"""The most sets of inputs that take turns: of calls so small that these do not fill `COLD`, Python is most."""
DRAWN = 64
"""Sets that are drawn; what further ones it takes are copies of these at other addresses."""
SPREAD = 0.3
"""The share of its median that the middle of a row's times may spread over; beyond, something disturbed them."""

ROOM = 0.25
"""How far products may exceed torch's own, which make the roof: those of packed weights did by up to a tenth."""

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
    """One candidate at one workload; times in seconds a call, one for each round; how many times as fast as each
    baseline it was, of which `ratio` is that to the first."""

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
    ratios: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    differs: str = ""

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
    its caches, FLOP/s of products in float32 and, where it has units for it, bfloat16, operations/s in int8."""

    bandwidth: float
    matmul: float
    half: float = 0.0
    int8: float = 0.0

    def share(self, row: Row) -> float:
        """Of what bounds a row, how much it reached."""
        return max(row.flops / self.peak(row), row.bytes / self.bandwidth) / row.median

    def exceeded(self, row: Row) -> bool:
        """Whether a row was faster than memory, or than any product may be: one of the two was measured wrong."""
        return max(row.flops / self.peak(row) / (1 + ROOM), row.bytes / self.bandwidth) > row.median

    def peak(self, row: Row) -> float:
        """Operations a second that the units which a row may use reach."""
        halves = 0.0 if row.dtype in ("float32", "float64") else self.half
        return max(self.matmul, halves, self.int8 if row.operator.startswith("int8") else 0.0)

    def best(self, other: Roofline) -> Roofline:
        """The higher of two measurements: what else runs only ever takes away."""
        return Roofline(*(max(x, y) for x, y in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.1f} GB/s, products {self.matmul / 1e9:.0f} GFLOP/s in float32, "
            f"{self.half / 1e9:.0f} in bfloat16, {self.int8 / 1e9:.0f} in int8"
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
    if settings.device in ("cpu", "cuda"):
        codes = [torch.randint(-99, 99, (2048, 2048), dtype=torch.int8, device=settings.device) for _ in range(2)]
        sums = torch.empty(2048, 2048, dtype=torch.int32, device=settings.device)
        calls["int8"] = lambda out: torch._int_mm(*codes, out=sums)
    times = alternate(calls, [()], torch.empty_like(one), settings, poisoned=False)
    best = {name: min(found) for name, found in times.items()}
    bandwidth = max(one.nbytes * arrays / best[name] for name, arrays in (("read", 1), ("copy", 2), ("triad", 3)))
    products = (2 * 2048**3 / best.get(name, math.inf) for name in ("float32", "bfloat16", "int8"))
    return Roofline(bandwidth, *products)


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

            def here(given: Sequence[Sequence[Any]], out: Any, clock: str, call: Call = call) -> float:
                wait()
                start = settings.clock()
                for one in given:
                    call(*one, out)
                wait()
                return settings.clock() - start

            with (within or {}).get(name, nullcontext)():
                elapsed = getattr(call, "elapsed", here)(given, out, settings.clock.__name__) / len(given)
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


def turns(used: int, cold: int | None = None) -> int:
    """How many sets of inputs of so many bytes it takes for each call to find its own out of the caches."""
    cold = cold or max(COLD, 4 * last_level_cache())
    return 1 if used >= 4 * cold else min(SETS, max(2, -(-cold // max(used, 1))))


def prepare(op: Operator, workload: str, device: str = "cpu", dtype: str | None = None, cold: bool = True) -> Trial:
    """Draw as many sets of inputs as it takes to find each cold. Raises Unsupported for a dtype it cannot run in."""
    import torch

    of = workloads.case(op, workload, dtype)
    sets = [workloads.inputs(op, of, 0, device)]
    used = sum(x.nbytes for x in sets[0] if arrays.is_torch(x))
    if cold:
        count = turns(used)
        sets += [workloads.inputs(op, of, seed, device) for seed in range(1, min(count, DRAWN))]
        sets += [[_elsewhere(x) for x in sets[i % DRAWN]] for i in range(DRAWN, count)]
    bound = op.bind((*sets[0], None))
    outs = tuple(
        torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for shape, dtype in zip(bound.shapes, bound.results, strict=True)
    )
    work = float(op.flops(bound.dims, bound.batch))
    moved = workloads.needed(op, sets[0]) + sum(x.nbytes for x in outs)
    return Trial(op, workload, bound.dtype, sets, outs if op.several else outs[0], work, moved)


def _elsewhere(x: Any) -> Any:
    """A copy of a tensor with its strides."""
    return x.clone() if arrays.is_torch(x) else x


def compare(trial: Trial, calls: Mapping[str, Call], baselines: Mapping[str, Call], settings: Settings) -> list[Row]:
    """Check, then time every candidate at a workload; all are called as ``call(*inputs, out)``.

    A candidate that is wrong, before or after it was timed, has no times. Ratios are to every baseline, the first of
    which that could run gives a row's own.
    """
    import torch

    sets, out, every = trial.sets, trial.out, {**calls, **baselines}
    rows = {name: trial.row(name, name in baselines) for name in every}
    held: dict[tuple[Any, ...], Any] = {}
    with torch.no_grad():
        for name, call in every.items():
            rows[name].differs = getattr(call, "differs", "")
            _attempt(trial, rows[name], call, 0, held)
            if not rows[name].problem:
                rows[name].memory = _extra(trial, call, settings)
        able = {name: call for name, call in every.items() if not rows[name].problem}
        for call in able.values():
            prepare = getattr(call, "prepare", lambda *_: None)
            for given in sets:
                prepare(*given)
        times = alternate(able, sets, out, settings)
        for name, call in able.items():
            _attempt(trial, rows[name], call, -1, held)
            if not rows[name].problem:
                rows[name].times = times[name]
    for name, row in rows.items():
        for other, call in baselines.items():
            alike = name == other or getattr(call, "backend", name) == name
            if alike and row.times and rows[other].times:
                row.ratios[other] = median(b / t for b, t in zip(times[other], times[name], strict=True))
        row.ratio = next(iter(row.ratios.values()), None)
    return list(rows.values())


def _extra(trial: Trial, call: Call, settings: Settings) -> int | None:
    """Bytes that a call takes; of one that runs in another process nobody here knows."""
    if hasattr(call, "elapsed"):
        return None
    return extra_memory(lambda: call(*trial.sets[0], trial.out), settings.device)


def _attempt(trial: Trial, row: Row, call: Call, which: int, held: dict[tuple[Any, ...], Any]) -> None:
    """Run a candidate on one set and hold its result to the reference, which is computed once for all of them."""
    given, out = trial.sets[which], trial.out
    poison(out)
    try:
        getattr(call, "prepare", lambda *_: None)(*given)
        result = call(*given, out)
        if result is not None and row.baseline:
            row.differs = "; ".join(filter(None, (getattr(call, "differs", ""), "allocates its result")))
            for to, x in zip(trial.op.each(out), trial.op.each(result), strict=True):
                to.copy_(x.view(to.shape))
        meant, beyond = getattr(call, "held", None), getattr(call, "beyond", None)
        if (which, meant, beyond) not in held:
            held[which, meant, beyond] = workloads.Once(trial.op, beyond), meant(*given) if meant else given
        op, inputs = held[which, meant, beyond]
        row.match = workloads.verify(op, inputs, out)
    except Unsupported as reason:
        row.problem = str(reason)
    except AssertionError as error:  # torch's own roundings may exceed our bounds, of which a table says so
        row.wrong, row.problem = not row.baseline, str(error) or "AssertionError"
    except Exception as error:
        row.wrong, row.problem = True, f"{type(error).__name__}: {error}"


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
        "cpu features": " ".join(cpu_features()) or "unknown",
        "last-level cache": f"{last_level_cache() / 2**20:.0f} MiB" if last_level_cache() else "unknown",
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
