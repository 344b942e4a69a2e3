"""The parity suite: the comparison that every kernel must pass, on cases drawn from an operator's card.

Nothing here needs a test framework; the helpers raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from flagops.call import of
from flagops.cases import INTERPRETED, Case, Scope, as_kind, draw_case, dtypes_near, kinds_of, scope, workload
from flagops.errors import Unsupported
from flagops.judge.calls import assert_facts, assert_parity, rows
from flagops.judge.comparison import assert_bits, assert_near, assert_of, compare
from flagops.operator import Operator

T = TypeVar("T")


def check(op: Operator, backend: str, examples: int = 0, seed: int = 0) -> tuple[int, dict[str, int]]:
    """The parity suite without a test framework: ``examples`` cases (0: as the scope says), drawn from the seed.

    Returns how many ran and why others were refused. Raises AssertionError at the first wrong result.
    """
    rng = np.random.default_rng([seed, zlib.crc32(op.name.encode())])

    def choose(options: Sequence[T]) -> T:
        return options[int(rng.integers(0, len(options)))]

    kinds = kinds_of(backend)
    within = scope(backend)
    ran, refused = 0, dict[str, int]()
    for _ in range(examples or within.examples):
        case = draw_case(op, choose, within, kinds)
        try:
            assert_parity(op, backend, case)
            if ran % 10 == 0:
                assert_facts(op, backend, case, repeats=3)
            ran += 1
        except Unsupported as reason:
            refused[str(reason)] = refused.get(str(reason), 0) + 1
    return ran, refused


def touch(op: Operator, backend: str) -> Iterator[int]:
    """Run an operator once for each dtype and scalar choice, so that its kernels are compiled; yields 1 a call."""
    first = next(iter(op.tensors))
    for dtype in op.dtype_choices(first, {}):
        for variant in range(4):

            def choose(options: Sequence[T], dtype: str = dtype, variant: int = variant) -> T:
                return options[options.index(dtype)] if dtype in options else options[variant % len(options)]

            case = draw_case(op, choose, Scope((33, 65), 1 << 20, 1))
            try:
                given = case.arguments()
                of(op)(*(as_kind(x, "torch", dict(case.dtypes).get(n)) for n, x in given.items()), backend=backend)
                yield 1
            except Unsupported:
                continue


__all__ = [
    "INTERPRETED", "Case", "Scope", "as_kind", "assert_bits", "assert_facts", "assert_near", "assert_of",
    "assert_parity", "check", "compare", "draw_case", "dtypes_near", "kinds_of", "rows", "scope", "touch", "workload",
]  # fmt: skip
