"""A kernel before the judge: the stages in turn, each with its share of the time, and the record of what they found."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flagops import call, registry
from flagops.cases import INTERPRETED, Case, Scope, kinds_of, scope
from flagops.errors import Unsupported
from flagops.layouts import FLIPPED, SPREAD, Allocate, heap
from flagops.operator import Operator

from . import gradients
from .calls import Call, assert_facts, assert_parity, assert_refused
from .constants import constants
from .draws import EMPTY, Draws, elements, empty
from .memory import Guarded
from .process import Watch, names
from .sequences import hold_repeats, hold_sequence, trusted

REPEATS = 2000
"""Small calls at least, made over and over in a default run."""
SECONDS = 10.0
"""Of a default run."""
ROUNDS = (0.15, 1.0)
"""Of the time of each stage; a stage of one case has its turn in the last."""
LEAST_SHARE = 2 / 3
"""Of all cases a kernel must run at least so many, of those with any one dtype or layout a fifth of that: it fails
where it was shown to run fewer, by three standard errors."""
LEAST_ASKED = 16
"""Cases with a word, fewer of which say nothing of their share."""
UNDECIDED = 1000
"""More cases at most, where the first ones do not decide on that."""


@dataclass
class Record:
    """What is known of a kernel after a run; plain data, for reports."""

    operator: str
    backend: str
    seed: int
    result: str = "ok"
    finding: str = ""
    stage: str = ""
    case: str = ""
    seconds: float = 0.0
    cases: Counter[str] = field(default_factory=Counter)
    """How many cases each stage ran."""
    calls: int = 0
    """Of the stage of repeats."""
    asked: Counter[str] = field(default_factory=Counter)
    ran: Counter[str] = field(default_factory=Counter)
    """By dtype and layout, ``"float16"`` or ``"padded"``, and ``"all"``."""
    refused: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    """The largest share of its bound that an error took, by ``"dtype, layout"`` of the first tensor."""
    uncovered: list[str] = field(default_factory=list)

    def share(self, word: str = "all") -> float:
        """Of the cases with this dtype or layout, how many the kernel ran."""
        return self.ran[word] / self.asked[word] if self.asked[word] else 1.0

    def undecided(self, word: str, least: float) -> bool:
        """Whether a kernel that runs just `least` of these cases might have been seen to run this share of so many."""
        return abs(self.share(word) - least) < 3 * math.sqrt(least * (1 - least) / self.asked[word])

    def missed(self, rate: float) -> float:
        """The probability that a run misses an error that each small call has at this rate."""
        return float((1 - rate) ** self.calls)


class Session:
    """Judges one kernel. `tell` hears of every case before it runs, for whoever must say what ended the process."""

    def __init__(
        self,
        op: Operator,
        backend: str,
        seed: int = 0,
        guarded: bool = False,
        tell: Callable[[str, Case], None] = lambda stage, case: None,
        libraries: Watch | None = None,
    ) -> None:
        self.libraries = libraries or Watch(names)
        self.op, self.backend, self.guarded, self.tell = op, backend, guarded, tell
        self.within: Scope = scope(backend)
        self.seconds = SECONDS
        self.streams: dict[str, Iterator[Case]] = {}
        self.record = Record(op.name, backend, seed)
        self.random = np.random.default_rng([seed, zlib.crc32(op.name.encode())])
        self.draws = Draws(op, self.choose, self.within, kinds_of(backend))

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.random.integers(0, len(options)))]

    def allocate(self, case: Case) -> Allocate:
        return Guarded(case.seed % 2 == 0) if self.guarded else heap

    def run(self, seconds: float = SECONDS, strict: bool = False, least_share: float = LEAST_SHARE) -> Record:
        """All stages; ends at the first finding."""

        def stages() -> None:
            self._begin()
            self.seconds, start = seconds, time.monotonic()
            for part in ROUNDS:  # a short round finds most of what is wrong
                for stage in STAGES:
                    self._stage(stage, seconds * stage.share, part)
                    _nothing_changed(self.libraries, "replaced")
                    trusted.add((self.op.name, self.backend))
            self._decide(least_share)
            self._enough(strict, least_share)
            self._say_what_is_not_covered()
            self.record.seconds = time.monotonic() - start

        return self._judged(stages)

    def examples(self, count: int) -> Record:
        """So many drawn cases instead of all stages."""
        parity = dataclasses.replace(STAGES[0], least=count)

        def stages() -> None:
            self._stage(parity, 0.0)
            self._enough(False, 0.0)

        return self._judged(stages)

    def replay(self, stage: str, case: Case) -> Record:
        """One case in one stage again."""
        chosen = {s.name: s for s in STAGES}[stage]
        return self._judged(lambda: self._hold(chosen, case))

    def _judged(self, work: Callable[[], None]) -> Record:
        start = time.monotonic()
        try:
            self.watch = Watch()
            work()
            _nothing_changed(self.libraries, "replaced")
        except Finding:
            pass
        except AssertionError as error:
            self._found("WRONG", str(error))
        self.record.seconds = self.record.seconds or time.monotonic() - start
        return self.record

    def _begin(self) -> None:
        """Let a kernel compile what it will; what is wrong with these calls the first stage says."""
        for case in itertools.islice(self.draws.small(), 24):
            self.tell("parity", case)
            with contextlib.suppress(Exception, SystemExit):
                Call(self.op, self.backend, case).run()

    def _stage(self, stage: Stage, seconds: float, part: float = 1.0) -> None:
        """A part of a stage's time, going on where the last part ended."""
        if part < 1 and stage.least == 1:
            return
        stop = time.thread_time() + part * seconds  # of this thread: other programs make no run shorter
        least = math.ceil(part * (stage.least if self.within is not INTERPRETED else min(stage.least, 4)))
        cases = self.streams.setdefault(stage.name, stage.cases(self))
        for number in itertools.count():
            if number >= least and time.thread_time() > stop:
                return
            case = next(cases, None)
            if case is None:
                return
            self._hold(stage, case)

    def _hold(self, stage: Stage, case: Case) -> None:
        record = self.record
        record.stage, record.case = stage.name, str(case)
        self.tell(stage.name, case)
        words = {"all", *dict(case.dtypes).values(), *dict(case.layouts).values()}
        try:
            share = stage.hold(self, case)
        except Unsupported as reason:
            if stage.counts:
                record.asked.update(words)
            record.refused[str(reason)] += 1
        except AssertionError as error:
            self._found("WRONG", str(error))
            raise Finding from None
        except (Exception, SystemExit) as error:
            self._found("RAISED", f"{type(error).__name__}: {error}\n{_where(error)}")
            raise Finding from None
        else:
            record.cases[stage.name] += 1
            if stage.counts:
                record.asked.update(words)
                record.ran.update(words)
            key = f"{next(iter(dict(case.dtypes).values()))}, {next(iter(dict(case.layouts).values()), 'contiguous')}"
            record.worst[key] = max(record.worst.get(key, 0.0), share)
        _nothing_changed(self.watch, "changed")

    def _say_what_is_not_covered(self) -> None:
        record, kernel = self.record, registry.find(self.op.name, self.backend)
        if not kernel.backward:
            record.uncovered.append("gradients: the kernel has no backward of its own")
        elif not record.cases["gradients"]:
            record.uncovered.append("gradients: no case had one")
        seen = {(n.removeprefix("dtype of "), v) for n, v in self.draws.coverage.features if n.startswith("dtype of ")}
        for name, tensor in self.op.tensors.items():
            allowed = tensor.dtypes
            missing = [d for d in allowed if (name, d) not in seen] if isinstance(allowed, tuple) else []
            record.uncovered += [f"{name} of {dtype}" for dtype in missing]
        record.uncovered += [f"all calls with: {reason}" for reason in record.refused]

    def _found(self, result: str, text: str) -> None:
        self.record.result, self.record.finding = result, text

    def _decide(self, least_share: float) -> None:
        """Ask for more cases where a share that ran is so near to the least that other draws might say otherwise."""
        record = self.record
        counting = dataclasses.replace(STAGES[0], hold=_runs)
        more = UNDECIDED if self.within is not INTERPRETED else UNDECIDED // 20
        for case in itertools.islice(self.draws.drawn(), more):
            few = (word for word in record.asked if record.share(word) < 1 and record.asked[word] >= LEAST_ASKED)
            if not any(record.undecided(word, _least(word, least_share)) for word in few):
                return
            self._hold(counting, case)

    def _enough(self, strict: bool, least_share: float) -> None:
        record = self.record
        least = {word: 1.0 if strict else _least(word, least_share) for word in record.asked}
        few = [
            word
            for word in sorted(record.asked)
            if record.asked[word] >= LEAST_ASKED
            and record.share(word) < least[word]
            and not record.undecided(word, least[word])
        ]
        record.stage = record.case = ""
        assert record.ran["all"], f"no case ran: {dict(record.refused)}"
        assert not few, "too few cases ran: " + ", ".join(f"{record.share(w):.0%} of {w}" for w in few)


