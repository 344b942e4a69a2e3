"""Operators and kernels found by name."""

from __future__ import annotations

from typing import Any, Callable


def kernel(*, deterministic: bool = False, batch_invariant: bool = False, note: str = "") -> Callable[[Any], Any]:
    """Declare facts about a kernel; each one that is True is checked bit by bit by the parity suite."""

    def declare(function: Any) -> Any:
        function.deterministic, function.batch_invariant, function.note = deterministic, batch_invariant, note
        return function

    return declare
