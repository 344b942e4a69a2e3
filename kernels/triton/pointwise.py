"""Each element of a result from one of each operand: every card of the family by its lane."""

from collections.abc import Callable
from typing import Any

from flagops import registry
from flagops.arrays import arithmetic
from flagops.operator import Operator
from flagops.registry import kernel

from .. import _lanes
from ._elementwise import elementwise
from ._spelling import spelled, word_of
from ._words import WORDS


def lane_of(name: str, operands: tuple[str, ...]) -> Any:
    """The lane of a card; a word of Triton's own comes before the lane of its name."""
    return word_of(name, operands) if name in WORDS else spelled(_lanes, name)


def _kernel(card: Operator) -> Callable[..., None]:
    """The kernel of a card."""
    flags = [name for name, scalar in card.scalars.items() if scalar.torch == "bool"]
    names = [card.function, *(f"{card.function}_{choice}" for choice in (*flags, "int64"))]
    lanes = {name: lane_of(name, tuple(card.tensors)) for name in names if name in WORDS or hasattr(_lanes, name)}
    takes = [card.positions[name] for name in card.scalars if name not in ("dtype", *flags)]
    chooses = [(card.positions[name], name) for name in flags]
    tensors = [(card.positions[name], tensor.dtypes == ("bool",)) for name, tensor in card.tensors.items()]
    where_dtype = card.positions["dtype"]

    @kernel(deterministic=True, batch_invariant=True)
    def run(*args: Any) -> None:
        acc = arithmetic(args[where_dtype])
        name = "_".join((card.function, *(flag for at, flag in chooses if args[at])))
        name = f"{name}_{acc}" if f"{name}_{acc}" in lanes else name
        kinds = [*("bool" if condition else acc for _, condition in tensors), *(acc for _ in takes)]
        operands = [args[at] for at in (*(at for at, _ in tensors), *takes)]
        elementwise(lanes[name], args[-1], operands, kinds)

    run.__name__, run.__signature__ = card.function, card.signature  # type: ignore[attr-defined]
    return run


EVERY_CARD = True

for _card in registry.cards().values():
    if _card.aten and _card.family == "pointwise":
        globals()[_card.function] = _kernel(_card)