def _least(word: str, least_share: float) -> float:
    """The share of the cases with a word that must run."""
    return least_share if word == "all" else least_share / 5


class Finding(Exception):
    """Ends a run; the record says what was found."""


def _nothing_changed(watch: Watch, how: str) -> None:
    changes = watch.changes()
    assert not changes, f"the kernel {how} " + "; ".join(changes[:4])


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return "\n".join(f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)


@dataclass(frozen=True)
class Stage:
    """A way of trying a kernel: which cases, and what is asked of each.

    share: of the time. least: cases, however long they take. counts: whether its refusals count in the share that ran.
    """

    name: str
    share: float
    least: int
    cases: Callable[[Session], Iterator[Case]]
    hold: Callable[[Session, Case], float]
    counts: bool = False


def _parity(session: Session, case: Case) -> float:
    return assert_parity(session.op, session.backend, case, session.allocate(case))


def _runs(session: Session, case: Case) -> float:
    Call(session.op, session.backend, case).run()
    return 0.0


def _facts(session: Session, case: Case) -> float:
    assert_facts(session.op, session.backend, case, repeats=3)
    return 0.0


def _sequence(session: Session, case: Case) -> float:
    return hold_sequence(session.op, session.backend, case)


def _gradient(session: Session, case: Case) -> float:
    try:
        return gradients.hold_gradient(session.op, session.backend, case)
    except NotImplementedError as reason:  # a backward, unlike a kernel, is not asked before
        raise Unsupported(str(reason)) from None


