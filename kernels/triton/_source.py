"""Functions of Triton's from their source."""

import linecache
from typing import Any

import triton

from flagops.calls import generated


def jitted(source: str, place: str, names: dict[str, Any], **options: Any) -> Any:
    """The function that a source defines, with `names` as its globals; `place` is what tracebacks call its file."""
    made = generated.function(source, place, names)
    file = made.__code__.co_filename
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # where Triton reads it
    return triton.jit(made, **options)
