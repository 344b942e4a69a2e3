"""Matrix products on any torch device; half types on a CPU go through float32 tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from flagops.registry import kernel

from .._tensors import matrix

_HALF = (torch.float16, torch.bfloat16)
_TILE = 4 << 20  # elements of one step's float32 operands and result


def tiled(x: Tensor) -> bool:
    """Whether products with `x` are computed on float32 copies: CPUs multiply half types slowly or flush subnormals."""
    return x.dtype in _HALF and x.device.type == "cpu"


def _forwards(x: Tensor, *others: Tensor | None) -> str:
    return "" if tiled(x) else "aten"


@kernel(forwards_to=_forwards)
def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`torch.matmul`, except that half types on a CPU are multiplied in float32 and rounded once."""
    product(a, b, out)


@kernel(forwards_to=_forwards)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x @ weight.T + bias`, the bias added before the one rounding."""
    if x.dim() == 1:
        x, out = x.unsqueeze(0), out.unsqueeze(0)
    if tiled(x) or bias is None:
        product(x, weight.mT, out, bias)
    elif out.is_contiguous():
        torch.addmm(bias, matrix(x), weight.mT, out=matrix(out))
    else:
        out.copy_(torch.addmm(bias, matrix(x), weight.mT).view(out.shape))


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """`a @ b` into `out`, `bias` added where tiles are in use."""
    if not tiled(a):
        if out.is_contiguous():
            torch.matmul(a, b, out=out)
        else:  # which `out=` refuses for some folded shapes
            out.copy_(torch.matmul(a, b))
        return
    while b.dim() > 2 and (b.shape[0] == 1 or (b.stride(0) == 0 and b.shape[0])):
        b = b[0]
    _product(a, b, out, bias)


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> None:
    axis = max(range(out.dim()), key=out.shape.__getitem__) - out.dim()
    long = out.shape[axis]
    k = a.shape[-1]
    size = k * (_rows(a, -2) + _rows(b, -1)) + out.numel()
    if size <= _TILE or (long <= 64 and out.numel() <= _TILE):
        _tile(a, b, out, bias, max(1, k * _TILE // max(size, 1)))
        return
    half = (long // 2 + 63) // 64 * 64 if long > 64 else long // 2
    for start, length in ((0, half), (half, long - half)):
        _product(
            a if axis == -1 else _narrow(a, axis, start, length),
            b if axis == -2 else _narrow(b, axis, start, length),
            out.narrow(axis, start, length),
            bias if bias is None or axis != -1 else bias[start : start + length],
        )


def _rows(x: Tensor, axis: int) -> int:
    rows = x.shape[axis]
    for n in x.shape[:-2]:
        rows *= n
    return rows


def _narrow(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    return x if -axis > x.dim() or (axis < -2 and x.shape[axis] == 1) else x.narrow(axis, start, length)


def _tile(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, step: int) -> None:
    k = a.shape[-1]
    total = torch.matmul(a[..., :step].float(), b[..., :step, :].float())
    for start in range(step, k, step):
        total += torch.matmul(a[..., start : start + step].float(), b[..., start : start + step, :].float())
    if bias is not None:
        total += bias
    out.copy_(total)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that gradients are computed in."""
    return x.float() if tiled(x) else x


def _reduced(x: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient over the axes that were broadcast, and round it once."""
    return x.sum_to_size(like.shape).to(like.dtype)


def matmul_backward(grad: Tensor, a: Tensor, b: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of `a` and `b`."""
    g = wide(grad)
    grad_a = _reduced(torch.matmul(g, wide(b).mT), a) if needs[0] else None
    grad_b = None
    if needs[1] and b.dim() == 2:
        grad_b = torch.matmul(matrix(wide(a)).mT, matrix(g)).to(b.dtype)
    elif needs[1]:
        grad_b = _reduced(torch.matmul(wide(a).mT, g), b)
    return grad_a, grad_b


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `x`, `weight` and `bias`."""
    g = matrix(wide(grad))
    grad_x = torch.matmul(g, wide(weight)).reshape(x.shape).to(x.dtype) if needs[0] else None
    grad_weight = torch.matmul(g.mT, matrix(wide(x))).to(weight.dtype) if needs[1] else None
    grad_bias = None
    if bias is not None and needs[2]:
        grad_bias = g.sum(0, dtype=torch.float32 if g.dtype in _HALF else g.dtype).to(bias.dtype)
    return grad_x, grad_weight, grad_bias