def _gradient_cases(session: Session) -> Iterator[Case]:
    """Small cases, and every fourth around the kernel's own numbers."""
    kernel = registry.find(session.op.name, session.backend)
    if not kernel.backward or "torch" not in session.draws.kinds:
        return
    clear: tuple[str, ...] = gradients.VALUES
    unclear: tuple[str, ...] = FLIPPED
    if session.op.judge:  # which elements are selected is clear where no two are equal
        clear, unclear = ("normal", "positive", "large range"), (*FLIPPED, *SPREAD)
    around = session.draws.around(constants(kernel.backward)[:16])
    for case in session.draws.drawn():
        some = (case, *itertools.islice(around, session.choose((0, 0, 1))))
        for one in some:
            if (empty(one) or gradients.coded(one)) and session.choose(range(EMPTY)):
                continue
            layouts = tuple((n, "padded" if x in unclear else x) for n, x in one.layouts)
            values = session.choose(clear)
            yield dataclasses.replace(one, values=values, layouts=layouts, kind="torch", inplace=False, mode="")


def hold_gradients(op: Operator, backend: str, count: int, seed: int) -> None:
    """The first cases of the judge's gradients, none where the backend has no backward. Raises AssertionError."""
    session = Session(op, backend, seed)
    for case in itertools.islice(_gradient_cases(session), count):
        with contextlib.suppress(Unsupported):
            _gradient(session, case)


def _around(session: Session) -> Iterator[Case]:
    function = registry.find(session.op.name, session.backend).function
    return session.draws.around(constants(function)[:40])


def _repeats(session: Session, case: Case) -> float:
    """The case and others as small, over and over."""
    others = [dataclasses.replace(case, seed=case.seed ^ 1), *itertools.islice(session.draws.small(), 14)]
    least = REPEATS if session.within is not INTERPRETED else REPEATS // 20
    own = [c if not c.mode.startswith("default") else dataclasses.replace(c, mode="") for c in (case, *others)]
    calls, worst = hold_repeats(  # the default dtype is not a thread's own
        session.op, session.backend, own, 0.15 * session.seconds, least,
        lambda one: session.tell("repeats", one),
    )  # fmt: skip
    session.record.calls += calls
    return worst


def _workloads(session: Session) -> Iterator[Case]:
    """The named workloads that take about a second at most, in any order."""
    from flagops.tools import workloads

    loads = [workloads.case(session.op, name) for name in session.op.workloads]
    small = [
        c for c in loads if elements(session.op, c) < 1 << 24 and session.op.flops(dict(c.dims), c.batch) < 1 << 31
    ]
    while small and session.within is not INTERPRETED and "torch" in session.draws.kinds:
        yield small.pop(int(session.random.integers(len(small))))


def _workload(session: Session, case: Case) -> float:
    """Rows of a workload spread over all of it."""
    from flagops.tools import workloads

    given = workloads.inputs(session.op, case, session.record.seed)
    out = call.of(session.op)(*given, backend=session.backend)
    workloads.verify(session.op, given, out)
    return 0.0


def _astray(session: Session) -> Iterator[Case]:
    return session.draws.drawn() if session.op.astray else iter(())


def _refusal(session: Session, case: Case) -> float:
    assert_refused(session.op, session.backend, case, session.allocate(case))
    return 0.0


STAGES = (
    Stage("parity", 0.25, 60, lambda s: s.draws.drawn(), _parity, counts=True),
    Stage("sequence", 0.08, 12, lambda s: s.draws.drawn(), _sequence),
    Stage("facts", 0.05, 8, lambda s: s.draws.drawn(), _facts),
    Stage("refusals", 0.02, 12, _astray, _refusal),
    Stage("own numbers", 0.2, 24, _around, _parity),
    Stage("gradients", 0.12, 12, _gradient_cases, _gradient),
    Stage("long", 0.13, 12, lambda s: s.draws.long(), _parity),
    Stage("repeats", 0.0, 1, lambda s: s.draws.small(), _repeats),
    Stage("workloads", 0.05, 1, _workloads, _workload),
)
