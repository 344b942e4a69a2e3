"""What a kernel hands to its loops, noted down once for all calls whose arguments look alike.

A kernel's Python reads shapes, strides, dtypes and scalars, and gives `parallel` constants and addresses. It is run on
stand-ins that have no values, so what it gives is the same for every call like it, but for the addresses.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flagops import arrays
from flagops.calls import generated
from flagops.calls.replay import Place

_KEPT = 4096  # bytes of an array that is kept for calls of one signature
_LINE = 64  # bytes of a line of the cache
_MOST = 64  # launches of one call: whoever waits for what a loop writes would wait for ever


class Unrecordable(Exception):
    """A kernel asks for more than a stand-in has, or does more than to launch loops."""


class _Current(threading.local):
    recording: Recording | None = None
    """What this thread's launches are noted down in instead of run."""


current = _Current()


def room(size: int) -> tuple[Any, Any]:
    """Memory for the loops of one call, which must hold on to it, and where so many bytes of it begin on a line."""
    if current.recording is not None:
        return current.recording.room(size)
    memory = np.empty(size + _LINE, np.uint8)
    return memory, -(-memory.ctypes.data // _LINE) * _LINE


class Launch(NamedTuple):
    kernel: Any
    tasks: int
    args: tuple[Any, ...]
    minimum: int


class Room(NamedTuple):
    """Memory that each replay takes anew: the number in its recording, and bytes."""

    number: int
    size: int


class Recording:
    """A run of a kernel on stand-ins: its launches, and how the addresses compared that it compared.

    spoil: arrays of the kernel's own are full of ones after each launch, but for those of these identities. Whoever
    looks at what loops have written goes another way then, or fails.
    """

    def __init__(self, spoil: Container[int] | None = None) -> None:
        self.launches: list[Launch] = []
        self.comparisons: list[tuple[Address, Address, bool]] = []
        self.arrays: dict[int, Any] = {}
        self._left: dict[int, bytes] = {}
        self._rooms = itertools.count()
        self._spoil = spoil

    def room(self, size: int) -> tuple[Any, Address]:
        """What `room` gives."""
        own = Room(next(self._rooms), size)
        return own, Address(own, 0)

    def address(self, x: Any) -> Address:
        """What `pointer` gives."""
        if type(x) is _StandIn:
            return x.data_ptr()
        if not isinstance(x, np.ndarray):
            raise Unrecordable(f"it makes a {type(x).__name__}")
        return Address(x, x.ctypes.data)

    def launch(self, *launch: Any) -> None:
        self.launches.append(Launch(*launch))
        if len(self.launches) > _MOST:
            raise Unrecordable("it has many launches")
        for x in _own(self.launches[-1].args):
            if x.nbytes > _KEPT or not x.flags.c_contiguous:
                raise Unrecordable("its arrays are long, or lie apart")
            self.arrays[id(x)] = x
            if self._left.setdefault(id(x), x.tobytes()) != x.tobytes():
                raise Unrecordable("it writes between launches")
        for x in _own(self.launches[-1].args):
            if self._spoil is not None and id(x) not in self._spoil:
                x.reshape(-1).view(np.uint8).fill(0xFF)
                self._left[id(x)] = x.tobytes()


class Address:
    """The address of a tensor or of room that is yet to come or of an array of a kernel's own, or so many bytes behind.

    here: what it is in the call that is recorded.
    """

    __slots__ = ("behind", "here", "source")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, source: Place | Room | Any, here: int, behind: int = 0) -> None:
        self.source, self.here, self.behind = source, here, behind

    def __add__(self, other: int) -> Address:
        return Address(self.source, self.here + other, self.behind + other)

    __radd__ = __add__

    def __bool__(self) -> bool:
        raise Unrecordable("it looks at an address")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Address) or current.recording is None:
            raise Unrecordable("it looks at an address")
        same = self.here == other.here
        current.recording.comparisons.append((self, other, same))
        return same


class _StandIn:
    """A tensor without values."""

    __slots__ = ("_address", "_strides", "dtype", "itemsize", "ndim", "shape")

    def __init__(self, x: Any, place: Place) -> None:
        self.shape, self._strides, self.dtype = x.shape, x.stride(), x.dtype
        self.ndim, self.itemsize, self._address = x.ndim, x.itemsize, Address(place, x.data_ptr())

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def data_ptr(self) -> Address:
        return self._address

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


