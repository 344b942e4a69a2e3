"""`flagops bisect SCRIPT`: which replaced call changed what a script prints or how it exits.

The script runs in child processes whose first n replaced calls are let through (the "fuel"), and n is halved until one
call is left. A child, and ``flagops run SCRIPT``, enable as soon as torch is imported.
Numbers with a point may differ by rounding, as two right kernels do; whole numbers and words must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flagops.tools import contract

UNLIMITED = 10**12
WITHIN = 1e-4
"""How far numbers may differ by default, as a share of the largest on their line: a float32 model rounds less."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE][-+]?\d))(?:[eE][-+]?\d+)?")


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Calls `action` once torch has been imported, by whoever imports it."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def run(argv: Sequence[str]) -> int:
    """`flagops run`: a script with torch's operators replaced; what became of its calls stands on standard error in
    the end."""
    parser = contract.Parser(prog="flagops run", description=" ".join((run.__doc__ or "").split()))
    parser.add_argument("--compare", action="store_true", help="run torch's own kernels as well, for their times")
    parser.add_argument("--shares", action="store_true", help="profile it: the shares of all computing calls and time")
    options = _script(parser).parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from flagops.override import enable
    from flagops.override.coverage import watching

    handles: list[Any] = []
    watched: Callable[[], Any] = lambda: None  # noqa: E731
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            nonlocal watched
            handles.append(enable(timed=True, compare=options.compare))
            if options.shares:
                watched = stack.enter_context(watching())

        code = _run(str(options.script), options.arguments, begin)
    for handle in handles:
        print(handle.report(watched()), file=sys.stderr)
    return code


def _script(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What follows the script is the script's own."""
    parser.add_argument("script", type=contract.existing, metavar="SCRIPT", help="a Python file")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="what the script is given")
    parser.epilog = "FLAGOPS_OPS says what is replaced (default,-matmul; all), FLAGOPS_BACKEND by which backend."
    return parser


def _run(script: str, words: Sequence[str], begin: Callable[[], Any]) -> int:
    """A script as ``python script`` would run it, and `begin` as soon as torch is imported.

    torch is not imported on the script's behalf: what the script does before its own import still comes first.
    """

    def enable() -> None:
        try:
            begin()
        except (ValueError, NotImplementedError) as error:  # a setting, and no fault of the script
            raise SystemExit(contract.refuse(str(error))) from None

    if "torch" in sys.modules:
        enable()
    else:
        sys.meta_path.insert(0, _AfterTorch(enable))
    return contract.script(script, words)


@dataclass(frozen=True)
class Outcome:
    """What one run of the script gave, and what it asked of the fuel."""

    status: int
    output: bytes
    calls: int
    last: dict[str, Any] | None

    def distance(self, other: Outcome) -> float:
        """How far numbers lie apart, as `distance` says; infinite where anything else differs."""
        return (
            distance(self.output.decode(errors="replace"), other.output.decode(errors="replace"))
            if (self.status == other.status)
            else math.inf
        )


def distance(one: str, two: str) -> float:
    """How far the numbers of two outputs lie apart at most, as a share of the largest on their line.

    One in the last of three or more digits behind the point counts as nothing. Infinite where words, whole numbers or
    lines differ.
    """
    found, lines = 0.0, (one.split("\n"), two.split("\n"))
    if len(lines[0]) != len(lines[1]):
        return math.inf
    for first, second in zip(*lines, strict=True):
        if first == second:
            continue
        if _NUMBER.sub("\0", first).split() != _NUMBER.sub("\0", second).split():
            return math.inf
        pairs = list(zip(_NUMBER.findall(first), _NUMBER.findall(second), strict=True))
        largest = max(abs(float(text)) for pair in pairs for text in pair)
        for a, b in pairs:
            apart = abs(float(a) - float(b))
            if apart > min(_last_digit(a), _last_digit(b)) * (1 + 1e-9):
                found = max(found, apart / largest)
    return found


