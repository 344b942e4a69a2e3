"""The memory of a call's arguments: whether it is there, and whether results may be written where they are asked for.

What every call asks is written out for its signature (`ready`); who answers no is looked at closer, for the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from flagops import arrays
from flagops.calls import generated, surroundings
from flagops.calls.replay import Path

if TYPE_CHECKING:
    from flagops.operator import Operator

_data_ptr = methodcaller("data_ptr")

Span = tuple[int, int, int]
"""The position of an argument, and the bytes that it touches, from and to, relative to its first element."""

Need = tuple[Path, int, int]
"""A tensor, the bytes of its elements, and how many of them a call needs from its first element on."""

Extent = tuple[Path, int, int]
"""A tensor, and the bytes it touches, from and to, relative to its first element."""


def ready(
    memory: Sequence[Need],
    apart: Sequence[tuple[Extent, Extent, bool]] = (),
    written: Sequence[Path] = (),
    zeros: bool = True,
) -> Callable[[Sequence[Any]], bool]:
    """What says quickly whether the values of a call are as a kernel needs them; False is for a closer look.

    They have memory, as `without_memory` would say; the pairs `apart` share none, unless they begin at one place and
    may; and what is `written` is no inference tensor.

    zeros: whether zero tensors may be among them, which torch's dispatcher resolves: a view of one has an address.
    """
    names: dict[str, Any] = {}
    addresses: dict[Path, str] = {}
    lines = ["def ready(held):", " try:"]

    def number(value: int) -> str:
        names[f"n{len(names)}"] = value
        return f"n{len(names) - 1}"

    def found(path: Path) -> str:
        return "held" + "".join(f"[{i}]" for i in path)

    def place(path: Path) -> str:
        if path not in addresses:
            addresses[path] = f"a{len(addresses)}"
            lines.append(f"  {addresses[path]} = {found(path)}.data_ptr()")
        return addresses[path]

    for path, size, end in memory:
        lines += [f"  x = {found(path)}", "  storage = x.untyped_storage()"]
        short = f"storage.nbytes() < x.storage_offset() * {number(size)} + {number(end)}"
        address = "storage.data_ptr()" if zeros else place(path)
        lines.append(f"  if {short} or not {address}: return False")
    lines += [f"  if {found(path)}.is_inference(): return False" for path in written]
    for (one, low, high), (two, first, last), may in apart:
        p, q = place(one), place(two)
        meet = f"{q} + {number(first)} < {p} + {number(high)} and {p} + {number(low)} < {q} + {number(last)}"
        lines.append(f"  if {meet}{f' and {p} != {q}' * may}: return False")
    lines += ["  return True", " except (RuntimeError, NotImplementedError):", "  return False"]
    return generated.function("\n".join(lines), "memory", names)


def ready_for(
    operator: Operator, args: Sequence[Any], spans: Sequence[Span], out_spans: Sequence[Span]
) -> Callable[[Sequence[Any]], bool]:
    """Whether a call may run without a closer look; NumPy's arrays with an out always get one."""
    if out_spans and not arrays.is_torch(args[spans[0][0]]):
        return lambda args: False
    last = len(args) - 1
    paths: list[Path] = [(last, i) for i in range(len(out_spans))] if operator.several else [(last,)]
    inputs: list[Extent] = [((p,), low, high) for p, low, high in spans]
    outs = [(path, low, high) for path, (_, low, high) in zip(paths, out_spans, strict=False)]
    given = [*(args[p] for p, *_ in spans), *(operator.each(args[-1]) if outs else ())]
    memory = [
        (path, x.element_size(), high)
        for x, (path, _, high) in zip(given, (*inputs, *outs), strict=True)
        if high and surroundings.allocated(x)
    ]
    apart = [(out, x, x[0] == (same,)) for out, (same, *_) in zip(outs, out_spans, strict=True) for x in inputs if x[2]]
    apart += [(one, two, False) for one, two in itertools.combinations(outs, 2) if two[2]]
    apart = [(one, two, may) for one, two, may in apart if one[2]]
    return ready(memory, apart, [path for path, *_ in outs])


def spans(operator: Operator, args: Sequence[Any]) -> tuple[Span, ...]:
    return tuple((p, *arrays.span(args[p])) for p in operator.tensor_positions if args[p] is not None)


