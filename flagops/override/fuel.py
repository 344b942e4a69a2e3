"""FLAGOPS_FUEL: only the first replaced calls of the process get through, so that `flagops bisect` finds the one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .interpose import Counter, lock

if TYPE_CHECKING:
    from torch import Tensor


class Fuel:
    """Lets the first `limit` replaced calls of the process through and remembers the last of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked = Counter()
        self.last: dict[str, Any] | None = None

    def take(self, op: str, by: str, tensors: Iterable[Tensor | None]) -> bool:
        number = self.asked.add() + 1
        if number <= self.limit:
            shapes = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors if x is not None]
            self.last = {"call": number, "op": op, "by": by, "arguments": shapes}
        return number <= self.limit


tank: Fuel | None = None


def fill(limit: int | None) -> None:
    """Start counting where a limit is set; the count of an earlier handle goes on under the same limit."""
    global tank
    with lock:
        if limit is None or tank is None or tank.limit != limit:
            tank = None if limit is None else Fuel(limit)


def spent() -> dict[str, Any]:
    """Replaced calls that asked for fuel so far (FLAGOPS_FUEL), and the last that got some."""
    return {"calls": tank.asked.value() if tank else 0, "last": tank.last if tank else None}
