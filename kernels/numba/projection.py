"""DeepSeek-V4's two-step output projection on the CPU: per-group `wo_a`, then `wo_b`.

Bound as its products are: by the bytes of both weights for few tokens, by operations for many. Groups are an axis of
the first product and heads one that it sums over, so that nothing is permuted or copied; FP8, whose products have no
such axes, takes a group after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flagops import arrays
from flagops.arrays import dtype_name
from flagops.registry import kernel

from .._moe import BLOCK
from ._gemm import View, contract, empty, view
from ._qmatmul import Scales, product, scales
from .dequantize import fp8_dequantize
from .quantize import fp8_quantize


def _groups(o: Any, wo_a: Any, groups: int) -> tuple[View, View]:
    """o as [groups, heads, ..., c] and wo_a as [groups, heads, ..., r, c], heads counted within a group."""
    left, weight = view(o), view(wo_a)
    (*lead, heads, c), (*steps, by_head, by_channel) = left.shape, left.strides
    per_group, r = heads // groups, weight.shape[0] // groups
    by_row, by_column = weight.strides
    if not lead:
        lead, steps = [1], [0]
    left = View(left.address, (groups, per_group, *lead, c), (per_group * by_head, by_head, *steps, by_channel))
    ones, zeros = (1,) * (len(lead) - 1), (0,) * (len(lead) - 1)
    extent, stride = (groups, per_group, *ones, r, c), (r * by_row, c * by_column, *zeros, by_row, by_column)
    return left, View(weight.address, extent, stride)


def _by_group(z: Any, lead: tuple[int, ...], groups: int) -> View:
    """z [..., groups * r] as [groups, 1, ..., r]."""
    flat = view(z)
    (*_, width), (*steps, step) = flat.shape, flat.strides
    r = width // groups
    return View(flat.address, (groups, 1, *lead, r), (r * step, 0, *steps, step))


def _inner(o: Any, wo_a: Any, groups: int, scale: Any, padding: int = 0) -> Any:
    """z, rounded to the dtype of o, and zeros beside it."""
    lead, rank = o.shape[:-2], wo_a.shape[0]
    z = empty(o, (*lead, rank + padding))
    z[..., rank:] = 0
    if scale is None:
        left, weight = _groups(o, wo_a, groups)
        contract(dtype_name(o), left, weight.T, _by_group(z[..., :rank], left.shape[2:-1], groups))
        return z
    (*steps, by_head, by_channel), heads = view(o).strides, o.shape[-2] // groups
    if o.shape[-1] == 1:  # whose stride says nothing
        by_channel = by_head
    if heads > 1 and by_head != o.shape[-1] * by_channel:
        o = o.contiguous() if hasattr(o, "contiguous") else np.ascontiguousarray(o)
        *steps, by_head, by_channel = view(o).strides
    weight, factors, target = view(wo_a), scales(scale), view(z)
    for group in range(groups):
        start = view(o).address + group * heads * by_head * o.itemsize
        left = View(start, (*(lead or (1,)), wo_a.shape[1]), (*(steps or (0,)), by_channel))
        for first, last in _bands(rank // groups * group, rank // groups * (group + 1)):
            beside = target.address + first * target.strides[-1] * z.itemsize
            out = View(beside, (*target.shape[:-1], last - first), target.strides)
            band = Scales(_from(factors.view, first // BLOCK, scale.itemsize), factors.coded)
            product(dtype_name(o), left, None, _from(weight, first, 1, last), band, dtype_name(z), out)
    return z


def _from(x: View, first: int, item: int, last: int | None = None) -> View:
    """Rows of a matrix, whose elements have `item` bytes."""
    rows = (x.shape[0] if last is None else last) - first
    return View(x.address + first * x.strides[0] * item, (rows, x.shape[1]), x.strides)


def _bands(first: int, last: int) -> list[tuple[int, int]]:
    """A range cut where it first meets a row of blocks, so that each part begins with one or lies within one."""
    cut = min(-(-first // BLOCK) * BLOCK, last)
    return [part for part in ((first, cut), (cut, last)) if part[0] < part[1]]


def grouped_output_projection_unsupported(
    o: Any, wo_a: Any, wo_b: Any, groups: int, wo_a_scale: Any, wo_b_scale: Any
) -> str | None:
    plain = wo_a_scale is None and wo_b_scale is None
    return None if plain or dtype_name(o) != "float64" else "FP8 weights with float64 activations"


@kernel(deterministic=True, batch_invariant=True)
def grouped_output_projection(
    o: Any, wo_a: Any, wo_b: Any, groups: int, wo_a_scale: Any, wo_b_scale: Any, out: Any
) -> None:
    """Both products with float32 sums; the vector between them is rounded to the input dtype, for FP8 then to codes."""
    rank = wo_a.shape[0]
    if wo_b_scale is None:
        z = _inner(o, wo_a, groups, wo_a_scale)  # a view holds no reference
        contract(dtype_name(out), view(z), view(wo_b).T, view(out))
        return
    z = _inner(o, wo_a, groups, wo_a_scale, -rank % BLOCK)
    codes = arrays.empty(z.shape, "uint8", z)
    factors = arrays.empty((*z.shape[:-1], z.shape[-1] // BLOCK), "uint8", z)
    fp8_quantize(z, BLOCK, True, "float8_e8m0fnu", (codes, factors))
    a, b = view(codes[..., :rank]), view(wo_b)
    product("uint8", a, scales(factors), b, scales(wo_b_scale), dtype_name(out), view(out))


def _plain(weight: Any, scale: Any, like: Any) -> Any:
    """A weight in the dtype of the activations."""
    if scale is None:
        return weight
    result = empty(like, weight.shape)
    fp8_dequantize(weight, scale, (BLOCK, BLOCK), dtype_name(like), result)
    return result


def grouped_output_projection_backward(
    grad: Any,
    o: Any,
    wo_a: Any,
    wo_b: Any,
    groups: int,
    wo_a_scale: Any,
    wo_b_scale: Any,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:
    """The chain rule through the same products; z is computed again and its gradient rounded to the input dtype.

    FP8 weights are expanded, and have no gradient.
    """
    wo_a, wo_b = _plain(wo_a, wo_a_scale, o), _plain(wo_b, wo_b_scale, o)
    name, g = dtype_name(grad), view(grad)
    for_o, _, _, for_a, for_b = needs
    wanted = zip((o, wo_a, wo_b), (for_o, for_a, for_b), strict=True)
    grads = tuple(empty(x, x.shape) if needed else None for x, needed in wanted)
    if for_b:
        z = _inner(o, wo_a, groups, None)
        contract(name, g.T, view(z), view(grads[2]))
    if for_o or for_a:
        inner = empty(grad, (*o.shape[:-2], wo_a.shape[0]))
        contract(name, g, view(wo_b), view(inner))
        left, weight = _groups(o, wo_a, groups)
        middle = _by_group(inner, left.shape[2:-1], groups)
        if for_o:
            contract(name, middle, weight, _groups(grads[0], wo_a, groups)[0])
        if for_a:
            contract(name, middle.T, left, _groups(o, grads[1], groups)[1])
    return grads[0], None, None, *grads[1:]
