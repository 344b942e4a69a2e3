"""What a small model is trained on: bytes of a natural text, and documents that only a long memory can continue.

The text that comes with flagops, ``topics.txt.xz``, is the reference of the Python language as ``pydoc_data.topics`` of
Python 3.11.7 has it, under the PSF License Version 2 (``topics.LICENSE``). Every tenth block of a text is held out. A
batch is a function of (seed, step), on every machine the same.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

START = 256
"""The token before each document; bytes are tokens 0 to 255."""
VOCABULARY = 264
BLOCK, HELD = 4096, 10
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
RANDOM, LANGUAGE, KNOWN = range(3)
"""What can be said of a token before it is read: nothing, what its language says, or all, by a perfect memory. A model
is trained and judged by the latter two: letters drawn at random teach nothing, and their gradient is noise."""
Piece = tuple[bytes, int]


def shipped() -> bytes:
    """The text that comes with flagops."""
    return lzma.decompress((Path(__file__).parent / "topics.txt.xz").read_bytes())


class Corpus:
    """Documents of so many tokens, drawn from a text and from tasks.

    text: at least two times `HELD` blocks, so that both parts hold a whole document. Raises ValueError if shorter.
    """

    def __init__(self, text: bytes) -> None:
        least = 2 * HELD * BLOCK
        if len(text) < least:
            raise ValueError(f"the corpus has {len(text)} bytes, expected at least {least}")
        self.digest = hashlib.sha256(text).hexdigest()
        blocks = [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]
        self._train = [b"".join(blocks[at : at + HELD - 1]) for at in range(0, len(blocks), HELD)]
        self._held = blocks[HELD - 1 :: HELD]

    def batch(
        self, seed: int, step: int, count: int, length: int, kinds: tuple[str, ...] = (), held: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Tokens ``[count, length]`` and what can be said of each, of `kinds` in turn, or drawn."""
        rng = np.random.default_rng([seed, step, held])
        names = kinds or tuple(rng.choice([*KINDS], count, p=[share for _, share in KINDS.values()]))
        tokens = np.full((count, length), START, np.int64)
        sayable = np.full((count, length), RANDOM, np.int8)
        for row in range(count):
            at = 1
            make = KINDS[names[row % len(names)]][0]
            for piece, what in make(self, rng, length, held):
                codes = np.frombuffer(piece, np.uint8)[: length - at]
                tokens[row, at : at + len(codes)], sayable[row, at : at + len(codes)] = codes, what
                at += len(codes)
                if at == length:
                    break
        return tokens, sayable

    def span(self, rng: np.random.Generator, count: int, held: bool) -> bytes:
        """Consecutive bytes of the text, or all of a part that is shorter."""
        parts = self._held if held else self._train
        part = parts[rng.integers(len(parts))]
        at = int(rng.integers(max(1, len(part) - count)))
        return part[at : at + count]


def word(rng: np.random.Generator, least: int, most: int) -> bytes:
    """Random letters."""
    return rng.choice(LETTERS, rng.integers(least, most + 1)).tobytes()


def words(rng: np.random.Generator, count: int, least: int, most: int) -> list[bytes]:
    """Different words."""
    found: dict[bytes, None] = {}
    while len(found) < count:
        found[word(rng, least, most)] = None
    return list(found)


def text(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """The natural text."""
    while True:
        yield corpus.span(rng, length, held), LANGUAGE


def facts(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """The natural text, with sentences in it that give names a code, and repeat it later."""
    codes = [(name, word(rng, 3, 5)) for name in words(rng, int(rng.integers(2, 9)), 3, 6)]
    said: set[bytes] = set()
    while True:
        yield corpus.span(rng, int(rng.integers(20, max(21, length // 8))), held), LANGUAGE
        name, code = codes[rng.integers(len(codes))]
        yield b"\nThe code of ", LANGUAGE
        yield name, RANDOM
        yield b" is ", LANGUAGE
        yield code + b".\n", KNOWN if name in said else RANDOM
        said.add(name)


def recall(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """Pairs of key and value, each again and again, in no order."""
    keys = words(rng, int(rng.integers(4, max(5, length // 24))), 2, 4)
    values = [word(rng, 2, 4) for _ in keys]
    said: set[int] = set()
    while True:
        at = int(rng.integers(len(keys)))
        yield keys[at] + b"=", RANDOM
        yield values[at] + b"\n", KNOWN if at in said else RANDOM
        said.add(at)


def table(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """Numbered rows, and then questions for them: what is asked lies half a document back."""
    rows = [word(rng, 3, 5) for _ in range(max(2, min(100, length // 20)))]
    for at, row in enumerate(rows):
        yield b"%02d: " % at + row + b"\n", RANDOM
    while True:
        at = int(rng.integers(len(rows)))
        yield b"%02d? " % at, RANDOM
        yield rows[at] + b"\n", KNOWN


def copy(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """Random letters, and the same again."""
    block = word(rng, 16, max(17, length // 2)) + b"|"
    yield block, RANDOM
    while True:
        yield block, KNOWN


def lexicon(corpus: Corpus, rng: np.random.Generator, length: int, held: bool) -> Iterator[Piece]:
    """A language of this document's own: few words, some frequent, whose first letters tell the rest."""
    known = words(rng, int(rng.integers(8, 65)), 2, 7)
    share = 1 / np.arange(1, len(known) + 1)
    share /= share.sum()
    while True:
        yield known[rng.choice(len(known), p=share)] + b" ", LANGUAGE


KINDS = {
    "text": (text, 0.25), "facts": (facts, 0.1), "recall": (recall, 0.25), "table": (table, 0.1), "copy": (copy, 0.2),
    "lexicon": (lexicon, 0.1),
}  # fmt: skip
"""What documents are made by, and their share of a batch."""
