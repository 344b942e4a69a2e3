"""``--baseline git:REF``: the same workloads by flagops of another revision, timed in turn with ours.

The revision's files are written into a temporary folder, by ``git archive``, of which an interrupted run leaves nothing
in the repository. It runs in a process of its own, with a cache of compiled kernels of its own that is kept for the
next time. It is given the very inputs that ours are, takes the time of its calls itself, and what its last call gave is
held to our reference. While one of the two runs, the other waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import config
from flagops.errors import Unsupported

if TYPE_CHECKING:
    from flagops.tools.measure import Call, Trial

ROOT = Path(__file__).parents[2]
SETTLE = 0.005
"""Seconds between a call there and one here: OpenMP's threads look for work that long after each parallel loop."""


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(words)}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def commit(ref: str) -> str:
    """The commit that a name stands for, shortened; ValueError if there is none."""
    if not (ROOT / ".git").exists():
        raise ValueError(f"--baseline git:{ref} needs a checkout of git, and {ROOT} is none")
    try:
        return _git("rev-parse", "--short", "--verify", "--quiet", f"{ref}^{{commit}}")
    except ValueError:
        raise ValueError(f"--baseline git:{ref}: there is no revision {ref!r} in this checkout") from None
    except FileNotFoundError:
        raise ModuleNotFoundError(f"--baseline git:{ref} needs git, which is not here") from None


class Revision:
    """Another revision, ready to compute: a context that brings it here, and removes it again."""

    def __init__(self, ref: str) -> None:
        self.ref, self.commit = ref, commit(ref)

    def __enter__(self) -> Revision:
        import torch

        self._stack = ExitStack()
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flagops-")))
            _git("archive", "--format=zip", "-0", f"--output={self._folder / 'tree.zip'}", self.commit)
            with zipfile.ZipFile(self._folder / "tree.zip") as archive:
                archive.extractall(self._folder / "tree")
            self._process = stack.enter_context(self._started(self._folder / "tree", torch.get_num_threads()))
            self.ask({"do": "hello"})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _started(self, tree: Path, threads: int) -> subprocess.Popen[str]:
        """The process, which ends when its standard input does; `Popen` as a context closes that and waits."""
        cache = Path(config.cache_folder()) / "revisions" / self.commit
        own = {"PYTHONPATH": str(tree), "FLAGOPS_CACHE": str(cache)}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own
        worker = Path(__file__).with_name("revision_worker.py")
        return subprocess.Popen(  # -P: the worker's own folder has modules of the standard library's names
            [sys.executable, "-P", str(worker), str(tree), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree.parent,
        )  # fmt: skip

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """One request and its answer. Raises Unsupported for what that revision refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"flagops of git:{self.ref} ended with code {self._process.wait()}; see its words above")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise Unsupported(f"git:{self.ref}: {answer['refused']}")
        return answer

    def calls(self, trial: Trial, backends: Sequence[str]) -> dict[str, Call]:
        """Its kernels of an operator, each a baseline of ours on the same backend."""
        shared = _Shared(self, trial, self._folder / "inputs.pt")
        return {f"git:{self.ref} {backend}": Elsewhere(shared, backend) for backend in backends}


class _Shared:
    """The inputs of a trial as a file, which the other process loads when it is first asked for them."""

    def __init__(self, there: Revision, trial: Trial, path: Path) -> None:
        self.there, self.trial, self.path, self.given = there, trial, path, False
        self.places = {id(given): i for i, given in enumerate(trial.sets)}

    def give(self) -> None:
        import torch

        if not self.given:
            torch.save((self.trial.sets, self.trial.out), self.path)
            op = self.trial.op
            self.there.ask({"do": "take", "path": str(self.path), "operator": op.name, "names": list(op.inputs)})
            self.path.unlink()
            self.given = True


class Elsewhere:
    """A kernel of another revision, as a baseline of `measure.compare`."""

    def __init__(self, shared: _Shared, backend: str) -> None:
        self.shared, self.backend = shared, backend

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs that these tensors are, and bring the result here."""
        import torch

        self.shared.give()
        which = next(i for i, given in enumerate(self.shared.trial.sets) if _same(given, args))
        path = self.shared.path.with_name("result.pt")
        self.shared.there.ask({"do": "give", "set": which, "backend": self.backend, "path": str(path)})
        result = torch.load(path)
        path.unlink()
        return result

    def elapsed(self, given: Sequence[Sequence[Any]], out: Any, clock: str) -> float:
        time.sleep(SETTLE)
        sets = [self.shared.places[id(one)] for one in given]
        answer = self.shared.there.ask({"do": "time", "sets": sets, "backend": self.backend})
        time.sleep(SETTLE)
        return float(answer[clock])


def _same(given: Sequence[Any], args: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(given, args, strict=False))
