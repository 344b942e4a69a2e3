"""Finds operators and kernels by name and loads each on first use.

A function under `operator` in ``reference/<family>.py`` is an operator; a function of the same name in
``kernels/<backend>/<family>.py`` is its kernel there. No list has to be edited. Packages of others add backends and
operators through entry points; what is wrong with them is a reason, and never an error in a call that is not theirs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from flagops import config
from flagops.backends import Backend
from flagops.errors import Faulty, Unsupported, said, suggestion

if TYPE_CHECKING:
    from flagops.operator import Operator

BUILT_IN = ("numba", "torch", "triton", "numpy")
OURS = "flagops.reference"
PROTOCOL = {"unavailable": (), "refuses": ("array",), "facts": (), "synchronize": ()}
"""The methods of a backend and their parameters, see `flagops.backends.Backend`."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator, and what its module says about it."""

    function: Callable[..., None]
    unsupported: Callable[..., str | None] | None = None
    backward: Callable[..., tuple[Any, ...]] | None = None
    deterministic: bool = False
    batch_invariant: bool = False
    paired: bool = False
    forwards_to: str | Callable[..., str] = ""
    note: str = ""


def kernel(
    *,
    deterministic: bool = False,
    batch_invariant: bool = False,
    paired: bool = False,
    forwards_to: str | Callable[..., str] = "",
    note: str = "",
) -> Callable[[Function], Function]:
    """Declare facts about a kernel.

    deterministic: repeats on the same arguments are equal bit by bit.
    batch_invariant: a row of a batch is bit by bit what the row alone gives.
    paired: products of bfloat16 are added in pairs by an instruction to which subnormals are zeros.
    forwards_to: the library whose operator the kernel merely calls, or a function of the inputs that gives it ("" for
        none); reports then do not count it as a replacement.
    note: what a reader of ``flagops ops`` should know, such as why it is slow.
    """

    def declare(function: Function) -> Function:
        facts = {
            "deterministic": deterministic,
            "batch_invariant": batch_invariant,
            "paired": paired,
            "forwards_to": forwards_to,
            "note": note,
        }
        function.__dict__.update(facts)
        return function

    return declare


@cache
def cards() -> Mapping[str, Operator]:
    """Every operator by name, those of `operators` and those under torch's own, ``"aten.add"``."""
    package = importlib.import_module(OURS)
    found: dict[str, Operator] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")):
        _collect(importlib.import_module(f"{OURS}.{module}"), found)
    for entry in entry_points(group="flagops.operators"):
        try:
            found |= _collect(entry.load(), dict(found))
        except Exception as error:  # somebody else's package, in everybody's process
            _faults[entry.value] = f"its operators cannot be used: {said(error)}"
    return found


def _collect(module: ModuleType, found: dict[str, Operator]) -> dict[str, Operator]:
    from flagops.operator import Operator

    for value in vars(module).values():
        if isinstance(value, Operator) and found.setdefault(value.name, value) is not value:
            raise TypeError(f"two cards are called {value.name}")
    return found


_faults: dict[str, str] = {}


def faulty_operators() -> Mapping[str, str]:
    """What is wrong with modules of operators that packages offer, by module."""
    cards()
    return _faults


@cache
def operators() -> Mapping[str, Operator]:
    """The operators of transformer models by name: what ``flagops.<name>`` is. Torch's own are in ``flagops.aten``."""
    return {name: card for name, card in cards().items() if not card.aten}


def operator(name: str) -> Operator:
    """One operator; a ValueError that suggests the right name if there is none."""
    found = cards().get(name)
    if found is None:
        raise ValueError(f"flagops has no operator {name!r}{suggestion(name, cards())}")
    return found


def named(words: Iterable[str]) -> list[Operator]:
    """The operators that words name: each its own, ``"aten"`` all of torch's, a family (``"reductions"``) its part of
    them. A ValueError that suggests the right name for a word that is none of these."""
    found: dict[str, Operator] = {}
    for word in words:
        group = {n: card for n, card in cards().items() if card.aten and word in ("aten", card.family)}
        found |= {word: cards()[word]} if word in cards() else group or {word: operator(word)}
    return list(found.values())


_added: dict[str, Backend] = {}


def add(descriptor: Backend) -> None:
    """Offer a backend in this process alone, without an installed package."""
    _added[descriptor.name] = descriptor
    for known in (backend_names, backend, find, _module):
        known.cache_clear()


@cache
def backend_names() -> tuple[str, ...]:
    """The built-in backends, then those that installed packages offer, then those of this process."""
    others = {entry.name for entry in entry_points(group="flagops.backends")} - set(BUILT_IN)
    return (*BUILT_IN, *sorted(others), *_added)


class Broken:
    """Stands for a backend whose descriptor is not what the protocol asks for; what is wrong is its reason."""

    kernels: str | Callable[[Any], Callable[..., None] | None] = ""
    dispatch_keys: tuple[str, ...] = ()

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def unavailable(self) -> str | None:
        return self.reason

    def refuses(self, array: Any) -> str | None:
        return self.reason

    def facts(self) -> dict[str, str]:
        return {}

    def synchronize(self) -> None:
        pass