def _last_digit(text: str) -> float:
    """What one in the last digit is worth, of a number with three or more behind the point: fewer may be all it has."""
    mantissa, _, exponent = text.lower().partition("e")
    places = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - places) if places > 2 else 0.0


def bisect(argv: Sequence[str]) -> int:
    """Find the call and print it; ``argv`` is ``[--within R, script, *arguments]``.

    Returns 0 when the replacements change nothing, 1 when one does, 2 when the script cannot tell.
    """
    parser = contract.Parser(
        prog="flagops bisect", description="Name the replaced call that changes a script's result."
    )
    parser.add_argument(
        "--within", type=_share, default=WITHIN, metavar="R",
        help="how far numbers with a point may differ, as a share of the largest on their line, and besides by one in "
        f"the last digit printed (default: {WITHIN:g}; 0: every character must be the same)",
    )  # fmt: skip
    options = _script(parser).parse_args(argv)
    words, within = [str(options.script), *options.arguments], options.within

    def same(one: Outcome, two: Outcome) -> bool:
        return (one.status, one.output) == (two.status, two.output) if not within else one.distance(two) <= within

    with contract.Progress(3) as begin:
        begin("without replacements")
        plain = _outcome(words, 0)
        begin("and again")
        if not same(plain, _outcome(words, 0)):
            print("two runs without any replacement differ: the script's output or exit code is not reproducible")
            return 2
        begin("with all")
        full = _outcome(words, UNLIMITED)
    print(f"{full.calls} replaced calls, exit code {full.status}; without them {plain.status}", flush=True)
    if not full.calls:
        print(
            "no call was replaced, so nothing is known; FLAGOPS_BACKEND=numba replaces also what torch computes faster"
        )
        return 2
    apart = full.distance(plain)
    if same(full, plain):
        said = f", numbers within {apart:.1e} (--within {within:g})" if apart else ""
        print(f"same output and exit code{said}: no replacement changes the result")
        return 0
    if apart < math.inf:
        print(f"numbers lie {apart:.1e} apart, more than --within {within:g}; a larger one calls that rounding")
    good, bad, culprit = 0, full.calls, full
    with contract.Progress(math.ceil(math.log2(max(full.calls, 2)))) as begin:
        while bad - good > 1:
            middle = (good + bad) // 2
            begin(f"first {middle} calls replaced")
            outcome = _outcome(words, middle)
            changed = not same(outcome, plain)
            print(f"  first {middle} calls replaced: {'changed' if changed else 'same'}", flush=True)
            if changed:
                bad, culprit = middle, outcome
            else:
                good = middle
    if culprit.last is None or culprit.last["call"] != bad:
        print("the change does not follow the replaced calls, whose number differs from run to run")
        return 2
    found = culprit.last
    print(f"call {bad} of {full.calls} changes the result: aten::{found['op']}({', '.join(found['arguments'])})")
    print(f"replaced by {found['by']}; leave it out with FLAGOPS_OPS=all,-{found['op'].partition('.')[0].rstrip('_')}")
    return 1


def _outcome(argv: Sequence[str], fuel: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        note = os.path.join(folder, "note.json")
        child = subprocess.run(
            [sys.executable, "-m", "flagops.tools.bisect", note, *argv],
            env=os.environ | {"FLAGOPS_FUEL": str(fuel)},
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            process_group=0,  # an interrupt is for this process, which ends the child
        )
        noted: dict[str, Any] = {"calls": 0, "last": None}
        if os.path.exists(note):
            with open(note) as file:
                noted = json.load(file)
    return Outcome(child.returncode, child.stdout, **noted)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def _child(note: str, script: str, *words: str) -> int:
    import atexit

    def write() -> None:
        with open(note, "w") as file:
            json.dump(override.spent(), file)

    from flagops import override

    atexit.register(write)
    return _run(script, words, override.enable)


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
