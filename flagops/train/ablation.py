"""What each part of a trained model is worth: the loss on held-out documents without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .corpus import KINDS, Corpus
from .loop import LENGTH, judged, losses
from .model import csa_layers
from .objective import loads, watching


@contextmanager
def zeroed(model: Any, *ends: str) -> Iterator[None]:
    """Parameters and buffers whose names end so are zero."""
    with changed(model, ends, torch.zeros_like):
        yield


@contextmanager
def changed(model: Any, ends: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Parameters and buffers whose names end so are changed. Raises ValueError if there is none."""
    named = [*model.named_parameters(), *model.named_buffers()]
    chosen = [x for name, x in named if name.endswith(ends)]
    if not chosen:
        raise ValueError(f"no parameter's name ends in {' or '.join(ends)}")
    own = [x.detach().clone() for x in chosen]
    with torch.no_grad():
        for x in chosen:
            x.copy_(change(x))
        try:
            yield
        finally:
            for x, before in zip(chosen, own, strict=True):
                x.copy_(before)


@contextmanager
def hidden(model: Any, kind: str) -> Iterator[None]:
    """No query sees an entry of the compressors of a kind."""

    def blind(module: Any, args: Any, output: tuple[Tensor, Tensor | None]) -> Any:
        entries, bias = output
        return entries, None if bias is None else torch.full_like(bias, float("-inf"))

    with ExitStack() as hooks:
        for attention in (x.self_attn for x in model.model.layers if x.self_attn.layer_type == kind):
            hooks.callback(attention.compressor.register_forward_hook(blind).remove)
        yield


@contextmanager
def selecting(model: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Each query takes, instead of the entries that the indexer selects, as many of the visible ones by another score:
    `choose` gives ``[b, s, n]`` for all entries."""

    def other(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen = (args[2] + 1) // module.compress_rate
        count = args[0].shape[1] // module.compress_rate
        scores = choose(torch.arange(count).expand(*output.shape[:2], count))
        best = scores.masked_fill(torch.arange(count) >= seen[..., None], -1.0).topk(output.shape[2], -1).indices
        return torch.where(best < seen[..., None], best, -1)

    with ExitStack() as hooks:
        for attention in csa_layers(model):
            hooks.callback(attention.compressor.indexer.register_forward_hook(other).remove)
        yield


@contextmanager
def without_yarn(model: Any) -> Iterator[None]:
    """Compressed layers turn by the frequencies of their base alone."""
    scaling = model.config.rope_parameters["compress"]
    width = model.config.qk_rope_head_dim
    plain = scaling["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    with changed(model, ("compress_inv_freq",), lambda _: plain):
        yield


PARTS: dict[str, Callable[[Any], Any]] = {
    "entries of CSA": lambda model: hidden(model, "compressed_sparse_attention"),
    "entries of HCA": lambda model: hidden(model, "heavily_compressed_attention"),
    "indexer: the newest entries": lambda model: selecting(model, lambda at: at.float()),
    "indexer: random entries": lambda model: selecting(model, lambda at: torch.rand(at.shape)),
    "position biases": lambda model: zeroed(model, "position_bias"),
    "sinks": lambda model: changed(model, (".sinks",), lambda x: torch.full_like(x, -1e4)),
    "YaRN": without_yarn,
    "mixing of streams by their values": lambda model: zeroed(model, "_hc.fn", "hc_head.hc_fn"),
    "mixing of streams": lambda model: zeroed(model, "_hc.fn", "_hc.base"),
    "hash table: another": lambda model: changed(model, ("tid2eid",), lambda x: x.roll(1, 0)),
    "scores of routers": lambda model: zeroed(model, ".gate.weight"),
    "bias of routers": lambda model: zeroed(model, "e_score_correction_bias"),
    "routed experts": lambda model: zeroed(model, "experts.down_proj"),
    "shared experts": lambda model: zeroed(model, "shared_experts.down_proj.weight"),
}
"""What is taken away, or put in its place."""


def ablated(model: Any, corpus: Corpus, rows: int) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """What `judged` says of the whole model, and then without each part."""
    yield "nothing", judged(model, corpus, rows)
    for part, remove in PARTS.items():
        torch.manual_seed(0)
        with remove(model):
            yield part, judged(model, corpus, rows)


@torch.no_grad()
def entropies(model: Any, corpus: Corpus, rows: int) -> list[float]:
    """How evenly each layer's experts are chosen: the entropy of their shares over that of equal shares."""
    counts: Any = 0
    with watching(model) as seen:
        for kind in KINDS:
            ids = torch.from_numpy(corpus.batch(0, 0, rows, LENGTH, (kind,), held=True)[0])
            losses(model, ids)
            counts = counts + torch.stack([loads(x.mlp, seen[x.mlp], ids) for x in model.model.layers])
    shares = counts / counts.sum(-1, keepdim=True)
    return (torch.special.entr(shares).sum(-1) / torch.log(torch.tensor(float(shares.shape[-1])))).tolist()
