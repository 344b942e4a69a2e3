"""DeepSeek-V4's two-step output projection on the CPU: per-group `wo_a`, then `wo_b`."""

from __future__ import annotations

from typing import Any

from flagops.arrays import dtype_name
from flagops.registry import kernel

from ._gemm import View, contract, empty, view


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


def _inner(o: Any, wo_a: Any, groups: int) -> Any:
    """z, rounded to the dtype of o."""
    left, weight = _groups(o, wo_a, groups)
    z = empty(o, (*o.shape[:-2], wo_a.shape[0]))
    contract(dtype_name(o), left, weight.T, _by_group(z, left.shape[2:-1], groups))
    return z


@kernel(deterministic=True, batch_invariant=True)
def grouped_output_projection(o: Any, wo_a: Any, wo_b: Any, groups: int, out: Any) -> None:
    """Both products with float32 sums; the vector between them is rounded to the input dtype."""
    z = _inner(o, wo_a, groups)  # a view holds no reference
    contract(dtype_name(out), view(z), view(wo_b).T, view(out))


def grouped_output_projection_backward(
    grad: Any, o: Any, wo_a: Any, wo_b: Any, groups: int, needs: tuple[bool, ...]
) -> tuple[Any, ...]:
    """The chain rule through the same products; z is computed again and its gradient rounded to the input dtype."""
    name, g = dtype_name(grad), view(grad)
    grads = tuple(empty(x, x.shape) if needed else None for x, needed in zip((o, wo_a, wo_b), needs, strict=True))
    if needs[2]:
        z = _inner(o, wo_a, groups)
        contract(name, g.T, view(z), view(grads[2]))
    if needs[0] or needs[1]:
        inner = empty(grad, (*o.shape[:-2], wo_a.shape[0]))
        contract(name, g, view(wo_b), view(inner))
        left, weight = _groups(o, wo_a, groups)
        middle = _by_group(inner, left.shape[2:-1], groups)
        if needs[0]:
            contract(name, middle, weight, _groups(grads[0], wo_a, groups)[0])
        if needs[1]:
            contract(name, middle.T, left, _groups(o, grads[1], groups)[1])
    return grads
