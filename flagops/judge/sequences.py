"""What one call alone cannot show: results that were kept, memory that was shared, and errors that come seldom."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops import registry
from flagops.cases import Case, Scope, as_kind, draw_case
from flagops.errors import Unsupported
from flagops.layouts import bits
from flagops.operator import Operator

from .calls import Call, run
from .comparison import compare

Array = NDArray[Any]


def hold_sequence(op: Operator, backend: str, case: Case) -> float:
    """Calls of one shape in turn, each with values of its own, at new addresses and the same; others in between.

    Every result is held to the reference, no result may change later, and the first call repeated gives the same.
    """
    first = Call(op, backend, case)
    got = first.run()
    worst = first.hold(got)
    kept = [(first, got, "a call with other values at other addresses")]
    other = Call(op, backend, dataclasses.replace(case, redrawn=1))
    for turn in range(3):
        again = other.run()
        worst = max(worst, other.hold(again))
        _unchanged(kept, case)
        other.renew(2 + turn)  # the same objects, addresses and shapes
    changed = _one_element(other, case.seed)
    worst = max(worst, other.hold(other.run())) if changed else worst
    _others(op, backend, case)
    fresh = [x for _ in range(2) for x in run(op, backend, first.given)] if not first.shared else []
    if fresh:  # allocated for the call
        result = tuple(fresh[: len(fresh) // 2]) if op.several else fresh[0]
        compare(op, first.arguments, result, str(case), first.paired)
    before = [x.copy() for x in fresh]
    other.renew()
    worst = max(worst, other.hold(other.run()))
    _unchanged(kept, case)
    assert all(map(_equal, fresh, before)), f"{op.name} on {backend}: a later call changed an earlier result\n{case}"
    return worst


def _unchanged(kept: Sequence[tuple[Call, list[Array], str]], case: Case) -> None:
    for call, got, after in kept:
        for place, result in zip(call.outs, got, strict=True):
            assert _equal(place.view, result), f"{call.op.name} on {call.backend}: {after} changed its result\n{case}"


def _equal(one: Array, two: Array) -> bool:
    return bool(np.array_equal(bits(one), bits(two)))


def _one_element(call: Call, seed: int) -> bool:
    """Change one element of one input, to what another element of it is."""
    rng = np.random.default_rng(seed)
    names = [n for n, x in call.inputs.items() if x.view.size > 1 and 0 not in x.view.strides]
    names = [n for n in names if call.op.tensors[n].draw is None and n not in call.op.inplace.values()]
    if not names:
        return False
    name = names[rng.integers(len(names))]
    view = call.inputs[name].view
    where, source = (np.unravel_index(rng.integers(view.size), view.shape) for _ in range(2))
    view[where] = view[source]
    call.renew()
    return True


def _others(op: Operator, backend: str, case: Case) -> None:
    """Small calls of this operator in other shapes, and of another of the same backend."""
    rng = np.random.default_rng(case.seed)

    def choose(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(0, len(options)))]

    for name in (op.name, choose(sorted({op.name, *_mates(backend)}))):
        other = draw_case(registry.operator(name), choose, Scope((3, 2, 5), 1 << 8, 1), (case.kind,))
        dtypes = dict(other.dtypes)
        with contextlib.suppress(Exception, SystemExit):  # which that kernel's own judgement will find
            given = {n: as_kind(x, other.kind, dtypes.get(n)) for n, x in other.arguments().items()}
            run(registry.operator(name), backend, given)


trusted: set[tuple[str, str]] = set()
"""Kernels, by operator and backend, that passed the first stage in this process: calling them ends nobody else's."""


def _mates(backend: str) -> list[str]:
    """Operators whose kernels of a backend may run in between: our own, and those that are trusted."""
    if backend in registry.BUILT_IN:
        return [name for name in registry.operators() if registry.written(name, backend)]
    return [name for name, other in trusted if other == backend]


class Repeated:
    """A small call made over and over: equal bits are right results, other bits are held to the reference once."""

    def __init__(self, op: Operator, backend: str, case: Case) -> None:
        self.call = Call(op, backend, case)
        self.right: set[bytes] = set()
        self.strict = registry.find(op.name, backend).deterministic
        """Whether bits must repeat; for one number of threads, which may decide where sums are cut."""

    def once(self) -> float:
        call, share = self.call, 0.0
        call.renew()
        got = call.run()
        found = b"".join(x.tobytes() for x in got)
        if found not in self.right:
            share = call.hold(got)
            name = f"{call.op.name} on {call.backend}"
            assert not (self.strict and self.right), f"{name} differs between repeats\n{call.case}"
            self.right.add(found)
        return share


def hold_repeats(
    op: Operator, backend: str, cases: Sequence[Case], seconds: float, least: int, tell: Callable[[Case], None]
) -> tuple[int, float]:
    """Small calls, over and over: by 1, 2 and 4 threads of torch, beside a busy process, and in threads at once.

    Returns how many calls were made and the worst share of a bound. Of errors that each call has with probability p,
    a run of n calls misses all with probability (1 - p)^n.
    """
    made: list[Repeated] = []
    worst = 0.0
    for case in cases:
        tell(case)
        with contextlib.suppress(Unsupported):
            one = Repeated(op, backend, case)
            worst = max(worst, one.once())
            made.append(one)
    count, stop = 0, time.thread_time() + seconds
    if not made:
        return 0, worst
    for part, (team, busy) in enumerate(((1, False), (2, False), (4, False), (2, True))):
        until = stop - seconds * (3 - part) / 5
        with _threads(team), _busy() if busy else contextlib.nullcontext():
            done = 0
            for one in made:
                one.right.clear()
            while done < least // 5 or time.thread_time() < until:
                one = made[done % len(made)]
                if done < 4 * len(made) or done % 64 == 0:
                    tell(one.call.case)
                worst, done = max(worst, one.once()), done + 1
            count += done
    return count + _at_once(made, op, backend, max(least // 5, len(made))), worst


def _at_once(made: Sequence[Repeated], op: Operator, backend: str, count: int) -> int:
    """The calls from four threads of Python at a time, each on memory of its own."""
    failures: list[BaseException] = []

    def work(share: int) -> None:
        try:
            own = [Repeated(op, backend, one.call.case) for one in made]
            for one, known in zip(own, made, strict=True):
                one.right, one.strict = set(known.right), False
            for turn in range(share):
                own[turn % len(own)].once()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(count // 4 + 1,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError(f"{op.name} on {backend}, called from four threads at once: {failures[0]}")
    return count


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """A process that takes a core, and ends with this one."""
    script = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", script])
    try:
        yield
    finally:
        process.kill()
        process.wait()
