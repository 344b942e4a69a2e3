"""The process in which kernels are judged: what ends it, ends it alone. Each line that it writes is a JSON message."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from flagops import registry
from flagops.cases import Case, parse
from flagops.errors import Faulty, Unsupported

from . import files
from .process import Watch, names
from .session import Record, Session


def main(text: str) -> None:
    """Judge what the wish in ``text`` names, from its ``skip``-th kernel on, and report to its descriptor ``to``."""
    wish = json.loads(text)
    warnings.simplefilter("ignore")  # of what is drawn, half is extreme
    with os.fdopen(wish["to"], "w", buffering=1) as stream:

        def send(**message: Any) -> None:
            stream.write(json.dumps(message) + "\n")

        libraries = prepare()
        backends = [] if wish["files"] else wish["backends"]
        for path in wish["files"]:
            try:
                backends.append(files.offer(path))
            except (Exception, SystemExit) as error:
                send(failed=f"{path}{_line(error, path)}: {type(error).__name__}: {error}")
                return
            problem = files.without_kernels(path, backends[-1])
            if problem and not wish["operators"]:
                send(failed=problem)
                return
        for number, (operator, backend) in enumerate(_pairs(wish, backends, send)):
            if number >= wish["skip"]:
                send(begin=[operator, backend])
                send(record=vars(judged(wish, operator, backend, send, libraries)))
        send(done=True)


def _line(error: BaseException, path: str) -> str:
    """Where in a file an error arose, as ``:12``."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    number = lines[-1] if lines else getattr(error, "lineno", None)
    return f":{number}" if number else ""


def prepare() -> Watch:
    """Import what judges, and see what the libraries look like before a kernel is loaded."""
    import ml_dtypes  # noqa: F401
    import numpy  # noqa: F401

    from flagops.backends import missing

    if not missing("torch"):
        import torch.testing  # noqa: F401

        from flagops import torch_ops  # noqa: F401
        from flagops.tools import measure  # noqa: F401
    registry.operators()
    return Watch(names)


def _pairs(wish: dict[str, Any], backends: list[str], send: Callable[..., None]) -> Iterator[tuple[str, str]]:
    for backend in backends:
        chosen = wish["operators"] or (files.kernels_of(backend) if wish["files"] else list(registry.operators()))
        for operator in chosen:
            try:
                registry.find(operator, backend)
            except Faulty as reason:
                send(faulty=str(reason))
            except Unsupported as reason:
                send(absent=[operator, backend, str(reason)])
            else:
                yield operator, backend


def judged(wish: dict[str, Any], operator: str, backend: str, send: Callable[..., None], libraries: Watch) -> Record:
    """One kernel, as the wish says: a case again, a number of examples, or a time."""

    def tell(stage: str, case: Case) -> None:
        send(stage=stage, case=str(case))

    session = Session(registry.operator(operator), backend, wish["seed"], os.name == "posix", tell, libraries)
    if wish["replay"]:
        stage, _, case = wish["replay"].partition(": ")
        return session.replay(stage, parse(case))
    if wish["examples"]:
        return session.examples(wish["examples"])
    return session.run(wish["seconds"], wish["strict"], wish["least"])


if __name__ == "__main__":
    main(sys.argv[1])
