"""Torch's fused operators of transformers in terms of flagops': norms, attention, grouped and FP8 products.

`rms_norm` and `scaled_dot_product_attention` are composite in torch: what they consist of has the gradients. Ours have
a backward of their own, and hand what that cannot do (second derivatives, transforms) to what torch composes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from flagops import config
from flagops.arrays import parse_dtype

from ..lowering import REFUSED, Call, Lowered, Pass, Result, To, lowers

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


def _by_rows(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Result:
    """Row by row, but for images, which may lie channels last."""
    normalized, axes = tuple(normalized_shape), len(normalized_shape)
    if not axes or normalized != tuple(input.shape[-axes:]) or (weight is not None and weight.shape != normalized):
        raise Pass(REFUSED)
    return None if input.dim() > 3 and not input.is_contiguous() else (tuple(input.shape), None)


@lowers("rms_norm", to="rms_norm", composite=True, result=_by_rows)
def rms_norm(
    to: To, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Lowered:
    import torch

    if not input.is_floating_point():
        raise Pass(f"dtype {parse_dtype(input.dtype)}")
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    axes = len(normalized_shape)
    if axes == 1:
        return to("rms_norm", input, weight, eps, False)
    shape = (*input.shape[: input.dim() - axes], math.prod(normalized_shape))
    factors = None if weight is None else weight.reshape(-1)
    try:
        flat, out = input.view(shape), to.out.view(shape)
    except RuntimeError:
        return partial(_copied, to, input, shape, factors, eps)
    return to("rms_norm", flat, factors, eps, False, out=out)


def _copied(to: To, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float) -> None:
    """Rows of axes that are no view as one."""
    if 2 * input.numel() * input.element_size() > config.budget():
        raise Pass("its temporaries are beyond the budget")
    made = input.new_empty(shape)
    to.run("rms_norm", input.reshape(shape), weight, eps, False, out=made)
    to.out.copy_(made.view(to.out.shape))


@lowers("_fused_rms_norm", to="rms_norm", whole=True)
def fused_rms_norm(
    to: Steps, input: Tensor, normalized_shape: Any, weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """What torch's `rms_norm` is made of where a device has it in one kernel: the norm, and what divided the rows."""
    import torch

    _by_rows(input, normalized_shape, weight)
    acc, axes = torch.promote_types(input.dtype, torch.float32), len(normalized_shape)
    eps = torch.finfo(acc).eps if eps is None else eps
    lead = input.shape[: input.dim() - axes]
    rows = input.reshape(*lead, math.prod(normalized_shape))
    y = input.new_empty(rows.shape)
    to.run("rms_norm", rows, None if weight is None else weight.reshape(-1), eps, False, out=y)
    rstd = (rows.to(acc).square().mean(-1) + eps).rsqrt()
    return y.view(input.shape), rstd.view(*lead, *[1] * axes)


@lowers("_fused_rms_norm_backward", to="rms_norm", whole=True)
def fused_rms_norm_backward(
    to: Steps,
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Any,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Any,
) -> tuple[Tensor | None, Tensor | None]:
    import torch

    _by_rows(input, normalized_shape, weight)
    acc = torch.promote_types(input.dtype, torch.float32)
    n = math.prod(normalized_shape)
    grad, rows = (x.reshape(-1, n).to(acc) for x in (grad_out, input))
    root, dtype = rstd.reshape(-1, 1).to(acc), parse_dtype(acc)
    y = rows * root
    slope = grad if weight is None else grad * weight.reshape(-1).to(acc)
    inward = to.run("aten.sum", slope * y, dtype, out=rows.new_empty(len(rows))).unsqueeze(-1) / n
    dx = ((slope - y * inward) * root).to(input.dtype).view(input.shape)
    if weight is None or not output_mask[1]:
        return dx if output_mask[0] else None, None
    dweight = to.run("aten.sum", (grad * y).t(), dtype, out=rows.new_empty(n))
    return dx if output_mask[0] else None, dweight.to(weight.dtype).view(weight.shape)


