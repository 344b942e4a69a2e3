"""How a module is patched and put back: its instance alone changes, and only what the newest handles want of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from types import MethodType
from typing import Any, Protocol

from ._fit import OWN, slot

NAME = "flagops"
HEADS = "_flagops_heads"


class Wish(Protocol):
    """What a module asks of a handle."""

    active: bool
    official: bool
    ops: frozenset[str]

    def call(self, op: str, *args: Any, out: Any = None) -> Any: ...

    def round(self, op: str, *args: Any) -> Any: ...

    def leave(self, op: str, like: Any, reason: str) -> None: ...


class Binding:
    """A patched module: what it was, and the handles that want something of it, newest last.

    forward: stands for the method of the module's class, which it is given bound to the module; None for none.
    implementation: the interface of transformers (``"attn"``, ``"experts"``) that the module's configuration shall
        answer with flagops; None for none.
    """

    def __init__(
        self,
        module: Any,
        ops: frozenset[str],
        forward: Callable[..., Any] | None = None,
        implementation: str | None = None,
    ) -> None:
        self.module = module
        self.ops = ops
        self.forward = forward
        self.implementation = implementation
        self.handles: list[Wish] = []
        self.config: Any = module.config if implementation else None

    @classmethod
    def of(cls, module: Any, *args: Any) -> Binding:
        known: Binding | None = module.__dict__.get(OWN)
        return known or cls(module, *args)

    def use(self, op: str) -> Wish | None:
        """The handle that computes an operator here: the newest that wants it."""
        for handle in reversed(self.handles):
            if handle.active and op in handle.ops:
                return handle
        return None

    @property
    def awake(self) -> bool:
        """Whether any handle wants anything: not so in a deep copy whose handle is disabled."""
        return self._newest() is not None

    @property
    def official(self) -> Wish | None:
        """The newest handle if it asks for the official numerics."""
        newest = self._newest()
        return newest if newest and newest.official else None

    def _newest(self) -> Wish | None:
        for handle in reversed(self.handles):
            if handle.active:
                return handle
        return None

    def add(self, handle: Wish) -> None:
        self.handles.append(handle)
        own = self.module.__dict__
        own[OWN] = self
        if self.forward and not any(self._is_mine(own.get(name)) for name in ("forward", "_old_forward")):
            own[slot(self.module)] = MethodType(self.forward, self.module)
        if self.implementation:
            own["config"] = view(self)

    def remove(self, handle: Wish) -> None:
        self.handles.remove(handle)
        if self.handles:
            return
        own = self.module.__dict__
        own.pop(OWN, None)
        if self._is_mine(own.get("forward")):
            del own["forward"]
        if self._is_mine(own.get("_old_forward")):  # beneath a hook of accelerate
            own["_old_forward"] = MethodType(type(self.module).forward, self.module)
        if self.implementation and is_view(own.get("config")):
            own["config"] = self.config

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        made = memo[id(self)] = object.__new__(Binding)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> Any:
        """Nothing is pickled of a patch: a model that is loaded runs its own code, and needs no flagops for it."""
        return type(None), ()

    def _is_mine(self, method: Any) -> bool:
        return isinstance(method, MethodType) and method.__func__ is self.forward


def binding_of(module: Any) -> Binding:
    """What is bound to a module; a binding that nobody wants anything of for a copy that has lost its own."""
    found: Binding | None = module.__dict__.get(OWN)
    return found or Binding(module, frozenset())


def heads_of(module: Any) -> Any:
    """How the heads of an attention layer or an indexer are divided over ranks; None where they are not."""
    return module.__dict__.get(HEADS)


class _Viewed:
    """Mixed into a configuration's class: the same attributes, but its implementation is flagops while awake."""

    __slots__ = ("_binding",)
    _binding: Binding

    @property
    def _attn_implementation(self) -> Any:
        return self._named("attn")

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._binding.config._attn_implementation = value

    @property
    def _experts_implementation(self) -> Any:
        return self._named("experts")

    @_experts_implementation.setter
    def _experts_implementation(self, value: Any) -> None:
        self._binding.config._experts_implementation = value

    def _named(self, which: str) -> Any:
        binding = self._binding
        if which == binding.implementation and binding.awake:
            return NAME
        return getattr(binding.config, f"_{which}_implementation")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        binding = self._binding
        if id(binding.module) in memo:  # the whole model is copied
            return view(copy.deepcopy(binding, memo))
        return copy.deepcopy(binding.config, memo)

    def __copy__(self) -> Any:
        return copy.copy(self._binding.config)

    def __reduce__(self) -> Any:
        return itemgetter(0), ((self._binding.config,),)  # itself, shared with whoever else is pickled with it


@cache
def _class(cls: Any) -> Any:
    return type(cls.__name__, (_Viewed, cls), {"__module__": cls.__module__})


def view(binding: Binding) -> Any:
    """The configuration of a binding's module, which shares all attributes with it but names flagops."""
    cls = _class(binding.config.__class__)
    made = cls.__new__(cls)
    object.__setattr__(made, "__dict__", binding.config.__dict__)
    object.__setattr__(made, "_binding", binding)
    return made


def served(config: Any) -> bool:
    """Whether every attention layer of a view's model still reads lists: none was put there after the patch."""
    model = config._binding.module
    for layer in getattr(model, "layers", ()):
        attention = layer._modules.get("self_attn")
        binding = None if attention is None else attention.__dict__.get(OWN)
        if binding is None or not binding.use("sparse_attention"):
            return False
    return True


def is_view(config: Any) -> bool:
    return isinstance(config, _Viewed)
