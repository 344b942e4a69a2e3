"""Means over tokens, and how far another draw of the documents would move them.

Tokens of one document are alike, so a document is the unit that varies; kinds of documents are strata, which another
draw would hold in the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BEYOND = 3
"""Standard errors by which a difference must exceed what is allowed, to be called wrong."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; both NaN where no token counts."""

    value: float
    error: float

    def beyond(self, allowed: float) -> bool:
        """Whether it lies further from zero than allowed, by `BEYOND` standard errors; what is no number does."""
        return not abs(self.value) <= allowed + BEYOND * self.error


def mean(sums: ArrayLike, tokens: ArrayLike, strata: Sequence[str]) -> Estimate:
    """The mean over all tokens of what documents sum up to.

    Args:
        sums: ``[documents]``, the sum over a document's tokens.
        tokens: ``[documents]``, how many those are.
        strata: ``[documents]``, the kind of each; of each kind at least two.

    Returns:
        The ratio of both sums, and its standard error, linearised: of ``sums - ratio * tokens``, the variance within
        each stratum.

    Raises:
        ValueError: a stratum holds one document, which says nothing of how much documents vary.

    Source: Cochran, "Sampling Techniques", 3rd ed., section 6.11 (the combined ratio estimate).
    """
    total, count = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    if not count.sum():
        return Estimate(math.nan, math.nan)
    ratio = total.sum() / count.sum()
    apart = total - ratio * count
    kinds, variance = np.asarray(strata), 0.0
    for kind in sorted(set(strata)):
        own = apart[kinds == kind]
        if len(own) < 2:
            raise ValueError(f"one document of kind {kind!r} says nothing of how much they vary: give at least two")
        variance += len(own) * own.var(ddof=1)
    return Estimate(float(ratio), float(math.sqrt(variance) / count.sum()))


def share(right: float, asked: int) -> float:
    """The standard error of a share of questions answered: that of so many independent answers."""
    return math.sqrt(right * (1 - right) / asked)
