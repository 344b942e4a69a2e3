"""A single file of kernels, functions named like operators, offered as a backend without a package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flagops import registry
from flagops.backends.torch import backend as torch_backend
from flagops.errors import suggestion


class FileBackend:
    """Kernels that take torch tensors on the CPU, unless the file has a ``backend`` of its own that says otherwise."""

    dispatch_keys: tuple[str, ...] = ()
    kernels: str | Callable[[Any], Callable[..., None] | None]

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
    spec = importlib.util.spec_from_file_location(f"judged_{name}.file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    _enter(name, module)
    spec.loader.exec_module(module)
    registry.add(FileBackend(name, f"judged_{name}", getattr(module, "backend", None)))
    return name


def offer_functions(name: str, functions: dict[str, Any]) -> str:
    """Offer functions by name, as a file of them would be."""
    module = ModuleType(f"judged_{name}.file")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    vars(module).update(functions)
    _enter(name, module)
    registry.add(FileBackend(name, f"judged_{name}", None))
    return name


def _enter(name: str, module: ModuleType) -> None:
    """Put a module wherever the protocol looks for kernels of a backend."""
    package = ModuleType(f"judged_{name}")
    package.__path__ = []
    sys.modules[package.__name__] = package
    sys.modules[f"{package.__name__}.file"] = module
    for family in {op.family for op in registry.cards().values()}:
        sys.modules[f"{package.__name__}.{family}_{name}"] = module


def without_kernels(path: str, backend: str) -> str:
    """What is wrong with a file that has no function named like an operator; empty for any other."""
    if kernels_of(backend):
        return ""
    module = sys.modules[f"judged_{backend}.file"]
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    hints = ((name, suggestion(name, registry.operators())) for name in own)
    meant = (f"{name}{hint}" for name, hint in hints if hint)
    return f"{path} has no function named like an operator: {next(meant, ', '.join(own) or 'it has none at all')}"


def kernels_of(backend: str) -> list[str]:
    """The operators that a file has functions for."""
    module = sys.modules[f"judged_{backend}.file"]
    return [name for name in registry.operators() if callable(vars(module).get(name))]
