"""Torch's reductions by cards that reduce the last axis: kept axes first, reduced ones merged to one behind them.

Axes that are no view as one are copied, and such a call is lowered again each time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flagops.arrays import parse_dtype

from ..lowering import REFUSED, Call, Lowered, Pass, To, lowers
from ._views import Dims, axes_of, last
from .pointwise import default_dtype, floats, real

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


def rows_of(self: Tensor, dims: Sequence[int], ordered: bool = False) -> Tensor:
    """A view ``[kept ..., n]``, or a copy where there is none; `n` in the axes' own order, or as they lie."""
    if self.dim() == 0:
        return self.reshape(1)
    kept = [d for d in range(self.dim()) if d not in dims]
    inner = list(dims) if ordered else sorted(dims, key=self.stride, reverse=True)
    return self.permute(*kept, *inner).reshape(*[self.shape[d] for d in kept], math.prod(self.shape[d] for d in dims))


def kept_of(out: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """A result without the axes that were reduced and kept."""
    return out.squeeze(tuple(dims)) if keepdim and out.dim() else out


def _summed(self: Tensor, dtype: Any) -> Any:
    import torch

    whole = not (self.dtype.is_floating_point or self.dtype.is_complex)
    return dtype or (torch.int64 if whole else self.dtype)


def _own_floats(self: Tensor, dtype: Any) -> Any:
    chosen = dtype or self.dtype
    if not chosen.is_floating_point:
        raise Pass(REFUSED)
    return chosen


def _reduces(name: str, *names: str, of: Callable[[Tensor, Any], Any], of_bool: str = "") -> None:
    """The card of a name, for all of its forms; `of_bool` is the card where it is computed in bool."""

    @lowers(*(names or (name,)), to=f"aten.{name}", into=True)
    def reduced(to: To, self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
        dims, computed = axes_of(self, dim), real(of(self, dtype))
        real(self.dtype)
        x, out = rows_of(self, dims), kept_of(to.out, dims, keepdim)
        if computed == "bool" and of_bool:
            return to(f"aten.{of_bool}", x, out=out)
        return to(f"aten.{name}", x, computed, out=out)


_reduces("sum", of=_summed, of_bool="any")
_reduces("prod", of=_summed, of_bool="all")
_reduces("mean", of=_own_floats)


@lowers("nansum", to="aten.nansum", into=True)
def nansum(to: To, self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    dims, computed = axes_of(self, dim), real(_summed(self, dtype))
    if self.dtype.is_floating_point and not to.out.dtype.is_floating_point:
        raise Pass(REFUSED)
    x, out = rows_of(self, dims), kept_of(to.out, dims, keepdim)
    return to("aten.nansum" if to.out.dtype.is_floating_point else "aten.sum", x, computed, out=out)


def _extreme(name: str, full: str) -> None:
    @lowers(name, to=f"aten.{name}")
    def extreme(to: To, self: Tensor, dim: Dims = (), keepdim: bool = False) -> Call:
        dims = axes_of(self, dim)
        return to(f"aten.{name}", rows_of(self, dims), real(self.dtype), out=kept_of(to.out, dims, keepdim))

    @lowers(full, to=f"aten.{name}")
    def extreme_of_all(to: To, self: Tensor) -> Call:
        return extreme(to, self)


_extreme("amax", "max")
_extreme("amin", "min")


def _place(name: str) -> None:
    @lowers(name, to=f"aten.{name}")
    def place(to: To, self: Tensor, dim: int | None = None, keepdim: bool = False) -> Call:
        if real(self.dtype) == "bool":
            raise Pass(REFUSED)
        dims = axes_of(self, dim)
        return to(f"aten.{name}", rows_of(self, dims, ordered=True), out=kept_of(to.out, dims, keepdim))


_place("argmax")
_place("argmin")


def _truth(name: str) -> None:
    @lowers(name, to=f"aten.{name}")
    def truth(to: To, self: Tensor, dim: Dims = None, keepdim: bool = False) -> Call:
        import torch

        real(self.dtype)
        out = to.out.view(torch.bool)
        if isinstance(dim, (list, tuple)) and not dim:  # of these alone it means no axis
            return to(f"aten.{name}", self.unsqueeze(-1), out=out)
        dims = axes_of(self, dim)
        return to(f"aten.{name}", rows_of(self, dims), out=kept_of(out, dims, keepdim))


_truth("all")
_truth("any")


@lowers("count_nonzero", to="aten.count_nonzero")
def count_nonzero(to: To, self: Tensor, dim: Dims = None) -> Call:
    real(self.dtype)
    dims = axes_of(self, dim)
    return to("aten.count_nonzero", rows_of(self, dims), out=to.out)


@lowers("linalg_vector_norm", to="aten.linalg_vector_norm")
def linalg_vector_norm(
    to: To, self: Tensor, ord: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Call:
    return _norm(to, self, ord, dim, keepdim, dtype)


@lowers("norm", to="aten.linalg_vector_norm")
def norm(to: To, self: Tensor, p: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Call:
    return _norm(to, self, 2 if p is None else p, dim, keepdim, dtype)


def _norm(to: To, self: Tensor, ord: Any, dim: Dims, keepdim: bool, dtype: Any) -> Call:
    dims, computed = axes_of(self, dim), real(_own_floats(self, dtype))
    return to("aten.linalg_vector_norm", rows_of(self, dims), computed, ord, out=kept_of(to.out, dims, keepdim))


def _lacks_freedom(x: Tensor, free: Any) -> bool:
    """Whether a row has no more elements than are taken away; where there is none it has no element."""
    return (x.shape[-1] if math.prod(x.shape[:-1]) else 0) <= free


def _warn_of_freedom(name: str) -> None:
    warnings.warn(
        f"{name}(): degrees of freedom is <= 0. Correction should be strictly less than the reduction factor (input "
        "numel divided by output numel).",
        stacklevel=3,
    )


def _spread(name: str, root: bool) -> None:
    @lowers(name, to="aten.var")
    def spread(to: To, self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False) -> Lowered:
        dims, computed = axes_of(self, dim), real(_own_floats(self, None))
        x, free = rows_of(self, dims), 1 if correction is None else correction
        call = to("aten.var", x, computed, free, root, out=kept_of(to.out, dims, keepdim))

        def warned() -> None:
            _warn_of_freedom(name)
            to.run(call.operator, *call.inputs, out=call.out)

        return warned if _lacks_freedom(x, free) else call

    @lowers(f"{name}_mean", to="aten.var", whole=True)
    def spread_and_mean(
        to: Steps, self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False
    ) -> Any:
        dims, computed = axes_of(self, dim), real(_own_floats(self, None))
        x, free = rows_of(self, dims), 1 if correction is None else correction
        if _lacks_freedom(x, free):
            _warn_of_freedom(f"{name}_mean")
        spread = to.run("aten.var", x, computed, free, root, out=self.new_empty(x.shape[:-1]))
        mean = to.run("aten.mean", x, computed, out=self.new_empty(x.shape[:-1]))
        return with_axes(self, dims, keepdim, spread), with_axes(self, dims, keepdim, mean)


_spread("var", False)
_spread("std", True)


def with_axes(self: Tensor, dims: Sequence[int], keepdim: bool, made: Tensor) -> Tensor:
    """A result of a whole lowering with the axes that were reduced, if they are kept."""
    if not keepdim or not self.dim():
        return made
    return made.view([1 if d in dims else n for d, n in enumerate(self.shape)])


def _pair(name: str) -> None:
    @lowers(f"{name}.dim", to=f"aten.{name}_dim", whole=True)
    def pair(to: Steps, self: Tensor, dim: int, keepdim: bool = False) -> Any:
        import torch

        real(self.dtype)
        dims = axes_of(self, dim)
        x = rows_of(self, dims)
        if not x.shape[-1]:
            raise IndexError(f"{name}(): Expected reduction dim {dim} to have non-zero size.")
        made = self.new_empty(x.shape[:-1]), self.new_empty(x.shape[:-1], dtype=torch.int64)
        to.run(f"aten.{name}_dim", x, out=made)
        return tuple([with_axes(self, dims, keepdim, y) for y in made])


_pair("max")
_pair("min")


@lowers("aminmax", to="aten.amin", whole=True)
def aminmax(to: Steps, self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims, computed = axes_of(self, dim), real(self.dtype)
    x = rows_of(self, dims)
    made = [to.run(f"aten.{name}", x, computed, out=self.new_empty(x.shape[:-1])) for name in ("amin", "amax")]
    return tuple([with_axes(self, dims, keepdim, y) for y in made])


@lowers("logsumexp", to="aten.logsumexp", state=default_dtype)
def logsumexp(to: To, self: Tensor, dim: Dims, keepdim: bool = False) -> Call:
    dims = axes_of(self, dim)
    return to("aten.logsumexp", rows_of(self, dims), floats(self.dtype), out=kept_of(to.out, dims, keepdim))


@lowers("cumsum", to="aten.cumsum", into=True)
def cumsum(to: To, self: Tensor, dim: int, *, dtype: Any = None) -> Call:
    computed = real(_summed(self, dtype))
    if computed == "bool":
        raise Pass(f"dtype {parse_dtype(dtype)}")
    return to("aten.cumsum", last(self, dim), computed, out=last(to.out, dim))


@lowers("vdot", to="aten.sum", whole=True)
def vdot(steps: Steps, self: Tensor, other: Tensor) -> Tensor:
    """Of real numbers torch makes it `dot`, and so do devices."""
    real(self.dtype)
    return self.dot(other)
