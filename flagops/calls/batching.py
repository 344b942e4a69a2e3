"""`torch.vmap` of every operator: batch axes of the card take the new axis too, else its slices run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flagops.calls.derivatives import Ops
from flagops.operator import Tensor

Axes = Sequence[int | None]
"""For each argument how many axes it has behind the batch axes; None where it has no batch axes."""


def register(ops: Ops, filled: Callable[[Sequence[Any]], tuple[Any, ...]], library: Any) -> None:
    operator = ops.operator
    inputs = [_own(operator.tensors[name]) if name in operator.tensors else None for name in operator.inputs]
    tensors = [inputs[p] for p in operator.tensor_positions]
    results = [_own(tensor) for tensor in operator.results.values()]

    def by_backward(*arguments: Any) -> Sequence[bool]:
        return arguments[-2]

    def by_second(*arguments: Any) -> Sequence[bool]:
        return arguments[-1][len(results) :]

    def nothing(*_: Any) -> Sequence[bool]:
        return ()

    rules: list[tuple[Any, Any, Axes, Any]] = [
        (ops.forward, filled, [*inputs, None], nothing),
        (ops.backward, tuple, [*results, *inputs, None, None], by_backward),
        (ops.jvp, tuple, [*tensors, *inputs], nothing),
        (ops.second, tuple, [*tensors, *results, *inputs, None, None], by_second),
    ]
    for op, fill, axes, summed in rules:
        if op is not None:
            same = None if op is ops.forward else tensors
            torch.library.register_vmap(op, _rule(op, fill, axes, same, summed), lib=library)


def _own(tensor: Tensor) -> int | None:
    words = tensor.axes.split()
    return len(words) - 1 if words[0] == "..." else None


def _rule(
    op: Any,
    fill: Callable[[Sequence[Any]], tuple[Any, ...]],
    axes: Axes,
    tensors: Axes | None,
    summed: Callable[..., Sequence[bool]],
) -> Any:
    """As one call where every batched argument has batch axes, else as many calls as there are slices.

    tensors: axes of the operator's tensors where derivatives have their shapes, so that all must be batched alike.
    summed: the tensors whose gradient is asked for; one without batch axes would get the sum over the batch.
    """

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        arguments, count = fill(arguments), info.batch_size
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]  # a list of flags has a list of None
        dims += [None] * (len(arguments) - len(dims))
        ranks = {
            x.dim() - own - (dim is not None)
            for x, dim, own in zip(arguments, dims, axes, strict=True)
            if isinstance(x, torch.Tensor) and own is not None
        }
        joined = all(own is not None for own, dim in zip(axes, dims, strict=True) if dim is not None)
        if tensors is not None:
            alone = [own for own, need in zip(tensors, summed(*arguments), strict=False) if need and own is None]
            joined = joined and not alone and len(ranks) == 1
        if joined:
            found = op(*_joined(arguments, dims, axes, count, max(ranks), tensors is not None))
        else:
            found = _one_by_one(op, arguments, dims, count)
        return found, (0,) * len(found) if isinstance(found, (tuple, list)) else 0

    return rule


def _joined(
    arguments: Sequence[Any], dims: Sequence[int | None], axes: Axes, count: int, lead: int, alike: bool
) -> list[Any]:
    """The arguments with the new axis outermost of their batch axes, also of those that are not batched if alike."""

    def join(x: Any, dim: int | None, own: int | None) -> Any:
        if not isinstance(x, torch.Tensor) or own is None or (dim is None and not alike):
            return x
        x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.reshape(count, *(1,) * (lead + own + 1 - x.dim()), *x.shape[1:])

    return [join(*each) for each in zip(arguments, dims, axes, strict=True)]


def _one_by_one(op: Any, arguments: Sequence[Any], dims: Sequence[int | None], count: int) -> Any:
    def one(i: int) -> Any:
        return op(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims, strict=True)))

    found = [one(i) for i in range(count)]
    if isinstance(found[0], (tuple, list)):
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return torch.stack(found)
