"""How the grouped output projection is divided over the ranks of tensor parallelism, and what each division costs.

With ``tp`` ranks, ``groups`` groups and ``parts = tp / groups`` ranks to a group, rank ``g * parts + q`` holds part q
of group g, and ``heads / tp`` neighbouring heads. Up to ``groups`` ranks each holds whole groups. Beyond, there are
three exact schemes (section 8 of the operator specification; Megatron-LM's row and column parallelism inside a group):

replicate
    the ranks of a group gather its heads, and each computes all of the group's product with weights of its own copy;
split-input
    each rank multiplies its own heads with its columns of ``wo_a``; the partial sums are reduced in float32 and
    scattered over the rank dimension r, whose part goes on to its columns of ``wo_b``;
split-rank
    the ranks of a group gather its heads, and each computes its rows of ``wo_a`` and its columns of ``wo_b``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCHEMES = ("replicate", "split-input", "split-rank")
BLOCK = 128
"""Rows and columns that share a scale in FP8 weights, and the width of an activation group."""

NEARLY = 1.1
"""Schemes that send up to this many times the fewest bytes are told apart by the weights they hold."""

Shards = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Sizes:
    """The projection as a whole: ``heads`` of ``head_dim`` in ``groups`` to ``rank`` each, then to ``hidden``."""

    heads: int
    head_dim: int
    groups: int
    rank: int
    hidden: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.heads} heads")

    @property
    def width(self) -> int:
        """Inputs of one group."""
        return self.heads // self.groups * self.head_dim

    def whole(self, tp: int, scheme: str, fp8: bool = False) -> bool:
        """Whether a scheme's shards are whole at ``tp`` ranks, in FP8 also in blocks of 128."""
        if tp <= self.groups:
            return self.groups % tp == 0 and not (fp8 and self.groups // tp * self.rank % BLOCK)
        parts = tp // self.groups
        if tp % self.groups or self.heads % tp:
            return False
        if scheme == "replicate":
            return not (fp8 and self.rank % BLOCK)
        step = BLOCK if fp8 else 1
        if self.rank % (parts * step):
            return False
        return scheme == "split-rank" or self.width % (parts * step) == 0

    def legal(self, scheme: str, fp8: bool = False) -> tuple[int, ...]:
        """Every number of ranks whose shards are whole; ``"auto"`` for those of any scheme."""
        schemes = SCHEMES if scheme == "auto" else (scheme,)
        return tuple(tp for tp in range(1, self.heads + 1) if any(self.whole(tp, s, fp8) for s in schemes))


@dataclass(frozen=True)
class Cost:
    """Of one rank: bytes of weights, floating-point operations a token, bytes it sends a token.

    Sent bytes are those of ring algorithms, the least that any needs: ``(n - 1) / n`` of a gathered or scattered
    tensor, twice that of a reduced one.
    """

    weights: float
    flops: float
    gathered: float
    scattered: float
    reduced: float

    @property
    def sent(self) -> float:
        return self.gathered + self.scattered + self.reduced


@dataclass(frozen=True)
class Layout:
    """One scheme at one number of ranks; `of` checks and chooses."""

    sizes: Sizes
    tp: int
    scheme: str
    fp8: bool = False

    @classmethod
    def of(cls, sizes: Sizes, tp: int, scheme: str = "auto", fp8: bool = False) -> Layout:
        """The layout of a scheme; ``"auto"`` takes the least weights among those that send nearly the fewest bytes.

        Raises ValueError for an unknown scheme, and for shards that are not whole, with the numbers of ranks that are.
        """
        if scheme != "auto" and scheme not in SCHEMES:
            from flagops.errors import suggestion

            raise ValueError(f"scheme must be auto, {', '.join(SCHEMES)}, got {scheme!r}{suggestion(scheme, SCHEMES)}")
        legal = sizes.legal(scheme, fp8)
        if tp not in legal:
            blocks = f", in FP8 blocks of {BLOCK}" if fp8 else ""
            raise ValueError(
                f"{tp} ranks cannot share {sizes.groups} groups of {sizes.heads // sizes.groups} heads and rank "
                f"{sizes.rank} ({scheme}{blocks}); whole shards have {', '.join(map(str, legal))}"
            )
        if scheme != "auto":
            return cls(sizes, tp, scheme, fp8)
        able = [cls(sizes, tp, s, fp8) for s in SCHEMES if sizes.whole(tp, s, fp8)]
        fewest = min(layout.cost().sent for layout in able)
        near = [layout for layout in able if layout.cost().sent <= NEARLY * fewest]
        return min(near, key=lambda layout: (layout.cost().weights, layout.cost().sent))

    @property
    def parts(self) -> int:
        """Ranks to a group; 1 up to as many ranks as groups."""
        return max(1, self.tp // self.sizes.groups)

    @property
    def mesh(self) -> tuple[int, int]:
        """The ranks as (those that hold different groups, those that share one)."""
        return self.tp // self.parts, self.parts

    @property
    def local_groups(self) -> int:
        return max(1, self.sizes.groups // self.tp)

    @property
    def local_heads(self) -> int:
        return self.sizes.heads // self.tp

    @property
    def placements(self) -> dict[str, Shards]:
        """For wo_a ``[groups*r, width]`` and wo_b ``[hidden, groups*r]``: along each axis of `mesh` the axis that is
        sharded, as ``("shard", axis)`` or ``("replicate", 0)``. Their scales are sharded alike."""
        inner = {
            "replicate": (("replicate", 0), ("replicate", 0)),
            "split-input": (("shard", 1), ("shard", 1)),
            "split-rank": (("shard", 0), ("shard", 1)),
        }[self.scheme]
        return {"wo_a": (("shard", 0), inner[0]), "wo_b": (("shard", 1), inner[1])}

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of a rank's shard."""
        shape = list(self._full(name))
        for (kind, axis), ranks in zip(self.placements[name], self.mesh, strict=True):
            if kind == "shard":
                shape[axis] //= ranks
        return shape[0], shape[1]

    def offset(self, name: str, rank: int) -> tuple[int, int]:
        """Where a rank's shard begins in the whole weight."""
        index = [0, 0]
        for (kind, axis), at, ranks in zip(self.placements[name], divmod(rank, self.parts), self.mesh, strict=True):
            if kind == "shard":
                index[axis] = index[axis] * ranks + at
        rows, columns = self.shape(name)
        return index[0] * rows, index[1] * columns

    def take(self, name: str, whole: Any, rank: int) -> Any:
        """A rank's shard of a whole weight, or of the block scales of one: a view of an array or tensor."""
        (top, left), (rows, columns) = self.offset(name, rank), self.shape(name)
        down, across = self._steps(name, whole.shape)
        return whole[top // down : (top + rows) // down, left // across : (left + columns) // across]

    def join(self, name: str, shards: Sequence[Any]) -> Any:
        """The whole weight, or its scales, from the shards of all ranks in order; the inverse of `take`."""
        if len(shards) != self.tp:
            raise ValueError(f"{name}: {len(shards)} shards for {self.tp} ranks")
        first = shards[0]
        full = self._full(name)
        down, across = (max(1, a // b) for a, b in zip(self.shape(name), first.shape, strict=True))
        shape = (full[0] // down, full[1] // across)
        like = getattr(first, "new_empty", None)
        whole = like(shape) if like else np.empty(shape, first.dtype)
        for rank, piece in enumerate(shards):
            if piece.shape != first.shape or piece.dtype != first.dtype:
                raise ValueError(
                    f"{name}: the shard of rank {rank} is {piece.dtype} {tuple(piece.shape)}, "
                    f"that of rank 0 {first.dtype} {tuple(first.shape)}"
                )
            self.take(name, whole, rank)[...] = piece
        return whole

    def _full(self, name: str) -> tuple[int, int]:
        s = self.sizes
        return (s.groups * s.rank, s.width) if name == "wo_a" else (s.hidden, s.groups * s.rank)

    def _steps(self, name: str, shape: Sequence[int]) -> tuple[int, int]:
        """Elements of a weight that one element of a tensor stands for: 1, or the block where these are its scales."""
        full = self._full(name)
        if tuple(shape) == full:
            return 1, 1
        if tuple(shape) == tuple(-(-n // BLOCK) for n in full):
            return BLOCK, BLOCK
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {full}, or its scales by blocks of {BLOCK}")

    def cost(self, activation: int = 2) -> Cost:
        """What one rank holds, computes and sends; ``activation`` is the bytes of an activation's element."""
        s, parts = self.sizes, self.parts
        size = (1 + 1 / BLOCK**2) if self.fp8 else activation
        elements = sum(a * b for a, b in (self.shape("wo_a"), self.shape("wo_b")))
        gathered = s.width * activation * (parts - 1) / parts if self.scheme != "split-input" else 0.0
        scattered = s.rank * 4 * (parts - 1) / parts if self.scheme == "split-input" else 0.0
        ranks = s.groups if self.scheme == "replicate" and parts > 1 else self.tp
        reduced = 2 * s.hidden * 4 * (ranks - 1) / ranks
        return Cost(elements * size, 2.0 * elements, gathered, scattered, reduced)

    def explain(self) -> str:
        """Why this scheme: what every legal one holds, computes and sends."""
        lines = [f"{self.tp} ranks, {self.sizes.groups} groups: {self.scheme}"]
        if self.parts == 1:
            return lines[0] + "; every rank holds whole groups, so all schemes are the same"
        for scheme in SCHEMES:
            if not self.sizes.whole(self.tp, scheme, self.fp8):
                lines.append(f"  {scheme}: its shards are not whole{' blocks' if self.fp8 else ''}")
                continue
            cost = Layout(self.sizes, self.tp, scheme, self.fp8).cost()
            lines.append(
                f"  {scheme}: {cost.weights / 1e6:.1f} MB of weights, {cost.flops / 1e6:.1f} MFLOP and "
                f"{cost.sent / 1e3:.1f} kB sent a token"
            )
        return "\n".join(lines)
