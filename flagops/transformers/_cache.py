"""The compressors' part of transformers' cache layers, kept in transformers' own format.

A layer always holds what transformers' code expects, so that a patched and an unpatched model can continue each other's
cache and beam search can reorder it. Beside that lies what makes a step fast: the state of `compress_kv`, and room
behind the compressed entries (and for the window before them), so that neither is copied for every token. Both are
used only as long as the layer still holds the very tensors that were published from them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._fit import MODELING

_OWN = "_flagops"


@dataclass(eq=False)
class _State:
    """The state of `compress_kv`, and the tensors of the layer that tell the same."""

    kv: torch.Tensor
    scores: torch.Tensor
    filled: int
    published: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Room:
    """Compressed entries in a longer tensor ``[b, head + capacity, d]``; `view` is what the layer holds of it."""

    rows: torch.Tensor
    head: int
    view: torch.Tensor


def fresh_state(batch: int, bias: torch.Tensor, overlap: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, overlap * bias.shape[0], bias.shape[1])
    kv = torch.zeros(shape, dtype=bias.dtype, device=device)
    return kv, torch.full_like(kv, float("-inf"))


def strange(layer: Any, name: str, batch: int, more: int) -> str | None:
    """Why a cache layer cannot be continued past transformers' own methods, or None.

    more: tokens of the `batch` that its window holds already and its compressor does not.
    """
    modeling, cls = sys.modules[MODELING], type(layer)
    for method in ("store_compression_weights", "update_compressor_states"):
        if getattr(cls, method, None) is not getattr(modeling.DeepseekV4HCACache, method):
            return f"a {cls.__name__} is no cache layer of DeepSeek-V4"
    buffered = layer.buffer_kv[name]
    if buffered is not None and buffered.shape[0] != batch:
        return f"the cache holds the compressors' state of {buffered.shape[0]} sequences, not {batch}"
    seen = layer.entry_count[name] * layer.compress_rate + (0 if buffered is None else buffered.shape[1])
    if seen + more != layer.get_seq_length():
        return "the cache was cropped, which the state of transformers' compressors does not follow"
    return None


def take(layer: Any, name: str, batch: int, bias: torch.Tensor, overlap: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The state that a cache layer is in: ``(kv_state, score_state, filled)``."""
    known = layer.__dict__.get(_OWN, {}).get(name)
    if known and all(one is two for one, two in zip(known.published, _published(layer, name), strict=True)):
        return known.kv, known.scores, known.filled
    kv, scores = fresh_state(batch, bias, overlap, bias.device)
    buffered, gate, previous, previous_gate = _published(layer, name)
    before, filled, width = kv.shape[1] - len(bias), 0, bias.shape[1] // overlap
    parts_kv, parts_scores = [kv[:, :before]], [scores[:, :before]]
    if previous is not None:
        columns = kv[:, :before, width:]
        parts_kv = [torch.cat([previous.to(kv.dtype), columns], -1)]
        parts_scores = [torch.cat([previous_gate.to(kv.dtype), torch.full_like(columns, float("-inf"))], -1)]
    if buffered is not None and buffered.shape[1]:
        filled = buffered.shape[1]
        parts_kv.append(buffered.to(kv.dtype))
        parts_scores.append(gate.to(kv.dtype) + bias[:filled])
    parts_kv.append(kv[:, before + filled :])
    parts_scores.append(scores[:, before + filled :])
    return torch.cat(parts_kv, 1), torch.cat(parts_scores, 1), filled