@cache
def backend(name: str) -> Backend:
    """The descriptor of a backend; a ValueError that suggests the right name if there is none."""
    if name not in backend_names():
        where = "FLAGOPS_BACKEND: " if name in config.names(os.environ.get("FLAGOPS_BACKEND", "")) else ""
        raise ValueError(f"{where}flagops has no backend {name!r}{suggestion(name, backend_names())}")
    try:
        if name in _added:
            found = _added[name]
        elif name in BUILT_IN:
            found = importlib.import_module(f"flagops.backends.{name}").backend
        else:
            entries = list(entry_points(group="flagops.backends", name=name))
            if len(entries) > 1:
                return Broken(name, f"several packages offer it: {', '.join(e.value for e in entries)}")
            loaded = entries[0].load()
            found = getattr(loaded, "backend", loaded)
        wrong = "" if name in BUILT_IN else _unlike_the_protocol(found, name)
        return Broken(name, f"its descriptor {wrong}") if wrong else found
    except Exception as error:  # somebody else's package: whatever it raises is the reason that doctor shows
        return Broken(name, f"its descriptor failed to load: {said(error)}")


def _unlike_the_protocol(found: Any, name: str) -> str:
    """What is wrong with a descriptor; "" if nothing is."""
    lacking = [word for word in ("name", "kernels", "dispatch_keys", *PROTOCOL) if not hasattr(found, word)]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    if found.name != name:
        return f"calls itself {found.name!r}"
    for method, parameters in PROTOCOL.items():
        try:
            inspect.signature(getattr(found, method)).bind(*parameters)
        except TypeError as error:
            return f"has {method} of other parameters than ({', '.join(parameters)}): {error}"
    try:
        found.unavailable()
    except Exception as error:
        return f"raised in unavailable(): {said(error)}"
    return ""


def refusal(backend_name: str, array: Any) -> str | None:
    """Why a backend's kernels cannot be handed an array, or None."""
    try:
        return backend(backend_name).refuses(array)
    except Exception as error:
        if backend_name in BUILT_IN:
            raise
        return f"its descriptor raised in refuses(): {said(error)}"


def home(operator_name: str, backend_name: str) -> str:
    """The module where a backend's kernel of an operator is looked for, "" if it keeps its kernels in none.

    A folder of ours holds ``<family>.py``; a package of others ``<family>_<name>.py``, as the protocol says. Of an
    operator of others, kernels for our backends lie so beside its reference.
    """
    package, card = backend(backend_name).kernels, operator(operator_name)
    if callable(package) or not package:
        return ""
    if not package.startswith("flagops.kernels."):
        return f"{package}.{card.family}_{backend_name}"
    reference = card.reference.__module__
    return f"{package}.{card.family}" if reference.startswith(f"{OURS}.") else f"{reference}_{backend_name}"


@cache
def find(operator_name: str, backend_name: str) -> Kernel:
    """The kernel of an operator for a backend. Raises Unsupported with the reason if there is none, and Faulty where
    a package's is not as the operator's card asks for."""
    op, owner = operator(operator_name), backend(backend_name)
    reason = owner.unavailable()
    if reason:
        raise Unsupported(reason)
    try:
        return _found(op, owner)
    except Exception as error:
        if isinstance(error, Unsupported) or (backend_name in BUILT_IN and op.reference.__module__.startswith(OURS)):
            raise  # a fault of ours is no reason to go another way
        raise Faulty(f"{backend_name}'s kernel for {op.name} cannot be used: {said(error)}") from error


def _found(op: Operator, owner: Backend) -> Kernel:
    if callable(owner.kernels):
        module, function, place = None, owner.kernels(op), f"{owner.name}'s kernels() gives none"
    else:
        name = home(op.name, owner.name)
        module = _module(name)
        function = getattr(module, op.function, None)
        place = f"{name} has no function {op.function}" if module else f"there is no module {name}"
    if function is None:
        raise Unsupported(f"{owner.name} has no kernel for {op.name}: {place}")
    return describe(op, function, module)


def faults(backend_name: str) -> Mapping[str, str]:
    """What is wrong with kernels of a package's backend, by operator; of ours the test suite says so."""
    found = {}
    for name in cards() if backend_name not in BUILT_IN else ():
        try:
            find(name, backend_name)
        except Faulty as error:
            found[name] = str(error)
        except Unsupported:
            continue
    return found


def written(operator_name: str, backend_name: str) -> bool:
    """Whether the source of a kernel exists, also where its backend cannot run.

    A module that makes its kernels from the cards of its family says ``EVERY_CARD = True``.
    """
    if callable(backend(backend_name).kernels):
        return True
    module = home(operator_name, backend_name)
    try:
        spec = find_spec(module) if module else None
    except ModuleNotFoundError:
        return False
    if not spec or not spec.origin:
        return False
    text = Path(spec.origin).read_text(encoding="utf-8")
    return f"\ndef {operator(operator_name).function}(" in text or "\nEVERY_CARD = True\n" in text


def describe(op: Operator, function: Callable[..., None], module: ModuleType | None) -> Kernel:
    """A kernel from its function and the module around it; a TypeError if its parameters are not the operator's."""
    _same_parameters(function, op.parameters)
    unsupported = getattr(module, f"{op.function}_unsupported", None)
    backward = None if op.aten else getattr(module, f"{op.function}_backward", None)
    if unsupported:
        _same_parameters(unsupported, op.inputs)
    if backward:
        _same_parameters(backward, ("grad", *op.inputs, "needs"))
    facts = ("deterministic", "batch_invariant", "paired", "forwards_to", "note")
    return Kernel(function, unsupported, backward, **{f: getattr(function, f) for f in facts if hasattr(function, f)})


def _same_parameters(function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != expected:
        raise TypeError(
            f"{function.__module__}.{function.__name__} takes ({', '.join(parameters)}), "
            f"but the operator's card says ({', '.join(expected)})"
        )


@cache
def _module(name: str) -> ModuleType | None:
    try:
        if find_spec(name) is None:
            return None
    except ModuleNotFoundError:
        return None
    return importlib.import_module(name)
