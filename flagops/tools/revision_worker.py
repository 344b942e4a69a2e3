"""The process of `flagops.tools.revision`: ``python -P revision_worker.py FOLDER THREADS``, FOLDER on PYTHONPATH.

It is run by its path and is older or newer than the flagops that it imports: it uses public names alone. Requests and
answers are lines of JSON.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import time
from typing import Any

import torch


class Worker:
    """Sets of inputs, and calls on them."""

    def __init__(self) -> None:
        self.sets: list[list[Any]] = []
        self.out: Any = None
        self.function: Any = None

    def hello(self, asked: dict[str, Any]) -> dict[str, Any]:
        import flagops

        assert flagops.__file__.startswith(sys.argv[1]), (
            f"imported {flagops.__file__} in place of that in {sys.argv[1]}"
        )
        return {"version": flagops.__version__}

    def take(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The inputs, in the order of this revision's arguments."""
        import flagops

        home, _, name = asked["operator"].rpartition(".")
        self.sets = []
        sets, self.out = torch.load(asked["path"])
        self.function = getattr(flagops.aten if home else flagops, name, None)
        if self.function is None:
            return {"refused": f"it has no operator {asked['operator']}"}
        known = inspect.signature(self.function).parameters
        for values in sets:
            named = dict(zip(asked["names"], values, strict=True))
            lost = [name for name, value in named.items() if name not in known and value is not None]
            if lost:
                return {"refused": f"its {name} takes no {', '.join(lost)}"}
            self.sets.append([named.get(n, p.default) for n, p in known.items() if n not in ("out", "backend")])
        return {}

    def time(self, asked: dict[str, Any]) -> dict[str, Any]:
        backend, out, call = asked["backend"], self.out, self.function
        given = [self.sets[i] for i in asked["sets"]]
        with torch.no_grad():
            start, begun = time.perf_counter(), time.process_time()
            for one in given:
                call(*one, out=out, backend=backend)
            return {"perf_counter": time.perf_counter() - start, "process_time": time.process_time() - begun}

    def give(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The result of one set, of an output that was full of NaN."""
        for x in self.out if isinstance(self.out, tuple) else (self.out,):
            if x.is_floating_point() and x.dtype.itemsize > 1:
                x.fill_(math.nan)
            else:
                (x.view(torch.uint8) if x.dtype.itemsize == 1 else x).fill_(0x5A)
        self.time({"sets": [asked["set"]], "backend": asked["backend"]})
        torch.save(self.out, asked["path"])
        return {}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed here is no answer
    worker = Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(worker, asked["do"])(asked)
        except Exception as error:  # the other side says which row it was
            answer = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
