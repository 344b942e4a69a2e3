"""The kernels that torch's attention is dispatched to on CUDA, called by graphs and by whoever names them: their
results beside the attention itself, and their backwards.

A backward makes what it needs again from the operands; what the forward saved for it, the logarithms of sums, is for
others, who put parts of a sequence together by them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flagops import config, dispatch
from flagops.arrays import parse_dtype

from ..lowering import REFUSED, Pass, lowers
from ..recipes import choose
from ..steps import Steps
from .movement import copied

if TYPE_CHECKING:
    from torch import Tensor

_CARD = "scaled_dot_product_attention"


def _attended(
    steps: Steps, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None,
    dropout_p: float, out: Tensor,
) -> Tensor:  # fmt: skip
    if dropout_p:
        raise Pass("dropout")
    return steps.run(_CARD, query, key, value, bias, is_causal, scale, out=out)


def _by_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises Pass for what are no tokens of heads, those of keys and values as many as queries have or shared."""
    alike = query.dim() == key.dim() == value.dim() == 4 and len(query) == len(key) == len(value)
    if not alike or key.shape[1:3] != value.shape[1:3] or query.shape[-1] != key.shape[-1]:
        raise Pass(REFUSED)
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise Pass(REFUSED)


def _logarithms(
    steps: Steps, query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None, out: Tensor
) -> Tensor:
    """``[B, H, L]``: of each query the logarithm of the sum of its weights, some rows of logits at a time."""
    import torch

    (batch, heads, length, width), count = query.shape, key.shape[2]
    real = torch.promote_types(query.dtype, torch.float32)
    kind = parse_dtype(real)
    shared = heads // key.shape[1]
    factor = width**-0.5 if scale is None else scale
    room = [x.new_empty(x.shape, dtype=real) for x in (query, key)]
    rows, keys = (copied(steps, x, made) for x, made in zip((query, key), room, strict=True))
    places = None
    if is_causal:
        places = query.new_empty(max(length, count), dtype=torch.int64)
        steps.run("aten.arange", steps.number(0), steps.number(1), len(places), "int64", out=places)
    together = max(1, config.budget() // max(4 * real.itemsize * batch * heads * count, 1))
    for start in range(0, length, together):
        part = rows[:, :, start : start + together]
        n = part.shape[2]
        logits = query.new_empty((batch, heads, n, count), dtype=real)
        for head in range(shared):  # those of a group lie apart as the others of theirs
            steps.run("matmul", part[:, head::shared], keys.mT, out=logits[:, head::shared])
        steps.run("aten.mul", logits, steps.number(float(factor)), kind, out=logits)
        if bias is not None:
            steps.run("aten.add", logits, bias[..., start : start + n, :], kind, 1, out=logits)
        if places is not None:
            hidden = query.new_empty((n, count), dtype=torch.bool)
            steps.run("aten.gt", places[:count], places[start : start + n, None], "int64", out=hidden)
            steps.run("aten.where", hidden, steps.number(-math.inf), logits, kind, out=logits)
        steps.run("aten.logsumexp", logits, "float32", out=out[..., start : start + n])
    return out


def _gradients(
    steps: Steps, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool,
    scale: float | None, dropout_p: float, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Those of query, key, value and bias, None for those that nobody needs."""
    if dropout_p:
        raise Pass("dropout")
    _by_heads(query, key, value)
    inputs = query, key, value, bias, is_causal, scale
    plan = choose(_CARD, (*inputs, grad.new_empty(grad.shape)), steps.backend)
    found = dispatch.backward(plan.operator, plan.kernel)(grad, *inputs, needs)
    steps.note(plan.backend)
    return [x if need else None for x, need in zip(found, needs, strict=True)]


def _expanded(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    try:
        return None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2])
    except RuntimeError:
        raise Pass(REFUSED) from None


@lowers("_scaled_dot_product_flash_attention", to=_CARD, whole=True)
def flash(
    steps: Steps,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Nothing is drawn, so seed and offset are what memory holds, as torch's are."""
    import torch

    _by_heads(query, key, value)
    if value.shape[-1] != query.shape[-1]:
        raise Pass(REFUSED)
    if return_debug_mask:
        raise Pass("the mask of a debugger")
    if is_causal and query.shape[2] != key.shape[2]:
        raise Pass("is_causal of as many keys as queries alone")  # which others align at the last
    out = _attended(steps, query, key, value, None, is_causal, scale, dropout_p, torch.empty_like(query))
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    _logarithms(steps, query, key, None, is_causal, scale, sums)
    seed, unused = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return out, sums, None, None, query.shape[2], key.shape[2], seed, unused, query.new_empty(0)


@lowers("_scaled_dot_product_flash_attention_backward", to=_CARD, whole=True)
def flash_backward(
    steps: Steps,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    import torch

    if is_causal and query.shape[2] != key.shape[2]:
        raise Pass("is_causal of as many keys as queries alone")
    needs = True, True, True, False
    found = _gradients(steps, grad_out, query, key, value, None, is_causal, scale, dropout_p, needs)
    laid = zip(found, (query, key, value), strict=False)
    return tuple(copied(steps, x, torch.empty_like(like)) for x, like in laid if x is not None)


@lowers("_scaled_dot_product_efficient_attention", to=_CARD, whole=True)
def efficient(
    steps: Steps,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Rows of logarithms end at multiples of 32 on NVIDIA's, the last ones being what memory holds."""
    import torch

    _by_heads(query, key, value)
    batch, heads, length, _ = query.shape
    bias = _expanded(attn_bias, query, key)
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    _attended(steps, query, key, value, bias, is_causal, scale, dropout_p, out)
    rows = (length if torch.version.hip else -(-length // 32) * 32) if compute_log_sumexp else 0
    sums = query.new_empty((batch, heads, rows), dtype=torch.float32)
    if compute_log_sumexp:
        _logarithms(steps, query, key, bias, is_causal, scale, sums[..., :length])
    seed, offset = (query.new_empty((), dtype=torch.int64) for _ in range(2))
    return out, sums, seed, offset


@lowers("_scaled_dot_product_efficient_attention_backward", to=_CARD, whole=True)
def efficient_backward(
    steps: Steps,
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Any,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients lie as tokens do; rows of that of a bias begin at multiples of 16."""

    bias = _expanded(attn_bias, query, key)
    needs = *map(bool, grad_input_mask[:3]), bool(grad_input_mask[3]) and attn_bias is not None
    found = _gradients(steps, grad_out_, query, key, value, bias, is_causal, scale, dropout_p, needs)
    made: list[Tensor | None] = []
    for x, like in zip(found, (query, key, value), strict=False):
        batch, heads, length, width = like.shape
        room = like.new_empty((batch, length, heads, width)).transpose(1, 2)
        made.append(None if x is None else copied(steps, x, room))
    if found[3] is None or attn_bias is None:
        return (*made, None)
    whole = found[3].sum_to_size(attn_bias.shape)
    room = attn_bias.new_empty((*attn_bias.shape[:-1], -(-attn_bias.shape[-1] // 16) * 16))
    return (*made, copied(steps, whole, room[..., : attn_bias.shape[-1]]))
