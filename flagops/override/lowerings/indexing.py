"""Torch's operators that pick and write elements by index, in terms of `gather` and `scatter` along the last axis.

Several indices at once are one: the places that they name together, in memory seen as one long axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..destinations import overlaps_itself
from ..iteration import laid_out
from ..lowering import REFUSED, Call, Lowered, Pass, To, lowers
from ..steps import Steps
from ._views import as_rows, axis_of, last
from .movement import copied, goal
from .pointwise import as_empty_like, real

if TYPE_CHECKING:
    from torch import Tensor


def indices(x: Tensor) -> Tensor:
    """Raises Pass for what is no index."""
    import torch

    if x.dtype not in (torch.int64, torch.int32):
        raise Pass(REFUSED)
    return x


@lowers("index_select", to="aten.gather", over=())
def index_select(to: To, self: Tensor, dim: int, index: Tensor) -> Call:
    if index.dim() > 1:
        raise Pass(REFUSED)
    real(self.dtype)
    dim = axis_of(dim, self.dim())
    return to("aten.gather", last(self, dim), as_rows(indices(index)), False, out=last(to.out, dim))


def _cut(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The part of `x` that an index of its rank reaches, the axis `dim` last."""
    if x.dim() != index.dim():
        raise Pass(REFUSED)
    for axis, (size, most) in enumerate(zip(index.shape, x.shape, strict=True)):
        if axis != dim:
            if size > most:
                raise Pass(REFUSED)
            x = x.narrow(axis, 0, size)
    return x.movedim(dim, -1)