def _sdpa_switches() -> tuple[Callable[[], bool], ...]:
    import torch

    return torch._C._get_flash_sdp_enabled, torch._C._get_overrideable_sdp_enabled


def _as_query(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False, **rest: Any) -> Result:
    """Torch's fused kernels lay their result out as the query; the composed one as it is shaped."""
    import torch

    rank = query.dim()
    if rank < 2 or rank != key.dim() or rank != value.dim():
        raise Pass("operands of different ranks, or without tokens")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise Pass(REFUSED)
    if any(x.shape[:-3] != query.shape[:-3] for x in (key, value)):
        raise Pass("batches that differ")
    heads = {x.shape[-3] for x in (query, key, value)} if rank > 2 else {1}
    if rank > 2 and (key.shape[-3] != value.shape[-3] or (len(heads) > 1 and not enable_gqa)):
        raise Pass("heads that differ without enable_gqa")
    fused = _is_fused(query, key=key, value=value, enable_gqa=enable_gqa, **rest)
    return (*query.shape[:-1], value.shape[-1]), torch.empty_like(query, device="meta").stride() if fused else None


def _is_fused(query: Tensor, **rest: Any) -> bool:
    """Whether torch has one kernel for the call; devices other than its own compose it, and have nobody to ask."""
    import torch

    return query.device.type in ("cpu", "cuda") and torch._fused_sdp_choice(query, **rest) > 0


def _as_tokens(query: Tensor, key: Tensor, **rest: Any) -> dict[str, tuple[int, ...]]:
    """The CPU's fused kernel has gradients of all heads of a token side by side; others lie as they are shaped, but
    that of a product with the transposed key is transposed, unless it is summed over heads that share it."""
    axes, names = tuple(range(query.dim())), ("query", "key", "value")
    if _is_fused(query, key=key, **rest):
        return dict.fromkeys(names, (0, 2, 1, 3)) if query.device.type == "cpu" else {}
    transposed = len(axes) > 2 and key.shape[-3] == query.shape[-3]
    return dict.fromkeys(names, axes) | ({"key": (*axes[:-2], axes[-1], axes[-2])} if transposed else {})


@lowers(
    "scaled_dot_product_attention",
    to="scaled_dot_product_attention",
    composite=True,
    state=_sdpa_switches,
    result=_as_query,
    gradients=_as_tokens,
)
def attention(
    to: To,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    if dropout_p:
        raise Pass("dropout")
    if not any(on() for on in _sdpa_switches()):
        raise Pass("sdpa_kernel asks for torch's own")
    if attn_mask is not None and is_causal:
        raise Pass("a mask beside is_causal")
    rank, out = query.dim(), to.out
    if rank == 2:
        query, key, value, out = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), out.unsqueeze(0)
    if attn_mask is not None:
        if attn_mask.dim() > max(rank, 3):
            raise Pass("a mask of more axes than the query")
        while attn_mask.dim() < 3:
            attn_mask = attn_mask.unsqueeze(0)
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])
    return to("scaled_dot_product_attention", query, key, value, attn_mask, is_causal, scale, out=out)