def out_spans(operator: Operator, args: Sequence[Any]) -> tuple[Span, ...]:
    """For each result the position of the input it may be, -1 if none, and the bytes it spans."""

    def steps(x: Any) -> Any:
        return x.stride() if arrays.is_torch(x) else x.strides

    spans = []
    for out, same in zip(operator.each(args[-1]), operator.aliases, strict=True):
        like = (
            same >= 0 and args[same] is not None and args[same].shape == out.shape and steps(args[same]) == steps(out)
        )
        spans.append((same if like else -1, *arrays.span(out)))
    return tuple(spans)


def refuse_out(operator: Operator, args: Sequence[Any]) -> None:
    """What torch refuses of ``out=`` too: a gradient that would be lost, and memory that is an input's.

    For calls that go through torch; a plan knows all this of its signature.
    """
    refuse_recorded(operator, args, surroundings.recording())
    tensors = [*(args[p] for p in operator.tensor_positions if args[p] is not None), *operator.each(args[-1])]
    if surroundings.forward_level() and any(surroundings.tangent(x) is not None for x in tensors):
        raise ValueError(f"{operator.name}: out= cannot be used where a tensor has a tangent; drop out=")
    for out in operator.each(args[-1]):
        if surroundings.unwritable(out) not in (None, surroundings.ELSEWHERE):
            raise ValueError(f"{operator.name}: out is {surroundings.unwritable(out)}")
    if not any(surroundings.is_wrapper(x) or surroundings.without_memory(x) for x in tensors):
        refuse_overlap(True, operator, args, spans(operator, args), out_spans(operator, args))


def refuse_traced_overlap(operator: Operator, args: Sequence[Any]) -> None:
    """`refuse_overlap` while a graph is made: of tensors without memory their storages say what they share."""
    for out, same in zip(operator.each(args[-1]), operator.aliases, strict=True):
        for position in operator.tensor_positions:
            x = args[position]
            if x is None or (position == same and x is out):
                continue
            if x.untyped_storage()._cdata == out.untyped_storage()._cdata:
                (low, high), (first, last) = arrays.span(out), arrays.span(x)
                start, there = out.storage_offset() * out.element_size(), x.storage_offset() * x.element_size()
                if meet((there + first, there + last), (start + low, start + high)):
                    raise ValueError(f"{operator.name}: out shares memory with {operator.parameters[position]}")


def refuse_without_memory(operator: Operator, argument: str, x: Any) -> None:
    """Raises ValueError for a tensor without memory, where no plan has looked."""
    reason = surroundings.without_memory(x)
    if reason:
        raise ValueError(f"{operator.name}: {argument} is {reason}")


def refuse_recorded(operator: Operator, args: Sequence[Any], grad: bool | None) -> None:
    """``out=`` has no history: neither may it get one, nor lose the one it has."""
    if args[-1] is None or not grad:
        return
    if any(getattr(args[p], "requires_grad", False) for p in operator.tensor_positions):
        raise ValueError(f"{operator.name}: out= cannot be used where a gradient is recorded; drop out= or use no_grad")
    if any(getattr(out, "requires_grad", False) for out in operator.each(args[-1])):
        raise ValueError(f"{operator.name}: out requires a gradient, which writing to it would lose; use no_grad")


def refuse_overlap(
    on_torch: bool, operator: Operator, args: Sequence[Any], spans: Sequence[Span], out_spans: Sequence[Span]
) -> None:
    """Results may share no memory with an input, but for the very tensor that the card lets them take the place of."""
    address = _data_ptr if on_torch else arrays.address
    taken: list[tuple[int, int]] = []
    for out, (same, low, high) in zip(operator.each(args[-1]), out_spans, strict=True):
        origin = address(out)
        own = origin + low, origin + high
        for position, first, last in spans:
            there = address(args[position])
            if meet((there + first, there + last), own) and not (position == same and there == origin):
                raise ValueError(f"{operator.name}: out shares memory with {operator.parameters[position]}")
        if any(meet(own, other) for other in taken):
            raise ValueError(f"{operator.name}: results share memory with each other")
        taken.append(own)


def meet(one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Whether two extents share a byte. One without bytes meets none, wherever it lies: NumPy puts a reversed array
    without elements beyond its memory, amid somebody else's."""
    return max(one[0], two[0]) < min(one[1], two[1])
