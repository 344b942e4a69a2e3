"""Torch's operators that move elements, or make those that hang on their place alone."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..destinations import overlaps_itself
from ..lowering import REFUSED, Call, Pass, Result, To, lowers
from ..steps import Steps
from .pointwise import as_empty_like, real

if TYPE_CHECKING:
    from torch import Tensor


def goal(steps: Steps, shape: Sequence[int], dtype: Any, *inputs: Tensor, like: Tensor | None = None) -> Tensor:
    """Where a result is computed: the tensor that the call gives for it if that is free to be written, else a new one.

    inputs: what the result must not be written over. like: on whose device a new one is, else that of the others.
    """
    import torch

    given = next(iter(steps.given), None)
    if given is not None and tuple(given.shape) == tuple(shape) and given.dtype == dtype:
        apart = all(x.untyped_storage()._cdata != given.untyped_storage()._cdata for x in inputs)
        if apart and not overlaps_itself(given):
            return given
    source = given if given is not None else like if like is not None else inputs[0]
    return torch.empty(shape, dtype=dtype, device=source.device)


def copied(steps: Steps, x: Tensor, out: Tensor) -> Tensor:
    """Elements into another tensor, in its dtype; returns that."""
    return steps.run("aten.copy", x.expand(out.shape), real(out.dtype), out=out) if out.numel() else out


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Result:
    """The result of `cat`: row by row, or with the channels last if all of them have theirs there."""
    import torch

    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    parts = _with_elements(tensors)
    if not parts:
        return (0,), None, dtype
    first = parts[0]
    if not first.dim() or not -first.dim() <= dim < first.dim():
        raise Pass(REFUSED)
    dim %= first.dim()
    rest = [x.shape[:dim] + x.shape[dim + 1 :] for x in parts]
    if any(x != rest[0] for x in rest):
        raise Pass(REFUSED)
    shape = (*first.shape[:dim], sum(x.shape[dim] for x in parts), *first.shape[dim + 1 :])
    if not all(map(_last_channels, parts)):
        return shape, None, dtype
    return shape, torch.empty(shape, device="meta", memory_format=torch.channels_last).stride(), dtype


def _with_elements(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that count: torch takes one of shape (0,) beside any other."""
    return [x for x in tensors if tuple(x.shape) != (0,)]


@lowers("cat", to="aten.copy", result=_joined, over=())
def cat(to: To, tensors: Sequence[Tensor], dim: int = 0) -> list[Call]:
    begin, calls = 0, []
    for x in _with_elements(tensors) or tensors[:1]:
        calls.append(to("aten.copy", x, real(to.out.dtype), out=to.out.narrow(dim, begin, x.shape[dim])))
        begin += x.shape[dim]
    return calls


def _last_channels(x: Tensor) -> bool:
    import torch

    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@lowers("flip", to="aten.flip", result=as_empty_like)
def flip(to: To, self: Tensor, dims: Sequence[int]) -> Call:
    rank = self.dim()
    turned = [dim % rank for dim in dims] if rank else []
    if len(set(turned)) != len(turned) or any(not -rank <= dim < rank for dim in dims if rank):
        raise Pass(REFUSED)
    order = [dim for dim in range(rank) if dim not in turned] + turned
    real(self.dtype)
    return to("aten.flip", self.permute(order), len(turned), out=to.out.permute(order))


