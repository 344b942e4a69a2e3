"""Replaced calls by name in the trace of torch's profiler, while one is active."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Fate = tuple[str, str, str]
"""The aten name of a call, who computed it, and why torch did."""


def fates_of(site: Any) -> dict[Callable[[], int], Fate]:
    """What each function that counts calls of a site says of them."""
    counters = (item for handle in site.handles for item in handle._counters.items())
    return {counter.add: (name, by, reason) for (name, _, by, reason), counter in counters}


def annotated(site: Any, plan: Any, args: tuple[Any, ...]) -> Any:
    """A plan whose calls stand in a profiler's trace: ``flagops::matmul/numba [2, 3] [3, 4]``, or why torch has it."""
    import torch

    compute, count = plan
    name, by, reason = _fate(site, count)
    shapes = " ".join(str(list(x.shape)) for x in site.form.inputs(args) if isinstance(x, torch.Tensor))
    if not by:
        with torch._C._profiler._RecordFunctionFast(f"flagops leaves {name} {shapes} to torch: {reason}"):
            return plan

    def ranged(args: tuple[Any, ...]) -> Any:
        with torch._C._profiler._RecordFunctionFast(f"flagops::{by} {shapes}"):
            return compute(args)

    return ranged, count


@functools.lru_cache(maxsize=4096)
def _fate(site: Any, count: Callable[[], int]) -> Fate:
    return fates_of(site).get(count, (site.name, "", "no handle wants it"))
