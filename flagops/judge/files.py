"""A single file of kernels, functions named like operators, offered as a backend without a package."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from flagops import registry
from flagops.backends.torch import backend as torch_backend


class FileBackend:
    """Kernels that take torch tensors on the CPU, unless the file has a ``backend`` of its own that says otherwise."""

    dispatch_keys = ()

    def __init__(self, name: str, package: str, own: Any) -> None:
        self.name, self.kernels, self._own = name, package, own or torch_backend

    def unavailable(self) -> str | None:
        return self._own.unavailable()

    def refuses(self, array: Any) -> str | None:
        return self._own.refuses(array)

    def facts(self) -> dict[str, str]:
        return self._own.facts()

    def synchronize(self) -> None:
        self._own.synchronize()


def name_of(path: str) -> str:
    """The backend that a file is offered as."""
    word = re.sub("[^a-z0-9]", "", Path(path).stem.lower()) or "kernels"
    return f"{word}file" if word in registry.backend_names() else word


def offer(path: str) -> str:
    """Load a file and offer its functions as the kernels of a backend; returns its name.

    Whatever the file raises is the caller's.
    """
    name = name_of(path)
    package = f"judged_{name}"
    spec = importlib.util.spec_from_file_location(f"{package}.file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[package], sys.modules[spec.name] = ModuleType(package), module
    sys.modules[package].__path__ = []
    spec.loader.exec_module(module)
    for family in {op.family for op in registry.operators().values()}:  # where the protocol looks for a kernel
        sys.modules[f"{package}.{family}_{name}"] = module
    registry.add(FileBackend(name, package, getattr(module, "backend", None)))
    return name


def kernels_of(backend: str) -> list[str]:
    """The operators that a file has functions for."""
    module = sys.modules[f"judged_{backend}.file"]
    return [name for name in registry.operators() if callable(vars(module).get(name))]
