"""What packed layers compute, for the modules here and for the quantised ones of transformers alike.

Activations are quantised to FP8 in blocks of 128, as the official inference code does, or left as they are; products
with packed weights are `flagops.fp8_matmul` and `flagops.fp4_matmul`, experts that lie stacked `flagops.moe_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

import flagops

BLOCK = 128
POWERS = "float8_e8m0fnu"

Call = Callable[..., Any]
"""Runs an operator by name with its arguments."""
Stack = tuple[Tensor, tuple[Tensor, ...]]
"""At which place of stacked weights each expert lies, int32, -1 for nowhere and, at the end, for experts of other
ranks; the weights, as ``gate_up, down, gate_up_scale, down_scale`` of `flagops.moe_experts`."""


class Weight(NamedTuple):
    """Codes ``[n, k]`` in FP8 or ``[n, k / 2]`` in FP4, and the scales of their blocks."""

    codes: Tensor
    scale: Tensor


class Experts(Protocol):
    """Routed experts with packed weights.

    scales: the dtype of the activations' scales, None for activations that are not quantised.
    share: those that are here, None for all.
    stacked: the arguments ``gate_up, down, gate_up_scale, down_scale`` of `flagops.moe_experts`, if they lie so.
    """

    @property
    def scales(self) -> str | None: ...

    @property
    def limit(self) -> float | None: ...

    @property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...

    @property
    def share(self) -> Share | None: ...

    def stacks(self, indices: Tensor) -> Iterable[Stack] | None:
        """Where the experts of a call lie so that `flagops.moe_experts` takes them, some after the other; or None."""
        ...

    def chosen(self, wanted: Sequence[int], tokens: int) -> Iterator[tuple[Weight, Weight, Weight]]:
        """Gate, up and down of each of some experts, asked for by so many tokens."""
        ...


def run(op: str, *args: Any) -> Any:
    """An operator by the best backend."""
    return getattr(flagops, op)(*args)


def quantised(x: Tensor, scales: str | None, call: Call = run) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of activations, powers of two where they are to be float8_e8m0fnu; floats where `scales` is
    None."""
    if scales is None:
        return x, None
    width = x.shape[-1]
    whole = pad(x, (0, -width % BLOCK)) if width % BLOCK else x
    codes, scale = call("fp8_quantize", whole, BLOCK, scales == POWERS, scales)
    return codes[..., :width], scale


def product(a: tuple[Tensor, Tensor | None], weight: Weight, dtype: torch.dtype, call: Call = run) -> Tensor:
    """``a @ weight.T`` of activations as `quantised` gives them."""
    op = "fp8_matmul" if weight.codes.dtype is torch.float8_e4m3fn else "fp4_matmul"
    result: Tensor = call(op, *a, *weight, dtype)
    return result


def linear(x: Tensor, weight: Weight, bias: Tensor | None, scales: str | None, call: Call = run) -> Tensor:
    """A linear layer ``[..., k] -> [..., n]`` in the dtype of x."""
    y = product(quantised(x, scales, call), weight, x.dtype, call)
    return y if bias is None else y + bias


def grouped(x: Tensor, weight: Weight, call: Call = run) -> Tensor:
    """``[..., g, k] -> [..., g, r]``, a part of the rows of the weight for each group; activations stay floats, as in
    the official inference code, which multiplies this weight in the activations' dtype."""
    groups = x.shape[-2]
    rows = weight.codes.shape[0] // groups
    parts = []
    for g in range(groups):
        first = g * rows
        above = first % BLOCK  # rows of the group before, under the same scale
        y = product((x[..., g, :], None), cut(weight, first - above, first + rows), x.dtype, call)
        parts.append(y[..., above:])
    return torch.stack(parts, -2)


