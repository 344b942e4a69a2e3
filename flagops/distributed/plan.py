"""`flagops plan`: what each scheme of the grouped output projection costs at a number of ranks, and whether it fits.

Weights are counted tensor by tensor from the shapes of the released checkpoints (section 13 of the operator
specification), divided as the official inference code divides them: heads, experts, vocabulary and indexer heads over
the ranks, the rest replicated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flagops import config
from flagops.contract import Parser
from flagops.distributed.layout import BLOCK, SCHEMES, Layout, Sizes

FORMATS = ("checkpoint", "fp8", "bf16")


@dataclass(frozen=True)
class Model:
    """The sizes of a DeepSeek-V4 (section 0 of the operator specification)."""

    hidden: int
    sliding: int
    csa: int
    hca: int
    heads: int
    q_rank: int
    groups: int
    experts: int
    width: int
    vocabulary: int = 129280
    hash_layers: int = 3
    active: int = 6
    head_dim: int = 512
    o_rank: int = 1024
    index_heads: int = 64
    index_dim: int = 128
    streams: int = 4

    @property
    def layers(self) -> int:
        return self.sliding + self.csa + self.hca

    @property
    def projection(self) -> Sizes:
        return Sizes(self.heads, self.head_dim, self.groups, self.o_rank, self.hidden)


MODELS = {
    "v4-flash": Model(4096, 2, 21, 20, 64, 1024, 8, 256, 2048),
    "v4-pro": Model(7168, 0, 30, 31, 128, 1536, 16, 384, 3072),
}


@dataclass(frozen=True)
class Weight:
    """Tensors of one kind: how many, their elements each, their format, and what they are divided by."""

    count: int
    elements: int
    kind: str
    sharded: bool = False


def weights(model: Model) -> Iterator[Weight]:
    """Every weight of the model but the output projections; kinds are those of the released checkpoints."""
    d, n, e = model.hidden, model.layers, model.experts
    wide = model.streams * d
    yield Weight(2, model.vocabulary * d, "bf16", True)
    yield Weight(1, d + 2 * n * d, "bf16")
    yield Weight(2 * n, 24 * wide + 24 + 3, "f32")
    yield Weight(1, 4 * wide + 5, "f32")
    yield Weight(n, model.q_rank * d, "fp8")
    yield Weight(n, model.heads * model.head_dim * model.q_rank, "fp8", True)
    yield Weight(n, model.head_dim * d, "fp8")
    yield Weight(n, model.q_rank + model.head_dim, "bf16")
    yield Weight(n, model.heads, "f32", True)
    for layers, overlap, ratio, dim in (
        (model.csa, 2, 4, model.head_dim),
        (model.csa, 2, 4, model.index_dim),
        (model.hca, 1, 128, model.head_dim),
    ):
        yield Weight(2 * layers, overlap * dim * d, "bf16")
        yield Weight(layers, ratio * overlap * dim, "f32")
        yield Weight(layers, dim, "bf16")
    yield Weight(model.csa, model.index_heads * model.index_dim * model.q_rank, "fp8", True)
    yield Weight(model.csa, model.index_heads * d, "bf16", True)
    yield Weight(n, e * d, "bf16")
    yield Weight(n - model.hash_layers, e, "f32")
    yield Weight(model.hash_layers, model.vocabulary * model.active, "i64")
    yield Weight(3 * n, model.width * d, "fp8")
    yield Weight(3 * n * e, model.width * d, "fp4", True)


def size(kind: str, form: str) -> float:
    """Bytes of an element, scales included, of a checkpoint's kind in a format."""
    if kind in ("fp8", "fp4"):
        kind = {"checkpoint": kind, "fp8": "fp8", "bf16": "bf16"}[form]
    return {"f32": 4.0, "i64": 8.0, "bf16": 2.0, "fp8": 1 + 1 / BLOCK**2, "fp4": 1 / 2 + 1 / 32}[kind]


@dataclass(frozen=True)
class Row:
    """One scheme: bytes of weights on a rank, of the projections alone; per token and layer FLOPs and bytes sent."""

    scheme: str
    legal: str
    chosen: bool = False
    weights: float = 0.0
    projections: float = 0.0
    flops: float = 0.0
    sent: float = 0.0
    fits: bool = False


def rows(model: Model, tp: int, memory: float | None, form: str = "checkpoint") -> list[Row]:
    """What each scheme costs. Raises ValueError, with the legal numbers of ranks, if none is whole at `tp`."""
    fp8 = form != "bf16"
    sizes = model.projection
    chosen = Layout.of(sizes, tp, "auto", fp8)
    rest = sum(w.count * w.elements * size(w.kind, form) / (tp if w.sharded else 1) for w in weights(model))
    found = []
    for scheme in SCHEMES:
        if not sizes.whole(tp, scheme, fp8):
            legal = ", ".join(map(str, sizes.legal(scheme, fp8)))
            found.append(Row(scheme, f"shards are whole at {legal} ranks"))
            continue
        cost = Layout(sizes, tp, scheme, fp8).cost()
        projections = model.layers * cost.weights
        total = rest + projections
        mine = scheme == chosen.scheme
        fits = memory is None or total <= memory
        found.append(Row(scheme, "", mine, total, projections, cost.flops, cost.sent, fits))
    return found


def run(argv: Sequence[str]) -> int:
    """The command; 0 if a scheme fits, 1 if none does. Raises ValueError for arguments that make no plan."""
    options = _parser().parse_args(argv)
    memory = options.memory
    found = rows(MODELS[options.model], options.tp, memory, options.format)
    if options.json:
        print(json.dumps([vars(row) for row in found], indent=1))
    else:
        _print(options, found, memory)
    return 0 if any(row.fits for row in found) else 1


def chip(text: str) -> int:
    """Bytes of a chip's memory, for `argparse`; 32 alone would be bytes, which nobody means."""
    try:
        return config.size("" if text.strip().isdecimal() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size with its unit, such as 32GiB, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flagops plan",
        description="The grouped output projection of DeepSeek-V4 in tensor parallel: what each scheme costs.",
        epilog="example: flagops plan --model v4-flash --tp 32 --memory 32GiB",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, required=True)
    add("--tp", type=int, required=True, metavar="N", help="ranks that share a layer")
    add("--memory", type=chip, metavar="SIZE", help="of one chip, such as 32GiB; weights alone must fit")
    add("--format", choices=FORMATS, default="checkpoint", help="of the weights (default: as released, FP4 and FP8)")
    add("--json", action="store_true", help="print one JSON document instead of a table")
    return parser


def _print(options: argparse.Namespace, found: Sequence[Row], memory: float | None) -> None:
    from flagops import tables

    layer = MODELS[options.model].layers
    head = ("scheme", "weights a chip", "of these wo_a, wo_b", "MFLOP a token, layer", "kB sent a token, layer", "")
    cells = []
    for row in found:
        if row.legal:
            cells.append([row.scheme, "", "", "", "", row.legal])
            continue
        verdict = "" if memory is None else "fits" if row.fits else f"{(row.weights - memory) / 2**30:.1f} GiB too much"
        numbers = [f"{row.weights / 2**30:.2f} GiB", f"{row.projections / 2**30:.3f} GiB"]
        numbers += [f"{row.flops / 1e6:.1f}", f"{row.sent / 1e3:.1f}"]
        cells.append([row.scheme, *numbers, ", ".join(filter(None, (verdict, "auto" if row.chosen else "")))])
    tables.show(f"{options.model}, {layer} layers, {options.tp} ranks, weights as {options.format}", head, cells)
