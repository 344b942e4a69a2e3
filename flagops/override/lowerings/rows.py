"""Torch's softmax, normalisations and the loss of likelihoods by cards of rows: the axis in question is moved last.

Calls with several results are computed whole: their parts are cards, and torch's own operators, which are ours too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flagops.arrays import HALF, parse_dtype

from ..destinations import overlaps_itself
from ..lowering import REFUSED, Call, Pass, To, lowers
from ._views import last
from .pointwise import real

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps

NONE, MEAN = 0, 1  # torch's numbers of reductions; 2 is the sum


def _floats(*tensors: Tensor) -> None:
    for x in tensors:
        real(x.dtype)
        if not x.dtype.is_floating_point:
            raise Pass(f"dtype {parse_dtype(x.dtype)}")


def _softmax(name: str) -> None:
    @lowers(name, to=f"aten.{name}")
    def softmax(to: To, self: Tensor, dim: int, half_to_float: bool) -> Call:
        _floats(self)
        return to(f"aten.{name}", last(self, dim), parse_dtype(to.out.dtype), out=last(to.out, dim))

    backward = f"{name}_backward_data"

    @lowers(backward, to=f"aten.{backward}")
    def softmax_backward(to: To, grad_output: Tensor, output: Tensor, dim: int, input_dtype: Any) -> Call:
        _floats(grad_output, output)
        rows = last(grad_output, dim), last(output, dim)
        return to(f"aten.{backward}", *rows, parse_dtype(to.out.dtype), out=last(to.out, dim))


_softmax("_softmax")
_softmax("_log_softmax")


def _parameters(input: Tensor, *parameters: Tensor | None) -> Any:
    """The dtype of the parameters of a norm, which may be wider than halves; the input's where there are none."""
    import torch

    given = {x.dtype for x in parameters if x is not None} or {input.dtype}
    if len(given) > 1 or not given <= {input.dtype, *[torch.float32] * (input.dtype.itemsize == 2)}:
        raise Pass(REFUSED)
    return given.pop()


