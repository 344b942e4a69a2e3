"""Experts of a model larger than memory: read on demand into an arena of a fixed size, kept by use.

They are read (`preadv`) rather than mapped, for the kernel keeps as many mapped pages of a process as it likes. What a
router has chosen is read ahead by threads while the experts before are multiplied; these come in the order of their
ids whatever is in the arena, so that the budget changes no bit of a result.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flagops.checkpoint import Refused
from flagops.checkpoint.progress import amount
from flagops.checkpoint.source import Reader

from .products import BLOCK, Stack, Weight
from .storage import Mapped

THREADS = 4
_MOST = 64  # experts of a group, the next of which is read meanwhile
_ALIGNED = 64
Expert = tuple[Weight, Weight, Weight]
Key = tuple[int, int]
"""Of which layer, and which of its experts."""


class Span(NamedTuple):
    """Where a tensor of an expert lies: in a file, and in a slot of the arena."""

    like: Tensor
    file: str
    offset: int
    place: int


@dataclass(frozen=True)
class ArenaReport:
    """What an arena has done since it was made.

    hits, reads: experts that were there, and that were read; `read` bytes of them. waited: seconds in which products
    waited for reads. tokens: that went through the first layer of experts.
    """

    size: int
    hits: int
    reads: int
    read: int
    waited: float
    tokens: int

    def __str__(self) -> str:
        asked = self.hits + self.reads
        return (
            f"experts: {self.hits} of {asked} were in the arena of {amount(self.size)}"
            f" ({100 * self.hits / max(asked, 1):.0f}%); {amount(self.read)} read,"
            f" {amount(self.read / max(self.tokens, 1))} a token; {self.waited:.2f} s waited for reads"
        )


class Arena:
    """Slots for experts of a mapped checkpoint.

    room: bytes; at least two experts must fit, else ValueError says how much is missing.
    """

    def __init__(self, mapped: Mapped, layers: Sequence[Sequence[Expert]], room: int) -> None:
        self._mapped, self._experts = mapped, layers
        self._spans: dict[Key, list[Span | None]] = {}
        record = max(self._laid(layer, index) for layer, experts in enumerate(layers) for index in range(len(experts)))
        slots = min(room // max(record, 1), len(self._spans))
        if slots < 2:
            raise ValueError(
                f"memory: {amount(max(room, 0))} are left for experts, of which two need {amount(2 * record)}; "
                f"give {amount(2 * record - room)} more"
            )
        memory = torch.empty(slots * record + _ALIGNED, dtype=torch.uint8)
        first = -memory.data_ptr() % _ALIGNED
        self._slots = memory[first : first + slots * record].view(slots, record)
        self._free = list(range(slots))
        self._half = min(slots // 2, _MOST)
        self._held: OrderedDict[Key, tuple[int, Future[Expert]]] = OrderedDict()  # the longest unused first
        self._lock, self._local = threading.Lock(), threading.local()
        self._pool = ThreadPoolExecutor(THREADS, "flagops-experts")
        self._hits = self._reads = self._read = self._tokens = 0
        self._waited = 0.0

    def report(self) -> ArenaReport:
        return ArenaReport(self._slots.numel(), self._hits, self._reads, self._read, self._waited, self._tokens)

    def take(self, layer: int, wanted: Sequence[int], tokens: int) -> Iterator[Expert]:
        """The wanted experts of a layer one after the other, each valid until the next."""
        for group in self._served(layer, _cut(wanted, self._half), tokens):
            yield from group.values()

    def stacks(self, layer: int, indices: Tensor) -> Iterator[Stack] | None:
        """The slots as stacked weights, each valid until the next; None where the experts of a layer do not lie there
        as `flagops.moe_experts` takes them."""
        stacked = self._stacked(layer)
        return None if stacked is None else self._slotted(layer, indices, stacked)

    def _slotted(self, layer: int, indices: Tensor, stacked: tuple[Tensor, ...]) -> Iterator[Stack]:
        wanted = sorted(set(indices.flatten().tolist()) - {-1})
        there = [index for index in wanted if (layer, index) in self._held]
        missing = [index for index in wanted if (layer, index) not in self._held]
        groups = [*_cut(there, self._half), *_cut(missing, self._half)]
        for group in self._served(layer, groups, len(indices)):
            places = torch.full((len(self._experts[layer]) + 1,), -1, dtype=torch.int32)
            for index in group:
                places[index] = self._held[layer, index][0]
            yield places, stacked

    def _served(self, layer: int, groups: Sequence[Sequence[int]], tokens: int) -> Iterator[dict[int, Expert]]:
        """Groups of experts, each valid until the next, which is read meanwhile; by one thread at a time.

        Raises Refused that names tensor and file where one cannot be read.
        """
        with self._lock:
            self._tokens += 0 if layer else tokens
            for index in (index for group in reversed(groups) for index in group):  # what is wanted last goes first
                if (layer, index) in self._held:
                    self._held.move_to_end((layer, index))
            current: dict[int, Future[Expert]] = {}
            following: dict[int, Future[Expert]] = {}
            try:
                for group in (*groups, ()):
                    for index in group:
                        busy = {(layer, old) for old in (*current, *group)}
                        following[index] = self._begun((layer, index), busy)
                    if current:
                        yield {index: self._waited_for(future) for index, future in current.items()}
                    current, following = following, {}
            finally:
                for index, future in (current | following).items():  # what failed, or is not asked for any more
                    if future.cancel() or future.exception():
                        self._free.append(self._held.pop((layer, index))[0])

    def _begun(self, key: Key, busy: set[Key]) -> Future[Expert]:
        """An expert that is there or being read."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
            self._hits += 1
            return found[1]
        if self._free:
            slot = self._free.pop()
        else:
            slot, _ = self._held.pop(next(old for old in self._held if old not in busy))
        self._reads += 1
        self._read += sum(span.like.nbytes for span in self._spans[key] if span)
        future = self._pool.submit(self._filled, key, slot)
        self._held[key] = slot, future
        return future

    def _waited_for(self, future: Future[Expert]) -> Expert:
        if future.done():
            return future.result()
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self._waited += time.perf_counter() - start

    def _laid(self, layer: int, index: int) -> int:
        """Note where the tensors of an expert lie; the bytes of its slot. What is not in a file stays where it is.

        Those of gate and up lie end to end, as `flagops.moe_experts` takes them.
        """
        gate, up, down = self._experts[layer][index]
        spans: dict[int, Span] = {}
        end = 0
        for pair in ((gate.codes, up.codes), (gate.scale, up.scale), (down.codes,), (down.scale,)):
            end = -(-end // _ALIGNED) * _ALIGNED
            for x in pair:
                found = self._mapped.where(x)
                if found:
                    spans[id(x)] = Span(x, *found, end)
                    end += x.nbytes
        self._spans[layer, index] = [spans.get(id(x)) for x in _flat((gate, up, down))]
        return -(-end // _ALIGNED) * _ALIGNED

    def _stacked(self, layer: int) -> tuple[Tensor, ...] | None:
        """Codes and scales of all slots, as the experts of a layer lie there."""
        spans = self._spans[layer, 0]
        gate, _, down = self._experts[layer][0]
        fp8 = gate.codes.dtype is torch.float8_e4m3fn
        if not all(spans) or (fp8 and gate.codes.shape[0] % BLOCK):
            return None

        def all_of(span: Any, rows: int) -> Tensor:
            size = span.like.nbytes // span.like.shape[0] * rows
            part = self._slots[:, span.place : span.place + size].view(span.like.dtype)
            return part.view(len(part), rows, span.like.shape[1])

        return (
            all_of(spans[0], 2 * gate.codes.shape[0]), all_of(spans[4], down.codes.shape[0]),
            all_of(spans[1], 2 * gate.scale.shape[0]), all_of(spans[5], down.scale.shape[0]),
        )  # fmt: skip

    def _filled(self, key: Key, slot: int) -> Expert:
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = Reader(self._mapped.source)
        memory, made = self._slots[slot], []
        for span, x in zip(self._spans[key], _flat(self._experts[key[0]][key[1]]), strict=True):
            if span is not None:
                raw = memory[span.place : span.place + x.nbytes]
                try:
                    reader.read(span.file, span.offset, raw.numpy().data)
                except (Refused, OSError) as error:
                    name = self._mapped.at(span.file, span.offset)
                    raise Refused(f"{name} of layer {key[0]}, expert {key[1]} cannot be read: {error}") from error
                x = raw.view(x.dtype).view(x.shape)
            made.append(x)
        return Weight(*made[0:2]), Weight(*made[2:4]), Weight(*made[4:6])

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        return self


def _flat(expert: Expert) -> list[Tensor]:
    return [x for weight in expert for x in weight]


def _cut(wanted: Sequence[int], most: int) -> list[Sequence[int]]:
    return [wanted[first : first + most] for first in range(0, len(wanted), most)]
