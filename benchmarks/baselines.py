"""What people run today, as yardsticks: torch's own operators, and the idioms where torch has none.

`BASELINES` holds, for each operator, functions of its inputs and ``out`` by name; ratios are to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GATHERED = 256 << 20
"""Bytes of keys that the eager attention gathers at a time; all at once they would not fit in memory."""


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.matmul(a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(F.linear(x, weight, bias))


def grouped_output_projection(o: Tensor, wo_a: Tensor, wo_b: Tensor, groups: int, out: Tensor) -> None:
    """As transformers does it: a batched product over groups, then a linear layer."""
    grouped = o.reshape(-1, groups, wo_a.shape[1]).transpose(0, 1)
    inner = torch.bmm(grouped, wo_a.view(groups, -1, wo_a.shape[1]).transpose(1, 2))
    out.copy_(F.linear(inner.transpose(0, 1).reshape(*o.shape[:-2], wo_a.shape[0]), wo_b))


def fp4_dequantize(packed: Tensor, scale: Tensor, dtype: str, out: Tensor) -> None:
    """Each nibble indexes the table of values; the pairs are stacked and scaled."""
    table = _fp4_table()
    codes = packed.view(torch.uint8)
    values = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), dim=-1).view(len(packed), -1, 32)
    out.copy_((values * _scales(scale)[..., None]).view(out.shape))


def fp8_dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: str, out: Tensor) -> None:
    """Codes cast to float32, times the scales of their blocks repeated."""
    rows, columns = weight.shape
    scales = _scales(scale).repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    out.copy_(weight.view(torch.float8_e4m3fn).float() * scales)


def sparse_attention(q: Tensor, kv: Tensor, sink: Tensor | None, indices: Tensor, scale: float, out: Tensor) -> None:
    """Gather the listed keys, softmax over them and the sink, for as many queries at a time as fit."""
    step = max(1, GATHERED // max(indices.shape[-1] * kv.shape[-1] * kv.element_size(), 1))
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1], step):
            part = slice(start, start + step)
            listed = indices[b, part].long()
            rows = kv[b][listed.clamp(min=0)]
            logits = (q[b, part] @ rows.transpose(1, 2)).float() * scale
            logits = logits.masked_fill((listed < 0)[:, None], float("-inf"))
            if sink is not None:
                logits = torch.cat((logits, sink[:, None].expand(*logits.shape[:2], 1).float()), -1)
            p = torch.softmax(logits, -1)[..., : listed.shape[1]]
            out[b, part] = p.to(q.dtype) @ rows


def _scales(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else scale.view(torch.float8_e8m0fnu).float()


@cache
def _fp4_table() -> Tensor:
    return torch.tensor(FP4)


BASELINES: dict[str, dict[str, Callable[..., Any]]] = {
    "matmul": {"torch.matmul": matmul},
    "linear": {"torch linear": linear},
    "grouped_output_projection": {"torch bmm, linear": grouped_output_projection},
    "fp4_dequantize": {"torch table lookup": fp4_dequantize},
    "fp8_dequantize": {"torch cast, scale": fp8_dequantize},
    "sparse_attention": {"torch eager gather": sparse_attention},
}
