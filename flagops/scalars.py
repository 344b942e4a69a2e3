"""The kinds of scalar that cards take: one wording and one type of error each.

A value of another kind is a TypeError, one out of range a ValueError; a bool is no number, a whole float is a whole
number. Each function gives a `Scalar`; `choices` and `axis` are what a `Scalar` says of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from flagops.arrays import parse_dtype
from flagops.operator import Scalar

Choices = Sequence[Any] | Callable[..., Sequence[Any]]


def flag(choices: Choices = (False, True)) -> Scalar:
    """True or False."""

    def parse(value: Any) -> bool:
        if type(value).__name__ not in ("bool", "bool_"):  # Python's and NumPy's
            raise TypeError(f"must be True or False, got {value!r}")
        return bool(value)

    return Scalar(parse, choices, torch="bool")


def whole(
    choices: Choices = (), least: int = 1, below: int | None = None, even: bool = False, axis: str | None = None
) -> Scalar:
    """An integer from `least` on and below `below`."""
    limits = f"{'an even' if even else 'a'} whole number of at least {least}"
    limits += "" if below is None else f" and below {below}"

    def parse(value: Any) -> int:
        number = _number(value, int, "a whole number")
        if number != value:
            raise TypeError(f"must be a whole number, got {value!r}")
        if number < least or (below is not None and number >= below) or (even and number % 2):
            raise ValueError(f"must be {limits}, got {value!r}")
        return int(number)

    return Scalar(parse, choices, axis, torch="int")


def pair(choices: Choices, least: int = 1) -> Scalar:
    """Two integers, as of rows and columns."""
    one = whole(least=least).parse

    def parse(value: Any) -> tuple[int, int]:
        try:
            first, second = value
        except (TypeError, ValueError):
            raise TypeError(f"must be two whole numbers, got {value!r}") from None
        return one(first), one(second)

    return Scalar(parse, choices, torch="int[2]")


def real(
    choices: Choices, least: float = -math.inf, above: float = -math.inf, finite: bool = True, optional: bool = False
) -> Scalar:
    """A number of at least `least` and above `above`, or None if `optional`."""
    limits = "a finite number" if finite else "a number"
    limits += f" of at least {least}" if least > -math.inf else f" above {above}" if above > -math.inf else ""
    kind = " or None" if optional else ""

    def parse(value: Any) -> float | None:
        if value is None and optional:
            return None
        number = _number(value, float, f"a number{kind}")
        if not least <= number or not (above < number or above == -math.inf) or (finite and not math.isfinite(number)):
            raise ValueError(f"must be {limits}{kind}, got {value!r}")
        return float(number)

    return Scalar(parse, choices, torch="float?" if optional else "float")


def number(choices: Choices, optional: bool = False) -> Scalar:
    """A number that stays an integer if it is one; NaN and infinities too, or None if `optional`."""

    def parse(value: Any) -> Any:
        if value is None and optional:
            return None
        if isinstance(value, int):
            return value
        return _number(value, float, "a number or None" if optional else "a number")

    return Scalar(parse, choices, torch="Scalar?" if optional else "Scalar")


def dtype(names: Sequence[str], choices: Choices | None = None) -> Scalar:
    """One of some dtypes, as a name or as torch's or NumPy's own object."""

    def parse(value: Any) -> str:
        name = parse_dtype(value)
        if name not in names:
            raise ValueError(f"must be {', '.join(names[:-1])} or {names[-1]}, got {name}")
        return name

    return Scalar(parse, names if choices is None else choices, torch="str")


def _number(value: Any, kind: Callable[[Any], Any], words: str) -> Any:
    """`value` as a Python number; text, bools and what has no number are refused."""
    if isinstance(value, (str, bytes)) or type(value).__name__ in ("bool", "bool_"):
        raise TypeError(f"must be {words}, got {value!r}")
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch, of several elements
        raise TypeError(f"must be {words}, got {value!r}") from None
