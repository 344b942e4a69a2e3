"""Timing that can be believed: results are checked before and after, candidates alternate, inputs rotate.

Candidates run in ABBA order on inputs that together do not fit in the caches, into an output that is full of NaN before
each timing. A ratio of two candidates is the median over rounds of the two times taken side by side.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import TYPE_CHECKING, Any

from flagops import arrays, registry, testing
from flagops.call import of
from flagops.errors import Unsupported
from flagops.machine import cpu_model, torch_has_native_bf16
from flagops.operator import Operator

if TYPE_CHECKING:
    import torch

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


def case(op: Operator, workload: str, dtype: str | None = None, sizes: Mapping[str, int] | None = None) -> testing.Case:
    """A named workload of the card, in another dtype and other sizes if given. Raises Unsupported if the operator has
    no such dtype."""
    found = testing.workload(op, workload, sizes=sizes)
    if dtype is None:
        return found
    scalars, dtypes = dict(found.scalars), dict(found.dtypes)
    source = op.result.dtypes
    if isinstance(source, str) and source in op.scalars:
        try:
            scalars[source] = op.scalars[source].parse(dtype)
        except ValueError as error:
            raise Unsupported(f"{op.name}: {source} {error}") from None
    else:
        dtypes = testing.dtypes_near(op, dtype, found.absent)
        if op.result_dtype(dtypes, scalars) != dtype:
            raise Unsupported(f"{op.name} does not run in {dtype}")
    return dataclasses.replace(found, dtypes=tuple(dtypes.items()), scalars=tuple(scalars.items()))


def inputs(op: Operator, of: testing.Case, seed: int = 0, device: str = "cpu") -> list[Any]:
    """The inputs of a case by position, drawn fast: a large tensor repeats one random block of odd length."""
    import torch

    dims, dtypes = dict(of.dims), dict(of.dtypes)

    def make(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        if name == "indices" and "n" in dims:
            return _listed(shape, dims["n"], generator).to(dtype)
        if op.tensors[name].draw and dtypes[name] not in arrays.ONE_BYTE:
            return arrays.as_torch(_drawn(op.tensors[name], tuple(shape), dtypes[name], dims, seed))
        x = random_values(shape, dtype, generator)
        return x.abs() if op.aten and dtype.is_floating_point else x  # of which roots and logarithms are numbers

    return [x.to(device) if arrays.is_torch(x) else x for x in made(op, of, make, seed)]


def made(op: Operator, of: testing.Case, make: Callable[..., torch.Tensor], seed: int = 0) -> list[Any]:
    """The inputs of a case by position, each tensor by ``make(name, shape, dtype)`` and laid out as the case says."""
    import torch

    dims, dtypes, layouts, scalars = dict(of.dims), dict(of.dtypes), dict(of.layouts), dict(of.scalars)
    batched = next((n for n, t in op.tensors.items() if t.axes.startswith("...")), None)
    found: list[Any] = []
    for name in op.inputs:
        if name in scalars or name in of.absent:
            found.append(scalars.get(name))
            continue
        shape = op.shape(op.tensors[name], dims, of.batch if op.aten or name == batched else ())
        dtype = getattr(torch, dtypes[name])
        if layouts.get(name) == "transposed":
            found.append(make(name, shape[::-1], dtype).permute(*reversed(range(len(shape)))))
        else:
            found.append(make(name, shape, dtype))
    return _fitted(op, found, dims, seed) if op.fit else found


def _fitted(op: Operator, made: Sequence[Any], dims: dict[str, int], seed: int) -> list[Any]:
    import numpy

    assert op.fit
    named = {n: arrays.as_numpy(x) if arrays.is_torch(x) else x for n, x in zip(op.inputs, made, strict=True)}
    before = dict(named)
    op.fit(named, dims, numpy.random.default_rng(seed))
    return [
        x if named[n] is before[n] else None if named[n] is None else arrays.as_torch(named[n])
        for n, x in zip(op.inputs, made, strict=True)
    ]


def _drawn(tensor: Any, shape: tuple[int, ...], dtype: str, dims: dict[str, int], seed: int) -> Any:
    import numpy

    return numpy.asarray(tensor.draw(numpy.random.default_rng(seed), shape, dtype, dims), order="C")


def random_values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    import torch

    size = math.prod(shape)
    block = min(size, (1 << 23) - 3)
    if dtype.itemsize == 1:
        values = 2 if dtype == torch.bool else 256
        one = torch.randint(0, values, (block,), dtype=torch.uint8, generator=generator)
        if dtype == torch.float8_e4m3fn:
            one[one & 0x7F == 0x7F] = 0  # no NaN
        elif dtype == torch.float8_e8m0fnu:
            one = 119 + one % 16  # scales as a model has them
    else:
        one = torch.randn(block, generator=generator).to(dtype)
    whole = torch.empty(size, dtype=one.dtype)
    for start in range(0, size, max(block, 1)):
        whole[start : start + block] = one[: size - start]
    return whole.view(dtype).view(tuple(shape))


def _listed(shape: Sequence[int], rows: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct rows for each query, as a model lists them: a window that moves with the query, the others scattered."""
    import torch

    queries, k = math.prod(shape[:-1]), shape[-1]
    window = min(128, k)
    start = torch.linspace(0, max(rows - window, 0), queries, dtype=torch.float64).long()[:, None]
    near = start + torch.arange(window)
    scores = torch.rand(queries, rows, generator=generator).scatter_(1, near, -1.0)
    return torch.cat((near, scores.topk(k - window).indices), 1).view(*shape)


