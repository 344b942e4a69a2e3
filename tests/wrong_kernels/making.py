"""How a wrong kernel is made from a right one, and the table of kinds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from flagops import registry

Kernel = Callable[..., None]
BACKENDS = ("numba", "torch")
KINDS: dict[str, tuple[str, tuple[str, ...], Callable[..., Any]]] = {}
PRODUCTS, MANY = ("matmul", "linear"), ("rms_norm", "matmul", "swiglu", "hadamard")
MIXED = ("rms_norm", "linear", "fp8_dequantize", "sparse_attention", "moe_gate", "hc_post")


def kind(group: str, operators: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a way to be wrong under its function's name."""

    def declare(make: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[make.__name__] = group, operators, make
        return make

    return declare


def every() -> list[tuple[str, str, str]]:
    """All wrong kernels: kind, operator, backend; one of each kind comes before another of any."""
    found = [
        (rank, k, op, b)
        for k, (_, ops, _) in KINDS.items()
        for rank, op in enumerate(ops)
        for b in BACKENDS
        if not op.startswith("aten.") or b != "torch"  # which has torch's own
    ]
    return [key for _, *key in sorted(found, key=lambda key: key[0])]


def make(name: str, operator: str, backend: str) -> dict[str, Any]:
    """The functions of a file that holds one wrong kernel."""
    op, right = registry.operator(operator), registry.find(operator, backend)
    made, own = KINDS[name][2](right.function, op), op.function
    found = made if isinstance(made, dict) else {own: made}
    facts = {f: getattr(right, f) for f in ("deterministic", "batch_invariant", "paired")}
    if KINDS[name][0] in ("seldom", "precision"):  # who writes such a kernel promises nothing
        facts = {}
    found.setdefault(own, right.function)
    given = {own: op.parameters, f"{own}_unsupported": op.inputs, f"{own}_backward": ("grad", *op.inputs, "needs")}
    return {n: _named(function, n, given[n], facts if n == own else {}) for n, function in found.items()}


def _named(function: Callable[..., Any], name: str, parameters: tuple[str, ...], facts: dict[str, Any]) -> Any:
    """The function with an operator's parameters, as a file would define it."""
    scope = {"function": function}
    exec(f"def {name}({', '.join(parameters)}):\n    return function({', '.join(parameters)})", scope)
    scope[name].__module__ = __name__
    vars(scope[name]).update(facts)
    return scope[name]


def tensors(args: tuple[Any, ...]) -> list[int]:
    return [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]


def outs(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def changed(right: Kernel, change: Callable[[torch.Tensor], torch.Tensor], which: int | None = 0) -> Kernel:
    """Another view or copy of one input, or of all."""

    def wrong(*args: Any) -> None:
        *inputs, out = args
        places = tensors(tuple(inputs))
        for i in places if which is None else places[which : which + 1]:
            if not any(inputs[i] is x for x in outs(out)):
                inputs[i] = change(inputs[i])
        right(*inputs, out)

    return wrong


def after(
    right: Kernel, spoil: Callable[[torch.Tensor], None], when: Callable[..., bool] = lambda *args: True
) -> Kernel:
    """Something done to the first result."""

    def wrong(*args: Any) -> None:
        right(*args)
        out = outs(args[-1])[0]
        if out.numel() and when(*args):
            spoil(out)

    return wrong


def spoil_one(out: torch.Tensor) -> None:
    """Another value in one element, by bits that every format has."""
    place = tuple(random.Random(time.perf_counter_ns()).randrange(n) for n in out.shape)
    if out.dtype.is_floating_point:
        out[place] = out[place].item() * 2 + 1
    else:
        out[place] = out[place].item() ^ 1


def dense(x: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape, device="meta").stride()
