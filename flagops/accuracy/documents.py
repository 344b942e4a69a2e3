"""What models are measured on: held-out documents of each kind in turn, in bytes or in a model's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flagops.train.corpus import KINDS, RANDOM, Corpus

LEAST = 64
"""Tokens of the shortest document that still asks for what it has told."""
_BYTES = 4
"""Drawn for each token of a vocabulary of words: more than one takes on average, and what is left is cut."""


@dataclass(frozen=True)
class Document:
    """ids: ``[1, n]``. sayable: ``[n]``, what can be said of each (`flagops.train.corpus`)."""

    kind: str
    ids: Tensor
    sayable: Tensor

    @property
    def counted(self) -> Tensor:
        """``[n - 1]``: which of the predicted tokens count, those of which something can be said."""
        return self.sayable[1:] > RANDOM


def documents(corpus: Corpus, seed: int, tokens: int, length: int, tokenizer: Any = None) -> list[Document]:
    """At least `tokens` tokens in documents of at most `length`: whole rounds of every kind, and two rounds at least.

    tokenizer: a fast one of transformers; without one tokens are bytes, after one that begins a document. Raises
    ValueError for documents too short to be recalled from.
    """
    if length < LEAST:
        raise ValueError(f"documents of {length} tokens are too short to tell and ask: expected at least {LEAST}")
    found: list[Document] = []
    at = 0
    while at < 2 or sum(x.ids.shape[1] for x in found) < tokens:
        for kind in KINDS:
            size = length if tokenizer is None else _BYTES * length
            ids, sayable = corpus.batch(seed, at, 1, size, (kind,), held=True)
            if tokenizer is not None:
                ids, sayable = _tokenised(tokenizer, ids[0, 1:], sayable[0, 1:], length)
            found.append(Document(kind, torch.from_numpy(ids), torch.from_numpy(sayable[-1])))
        at += 1
    return found


def _tokenised(tokenizer: Any, codes: Any, sayable: Any, length: int) -> tuple[Any, Any]:
    """Bytes ``[n]`` in a model's tokens ``[1, m]``, and of each what can be said of the least known of its bytes."""
    text = codes.astype(np.uint8).tobytes().decode("utf-8", "surrogateescape")
    sizes = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    plain = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    made = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = made["input_ids"][:length], made["offset_mapping"][:length]
    known = [sayable[starts[a] : starts[b]].min() if a < b else RANDOM for a, b in places]
    return np.array([ids], np.int64), np.array([known], np.int8)