def put(
    layer: Any,
    name: str,
    kv: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor,
    tokens: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Publish a state in the layer; `tokens`: those in the window that is open, and windows closed so far."""
    filled, closed = tokens
    m = len(bias)
    before = kv.shape[1] - m
    layer.buffer_kv[name] = kv[:, before : before + filled].to(dtype)
    layer.buffer_gate[name] = (scores[:, before : before + filled] - bias[:filled]).to(dtype)
    if before and closed:
        width = kv.shape[2] // 2
        layer.overlap_kv[name] = kv[:, :m, :width].to(dtype)
        layer.overlap_gate[name] = scores[:, :m, :width].to(dtype)
    if not torch.compiler.is_compiling():
        layer.__dict__.setdefault(_OWN, {})[name] = _State(kv, scores, filled, _published(layer, name))


def _published(layer: Any, name: str) -> tuple[Any, ...]:
    previous = getattr(layer, "overlap_kv", {}).get(name), getattr(layer, "overlap_gate", {}).get(name)
    return layer.buffer_kv[name], layer.buffer_gate[name], *previous


def append(layer: Any, name: str, new: torch.Tensor) -> torch.Tensor:
    """Add entries to those of a layer; returns all of them, ``[b, n, d]``."""
    layer.entry_count[name] += new.shape[1]
    old = layer.compressed_kv[name]
    if old is None:
        layer.compressed_kv[name] = new
    elif new.shape[1]:
        if _fixed():
            layer.compressed_kv[name] = torch.cat([old, new], 1)
        else:
            room, count = _room(layer, name, new.shape[1]), old.shape[1]
            room.rows[:, room.head + count : room.head + count + new.shape[1]] = new
            view = room.rows[:, room.head : room.head + count + new.shape[1]]
            layer.__dict__[_OWN][_entries_of(name)] = replace(room, view=view)
            layer.compressed_kv[name] = view
    return layer.compressed_kv[name]


def beside(layer: Any, kv: torch.Tensor, entries: torch.Tensor, window: int) -> torch.Tensor:
    """A layer's keys ``[b, 1, n, d]`` and its entries behind them, in one tensor; in a decode step without a copy of
    the entries."""
    held = None if layer is None else layer.compressed_kv["compressor"]
    if held is None or kv.shape[2] > window or held.shape[1] != entries.shape[2] or _fixed():
        return torch.cat([kv, entries], 2)
    if held.dtype != kv.dtype or held.shape[0] != kv.shape[0] or held.data_ptr() != entries.data_ptr():
        return torch.cat([kv, entries], 2)
    room = _room(layer, "compressor", 0, window)
    first = room.head - kv.shape[2]
    room.rows[:, first : room.head] = kv[:, 0]
    return room.rows[:, None, first : room.head + held.shape[1]]


def snapshot(layer: Any) -> dict[str, Any]:
    """All that a layer holds now: tensors that are replaced as it goes on, and rows that are written behind it."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}


def restore(layer: Any, state: dict[str, Any]) -> None:
    """Let a layer hold what it held at a `snapshot`."""
    vars(layer).clear()
    vars(layer).update((name, dict(x) if isinstance(x, dict) else x) for name, x in state.items())


def _entries_of(name: str) -> str:
    return f"{name} entries"


def _fixed() -> bool:
    """Whether nothing may be written in place: a gradient may be recorded, or the code is traced."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _room(layer: Any, name: str, more: int, head: int = 0) -> _Room:
    """The layer's entries with room for more behind and `head` rows before them."""
    held = layer.compressed_kv[name]
    rooms, key = layer.__dict__.setdefault(_OWN, {}), _entries_of(name)
    room: _Room | None = rooms.get(key)
    count = held.shape[1]
    if (
        room is None
        or room.view is not held
        or room.head < head
        or room.head + count + more > room.rows.shape[1]
        or (room.rows.is_inference() and not torch.is_inference_mode_enabled())
    ):
        head = max(head, room.head if room else 0)
        capacity = count + more + max(64, (count + more) // 4)
        rows = held.new_empty((held.shape[0], head + capacity, held.shape[2]))
        rows[:, head : head + count] = held
        room = rooms[key] = _Room(rows, head, rows[:, head : head + count])
        layer.compressed_kv[name] = room.view
    return room
