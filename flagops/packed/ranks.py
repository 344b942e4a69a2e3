"""`flagops.load(path, mesh=...)`: what a rank reads of a DeepSeek-V4, divided as in the official inference code.

A rank has its heads of attention and indexer, its part of the grouped output projection (`flagops.distributed`), its
experts and its rows of the vocabulary; the rest is the same on every rank. Shards lie where the checkpoint has them,
but for columns of the projection's second weight, which are copied.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import embedding, linear

from flagops.checkpoint import Refused
from flagops.distributed import Layout, ParallelProjection
from flagops.distributed.projection import gathering
from flagops.transformers._mesh import Heads, sizes_of

from .products import BLOCK, Share, Weight, cut

MODEL = "deepseek_v4"
_ROWS = re.compile(
    r"(.*self_attn\.(q_b_proj\.weight|sinks|compressor\.indexer\.(q_b_proj|scorer\.weights_proj)\.weight)"
    r"|(model\.embed_tokens|lm_head)\.weight)"
)
_PROJECTION = re.compile(r".*self_attn\.o_(a|b)_proj\.weight")


class Ranks:
    """The shards of one rank.

    scheme: of the output projection, as in `flagops.distributed`. config: of the model. fp8: whether that projection is
    quantised in blocks, which stay whole.

    Raises Refused for another model, and ValueError for a number of ranks that does not divide it.
    """

    def __init__(self, mesh: DeviceMesh, scheme: str, config: Any, fp8: bool) -> None:
        if config.model_type != MODEL:
            raise Refused(f"a mesh divides a {MODEL}, and this is a {config.model_type}; load it without")
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        self.layout = Layout.of(sizes_of(config), self.size, scheme, fp8)
        for count, what in (
            (config.index_n_heads, "heads of the indexer"),
            (config.vocab_size, "tokens of the vocabulary"),
            (config.n_routed_experts, "experts of a layer"),
        ):
            if count % self.size:
                raise ValueError(f"{self.size} ranks do not divide the {count} {what}")

    def share(self, count: int) -> Share:
        """Which of so many neighbours this rank has."""
        each = count // self.size
        return Share(range(self.rank * each, (self.rank + 1) * each), self.mesh.get_group())

    def plain(self, target: str, x: Tensor) -> Tensor:
        """This rank's part of a parameter that is not quantised, by transformers' name."""
        found = _PROJECTION.fullmatch(target)
        if found:
            return self.layout.take(f"wo_{found[1]}", x, self.rank).contiguous()
        if not _ROWS.fullmatch(target):
            return x
        mine = self.share(len(x)).here
        return x[mine.start : mine.stop]

    def packed(self, target: str, weight: Weight) -> Weight:
        """The same of codes and scales."""
        found = _PROJECTION.fullmatch(target)
        if found:
            return Weight(*(self.layout.take(f"wo_{found[1]}", x, self.rank).contiguous() for x in weight))
        if not _ROWS.fullmatch(target):
            return weight
        if target == "lm_head.weight":
            raise Refused("lm_head is quantised, and a mesh divides a plain one; load it without")
        mine = self.share(len(weight.codes)).here
        if weight.codes.dtype is torch.float8_e4m3fn and len(mine) % BLOCK and BLOCK % len(mine):
            raise ValueError(f"{self.size} ranks cut {target} into {len(mine)} rows, and its scales are of {BLOCK}")
        return cut(weight, mine.start, mine.stop)

    def divide(self, model: Any, backend: Any) -> None:
        """Have a model's modules, which hold shards, compute as parts of a whole."""
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention

        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        model.set_input_embeddings(ParallelEmbedding(table.weight, self.share(model.config.vocab_size)))
        model.set_output_embeddings(ParallelHead(head.weight, self.mesh))
        parallel = ParallelProjection(self.layout, self.mesh, backend)
        for layer in model.modules():
            if isinstance(layer, DeepseekV4Attention):
                Heads(layer, parallel, self.mesh)
                layer.o_a_proj.n_groups = self.layout.local_groups


class ParallelEmbedding(nn.Module):
    """Rows of a table that is divided over ranks: ``[...] -> [..., d]`` by the rank that has a token's row."""

    def __init__(self, weight: nn.Parameter, share: Share) -> None:
        super().__init__()
        self.weight, self._share = weight, share

    def forward(self, ids: Tensor) -> Tensor:
        own = self._share.local(ids)
        found = embedding(own.clamp(min=0), self.weight)
        return self._share.summed(torch.where((own >= 0).unsqueeze(-1), found, 0))


class ParallelHead(nn.Module):
    """A linear layer whose outputs are divided over ranks, and gathered: ``[..., d] -> [..., vocabulary]``."""

    def __init__(self, weight: nn.Parameter, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight, self._group = weight, mesh.get_group()

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return gathering(y.reshape(-1, y.shape[-1], 1), self._group)().view(*y.shape[:-1], -1)
