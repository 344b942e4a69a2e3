"""Modules that have moved: an old name is the very module at its new place, for imports, pickles and ``python -m``."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MOVED = {
    "report": "override",
    **dict.fromkeys(("cache", "examples", "indices", "layers", "weights"), "deepseek_v4"),
    **dict.fromkeys(("bench", "bisect", "contract", "demo", "demo_table", "measure", "shares", "stubs"), "tools"),
    **dict.fromkeys(("batching", "derivatives", "generated", "memory", "replay", "surroundings"), "calls"),
}


class Finder:
    """Stands first in `sys.meta_path`: in a checkout, a folder beside this package may have a name of `MOVED`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package != "flagops" or module not in MOVED:
            return None
        from importlib.util import find_spec

        home = find_spec(f"flagops.{MOVED[module]}.{module}")
        assert home is not None, module
        return ModuleSpec(name, _Loader(home), origin=home.origin)  # type: ignore[arg-type]


class _Loader:
    def __init__(self, home: ModuleSpec) -> None:
        self.home = home

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.home.name)
        self.home = module.__spec__ or self.home
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.home  # importing under the old name has put another there

    def get_code(self, name: str) -> CodeType | None:
        """For ``python -m``."""
        return self.home.loader.get_code(self.home.name)  # type: ignore[union-attr]