def _stats(input: Tensor, *parameters: Tensor | None) -> Any:
    """The dtype of means: on the CPU that of the parameters, elsewhere that of the arithmetic."""
    import torch

    own = _parameters(input, *parameters)
    return own if input.device.type == "cpu" else torch.promote_types(input.dtype, torch.float32)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def _normalised(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> int:
    """The elements of a row. Raises Pass for what torch refuses."""
    shape, sizes = tuple(normalized_shape), tuple(input.shape)
    _floats(input)
    if not shape or sizes[input.dim() - len(shape) :] != shape or len(shape) > len(sizes):
        raise Pass(REFUSED)
    if any(x is not None and tuple(x.shape) != shape for x in (weight, bias)):
        raise Pass(REFUSED)
    own, kinds = parse_dtype(input.dtype), {parse_dtype(x.dtype) for x in (weight, bias) if x is not None}
    if not kinds <= {own} and not (own in HALF and kinds == {"float32"}):
        raise Pass(REFUSED)
    return math.prod(shape)


@lowers("native_layer_norm", to="aten.native_layer_norm", whole=True)
def native_layer_norm(
    to: Steps, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    n, stats = _normalised(input, normalized_shape, weight, bias), _stats(input, weight, bias)
    lead = input.shape[: input.dim() - len(normalized_shape)]
    y = input.new_empty(input.shape)
    mean, rstd = (input.new_empty((*lead, *[1] * len(normalized_shape)), dtype=stats) for _ in range(2))
    x, out = input.reshape(*lead, n), (y.view(*lead, n), mean.view(lead), rstd.view(lead))
    to.run("aten.native_layer_norm", x, _flat(weight), _flat(bias), eps, parse_dtype(stats), out=out)
    return y, mean, rstd


@lowers("native_layer_norm_backward", to="aten.native_layer_norm_backward", whole=True)
def native_layer_norm_backward(
    to: Steps,
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> Any:
    n = _normalised(input, normalized_shape, weight, bias)
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    sums = input.dtype if weight is None else weight.dtype
    made = input.new_empty(input.shape), *(input.new_empty(normalized_shape, dtype=sums) for _ in range(2))
    given = grad_out.reshape(rows, n), input.reshape(rows, n), mean.reshape(rows), rstd.reshape(rows), _flat(weight)
    out = made[0].view(rows, n), made[1].view(n), made[2].view(n)
    to.run("aten.native_layer_norm_backward", *given, parse_dtype(sums), out=out)
    wanted = zip(made, output_mask, (True, weight is not None, bias is not None), strict=True)
    return tuple([x if asked and has else None for x, asked, has in wanted])


@lowers("native_batch_norm", to="aten.var", whole=True)
def native_batch_norm(
    to: Steps,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    import torch
    from torch._prims_common import suggest_memory_format

    _floats(input)
    acc = torch.promote_types(input.dtype, torch.float32)
    channels = input.shape[1]
    given = [x for x in (weight, bias, running_mean, running_var) if x is not None]
    if any(x.shape != (channels,) for x in given) or (training and not input.numel()):
        raise Pass(REFUSED)
    if any(x is not None and overlaps_itself(x) for x in (running_mean, running_var)):
        raise Pass("running statistics that overlap themselves")
    stats = _stats(input, weight, bias, running_mean, running_var)
    results = input.dtype, stats, stats
    if any(x is not None and x.dtype != y for x, y in zip(to.given, results, strict=False)):
        raise Pass("destinations of other dtypes than the results")  # before the statistics have moved
    if not training and any(x is not None and x.dim() != 1 for x in to.given[1:]):
        raise Pass(REFUSED)
    if training:
        x = input.transpose(0, 1).reshape(channels, -1)
        mean, var = (input.new_empty(channels, dtype=acc) for _ in range(2))
        to.run("aten.mean", x, parse_dtype(acc), out=mean)
        to.run("aten.var", x, parse_dtype(acc), 0, False, out=var)
        count = x.shape[-1]
        for running, own in (
            (running_mean, mean),
            (running_var, var * (count / (count - 1) if count > 1 else math.inf)),
        ):
            if running is not None:
                running.mul_(1 - momentum).add_(own.to(running.dtype), alpha=momentum)
    elif running_mean is None or running_var is None:
        raise Pass(REFUSED)
    else:
        mean, var = running_mean.to(acc), running_var.to(acc)
    rstd = (var + eps).rsqrt()
    if training and not eps:  # of elements that are all one number nothing is left, and no NaN made
        rstd = rstd.masked_fill(var == 0, 0)

    def spread(x: Tensor) -> Tensor:
        return x.to(acc).view(channels, *[1] * (input.dim() - 2))

    y = (input - spread(mean)) * spread(rstd if weight is None else rstd * weight)
    if bias is not None:
        y = y + spread(bias)
    saved = (mean.to(stats), rstd.to(stats)) if training else [input.new_empty(0, dtype=stats) for _ in range(2)]
    y = y.to(input.dtype).contiguous(memory_format=suggest_memory_format(input))
    return y, *saved


@lowers("native_batch_norm_backward", to="aten.sum", whole=True)
def native_batch_norm_backward(
    to: Steps,
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> Any:
    import torch
    from torch._prims_common import suggest_memory_format

    _floats(grad_out, input)
    acc = torch.promote_types(input.dtype, torch.float32)
    channels = input.shape[1]

    def spread(x: Tensor) -> Tensor:
        return x.to(acc).view(channels, *[1] * (input.dim() - 2))

    def summed(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(channels, -1)
        return to.run("aten.sum", rows, parse_dtype(acc), out=input.new_empty(channels, dtype=acc))

    mean, rstd = (save_mean, save_invstd) if train else (running_mean, None)
    if not train and running_var is not None:
        rstd = (running_var.to(acc) + eps).rsqrt()
    if mean is None or rstd is None:
        raise Pass(REFUSED)
    grad = grad_out.to(acc)
    y = (input - spread(mean)) * spread(rstd)
    dbias, dweight = summed(grad), summed(grad * y)
    if train:
        count = input.numel() // max(channels, 1)
        grad = grad - spread(dbias) / count - y * (spread(dweight) / count)
    dx = (grad * spread(rstd if weight is None else rstd * weight)).to(input.dtype)
    dx = dx.contiguous(memory_format=suggest_memory_format(input))
    sums = input.dtype if weight is None else weight.dtype
    made = dx, dweight.to(sums), dbias.to(sums)
    return tuple([x if wanted else None for x, wanted in zip(made, output_mask, strict=True)])


class _Groups:
    """The groups of channels of each sample, of ``[samples, channels, ...]``, in which a group norm has its means.

    Raises Pass for what torch refuses.
    """

    def __init__(self, input: Tensor, samples: int, channels: int, places: int, groups: int) -> None:
        import torch

        _floats(input)
        if groups < 1 or channels % groups or input.numel() != samples * channels * places:
            raise Pass(REFUSED)
        if tuple(input.shape[:2]) != (samples, channels):
            raise Pass("channels that are not the second axis")
        self.input, self.shape = input, (samples, groups, channels // groups, places)
        self.real = torch.promote_types(input.dtype, torch.float32)
        self.ones = [1] * (input.dim() - 2)

    def means(self) -> Tensor:
        """Room for a number of each group."""
        return self.input.new_empty(self.shape[:2], dtype=self.real)

    def spread(self, x: Tensor) -> Tensor:
        """A number of each group, for each of its channels."""
        samples, groups, channels, _ = self.shape
        return x.to(self.real).unsqueeze(-1).expand(-1, -1, channels).reshape(samples, groups * channels, *self.ones)

    def weight(self, x: Tensor) -> Tensor:
        """A number of each channel. Raises Pass for what torch refuses."""
        if tuple(x.shape) != tuple(self.input.shape[1:2]):
            raise Pass(REFUSED)
        return x.to(self.real).view(-1, *self.ones)

    def as_input(self, x: Tensor) -> Tensor:
        """A result in the input's dtype, its channels where the input's are."""
        from torch._prims_common import suggest_memory_format

        return x.to(self.input.dtype).contiguous(memory_format=suggest_memory_format(self.input))


@lowers("native_group_norm", to="aten.var", whole=True)
def native_group_norm(
    to: Steps,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> Any:
    """Torch composes it for devices in another dtype, of a view that not every input has."""
    from torch._prims_common import suggest_memory_format

    over, stats = _Groups(input, N, C, HxW, group), _parameters(input, weight, bias)
    if not input.is_contiguous(memory_format=suggest_memory_format(input)):
        raise Pass(REFUSED)
    if any(x is not None and not x.is_contiguous() for x in (weight, bias)):
        raise Pass("parameters that do not lie side by side, as torch's kernel reads them")
    scales = [None if x is None else over.weight(x) for x in (weight, bias)]
    if not input.numel():
        like = over.as_input(input.new_empty(input.shape))
        return like, input.new_zeros((N, group), dtype=stats), input.new_full((N, group), math.nan, dtype=stats)
    rows, dtype = input.reshape(N, group, -1), parse_dtype(over.real)
    mean = to.run("aten.mean", rows, dtype, out=over.means())
    rstd = (to.run("aten.var", rows, dtype, 0, False, out=over.means()) + eps).rsqrt()
    y = (input - over.spread(mean)) * over.spread(rstd)
    y = y if scales[0] is None else y * scales[0]
    y = y if scales[1] is None else y + scales[1]
    return over.as_input(y), mean.to(stats), rstd.to(stats)


@lowers("native_group_norm_backward", to="aten.sum", whole=True)
def native_group_norm_backward(
    to: Steps,
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Sequence[bool],
) -> Any:
    over = _Groups(input, N, C, HxW, group)
    if grad_out.dtype != input.dtype or grad_out.shape != input.shape:
        raise Pass(REFUSED)
    dtype, sums = parse_dtype(over.real), input.dtype if weight is None else weight.dtype
    grad, y = grad_out.to(over.real), (input - over.spread(mean)) * over.spread(rstd)

    def summed(x: Tensor, *shape: int) -> Tensor:
        rows = x.reshape(*shape, -1) if x.numel() else x.new_empty((*shape, 0))
        return to.run("aten.sum", rows, dtype, out=x.new_empty(shape))

    dweight, dbias = (summed(summed(x, N, C).t(), C) for x in (grad * y, grad))
    if weight is not None:
        grad = grad * over.weight(weight)
    along, flat = (summed(x, N, group) / max(C // group * HxW, 1) for x in (grad * y, grad))
    dx = (grad - y * over.spread(along) - over.spread(flat)) * over.spread(rstd)
    made = over.as_input(dx), dweight.to(sums), dbias.to(sums)
    return tuple([x if wanted else None for x, wanted in zip(made, output_mask, strict=True)])


def _target_of(self: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Rows of classes. Raises Pass for what torch refuses."""
    _floats(self)
    x = self.movedim(1, -1) if self.dim() > 1 else self
    if x.shape[:-1] != target.shape or (weight is not None and weight.shape != x.shape[-1:]):
        raise Pass(REFUSED)
    if weight is not None and weight.dtype != self.dtype:
        raise Pass(REFUSED)
    return x


@lowers("nll_loss_forward", "nll_loss2d_forward", to="aten.nll_loss_forward", whole=True)
def nll_loss_forward(
    to: Steps, self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Any:
    x, dtype = _target_of(self, target, weight), parse_dtype(self.dtype)
    losses, shares = self.new_empty(target.shape), self.new_empty(target.shape)
    to.run("aten.nll_loss_forward", x, target, weight, ignore_index, out=(losses, shares))
    if reduction == NONE:
        return losses, shares if self.dim() == 1 else self.new_zeros(())
    loss, share = (to.run("aten.sum", y.reshape(-1), dtype, out=self.new_empty(())) for y in (losses, shares))
    if reduction == MEAN:
        loss = to.run("aten.div", loss, share, dtype, out=self.new_empty(()))
    return loss, share


@lowers("nll_loss_backward", "nll_loss2d_backward", to="aten.nll_loss_backward", whole=True)
def nll_loss_backward(
    to: Steps,
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Any:
    x = _target_of(self, target, weight)
    grad = grad_output
    if reduction == MEAN:
        grad = to.run("aten.div", grad, total_weight, parse_dtype(self.dtype), out=self.new_empty(()))
    made = self.new_empty(self.shape)
    out = made.movedim(1, -1) if self.dim() > 1 else made
    to.run("aten.nll_loss_backward", grad.expand(target.shape), target, weight, x.shape[-1], ignore_index, out=out)
    return made
