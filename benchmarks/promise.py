"""A promised speed: its number and limit, and ratios of times that were taken side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from flagops.tools import results


@dataclass(frozen=True)
class Result:
    """A measured number and its limit, the least or, with `most`, the greatest; None where it is for information."""

    target: str
    value: float
    limit: float | None = None
    most: bool = False
    unit: str = "x"
    detail: str = ""

    @property
    def reached(self) -> bool:
        return self.limit is None or (self.value <= self.limit if self.most else self.value >= self.limit)

    def cells(self) -> list[str]:
        limit = "" if self.limit is None else f"{'<=' if self.most else '>='} {self.limit:g} {self.unit}"
        verdict = "" if self.limit is None else "pass" if self.reached else "MISS"
        return [self.target, limit, f"{self.value:.3g} {self.unit}", verdict, self.detail]


def pairs(times: Mapping[str, list[float]], one: str, two: str) -> Iterator[tuple[float, float]]:
    return zip(times[one], times[two], strict=True)


def ratio(times: Mapping[str, list[float]], ours: str, theirs: str, work: float = 1.0) -> tuple[float, str]:
    """How many times as fast as theirs ours did `work` times as much; beside it the ratio of the fastest of each."""
    fastest = work * min(times[theirs]) / min(times[ours])
    return work * median(t / o for o, t in pairs(times, ours, theirs)), f"{times_of(times)}; fastest {fastest:.3g} x"


def times_of(times: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{name} {results.seconds(median(found))}" for name, found in times.items())
