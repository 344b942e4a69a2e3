"""What follows from an overload's schema: its arguments, where its result goes, and the forms that one name has."""

from __future__ import annotations

import functools
import itertools
import keyword
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flagops.calls import generated, surroundings

from .interpose import COMPOSITE
from .lowering import LOWERINGS

if TYPE_CHECKING:
    import torch


DEVICES = ("CPU", "CUDA", "PrivateUse1")
OWN = "_OwnBackward"
"""The gradient of a composite that a kernel of ours computed: autograd calls it, the dispatcher does not."""

View = Callable[["torch.Tensor"], "torch.Tensor"]


class Part(NamedTuple):
    """A kernel's argument: which value of the call it is, the view of it, if it is not the value itself, and for a
    tensor how many bytes behind that one's first element it begins."""

    source: int
    view: View | None
    behind: int | None


class Form:
    """One overload of an aten name, such as ``"mm.out"``.

    base: the name of its lowering, and of its calls in reports.
    arguments: the schema's, by position.
    outs, given: the positions of the arguments that results are written to, and the first.
    tensors: the positions of tensors; lists of them are not among these, but see `Spread`.
    lists: the positions of lists of tensors.
    keywords: the names of the arguments behind the `positional` ones.
    """

    def __init__(self, overload: str, base: str = "") -> None:
        self.name, self.schema = overload, schema_of(overload)
        self.arguments: Sequence[torch.Argument] = self.schema.arguments
        arguments = self.arguments
        self.positional = sum(not argument.kwarg_only for argument in arguments)
        self.keywords = [argument.name for argument in arguments[self.positional :]]
        self.outs = _written(self.schema)
        self.given = self.outs[0] if self.outs else None
        self.tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.lists = [i for i, a in enumerate(arguments) if str(a.type) == "List[Tensor]"]
        self.base = base or self.schema.name[6:].removesuffix("_")

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """The arguments by name, but for those that are nothing but a destination; Python's own words have a ``_``."""
        pairs = zip(self.schema.arguments, args, strict=True)
        return {a.name + "_" * keyword.iskeyword(a.name): x for a, x in pairs if not a.is_out}

    def with_default(self, args: tuple[Any, ...], name: str, value: Any) -> tuple[Any, ...]:
        """The arguments with a value for one that the call leaves out; as they are where the overload has none."""
        return tuple(
            value if a.name == name and x is None else x for a, x in zip(self.schema.arguments, args, strict=True)
        )

    def present(self, args: Sequence[Any]) -> list[int]:
        """The positions of the tensors of a call. Torch hands on a number of Python's as that, not as the tensor that
        the schema says."""
        import torch

        return [i for i in self.tensors if isinstance(args[i], torch.Tensor)]

    def places(self, names: Sequence[str]) -> list[int]:
        """The positions of arguments."""
        return [i for i, argument in enumerate(self.arguments) if argument.name in names]

    def with_tensors(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments with tensors for numbers, where torch's own kernels ask for them, such that types are promoted
        alike: beside tensors with axes one without any counts as little as a number does."""
        import torch

        numbers = [i for i in self.tensors if isinstance(args[i], (int, float, complex))]
        if not numbers:
            return args
        made, others = list(args), [args[i] for i in self.present(args)]
        for i in numbers:
            value = torch.tensor(args[i], dtype=torch.float64) if isinstance(args[i], float) else torch.tensor(args[i])
            dtype = torch.result_type(others[0], args[i])
            exact = value.dtype.is_floating_point == others[0].dtype.is_floating_point
            made[i] = value if exact and any(x.dim() for x in others) else value.to(dtype)
        return made

    def inputs(self, args: Sequence[Any]) -> list[Any]:
        """The tensors of a call that it reads, None for those that it has not."""
        return [args[i] for i in self.tensors if not self.arguments[i].is_out]

    def without_memory(self, args: Sequence[Any]) -> str | None:
        """Why a tensor of a call has no elements, or None."""
        reasons = (surroundings.without_memory(args[i]) for i in self.present(args))
        return next(filter(None, reasons), None)

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments as torch takes them: by position, then by name."""
        return args[: self.positional], dict(zip(self.keywords, args[self.positional :], strict=True))

    def functional(self) -> Any:
        """Torch's overload that makes its result: ``mm.default`` for ``mm.out``, ``add.Tensor`` for ``add_.Tensor``."""
        name, takes = self.schema.name[6:].removesuffix("_"), _taken(self.schema)
        alike = (s for s in _schemas()[name] if not _written(s) and _taken(s) == takes)
        return _overload(next(alike))

    def overload(self) -> Any:
        """Torch's own overload, ``torch.ops.aten.mm.out``."""
        return _overload(self.schema)


class Spread(Form):
    """A form whose lists of tensors stand one by one among its arguments, for calls with as many in each as one has."""

    def __init__(self, form: Form, args: Sequence[Any]) -> None:
        super().__init__(form.name, form.base)
        self._lengths = [len(x) if i in form.lists else None for i, x in enumerate(args)]
        widths = [1 if length is None else length for length in self._lengths]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        self.outs = tuple(starts[i] for i in form.outs)
        self.given = self.outs[0] if self.outs else None
        self.tensors = [
            start + j
            for i, (start, width) in enumerate(zip(starts, widths, strict=True))
            for j in range(width)
            if i in form.tensors or i in form.lists
        ]
        self.arguments = [a for a, width in zip(form.arguments, widths, strict=True) for _ in range(width)]
        parts = (f"*a[{i}]" if length is not None else f"a[{i}]" for i, length in enumerate(self._lengths))
        self.spread: Callable[[Sequence[Any]], tuple[Any, ...]] = generated.function(
            f"def spread(a): return ({', '.join(parts)},)", "spread", {}
        )

    def packed(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments as the schema has them."""
        rest = iter(args)
        return tuple(next(rest) if length is None else list(itertools.islice(rest, length)) for length in self._lengths)

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        return super().named(self.packed(args))

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return super().split(self.packed(args))


def _overload(schema: torch.FunctionSchema) -> Any:
    import torch

    return getattr(getattr(torch.ops.aten, schema.name[6:]), schema.overload_name or "default")


def _written(schema: torch.FunctionSchema) -> tuple[int, ...]:
    """The positions of the arguments that an overload writes to."""
    return tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


def _taken(schema: torch.FunctionSchema) -> list[tuple[str, str]]:
    """Names and types of the arguments that are no mere destination."""
    return [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]


@functools.cache
def _schemas() -> dict[str, list[torch.FunctionSchema]]:
    import torch

    found: dict[str, list[torch.FunctionSchema]] = {}
    dispatched = set(torch._C._dispatch_get_all_op_names())  # the others are TorchScript's own
    for schema in torch._C._jit_get_all_schemas():
        overload = f".{schema.overload_name}" if schema.overload_name else ""
        if schema.name.startswith("aten::") and schema.name + overload in dispatched:
            found.setdefault(schema.name[6:], []).append(schema)
    return found


@functools.cache
def forms(name: str) -> dict[str, torch.FunctionSchema]:
    """The overloads that the lowering of a name serves: functional, ``.out`` and in place."""
    base, _, overload = name.partition(".")
    known = set(LOWERINGS[name].parameters)
    takes = _taken(schema_of(name)) if overload else None
    found = {}
    for schema in (*_schemas()[base], *_schemas().get(f"{base}_", ())):
        given = _taken(schema)
        if "name" in schema.overload_name.lower():
            continue
        if given == takes if takes is not None else {argument for argument, _ in given} <= known:
            found[schema.name[6:] + (f".{schema.overload_name}" if schema.overload_name else "")] = schema
    return found


@functools.cache
def schema_of(overload: str) -> torch.FunctionSchema:
    """The schema of ``"mm.out"``."""
    name, _, overload_name = overload.partition(".")
    return next(schema for schema in _schemas()[name] if schema.overload_name == overload_name)


@functools.cache
def form_of(overload: Any, base: str) -> Form:
    """The form of one of torch's overloads, such as ``torch.ops.aten.add.Tensor``."""
    return Form(str(overload).removeprefix("aten.").removesuffix(".default"), base)


@functools.cache
def kind(overload: str) -> str:
    """What calls of an overload are, by its schema: ``"computing"``, ``"view"``, ``"allocation"``, ``"read"`` of a
    number or a property, or the dispatch key of compositions. Empty for what is no overload of aten."""
    import torch

    if overload == OWN or overload.startswith("flagops::"):
        return "computing"
    try:
        schema = schema_of(overload)
    except (KeyError, StopIteration):
        return ""
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"aten::{overload}")
    if has(COMPOSITE) and not any(map(has, DEVICES)):
        return COMPOSITE
    name = schema.name[6:]
    if name.removeprefix("new_").startswith(("empty", "_empty")) or name in ("resize_", "resize_as_", "set_"):
        return "allocation"
    if torch.Tag.inplace_view in _overload(schema).tags:
        return "view"
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return "computing"
    aliases = any(r.alias_info is not None for r in schema.returns)
    if aliases or name in ("_unsafe_view", "_reshape_alias", "lift"):
        return "view"
    computes = any("Tensor" in str(r.type) for r in schema.returns) or name == "equal"
    return "computing" if computes else "read"
