"""What each scheme of the grouped output projection costs at a number of ranks, and whether it fits.

Weights are counted tensor by tensor from the shapes of the released checkpoints (section 13 of the operator
specification), divided as the official inference code divides them: heads, experts, vocabulary and indexer heads over
the ranks, the rest replicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagops import tables
from flagops.distributed.layout import SCHEMES, Layout
from flagops.plan.model import Model, Role, weights

FORMATS = ("checkpoint", "fp8", "bf16")


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
    kept = (w for w in weights(model) if w.role != Role.PROJECTION)
    rest = sum(w.count * w.stored(form)[1] / (tp if w.sharded else 1) for w in kept)
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


def show(name: str, layers: int, found: Sequence[Row], tp: int, memory: float | None, form: str) -> None:
    """Print what `rows` found, as a table."""
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
    tables.show(f"{name}, {layers} layers, {tp} ranks, weights as {form}", head, cells)
