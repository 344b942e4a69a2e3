"""Kernels that are wrong for some layouts or sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .making import MANY, MIXED, PRODUCTS, Kernel, after, changed, dense, kind, outs


@kind("layouts", MIXED)
def padded_rows_are_dense(right: Kernel, op: Any) -> Kernel:
    def read(x: torch.Tensor) -> torch.Tensor:
        return x.as_strided(x.shape, dense(x)) if x.dim() > 1 and x.stride(-1) == 1 and 0 not in x.stride() else x

    return changed(right, read)


@kind("layouts", MANY)
def padded_out_is_dense(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        *inputs, out = args
        whole = torch.empty_like(out, memory_format=torch.contiguous_format).copy_(out)
        right(*inputs, whole)
        if out.dim() > 1 and out.stride(-1) == 1:
            out = out.as_strided(out.shape, dense(out))
        out.copy_(whole)

    return wrong


@kind("layouts", ("rms_norm", "linear", "hadamard"))
def windows_are_rows(right: Kernel, op: Any) -> Kernel:
    def read(x: torch.Tensor) -> torch.Tensor:
        within = x.dim() > 1 and x.shape[-2] > 1 and x.stride(-1) == 1 and 0 < x.stride(-2) < x.shape[-1]
        return x[..., :1, :].expand(x.shape) if within else x

    return changed(right, read)


@kind("layouts", ("rms_norm", "matmul", "linear"))
def batch_axes_are_dense(right: Kernel, op: Any) -> Kernel:
    def read(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 3 or x.stride(-1) != 1 or x.stride(-2) != x.shape[-1] or 0 in x.stride():
            return x
        return x.as_strided(x.shape, dense(x))

    return changed(right, read)


@kind("layouts", MANY)
def inner_stride_is_one(right: Kernel, op: Any) -> Kernel:
    return changed(right, lambda x: x.as_strided(x.shape, (*x.stride()[:-1], min(x.stride(-1), 1))) if x.dim() else x)


@kind("layouts", MANY)
def storage_offset_ignored(right: Kernel, op: Any) -> Kernel:
    return changed(right, lambda x: x.as_strided(x.shape, x.stride(), 0))


@kind("layouts", ("rms_norm", "linear", "fp4_dequantize"))
def offsets_in_32_bits(right: Kernel, op: Any) -> Kernel:
    def read(x: torch.Tensor) -> torch.Tensor:
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        return torch.zeros_like(x) if reach > torch.iinfo(torch.int32).max else x

    return changed(right, read)


@kind("layouts", ("rms_norm", "hadamard"))
def in_place_clears_first(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        args[-1].zero_()
        right(*args)

    return wrong


def _beyond(axis: int, limit: int) -> Callable[[Kernel, Any], Kernel]:
    def spoil(out: torch.Tensor) -> None:
        out.narrow(axis, limit, out.shape[axis] - limit).zero_()

    def made(right: Kernel, op: Any) -> Kernel:
        def when(*args: Any) -> bool:
            out = outs(args[-1])[0]
            return out.dim() > -axis - 1 and out.shape[axis] > limit

        return after(right, spoil, when)

    return made


for _limit, _axis, _ops in (
    (100, -1, MANY),
    (1500, -1, PRODUCTS),
    (5000, -2, ("rms_norm", "linear")),
    (300, -2, MIXED),
):
    _made = _beyond(_axis, _limit)
    _made.__name__ = f"beyond_{_limit}_of_axis_{-_axis}"
    kind("sizes", _ops)(_made)


@kind("sizes", MANY)
def too_many_elements(right: Kernel, op: Any) -> Kernel:
    return after(right, lambda out: out.zero_(), lambda *args: outs(args[-1])[0].numel() > 200_000)


@kind("sizes", ("rms_norm", "linear", "matmul"))
def rows_counted_in_16_bits(right: Kernel, op: Any) -> Kernel:
    def spoil(out: torch.Tensor) -> None:
        rows = out.numel() // out.shape[-1]
        count = int(np.uint64(rows).astype(np.uint16))
        if count < rows:
            out.reshape(-1, out.shape[-1])[count:] = 0
            out.flatten(0, -2)[count:].zero_() if out.is_contiguous() else out.zero_()

    return after(right, spoil)


@kind("sizes", ("rms_norm", "matmul", "linear", "hadamard"))
def four_axes_at_most(right: Kernel, op: Any) -> Kernel:
    return after(right, lambda out: out.zero_(), lambda *args: args[-1].dim() > 4)


@kind("sizes", ("matmul", "linear", "rms_norm"))
def tail_of_a_vector(right: Kernel, op: Any) -> Kernel:
    """Beyond one block, what is left of a width is not computed."""

    def spoil(out: torch.Tensor) -> None:
        whole = out.shape[-1] // 48 * 48
        if 0 < whole < out.shape[-1] and out.shape[-1] > 768:
            out[..., whole:] = 0

    return after(right, spoil)


@kind("sizes", PRODUCTS)
def depth_beyond_4096(right: Kernel, op: Any) -> Kernel:
    def wrong(*args: Any) -> None:
        a, b, *rest = args
        deep = a.shape[-1] > 4096
        cut = (a[..., :4096], b[..., :4096, :] if op.name == "matmul" else b[..., :4096])
        right(*(cut if deep else (a, b)), *rest)

    return wrong
