"""How long a step takes on a machine: what it reads and multiplies, what calls cost, what waits for a disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flagops.checkpoint.progress import amount

from .cost import Load, Step, hit
from .machine import ATTENTION_KINDS, Machine
from .model import Model, Part, Role


@dataclass(frozen=True)
class Term:
    """A part of a step's time, and how it comes about."""

    what: str
    seconds: float
    how: str


@dataclass(frozen=True)
class Residence:
    """Where routed experts are: their bytes, those that fit into memory, and how often one that is chosen is there."""

    experts: float
    room: float
    hits: float

    @property
    def whole(self) -> bool:
        return self.room >= self.experts


def residence(
    model: Model, parts: Sequence[Part], beside: float, memory: float | None, rows: int, hits: float | None = None
) -> Residence:
    """Of experts in what `memory` leaves beside other weights and `beside` bytes.

    hits: as given; None for those of a cache that keeps what was used last, under uniform routing: an expert that was
    used s steps ago is still there if the experts of s steps fit.
    """
    experts = sum(part.held for part in parts if part.role == Role.EXPERTS)
    others = sum(part.held for part in parts) - experts
    room = math.inf if memory is None else memory - beside - others
    if room >= experts:
        return Residence(experts, room, 1.0)
    if hits is None:
        missed = 1 - hit(model, rows) / model.experts  # of an expert in a step
        steps = math.floor(math.log(1 - max(0.0, room) / experts) / math.log(missed)) if missed else 0
        hits = 1 - missed**steps
    return Residence(experts, room, hits)


def terms(model: Model, loads: Sequence[Load], step: Step, machine: Machine, held: Residence, pack: bool) -> list[Term]:
    """Parts of a step's time on a machine, waiting last.

    Experts that are not in memory are read while those that are there are multiplied, then multiplied themselves.
    pack: whether experts lie in one tensor a layer and are called together.
    """
    found, experts = list[Term](), 0.0
    for kind in dict.fromkeys(load.kind for load in loads):
        these = [load for load in loads if load.kind == kind]
        times = [machine.seconds(kind, load.read, load.flops, load.once) for load in these]
        experts += sum(time for load, time in zip(these, times, strict=True) if load.role == Role.EXPERTS)
        read, flops = sum(load.read for load in these), sum(load.flops for load in these)
        found.append(Term(kind, sum(times), f"{amount(read)} and {flops / 1e9:.3g} GFLOP {_rates(machine, kind)}"))
    if machine.measured:
        counts = dict(zip(ATTENTION_KINDS, (model.sliding, model.csa, model.hca), strict=True))
        calls = machine.step + sum(count * machine.layers[kind] for kind, count in counts.items())
        each = ", ".join(f"{count} {kind} of {1e3 * machine.layers[kind]:.2f} ms" for kind, count in counts.items())
        found.append(
            Term("calls", calls, f"Python and meeting of threads: {each}, {1e3 * machine.step:.2f} ms besides")
        )
        if step.rows > 1:
            more = step.rows - 1
            numbers = more * model.layers * model.hidden
            how = f"{numbers / 1e6:.1f} million numbers of {more} further rows, {1e9 * machine.rows:.1f} ns each"
            found.append(Term("rows", numbers * machine.rows, how))
        if not pack and held.whole:
            count = model.layers * hit(model, step.rows)
            how = f"{count:.0f} experts one by one, {1e6 * machine.experts:.0f} us each"
            found.append(Term("experts", count * machine.experts, how))
    if not held.whole:
        assert machine.disk is not None
        missed = (1 - held.hits) * sum(load.read for load in loads if load.role == Role.EXPERTS)
        wait = max(0.0, missed / machine.disk - held.hits * experts)
        how = f"{missed / 1e6:.1f} MB at {machine.disk / 1e9:.2f} GB/s, {held.hits:.0%} of experts being there"
        found.append(Term("disk", wait, f"{how}; less what is multiplied meanwhile"))
    return found


def _rates(machine: Machine, kind: str) -> str:
    if not machine.measured:
        return f"at {machine.bandwidth / 1e9:.0f} GB/s or {machine.rate / 1e12:.1f} TFLOP/s, the longer"
    if kind not in machine.reads:
        return f"at {machine.bandwidth / 1e9:.1f} GB/s"
    return f"at {machine.reads[kind] / 1e9:.1f} GB/s, rows after the first at {machine.rates[kind] / 1e9:.0f} GFLOP/s"


def seconds(found: Sequence[Term]) -> float:
    return sum(term.seconds for term in found)
