"""Triton's kernels run by what is not Triton: ``tests/semantics.py [OP...]``, a row of ``make test-all``.

ttsem, a package of its own, executes on the CPU the intermediate code that Triton's front end makes for sm_90. So what
the interpreter never sees is in it: types and constants as they are compiled, arguments of 1 that became constants. And
it stops where a program touches what lies outside its tensors, or two programs of one launch touch the same place.

Each operator is held to its reference on small drawn cases, for so many seconds; one that launches nothing fails.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from types import FrameType

VERSION = "0.1.0"
TARGET = 90
SEEDS, SECONDS = 6, 40


class _Late(BaseException):
    """Not one that a judge would take for a kernel's."""


def late(number: int, frame: FrameType | None) -> None:
    raise _Late


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OP", help="default: all that have a Triton kernel")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each operator")
    options = parser.parse_args()
    try:
        from ttsem import sanitize
    except ImportError:
        import other_versions

        python = other_versions.environment("ttsem", VERSION)
        return subprocess.run([python, *sys.argv]).returncode
    from flagops import registry
    from flagops.backends import triton

    triton._device = lambda interpreting: ("cpu", None)  # a CPU is what the kernels run on here
    warnings.simplefilter("ignore")  # NumPy's, of values that overflow as they should
    signal.signal(signal.SIGALRM, late)
    names = options.operators or [name for name in registry.cards() if registry.written(name, "triton")]
    found, ran, launches = [], 0, 0
    with sanitize.session(TARGET, cuda_is_cpu=False) as session:
        for name in names:
            start, before = time.monotonic(), session.launches
            cases, wrong = held(name, options.seconds)
            if session.launches == before:
                wrong.append("launched nothing")
            ran, launches = ran + cases, session.launches
            found += [f"{name}: {what}" for what in wrong]
            took = f"{cases} cases, {session.launches - before} launches, {time.monotonic() - start:.0f} s"
            print(f"{name}: {took}{''.join(f'{os.linesep}  {what}' for what in wrong)}", flush=True)
    print(f"{len(names)} operators, {ran} cases, {launches} launches, {len(found)} findings")
    print(*found, sep="\n")
    return int(bool(found))


def held(name: str, seconds: int) -> tuple[int, list[str]]:
    """How many cases an operator's kernel was right in, within a time, and what was wrong with others."""
    from flagops import registry, testing
    from flagops.errors import Unsupported

    operator, cases, wrong = registry.operator(name), 0, []
    signal.alarm(seconds)
    try:
        for seed in range(SEEDS):
            rng = random.Random(f"{name} {seed}")
            case = testing.draw_case(
                operator, lambda given, rng=rng: given[rng.randrange(len(given))], testing.INTERPRETED, ["torch"]
            )
            if "far" in dict(case.layouts).values():  # ttsem copies all the memory between
                continue
            try:
                testing.assert_parity(operator, "triton", case)
                cases += 1
            except Unsupported:
                continue
            except Exception as error:  # whatever stops a kernel is a finding
                wrong.append(f"{type(error).__name__}: {error} {case}")
    except _Late:
        pass
    finally:
        signal.alarm(0)
    return cases, wrong


if __name__ == "__main__":
    sys.exit(main())