def _grouped_like(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Result:
    """Torch's kernel takes more dtypes than its shape function; rows of a result begin at multiples of 16 bytes."""
    ranks = self.dim(), mat2.dim()
    if not {*ranks} <= {2, 3} or self.shape[-1] != mat2.shape[-2] or (offs is None) != (ranks == (3, 3)):
        raise Pass(REFUSED)
    if bias is not None or (out_dtype is not None and out_dtype != self.dtype):
        raise Pass("a bias or another result dtype")
    groups = self.shape[0] if ranks[0] == 3 else mat2.shape[0] if ranks[1] == 3 else len(offs)  # type: ignore[arg-type]
    if ranks == (3, 3) and len(self) != len(mat2):
        raise Pass(REFUSED)
    if offs is not None and tuple(offs.shape) != (groups,):
        raise Pass(REFUSED)
    step = 16 // self.element_size()
    for x in (self, mat2):
        unit = [i for i in (-2, -1) if x.stride(i) == 1 and x.stride(-3 - i) >= max(1, x.shape[i])]
        if not unit or any(stride % step for stride in x.stride() if stride != 1):
            raise Pass(REFUSED)
    m, n = self.shape[-2], mat2.shape[-1]
    row = -(-n // step) * step
    return ((m, n), (row, 1)) if ranks[0] != ranks[1] else ((groups, m, n), (m * row, row, 1))


@lowers("_grouped_mm", to="grouped_matmul", result=_grouped_like)
def grouped(
    to: To, self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Lowered:
    if offs is None:
        return to("matmul", self, mat2)
    if mat2.dim() == 3:
        return to("grouped_matmul", self, mat2, offs)
    if self.dim() == 3:  # whose columns are the rows of the transposed product
        return to("grouped_matmul", mat2.t(), self.mT, offs, out=to.out.t())
    if self.device.type == "cuda":
        raise Pass("groups of what is summed over, which the host would have to wait for")
    return partial(_summed_by_group, to, self, mat2, offs)


def _summed_by_group(to: To, self: Tensor, mat2: Tensor, offs: Tensor) -> None:
    """A product for each group of columns of the one and rows of the other, as gradients of experts' weights are."""
    start = 0
    for out, end in zip(to.out, offs.tolist(), strict=True):
        to.run("matmul", self[:, start:end], mat2[start:end], out=out)
        start = end


def _scaled_like(self: Tensor, mat2: Tensor, out_dtype: Any = None, **_: Any) -> Result:
    """On a CPU torch takes factors of any strides, which its shape function refuses."""
    if self.device.type == "cuda":
        return None
    if self.dim() != 2 or mat2.dim() != 2 or self.shape[1] != mat2.shape[0]:
        raise Pass(REFUSED)
    return (self.shape[0], mat2.shape[1]), None, out_dtype or self.dtype


@lowers("_scaled_mm", to="fp8_matmul", result=_scaled_like, factors=("self", "mat2"))
def scaled(
    to: To,
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: Any = None,
    use_fast_accum: bool = False,
) -> Lowered:
    (m, k), n = self.shape, mat2.shape[1]
    rows, depth = -(-n // 128), -(-k // 128)
    columns = None
    if scale_a.numel() == 1 and scale_b.numel() == 1:
        left, right = scale_a.reshape(1, 1).expand(m, depth), scale_b.reshape(1, 1).expand(rows, depth)
    elif tuple(scale_a.shape) == (m, depth) and tuple(scale_b.shape) == (depth, rows):
        left, right = scale_a, scale_b.t()
    elif tuple(scale_a.shape) == (m, 1) and tuple(scale_b.shape) == (1, n):
        if not (scale_a.is_contiguous() and scale_b.is_contiguous()):
            raise Pass(REFUSED)
        left, right, columns = scale_a.expand(m, depth), scale_b.new_ones(1, 1).expand(rows, depth), scale_b
        # a scale of a column multiplies sums
    else:
        raise Pass("scales other than one, one of a row and a column, or of blocks of 1 x 128 and 128 x 128")
    wide = to.out.element_size() > 1
    if wide and columns is None and bias is None:
        return to("fp8_matmul", self, left, mat2.t(), right, parse_dtype(to.out.dtype))
    return partial(
        _scaled_sums,
        to,
        (self, left, mat2.t(), right),
        columns,
        bias,
        None if wide or out_dtype is None else scale_result,
    )


def _scaled_sums(
    to: To, inputs: tuple[Tensor, ...], columns: Tensor | None, bias: Tensor | None, divisor: Tensor | None
) -> None:
    """Sums in float32, times the scales of columns, plus a bias, over the scale of a result in FP8; one rounding."""
    import torch

    if 4 * to.out.numel() > config.budget():
        raise Pass("its temporaries are beyond the budget")
    total = torch.empty(to.out.shape, dtype=torch.float32, device=to.out.device)
    to.run("fp8_matmul", *inputs, "float32", out=total)
    if columns is not None:
        total.mul_(columns)
    if bias is not None:
        total.add_(bias)
    if divisor is not None:
        total.div_(divisor)
    to.out.copy_(total)
