"""Torch's fused operators of transformers in terms of flagops': norms, attention, grouped and FP8 products.

`rms_norm` and `scaled_dot_product_attention` are composite in torch: what they consist of has the gradients. They are
replaced above autograd, by operators with a backward of their own; the others below it, as matrix products are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flagops import config, dispatch, registry
from flagops.aten import Pass
from flagops.errors import Unsupported
from flagops.interpose import Counter, Registration, thread

if TYPE_CHECKING:
    from torch import Tensor

OPERATORS = {
    "rms_norm": "rms_norm",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
    "_grouped_mm": "grouped_matmul",
    "_scaled_mm": "fp8_matmul",
}
"""Operators of aten and the flagops operator that computes them."""

COMPOSITE = ("rms_norm", "scaled_dot_product_attention")

Adapted = tuple[tuple[Any, ...], "Callable[[Tensor], Tensor]"]


def _same(x: Tensor) -> Tensor:
    return x


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Adapted:
    import torch

    axes = len(normalized_shape)
    shape = tuple(input.shape[input.dim() - axes :])
    if not axes or tuple(normalized_shape) != shape or (weight is not None and tuple(weight.shape) != shape):
        raise Pass("shapes that torch refuses")
    if not input.is_floating_point():
        raise Pass(f"dtype {str(input.dtype).removeprefix('torch.')}")
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if axes == 1:
        return (input, weight, eps, False), _same
    flat = input.reshape(*input.shape[: input.dim() - axes], math.prod(shape))
    return (flat, None if weight is None else weight.reshape(-1), eps, False), lambda y: y.view(input.shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Adapted:
    if dropout_p:
        raise Pass("dropout")
    rank = query.dim()
    if rank < 2 or rank != key.dim() or rank != value.dim():
        raise Pass("shapes that torch refuses")
    if attn_mask is not None and is_causal:
        raise Pass("a mask beside is_causal")
    if rank == 2:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise Pass("shapes that torch refuses")
    heads = {x.shape[-3] for x in (query, key, value)}
    if key.shape[-3] != value.shape[-3] or (len(heads) > 1 and not enable_gqa):
        raise Pass("heads that differ without enable_gqa")
    if attn_mask is not None:
        if attn_mask.dim() > max(rank, 3):
            raise Pass("a mask of more axes than the query")
        while attn_mask.dim() < 3:
            attn_mask = attn_mask.unsqueeze(0)
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])
    return (query, key, value, attn_mask, is_causal, scale), _same if rank > 2 else lambda y: y.squeeze(0)


def _grouped(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Adapted:
    if self.dim() != 2 or mat2.dim() != 3 or offs is None:
        raise Pass("operands other than a matrix and a stack of them")
    if bias is not None or (out_dtype is not None and out_dtype != self.dtype):
        raise Pass("a bias or another result dtype")
    return (self, mat2, offs), _same


def _scaled(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: Any = None,
    use_fast_accum: bool = False,
) -> Adapted:
    if bias is not None or scale_result is not None or out_dtype is None:
        raise Pass("a bias, a scale of the result or a result in FP8")
    if self.dim() != 2 or mat2.dim() != 2 or self.shape[1] != mat2.shape[0]:
        raise Pass("shapes that torch refuses")
    (m, k), n = self.shape, mat2.shape[1]
    rows, depth = -(-n // 128), -(-k // 128)
    if scale_a.numel() == 1 and scale_b.numel() == 1:
        left, right = scale_a.reshape(1, 1).expand(m, depth), scale_b.reshape(1, 1).expand(rows, depth)
    elif tuple(scale_a.shape) == (m, depth) and tuple(scale_b.shape) == (depth, rows):
        left, right = scale_a, scale_b.t()
    else:
        raise Pass("scales of rows, or of blocks other than 1 x 128 and 128 x 128")
    return (self, left, mat2.t(), right, str(out_dtype).removeprefix("torch.")), _same


_ADAPT: dict[str, Callable[..., Adapted]] = {
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "_grouped_mm": _grouped,
    "_scaled_mm": _scaled,
}


class Site(Registration):
    """A fused operator that our kernels compute for the handles that want it."""

    composite = True

    def __init__(self, name: str, key: str) -> None:
        self.calls = Counter()
        self.shown = key.removeprefix("Autograd")
        super().__init__(name, key)

    def call(self) -> Callable[..., Any]:
        from flagops import override

        name, above = self.name, self.key.startswith("Autograd")
        operator, adapt = registry.operator(OPERATORS[name]), _ADAPT[name]

        def fused(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            handle = next((handle for handle in reversed(self.handles) if name in handle.ops), None)
            if thread.busy or handle is None:
                if not thread.busy:
                    self.calls.add()
                return self.torch(keyset, *args, **kwargs)
            if _traced(args[0]):
                return self.torch(keyset, *args, **kwargs)
            try:
                return override.compute(self, handle, operator, adapt, args, kwargs, above)
            except (Pass, Unsupported) as reason:
                handle.counter(self, "", str(reason))()
            return self.torch(keyset, *args, **kwargs)

        return fused


def _traced(x: Any) -> bool:
    """Whether a call is no computation of its own: tracing, transforms, and subclasses see what it consists of."""
    import torch

    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state():
        return True
    return x.device.type == "meta" or type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def plan(operator: Any, inputs: tuple[Any, ...], backend: Any, grad: bool) -> dispatch.Plan:
    """The plan for a call, or `Pass` with why torch's own operator should take it."""
    first = inputs[0]
    if not (backend or config.current().backend) and dispatch.left_to_torch(operator.name, first):
        raise Pass("torch's own kernel is faster on this device")
    try:
        chosen = dispatch.plan(operator, (*inputs, None), backend, grad)
        if chosen.check_values and operator.values:
            problem = operator.values(*inputs)
            if problem:
                raise Pass(problem)
    except (TypeError, ValueError) as error:
        raise Pass(str(error)) from None
    if chosen.forwards_to == "aten":
        raise Pass("torch's own kernel is the choice")
    return chosen
