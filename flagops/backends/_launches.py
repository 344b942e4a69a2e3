"""What a kernel hands to its loops, noted down once for all calls whose arguments look alike.

A kernel's Python reads shapes, strides, dtypes and scalars, and gives `parallel` constants and addresses. It is run on
stand-ins that have no values, so what it gives is the same for every call like it, but for the addresses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flagops import arrays, generated
from flagops.replay import Place

_KEPT = 4096  # bytes of tables that are kept for calls of one signature


class Unrecordable(Exception):
    """A kernel asks for more than a stand-in has: values, or memory of its own."""


class Launch(NamedTuple):
    kernel: Any
    tasks: int
    args: tuple[Any, ...]
    minimum: int


class Address:
    """The address of a tensor that is yet to come, or a place so many bytes behind it."""

    __slots__ = ("behind", "place")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, place: Place, behind: int = 0) -> None:
        self.place, self.behind = place, behind

    def __add__(self, other: int) -> Address:
        return Address(self.place, self.behind + other)

    __radd__ = __add__

    def __bool__(self) -> bool:
        raise Unrecordable("it looks at an address")

    def __eq__(self, other: object) -> bool:
        raise Unrecordable("it compares an address")


class _StandIn:
    """A tensor without values."""

    __slots__ = ("_place", "_strides", "dtype", "itemsize", "ndim", "shape")

    def __init__(self, x: Any, place: Place) -> None:
        self.shape, self._strides, self.dtype = x.shape, x.stride(), x.dtype
        self.ndim, self.itemsize, self._place = x.ndim, x.itemsize, place

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def data_ptr(self) -> Address:
        return Address(self._place)

    def contiguous(self) -> _StandIn:
        steps = itertools.accumulate(self.shape[:0:-1], lambda step, size: step * max(size, 1), initial=1)
        if any(n > 1 and s != step for n, s, step in zip(self.shape[::-1], self._strides[::-1], steps, strict=False)):
            raise Unrecordable("it copies an argument")
        return self

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise Unrecordable("it looks at values")

    def __getattr__(self, name: str) -> Any:
        raise Unrecordable(f"it asks for {name}")


def stand_in(x: Any, places: Iterator[Place]) -> Any:
    """An argument of a kernel as its recording gets it; its tensors take the next places."""
    if isinstance(x, tuple):
        return tuple([stand_in(one, places) for one in x])
    return _StandIn(x, next(places)) if arrays.is_torch(x) else x


def address(x: Any) -> Any:
    if type(x) is not _StandIn:
        raise Unrecordable("it works in memory of its own")
    return x.data_ptr()


def replay(
    once: Sequence[Launch], twice: Sequence[Launch], parallel: Callable[..., None], threads: int
) -> Callable[[Sequence[Any]], None]:
    """What makes these launches for the values of a call. Raises Unrecordable.

    twice: the same recorded again. Arrays that are the same in both are kept by the kernel, and no call may write to
    them; others it makes for each call, as a table or to work in, and every replay gets its own.
    """
    writer = _Writer(len(once))
    for launch, again in zip(once, twice, strict=True):
        args = [writer.word(x, y) for x, y in zip(launch.args, again.args, strict=True)]
        if threads < 2 or launch.tasks < 2 * launch.minimum:
            sample = (0, launch.tasks, *map(_sample, launch.args))
            entry = launch.kernel.compile(tuple(map(launch.kernel.typeof_pyval, sample)))  # knows the types already
            writer.line(f"{writer.constant(entry)}(0, {writer.constant(launch.tasks)}, {', '.join(args)})")
        else:
            words = [writer.constant(x) for x in (parallel, launch.kernel, launch.tasks, launch.minimum)]
            writer.line(f"{words[0]}({', '.join((*words[1:3], *args))}, minimum={words[3]})")
    return writer.function()


class _Writer:
    """Writes the function that replays."""

    def __init__(self, launches: int) -> None:
        self.launches, self.kept = launches, 0
        self.names: dict[str, Any] = {}
        self.addresses: dict[Place, str] = {}
        self.heads = ["def launch(held):"]
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def word(self, x: Any, again: Any) -> str:
        """An argument of a launch as Python."""
        if isinstance(x, Address):
            return self.address(x)
        if isinstance(x, np.ndarray):
            return self.table(x, again)
        if _fixed(x):
            return self.constant(x)
        if type(x) is not tuple:
            raise Unrecordable(f"it hands on a {type(x).__name__}")
        return f"({', '.join([self.word(y, z) for y, z in zip(x, again, strict=True)])},)"

    def address(self, x: Address) -> str:
        if x.place not in self.addresses:
            name, (path, behind) = f"x{len(self.addresses)}", x.place
            self.addresses[x.place] = name
            found = "held" + "".join(f"[{i}]" for i in path)
            self.heads.append(f"{name} = {found}.data_ptr()" + (f" + {self.constant(behind)}" if behind else ""))
        name = self.addresses[x.place]
        return f"{name} + {self.constant(x.behind)}" if x.behind else name

    def table(self, x: Any, again: Any) -> str:
        self.kept += x.nbytes
        if self.kept > _KEPT or not (x.flags.c_contiguous and x.flags.writeable):
            raise Unrecordable("its tables are long, or no plain arrays")
        if x is again:
            return self.constant(x)
        if self.launches > 1:
            raise Unrecordable("one launch may write what another reads")
        return f"{self.constant(x.copy())}.copy()"

    def function(self) -> Callable[[Sequence[Any]], None]:
        body = [*self.heads, *self.lines] if self.lines else [*self.heads, "pass"]
        return generated.function("\n    ".join(body) + "\n", "launches", self.names)


def _fixed(x: Any) -> bool:
    """Whether an argument is the same for every call."""
    if isinstance(x, tuple):
        return all(map(_fixed, x))
    return x is None or isinstance(x, (int, float, str, np.generic))


def _sample(x: Any) -> Any:
    """An argument with 0 for what addresses are to come."""
    if type(x) is tuple:
        return tuple(map(_sample, x))
    return 0 if isinstance(x, Address) else x
