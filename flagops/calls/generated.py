"""Functions written for one signature, where a loop over its arguments would cost more than what it does."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any


@lru_cache(maxsize=4096)
def _compiled(source: str, place: str) -> CodeType:
    return compile(source, f"<{place} by flagops>", "exec")


def function(source: str, place: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The one function that `source` defines, with `names` as its globals; `place` is what tracebacks call its file.

    Sources that differ in names alone are compiled once.
    """
    space = dict(names)
    exec(_compiled(source, place), space)
    (made,) = space.keys() - names.keys() - {"__builtins__"}
    found: Callable[..., Any] = space[made]
    return found
