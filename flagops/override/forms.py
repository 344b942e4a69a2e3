"""What follows from an overload's schema: its arguments, where its result goes, and the forms that one name has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flagops import surroundings

from .lowering import LOWERINGS

if TYPE_CHECKING:
    import torch


View = Callable[["torch.Tensor"], "torch.Tensor"]


class Part(NamedTuple):
    """A kernel's argument: which value of the call it is, the view of it, if it is not the value itself, and for a
    tensor how many bytes behind that one's first element it begins."""

    source: int
    view: View | None
    behind: int | None


class Form:
    """One overload of an aten name, such as ``"mm.out"``.

    given: the position of the argument that the result is written to, if there is one.
    tensors: the positions of tensors.
    keywords: the names of the arguments behind the `positional` ones.
    """

    def __init__(self, overload: str) -> None:
        self.name, self.schema = overload, schema_of(overload)
        arguments = self.schema.arguments
        self.positional = sum(not argument.kwarg_only for argument in arguments)
        self.keywords = [argument.name for argument in arguments[self.positional :]]
        written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.given = written[0] if written else None
        self.tensors = [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        base = self.schema.name[6:]
        self.base = base if base in LOWERINGS else base.removesuffix("_")

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """The arguments by name, but for those that are nothing but a destination."""
        pairs = zip(self.schema.arguments, args, strict=True)
        return {argument.name: x for argument, x in pairs if not argument.is_out}

    def inputs(self, args: Sequence[Any]) -> list[Any]:
        """The tensors of a call that it reads, None for those that it has not."""
        return [args[i] for i in self.tensors if not self.schema.arguments[i].is_out]

    def without_memory(self, args: Sequence[Any]) -> str | None:
        """Why a tensor of a call has no elements, or None."""
        reasons = (surroundings.without_memory(args[i]) for i in self.tensors if args[i] is not None)
        return next(filter(None, reasons), None)

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments as torch takes them: by position, then by name."""
        return args[: self.positional], dict(zip(self.keywords, args[self.positional :], strict=True))

    def functional(self) -> Any:
        """Torch's overload that makes its result: ``mm.default`` for ``mm.out``, ``add.Tensor`` for ``add_.Tensor``."""
        import torch

        overload = self.schema.overload_name.removesuffix("out").removesuffix("_")
        return getattr(getattr(torch.ops.aten, self.base), overload or "default")


@functools.cache
def _schemas() -> dict[str, list[torch.FunctionSchema]]:
    import torch

    found: dict[str, list[torch.FunctionSchema]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            found.setdefault(schema.name[6:], []).append(schema)
    return found


@functools.cache
def forms(name: str) -> dict[str, torch.FunctionSchema]:
    """The overloads of an aten name that its lowering knows: functional, ``.out`` and in place."""
    known = set(LOWERINGS[name].parameters)
    found = {}
    for schema in (*_schemas()[name], *_schemas().get(f"{name}_", ())):
        if {argument.name for argument in schema.arguments if not argument.is_out} <= known:
            overload = f".{schema.overload_name}" if schema.overload_name else ""
            found[schema.name[6:] + overload] = schema
    return found


def schema_of(overload: str) -> torch.FunctionSchema:
    """The schema of ``"mm.out"``."""
    name, _, overload_name = overload.partition(".")
    return next(schema for schema in _schemas()[name] if schema.overload_name == overload_name)
