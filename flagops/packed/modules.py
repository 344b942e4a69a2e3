"""Modules that hold packed weights: the codes of a checkpoint and their scales, never what they stand for.

They compute by flagops' operators whether or not a model is patched. Moving a model to another device moves them;
casting it to another dtype leaves codes and scales as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arena import Arena, Expert
from .products import Call, Share, Stack, Stacked, Weight, grouped, linear, routed, run

_WORDS = {1: torch.uint8, 4: torch.int32}


class Packed(nn.Module):
    """A module whose own parameters are codes and scales."""

    scales: str | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As words of integers, which are moved but never cast."""
        for module in self.children() if recurse else ():
            module._apply(fn)  # type: ignore[no-untyped-call]
        for name, x in self._parameters.items():
            if x is None:
                continue
            if name == "bias":
                moved = fn(x)
            else:
                moved = fn(x.detach().view(_WORDS[x.dtype.itemsize])).view(x.dtype)
            self._parameters[name] = frozen(moved)
        return self


def frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


class PackedLinear(Packed):
    """A linear layer: ``weight`` in FP8 ``[n, k]`` or FP4 ``[n, k / 2]``, ``weight_scale_inv``, perhaps a ``bias``.

    scales: the dtype of the scales of activations in FP8; None leaves activations as they are.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, scales: str | None = None) -> None:
        super().__init__()
        self.weight, self.weight_scale_inv = map(frozen, weight)
        self.bias = None if bias is None else frozen(bias)
        self.scales = scales

    @property
    def packed(self) -> Weight:
        return Weight(self.weight, self.weight_scale_inv)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        return self.compute(x, run)

    def compute(self, x: Tensor, call: Call) -> Tensor:
        """The same, by operators that somebody else runs."""
        return linear(x, self.packed, self.bias, self.scales, call)

    def extra_repr(self) -> str:
        activations = "as they are" if self.scales is None else "in FP8"
        return f"{tuple(self.weight.shape)} {self.weight.dtype}, activations {activations}"


class PackedGroupedLinear(PackedLinear):
    """The first half of the grouped output projection; its activations are never quantised."""

    def compute(self, x: Tensor, call: Call) -> Tensor:
        """``[..., g, k] -> [..., g, r]``."""
        return grouped(x, self.packed, call)


class PackedExpert(nn.Module):
    """The three layers of a routed expert, which `PackedExperts` computes with."""

    def __init__(self, gate_proj: PackedLinear, up_proj: PackedLinear, down_proj: PackedLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj


class PackedExperts(nn.ModuleList):
    """Routed experts that lie one by one, as most checkpoints have them: stacking them would be a second copy.

    share: those of all that are here, where the rest is on other ranks.
    arena: what reads them on demand, as those of a layer; None where they are computed with where they lie.
    """

    stacked = None
    arena: tuple[Arena, int] | None = None

    def __init__(
        self, experts: list[PackedExpert], limit: float | None, scales: str | None, share: Share | None = None
    ) -> None:
        super().__init__(experts)
        self.limit, self.scales, self.share = limit, scales, share

    def stacks(self, indices: Tensor) -> Iterable[Stack] | None:
        """Those of the arena."""
        return None if self.arena is None else self.arena[0].stacks(self.arena[1], indices)

    def chosen(self, wanted: Sequence[int], tokens: int) -> Iterator[Expert]:
        """Gate, up and down of each of some experts."""
        if self.arena is None:
            return map(self.expert, wanted)
        arena, layer = self.arena
        return arena.take(layer, wanted, tokens)

    def expert(self, index: int) -> Expert:
        chosen: Any = self._modules[str(index)]
        return chosen.gate_proj.packed, chosen.up_proj.packed, chosen.down_proj.packed

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x ``[t, d]``, each token's experts and their weights ``[t, k]``; to ``[t, d]``."""
        return self.compute(hidden_states, top_k_index, top_k_weights, run)

    def compute(self, x: Tensor, indices: Tensor, weights: Tensor, call: Call) -> Tensor:
        """The same, by operators that somebody else runs."""
        return routed(self, x, indices, weights, call)


class StackedExperts(Packed):
    """Routed experts stacked: ``gate_up_proj`` ``[e, 2i, d]``, ``down_proj`` ``[e, d, i]`` and their scales."""

    def __init__(
        self,
        gate_up: Weight,
        down: Weight,
        limit: float | None = None,
        scales: str | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_proj_scale_inv = map(frozen, gate_up)
        self.down_proj, self.down_proj_scale_inv = map(frozen, down)
        self.limit, self.scales, self.share = limit, scales, share

    @property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gate_up_proj, self.down_proj, self.gate_up_proj_scale_inv, self.down_proj_scale_inv

    def stacks(self, indices: Tensor) -> Iterable[Stack]:
        """Its own."""
        return Stacked(self.stacked, self.limit, self.scales).stacks(indices)

    def chosen(self, wanted: Sequence[int], tokens: int) -> Iterator[Expert]:
        """As `PackedExperts`."""
        return Stacked(self.stacked, self.limit, self.scales).chosen(wanted, tokens)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `PackedExperts`."""
        return routed(self, hidden_states, top_k_index, top_k_weights, run)

    def compute(self, x: Tensor, indices: Tensor, weights: Tensor, call: Call) -> Tensor:
        """As `PackedExperts`."""
        return routed(self, x, indices, weights, call)
