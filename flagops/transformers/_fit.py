"""Whether a module of transformers is the one that flagops knows: by its forward's signature and its parts when a patch
is installed, by who watches it or stands for it when it is called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as modules

MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
MASKING = "transformers.masking_utils"
FINEGRAINED = "transformers.integrations.finegrained_fp8"
MODULES = "flagops.packed.modules"
OWN = "_flagops"

_GLOBAL_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)
_CLASSES: dict[str, Any] = {}
_FORWARDS: dict[str, tuple[Any, ...]] = {}
_CSA = f"{MODELING}.DeepseekV4CSACache"
_HCA = f"{MODELING}.DeepseekV4HCACache"

ROTATION = {f"{MODELING}.apply_rotary_pos_emb": "x, cos, sin, unsqueeze_dim=1"}
EAGER = {
    f"{MODELING}.eager_attention_forward": "module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs"
}
MASKS = {
    f"{MASKING}.prepare_padding_mask": "attention_mask, kv_length, kv_offset",
    f"{MASKING}.padding_mask_function": "padding_mask",
    f"{MASKING}.and_masks": "*mask_functions",
}
STATES = {
    f"{_HCA}.store_compression_weights": "self, name, kv, gate",
    f"{_CSA}.store_compression_weights": "self, name, kv, gate",
    f"{_HCA}.update_compressor_states": "self, name, compressed",
    f"{_CSA}.update_compressor_states": "self, name, compressed",
    f"{_CSA}.update_overlap_state": "self, name, chunk_kv, chunk_gate, head_dim",
}


@dataclass(frozen=True)
class Kind:
    """What flagops knows of a class of transformers, and what stands for it.

    ops: the operators that its work consists of; `numerics`: the official numerics change it as well.
    forwards: what stands for the class's forward, or serves its interface: one for each signature that it has had.
    implementation: the interface of transformers that its configuration is to answer with flagops.
    parts: all submodules, parameters and buffers that its forward uses; None where their names are its own affair.
    reads: other attributes that the stand-in reads.
    calls: functions of transformers that the stand-in calls or does the work of, with the parameters that they had.
    """

    ops: frozenset[str]
    forwards: tuple[Callable[..., Any], ...] = ()
    implementation: str | None = None
    numerics: bool = False
    parts: str | None = None
    reads: str = ""
    calls: Mapping[str, str] = field(default_factory=dict)


def spelled(function: Callable[..., Any]) -> str:
    """A function's parameters without annotations, as they would stand in its definition."""
    return ", ".join(str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values())


def renamed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in that takes `cache` under its older name as well, as transformers does since it has renamed it."""

    @wraps(forward)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs.setdefault("cache", kwargs.pop("past_key_values"))
        return forward(module, *args, **kwargs)

    return call


def stand_in(kind: Kind, cls: Any) -> Callable[..., Any] | None:
    """What stands for the forward of a class, by its signature; None where nothing does, or an interface serves."""
    known = () if kind.implementation else kind.forwards
    return next((forward for forward in known if _behind_self(forward) == _behind_self(cls.forward)), None)


def unknown(kind: Kind, cls: Any) -> str | None:
    """Why nothing can stand for the forward of a class, or None."""
    theirs, ours = _behind_self(cls.forward), [_behind_self(forward) for forward in kind.forwards]
    if not ours or theirs in ours:
        return None
    return f"the forward of {cls.__name__} takes ({theirs}), and flagops knows ({') or ('.join(ours)})"


def _behind_self(forward: Callable[..., Any]) -> str:
    return spelled(forward).partition(", ")[2]


def misfit(module: Any, kind: Kind) -> str | None:
    """Why a module is not what flagops knows its class to be, or None."""
    if kind.parts is not None:
        strange = {*module._modules, *module._parameters, *module._buffers} - set(kind.parts.split())
        if strange:
            return f"it has parts that flagops does not know: {', '.join(sorted(strange))}"
        missing = [name for name in (*kind.parts.split(), *kind.reads.split()) if not hasattr(module, name)]
        if missing:
            return f"it lacks what flagops reads: {', '.join(missing)}"
    for path, ours in kind.calls.items():
        owner = MASKING if path.startswith(MASKING) else MODELING
        function: Any = sys.modules[owner]
        for name in path.removeprefix(f"{owner}.").split("."):
            function = getattr(function, name, None)
        if function is None or spelled(function) != ours:
            theirs = "is gone" if function is None else f"takes ({spelled(function)})"
            return f"{path.removeprefix(f'{owner}.')} {theirs}, and flagops calls it with ({ours})"
    return None


def learn() -> None:
    """Look up once what calls are compared with. A packed layer stands for the plain one."""
    modeling = sys.modules[MODELING]
    _CLASSES.update({name: cls for name, cls in vars(modeling).items() if isinstance(cls, type)})
    _CLASSES.update({name: type(modeling.ACT2FN[name]) for name in ("silu", "sqrtsoftplus")}, Linear=torch.nn.Linear)
    _FORWARDS.update({name: (cls.forward,) for name, cls in _CLASSES.items() if hasattr(cls, "forward")})
    for name in ("Linear", "DeepseekV4GroupedLinear"):
        _FORWARDS[name] += tuple(cls.forward for cls in packed_classes())


def packed_classes() -> list[Any]:
    """The linear layers on packed weights whose modules are loaded."""
    found = [(MODULES, "PackedLinear"), (FINEGRAINED, "FP8Linear"), (FINEGRAINED, "FP8GroupedLinear")]
    return [getattr(sys.modules[home], name) for home, name in found if hasattr(sys.modules.get(home), name)]


def unlike(module: Any) -> str | None:
    """What a configuration asks of a module that flagops has no operator for, or None."""
    for name, known in (("act_fn", "silu"), ("score_fn", "sqrtsoftplus")):
        found = getattr(module, name, None)
        if found is not None and type(found) is not _CLASSES[known]:
            return f"its {'activation is' if name == 'act_fn' else 'scores are'} {type(found).__name__}"
    return None


def foreign(module: Any, cls: Any) -> str | None:
    """Why a module does not run its class's own code, or None."""
    if type(module).forward is not cls.forward:
        return f"a {type(module).__name__} has a forward of its own"
    found = module.__dict__.get(slot(module))
    if found is None or module.__dict__.get(OWN) is not None or getattr(found, "__func__", None) is cls.forward:
        return None
    return f"somebody else has bound the forward of a {cls.__name__}"


