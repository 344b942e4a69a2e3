"""Torch's operators that move elements, or make those that hang on their place alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..lowering import REFUSED, Call, Pass, To, lowers
from ..recipes import overlaps_itself
from ..steps import Steps
from .pointwise import real

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


@lowers("cat", to="aten.copy", whole=True)
def cat(steps: Steps, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    parts = [x for x in tensors if tuple(x.shape) != (0,)]  # which torch takes beside any shape
    if not parts:
        return goal(steps, (0,), dtype, *tensors)
    first = parts[0]
    if not first.dim() or not -first.dim() <= dim < first.dim():
        raise Pass(REFUSED)
    dim %= first.dim()
    rest = [x.shape[:dim] + x.shape[dim + 1 :] for x in parts]
    if any(x != rest[0] or part.device != first.device for x, part in zip(rest, parts, strict=True)):
        raise Pass(REFUSED)
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    out = goal(steps, shape, dtype, *tensors)
    if not any(out is x for x in steps.given) and all(_last_channels(x) for x in parts):
        out = torch.empty(shape, dtype=dtype, device=first.device, memory_format=torch.channels_last)
    begin = 0
    for x in parts:
        copied(steps, x, out.narrow(dim, begin, x.shape[dim]))
        begin += x.shape[dim]
    return out


def _last_channels(x: Tensor) -> bool:
    import torch

    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@lowers("flip", to="aten.flip")
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
    if not dims and len(shifts) == 1:
        out = goal(steps, self.shape, self.dtype, self)
        flat = _rolled(steps, self.reshape(-1), shifts[0], 0)
        return copied(steps, flat.view(self.shape), out)
    if len(shifts) != len(dims):
        raise Pass(REFUSED)
    for shift, dim in zip(shifts, dims, strict=True):
        if not -self.dim() <= dim < self.dim():
            raise Pass(REFUSED)
        self = _rolled(steps, self, shift, dim % self.dim())
    return self if dims else self.clone()


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


@lowers("arange.start_out", to="aten.arange", whole=True)
def arange(steps: Steps, start: Any, end: Any, step: Any = 1) -> Tensor:
    dtype = steps.given[0].dtype  # type: ignore[union-attr]
    whole = all(isinstance(x, int) for x in (start, end, step))
    if step == 0 or (end - start) * step < 0 or not all(map(math.isfinite, (start, end, step))):
        raise Pass(REFUSED)
    count = -((start - end) // step) if whole else math.ceil((float(end) - float(start)) / float(step))
    out = goal(steps, (count,), dtype)
    return steps.run("aten.arange", *_ends(steps, dtype, start, step), count, real(dtype), out=out)


@lowers("linspace.out", to="aten.linspace", whole=True)
def linspace(call: Steps, start: Any, end: Any, steps: int) -> Tensor:
    dtype = call.given[0].dtype  # type: ignore[union-attr]
    if steps < 0 or not dtype.is_floating_point:
        raise Pass("integers, which torch cuts from steps of its own" if steps >= 0 else REFUSED)
    out = goal(call, (steps,), dtype)
    return call.run("aten.linspace", *_ends(call, dtype, start, end), steps, real(dtype), out=out)


@lowers("eye.m_out", "eye.out", to="aten.copy", whole=True)
def eye(steps: Steps, n: int, m: int | None = None) -> Tensor:
    m = n if m is None else m
    if n < 0 or m < 0:
        raise Pass(REFUSED)
    out = goal(steps, (n, m), steps.given[0].dtype)  # type: ignore[union-attr]
    copied(steps, steps.number(0), out)
    copied(steps, steps.number(1), out.diagonal())
    return out
