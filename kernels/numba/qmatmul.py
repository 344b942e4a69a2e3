"""FP8 activations times FP8 and FP4 weights on the CPU; the loops are in `_qmatmul`."""

from __future__ import annotations

from typing import Any

from flagops.arrays import dtype_name
from flagops.registry import kernel

from ._coded_pairs import BYTES
from ._gemm import view
from ._ir import PAIRS
from ._qmatmul import product, scales


@kernel(deterministic=True, batch_invariant=True, paired=BYTES, note="weights decoded in registers")
def fp8_matmul(a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: str, out: Any) -> None:
    """A code shifted by 7 bits is a float16, and the scales of both sides go into the row of activations; or a code is
    looked up among the 128 magnitudes under its scale, which bfloat16 holds."""
    _product(a, a_scale, b, b_scale, out)


@kernel(deterministic=True, batch_invariant=True, paired=PAIRS, note="weights decoded in registers")
def fp4_matmul(a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: str, out: Any) -> None:
    """A nibble is looked up among the 16 products of its scale; bfloat16 holds them, and the activations
    unless these or `a_scale` are wider."""
    _product(a, a_scale, b, b_scale, out)


def _product(a: Any, a_scale: Any, b: Any, b_scale: Any, out: Any) -> None:
    factors = None if a_scale is None else scales(a_scale)
    narrow = dtype_name(a) == "bfloat16" if factors is None else factors.coded
    product(dtype_name(a), view(a), factors, view(b), scales(b_scale), dtype_name(out), view(out), narrow=narrow)