def verify(op: Operator, given: Sequence[Any], out: Any) -> str:
    """Hold a result to the reference on rows and columns spread over all of it; returns how they matched.

    Raises AssertionError, also where anything is left of the NaN that the output was full of.
    """
    if not op.exact:
        left = sum(int(x.isnan().sum()) for x in op.each(out) if x.is_floating_point() and x.dtype.itemsize > 1)
        assert not left, f"{left} elements are NaN or were not written"
    named = dict(zip(op.inputs, given, strict=True))
    parts = op.each(out)
    if op.separable:
        named, parts = excerpt(op, named, parts)
    held = {n: arrays.as_numpy(x.cpu()) if arrays.is_torch(x) else x for n, x in named.items()}
    got = tuple(arrays.as_numpy(x.cpu()) for x in parts)
    testing.compare(op, held, got if op.several else got[0])
    return "bits" if op.exact else "bound"


def excerpt(
    op: Operator, named: Mapping[str, Any], outs: tuple[torch.Tensor, ...]
) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    """A smaller call whose results are parts of ``outs``: some rows and, where each is its own sum, columns."""
    out, *others = outs
    words = op.result.axes.split()
    first = next(iter(op.tensors))
    rows = [word for word in words[:-1] if out.ndim >= len(words) or word != "..."]
    coded = {n for n, t in op.tensors.items() if t.codes and arrays.is_torch(named[n])}  # torch selects no rows of FP8
    part = {n: arrays.codes(x) if n in coded else x for n, x in named.items()}
    for word in (*rows, words[-1]):
        if isinstance(op.separable, tuple) and word not in op.separable:
            continue
        if word == words[-1]:
            blocks = any(f"{word}b" in t.axes.split() and part[n] is not None for n, t in op.tensors.items())
            given = any(word in tensor.axes.split() for tensor in op.tensors.values())
            if "*" in word or word in op.tensors[first].axes.split() or blocks or not given:
                continue
            limit = 512
        else:
            limit = 64 if len(rows) == 1 else 8
        axis = words.index(word) - len(words) if word != "..." else -out.ndim
        size = out.shape[axis]
        keep = _spread(size, limit, out.device)
        out = out.index_select(axis, keep)
        for i, tensor in enumerate(list(op.results.values())[1:]):
            axes = tensor.axes.split()
            if word in axes:
                others[i] = others[i].index_select(axes.index(word) - len(axes) if word != "..." else 0, keep)
        for name, tensor in op.tensors.items():
            axes = tensor.axes.split()
            if word in axes and part[name] is not None:
                at = axes.index(word) - len(axes) if word != "..." else len(words) - len(axes) - out.ndim
                if part[name].ndim >= -at and part[name].shape[at] == size:  # else it broadcasts
                    part[name] = part[name].index_select(at, keep)
        if op.name == "fp8_dequantize":  # each row of the excerpt takes the scales of its block along
            height, width = part["block"]
            part |= {"scale": part["scale"].index_select(0, keep // height), "block": (1, width)}
    return part, (out, *others)


def _spread(size: int, limit: int, device: Any) -> torch.Tensor:
    """Up to `limit` indices, one from each equal part, the first and the last among them."""
    import torch

    if size <= limit:
        return torch.arange(size, device=device)
    steps = torch.linspace(0, size - 1, limit, dtype=torch.float64)
    jitter = torch.rand(limit, generator=torch.Generator().manual_seed(size)) * (size / limit)
    steps[1:-1] += jitter[1:-1] - size / limit / 2
    found: torch.Tensor = torch.unique(steps.round().long().clamp(0, size - 1))
    return found.to(device)


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

    of = case(op, workload, dtype)
    sets = [inputs(op, of, 0, device)]
    used = sum(x.nbytes for x in sets[0] if arrays.is_torch(x))
    if cold:
        sets += [inputs(op, of, seed, device) for seed in range(1, turns(used))]
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
        row.match = verify(trial.op, given, out)
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
