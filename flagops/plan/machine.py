"""The figures of a machine that times follow from: measured by `flagops bench --roofline`, published, or given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flagops import chips

ATTENTION_KINDS = ("sliding", "csa", "hca")


@dataclass(frozen=True)
class Machine:
    """What a machine reads and multiplies in a second.

    bandwidth: bytes read from memory. rate: FLOP of products, of any kind, where the figures are published or given.

    Where they are measured, those of this library's kernels as models call them:

    reads: bytes of weights in products of one row, by kind; with FP4 and FP8 that is what decoding takes as well.
    rates: FLOP of each row beyond the first, by kind; of attention and of the indexer's scores all of them.
    layers: seconds of a layer beyond its products, by kind of attention: Python, the calls of operators, threads that
    meet. rows: seconds of a layer beyond its products for each number that a further row of a prompt is wide: norms,
    streams, quantisation. experts: of each expert that is called by itself. step: of what is no layer.
    process: bytes that a process holds before it has a model. disk: bytes read from a cold file, by four threads.
    """

    name: str
    bandwidth: float
    rate: float = 0.0
    reads: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    rows: float = 0.0
    experts: float = 0.0
    step: float = 0.0
    process: int = 0
    disk: float | None = None
    single: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether all measured figures are numbers above zero, and all kinds of layers are there; experts that are
        called one by one may take no longer than together, and further rows no longer than their products."""
        tables = self.reads, self.rates, self.layers
        if not all(isinstance(table, dict) and table for table in tables) or set(self.layers) != set(ATTENTION_KINDS):
            return False
        alone = self.bandwidth, self.single, self.process, self.experts or 1, self.rows or 1, self.step, self.disk or 1
        every = *alone, *(x for each in tables for x in each.values())
        return all(type(x) in (int, float) and 0 < x < math.inf for x in every)

    @property
    def measured(self) -> bool:
        return bool(self.reads)

    def seconds(self, kind: str, read: float, flops: float, once: float) -> float:
        """Of a product: published figures bound it from below by the longer of reading and multiplying; a kernel that
        was measured reads with the first row, whose FLOP are `once`, and multiplies with all others after that."""
        if not self.measured:
            return max(read / self.bandwidth, flops / self.rate)
        if not flops:
            return read / self.bandwidth
        for figures in (self.reads, self.rates):
            if kind not in figures:
                raise ValueError(
                    f"{self.name}: no product of {kind} was measured, only of {', '.join(figures)}; "
                    "choose another --format, or a machine by --chip or --bandwidth and --rate"
                )
        return read / self.reads[kind] + max(0.0, flops - once) / self.rates[kind]


def of_chip(name: str, bandwidth: float | None = None, rate: float | None = None) -> Machine:
    """A chip of the table, by its published figures or those that are given in their place; ValueError where one is
    not known, and where a word names several chips."""
    found = chips.named([name])
    if len(found) > 1:
        raise ValueError(f"--chip {name} names {', '.join(chip.name for chip in found)}; give one of them")
    (chip,) = found
    bandwidth = bandwidth or (chip.bandwidth or 0) * 1e9
    rate = rate or (chip.rate or 0) * 1e12
    for option, known in (("bandwidth", bandwidth), ("rate", rate)):
        if not known:
            raise ValueError(f"the {option} of {chip.name} was not found published; give it with --{option}")
    return Machine(chip.name, bandwidth, rate)


def of_file(path: Path) -> Machine:
    """The figures that ``flagops bench --roofline --json FILE`` has written; ValueError for another file."""
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))["roofline"]
        names = {x.name for x in fields(Machine)}
        made = Machine(**{name: said[name] for name in names})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        made = None
    if made is None or not made.whole:
        raise ValueError(f"{path} holds no figures of a machine; write it with flagops bench --roofline --json {path}")
    return made


def described(machine: Machine) -> list[tuple[str, str, str]]:
    """Each figure, in words: what it is, how much, and how it was taken."""
    rows = [
        ("bandwidth", f"{machine.bandwidth / 1e9:.1f} GB/s", "memory, read by all threads"),
        ("", f"{machine.single / 1e9:.1f} GB/s", "the same by one thread"),
    ]
    for kind, speed in machine.reads.items():
        if kind not in _RATES:  # which read at the bandwidth of memory
            rows.append((kind, f"{speed / 1e9:.1f} GB/s", "weights in products of one row"))
    for kind, speed in machine.rates.items():
        rows.append((kind, f"{speed / 1e9:.1f} GFLOP/s", _RATES.get(kind, "rows beyond the first, of 128")))
    for kind, time in machine.layers.items():
        rows.append((f"{kind} layer", f"{1e3 * time:.2f} ms", "besides its products: Python, calls, threads that meet"))
    rows.append(("a row", f"{1e9 * machine.rows:.1f} ns", "a layer and number of a further row, besides products"))
    rows.append(("an expert", f"{1e6 * machine.experts:.0f} us", "besides, where experts are called one by one"))
    rows.append(("a step", f"{1e3 * machine.step:.2f} ms", "besides its layers"))
    rows.append(("a process", f"{machine.process / 1e6:.0f} MB", "before it has a model"))
    if machine.disk:
        rows.append(("disk", f"{machine.disk / 1e9:.2f} GB/s", "4 MiB at a time by four threads, page cache cold"))
    return rows


_RATES = {"attention": "of one query with its cache", "scores": "of one query with the indexer's keys"}


def written(machine: Machine) -> dict[str, Any]:
    """What `of_file` reads."""
    return asdict(machine)
