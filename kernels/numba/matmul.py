"""Matrix products on the CPU; the loops are in `_gemm`."""

from __future__ import annotations

from typing import Any

from flagops.arrays import dtype_name
from flagops.backends.numba import pointer, strides
from flagops.registry import kernel

from ._gemm import contract, empty, ones, view
from ._ir import PAIRS


@kernel(deterministic=True, batch_invariant=True, paired=PAIRS)
def matmul(a: Any, b: Any, out: Any) -> None:
    """Sums in float32 (float64 for float64) and one rounding; half floats are widened in tiles, never as a whole."""
    contract(dtype_name(out), view(a), view(b), view(out), paired=True)


def matmul_backward(grad: Any, a: Any, b: Any, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """grad b^T and a^T grad, summed over broadcast axes inside the product, with one rounding."""
    name, g, left, right = dtype_name(grad), view(grad), view(a), view(b)
    grads = tuple(empty(x, x.shape) if needed else None for x, needed in zip((a, b), needs, strict=True))
    if needs[0]:
        contract(name, g, right.T, view(grads[0]), paired=True)
    if needs[1]:
        contract(name, left.T, g, view(grads[1]), paired=True)
    return grads


@kernel(deterministic=True, batch_invariant=True, paired=PAIRS)
def linear(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """The same sums as `matmul`; a block of rows reads the weight once, and the weight is never repacked as a whole."""
    extra = (0, 0) if bias is None else (pointer(bias), strides(bias)[0])
    contract(dtype_name(out), view(x), view(weight).T, view(out), extra, paired=True)


def linear_backward(grad: Any, x: Any, weight: Any, bias: Any, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """grad W, grad^T x and the sum of grad over its rows."""
    name, g = dtype_name(grad), view(grad)
    grads = tuple(empty(y, y.shape) if needed else None for y, needed in zip((x, weight, bias), needs, strict=True))
    if needs[0]:
        contract(name, g, view(weight), view(grads[0]), paired=True)
    if needs[1]:
        contract(name, g.T, view(x), view(grads[1]), paired=True)
    if needs[2]:
        contract(name, ones(name, g.shape[-2]), g, view(grads[2]), paired=True)
    return grads


_LOW = {"int16": "low16", "int8": "low8", "uint8": "low8"}  # the low bits of sums in int32, whatever the sign


@kernel(deterministic=True, batch_invariant=True)
def integer_matmul(a: Any, b: Any, out: Any) -> None:
    """The loops of `matmul`, with sums in int32 or int64 that wrap around."""
    name = dtype_name(out)
    contract(_LOW.get(name, name), view(a), view(b), view(out))