def cut(weight: Weight, first: int, last: int) -> Weight:
    """Rows of a weight, from a multiple of the rows of its blocks on or all of them in one block."""
    block = BLOCK if weight.codes.dtype is torch.float8_e4m3fn else 1
    return Weight(weight.codes[first:last], weight.scale[first // block : -(-last // block)])


def routed(module: Experts, x: Tensor, indices: Tensor, weights: Tensor, call: Call = run) -> Tensor:
    """The weighted sum of each token's experts, as `flagops.moe_experts` defines it.

    That operator computes it where weights are stacked and activations quantised with powers of two. Experts that lie
    apart are multiplied one after the other, in the order of their ids: their outputs are rounded to the dtype of x
    and added in float32. So are those of other ranks.
    """
    weights, share = weights.to(torch.float32), module.share
    if share is not None:
        return share.summed(_added(module, x, share.local(indices), weights, call)).to(x.dtype)
    stacked = module.stacked if module.scales == POWERS else None
    if stacked is not None:
        result: Tensor = call("moe_experts", x, weights, indices.to(torch.int32), *stacked, module.limit)
        return result
    return _added(module, x, indices, weights, call).to(x.dtype)


def _added(module: Experts, x: Tensor, indices: Tensor, weights: Tensor, call: Call) -> Tensor:
    """The sum of the experts that are here, -1 being none of them, in float32."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    stacks = module.stacks(indices) if module.scales == POWERS else None
    if stacks is not None:
        return _by_pairs(total, x, indices, weights, stacks, module.limit, call)
    codes, scale = quantised(x, module.scales, call)
    found = list(hit(indices))
    parts = module.chosen([expert for expert, _ in found], len(x))
    for (_, pairs), (gate, up, down) in zip(found, parts, strict=True):
        rows = pairs // indices.shape[1]
        a = codes[rows], None if scale is None else scale[rows]
        g, u = product(a, gate, x.dtype, call), product(a, up, x.dtype, call)
        h = call("swiglu", g, u, weights.flatten()[pairs], module.limit)
        y = product(quantised(h, module.scales, call), down, x.dtype, call)
        total.index_add_(0, rows, y.to(torch.float32))
    return total


def _by_pairs(
    total: Tensor, x: Tensor, indices: Tensor, weights: Tensor, stacks: Iterable[Stack], limit: Any, call: Call
) -> Tensor:
    """`flagops.moe_experts` where each pair of a token and an expert is a row of its own, and the rows of a token are
    added in the order of their ids, as the operator adds them: so it does not matter in which stacks experts lie."""
    order = indices.argsort(dim=-1, stable=True)
    ids, factors = indices.gather(-1, order), weights.gather(-1, order)
    y = x.new_zeros(*ids.shape, x.shape[1])
    for places, stacked in stacks:
        place = places[ids]
        at = (place >= 0).nonzero(as_tuple=True)
        y[at] = call("moe_experts", x[at[0]], factors[at][:, None], place[at][:, None], *stacked, limit)
    for part in y.unbind(1):
        total += part
    return total


class Share:
    """What one rank has of a whole, neighbours such as experts of a layer; what the ranks compute is added."""

    def __init__(self, here: range, group: Any) -> None:
        self.here, self._group = here, group

    def local(self, indices: Tensor) -> Tensor:
        """Which of them is meant, -1 for those of other ranks."""
        own = indices - self.here.start
        return torch.where((own >= 0) & (own < len(self.here)), own, -1)

    def summed(self, y: Tensor) -> Tensor:
        """The sum of what all ranks have."""
        from flagops.distributed.projection import summing

        return summing(y, self._group)()


def hit(indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is chosen, by ascending id, with the places ``token * k + slot`` that chose it."""
    flat = indices.flatten()
    order = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
    found, counts = torch.unique_consecutive(flat[order], return_counts=True)
    yield from zip(found.tolist(), torch.split(order, counts.tolist()), strict=True)


class Stacked(NamedTuple):
    """Experts in the tensors ``gate_up, down, gate_up_scale, down_scale``; where they are computed one by one, the
    blocks of FP8 must divide the rows of a gate."""

    stacked: tuple[Tensor, Tensor, Tensor, Tensor]
    limit: float | None
    scales: str | None

    @property
    def share(self) -> None:
        return None

    def stacks(self, indices: Tensor) -> Iterable[Stack]:
        places = torch.arange(len(self.stacked[0]), dtype=torch.int32, device=indices.device)
        return [(torch.cat([places, places.new_full((1,), -1)]), self.stacked)]

    def chosen(self, wanted: Sequence[int], tokens: int) -> Iterator[tuple[Weight, Weight, Weight]]:
        return map(self.expert, wanted)

    def expert(self, index: int) -> tuple[Weight, Weight, Weight]:
        """Gate, up and down of an expert."""
        gate_up, down, gate_up_scale, down_scale = (x[index] for x in self.stacked)
        both, half = Weight(gate_up, gate_up_scale), gate_up.shape[0] // 2
        return cut(both, 0, half), cut(both, half, 2 * half), Weight(down, down_scale)
