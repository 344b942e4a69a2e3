"""Where torch lays out the result of an operator that goes over its operands element by element.

Source: ``TensorIteratorBase::compute_fast_setup_type``, ``reorder_dimensions`` and ``allocate_or_resize_outputs``;
torch's shape functions agree with it only where its kernels use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Steps = tuple[int, ...]


def laid_out(operands: Sequence[Tensor], computed: str | None) -> tuple[Steps, Steps | None]:
    """Shape and strides (None: row by row) of the result. Raises RuntimeError where operands do not broadcast.

    computed: the dtype to which operands are brought, None if each keeps its own; on the CPU torch copies those of
    another one first.
    """
    import torch

    if computed is not None:
        operands = [_converted(x, computed) for x in operands]
    shape: Steps = tuple(torch.broadcast_shapes(*(x.shape for x in operands)))  # type: ignore[no-untyped-call]
    if all(tuple(x.shape) == shape for x in operands):
        if all(x.is_contiguous() for x in operands):
            return shape, None
        for form, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if len(shape) == rank and all(x.is_contiguous(memory_format=form) for x in operands):
                return shape, torch.empty(shape, device="meta", memory_format=form).stride()
        first = operands[0].stride()
        if all(x.stride() == first and _dense(x) for x in operands):
            return shape, first
    steps = [_bytes(x, shape) for x in operands]
    axes = list(range(len(shape)))[::-1]
    for i in range(1, len(axes)):
        at = i
        for before in range(i - 1, -1, -1):
            order = _order(axes[before], axes[at], shape, steps)
            if order > 0:
                axes[before], axes[at] = axes[at], axes[before]
                at = before
            elif order < 0:
                break
    if axes == list(range(len(shape)))[::-1]:
        return shape, None
    strides = [0] * len(shape)
    for axis, step in zip(axes, accumulate((shape[axis] for axis in axes[:-1]), mul, initial=1), strict=True):
        strides[axis] = step
    return shape, tuple(strides)


def _converted(x: Tensor, computed: str) -> Tensor:
    """Without memory, as what torch goes over."""
    import torch

    dtype = getattr(torch, computed)
    if x.device.type != "cpu" or x.dtype == dtype:
        return x
    if _dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
    like = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None
    return torch.empty(x.shape, dtype=dtype, device="meta", memory_format=like)


def _bytes(x: Tensor, shape: Steps) -> Steps:
    """Bytes from one element to the next along each axis, 0 where it is repeated."""
    lead = len(shape) - x.dim()
    own = (
        0 if n == 1 != whole else step * x.element_size()
        for n, step, whole in zip(x.shape, x.stride(), shape[lead:], strict=True)
    )
    return (*(0,) * lead, *own)


def _order(one: int, two: int, shape: Steps, steps: Sequence[Steps]) -> int:
    """Whether an axis belongs behind (1) or before (-1) another, the fastest first; 0 if nothing says so."""
    for own in steps:
        if not own[one] or not own[two]:
            continue
        if own[one] != own[two]:
            return -1 if own[one] < own[two] else 1
        if shape[one] > shape[two]:
            return 1
    return 0


def _dense(x: Tensor) -> bool:
    """Whether the elements lie side by side in some order, each once."""
    reach = 1
    for step, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if step != reach:
            return False
        reach *= n
    return True
