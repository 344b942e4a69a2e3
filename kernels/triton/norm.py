# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Root-mean-square normalisation on Triton: rows that fit are read once, longer ones twice."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._rows import rows
from ._common import launch, narrow, too_long, widen

LONGEST_TILE = 8192
"""Elements of a program's tile."""
TILE: dict[str, Any] = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8}


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Through a half type, as float32."""
    return widen(narrow(x, dtype))


@triton.jit(do_not_specialize=["eps_bits"])
def norm_kernel(
    x, weight, out, eps_bits, count, N, N1, N2,
    x_0, x_1, x_2, x_n, weight_n, out_0, out_1, out_2, out_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, WEIGHT: tl.constexpr, STEPWISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < count
    k, j, i = row % N2, row // N2 % N1, row // N2 // N1
    x += (i * x_0 + j * x_1 + k * x_2)[:, None]
    out += (i * out_0 + j * out_1 + k * out_2)[:, None]
    half: tl.constexpr = x.dtype.element_ty
    number: tl.constexpr = tl.float64 if half == tl.float64 else tl.float32
    summed: tl.constexpr = tl.float64 if STEPWISE else number
    eps = tl.cast(eps_bits, tl.int64).to(tl.float64, bitcast=True).to(number)  # a float argument would be float32
    column = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS,), summed)
    value = tl.zeros((ROWS, BLOCK), number)
    for first in range(0, N, BLOCK):
        at = first + column
        value = widen(tl.load(x + at.to(tl.int64)[None, :] * x_n, here[:, None] & (at < N)[None, :], other=0.0))
        square = value * value
        if STEPWISE:
            square = rounded(square, half).to(tl.float64)
        total += tl.sum(square, 1)
    if STEPWISE:
        mean = rounded((total / N).to(tl.float32), half)
        root = rounded(1 / tl.sqrt(rounded(mean + eps, half)), half)
    else:
        root = 1 / tl.sqrt(total / N + eps)
    for first in range(0, N, BLOCK):
        at = first + column
        inside = here[:, None] & (at < N)[None, :]
        if not WHOLE:
            value = widen(tl.load(x + at.to(tl.int64)[None, :] * x_n, inside, other=0.0))
        y = value * root[:, None]
        if STEPWISE:
            y = rounded(y, half)
        if WEIGHT:
            w = widen(tl.load(weight + at.to(tl.int64) * weight_n, at < N, other=0.0))
            y = w[None, :] * y
        tl.store(out + at.to(tl.int64)[None, :] * out_n, narrow(y, half), inside)


def rms_norm_unsupported(x: torch.Tensor, weight: torch.Tensor | None, eps: float, stepwise: bool) -> str | None:
    return too_long(x)


@kernel(deterministic=True, batch_invariant=True)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, stepwise: bool, out: torch.Tensor) -> None:
    """Several short rows share a program."""
    n = x.shape[-1]
    block = min(LONGEST_TILE, triton.next_power_of_2(max(n, 16)))
    together = max(1, TILE["BLOCK"] // block)
    lead = x.shape[:-1] if n else (0,)
    for (source, target), (n0, n1, n2), (steps, to) in rows(lead, x.stride()[:-1], out.stride()[:-1]):
        count = n0 * n1 * n2
        launch(
            norm_kernel, (triton.cdiv(count, together),), out.device,
            x.as_strided((1,), (1,), x.storage_offset() + source), weight,
            out.as_strided((1,), (1,), out.storage_offset() + target), int(np.float64(eps).view(np.int64)),
            count, n, n1, n2, *steps, x.stride(-1), 0 if weight is None else weight.stride(0), *to, out.stride(-1),
            ROWS=together, BLOCK=block, WHOLE=n <= block, WEIGHT=weight is not None,
            STEPWISE=stepwise and x.itemsize == 2, num_warps=16 if x.itemsize == 8 else 8,
        )  # fmt: skip
