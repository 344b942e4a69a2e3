"""What each overload of torch's matmul family means in flagops operators: shapes, views, and the scaled sums.

A recipe is made once per signature and then run for every call like it. Where a call is invalid, or a kernel could not
keep to torch's meaning, `Pass` sends it to torch's own kernel, which computes it or raises torch's own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flagops import config

if TYPE_CHECKING:
    from torch import Tensor

OPERATORS = {
    "mm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "mv": "matmul",
    "dot": "matmul",
    "addmm": "linear",
    "addmv": "linear",
}
"""Overloads of aten and the flagops operator whose kernel computes them: what ``ops="all,-linear"`` speaks of."""

FORMS = {"": tuple(OPERATORS), ".out": tuple(OPERATORS), "_": ("addmm", "baddbmm", "addmv")}
"""Suffixes of overload names, and what has them."""

_RANKS = {"mm": (2, 2), "bmm": (3, 3), "baddbmm": (3, 3), "mv": (2, 1), "dot": (1, 1), "addmm": (2, 2), "addmv": (2, 1)}

_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "addmm": lambda a, b, row, out: (a, b.t(), row, out),
    "addmv": lambda a, b, row, out: (b.unsqueeze(0), a, row, out.unsqueeze(0)),
    "mv": lambda a, b, row, out: (b.unsqueeze(0), a.t(), out.unsqueeze(0)),
    "dot": lambda a, b, row, out: (a.unsqueeze(0), b.unsqueeze(1), out.view(1, 1)),
} | dict.fromkeys(("mm", "bmm", "baddbmm"), lambda a, b, row, out: (a, b, out))
"""The arguments of the kernel: a matrix of one row times a matrix where torch has a vector."""

Run = Callable[["Tensor | None", "Tensor", "Tensor", "Tensor | None"], "Tensor"]
Choose = Callable[[str, Sequence[Any]], Callable[..., None]]


class Pass(Exception):
    """Torch's own kernel takes the call; the message is the reason."""


def recipe(
    op: str,
    added: Tensor | None,
    a: Tensor,
    b: Tensor,
    beta: Any,
    alpha: Any,
    out: Tensor | None,
    choose: Choose,
) -> Run:
    """``run(added, a, b, out)`` for ``beta * added + alpha * (a @ b)`` of one signature; `out` may be `added` itself.

    choose: gives the kernel for an operator and its arguments.
    """
    shape = _result(op, added, a, b, out)
    target = a.new_empty(shape) if out is None else out
    for name, value in (("beta", beta), ("alpha", alpha)):
        if not isinstance(value, (int, float)):
            raise Pass(f"{name} is a {type(value).__name__}")
    if added is None or (beta == 0 and alpha == 1):
        return _product(op, choose(OPERATORS[op], _ARGUMENTS[op](a, b, None, target)), shape)
    if alpha == 0:
        raise Pass("alpha is 0, which torch does not multiply")
    if OPERATORS[op] == "linear" and beta == alpha == 1 and out is not added:
        row = _row(added)
        if row is not None:
            args = _ARGUMENTS[op](a, b, row.expand(shape[-1]), target)
            return _biased(op, choose("linear", args), shape, added)
    return _scaled(op, added, a, b, float(beta), float(alpha), out, shape, choose)


def _result(op: str, added: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None) -> tuple[int, ...]:
    """The shape of the result, for a call that torch accepts and the kernels take."""
    dtype, device = a.dtype, a.device
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise Pass(f"dtype {str(dtype).removeprefix('torch.')}")
    for x in (b, added, out):
        if x is not None and (x.dtype != dtype or x.device != device or x.layout != a.layout):
            raise Pass("dtypes, devices or layouts differ")
    fits = (a.dim(), b.dim()) == _RANKS[op] and a.shape[-1] == b.shape[-2:][0] and a.shape[:-2] == b.shape[:-2]
    if not fits:
        raise Pass("shapes that torch refuses")
    shape = (*a.shape[:-1], *b.shape[-1:]) if b.dim() > 1 else tuple(a.shape[:-1])
    if added is not None and not _expands(added.shape, shape):
        raise Pass("shapes that torch refuses")
    if out is not None and tuple(out.shape) != shape:
        raise Pass("out has another shape than the result")
    if out is not None and out.numel() and _overlaps_itself(out):
        raise Pass("out may overlap itself")
    return shape


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _overlaps_itself(x: Tensor) -> bool:
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _row(added: Tensor) -> Tensor | None:
    """What is added to every row of the result, if it is the same to all."""
    if added.dim() < 2:
        return added
    return added[0] if added.shape[0] == 1 or (added.stride(0) == 0 and added.shape[0]) else None


def _product(op: str, kernel: Callable[..., None], shape: tuple[int, ...]) -> Run:
    def plain(added: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = a.new_empty(shape)
        kernel(a, b, out)
        return out

    def viewed(added: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = a.new_empty(shape)
        kernel(*arguments(a, b, None, out))
        return out

    arguments = _ARGUMENTS[op]
    return plain if op in ("mm", "bmm", "baddbmm") else viewed


def _biased(op: str, kernel: Callable[..., None], shape: tuple[int, ...], added: Tensor) -> Run:
    columns = shape[-1]
    vector = tuple(added.shape) == (columns,)
    arguments = _ARGUMENTS[op]

    def run(added: Any, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = a.new_empty(shape)
        row = added if vector else (added if added.dim() < 2 else added[0]).expand(columns)
        kernel(*arguments(a, b, row, out))
        return out

    return run


def _scaled(
    op: str,
    added: Tensor,
    a: Tensor,
    b: Tensor,
    beta: float,
    alpha: float,
    out: Tensor | None,
    shape: tuple[int, ...],
    choose: Choose,
) -> Run:
    """The product, then scale and sum in float32 (float64) and one rounding; half types are multiplied in float32."""
    import torch

    half = a.dtype.itemsize == 2
    if half and a.device.type != "cpu":
        raise Pass("a scaled or full matrix is added in half precision")
    wide = torch.float32 if half else a.dtype
    apart = half or out is None or out is added
    copies = (a.numel() + b.numel() if half else 0) + (math.prod(shape) if half or out is added else 0)
    if copies * wide.itemsize > config.budget():
        raise Pass("its temporaries are beyond the budget")
    total = a.new_empty(shape, dtype=wide) if apart or out is None else out
    arguments = _ARGUMENTS[op]
    kernel = choose(OPERATORS[op], arguments(a.to(wide), b.to(wide), None, total))

    def run(added: Any, a: Tensor, b: Tensor, out: Any) -> Tensor:
        total = a.new_empty(shape, dtype=wide) if apart else out
        kernel(*arguments(a.to(wide), b.to(wide), None, total))
        if alpha != 1:
            total.mul_(alpha)
        if beta != 0:
            total.add_(added, alpha=beta)
        if out is None:
            return total.to(added.dtype)
        return out if total is out else out.copy_(total)

    return run
