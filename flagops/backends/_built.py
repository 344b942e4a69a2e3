"""What `flagops build` wrote, as Triton's cache finds it: compiled kernels, and the module in C that reaches a driver.

Triton asks a cache manager by a key of the kernel's sources, types, constants, options, target and Triton's own files.
A key of the manifest is answered with the files beside it, which are only read; any other goes to the manager that
Triton would have had. Under FLAGOPS_JIT=error a kernel of ours that neither has raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import CacheManager, FileCacheManager

from flagops import arrays, config
from flagops.errors import Uncompiled

from ._store import Store

log = logging.getLogger("flagops")

MANIFEST = "manifest.json"


def place(folder: str | Path) -> Path:
    """Where in a cache folder lies what was built for Triton."""
    return Path(folder) / "triton"


class Built:
    """The artefacts of a folder, by Triton's keys. Raises what `Store` raises, ValueError for a damaged manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries = folder, dict[str, Any]()
        if (folder / MANIFEST).exists():
            manifest = json.loads(Store(folder).raw(MANIFEST) or b"{}")
            self.entries = {**manifest["programs"], **manifest["drivers"]}

    def files(self, key: str) -> dict[str, str]:
        """The paths of an artefact's files by their names, if each is as the manifest says; else none."""
        named: Mapping[str, str] = self.entries[key]["files"] if key in self.entries else {}
        store = Store(self.folder / key) if named else None
        for name, digest in named.items():
            content = store.raw(name) if store else None
            if content is None or hashlib.sha256(content).hexdigest() != digest:
                log.warning("%s is not as it was built, and is not used", self.folder / key / name)
                return {}
        return {name: str(self.folder / key / name) for name in named}


@cache
def built(folder: str) -> Built | str:
    """What a cache folder holds, or why nothing of it is used."""
    try:
        return Built(place(folder))
    except (OSError, ValueError, KeyError) as error:
        log.warning("what `flagops build` wrote into %s is not used: %s", folder, error)
        return f"{folder} is not used: {error}"


class _Asked(threading.local):
    launch: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    """The kernel that this thread launches and may not compile, and what with."""


_asked = _Asked()
_others: list[type[CacheManager]] = []


class Manager(CacheManager):  # Triton looks for a base of this name
    """Answers with what was built; where there is nothing, as the manager does that Triton would have had."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        found = built(config.cache_folder())
        self._files = {} if isinstance(found, str) or override or dump else found.files(key)
        self._key, self._ways = key, {"override": override, "dump": dump}
        self._made: Any = None

    @property
    def _other(self) -> Any:
        """Made when it is needed: it makes a folder for the key."""
        if self._made is None:
            self._made = (_others[0] if _others else FileCacheManager)(self._key, **self._ways)
        return self._made

    def get_file(self, filename: str) -> str | None:
        return self._files.get(filename) or self._other.get_file(filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        return self._other.put(data, filename, binary=binary)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if filename in self._files and not (_asked.launch and knobs.compilation.always_compile):
            return self._files
        group = None
        with contextlib.suppress(OSError) if _asked.launch else contextlib.nullcontext():  # a home that is read-only
            group = self._other.get_group(filename)
        if _asked.launch and not group:
            raise Uncompiled(_refusal(*_asked.launch))
        return group

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._other.put_group(filename, group)


def serve() -> None:
    """Let Triton find what was built, from now on."""
    before = knobs.cache.manager_class
    if before is not Manager:
        _others[:] = [before] if before else []
        knobs.cache.manager_class = Manager


def only_compiled(kernel: Any, grid: Any) -> Callable[..., None]:
    """A launch of a kernel that raises `Uncompiled` where Triton would compile it."""

    def run(*arguments: Any, **options: Any) -> None:
        serve()
        _asked.launch = kernel, arguments, options
        try:
            kernel[grid](*arguments, **options)
        finally:
            _asked.launch = None

    return run


def _refusal(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    said = ", ".join(f"{name}={_word(value)}" for name, value in given.items())
    found = built(config.cache_folder())
    why = found if isinstance(found, str) else f"not one of the {len(found.entries)} artefacts in {found.folder}"
    module = kernel.__module__.rpartition(".")[2]
    return (
        f"FLAGOPS_JIT=error: {module}.{kernel.__name__}({said}) would be compiled: {why}; "
        "`flagops build` makes them, FLAGOPS_JIT=auto compiles here"
    )


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_word, value))})"
    if arrays.is_torch(value):
        return arrays.dtype_name(value)  # kernels get the place of its elements; the sizes are numbers beside it
    return value.__name__ if hasattr(value, "__name__") else str(value)
