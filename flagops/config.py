"""Every setting, once: its variable, its parser, its default and its meaning.

The environment is read at first use and a value that does not parse raises. `using` changes settings for a block, in
this thread or task alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from flagops.errors import suggestion

DEFAULT_OPS = ("default",)
UNITS = {"": 1, "B": 1}
UNITS |= {f"{u}B": 1000 ** (i + 1) for i, u in enumerate("KMGT")}
UNITS |= {f"{u}IB": 1024 ** (i + 1) for i, u in enumerate("KMGT")}


def names(value: str | Sequence[str]) -> tuple[str, ...]:
    """``"triton, torch"`` or a sequence of names as a tuple of names."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def flag(value: str | bool) -> bool:
    switches = {"0": False, "1": True, "": False, False: False, True: True}
    if value not in switches:
        raise ValueError(f"expected 0 or 1, got {value!r}")
    return switches[value]


def size(value: str | int) -> int:
    """Bytes: ``268435456``, ``"256MiB"``, ``"1.5 GiB"``, and as disks are sold ``"4GB"``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", str(value).strip(), re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    if not found or not unit or float(found[1]) * unit < 1:
        raise ValueError(f"expected bytes such as 268435456, 256MiB or 4GB, got {value!r}")
    return int(found[1]) * unit if found[1].isdecimal() else int(float(found[1]) * unit)


def count(value: str | int) -> int:
    if not str(value).isdecimal():
        raise ValueError(f"expected a whole number, got {value!r}")
    return int(value)


def level(value: str) -> str:
    if value.upper() not in ("", "DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"expected DEBUG, INFO, WARNING or ERROR, got {value!r}")
    return value.upper()


def jit(value: str) -> str:
    if value not in ("auto", "error"):
        raise ValueError(f"expected auto or error, got {value!r}")
    return value


def folder(value: str) -> str:
    path = os.path.expanduser(value)
    if path and not os.path.isabs(path):  # it would be another one in each working directory
        raise ValueError(f"expected an absolute path, got {value!r}")
    return path


def file(value: str) -> str:
    return os.path.abspath(os.path.expanduser(value)) if value else ""


def _setting(parse: Callable[[Any], Any], default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True, eq=False)
class Config:
    """One field a setting; the variable is FLAGOPS_ and the field's name in capitals."""

    backend: tuple[str, ...] = _setting(names, (), "one backend (that or an error) or several (the first that works)")
    ops: tuple[str, ...] = _setting(names, DEFAULT_OPS, "what flagops.enable() replaces: 'default,-matmul', 'all'")
    check: bool = _setting(flag, False, "1: also check index values on a GPU, which waits for it")
    budget: int = _setting(size, 256 << 20, "bytes that an operator's temporaries may take")
    cache: str = _setting(folder, "", "folder of compiled kernels (default: flagops in the user's cache folder)")
    jit: str = _setting(jit, "auto", "error: raise where a kernel would be compiled, in place of compiling it")
    fuel: int | None = _setting(count, None, "let only the first N replaced calls through (flagops bisect)")
    order: str = _setting(file, "", "table of who computes what, as `flagops tune --out FILE` writes it")
    log: str = _setting(level, "", "DEBUG, INFO, WARNING or ERROR: print flagops' log to standard error")


def _parse(name: str, value: Any, label: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(Config)}
    if name not in known:
        raise ValueError(f"{label} is no setting of flagops{suggestion(name, known)}")
    try:
        return known[name].metadata["parse"](value)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


@lru_cache(maxsize=1)
def _environment() -> Config:
    chosen = {
        variable.removeprefix("FLAGOPS_").lower(): (variable, value)
        for variable, value in os.environ.items()
        if variable.startswith("FLAGOPS_")
    }
    config = Config(**{name: _parse(name, value, variable) for name, (variable, value) in chosen.items()})
    if config.log:
        import logging

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger = logging.getLogger("flagops")
        logger.addHandler(handler)
        logger.setLevel(config.log)
    return config


_block: ContextVar[Config | None] = ContextVar("flagops", default=None)


def current() -> Config:
    """The settings in force here."""
    return _block.get() or _environment()


def budget() -> int:
    """Bytes that one call's temporaries may take together."""
    return current().budget


def cache_folder() -> str:
    """Where compiled kernels are kept: FLAGOPS_CACHE, or ``flagops`` in the user's cache folder."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.join(home, ".cache")  # as its specification says
    return current().cache or os.path.join(base, "flagops")


def interpreting() -> bool:
    """Whether Triton's interpreter runs in place of its compiler: TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@contextmanager
def using(**settings: Any) -> Iterator[Config]:
    """Settings for a block of this thread: ``with flagops.using(backend="numba", budget="64MiB"): ...``."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():  # a graph would keep the call and lose the setting
        torch._dynamo.graph_break(msg="flagops.using cannot be part of a graph; call the compiled function within it")
    if "order" in settings:  # calls that were planned by another table would go on as they are
        raise ValueError("using(order=...): the table is one of a process; set FLAGOPS_ORDER before it starts")
    parsed = {name: _parse(name, value, f"using({name}=...)") for name, value in settings.items()}
    token = _block.set(dataclasses.replace(current(), **parsed))
    try:
        yield current()
    finally:
        _block.reset(token)
