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
from torch.utils.weak import WeakTensorKeyDictionary

from flagops.errors import Unsupported
from flagops.tools.baseline import Packed

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GATHERED = 256 << 20
"""Bytes of keys that the eager attention gathers at a time; all at once they would not fit in memory."""


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.matmul(a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def grouped_output_projection(
    o: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    groups: int,
    wo_a_scale: Tensor | None,
    wo_b_scale: Tensor | None,
    out: Tensor,
) -> None:
    """As transformers does it: a batched product over groups, then a linear layer; FP8 weights expanded before."""
    wo_a = wo_a if wo_a_scale is None else expanded(wo_a, wo_a_scale, (128, 128))
    wo_b = wo_b if wo_b_scale is None else expanded(wo_b, wo_b_scale, (128, 128))
    grouped = o.reshape(-1, groups, wo_a.shape[1]).transpose(0, 1)
    inner = torch.bmm(grouped, wo_a.view(groups, -1, wo_a.shape[1]).transpose(1, 2))
    z = inner.transpose(0, 1).reshape(*o.shape[:-2], wo_a.shape[0])
    out.copy_(F.linear(z if wo_b_scale is None else _through_fp8(z), wo_b))


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


def fp8_matmul(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> None:
    """torch's product of what both sides are in bfloat16, codes expanded before."""
    x = a if a_scale is None else expanded(a, a_scale, (1, 128))
    torch.matmul(x, expanded(b, b_scale, (128, 128)).T, out=out)


def fp4_matmul(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> None:
    """torch's product of what both sides are in bfloat16, codes expanded before."""
    x = a if a_scale is None else expanded(a, a_scale, (1, 128))
    torch.matmul(x, expanded(b, b_scale, (1, 32)).T, out=out)


def _through_fp8(x: Tensor) -> Tensor:
    """Quantised in blocks of 128, and back."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def expanded(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """FP8 or packed FP4 in bfloat16, kept for as long as the codes are."""
    if codes not in _kept:
        columns = codes.shape[-1] * 2 if block[1] == 32 else codes.shape[-1]
        out = torch.empty(*codes.shape[:-1], columns, dtype=torch.bfloat16, device=codes.device)
        if block[1] == 32:
            fp4_dequantize(codes, scale, "bfloat16", out)
        else:
            fp8_dequantize(codes, scale.expand(-(-len(codes) // block[0]), -1), block, "bfloat16", out)
        _kept[codes] = out
    return _kept[codes]


def experts_expanded(
    x: Tensor, gate_up: Tensor, down: Tensor, gate_up_scale: Tensor | None, down_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights of all experts in the dtype of ``x``, in which bfloat16 holds FP8 and FP4 under powers of two."""
    if gate_up_scale is None or down_scale is None:
        return gate_up, down
    block = (128, 128) if gate_up.shape[2] == x.shape[1] else (1, 32)
    return _stack(gate_up, gate_up_scale, block), _stack(down, down_scale, block)


def _stack(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    return torch.stack([expanded(c, s, block) for c, s in zip(codes.view(torch.uint8), scales, strict=True)])


_kept: Any = WeakTensorKeyDictionary()


def _prepared(baseline: Callable[..., Any], *pairs: tuple[int, int, tuple[int, int]]) -> Callable[..., Any]:
    """A baseline whose codes, given by their positions and those of their scales, are expanded before it is timed."""

    def prepare(*inputs: Any) -> None:
        for codes, scale, block in pairs:
            if inputs[scale] is not None:
                expanded(inputs[codes], inputs[scale], block)

    baseline.prepare = prepare  # type: ignore[attr-defined]
    return baseline


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


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, stepwise: bool, out: Tensor) -> Tensor:
    if stepwise:
        raise Unsupported("torch.nn.functional.rms_norm does not round after every step")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float | None, out: Tensor) -> Tensor:
    """In float32, as the operator is defined."""
    g, u = gate.float(), up.float()
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    h = F.silu(g) * u
    return (h if weight is None else h * weight[..., None]).to(gate.dtype)


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor) -> Tensor:
    return (post[..., None] * y[..., None, :] + comb.mT @ x.float()).to(y.dtype)


def grouped_matmul(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    result = torch._grouped_mm(a, b, offs=offsets.int())
    result[offsets[-1] :] = 0  # which torch leaves as they were allocated
    return result


def int8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: str, out: Tensor) -> Tensor:
    return (torch._int_mm(a, b.T).float() * a_scale * b_scale.T).to(out.dtype)


def _ready_experts(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, gate_up_scale: Any, down_scale: Any,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return experts_expanded(x, gate_up, down, gate_up_scale, down_scale)


def moe_experts(ready: tuple[Tensor, Tensor], x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """Each expert that was selected, with the rows that go there; its sums in float32."""
    limit, shared, _ = rest[-3:]
    result = torch.zeros(x.shape, device=x.device) if shared is None else shared.float()
    for expert in indices.unique().tolist():
        rows, slots = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], ready[0][expert]).chunk(2, dim=-1)
        h = swiglu(gate, up, weights[rows, slots], limit, x)
        result.index_add_(0, rows, F.linear(h, ready[1][expert]).float())
    return result.to(x.dtype)


def _held_experts(x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> list[Any]:
    """Bfloat16 products with expanded weights."""
    return [x, weights, indices, *experts_expanded(x, *rest[:4]), None, None, *rest[4:]]


def _scales(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else scale.view(torch.float8_e8m0fnu).float()


@cache
def _fp4_table() -> Tensor:
    return torch.tensor(FP4)


BASELINES: dict[str, dict[str, Callable[..., Any]]] = {
    "matmul": {"torch.matmul": matmul},
    "linear": {"torch linear": linear},
    "grouped_matmul": {"torch grouped_mm": grouped_matmul},
    "int8_matmul": {"torch int_mm, scale": int8_matmul},
    "rms_norm": {"torch rms_norm": rms_norm},
    "swiglu": {"torch silu, multiply": swiglu},
    "hc_post": {"torch matmul, add": hc_post},
    "moe_experts": {
        "torch linear by expert": Packed(_ready_experts, moe_experts, _held_experts, "activations stay bfloat16")
    },
    "grouped_output_projection": {
        "torch bmm, linear": _prepared(grouped_output_projection, (1, 4, (128, 128)), (2, 5, (128, 128)))
    },
    "fp4_dequantize": {"torch table lookup": fp4_dequantize},
    "fp8_dequantize": {"torch cast, scale": fp8_dequantize},
    "sparse_attention": {"torch eager gather": sparse_attention},
    "fp8_matmul": {"torch bfloat16, expanded": _prepared(fp8_matmul, (0, 1, (1, 128)), (2, 3, (128, 128)))},
    "fp4_matmul": {"torch bfloat16, expanded": _prepared(fp4_matmul, (0, 1, (1, 128)), (2, 3, (1, 32)))},
}
