"""`flagops.patch(model, mesh=...)`: heads over the ranks of tensor parallelism, as the official inference code divides.

A rank keeps its heads' rows of ``q_b_proj``, its sinks, its part of the grouped output projection, and of the indexer
its heads; compressors, keys and everything between attention layers are the same on every rank. The weights become
DTensors, so that a sharded model can be saved and trained; restoring gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear

from flagops import config
from flagops.distributed import Layout, ParallelProjection, Sizes, gather, shard
from flagops.distributed.projection import agreed, failing_together, local, ranks_of, summing
from flagops.packed.products import product, run

from ._attention import projected
from ._binding import HEADS, binding_of, heads_of
from ._quantised import is_packed

_ROWS = (("shard", 0),)
NEEDED = frozenset({"sparse_attention", "grouped_output_projection", "compress_kv", "lightning_indexer"})


def divide(
    layers: Sequence[Any], mesh: DeviceMesh, mesh_dim: str, scheme: str, backend: str | Sequence[str] | None
) -> list[Sharded]:
    """Shard attention layers over a mesh. The ranks compare notes first; what is wrong on one raises on all."""
    mesh = ranks_of(mesh, mesh_dim)
    with agreed(mesh) as note:
        sizes = {sizes_of(layer.config) for layer in layers}
        if len(sizes) != 1:
            raise ValueError(f"the layers differ: {', '.join(map(str, sizes))}")
        packed = next((name for layer in layers for name, x in layer.named_parameters() if x.dtype.itemsize == 1), None)
        if packed:
            raise ValueError(f"{packed} is quantised, and only plain weights can be divided over a mesh")
        if any(heads_of(layer) for layer in layers):
            raise ValueError("the model is sharded already; disable() that patch first")
        for indexer in filter(None, map(_indexer, layers)):
            if indexer.num_heads % mesh.size():
                raise ValueError(f"{mesh.size()} ranks do not divide the indexer's {indexer.num_heads} heads")
        layout = Layout.of(sizes.pop(), mesh.size(), scheme)
        note.update(
            layout=layout,
            weights=[(name, tuple(x.shape), str(x.dtype)) for layer in layers for name, x in layer.named_parameters()],
        )
    parallel = ParallelProjection(layout, mesh, backend)
    return [Sharded(layer, parallel, mesh) for layer in layers]


def sizes_of(of: Any) -> Sizes:
    """The output projection of a configuration."""
    return Sizes(of.num_attention_heads, of.head_dim, of.o_groups, of.o_lora_rank, of.hidden_size)


def _indexer(attention: Any) -> Any:
    return getattr(attention.compressor, "indexer", None)


class Heads:
    """One attention layer's share of the heads on this rank, whose layers hold this rank's rows."""

    def __init__(self, attention: Any, parallel: ParallelProjection, mesh: DeviceMesh) -> None:
        self.attention, self.parallel, self.mesh = attention, parallel, mesh
        for module in self._marked():
            module.__dict__[HEADS] = self

    def _marked(self) -> Iterator[Any]:
        yield self.attention
        if _indexer(self.attention) is not None:
            yield _indexer(self.attention)

    def __reduce__(self) -> Any:
        raise TypeError("a model divided over a mesh cannot be copied or pickled; disable() gathers its weights")

    @property
    def sinks(self) -> torch.Tensor:
        return local(self.attention.sinks)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What every rank has and computes its own heads from."""
        return x

    def rows(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """A linear layer whose outputs are divided."""
        made: torch.Tensor = layer(x)
        return made

    def project(self, o: torch.Tensor) -> torch.Tensor:
        """This rank's heads ``[b, s, heads / tp, d]`` to the whole output."""
        with failing_together():
            return self.parallel.compute(o, self)

    def whole(self, o: torch.Tensor, groups: int) -> torch.Tensor:
        return projected(self.attention, o, groups)

    def first(self, o: torch.Tensor, wide: bool = False) -> torch.Tensor:
        layer = self.attention.o_a_proj
        dtype = torch.promote_types(o.dtype, torch.float32) if wide else o.dtype
        if not is_packed(layer):
            return linear(o.to(dtype), layer.weight.to(dtype))
        handle = binding_of(layer).use("fp8_matmul")
        return product((o, None), layer.packed, dtype, handle.round if handle else run)

    def second(self, z: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.attention.o_b_proj(z)
        return made

    def select(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, top_k: int, seen: torch.Tensor
    ) -> torch.Tensor:
        """`flagops.lightning_indexer` with the heads of q ``[b, s, h / tp, d]`` and weights divided: scores of some
        queries at a time are summed over the ranks, then every rank chooses alike."""
        (batch, count, heads, _), entries = q.shape, keys.shape[1]
        real = torch.promote_types(q.dtype, torch.float32)
        lists = q.new_full((batch, count, top_k), -1, dtype=torch.int32)
        step = max(1, config.budget() // max(1, batch * entries * (heads + 6) * real.itemsize))
        rows = torch.arange(entries, device=q.device)
        turned = keys.to(real).mT.unsqueeze(1)
        with failing_together():
            for start in range(0, count, step):
                part = slice(start, start + step)
                each = torch.matmul(q[:, part].to(real), turned).relu_()
                scores = torch.einsum("bth,bthn->btn", weights[:, part].to(real), each)
                scores = summing(scores, self.mesh.get_group())()
                hidden = rows >= seen[:, part].unsqueeze(-1)
                order = scores.masked_fill_(hidden, float("-inf")).sort(stable=True, dim=-1, descending=True).indices
                chosen = order[..., :top_k].masked_fill(hidden.gather(-1, order[..., :top_k]), entries).sort(-1).values
                lists[:, part] = chosen.masked_fill(chosen == entries, -1).to(torch.int32)
        return lists


class Sharded(Heads):
    """The same of a whole model, whose weights become DTensors; gradients are summed over the ranks."""

    def __init__(self, attention: Any, parallel: ParallelProjection, mesh: DeviceMesh) -> None:
        placements = parallel.layout.placements
        self._replace(attention.o_a_proj, "weight", parallel.mesh, placements["wo_a"])
        self._replace(attention.o_b_proj, "weight", parallel.mesh, placements["wo_b"])
        for owner, name in _by_rows(attention):
            self._replace(owner, name, mesh, _ROWS)
        super().__init__(attention, parallel, mesh)

    @staticmethod
    def _replace(owner: Any, name: str, mesh: DeviceMesh, placements: Any) -> None:
        whole = getattr(owner, name)
        owner.register_parameter(name, nn.Parameter(shard(whole.detach(), mesh, placements), whole.requires_grad))

    def restore(self) -> None:
        """Gather the weights back: every rank calls it."""
        projections = ((self.attention.o_a_proj, "weight"), (self.attention.o_b_proj, "weight"))
        for owner, name in (*projections, *_by_rows(self.attention)):
            divided = getattr(owner, name)
            owner.register_parameter(name, nn.Parameter(gather(divided), divided.requires_grad))
        for module in self._marked():
            module.__dict__.pop(HEADS, None)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        entered: torch.Tensor = _Enter.apply(x, self.mesh.get_group())  # type: ignore[no-untyped-call]
        return entered

    def rows(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return linear(x, local(layer.weight))

    def project(self, o: torch.Tensor) -> torch.Tensor:
        return self.parallel(o, local(self.attention.o_a_proj.weight), local(self.attention.o_b_proj.weight))


def _by_rows(attention: Any) -> Iterator[tuple[Any, str]]:
    yield attention.q_b_proj, "weight"
    yield attention, "sinks"
    indexer = _indexer(attention)
    if indexer is not None:
        yield indexer.q_b_proj, "weight"
        yield indexer.scorer.weights_proj, "weight"


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return summing(grad, ctx.group)(), None
