"""The modules of a checkout's ``benchmarks/``, which flagops is installed without: yardsticks, peers, promises."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flagops.operator import Operator
    from flagops.tools.measure import Call

FOLDER = Path(__file__).parents[2] / "benchmarks"


def here() -> bool:
    return FOLDER.is_dir()


def load(name: str) -> ModuleType | None:
    """A module of the folder; None where flagops is installed without it."""
    path = FOLDER / f"{name}.py"
    full = f"flagops_benchmarks_{name}"
    if full not in sys.modules:
        if not path.is_file():
            return None
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def baselines(op: Operator) -> dict[str, Call]:
    """The yardsticks of an operator, torch's; none outside a checkout."""
    module = load("aten_baselines" if op.aten else "baselines")
    return dict(module.BASELINES.get(op.name, {})) if module else {}
