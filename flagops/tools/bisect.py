"""`flagops bisect SCRIPT`: which replaced call changed what a script prints or how it exits.

The script runs in child processes whose first n replaced calls are let through (the "fuel"), and n is halved until one
call is left. A child, and ``flagops run SCRIPT``, enable as soon as torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

UNLIMITED = 10**12


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
    """`flagops run [--compare] [--shares] SCRIPT [ARGUMENT...]`: a script as ``python SCRIPT`` runs it, with torch's
    operators replaced; what became of its calls stands on standard error in the end."""
    parser = argparse.ArgumentParser(prog="flagops run", description=run.__doc__)
    parser.add_argument("--compare", action="store_true", help="run torch's own kernels as well, for their times")
    parser.add_argument("--shares", action="store_true", help="profile it: the shares of all computing calls and time")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    options = parser.parse_args(argv)
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

        try:
            script([options.script, *options.arguments], begin)
        finally:
            stack.close()
            for handle in handles:
                print(handle.report(watched()), file=sys.stderr)
    return 0


def script(argv: Sequence[str], begin: Callable[[], Any]) -> None:
    """Run ``[script, *arguments]`` as ``python script`` would, and `begin` as soon as torch is imported.

    torch is not imported on the script's behalf: what the script does before its own import still comes first.
    """
    if "torch" in sys.modules:
        begin()
    else:
        sys.meta_path.insert(0, _AfterTorch(begin))
    sys.argv[:] = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


@dataclass(frozen=True)
class Outcome:
    """What one run of the script gave, and what it asked of the fuel."""

    status: int
    output: bytes
    calls: int
    last: dict[str, Any] | None

    def same(self, other: Outcome) -> bool:
        return (self.status, self.output) == (other.status, other.output)


def bisect(argv: Sequence[str]) -> int:
    """Find the call and print it; ``argv`` is ``[script, *arguments]``.

    Returns 0 when the replacements change nothing, 1 when one does, 2 when the script cannot tell.
    """
    if not argv:
        print("usage: flagops bisect SCRIPT [ARGUMENT...]", file=sys.stderr)
        return 2
    plain, again = _outcome(argv, 0), _outcome(argv, 0)
    if not plain.same(again):
        print("two runs without any replacement differ: the script's output or exit code is not reproducible")
        return 2
    full = _outcome(argv, UNLIMITED)
    print(f"{full.calls} replaced calls, exit code {full.status}; without them {plain.status}", flush=True)
    if full.same(plain):
        print("same output and exit code: no replacement changes the result")
        return 0
    good, bad, culprit = 0, full.calls, full
    while bad - good > 1:
        middle = (good + bad) // 2
        outcome = _outcome(argv, middle)
        changed = not outcome.same(plain)
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
        )
        noted: dict[str, Any] = {"calls": 0, "last": None}
        if os.path.exists(note):
            with open(note) as file:
                noted = json.load(file)
    return Outcome(child.returncode, child.stdout, **noted)


def _child(note: str, argv: Sequence[str]) -> None:
    import atexit

    def write() -> None:
        with open(note, "w") as file:
            json.dump(override.spent(), file)

    from flagops import override

    atexit.register(write)
    script(argv, override.enable)


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
