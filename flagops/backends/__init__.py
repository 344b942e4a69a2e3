"""What a backend is: one small descriptor, here or in somebody else's package.

A descriptor says whether its backend can run at all, which arrays it takes, and where its kernels lie. It imports its
library only inside its methods: asking for `flagops doctor` must not load, or fail on, a library that nobody uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol


@cache
def missing(library: str) -> str | None:
    """Why a library cannot be used, or None once it is imported. A broken installation may raise anything."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        return f"{error.name or library} is not installed (pip install {error.name or library})"
    except Exception as error:
        return f"{library} does not import: {type(error).__name__}: {error}"
    return None


class Backend(Protocol):
    """The public protocol; an out-of-tree package offers one through the entry point group ``flagops.backends``.

    A backend may also have ``self_test()``, which `flagops doctor` runs where the backend is available: what it relies
    on and its library does not promise, each by name with what is wrong with it or None.

    One whose library computes something else from some layouts may have ``misreads(array)``: an input for which that is
    true is copied before a kernel sees it.

    What it may have besides, to make repeated calls cheaper, stands in `flagops.calls.replay`.
    """

    name: str
    """One lower-case word without underscore: the suffix of its kernel modules and the value of ``backend=``."""

    kernels: str | Callable[[Any], Callable[..., None] | None]
    """The package of its kernel modules, ``<kernels>.<family>_<name>``, or a function from operator to kernel.

    In a folder of flagops' own, such as ``flagops.kernels.numba``, modules are named by their family alone.
    """

    dispatch_keys: tuple[str, ...]
    """torch dispatch keys at which `flagops.enable` may install its kernels, such as ``("CPU",)``."""

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine, or None. Never raises; cheap after the first call."""

    def refuses(self, array: Any) -> str | None:
        """Why this array (its library, device or layout) cannot be handed to the kernels, or None."""

    def facts(self) -> dict[str, str]:
        """Versions and devices, for `flagops doctor`. Called only when the backend is available."""

    def synchronize(self) -> None:
        """Wait until everything launched so far has finished; benchmarks call it around their timings."""
