"""Functions put before torch's kernels at a dispatch key, and taken away again in any order.

One function per overload and key serves the whole process. Removing one that another library has since overridden would
break the kernel that library saved, so such a function stays, idle, until it is on top again.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger("flagops")

COMPOSITE = "CompositeImplicitAutograd"
_WARNING = r"(?s)\s*Warning only once for all operators.*Overriding a previously registered kernel"


class Thread(threading.local):
    busy = False
    """Whether this thread runs a kernel, ours or torch's: what that calls goes to torch's own kernels."""


thread = Thread()
lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not inherit the lock from a thread that it does not have
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def composed(name: str, key: str) -> bool:
    """Whether torch composes an overload of others at a key, which have the gradients."""
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"aten::{name}", COMPOSITE) and not has(f"aten::{name}", key)


class Counter:
    """Counts without a lock, from any number of threads."""

    def __init__(self) -> None:
        self.add = itertools.count().__next__
        self._reads = 0

    def value(self) -> int:
        with lock:
            count = self.add() - self._reads
            self._reads += 1
        return count


class Registration:
    """One of our functions at one overload and dispatch key, and the kernel below it.

    composite: it keeps the gradients of an operator that torch composes of others.
    owned: whether the key has a kernel of its own to stand before; what torch composes elsewhere calls us again.
    runtime: a key at which torch calls it, the key itself but for a composition, which serves many.
    computes: whether calls can be computed here; else they are only watched for who may not have them.
    """

    composite = False
    computes = True

    def __init__(self, name: str, key: str) -> None:
        import torch

        if not self.composite and composed(name, key):
            raise TypeError(f"aten::{name} is composite: a kernel at {key} would lose its gradients")
        self.name, self.key = name, key
        self.owned = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
        self.runtime = "CPU" if torch._C._dispatch_is_alias_key(getattr(torch._C.DispatchKey, key)) else key
        self.handles: list[Any] = []
        self.plans: dict[Any, Any] = {}
        self.function = self.call()
        self.library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        self.below: Any = None
        self.table = ""
        self.install()

    def call(self) -> Callable[..., Any]:
        """The function to register, again and again: torch never frees one."""
        raise NotImplementedError

    def install(self) -> None:
        import torch

        self.others = f"aten/{self.name}/{self.key}" in torch.library._impls
        self._look_below()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _WARNING, UserWarning)
            self.library.impl(  # type: ignore[no-untyped-call]
                self.name, self.function, self.key, with_keyset=True, allow_override=True
            )
        self.own = torch.library.get_kernel(f"aten::{self.name}", self.runtime)

    def _look_below(self) -> None:
        import torch

        table = torch._C._dispatch_dump_table(f"aten::{self.name}")
        if table == self.table:  # each look at a kernel costs 50 bytes that torch keeps as long as the kernel
            return
        self.table = table
        try:
            self.below = torch.library.get_kernel(f"aten::{self.name}", self.runtime)
        except RuntimeError:
            self.below = None
            log.debug("aten::%s has no kernel at %s: what we do not take has nowhere to go", self.name, self.key)

    def uninstall(self) -> None:
        import torch

        emptied = self.library.m
        self.library._destroy()  # type: ignore[no-untyped-call]
        self.library.m = emptied  # it takes registrations again; torch never frees one
        in_flight.append(self.own)
        if self.others:
            torch.library._impls.add(f"aten/{self.name}/{self.key}")

    def on_top(self) -> bool:
        """Whether torch would call us, or an older registration of ours, and nobody else's override."""
        import torch

        places = {self.runtime, f"Autograd{self.runtime}"} if self.runtime != self.key else {self.key}
        return all(_HERE in repr(torch.library.get_kernel(f"aten::{self.name}", key)) for key in places)

    def torch(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """The kernel that was there before us, torch's own or another library's.

        Raises NotImplementedError where there was none.
        """
        if self.below is None:
            raise NotImplementedError(
                f"aten::{self.name} has no kernel at {self.key} but flagops', which does not take this call; "
                "report() of its handle says why"
            )
        try:
            return self.below.call_boxed(keyset, *args, **kwargs)
        except RuntimeError as error:
            if "SafeKernelFunction has been invalidated" not in str(error) or not self.on_top():
                raise
        with lock:  # the override below was removed: find what is there now
            self.uninstall()
            self.table = ""  # which shows places in a source, not which of two registrations made there
            self.install()
        return self.below.call_boxed(keyset, *args, **kwargs)


_HERE = Registration.install.__code__.co_filename
"""The file torch notes as the place of our registrations."""

live: dict[tuple[str, str], Registration] = {}
idle: dict[tuple[str, str, bool], Registration] = {}
"""Those that were removed, to be installed again, and whether they compute: torch never frees one."""
buried: list[Registration] = []
"""Unwanted, but below another library's override, which may call them: they hand on until they are on top."""
in_flight: deque[Any] = deque(maxlen=4096)
"""Removed functions, which another thread may be about to enter."""


def acquire(name: str, key: str, make: Callable[[], Registration], bare: bool = False, computes: bool = True) -> Any:
    """The registration at an overload and key, installed if need be; above a live one that does not compute.

    bare: also where torch has no kernel to replace; there None, if that is not asked for.
    computes: whether it must compute.
    """
    import torch

    place = name, key
    if place in live and (live[place].computes or not computes):
        return live[place]
    if not bare and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    again = idle.pop((*place, computes), None)
    if again is None:
        live[place] = make()
    else:
        again.install()
        live[place] = again
    return live[place]


def release(registration: Registration) -> None:
    """Nobody wants it any more; `sweep` removes it as soon as it can."""
    if live.get((registration.name, registration.key)) is registration:
        del live[registration.name, registration.key]
    buried.append(registration)


def sweep() -> None:
    """Remove what nobody wants, newest first; what lies below another library's override stays, idle."""
    for registration in reversed(buried.copy()):
        if (registration.name, registration.key) not in live and registration.on_top():
            registration.uninstall()
            buried.remove(registration)
            idle[registration.name, registration.key, registration.computes] = registration