def replay(
    function: Callable[..., None],
    args: Sequence[Any],
    parallel: Callable[..., None],
    threads: int,
    otherwise: Callable[[Sequence[Any]], None],
) -> Callable[[Sequence[Any]], None]:
    """What a kernel launches for stand-ins, for the values of a call, or `otherwise` where addresses compare in another
    way. Raises Unrecordable, or what the kernel raises.

    An array that a second run gives as well is kept by the kernel, and no call may write it; others it makes for each
    call, as a table or to work in, and each replay gets its own.
    """
    once, twice = (_recorded(Recording(), function, args) for _ in range(2))
    spoilt = _recorded(Recording(once.arrays.keys() & twice.arrays.keys()), function, args)
    if not all(
        _alike(once.launches + once.comparisons, other.launches + other.comparisons) for other in (twice, spoilt)
    ):
        raise Unrecordable("it does not launch the same each time")
    writer = _Writer()
    for one, two, same in once.comparisons:
        compared = f"({writer.word(one, one)} == {writer.word(two, two)}) is not {same}"
        writer.lines.append(f"if {compared}: return {writer.constant(otherwise)}(held)")
    for launch, again in zip(once.launches, twice.launches, strict=True):
        args = [writer.word(x, y) for x, y in zip(launch.args, again.args, strict=True)]
        if threads < 2 or launch.tasks < 2 * launch.minimum:
            sample = (0, launch.tasks, *map(_sample, launch.args))
            entry = launch.kernel.compile(tuple(map(launch.kernel.typeof_pyval, sample)))  # knows the types already
            writer.lines.append(f"{writer.constant(entry)}(0, {writer.constant(launch.tasks)}, {', '.join(args)})")
        else:
            words = [writer.constant(x) for x in (parallel, launch.kernel, launch.tasks, launch.minimum)]
            writer.lines.append(f"{words[0]}({', '.join((*words[1:3], *args))}, minimum={words[3]})")
    return writer.function()


class _Writer:
    """Writes the function that replays."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.addresses: dict[Any, str] = {}
        self.arrays: dict[int, str] = {}
        self.heads: list[str] = []
        self.lines: list[str] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def word(self, x: Any, again: Any) -> str:
        """An argument of a launch as Python."""
        if isinstance(x, Address):
            name = self.address(x, again)
            return f"{name} + {self.constant(x.behind)}" if x.behind else name
        if isinstance(x, np.ndarray):
            return self.array(x, again)
        if _fixed(x):
            return self.constant(x)
        if not isinstance(x, tuple):
            raise Unrecordable(f"it hands on a {type(x).__name__}")
        kind = "" if type(x) is tuple else self.constant(type(x))
        return f"{kind}({', '.join([self.word(y, z) for y, z in zip(x, again, strict=True)])},)"

    def address(self, x: Address, again: Address) -> str:
        key = id(x.source) if isinstance(x.source, np.ndarray) else x.source
        if key not in self.addresses:
            name = self.addresses[key] = f"x{len(self.addresses)}"
            if isinstance(x.source, Room):
                self.heads.append(f"{name}_memory, {name} = {self.constant(room)}({self.constant(x.source.size)})")
                return name
            if isinstance(x.source, np.ndarray):
                address = f'{self.array(x.source, again.source)}.__array_interface__["data"][0]'
            else:
                path, behind = x.source
                address = "held" + "".join(f"[{i}]" for i in path) + ".data_ptr()"
                address += f" + {self.constant(behind)}" if behind else ""
            self.heads.append(f"{name} = {address}")
        return self.addresses[key]

    def array(self, x: Any, again: Any) -> str:
        if id(x) not in self.arrays:
            name = self.constant(x)
            if x is not again:
                if x.base is not None:
                    raise Unrecordable("its arrays may share memory")
                self.heads.append(f"y{len(self.arrays)} = {name}.copy()")
                name = f"y{len(self.arrays)}"
            self.arrays[id(x)] = name
        return self.arrays[id(x)]

    def function(self) -> Callable[[Sequence[Any]], None]:
        body = ["def launch(held):", *self.heads, *(self.lines or ["pass"])]
        return generated.function("\n    ".join(body) + "\n", "launches", self.names)


def _own(x: Any) -> Iterator[Any]:
    """The arrays of a kernel's own among arguments of a launch."""
    if isinstance(x, tuple):
        for one in x:
            yield from _own(one)
    x = x.source if isinstance(x, Address) else x
    if isinstance(x, np.ndarray):
        yield x


def _recorded(recording: Recording, function: Callable[..., None], args: Sequence[Any]) -> Recording:
    current.recording = recording
    try:
        function(*args)
    finally:
        current.recording = None
    return recording


def _alike(x: Any, y: Any) -> bool:
    """Whether what two runs gave is the same, but for the arrays that they made."""
    if isinstance(x, Address) and isinstance(y, Address):
        return x.behind == y.behind and _alike(x.source, y.source)
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return x.shape == y.shape and x.dtype == y.dtype
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(map(_alike, x, y))
    return type(x) is type(y) and (x is y or bool(x == y) or (x != x and y != y))


def _fixed(x: Any) -> bool:
    """Whether an argument is the same for every call."""
    if isinstance(x, tuple):
        return all(map(_fixed, x))
    return x is None or isinstance(x, (int, float, str, np.generic))


def _sample(x: Any) -> Any:
    """An argument with 0 for what addresses are to come."""
    if isinstance(x, tuple):
        return tuple(map(_sample, x)) if type(x) is tuple else type(x)(*map(_sample, x))
    return 0 if isinstance(x, Address) else x
