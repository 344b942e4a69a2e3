"""PyTorch's own samples (OpInfo) judge every aten overload that flagops replaces: ``python tests/opinfo_judge.py``.

Each sample of each OpInfo that reaches a replaced name is called with torch alone and under `flagops.enable`, twice: as
it is, with tensors not contiguous, transposed, offset by an element, and expanded with stride 0; with seven kinds of
``out=``; in place; with gradients; and with the OpInfo's wrong inputs; over memory that is read, or whose elements are
one, where torch refuses that or gives the same result. On tensors of the same layout both must have the same dtype,
shape, strides, requires_grad, aliasing, warnings (but for those of torch's own speed) and errors (the type, and torch's
text or one that names the operator), and leave their inputs alone, or change them alike.

Values. Integers, bools and what operators compute that are held bit for bit: torch's bits, but for which of equal
elements topk, kthvalue and sorts that are not stable choose, which torch leaves open. Other floats: let e be torch's
result in float64, and o ours. Where o is not torch's,

    |o - e| <= max(2 T, ROUNDINGS (u |e| + s))

T is how far torch's own result is from e at most, u half a unit in the last place of the result's dtype (or of what it
is without ``out=``, if that is coarser), and s how far e moves at most, when every float of the input is moved by its
last place up or down, by chance, DRAWS times (of float32 for half types, which kernels widen). In float64, where e is
torch's result, T is what it is in float32 times the ratio of the units: where an algorithm enlarges roundings, moved
inputs need not show it. So o is as good as torch's, or the rounded result of inputs a few places away. Where the
overload is but a step (in gradients, and in OpInfos of other names), or its floats are numbers, which nobody moves,
|e|, T and s are the largest of all results of the call: what cancels on the way was as large; and for 2 T stands
ROUNDINGS T: another order of the same sums makes another error of the same size, which what follows enlarges (gradients
of 150 matrix exponentials have errors of 0.02 to 6 times torch's, as many less as more). What is not finite must be
what torch's is; where torch alone fails to be, o may be as near to e as u and s allow.

A call counts as ours where the handle's report says that a kernel of ours computed it. Verdicts of an overload:

    strict    ours in every sample that reaches it, and right
    basic     right, and left to torch in some samples, for the reasons given
    kept      torch's everywhere, as it shall be: it draws random numbers, and a program's seed gives torch's
    failed    a wrong value, dtype, shape, stride, alias, error or crash; charged to the replacements that alone give it
    untested  no sample reaches it, or none that is ours

Samples run in worker processes: a crash or a hang is a failure of its sample, not the end of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

import flagops
from flagops import config, registry
from flagops.override.lowering import LOWERINGS

sys.path.insert(0, str(Path(__file__).parent))
from all import processor
from opinfo_calls import Attempt, Check, Choice, Outcome, Room, checks, equal, infos, observe
from opinfo_differences import differences
from opinfo_results import SHOWN, Tally, report, summed, written

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "coverage.json"
DTYPES = {
    str(x)[6:]: x for x in (*(torch.float32, torch.float64, torch.bfloat16, torch.float16), torch.int64, torch.bool)
}
REACH = 5  # samples by which an OpInfo shows which names it reaches
CALLED = "a sample"  # what its operators stand under in a profile
PATIENCE = 900  # seconds for one OpInfo in one dtype


Served = dict[str, tuple[set[str], set[str]]]
"""By overload, who computed calls of it and why others were left."""


def served(handle: Any, before: dict[Any, int]) -> tuple[Served, dict[Any, int]]:
    """What became of the calls since a count, and the count of now."""
    now = {
        (row.op[6:], by, fate): n
        for row in handle.report().rows
        for fate, counts in enumerate((row.replaced, row.passed))
        for by, n in counts.items()
    }
    found: Served = {}
    for (overload, by, fate), n in now.items():
        if n != before.get((overload, by, fate), 0):
            found.setdefault(overload, (set(), set()))[fate].add(by)
    return found, now


def within(event: Any) -> Iterator[str]:
    """The operators that the profiler saw within an event."""
    for child in event.cpu_children:
        yield child.name.removeprefix("aten::")
        yield from within(child)


class Bench:
    """A worker's judge of one OpInfo in one dtype."""

    def __init__(self, options: argparse.Namespace, note: Callable[[str], None]) -> None:
        self.options, self.note = options, note
        self.choice = Choice(options.most, options.seed)
        self.room = Room(options.device)
        if options.device == "bare":
            import bare

            bare.load()

    def enabled(self, ops: list[str]) -> Any:
        """The operators replaced; ``"all"`` is the one of that name."""
        return flagops.enable(["aten.all" if op == "all" else op for op in ops], backend=self.options.backend)

    def reached(self, name: str) -> list[str]:
        """The names that an OpInfo calls, as torch's own kernels compute it."""
        op = infos()[name]
        dtype = next((x for x in DTYPES.values() if x in op.supported_dtypes("cpu")), None)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for check in checks(op, dtype, Choice(REACH)) if dtype else ():
                if "," not in check.label:  # other layouts call nothing else
                    observe(replace(check, call=record_function(CALLED)(check.call)), Room())
        return sorted({name for event in seen.events() if event.name == CALLED for name in within(event)})

    def alone(self, name: str, dtype: str, written: bool) -> dict[str, Any]:
        """Whether torch alone survives the checks."""
        for check in checks(infos()[name], DTYPES[dtype], self.choice, written):
            self.note(check.label)
            observe(check, Room())
        return {}

    def judge(self, name: str, dtype: str, ops: list[str], written: bool) -> dict[str, Any]:
        every = list(checks(infos()[name], DTYPES[dtype], self.choice, written))
        theirs = [observe(check, Room()) for check in every]
        tries = [(Attempt(check, self.room), Attempt(check, self.room)) for check in every]
        calls: list[Served] = []
        with self.enabled(ops) as handle:
            count: dict[Any, int] = {}
            for twice in tries:
                self.note(twice[0].check.label)
                for attempt in twice:
                    attempt.call()
                found, count = served(handle, count)
                calls.append(found)
        tallies: dict[str, Tally] = {}
        stray, unstable = [], 0
        for check, their, twice, found in zip(every, theirs, tries, calls, strict=True):
            self.note(f"{check.label}, compared")
            first, again = (attempt.outcome() for attempt in twice)
            if self.options.device != "cpu" and not their.error and (first.error or " ")[0] == "NotImplementedError":
                missing = re.search(r"aten::([\w.]+)", first.error[1])
                if missing and base(missing[1]) in LOWERINGS:
                    tallies.setdefault(missing[1], Tally()).left["no kernel on the device"] += 1
                continue
            names = {base(overload) for overload in found}
            step = check.label.startswith("gradient") or infos()[name].aten_name not in names or not check.floats()
            called = names | {infos()[name].aten_name}  # an error may come before a call counts
            exact = self.exact(check, found)
            texts = [differences(check, x, their, exact, called, step) for x in (first, again)]
            wrong = next(filter(None, texts), "")
            if wrong and not equal(their, observe(check, Room())):
                unstable += 1  # torch itself gives two answers
                continue
            if wrong:
                text = f"{name}, {dtype}, {check.label}: {wrong}"
                guilty = self.guilty(check, their, found, step)
                stray += [] if guilty else [text]
                for overload in guilty:
                    tallies.setdefault(overload, Tally()).fail(text)
                continue
            for overload, (by, reasons) in found.items() if not their.error else ():
                tally = tallies.setdefault(overload, Tally())
                tally.ours += bool(by) and not reasons
                tally.left.update(reasons)
        plain = {overload: vars(tally) for overload, tally in tallies.items()}
        return {"overloads": plain, "checks": len(every), "stray": stray[:SHOWN], "unstable": unstable}

    @staticmethod
    def exact(check: Check, found: Served) -> bool:
        """Whether all of it is held bit for bit; a mean of what was scattered is divided."""
        cards = {by.partition("/")[0] for who, _ in found.values() for by in who}
        divided = "mean" in [x for x in tree_leaves((check.args, check.named)) if isinstance(x, str)]
        return bool(cards) and not divided and all(registry.operator(card).exact for card in cards)

    def guilty(self, check: Check, theirs: Outcome, found: Served, step: bool) -> list[str]:
        """The overloads whose replacement alone makes the difference; all that were ours where none does."""
        ours = [overload for overload, (by, _) in found.items() if by]
        if len(ours) < 2:
            return ours or list(found)
        alone = []
        for name in {base(overload) for overload in ours}:
            attempt = Attempt(check, self.room)
            with self.enabled([name]) as handle:
                attempt.call()
                only, _ = served(handle, {})
            if differences(check, attempt.outcome(), theirs, self.exact(check, only), {name}, step):
                alone += [overload for overload in ours if base(overload) == name]
        return alone or ours


