"""Each element of a result from one of each operand: every card of the family by its lane, bound by memory.

Halves are read and written as they are; what else is not of the arithmetic's dtype is brought to it piece by piece.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined"
from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from flagops import registry
from flagops.arrays import HALF, arithmetic, dtype_name, numpy_dtype
from flagops.backends.numba import jit
from flagops.operator import Operator
from flagops.registry import kernel

from .. import _lanes
from . import _functions, _numbers, _vectors
from ._elementwise import Operand, elementwise, lane_routine

WORDS: dict[str, Any] = {
    **{
        name: getattr(_functions, name)
        for name in ("exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "erf")
    },
    **{name: getattr(_numbers, name) for name in ("floor", "ceil", "trunc", "fmod", "remainder")},
    **{name: getattr(_numbers, name) for name in ("floor_divide", "trunc_divide")},
    **{name: getattr(_vectors, name) for name in ("maximum", "minimum", "where", "sqrt")},
    "round": _numbers.round_even,
    "pow": _functions.power,
    "abs": abs,
}
"""What lanes are written in."""


def _apply_1(x):
    return word(x)


def _apply_2(x, y):
    return word(x, y)


def _apply_3(x, y, z):
    return word(x, y, z)


def lane_of(name: str, operands: int) -> Any:
    """The compiled lane of a card: its own, or the word of its name."""
    own = getattr(_lanes, name, None)
    source = own or (_apply_1, _apply_2, _apply_3)[operands - 1]
    words = vars(_lanes) | WORDS | ({} if own else {"word": WORDS[name]})
    made = FunctionType(source.__code__, words, name)
    made.__module__ = __name__
    return jit(made, source)


def _kernel(card: Operator) -> Callable[..., None]:
    """The kernel of a card."""
    flags = [name for name, scalar in card.scalars.items() if scalar.torch == "bool"]
    names = [card.function, *(f"{card.function}_{choice}" for choice in (*flags, "int64"))]
    lanes = {name: lane_of(name, len(card.tensors)) for name in names if name in WORDS or hasattr(_lanes, name)}
    takes = [card.positions[name] for name in card.scalars if name not in ("dtype", *flags)]
    chooses = [(card.positions[name], name) for name in flags]
    where_dtype, conditions = card.positions["dtype"], [t.dtypes == ("bool",) for t in card.tensors.values()]

    @kernel(deterministic=True, batch_invariant=True)
    def run(*args: Any) -> None:
        dtype, out = args[where_dtype], args[-1]
        acc = arithmetic(dtype)
        ins = [
            Operand(x, "bool" if condition else _tag(dtype_name(x), acc))
            for x, condition in zip(args, conditions, strict=False)
        ]
        target = Operand(out, dtype_name(out) if dtype_name(out) in (*HALF, "bool") else acc)
        name = "_".join((card.function, *(flag for at, flag in chooses if args[at])))
        name = f"{name}_{acc}" if f"{name}_{acc}" in lanes else name
        scalars = [args[at] for at in takes]
        routine = lane_routine(lanes[name], target.tag, tuple(x.tag for x in ins), acc, len(scalars))
        values = np.array([int(x) if acc == "int64" else x for x in scalars] or [0], numpy_dtype(acc))
        elementwise(routine, target, ins, values)

    run.__name__, run.__signature__ = card.function, card.signature  # type: ignore[attr-defined]
    return run


def _tag(dtype: str, acc: str) -> str:
    """What an operand is read as: halves as they are where the arithmetic is float32."""
    return dtype if acc == "float32" and dtype in HALF else acc


EVERY_CARD = True

for _card in registry.cards().values():
    if _card.aten and _card.family == "pointwise":
        globals()[_card.function] = _kernel(_card)