def slot(module: Any) -> str:
    """Where the forward lies that computes: accelerate's hooks keep it under another name."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else "forward"


def hooked(module: Any) -> bool:
    """Whether a hook of torch, its own or a global one, sees the module's inputs or outputs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(_GLOBAL_HOOKS)
    )


def shown(module: Any) -> bool:
    """Whether a hook sees a module's outputs, other than transformers' own recorder, which asks for what it wants."""
    hooks = (*module._forward_hooks.values(), *modules._global_forward_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def kept(module: Any, name: str, cls: str) -> str | None:
    """Why a part's work cannot be done outside of it, or None: what watches it, or stands for it, would not know."""
    part = module._modules.get(name)  # for every token: torch's own look-up takes longer than all of this
    if getattr(type(part), "forward", None) not in _FORWARDS[cls]:
        return f"its {name} is a {type(part).__name__}"
    if hooked(part):
        return f"a hook watches its {name}"
    own = part.__dict__
    if own.get("forward") is not None and (own.get(OWN) is None or "_hf_hook" in own):
        return f"somebody else has bound the forward of its {name}"
    return None


def unfit(linear: Any, x: torch.Tensor) -> str | None:
    """Why the weight of a linear layer cannot be used past the layer itself, or None."""
    if type(linear) is not torch.nn.Linear and type(linear).__name__ != "DeepseekV4GroupedLinear":
        cls = type(linear)
        name = f"{cls.__module__}.Linear" if cls.__name__ == "Linear" else cls.__name__  # such as peft's
        return f"a {name} is no plain linear layer"
    return unusable(linear) or mixed(x, linear.weight) or rebound(linear)


def unusable(linear: Any) -> str | None:
    """Why a weight cannot be used as it is, whatever it holds, or None."""
    weight = linear.weight
    exported = torch.compiler.is_compiling() and isinstance(weight, FakeTensor)
    if not (type(weight) is torch.nn.Parameter or exported) or linear.bias is not None:
        return "a linear layer has a bias, or a weight that is no plain parameter"
    return "a hook watches a linear layer" if hooked(linear) else None


def rebound(linear: Any) -> str | None:
    """Who else computes a linear layer, or None."""
    own = linear.__dict__
    if type(own.get("_hf_hook")).__name__ == "AlignDevicesHook":  # which moves weights and nothing else
        return None
    found = own.get("forward") if own.get(OWN) is None else None
    if found is not None and getattr(found, "__func__", None) is not type(linear).forward:
        return "somebody else has bound the forward of a linear layer"
    return None


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
