"""Convolutions as products: windows of the input are rows, and a transposed one adds up what rows give.

For devices that bring no convolution of their own, where torch asks for `convolution_overrideable`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..lowering import lowers

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


class _Geometry(NamedTuple):
    """How windows lie over an input, along each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def windows(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many windows an input has along each axis."""
        reach = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        each = zip(sizes, self.padding, reach, self.stride, strict=True)
        return tuple((n + 2 * p - r) // s + 1 for n, p, r, s in each)

    def places(self, counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
        """Each place of the kernel, and where in the padded input it lies in all windows."""
        for place in itertools.product(*map(range, self.kernel)):
            begins = [k * d for k, d in zip(place, self.dilation, strict=True)]
            steps = zip(begins, counts, self.stride, strict=True)
            yield place, tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in steps)


def _geometry(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> _Geometry:
    def each(x: Any) -> tuple[int, ...]:
        return tuple(x) * len(kernel) if len(x) == 1 else tuple(x)

    return _Geometry(tuple(kernel), each(stride), each(padding), each(dilation), groups)


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    if not any(padding):
        return x
    sizes = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    wide = x.new_zeros((*x.shape[:2], *sizes))
    _inside(wide, padding, x.shape[2:]).copy_(x)
    return wide


def _inside(x: Tensor, padding: Sequence[int], sizes: Sequence[int]) -> Tensor:
    where: Any = (..., *(slice(p, p + n) for p, n in zip(padding, sizes, strict=True)))
    return x[where]


def _rows(x: Tensor, g: _Geometry, counts: Sequence[int]) -> Tensor:
    """``[groups, N * windows, C / groups * kernel]``: each of the first so many windows of the input as a row."""
    x = _padded(x, g.padding)
    n, c, axes = x.shape[0], x.shape[1], len(counts)
    cut = x.as_strided(
        (n, g.groups, c // g.groups, *counts, *g.kernel),
        (
            x.stride(0), c // g.groups * x.stride(1), x.stride(1),
            *(step * s for step, s in zip(x.stride()[2:], g.stride, strict=True)),
            *(step * d for step, d in zip(x.stride()[2:], g.dilation, strict=True)),
        ),
        x.storage_offset(),
    )  # fmt: skip
    order = (1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    return cut.permute(order).reshape(g.groups, n * math.prod(counts), c // g.groups * math.prod(g.kernel))


def _forward(x: Tensor, weight: Tensor, g: _Geometry, counts: Sequence[int]) -> Tensor:
    """``[N, O, windows]`` of a weight ``[O, C / groups, kernel]``."""
    n, o = x.shape[0], weight.shape[0]
    if min(counts) < 1:
        raise RuntimeError(f"Calculated padded input size is smaller than the kernel: {list(x.shape)}, {g.kernel}")
    matrix = weight.reshape(g.groups, o // g.groups, -1)
    made = _rows(x, g, counts).matmul(matrix.transpose(1, 2)).reshape(g.groups, n, *counts, o // g.groups)
    axes = len(counts)
    return made.permute(1, 0, axes + 2, *range(2, axes + 2)).reshape(n, o, *counts)


def _backward(grad: Tensor, weight: Tensor, sizes: Sequence[int], g: _Geometry) -> Tensor:
    """The input's gradient: what each place of the kernel gives, added where it lies."""
    n, o, counts = grad.shape[0], grad.shape[1], grad.shape[2:]
    c = weight.shape[1]
    rows = grad.reshape(n, g.groups, o // g.groups, -1).transpose(2, 3)
    columns = rows.matmul(weight.reshape(g.groups, o // g.groups, -1))
    columns = columns.reshape(n, g.groups, *counts, c, *g.kernel)
    padded = [size + 2 * p for size, p in zip(sizes, g.padding, strict=True)]
    total = grad.new_zeros((n, g.groups, c, *padded))
    axes = len(counts)
    for place, where in g.places(counts):
        at: Any = (..., *place)
        part, at = columns[at], (..., *where)
        total[at] += part.permute(0, 1, axes + 2, *range(2, axes + 2))
    return _inside(total.reshape(n, g.groups * c, *padded), g.padding, sizes)


def _weights(x: Tensor, grad: Tensor, shape: Sequence[int], g: _Geometry) -> Tensor:
    """The gradient of a weight of this shape: rows of the input times the result's gradient."""
    n, o = grad.shape[:2]
    given = grad.reshape(n, g.groups, o // g.groups, -1).permute(1, 2, 0, 3).reshape(g.groups, o // g.groups, -1)
    return given.matmul(_rows(x, g, grad.shape[2:])).reshape(shape)


def _laid_out(x: Tensor, *operands: Tensor) -> Tensor:
    """A result as torch's own convolutions lay it out: row by row, so that it can be viewed in another shape, or
    channels last where an operand is."""
    import torch
    from torch._prims_common import suggest_memory_format

    formats = {suggest_memory_format(y) for y in operands} - {torch.contiguous_format}
    return x.contiguous(memory_format=formats.pop() if formats else torch.contiguous_format)


@lowers("convolution_overrideable", to="matmul", whole=True)
def convolution(
    steps: Steps,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    g = _geometry(weight.shape[2:], stride, padding, dilation, groups)
    if transposed:
        sizes = [
            (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for n, s, p, d, k, extra in zip(
                input.shape[2:], g.stride, g.padding, g.dilation, g.kernel, output_padding, strict=True
            )
        ]
        made = _backward(input, weight, sizes, g)
    else:
        made = _forward(input, weight, g, g.windows(input.shape[2:]))
    if bias is not None:
        made += bias.reshape(-1, *(1,) * len(g.kernel))
    return _laid_out(made, input, weight)


@lowers("convolution_backward_overrideable", to="matmul", whole=True)
def convolution_backward(
    steps: Steps,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    g = _geometry(weight.shape[2:], stride, padding, dilation, groups)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        sizes = input.shape[2:]  # fewer than the windows of a result whose padding is longer than a stride
        if transposed:
            grad_input = _forward(grad_output, weight, g, sizes)
        else:
            grad_input = _backward(grad_output, weight, sizes, g)
        grad_input = _laid_out(grad_input, input, weight)
    if output_mask[1]:
        given = (grad_output, input) if transposed else (input, grad_output)
        grad_weight = _weights(*given, weight.shape, g)
    if output_mask[2]:
        grad_bias = grad_output.sum((0, *range(2, grad_output.dim())))
    return grad_input, grad_weight, grad_bias
