"""The scores that FlagRelease publishes for DeepSeek-V4-Flash, and how far chance alone moves such scores."""

from __future__ import annotations

import math

from flagops import tables

from .statistics import share

QUESTIONS = {"GPQA": 198, "AIME": 30}
"""Of GPQA-diamond, and of both AIME papers of a year."""
SCORES = {
    "Nvidia": (69.70, 73.33),
    "Nvidia + FlagOS": (67.17, 63.33),
    "Ascend": (71.72, 73.33),
    "Zhenwu": (71.72, 70.00),
    "Hygon": (70.20, 70.00),
    "Moore Threads": (65.66, 66.67),
    "MetaX": (64.14, 70.00),
    "Iluvatar": (63.33, 73.33),
    "Kunlunxin": (61.11, 66.67),
}
"""Percent right, by chip; the cards at https://huggingface.co/FlagRelease, the first as their baseline."""
COLUMNS = ("chip", *(word for test in QUESTIONS for word in (test, "to Nvidia's own", "in standard errors")))


def rows() -> list[tuple[str, ...]]:
    """Score and difference of each chip, with the standard errors of independent runs, in points."""
    own = next(iter(SCORES.values()))
    made = []
    for chip, scores in SCORES.items():
        cells = [chip]
        for score, base, asked in zip(scores, own, QUESTIONS.values(), strict=True):
            error = 100 * share(score / 100, asked)
            apart = math.hypot(error, 100 * share(base / 100, asked))
            cells.append(f"{score:.2f} ± {error:.1f}")
            more = [f"{score - base:+.2f} ± {apart:.1f}", f"{(score - base) / apart:+.1f}"]
            cells += ["", ""] if scores is own else more
        made.append(tuple(cells))
    return made


def show() -> None:
    """The table, for a terminal."""
    asked = ", ".join(f"{test} {count}" for test, count in QUESTIONS.items())
    tables.show(f"beside it, what FlagRelease publishes for DeepSeek-V4-Flash ({asked} questions)", COLUMNS, rows())


def facts() -> dict[str, dict[str, dict[str, float]]]:
    """The same as numbers."""
    return {
        chip: {
            test: {"value": score, "error": 100 * share(score / 100, asked)}
            for (test, asked), score in zip(QUESTIONS.items(), scores, strict=True)
        }
        for chip, scores in SCORES.items()
    }
