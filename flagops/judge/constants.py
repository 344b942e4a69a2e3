"""The whole numbers in a kernel's own code: where it branches, blocks or gives up, sizes around them must be tried."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

_LARGEST = 1 << 26
_SEEN = 2000  # objects looked at


def constants(function: Any) -> list[int]:
    """Numbers from 2 to 2^26 that a function, or what it reaches in its own package, works with; the nearest first.

    Read from compiled code, defaults, closures, partial applications and module names, through functions, compiled
    ones too, classes and modules of the package where the function was written and of flagops' kernels.
    """
    homes = {_package(getattr(function, "__module__", "") or ""), "flagops.kernels"}
    found: dict[int, None] = {}
    todo, seen = [function], set[int]()
    while todo and len(seen) < _SEEN:
        todo, layer = [], todo
        for value in layer:
            if id(value) not in seen:
                seen.add(id(value))
                todo += _inside(value, homes, found)
    return list(found)


def _package(module: str) -> str:
    """The package that a module was written in: for one of flagops' own kernels, the folder of all."""
    return "flagops.kernels" if module.startswith("flagops.kernels") else module.partition(".")[0]


def _inside(value: Any, homes: set[str], found: dict[int, None]) -> Iterator[Any]:
    if isinstance(value, bool) or value is None or isinstance(value, (str, bytes)):
        return
    if isinstance(value, (int, float)):
        if value == value and abs(value) <= _LARGEST and value == int(value) and abs(value) >= 2:
            found.setdefault(abs(int(value)))
    elif isinstance(value, (tuple, list, set, frozenset)):
        yield from list(value)[:64]
    elif isinstance(value, dict):
        yield from list(value.values())[:64]
    elif isinstance(value, types.CodeType):
        yield from value.co_consts
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, (types.FunctionType, types.MethodType)):
        yield from _of_function(value, homes)
    elif isinstance(value, type):
        if _ours(value, homes):
            yield from [x for x in vars(value).values() if not isinstance(x, (types.GetSetDescriptorType, str))]
    elif hasattr(value, "py_func"):
        yield value.py_func
    elif hasattr(value, "__wrapped__"):
        yield inspect.unwrap(value)
    elif _ours(type(value), homes):
        yield from [vars(value)] if hasattr(value, "__dict__") else []
        yield from [type(value)]


def _of_function(function: Any, homes: set[str]) -> Iterator[Any]:
    function = getattr(function, "__func__", function)
    yield function.__code__
    yield from (function.__defaults__ or (), function.__kwdefaults__ or {})
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield wrapped
    if not _ours(function, homes):
        return
    names = set(_names(function.__code__))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            if _package(value.__name__) in homes:
                yield from [vars(value)[inner] for inner in sorted(names & vars(value).keys())]
        elif not isinstance(value, (types.FunctionType, type)) or _ours(value, homes):
            yield value


def _ours(value: Any, homes: set[str]) -> bool:
    return _package(getattr(value, "__module__", "") or "") in homes


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)
