"""What a step of a model costs: bytes read and operations, by role of the weights, and how long that takes somewhere.

A step decodes one token of each of some sequences, or takes a prompt in. Operations are two for each multiply-add of a
product; norms, rotations and mixing of streams, some per cent of that, are left out. Sources: sections 6, 7 and 10 of
the operator specification for the keys that a query sees, the bytes of cache entries and the experts that tokens hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .model import Model, Part, Role

ENTRIES = {"bf16": (2.0, 2.0), "fp8": (584 / 512, 68 / 128)}
"""Bytes of an element of the cache, of keys and of the indexer's keys, by format: as transformers holds them, and FP8
with 16-bit positions beside FP4 as servers do (FlashMLA's 584 bytes an entry, 68 a key)."""


@dataclass(frozen=True)
class Step:
    """New tokens of some sequences after `context` others in the cache of each; the last of each has logits."""

    tokens: int
    context: int
    sequences: int = 1

    @property
    def rows(self) -> int:
        return self.tokens * self.sequences


@dataclass(frozen=True)
class Load:
    """What a step does with the weights of a role and kind.

    read: bytes. flops: of all rows. once: those of one row of each matrix that is read, None for what has no matrices.
    """

    role: Role
    kind: str
    read: float
    flops: float
    once: float = 0.0


def loads(model: Model, parts: Sequence[Part], step: Step, cache: str = "bf16") -> list[Load]:
    """What a step reads and multiplies, in the order of `parts`, and behind them its cache."""
    found = [_load(model, part, step) for part in parts if part.role != Role.DRAFT]
    return [*found, *_attention(model, step, cache)]


def _load(model: Model, part: Part, step: Step) -> Load:
    each, rows = 2 * part.elements, step.rows
    if part.role in (Role.EMBEDDING, Role.TABLE):
        return Load(part.role, part.kind, part.held / model.vocabulary * rows, 0)
    if part.role == Role.EXPERTS:
        share = hit(model, rows) / model.experts
        return Load(part.role, part.kind, share * part.held, each * model.active / model.experts * rows, share * each)
    if part.role == Role.HEAD:
        rows = step.sequences
    if part.role == Role.INDEXER and (step.context + step.tokens) // model.csa_ratio <= model.index_keys:
        rows = 0  # it takes every entry that there is, and nothing is scored
    return Load(part.role, part.kind, part.held if rows else 0, each * rows, each if rows else 0)


def hit(model: Model, rows: int) -> float:
    """Experts of a layer that so many tokens choose, each its own and all equally likely."""
    return model.experts * (1 - (1 - model.active / model.experts) ** rows)


def _attention(model: Model, step: Step, cache: str) -> list[Load]:
    """Products with the cache; the queries of one step read an entry once."""
    count, last = step.sequences, step.context + step.tokens
    seen = np.arange(step.context + 1, last + 1)  # tokens that each query sees, itself among them
    entry, key = _entry(model, cache)
    scored = last // model.csa_ratio
    pairs = model.layers * np.minimum(seen, model.window).sum()
    pairs += model.csa * np.minimum(seen // model.csa_ratio, model.index_keys).sum()
    pairs += model.hca * (seen // model.hca_ratio).sum()
    read = model.layers * min(last, model.window + step.tokens - 1)
    read += model.csa * min(scored, model.index_keys * step.tokens) + model.hca * (last // model.hca_ratio)
    flops = 4.0 * model.heads * model.head_dim * float(pairs)
    found = [Load(Role.CACHE, "attention", count * read * entry, count * flops)]
    if model.csa and scored > model.index_keys:
        flops = 2.0 * model.index_heads * model.index_dim * model.csa * float((seen // model.csa_ratio).sum())
        found.append(Load(Role.INDEXER, "scores", count * model.csa * scored * key, count * flops))
    return found


def cache_held(model: Model, tokens: int, sequences: int, cache: str) -> float:
    """Bytes of a cache of so many tokens of each sequence: the window of each layer, entries, the indexer's keys."""
    entry, key = _entry(model, cache)
    one = model.layers * min(tokens, model.window) * entry
    one += model.csa * (tokens // model.csa_ratio) * (entry + key) + model.hca * (tokens // model.hca_ratio) * entry
    return sequences * one


def _entry(model: Model, cache: str) -> tuple[float, float]:
    """Bytes of an entry, which is key and value, and of a key of the indexer."""
    entry, key = ENTRIES[cache]
    return entry * model.head_dim, key * model.index_dim
