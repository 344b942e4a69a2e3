"""Samples of the judge's own, as OpInfos, for products that torch's CPU computes and PyTorch's samples do not reach."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.testing import make_tensor
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

FP8 = torch.float8_e4m3fn


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """``torch._grouped_mm``, which has no float64: there its definition."""
    if a.dtype != torch.float64:
        return torch._grouped_mm(a, b, offs=offs, out_dtype=out_dtype)
    if offs is None:
        return a @ b
    ends = offs.tolist()
    spans = [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    if a.dim() == b.dim():
        return torch.stack([a[:, span] @ b[span] for span in spans])
    if a.dim() == 2:
        return torch.cat([a[span] @ one for span, one in zip(spans, b, strict=True)])
    return torch.cat([one @ b[:, span] for span, one in zip(spans, a, strict=True)], 1)


def _grouped_samples(op: Any, device: str, dtype: torch.dtype, requires_grad: bool, **_: Any) -> Iterator[SampleInput]:
    ends = torch.tensor((8, 8, 24), dtype=torch.int32)
    for a, b, offs in (
        ((24, 16), (3, 16, 40), ends),
        ((3, 8, 16), (3, 16, 40), None),
        ((8, 24), (24, 40), ends),
        ((3, 8, 16), (16, 24), ends),
        ((24, 16), (3, 16, 5), ends),
    ):
        left, right = (
            make_tensor(shape, dtype=dtype, device=device, low=-1, high=1, requires_grad=requires_grad)
            for shape in (a, b)
        )
        if b[-1] == 5:  # rows that do not begin at multiples of 16 bytes lie along the other axis
            right = right.detach().mT.contiguous().mT.requires_grad_(requires_grad)
        yield SampleInput(left, args=(right, offs))


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torch._scaled_mm`` of the FP8 next to ``a`` and the rows of ``b``; in float64 their product as they are."""
    if a.dtype == torch.float64:
        result = (a * scale_a) @ (b.t() * scale_b) + (0 if bias is None else bias)
        return result if out is None else out.resize_(result.shape).copy_(result)
    given = a.to(FP8), b.to(FP8).t(), scale_a, scale_b, bias, None, out_dtype
    return torch._scaled_mm(*given) if out is None else torch._scaled_mm(*given, out=out)


def _scaled_samples(op: Any, device: str, dtype: torch.dtype, requires_grad: bool, **_: Any) -> Iterator[SampleInput]:
    for (m, n, k), rows, biased in itertools.product(((16, 32, 256), (1, 48, 16)), (False, True), (False, True)):
        a, b = (torch.randn(shape, device=device).to(FP8).float() for shape in ((m, k), (n, k)))
        scales = (torch.rand(m, 1), torch.rand(1, n)) if rows else (torch.rand(()), torch.rand(()))
        bias = torch.randn(n) if biased else None
        yield SampleInput(a, args=(b, *scales, bias), kwargs={"out_dtype": dtype})


OWN = [
    OpInfo(
        "_grouped_mm",
        op=grouped_mm,
        dtypes={torch.float32, torch.bfloat16, torch.float16},
        sample_inputs_func=_grouped_samples,
        supports_out=False,
    ),
    OpInfo(
        "_scaled_mm",
        op=scaled_mm,
        dtypes={torch.float32, torch.bfloat16, torch.float16},
        sample_inputs_func=_scaled_samples,
        supports_autograd=False,
    ),
]
