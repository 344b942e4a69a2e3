"""What stands between a caller and a compiled loop: Python frames and microseconds of small calls on one thread.

``python benchmarks/bench_calls.py [--rounds 31] [--json FILE] [--markdown FILE]``. For each call: an *empty* override
in Python that only makes the result; our *site* (or explicit call) around a kernel that does nothing; the *call* with
the numba kernel; and that less the compiled *loop* it is for, which is a run of its tasks less one of no tasks. The
ways take turns in every round; numbers are medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

import flagops
from flagops import dispatch, registry, tables
from flagops.backends import numba
from flagops.override.lowering import LOWERINGS
from flagops.tools import measure, results
from flagops.transformers._handle import Handle

HEAD = ("call", "way", "frames", "empty", "site", "site / empty", "call", "call / empty", "call - loop")
BATCH = 60


@dataclass(frozen=True)
class Entry:
    """A call; `empty` makes its result, and is None where no operator of torch is overridden."""

    name: str
    way: str
    call: Callable[[], Any]
    operator: str
    overload: str = ""
    empty: Callable[..., Any] | None = None


@dataclass
class Times:
    """Microseconds of one call, one number for each round."""

    empty: list[float] = field(default_factory=list)
    site: list[float] = field(default_factory=list)
    call: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)


def entries() -> list[Entry]:
    a, b, bias, out = torch.rand(4, 4), torch.rand(4, 4), torch.rand(4), torch.empty(4, 4)
    x, weight, q = torch.rand(4, 64), torch.rand(64), torch.rand(1, 2, 4, 16)
    hyper = torch.rand(1, 256), torch.rand(1, 4, 256), torch.rand(1, 4), torch.rand(1, 4, 4)
    experts = (
        torch.rand(1, 64), torch.rand(1, 2), torch.tensor([[1, 3]], dtype=torch.int32),
        torch.rand(4, 64, 64), torch.rand(4, 64, 32),
    )  # fmt: skip
    attend, handle = torch.nn.functional.scaled_dot_product_attention, Handle((), "numba", "fast")
    aten = [
        ("mm", "mm", lambda: torch.mm(a, b), "matmul", lambda *_: torch.empty(4, 4)),
        ("addmm", "addmm", lambda: torch.addmm(bias, a, b), "linear", lambda *_, **__: torch.empty(4, 4)),
        ("mm out=", "mm.out", lambda: torch.mm(a, b, out=out), "matmul", lambda *_, out: out),
        (
            "rms_norm", "rms_norm", lambda: torch.rms_norm(x, (64,), weight, 1e-6), "rms_norm",
            lambda *_: torch.empty(4, 64),
        ),
        (
            "sdpa", "scaled_dot_product_attention", lambda: attend(q, q, q),
            "scaled_dot_product_attention", lambda *_, **__: torch.empty(1, 2, 4, 16),
        ),
    ]  # fmt: skip
    found = [Entry(name, "override", call, op, overload, empty) for name, overload, call, op, empty in aten]
    explicit: dict[str, tuple[Any, ...]] = {
        "matmul": (a, b), "rms_norm": (x, weight, 1e-6), "hc_post": hyper, "moe_experts": experts
    }  # fmt: skip
    for op, args in explicit.items():
        public = getattr(flagops, op)
        found.append(Entry(op, "explicit", lambda f=public, args=args: f(*args, backend="numba"), op))
    found.append(Entry("matmul out=", "explicit", lambda: flagops.matmul(a, b, out=out, backend="numba"), "matmul"))
    for op in ("hc_post", "moe_experts"):
        args = explicit[op]
        found.append(Entry(op, "patched", lambda op=op, args=args: handle.call(op, *args), op))
    return found


def microseconds(call: Callable[[], Any]) -> float:
    """The fastest of a few batches: whoever else runs on the machine makes the others slower."""
    batches = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        batches.append(time.perf_counter() - start)
    return round(min(batches) / BATCH * 1e6, 3)


def frames(call: Callable[[], Any]) -> int:
    """The deepest Python frame of a call, counted from its first."""
    depth = deepest = 0

    def profile(_: Any, event: str, __: Any) -> None:
        nonlocal depth, deepest
        depth += {"call": 1, "return": -1}.get(event, 0)
        deepest = max(deepest, depth)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return deepest - 1  # `call` itself


@contextlib.contextmanager
def emptied(entry: Entry) -> Iterator[None]:
    """An override that only makes the result, where torch's kernel is."""
    composite = LOWERINGS[entry.overload.partition(".")[0]].composite
    key = "CompositeImplicitAutograd" if composite else "CPU"
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(entry.overload, entry.empty, key, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def ours(entry: Entry, stub: bool = False, calls: int = 20) -> Iterator[None]:
    """Plans of their own for an entry's calls, after the first few; with a kernel that does nothing if asked for."""
    find, kept = registry.find, dict(dispatch._plans)
    dispatch._plans.clear()
    if stub:
        registry.find = lambda op, name: dataclasses.replace(find(op, name), function=lambda *_: None)
    try:
        with flagops.enable(backend="numba") if entry.overload else contextlib.nullcontext():
            for _ in range(calls):
                entry.call()
            yield
    finally:
        registry.find = find
        dispatch._plans.clear()
        dispatch._plans.update(kept)


def loops(entry: Entry) -> float:
    """Microseconds of the compiled loops of a call: with their tasks, less without any."""
    spent, run = 0.0, numba.parallel

    def parallel(kernel: Any, tasks: int, *args: Any, minimum: int = 1) -> None:
        nonlocal spent
        spent += microseconds(lambda: kernel(0, tasks, *args)) - microseconds(lambda: kernel(0, 0, *args))
        run(kernel, tasks, *args, minimum=minimum)

    homes = [m for name, m in sys.modules.items() if name.startswith("flagops.kernels.") and hasattr(m, "parallel")]
    for home in homes:
        home.parallel = parallel  # type: ignore[attr-defined]
    try:
        with ours(entry, calls=1):
            return spent
    finally:
        for home in homes:
            home.parallel = run  # type: ignore[attr-defined]


def measured(entry: Entry, rounds: int) -> tuple[int, Times]:
    with ours(entry):
        deepest = frames(entry.call)
    times = Times()
    for _ in range(rounds):
        if entry.empty:
            with emptied(entry):
                times.empty.append(microseconds(entry.call))
        with ours(entry, stub=True):
            times.site.append(microseconds(entry.call))
        with ours(entry):
            times.call.append(microseconds(entry.call))
        times.loop.append(loops(entry))
    return deepest, times


def cells(entry: Entry, deepest: int, times: Times) -> list[str]:
    def many(numbers: list[float]) -> str:
        return f"{median(numbers):.2f}" if numbers else ""

    def of(ours: list[float]) -> str:
        return f"{median(x / y for x, y in zip(ours, times.empty, strict=True)):.2f}" if times.empty else ""

    beyond = [x - y for x, y in zip(times.call, times.loop, strict=True)]
    return [
        entry.name, entry.way, f"{deepest}", many(times.empty), many(times.site), of(times.site),
        many(times.call), of(times.call), many(beyond),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = [(entry, *measured(entry, options.rounds)) for entry in entries()]
    rows = [cells(entry, deepest, times) for entry, deepest, times in found]
    tables.show("microseconds of small calls", HEAD, rows)
    if options.json:
        calls = [{"call": e.name, "way": e.way, "frames": deepest, **asdict(t)} for e, deepest, t in found]
        options.json.write_text(json.dumps({"machine_info": measure.machine(), "calls": calls}, indent=1) + "\n")
    if options.markdown:
        results.write_markdown(options.markdown, HEAD, rows, __doc__ or "")


if __name__ == "__main__":
    main()
