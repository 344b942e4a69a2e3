"""The named workloads under pytest-benchmark; results are checked first, by the same code as `flagops bench`.

    pytest benchmarks/bench_operators.py --benchmark-enable -k "fp4 and numba" --benchmark-json=out.json

Without ``--benchmark-enable`` each case runs once, as a smoke test, and only where it is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flagops import registry
from flagops.errors import Unsupported
from flagops.tools import measure, workloads

SMOKE = 1e8
"""Floating-point operations of the largest workload that runs when nothing is timed."""


def _cases() -> Iterator[Any]:
    for op in registry.operators().values():
        for workload in op.workloads:
            for backend in measure.usable("cpu"):
                yield pytest.param(op, workload, backend, id=f"{op.name}-{workload}-{backend}")


@pytest.mark.parametrize(("op", "workload", "backend"), _cases())
def test_speed(benchmark: Any, op: Any, workload: str, backend: str) -> None:
    of = workloads.case(op, workload)
    if benchmark.disabled and op.flops(dict(of.dims), of.batch) > SMOKE:
        pytest.skip("too large for a smoke test")
    trial = measure.prepare(op, workload, cold=not benchmark.disabled)
    turn = iter(trial.sets * 10_000)

    def fresh() -> tuple[list[Any], dict[str, Any]]:
        measure.poison(trial.out)
        return [*next(turn), trial.out], {"backend": backend}

    benchmark.group = f"{op.name} {workload}"
    benchmark.extra_info.update(flops=trial.flops, bytes=trial.bytes, machine=measure.machine())
    with torch.no_grad():
        try:
            args, chosen = fresh()
            of(op)(*args, **chosen)
        except Unsupported as reason:
            pytest.skip(str(reason))
        workloads.verify(op, args[:-1], trial.out)
        benchmark.pedantic(of(op), setup=fresh, rounds=1 if benchmark.disabled else 10)
