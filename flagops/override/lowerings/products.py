"""Torch's matrix products: views as one product, a bias as a linear layer, and scaled sums; integers have their own.

Where a kernel could not keep to torch's meaning, `Pass` sends the call to torch's own kernel, which computes it or
raises torch's own error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flagops import config
from flagops.arrays import FLOATS, INTEGERS, parse_dtype

from ..lowering import MIXED, REFUSED, Call, Lowered, Pass, Result, To, lowers

if TYPE_CHECKING:
    from torch import Tensor


def _product(ranks: tuple[int, int], left: Tensor, right: Tensor, added: Tensor | None = None) -> Result:
    """Rows of the left factor by columns of the right one, of as many matrices as there are."""
    fits = (left.dim(), right.dim()) == ranks and left.shape[-1] == right.shape[-2:][0]
    if not fits or left.shape[:-2] != right.shape[:-2]:
        raise Pass(REFUSED)
    shape = (*left.shape[:-1], *right.shape[-1:]) if right.dim() > 1 else tuple(left.shape[:-1])
    if added is not None and not _expands(added.shape, shape):
        raise Pass(REFUSED)
    return shape, None


_INTEGER = "aten.integer_matmul"


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


@lowers("bmm", to="matmul", result=lambda self, mat2: _product((3, 3), self, mat2), factors=("self", "mat2"))
@lowers("mm", to="matmul", result=lambda self, mat2: _product((2, 2), self, mat2), factors=("self", "mat2"))
def product(to: To, self: Tensor, mat2: Tensor) -> Call:
    return to(_card(to, self, mat2), self, mat2)


@lowers(
    "baddbmm",
    to="matmul",
    result=lambda self, batch1, batch2, **_: _product((3, 3), batch1, batch2, self),
    factors=("batch1", "batch2"),
)
def baddbmm(to: To, self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Lowered:
    return _sum(_card(to, batch1, batch2, self), to, self, (batch1, batch2), to.out, beta, alpha)


@lowers("mv", to="matmul", result=lambda self, vec: _product((2, 1), self, vec), factors=("self", "vec"))
def mv(to: To, self: Tensor, vec: Tensor) -> Call:
    return to(_card(to, self, vec), vec.unsqueeze(0), self.t(), out=to.out.unsqueeze(0))


@lowers("dot", to="matmul", result=lambda self, tensor: _product((1, 1), self, tensor), factors=("self", "tensor"))
def dot(to: To, self: Tensor, tensor: Tensor) -> Call:
    return to(_card(to, self, tensor), self.unsqueeze(0), tensor.unsqueeze(1), out=to.out.view(1, 1))


@lowers(
    "addmm",
    to="linear",
    result=lambda self, mat1, mat2, **_: _product((2, 2), mat1, mat2, self),
    factors=("mat1", "mat2"),
)
def addmm(to: To, self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Lowered:
    return _sum(_card(to, mat1, mat2, self, floats="linear"), to, self, (mat1, mat2), to.out, beta, alpha)


@lowers(
    "addmv",
    to="linear",
    result=lambda self, mat, vec, **_: _product((2, 1), mat, vec, self),
    factors=("mat", "vec"),
)
def addmv(to: To, self: Tensor, mat: Tensor, vec: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Lowered:
    card = _card(to, mat, vec, self, floats="linear")
    if not mat.numel():
        raise Pass("an empty matrix, for which torch gives what is added in its own shape")
    return _sum(card, to, self, (vec.unsqueeze(0), mat.t()), to.out.unsqueeze(0), beta, alpha)


def _card(to: To, *inputs: Tensor, floats: str = "matmul") -> str:
    """The card of a product; kernels multiply numbers of one dtype."""
    first = parse_dtype(inputs[0].dtype)
    if first not in (*FLOATS, *INTEGERS):
        raise Pass(f"dtype {first}")
    if any(x.dtype != inputs[0].dtype for x in (*inputs, to.out)):
        raise Pass(MIXED)
    return floats if first in FLOATS else _INTEGER


def _sum(
    card: str, to: To, added: Tensor, factors: tuple[Tensor, Tensor], out: Tensor, beta: Any, alpha: Any
) -> Lowered:
    """``beta * added + alpha * product``, where `out` is the destination as the product has it."""
    for name, value in (("beta", beta), ("alpha", alpha)):
        if not isinstance(value, (int, float)):
            raise Pass(f"{name} is a {type(value).__name__}")
        if card == _INTEGER and not math.isfinite(value):
            raise Pass(REFUSED)
    if not factors[0].shape[-1]:
        alpha = 1  # torch multiplies nothing then, not even a NaN
        if card == _INTEGER and isinstance(beta, float):
            raise Pass(REFUSED)
    beta, alpha = (int(x) if card == _INTEGER else float(x) for x in (beta, alpha))  # torch cuts off fractions
    if beta == 0 and alpha == 1:
        return to(card, *_factors(card, *factors), out=out)
    if alpha == 0:  # nothing is multiplied, as in BLAS: what is not finite leaves no trace
        dtype = parse_dtype(added.dtype)
        if beta == 0:
            return to("aten.copy", to.number(0).expand(to.out.shape), dtype)
        return to("aten.mul", added.expand(to.out.shape), to.number(beta), dtype)
    row = _row(added) if card == "linear" and beta == alpha == 1 and added is not to.out else None
    if row is not None:
        return to(card, *_factors(card, *factors, row.expand(out.shape[-1])), out=out)
    return partial(_scaled, card, to, added, factors, out, beta, alpha)


def _factors(card: str, left: Tensor, right: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The inputs of a card that multiplies two matrices."""
    return (left, right.mT, bias) if card == "linear" else (left, right)


def _row(added: Tensor) -> Tensor | None:
    """What is added to every row of the result, if it is the same to all."""
    if added.dim() < 2:
        return added
    return added[0] if added.shape[0] == 1 or (added.stride(0) == 0 and added.shape[0]) else None


def _scaled(
    card: str, to: To, added: Tensor, factors: tuple[Tensor, Tensor], out: Tensor, beta: Any, alpha: Any
) -> None:
    """The product, then scale and sum in float32 (float64, integers) and one rounding; halves are multiplied in
    float32."""
    import torch

    half = added.dtype.itemsize == 2 and added.is_floating_point()
    if half and added.device.type == "cuda":
        raise Pass("a scaled or full matrix is added in half precision")
    wide = torch.float32 if half else added.dtype
    apart = half or added is to.out
    copies = (sum(x.numel() for x in factors) if half else 0) + (math.prod(out.shape) if apart else 0)
    if copies * wide.itemsize > config.budget():
        raise Pass("its temporaries are beyond the budget")
    total = torch.empty_like(out, dtype=wide) if apart else out
    to.run(card, *_factors(card, *(x.to(wide) for x in factors)), out=total)
    if alpha != 1:
        total.mul_(alpha)
    total = total.view(to.out.shape)
    if beta != 0:
        total.add_(added, alpha=beta)
    if apart:
        to.out.copy_(total)
