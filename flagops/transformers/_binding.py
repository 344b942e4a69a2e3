"""How a module is patched and put back: its instance alone changes, and only what the newest handles want of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ._handle import Handle
    from ._mesh import Heads

NAME = "flagops"
MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_OWN = "_flagops"
HEADS = "_flagops_heads"


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
        self.handles: list[Handle] = []
        self.config: Any = module.config if implementation else None

    @classmethod
    def of(cls, module: Any, *args: Any) -> Binding:
        known: Binding | None = module.__dict__.get(_OWN)
        return known or cls(module, *args)

    def use(self, op: str) -> Handle | None:
        """The handle that computes an operator here: the newest that wants it."""
        for handle in reversed(self.handles):
            if handle.active and op in handle.ops:
                return handle
        return None

    @property
    def awake(self) -> bool:
        """Whether any handle wants anything: not so in a deep copy whose handle is disabled."""
        return any(handle.active for handle in self.handles)

    @property
    def official(self) -> bool:
        """Whether the newest handle asks for the official numerics."""
        return next((handle.official for handle in reversed(self.handles) if handle.active), False)

    def add(self, handle: Handle) -> None:
        self.handles.append(handle)
        own = self.module.__dict__
        own[_OWN] = self
        if self.forward and not any(self._is_mine(own.get(slot)) for slot in ("forward", "_old_forward")):
            own[_slot(self.module)] = MethodType(self.forward, self.module)
        if self.implementation:
            own["config"] = view(self)

    def remove(self, handle: Handle) -> None:
        self.handles.remove(handle)
        if self.handles:
            return
        own = self.module.__dict__
        own.pop(_OWN, None)
        if self._is_mine(own.get("forward")):
            del own["forward"]
        if self._is_mine(own.get("_old_forward")):  # beneath a hook of accelerate
            own["_old_forward"] = MethodType(type(self.module).forward, self.module)
        if self.implementation and is_view(own.get("config")):
            own["config"] = self.config

    def _is_mine(self, method: Any) -> bool:
        return isinstance(method, MethodType) and method.__func__ is self.forward


def _slot(module: Any) -> str:
    """Where the forward lies that computes: accelerate's hooks keep it under another name."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else "forward"


def foreign(module: Any, cls: type) -> str | None:
    """Why a module does not run its class's own code, or None."""
    if type(module).forward is not cls.forward:  # type: ignore[attr-defined]
        return f"a {type(module).__name__} has a forward of its own"
    own = module.__dict__
    found = own.get(_slot(module))
    if found is None or _OWN in own or getattr(found, "__func__", None) is cls.forward:  # type: ignore[attr-defined]
        return None
    return f"somebody else has bound the forward of a {cls.__name__}"


def unfit(linear: Any, x: torch.Tensor) -> str | None:
    """Why the weight of a linear layer cannot be used past the layer itself, or None."""
    if type(linear) is not torch.nn.Linear and type(linear).__name__ != "DeepseekV4GroupedLinear":
        return f"a {type(linear).__name__} is no plain linear layer"
    weight, own = linear.weight, linear.__dict__
    if type(weight) is not torch.nn.Parameter or linear.bias is not None:
        return "a linear layer has a bias, or a weight that is no plain parameter"
    if hooked(linear):
        return "a hook watches a linear layer"
    if "forward" in own and "_hf_hook" not in own:
        return "somebody else has bound the forward of a linear layer"
    return mixed(x, weight)


def mixed(x: torch.Tensor, *weights: torch.Tensor) -> str | None:
    """Why an operator cannot take an input and weights together, or None."""
    for weight in weights:
        if weight.device != x.device:
            return f"weights are on {weight.device}"
        if weight.dtype != x.dtype:
            return f"input and weights mix {' and '.join(sorted({str(x.dtype), str(weight.dtype)}))}"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return "autocast casts weights"
    return None


def hooked(module: Any) -> bool:
    """Whether a hook of torch sees the module's inputs or outputs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def heads_of(module: Any) -> Heads | None:
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

    def __reduce__(self) -> Any:
        return copy.copy, (self._binding.config,)


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


def is_view(config: Any) -> bool:
    return isinstance(config, _Viewed)
