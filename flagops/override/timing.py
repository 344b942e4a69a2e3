"""How long calls take, beside how many there are: where `enable` is asked for it, plans hold a clock, and no others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from .interpose import live

_lock = threading.Lock()

Compute = Callable[[tuple[Any, ...]], Any]


@dataclass
class Clock:
    """Seconds of calls, and of torch's own kernel on some of the same calls (`compared` of them, ours `beside` it).

    The first call of a signature plans, and may compile: it is apart from the others.
    """

    calls: int = 0
    seconds: float = 0.0
    first: float = 0.0
    compared: int = 0
    beside: float = 0.0
    torchs: float = 0.0

    def note(self, seconds: float, torchs: float | None = None, first: bool = False) -> None:
        with _lock:
            if first:
                self.first += seconds
                return
            self.calls += 1
            self.seconds += seconds
            if torchs is not None:
                self.compared += 1
                self.beside += seconds
                self.torchs += torchs


@functools.cache
def waiting(key: str) -> Callable[[], None]:
    """What waits for the device of a dispatch key, whose kernels run on while Python does."""
    import torch

    if key == "CPU":
        return lambda: None
    name = "cuda" if key == "CUDA" else torch._C._get_privateuse1_backend_name()
    wait = getattr(torch.get_device_module(name), "synchronize", lambda: None)
    if key != "CUDA":
        return wait
    return lambda: None if torch.cuda.is_current_stream_capturing() else wait()


def timed(site: Any, compute: Compute | None, key: str, clock: Clock, compare: bool) -> Compute | None:
    """What computes the calls of a signature, on the clock; with `compare` torch's own kernel computes them as well, on
    copies of what it writes, first and second by turns."""
    import torch

    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    theirs = functools.partial(site.below_with, keyset)
    if compute is None:
        if site.composite:
            return None  # its parts are calls of their own
        compute, compare = theirs, False
    random = site.lowering is not None and site.lowering.random  # a second call would move the generator
    compare = compare and site.below is not None and site.owned and not random  # else torch's calls ours
    ours, wait, calls = compute, waiting(key), 0

    def measured(function: Compute, args: tuple[Any, ...]) -> tuple[Any, float]:
        wait()
        start = perf_counter()
        result = function(args)
        wait()
        return result, perf_counter() - start

    def call(args: tuple[Any, ...]) -> Any:
        nonlocal calls
        calls += 1
        copies = _apart(site, args, keyset) if compare and calls > 1 else None
        before = measured(theirs, copies)[1] if copies and calls % 2 else None
        result, seconds = measured(ours, args)
        after = measured(theirs, copies)[1] if copies and before is None else before
        clock.note(seconds, after, first=calls == 1)
        return result

    return call


def _apart(site: Any, args: tuple[Any, ...], keyset: Any) -> tuple[Any, ...]:
    """The arguments of a call, those that it writes copied with their strides, past a `copy_` that is replaced."""
    import torch

    replaced = live.get(("copy_", site.key))
    copied: dict[int, Any] = {}
    for i in site.form.outs:
        x = args[i]
        if isinstance(x, torch.Tensor) and id(x) not in copied:
            copied[id(x)] = made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            if replaced is None:
                made.copy_(x.detach())
            else:
                replaced.torch(keyset, made, x.detach(), False)
    return tuple(copied.get(id(x), x) for x in args)