@lowers("roll", to="aten.copy", whole=True)
def roll(steps: Steps, self: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not shifts or (len(shifts) != len(dims) and (dims or len(shifts) > 1)):
        raise Pass(REFUSED)
    if not dims:
        out = goal(steps, self.shape, self.dtype, self)
        flat = _rolled(steps, self.reshape(-1), shifts[0], 0)
        return copied(steps, flat.view(self.shape), out)
    if not self.numel():
        return self.clone()
    for shift, dim in zip(shifts, dims, strict=True):
        if not -self.dim() <= dim < self.dim():
            raise Pass(REFUSED)
        self = _rolled(steps, self, shift, dim % self.dim())
    return self


def _rolled(steps: Steps, x: Tensor, shift: int, dim: int) -> Tensor:
    import torch

    out, n = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[dim]
    shift = shift % n if n else 0
    copied(steps, x.narrow(dim, 0, n - shift), out.narrow(dim, shift, n - shift))
    copied(steps, x.narrow(dim, n - shift, shift), out.narrow(dim, 0, shift))
    return out


def _triangle(name: str) -> None:
    @lowers(name, to=f"aten.{name}")
    def triangle(to: To, self: Tensor, diagonal: int = 0) -> Call:
        if self.dim() < 2:
            raise Pass(REFUSED)
        real(self.dtype)
        return to(f"aten.{name}", self, diagonal)


for _name in ("tril", "triu"):
    _triangle(_name)


def _ends(steps: Steps, dtype: Any, *numbers: Any) -> list[Tensor]:
    """Numbers as tensors of one dtype: whole for integers."""
    values = [x.item() if hasattr(x, "item") else x for x in numbers]
    if any(isinstance(x, complex) for x in values):
        raise Pass("a complex number")
    kind = float if dtype.is_floating_point else int
    return [steps.number(kind(x)) for x in values]


def _line(steps: Steps, count: int, warns: bool = False) -> Tensor:
    """Where so many numbers go: a destination of as many elements keeps its shape."""
    import torch

    given = steps.given[0]
    assert given is not None
    if given.numel() != count:
        if given.numel() and warns:
            warnings.warn(
                f"The number of elements in the out tensor of shape {list(given.shape)} is {given.numel()} which does "
                f"not match the computed number of elements {count}. Note that this may occur as a result of rounding "
                f"error. The out tensor will be resized to a tensor of shape ({count},).",
                stacklevel=2,
            )
        given.resize_(count)
    return given if given.is_contiguous() else torch.empty_like(given, memory_format=torch.contiguous_format)


@lowers("arange.start_out", to="aten.arange", whole=True)
def arange(steps: Steps, start: Any, end: Any, step: Any = 1) -> Tensor:
    import torch

    dtype = steps.given[0].dtype  # type: ignore[union-attr]
    if not all(map(math.isfinite, (start, end, step))):
        raise Pass(REFUSED)
    if dtype == torch.int64:  # which torch counts in, others in float64
        start, end, step = map(int, (start, end, step))
    whole = all(isinstance(x, int) for x in (start, end, step))
    if step == 0 or (end - start) * step < 0:
        raise Pass(REFUSED)
    count = -((start - end) // step) if whole else math.ceil((float(end) - float(start)) / float(step))
    ends, computed, out = _ends(steps, dtype, start, step), real(dtype), _line(steps, count, warns=True)
    steps.run("aten.arange", *ends, count, computed, out=out.view(-1))
    return out


@lowers("linspace.out", to="aten.linspace", whole=True)
def linspace(call: Steps, start: Any, end: Any, steps: int) -> Tensor:
    import torch

    (given,) = call.given
    assert given is not None
    if steps < 0:
        raise Pass(REFUSED)
    if not given.is_floating_point() and given.device.type == "cpu":
        raise Pass("integers, which torch cuts from steps of its own")
    out = _line(call, steps)
    places = out if out.is_floating_point() else torch.empty(out.shape, dtype=torch.float64, device=out.device)
    ends = _ends(call, places.dtype, *(x if out.is_floating_point() else int(x) for x in (start, end)))
    call.run("aten.linspace", *ends, steps, real(places.dtype), out=places.view(-1))
    return out if places is out else copied(call, places, out)


@lowers("eye.m_out", "eye.out", to="aten.copy", whole=True)
def eye(steps: Steps, n: int, m: int | None = None) -> Tensor:
    m = n if m is None else m
    if n < 0 or m < 0:
        raise Pass(REFUSED)
    (out,) = steps.given
    assert out is not None
    real(out.dtype)
    out.resize_(n, m)
    copied(steps, steps.number(0), out)
    copied(steps, steps.number(1), out.diagonal())
    return out
