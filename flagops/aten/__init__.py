"""Torch's own operators by their cards: ``flagops.aten.add(x, y, "float32", out=..., backend=...)``.

torch tensors or NumPy arrays, on whichever backend has a kernel. They compute values alone: a call that autograd would
record, or that a transform or a mode watches, raises Unsupported (there, call torch's own operator under
`flagops.enable`), and a graph of `torch.compile` ends before one.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'flagops.aten' has no attribute {name!r}")
    from flagops import registry
    from flagops.call import of
    from flagops.errors import suggestion

    card = registry.cards().get(f"aten.{name}")
    if card is None:
        raise AttributeError(f"module 'flagops.aten' has no attribute {name!r}{suggestion(name, __dir__())}")
    globals()[name] = of(card)
    return globals()[name]


def __dir__() -> list[str]:
    from flagops import registry

    return [name.removeprefix("aten.") for name, card in registry.cards().items() if card.aten]
