"""Torch's operators that order elements, choose among them, count them or look for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..destinations import resized
from ..lowering import REFUSED, Pass, lowers
from ..steps import Steps
from ._views import axis_of, last, size_of
from .indexing import places_of
from .movement import copied, goal
from .pointwise import real

if TYPE_CHECKING:
    from torch import Tensor

_MANY = 64  # values from which on they are searched in order


def _chosen(steps: Steps, operator: str, x: Tensor, dim: int, *scalars: Any, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices along an axis of which so many are chosen."""
    import torch

    real(x.dtype)
    dim, shape = axis_of(dim, x.dim()), list(x.shape)
    if shape:
        shape[dim] = count
    values = torch.empty_like(x) if shape == list(x.shape) else x.new_empty(shape)
    indices = torch.empty_like(values, dtype=torch.int64)
    steps.run(operator, last(x, dim), *scalars, out=(last(values, dim), last(indices, dim)))
    return values, indices


@lowers("sort", to="aten.sort", whole=True)
def sort(
    steps: Steps, self: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[Tensor, Tensor]:
    return _chosen(steps, "aten.sort", self, dim, descending, count=size_of(self, dim))


@lowers("topk", to="aten.topk", whole=True)
def topk(
    steps: Steps, self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    if not 0 <= k <= size_of(self, dim):
        raise RuntimeError("selected index k out of range")
    if not k and not self.dim():
        raise Pass("no element of a number")
    return _chosen(steps, "aten.topk", self, dim, k, largest, count=k)


@lowers("kthvalue", to="aten.topk", whole=True, over=())
def kthvalue(steps: Steps, self: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if not 1 <= k <= size_of(self, dim):
        raise RuntimeError("kthvalue(): selected number k out of range for dimension")
    dim = axis_of(dim, self.dim())
    found = _chosen(steps, "aten.topk", self, dim, k, False, count=k)
    values, indices = (x if not self.dim() else x.narrow(dim, k - 1, 1) for x in found)
    if not keepdim and self.dim():
        for out, made in zip(steps.given, (values, indices), strict=False):
            if out is not None and out.shape != made.squeeze(dim).shape:  # torch keeps the axis until the end
                resized(out, made)
                out.squeeze_(dim)
        values, indices = values.squeeze(dim), indices.squeeze(dim)
    return values.contiguous(), indices.contiguous()


def _brought(steps: Steps, x: Any, dtype: Any, like: Tensor) -> Tensor:
    """A tensor or a number in a dtype."""
    import torch

    x = x if isinstance(x, torch.Tensor) else steps.number(x)
    if x.dtype == dtype and x.device == like.device:
        return x
    return copied(steps, x, torch.empty(x.shape, dtype=dtype, device=like.device))


def _sought(
    steps: Steps, boundaries: Tensor, x: Any, out_int32: bool, right: bool, side: str | None, sorter: Tensor | None
) -> Tensor:
    import torch

    if side not in (None, "left", "right") or (side == "left" and right):
        raise Pass(REFUSED)
    dtype = torch.result_type(boundaries, x)
    real(dtype)
    x, boundaries = (_brought(steps, given, dtype, boundaries) for given in (x, boundaries))
    if boundaries.dim() != 1 and boundaries.shape[:-1] != x.shape[:-1]:
        raise Pass(REFUSED)
    if sorter is not None:
        boundaries = boundaries.gather(-1, sorter)
    rows = x.reshape(-1) if boundaries.dim() == 1 else x
    places = torch.empty(rows.shape, dtype=torch.int64, device=x.device)
    steps.run("aten.searchsorted", boundaries, rows, right or side == "right", out=places)
    places = places.view(x.shape)
    return _brought(steps, places, torch.int32 if out_int32 else torch.int64, x)


@lowers("searchsorted", to="aten.searchsorted", whole=True)
def searchsorted(
    steps: Steps,
    sorted_sequence: Tensor,
    self: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    return _sought(steps, sorted_sequence, self, out_int32, right, side, sorter)


@lowers("bucketize", to="aten.searchsorted", whole=True)
def bucketize(steps: Steps, self: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    if boundaries.dim() != 1:
        raise Pass(REFUSED)
    return _sought(steps, boundaries, self, out_int32, right, None, None)


def _isin(steps: Steps, elements: Any, values: Any, invert: bool) -> Tensor:
    """Many whole numbers are put in order first."""
    import torch

    like = elements if isinstance(elements, torch.Tensor) else values
    dtype = torch.result_type(elements, values)
    dtype = torch.uint8 if dtype == torch.bool else dtype
    real(dtype)
    x = _brought(steps, elements, dtype, like)
    values = _brought(steps, values, dtype, like).reshape(-1)
    out = torch.empty(x.shape, dtype=torch.bool, device=like.device)
    if values.numel() <= _MANY or dtype.is_floating_point:  # a search among NaN would go astray
        return steps.run("aten.isin", x, values, invert, out=out)
    ordered = values.sort().values
    places = torch.empty(x.numel(), dtype=torch.int64, device=like.device)
    steps.run("aten.searchsorted", ordered, x.reshape(-1), False, out=places)
    steps.run("aten.minimum", places, steps.number(values.numel() - 1), "int64", out=places)
    nearest = steps.run("aten.gather", ordered, places, False, out=x.new_empty(x.numel())).view(x.shape)
    return steps.run("aten.ne" if invert else "aten.eq", x, nearest, real(dtype), out=out)


@lowers("isin.Tensor_Tensor", to="aten.isin", whole=True)
def isin(
    steps: Steps, elements: Tensor, test_elements: Tensor, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    return _isin(steps, elements, test_elements, invert)


@lowers("isin.Tensor_Scalar", to="aten.isin", whole=True)
def isin_number(
    steps: Steps, elements: Tensor, test_element: Any, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    return _isin(steps, elements, test_element, invert)


@lowers("isin.Scalar_Tensor", to="aten.isin", whole=True)
def number_isin(
    steps: Steps, element: Any, test_elements: Tensor, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    return _isin(steps, element, test_elements, invert)


def _extreme(steps: Steps, x: Tensor, largest: bool) -> Any:
    """The greatest or the least element, as a number."""
    values, _ = _chosen(steps, "aten.topk", x.reshape(-1), 0, 1, largest, count=1)
    return values.item()


@lowers("histc", to="aten.histc", whole=True)
def histc(steps: Steps, self: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Tensor:
    import torch

    real(self.dtype)
    if bins < 1:
        raise RuntimeError("bins must be > 0")
    least, most = float(min), float(max)
    if least == most and self.numel():
        least, most = float(_extreme(steps, self, False)), float(_extreme(steps, self, True))
    if not (math.isfinite(least) and math.isfinite(most)):
        raise RuntimeError(f"range of [{least}, {most}] is not finite")
    if least == most:
        least, most = least - 1, most + 1
    if least > most:
        raise RuntimeError("max must be larger than min")
    if not 0 < bins / (most - least) < math.inf:
        raise Pass("parts of a range whose width float64 does not hold")
    if self.dtype == torch.bool:
        raise Pass("dtype bool")
    if self.dtype.itemsize == 2 and self.is_floating_point() and self.device.type == "cpu":
        raise Pass("parts of a range of halves, which torch rounds at every step")
    out = goal(steps, (bins,), self.dtype, self)
    return steps.run("aten.histc", self.reshape(-1), bins, least, most, out=out)


@lowers("bincount", to="aten.scatter", whole=True)
def bincount(steps: Steps, self: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    import torch

    if self.dim() != 1 or self.dtype == torch.bool or self.is_floating_point() or minlength < 0:
        raise Pass(REFUSED)
    if weights is not None and weights.shape != self.shape:
        raise Pass(REFUSED)
    if self.numel() and _extreme(steps, self, False) < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    count = max(minlength, _extreme(steps, self, True) + 1 if self.numel() else 0)
    dtype = torch.int64
    if weights is not None and self.numel():
        dtype = weights.dtype if weights.dtype == torch.float32 else torch.float64
    total = torch.zeros(count, dtype=dtype, device=self.device)
    given = steps.number(1) if weights is None else weights
    source = _brought(steps, given, dtype, self).expand(self.shape)
    where = _brought(steps, self, torch.int64, self)
    return steps.run("aten.scatter", total, where, source, "sum", True, False, out=total) if count else total


@lowers("repeat_interleave.Tensor", to="aten.searchsorted", whole=True)
def repeat_interleave(steps: Steps, repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    """Which repeated element each place of the result has: the first whose end lies behind it."""
    import torch

    if repeats.dim() != 1 or repeats.dtype not in (torch.int32, torch.int64):
        raise Pass(REFUSED)
    if repeats.numel() and _extreme(steps, repeats, False) < 0:
        raise RuntimeError("repeats can not be negative")
    ends = repeats.cumsum(0)
    count = int(ends[-1].item()) if repeats.numel() else 0
    if output_size not in (None, count):
        raise RuntimeError("allocated size does not match required size")
    places = torch.arange(count, dtype=torch.int64, device=repeats.device)
    found = steps.run("aten.searchsorted", ends, places, True, out=torch.empty_like(places))
    return _brought(steps, found, repeats.dtype, repeats)


@lowers("equal", to="aten.ne", whole=True)
def equal(steps: Steps, self: Tensor, other: Tensor) -> bool:
    import torch

    if self.dtype != other.dtype or self.device != other.device:
        raise Pass(REFUSED)
    if self.shape != other.shape:
        return False
    differs = torch.empty(self.shape, dtype=torch.bool, device=self.device)
    steps.run("aten.ne", self, other, real(self.dtype), out=differs)
    return places_of(steps, differs)[1] == 0
