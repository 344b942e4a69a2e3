"""What a backend is: one small descriptor, here or in somebody else's package.

A descriptor says whether its backend can run at all, which arrays it takes, and where its kernels lie. It imports its
library only inside its methods: asking for `flagops doctor` must not load, or fail on, a library that nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Backend(Protocol):
    """The public protocol; an out-of-tree package offers one through the entry point group ``flagops.backends``."""

    name: str
    """One lower-case word without underscore: the suffix of its kernel modules and the value of ``backend=``."""

    kernels: str | Callable[[Any], Callable[..., None] | None]
    """The package that holds its kernel modules, ``<kernels>.<family>_<name>``, or a function from operator to kernel."""

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
