"""A plan in words and numbers: tables for people, one document for programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flagops import tables
from flagops.checkpoint.progress import amount

from . import machine
from .cost import Load, Step
from .machine import Machine
from .model import Model, Part, Role
from .times import Residence, Term, seconds

_MILLION = 1_000_000


@dataclass(frozen=True)
class Phase:
    """A step with all that it costs; terms are None where no machine is named."""

    step: Step
    loads: list[Load]
    held: Residence
    terms: list[Term] | None

    @property
    def read(self) -> float:
        return sum(load.read for load in self.loads)

    @property
    def flops(self) -> float:
        """Of one new token."""
        return sum(load.flops for load in self.loads) / self.step.rows

    @property
    def rate(self) -> float | None:
        """Tokens a second of all sequences."""
        return self.step.rows / seconds(self.terms) if self.terms else None


def document(
    options: argparse.Namespace, found: Sequence[Part], cache: float, on: Machine | None, decode: Phase, prefill: Phase
) -> dict[str, Any]:
    """All that is known, in bytes, FLOP, seconds and tokens."""
    weights = sum(part.held for part in found)
    return {
        "model": options.model,
        "format": options.format,
        "context": options.context,
        "prompt": options.prompt,
        "sequences": options.batch,
        "memory": {"weights": weights, "cache": cache, "process": on.process if on else 0, "given": options.memory},
        "weights": [vars(part) for part in found],
        "machine": machine.written(on) if on else None,
        "decode": _said(options, decode),
        "prefill": _said(options, prefill),
    }


def _said(options: argparse.Namespace, phase: Phase) -> dict[str, Any]:
    return {
        "read": phase.read,
        "flops": phase.flops,
        "loads": [vars(load) for load in phase.loads],
        "hit_rate": phase.held.hits,
        "terms": phase.terms and [vars(term) for term in phase.terms],
        "tokens_per_second": phase.rate,
        "million": _million(phase.rate, options.watts, options.price, options.rent) if phase.rate else None,
    }


def _million(rate: float, watts: float | None, price: float | None, rent: float | None) -> dict[str, float | None]:
    """Hours, kWh and money for a million tokens; None for what cannot be known."""
    hours = _MILLION / rate / 3600
    energy = watts * hours / 1000 if watts else None
    paid = ([energy * price] if energy and price else []) + ([rent * hours] if rent else [])
    return {"hours": hours, "kWh": energy, "cost": sum(paid) if paid else None}


def show(
    options: argparse.Namespace, model: Model, on: Machine | None, decode: Phase, prefill: Phase, made: dict[str, Any]
) -> None:
    """Print what a token needs, whether that fits, and how long it takes."""
    held: dict[str, float] = {}
    for part in made["weights"]:
        held[part["role"]] = held.get(part["role"], 0) + part["held"]
    roles = [role for role in Role if role in held or any(load.role == role for load in decode.loads)]
    rows = [
        (
            role,
            _kinds(decode, role),
            amount(held[role]) if role in held else "",
            *_work(decode, role),
            *_work(prefill, role),
        )
        for role in roles
    ]
    several = f" of {options.batch} sequences" if options.batch > 1 else ""
    tables.show(
        f"{options.model}, {model.layers} layers, weights as {options.format}: a step{several} after {options.context} "
        f"tokens, and a prompt of {options.prompt}",
        ("what", "as", "held", "read a step", "MFLOP a token", "read a prompt", "MFLOP a token of it"),
        [*rows, ("all", "", amount(made["memory"]["weights"]), *_work(decode), *_work(prefill))],
    )
    print(_memory(options, decode, made))
    if on is None:
        print("for times name a machine: --machine FILE, --chip NAME, or --bandwidth and --rate")
        return
    for name, phase in (("a step", decode), ("the prompt", prefill)):
        if phase.terms is None:
            continue
        whole = seconds(phase.terms)
        tables.show(
            f"{name} on {on.name}",
            ("what", "ms", "share", "how"),
            [(term.what, f"{1e3 * term.seconds:.2f}", f"{term.seconds / whole:.0%}", term.how) for term in phase.terms],
        )
        print(_verdict(name, phase, on, made))


def _kinds(phase: Phase, role: Role) -> str:
    """In which kinds a role's weights are, those that take most first."""
    these = sorted((load for load in phase.loads if load.role == role), key=lambda load: -load.read)
    return ", ".join(dict.fromkeys(load.kind for load in these))


def _work(phase: Phase, role: Role | None = None) -> tuple[str, str]:
    these = [load for load in phase.loads if role in (None, load.role)]
    flops = sum(load.flops for load in these) / phase.step.rows
    return amount(sum(load.read for load in these)), f"{flops / 1e6:.1f}"


def _memory(options: argparse.Namespace, decode: Phase, made: dict[str, Any]) -> str:
    memory, held = made["memory"], decode.held
    text = f"memory: {amount(memory['weights'])} of weights and {amount(memory['cache'])} of cache"
    if memory["process"]:
        text += f" in a process of {amount(memory['process'])}"
    if options.memory is None:
        return f"{text}; all of it counts as being there: --memory SIZE says whether it is"
    if held.whole:
        return f"{text} fit in {amount(options.memory)}"
    if held.room <= 0:
        return f"{text}: {amount(-held.room)} too much for {amount(options.memory)} even without routed experts"
    text += f": {amount(held.room)} of {amount(held.experts)} of experts fit in {amount(options.memory)}"
    return text + ("" if made["fits"] else "; give --disk for the rest, or it does not run")


def _verdict(name: str, phase: Phase, on: Machine, made: dict[str, Any]) -> str:
    assert phase.terms
    longest = max(phase.terms, key=lambda term: term.seconds)
    limit = "expected" if on.measured else "at most by these figures; a chip's rate is that of bfloat16"
    text = f"{phase.rate:.4g} tokens a second {limit}; the most of it is {longest.what}"
    million = made["decode" if name == "a step" else "prefill"]["million"]
    facts = [f"{million['kWh']:.4g} kWh"] if million["kWh"] else []
    facts += [f"a cost of {million['cost']:.4g}"] if million["cost"] else []
    return text + (f"; a million tokens take {million['hours']:.4g} hours, {', '.join(facts)}" if facts else "")
