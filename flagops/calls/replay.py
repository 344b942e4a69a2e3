"""How calls of one signature reach their kernel: the first few as a call of its function, the others as its backend
noted down what that function does.

A backend that can do so has, beside what `flagops.backends.Backend` asks for, ``environment()``, whatever its kernels
look at besides their arguments, and ``record(function, args, places, otherwise)``: what runs the kernel for the values
of a call like this one in this environment, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from flagops.calls import surroundings

Held = Sequence[Any]
"""The values of a call, among which the tensors of its kernel lie."""

Path = tuple[int, ...]
"""Where a tensor is found among the values of a call: an index, and one more where it is one of several results."""

Place = tuple[Path, int]
"""A tensor of a kernel: one of a call, and the bytes from that one's first element to its own."""

OFTEN = 16
"""Calls of a signature before it is noted down, which takes as long as some twenty calls then save."""

_ENVIRONMENTS = 8  # in which one signature is noted down


class Replay:
    """``(replay.known.get(replay.environment()) or replay.first)(held)`` runs the kernel for the values of a call.

    clean: the kernel's arguments from those values.
    places: where their tensors lie among the values; None where they have to be computed.
    """

    __slots__ = ("_casting", "_clean", "_function", "_left", "_owner", "_places", "environment", "first", "known")

    def __init__(
        self,
        owner: Any,
        function: Callable[..., None],
        clean: Callable[[Held], Sequence[Any]],
        places: Sequence[Place] | None,
    ) -> None:
        self._owner, self._function, self._clean, self._places = owner, function, clean, places
        self._left, self._casting = OFTEN, surroundings.casting()
        self.known: dict[Hashable, Callable[[Held], None]] = {}
        self.environment: Callable[[], Hashable] = _anywhere
        self.first = self._first
        if places is not None and hasattr(owner, "record"):
            self.environment = owner.environment
        else:
            self.known[None] = self._plain

    def _plain(self, held: Held) -> None:
        if self._casting():  # a frame fewer than `uncast` has
            surroundings.uncast(self._function)(*self._clean(held))
        else:
            self._function(*self._clean(held))

    def _first(self, held: Held) -> None:
        clean = self._clean(held)
        if self._left > 0:
            self._left -= 1
        elif len(self.known) < _ENVIRONMENTS:
            found = self._owner.record(self._function, clean, self._places, self._plain)
            self.known[self.environment()] = found or self._plain
        self._function(*clean)


def _anywhere() -> None:
    """The environment of kernels that are asked anew for each call."""