@lowers("gather", to="aten.gather", over=())
def gather(to: To, self: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Call:
    dim = axis_of(dim, self.dim())
    real(self.dtype)
    if not index.numel():  # of whatever axes and dtype
        return to("aten.copy", to.out, real(self.dtype))
    x, where = as_rows(self), as_rows(indices(index))
    return to("aten.gather", _cut(x, where, dim), where.movedim(dim, -1), False, out=last(to.out, dim))


def _scattered(
    to: To, self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str = "assign", include_self: bool = True
) -> Call | Callable[[], None]:
    """In one step where the index reaches all of the other axes."""
    dim, dtype = axis_of(dim, self.dim()), real(self.dtype)
    if src.dtype != self.dtype:
        raise Pass(REFUSED)
    indices(index)
    if not index.numel():
        return to("aten.copy", self, dtype)
    x, where, values = as_rows(self), as_rows(index), as_rows(src)
    if any(n > most for n, most in zip(where.shape, values.shape, strict=False)) or values.dim() != where.dim():
        raise Pass(REFUSED)
    values = values[tuple(slice(n) for n in where.shape)].movedim(dim, -1)
    there, part = as_rows(to.out), _cut(x, where, dim)
    where, target = where.movedim(dim, -1), _cut(there, where, dim)
    if self is to.out or part.shape == x.movedim(dim, -1).shape:
        return to("aten.scatter", part, where, values, reduce, include_self, False, out=target)

    def in_steps() -> None:
        to.run("aten.copy", self, dtype, out=to.out)
        to.run("aten.scatter", target, where, values, reduce, include_self, False, out=target)

    return in_steps


_REDUCES = {"add": "sum", "multiply": "prod"}


def _value(to: To, like: Tensor, value: Any) -> Tensor:
    """A number of torch's call as a tensor of no axes, in the dtype of `like`."""
    import torch

    made = to.number(value)
    if made.dtype != like.dtype:
        made = torch.tensor(value, dtype=like.dtype, device=made.device)
        to.numbers[-1] = made
    return made


@lowers("scatter.src", to="aten.scatter", over=("self",))
def scatter_src(to: To, self: Tensor, dim: int, index: Tensor, src: Tensor) -> Lowered:
    return _scattered(to, self, dim, index, src)


@lowers("scatter.value", to="aten.scatter", over=("self",))
def scatter_value(to: To, self: Tensor, dim: int, index: Tensor, value: Any) -> Lowered:
    return _scattered(to, self, dim, index, _value(to, self, value).expand(index.shape))


@lowers("scatter.reduce", to="aten.scatter", over=("self",))
def scatter_reduced(to: To, self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Lowered:
    if reduce not in _REDUCES:
        raise Pass(REFUSED)
    scattered = _scattered(to, self, dim, index, src, _REDUCES[reduce])

    def in_steps() -> None:
        warnings.warn(
            "The reduce argument of torch.scatter with Tensor src is deprecated and will be removed in a future "
            "PyTorch release. Use torch.scatter_reduce instead for more reduction options.",
            stacklevel=2,
        )
        if isinstance(scattered, Call):
            to.run(scattered.operator, *scattered.inputs, out=scattered.out)
        else:
            scattered()

    return in_steps


@lowers("scatter.value_reduce", to="aten.scatter", over=("self",))
def scatter_value_reduced(to: To, self: Tensor, dim: int, index: Tensor, value: Any, *, reduce: str) -> Lowered:
    if reduce not in _REDUCES:
        raise Pass(REFUSED)
    return _scattered(to, self, dim, index, _value(to, self, value).expand(index.shape), _REDUCES[reduce])


@lowers("scatter_add", to="aten.scatter", over=("self",))
def scatter_add(to: To, self: Tensor, dim: int, index: Tensor, src: Tensor) -> Lowered:
    return _scattered(to, self, dim, index, src, "sum")


@lowers("scatter_reduce.two", to="aten.scatter", over=("self",))
def scatter_reduce(
    to: To, self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Lowered:
    if reduce != "mean":
        return _scattered(to, self, dim, index, src, reduce, include_self)
    import torch

    dtype, dim = self.dtype, axis_of(dim, self.dim())
    whole = not dtype.is_floating_point
    computed = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total, counts = (torch.empty(self.shape, dtype=kind, device=self.device) for kind in (computed, torch.int64))
    made, rows = torch.empty_like(src, dtype=computed), as_rows(index)

    def in_steps() -> None:
        place = tuple(slice(n) for n in rows.shape)
        where, values = rows.movedim(dim, -1), as_rows(made)[place].movedim(dim, -1)
        to.run("aten.copy", self, real(computed), out=total)
        to.run("aten.copy", src, real(computed), out=made)
        to.run("aten.copy", to.number(int(include_self)).expand(self.shape), "int64", out=counts)
        part, many = (_cut(as_rows(x), rows, dim) for x in (total, counts))
        to.run("aten.scatter", part, where, values, "sum", include_self, False, out=part)
        ones = torch.ones((), dtype=torch.int64, device=self.device).expand(where.shape)
        to.run("aten.scatter", many, where, ones, "sum", True, False, out=many)
        to.run("aten.maximum", counts, to.number(1), "int64", out=counts)
        to.run("aten.floor_divide" if whole else "aten.div", total, counts, real(computed), out=total)
        to.run("aten.copy", total, real(dtype), out=to.out)

    return in_steps


def _by_row(to: To, self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str) -> Lowered:
    """An index for all rows of an axis."""
    dim = axis_of(dim, self.dim())
    if index.dim() > 1 or source.dtype != self.dtype:
        raise Pass(REFUSED)
    x, values, where = last(self, dim), last(source, dim), as_rows(indices(index))
    if values.shape != (*x.shape[:-1], where.shape[0]):
        raise Pass(REFUSED)
    real(self.dtype)
    return to("aten.scatter", x, where, values, reduce, True, False, out=last(to.out, dim))


@lowers("index_add", to="aten.scatter", over=("self",))
def index_add(to: To, self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Lowered:
    import torch

    whole = not self.dtype.is_floating_point
    if whole and isinstance(alpha, float):
        raise Pass(REFUSED)
    if alpha == 1 or (alpha and self.dtype == torch.bool):
        return _by_row(to, self, dim, index, source, "sum")
    if not alpha and whole:
        _by_row(to, self, dim, index, source, "sum")  # what torch refuses
        return to("aten.copy", self, real(self.dtype))
    scaled = torch.empty_like(source)

    def in_steps() -> None:
        to.run("aten.mul", source, to.number(alpha), real(source.dtype), out=scaled)
        call = _by_row(to, self, dim, index, scaled, "sum")
        to.run(call.operator, *call.inputs, out=call.out)  # type: ignore[union-attr]

    return in_steps


@lowers("index_copy", to="aten.scatter", over=("self",))
def index_copy(to: To, self: Tensor, dim: int, index: Tensor, source: Tensor) -> Lowered:
    return _by_row(to, self, dim, index, source, "assign")


@lowers("index_fill.int_Scalar", to="aten.scatter", result=as_empty_like)
def index_fill_number(to: To, self: Tensor, dim: int, index: Tensor, value: Any) -> Lowered:
    return _filled(to, self, dim, index, _value(to, self, value))


@lowers("index_fill.int_Tensor", to="aten.scatter", result=as_empty_like)
def index_fill(to: To, self: Tensor, dim: int, index: Tensor, value: Any) -> Lowered:
    import torch

    if not isinstance(value, torch.Tensor):
        return _filled(to, self, dim, index, _value(to, self, value))
    if value.dim() or value.dtype != self.dtype:
        raise Pass("a value of other axes or dtype")
    return _filled(to, self, dim, index, value)


def _filled(to: To, self: Tensor, dim: int, index: Tensor, value: Tensor) -> Lowered:
    axis, shape = axis_of(dim, self.dim()), list(as_rows(self).shape)
    shape[axis] = index.numel()
    return _by_row(to, self, dim, index, value.expand(shape), "assign")


@lowers("embedding_dense_backward", to="aten.embedding_dense_backward")
def embedding_dense_backward(
    to: To, grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Call:
    grad = grad_output.reshape(-1, grad_output.shape[-1])
    where = indices.reshape(-1)
    return to("aten.embedding_dense_backward", grad, where, num_weights, max(padding_idx, -1), bool(scale_grad_by_freq))


# whole calls: their shapes hang on values, or their arguments are lists


def places_of(steps: Steps, mask: Tensor) -> tuple[Tensor, int]:
    """Where a mask holds, row by row, and how often; behind that many places there are others."""
    import torch

    flat = torch.empty(mask.shape, dtype=torch.bool, device=mask.device)
    copied(steps, mask, flat)
    places = torch.empty(flat.numel(), dtype=torch.int64, device=mask.device)
    count = torch.empty(1, dtype=torch.int64, device=mask.device)
    steps.run("aten.nonzero", flat.view(-1), out=(places, count))
    return places, int(count.item())


def _coordinates(steps: Steps, x: Tensor) -> Tensor:
    """``[count, axes]``: where elements differ from 0, an axis after the other as torch lays them out."""
    import torch

    places, count = places_of(steps, x)
    out = torch.empty((x.dim(), count), dtype=torch.int64, device=x.device)
    rest = places[:count]
    for axis in reversed(range(x.dim())):
        size = steps.number(x.shape[axis])
        if axis:
            steps.run("aten.remainder", rest, size, "int64", out=out[axis])
            rest = steps.run("aten.floor_divide", rest, size, "int64", out=torch.empty_like(rest))
        else:
            copied(steps, rest, out[0])
    return out.as_strided((count, x.dim()), (1, count))


@lowers("nonzero", to="aten.nonzero", whole=True, over=())
def nonzero(steps: Steps, self: Tensor) -> Tensor:
    real(self.dtype)
    return _coordinates(steps, self)


@lowers("masked_select", to="aten.gather", whole=True, over=())
def masked_select(steps: Steps, self: Tensor, mask: Tensor) -> Tensor:
    import torch

    if mask.dtype != torch.bool:
        raise Pass(REFUSED)
    real(self.dtype)
    x, mask = torch.broadcast_tensors(self, mask)  # type: ignore[no-untyped-call]
    places, count = places_of(steps, mask)
    out = goal(steps, (count,), self.dtype, self, mask)
    return steps.run("aten.gather", x.reshape(-1), places[:count], False, out=out)


@lowers("masked_scatter", to="aten.scatter", whole=True)
def masked_scatter(steps: Steps, self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    import torch

    if mask.dtype != torch.bool or source.dtype != self.dtype:
        raise Pass(REFUSED)
    mask = mask.expand(self.shape) if steps.given else mask
    x, mask = torch.broadcast_tensors(self, mask)  # type: ignore[no-untyped-call]
    places, count = places_of(steps, mask)
    if source.numel() < count:
        raise RuntimeError(f"masked_scatter: expected at least {count} elements in source, got {source.numel()}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = copied(steps, x, out).view(-1)
    steps.run("aten.scatter", flat, places[:count], source.reshape(-1)[:count], "assign", True, False, out=flat)
    return out


def _by_axis(steps: Steps, x: Tensor, indices: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """The indices by the axis that each is of; a mask is one of each axis that it has."""
    import torch

    found: dict[int, Tensor] = {}
    axis = 0
    for index in indices:
        if index is None:
            axis += 1
            continue
        index = index.to(x.device)
        if index.dtype in (torch.bool, torch.uint8):
            if index.shape != x.shape[axis : axis + index.dim()]:
                raise IndexError(
                    f"The shape of the mask {list(index.shape)} at index 0 does not match the shape of the indexed "
                    f"tensor {list(x.shape)} at index {axis}"
                )
            columns = _coordinates(steps, index).unbind(1)
        else:
            columns = (_whole(index),)
        found |= {axis + i: column for i, column in enumerate(columns)}
        axis += len(columns)
    if axis > x.dim():
        raise IndexError(f"too many indices for tensor of dimension {x.dim()}")
    return found


def _whole(index: Tensor) -> Tensor:
    import torch

    if index.dtype not in (torch.int64, torch.int32):
        raise Pass(f"indices of dtype {real(index.dtype)}")
    return index


class _Picked:
    """What ``x[...]`` names: places on its axis that is indexed, or of several on the axis that memory is, from the
    first element of `x` on.

    shape: of what is picked, `inner` axes of it by index, behind `before` others.
    """

    def __init__(self, steps: Steps, x: Tensor, indices: Sequence[Tensor | None]) -> None:
        import torch

        found = _by_axis(steps, x, indices)
        if not found:
            raise Pass(REFUSED)
        try:
            where = torch.broadcast_tensors(*found.values())  # type: ignore[no-untyped-call]
        except RuntimeError:
            shapes = ", ".join(str(list(index.shape)) for index in found.values())
            raise IndexError(
                f"shape mismatch: indexing tensors could not be broadcast together with shapes {shapes}"
            ) from None
        own, self.inner = where[0].shape, where[0].dim()
        self.axes = list(found)
        if len(where) == 1:
            self.places = where[0].reshape(-1)
        else:
            so_far = steps.number(0)
            for axis, index in zip(found, where, strict=True):
                goal = torch.empty(own, dtype=torch.int64, device=x.device)
                so_far = steps.run("aten.offset", so_far, index, x.shape[axis], x.stride(axis), out=goal)
            self.places = so_far.view(-1)
        first, last = min(found), max(found)
        self.others = [axis for axis in range(x.dim()) if axis not in found]
        self.before = first if last - first + 1 == len(found) else 0
        rest = [x.shape[axis] for axis in self.others]
        self.shape = (*rest[: self.before], *own, *rest[self.before :])
        self._where = where
        self._length = 1 + sum((x.shape[axis] - 1) * x.stride(axis) for axis in found)

    def seen(self, x: Tensor) -> Tensor:
        """Other axes, and the one that is indexed: memory, where several are."""
        if len(self.axes) == 1:
            return x.movedim(self.axes[0], -1)
        if not all(x.shape):
            return x.new_empty((*(x.shape[axis] for axis in self.others), max(self._length, 0)))
        shape = [x.shape[axis] for axis in self.others] + [self._length]
        return x.as_strided(shape, [x.stride(axis) for axis in self.others] + [1])

    def strides(self, x: Tensor) -> tuple[int, ...] | None:
        """Of torch's result, which follows those of `x` and of the indices; None row by row."""
        steps = [x.stride(axis) for axis in self.others]
        steps[self.before : self.before] = [0] * self.inner
        behind = len(self.others) - self.before
        places = [i[(None,) * self.before + (..., *(None,) * behind)] for i in self._where]
        return laid_out([x.new_empty(0, device="meta").as_strided(self.shape, steps), *places], None)[1]

    def rows(self, y: Tensor) -> Tensor:
        """A tensor of `shape` with the axes by index as one, the last."""
        y = y.flatten(self.before, self.before + self.inner - 1) if self.inner else y.unsqueeze(self.before)
        return y.movedim(self.before, -1)


@lowers("index.Tensor", to="aten.gather", whole=True, over=())
def index(steps: Steps, self: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    real(self.dtype)
    picked = _Picked(steps, self, indices)
    out = goal(steps, picked.shape, self.dtype, self)
    if not out.is_contiguous():
        out = out.new_empty(picked.shape)
    steps.run("aten.gather", picked.seen(self), picked.places, True, out=picked.rows(out))
    layout = None if steps.given else picked.strides(self)
    return out if layout is None else copied(steps, out, out.new_empty_strided(out.shape, layout))


@lowers("_index_put_impl", to="aten.scatter", whole=True)
def index_put(
    steps: Steps,
    self: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Tensor:
    import torch

    real(self.dtype)
    if values.dtype != self.dtype or overlaps_itself(self):
        raise Pass(REFUSED)
    out = self if steps.given and steps.given[0] is self else self.clone()
    target = out
    if accumulate and out.dtype in (torch.float16, torch.bfloat16):  # sums are rounded once
        target = copied(steps, out, torch.empty(out.shape, dtype=torch.float32, device=out.device))
        values = values.float()
    picked = _Picked(steps, target, indices)
    try:
        values = values.to(self.device).expand(picked.shape)
    except RuntimeError:
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {list(values.shape)} cannot be broadcast to indexing result of "
            f"shape {list(picked.shape)}"
        ) from None
    if 0 in picked.shape:
        return out
    if values.untyped_storage()._cdata == out.untyped_storage()._cdata:
        values = values.clone()
    seen, reduce = picked.seen(target), "sum" if accumulate else "assign"
    steps.run("aten.scatter", seen, picked.places, picked.rows(values), reduce, True, True, out=seen)
    return out if target is out else copied(steps, target, out)


@lowers("take", to="aten.gather", whole=True, over=())
def take(steps: Steps, self: Tensor, index: Tensor) -> Tensor:
    import torch

    if index.dtype != torch.int64 or any(x is out for x in (self, index) for out in steps.given):  # even an empty one
        raise Pass(REFUSED)
    real(self.dtype)
    out = goal(steps, index.shape, self.dtype, self, index)
    made = out if out.is_contiguous() else out.new_empty(out.shape)
    steps.run("aten.gather", self.reshape(-1), index.reshape(-1), True, out=made.view(-1))
    return made


@lowers("put", to="aten.scatter", whole=True)
def put(steps: Steps, self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    import torch

    if index.dtype != torch.int64 or source.dtype != self.dtype or index.numel() != source.numel():
        raise Pass(REFUSED)
    real(self.dtype)
    flat = torch.empty(self.shape, dtype=self.dtype, device=self.device)
    made = copied(steps, self, flat).view(-1)
    reduce = "sum" if accumulate else "assign"
    steps.run("aten.scatter", made, index.reshape(-1), source.reshape(-1), reduce, True, True, out=made)
    result = torch.empty_like(self)
    return flat if flat.stride() == result.stride() else copied(steps, flat, result)