@functools.cache
def base(overload: str) -> str:
    """The name of whose forms an overload is one."""
    name = overload.partition(".")[0]
    return name if name in LOWERINGS else name.removesuffix("_")


def work(options: argparse.Namespace) -> int:
    """Answer tasks, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints shall not answer
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    with open(options.worker, "w") as place:

        def note(label: str) -> None:
            place.seek(0)
            place.write(label.ljust(100)[:100])
            place.flush()

        bench = Bench(options, note)
        for line in sys.stdin:
            method, *args = json.loads(line)
            print(json.dumps(getattr(bench, method)(*args), default=str), file=answers, flush=True)
    return 0


class Worker:
    """A process that judges; another one takes its place when it dies."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.process = words, None
        self.place = Path(tempfile.mkdtemp()) / "place"

    def ask(self, task: list[Any]) -> Any:
        if self.process is None:
            command = [sys.executable, __file__, *self.words, "--worker", str(self.place)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.process = subprocess.Popen(command, text=True, **pipes)
            self.said: list[str] = []
            threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()
        process = self.process
        late = threading.Timer(PATIENCE, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        timely = late.is_alive()
        late.cancel()
        if answer:
            return json.loads(answer)
        self.process = None
        code = process.wait()
        if code > 0:
            raise RuntimeError("\n".join((f"the judge itself fails at {task}", *self.said)))
        how = f"ended with {code}" if timely else f"took more than {PATIENCE} s"
        return {
            "crash": f"{how} at {self.place.read_text().strip()}",
            "said": self.said[-8:],
            **dict.fromkeys(("checks", "unstable"), 0),
        }

    def _listen(self, process: Any) -> None:
        self.said += (line.rstrip() for line in process.stderr)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
        shutil.rmtree(self.place.parent)


def judged(worker: Worker, task: list[Any]) -> Any:
    """What a worker says of a task; where torch alone dies of it, of what does not write where it is told."""
    if task[0] != "judge":
        return worker.ask(task)
    died: dict[str, Any] = {}
    for writing in (True, False):
        answer = worker.ask([*task, writing])
        alone = worker.ask(["alone", *task[1:3], writing]) if "crash" in answer else {}
        if "crash" not in alone:
            return answer | died
        died = {"torch": alone["crash"]}
    return {"checks": 0, "unstable": 0} | died


def answered(
    tasks: list[list[Any]],
    words: list[str],
    workers: int,
    note: Callable[[list[Any], Any], None],
    until: float = float("inf"),
) -> None:
    """Tasks by so many processes, none begun after a time of `time.monotonic`."""
    waiting: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def run() -> None:
        worker = Worker(words)
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < until:
                task = waiting.get_nowait()
                note(task, judged(worker, task))
        worker.close()

    with ThreadPoolExecutor(workers) as pool:
        for each in [pool.submit(run) for _ in range(workers)]:
            each.result()


def reach(words: list[str], workers: int) -> dict[str, list[str]]:
    """Which replaced names each OpInfo calls; a torch is asked once."""
    kept = Path(config.cache_folder()) / f"opinfo-reach-{torch.__version__}.json"
    if not kept.exists():
        found: dict[str, list[str]] = {}
        answered(
            [["reached", name] for name in infos()],
            words,
            workers,
            lambda task, answer: found.update({task[1]: answer}),
        )
        for name, answer in found.items():
            if isinstance(answer, dict):
                print(
                    f"{name} {answer['crash']} with torch alone: left out", *answer["said"], sep="\n  ", file=sys.stderr
                )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({name: answer for name, answer in found.items() if isinstance(answer, list)}))
    return {name: replaced(called) for name, called in json.loads(kept.read_text()).items()}


def replaced(called: list[str]) -> list[str]:
    """The replaced names that are among those that are called."""
    return [x for x in LOWERINGS if {(name := x.partition(".")[0]), f"{name}_"} & {*called}]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--names", type=lambda s: s.split(","), help="aten names, such as add,mul (default: all replaced)"
    )
    made.add_argument("--dtypes", type=lambda s: s.split(","), default=list(DTYPES), help="(default: all six)")
    made.add_argument("--backend", default="numba")
    made.add_argument("--device", default="cpu", help="cpu, bare (tests/bare), or a device that torch has, such as npu")
    made.add_argument("--most", type=int, metavar="N", help="samples of an OpInfo (default: all)")
    made.add_argument("--seed", type=int, metavar="N", help="draw these samples by it (default: the first ones)")
    made.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    made.add_argument("--minutes", type=float, metavar="N", help="begin nothing after so long; --again goes on")
    made.add_argument("--again", action="store_true", help="go on where the last run of these words ended")
    made.add_argument(
        "--json",
        type=Path,
        default=RESULTS,
        help="the file that the rows of this run are joined to, and beside it the table in Markdown",
    )
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main() -> int:
    options = parser().parse_args()
    if options.worker:
        return work(options)
    ops = options.names or list(LOWERINGS)
    unknown = {*ops} - LOWERINGS.keys() | {*options.dtypes} - DTYPES.keys()
    if unknown:
        parser().error(f"no replaced name or dtype: {', '.join(sorted(unknown))}")
    words = ["--backend", options.backend, "--device", options.device]
    for word in ("most", "seed"):
        given = getattr(options, word)
        words += [] if given is None else [f"--{word}", str(given)]
    reaching = reach(words, options.workers)
    names = [name for name, found in reaching.items() if {*ops} & {*found}]
    key = hashlib.sha256(json.dumps([words, ops]).encode()).hexdigest()[:12]
    journal = Path(config.cache_folder()) / f"opinfo-{key}.jsonl"
    if not options.again:
        journal.unlink(missing_ok=True)
    units = dict(map(json.loads, journal.read_text().splitlines())) if journal.exists() else {}
    supported = {name: infos()[name].supported_dtypes("cpu") for name in names}
    wanted = [["judge", name, x, ops] for x in options.dtypes for name in names if DTYPES[x] in supported[name]]
    own = {base(name).strip("_") for name in ops}
    wanted.sort(key=lambda task: infos()[task[1]].aten_name not in own)  # what has other names comes last
    tasks = [task for task in wanted if f"{task[1]} {task[2]}" not in units]
    lock = threading.Lock()

    def note(task: list[Any], answer: Any) -> None:
        with lock, journal.open("a") as file:
            unit = f"{task[1]} {task[2]}"
            units[unit] = answer
            file.write(json.dumps((unit, answer)) + "\n")
            wrong = sum(found["failures"] for found in answer.get("overloads", {}).values())
            what = answer.get("crash") or f"{answer['checks']} checks, {wrong} wrong"
            print(f"{len(units)} of {len(wanted)}: {unit}: {what}", *answer.get("said", ()), sep="\n  ", flush=True)

    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    answered(tasks, words, options.workers, note, until)
    tallies = summed(units, reaching, ops)
    facts = {
        "when": datetime.datetime.now().isoformat(timespec="minutes"),
        "samples": options.most,
        "seed": options.seed,
        "wanted": len(wanted),
        "device": options.device,
        "backend": options.backend,
        "torch": torch.__version__,
        "cpu": processor(),
    }
    found = report(facts, tallies, units)
    written(options.json, found)
    for overload, tally in tallies.items():
        for text in tally.failed:
            print(f"{overload}: {text}")
    verdicts = Counter(row["verdict"] for row in found["overloads"].values())
    print(", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
