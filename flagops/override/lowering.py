"""What a torch call means in flagops operators, in ordinary tensor code: one function for all forms of a name.

A lowering gets the arguments of the call and `to`, where the result goes, and returns the one call of an operator that
makes it, a list of calls that make a part of it each, or what makes it in several steps. It runs once per signature;
what it did (which views of which arguments went where) is then replayed. So it may look at shapes, strides, dtypes and
scalars, and never at values.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from flagops import arrays

if TYPE_CHECKING:
    from torch import Tensor


class Pass(Exception):
    """Torch's own kernel takes the call; the message is the reason."""


class Call(NamedTuple):
    """An operator, its inputs by position, and the view of the destination that it writes."""

    operator: str
    inputs: tuple[Any, ...]
    out: Tensor


Lowered = Call | list[Call] | Callable[[], None]

Result = tuple[tuple[int, ...], "tuple[int, ...] | None"] | tuple[tuple[int, ...], "tuple[int, ...] | None", Any] | None
"""Shape, strides (None: row by row) and dtype (left out: that of the first tensor)."""

REFUSED, MIXED = "arguments that torch refuses", "dtypes differ"
"""Reasons for which torch's own kernels raise RuntimeError."""


@dataclass
class To:
    """Where the result of a call goes.

    out: the destination, with the shape and strides of torch's result.
    given: whether it is an argument of the call, and not made for it.
    run: computes one of several steps, ``run(operator, *inputs, out=...)``; such a call is lowered again each time.
    """

    out: Tensor
    given: bool
    run: Callable[..., None]
    numbers: list[Tensor] = field(default_factory=list)

    def __call__(self, operator: str, *inputs: Any, out: Tensor | None = None) -> Call:
        return Call(operator, inputs, self.out if out is None else out)

    def number(self, value: Any) -> Tensor:
        """A number of the call as a tensor, where a card has an operand."""
        made = number(value)
        self.numbers.append(made if arrays.in_host_memory(self.out) else made.to(self.out.device))
        return self.numbers[-1]


def number(value: Any) -> Tensor:
    """A number as a tensor of no axes in the host's memory; Python's floats stay as exact as they are."""
    import torch

    dtype = torch.float64 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
    if isinstance(value, complex):
        raise Pass("a complex number")
    return torch.tensor(value, dtype=dtype, device="cpu")


@dataclass(frozen=True)
class Lowering:
    """How calls of an aten name become calls of an operator.

    composite: torch composes the name of other operators, which have the gradients.
    state: gives what asks for whatever else the lowering looks at, such as a switch of torch; calls are remembered
        apart by the answers.
    result: what torch's result is like, where that is cheaper to say than to ask torch's shape function, or where a
        kernel lays it out in another way; None where torch is to be asked. Raises Pass for what torch refuses.
    gradients: by argument, its axes from the slowest to the fastest in memory of torch's gradient, where that is not as
        our backward lays it out.
    factors: arguments that torch's kernel reads while it writes its result; where that shares memory with one of them,
        or has to be resized, ours makes it apart.
    elementwise: an element of the result depends on those at its place alone, so that it may be written over them.
    whole: the function computes each call itself, and gives torch's results; it is not recorded.
    uniform: all elements of the result are one number, so that a tensor that repeats its elements may have them.
    over: the arguments that torch lets ``out=`` be, None for all.
    into: where its `dtype` is not given it computes in that of ``out=``.
    random: it draws numbers of its own: where torch has some, those of a seed must not change, and it is not replaced.
    """

    name: str
    operator: str
    function: Callable[..., Any]
    composite: bool = False
    state: Callable[[], Sequence[Callable[[], Hashable]]] | None = None
    result: Callable[..., Result] | None = None
    gradients: Callable[..., dict[str, tuple[int, ...]]] | None = None
    factors: tuple[str, ...] = ()
    elementwise: bool = False
    whole: bool = False
    uniform: bool = False
    over: tuple[str, ...] | None = None
    into: bool = False
    random: bool = False

    @property
    def aten(self) -> bool:
        """Whether it takes whatever torch takes: its cards stand under torch's own operators, or it is whole."""
        return self.whole or self.operator.startswith("aten.")

    @property
    def parameters(self) -> tuple[str, ...]:
        """The arguments of the torch call that it knows; overloads with others are not its own."""
        names = tuple(inspect.signature(self.function).parameters)[1:]
        plain = ((name, name.removesuffix("_")) for name in names)  # `from_` is torch's `from`, `ord` is itself
        return tuple(word if keyword.iskeyword(word) else name for name, word in plain)


LOWERINGS: dict[str, Lowering] = {}


def lowers(
    *names: str,
    to: str,
    composite: bool = False,
    state: Callable[[], Sequence[Callable[[], Hashable]]] | None = None,
    result: Callable[..., Result] | None = None,
    gradients: Callable[..., dict[str, tuple[int, ...]]] | None = None,
    factors: tuple[str, ...] = (),
    elementwise: bool = False,
    whole: bool = False,
    uniform: bool = False,
    over: tuple[str, ...] | None = None,
    into: bool = False,
    random: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function as the lowering of these names to a flagops operator.

    A name is aten's, for all overloads whose arguments the function knows, or that of one overload, ``"max.dim"``, for
    all that differ from it in where they write alone.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in LOWERINGS:
                raise TypeError(f"aten::{name} has a lowering already")
            LOWERINGS[name] = Lowering(
                name,
                to,
                function,
                composite,
                state,
                result,
                gradients,
                factors,
                elementwise,
                whole,
                uniform,
                over,
                into,
                random,
            )
        return function

    return declare
