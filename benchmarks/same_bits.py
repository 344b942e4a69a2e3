"""Whether an edit of the kernels changed a bit: digests of what they give for drawn cases, written and compared.

``python benchmarks/same_bits.py --write before.json`` in the old tree, ``--compare before.json`` in the new one. Any
NaN equals any NaN. ``NUMBA_CPU_NAME=haswell`` and the like ask for other code; the files of two processors differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flagops import arrays, config, registry, testing
from flagops.cases import Case, as_kind, draw_case
from flagops.errors import Unsupported


def digest(results: Any) -> str:
    text = hashlib.sha256()
    for x in results:
        x = np.array(arrays.as_numpy(x), order="C")
        if x.dtype.name in arrays.FLOATS:
            x[np.isnan(x)] = np.nan
        text.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return text.hexdigest()[:16]


def forwards(name: str, backend: str, case: Case) -> str:
    op = registry.operator(name)
    given = [as_kind(x, case.kind, dict(case.dtypes).get(n)) for n, x in case.arguments().items()]
    with config.using(budget=case.budget), np.errstate(all="ignore"):
        return digest(op.each(testing.of(op)(*given, backend=backend)))


def backwards(name: str, backend: str, case: Case) -> str:
    """Of all gradients there are, for the operator's own result."""
    op = registry.operator(name)
    dtypes = dict(case.dtypes)
    given = [as_kind(x, case.kind, dtypes.get(n)) for n, x in case.arguments().items()]
    needs = tuple(dtypes.get(n) in arrays.FLOATS for n in op.tensors)
    with config.using(budget=case.budget), np.errstate(all="ignore"):
        grad = testing.of(op)(*given, backend=backend)
        found = registry.find(name, backend).backward(grad, *given, needs)
    return digest(x for x in found if x is not None)


def _choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(0, len(options)))]


def digests(backend: str, names: list[str], examples: int, seed: int) -> Iterator[tuple[str, str]]:
    for name in names:
        op = registry.operator(name)
        try:
            kernel = registry.find(name, backend)
        except Unsupported as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        for index in range(examples):
            case = draw_case(op, partial(_choose, rng), kinds=("torch", "numpy"))
            try:
                yield f"{name} {index} {case}", forwards(name, backend, case)
                if kernel.backward:
                    yield f"{name} {index} backward {case}", backwards(name, backend, case)
            except Unsupported:
                continue
        print(name, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="operators (default: all that the backend has)")
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", type=Path)
    way.add_argument("--compare", type=Path)
    args = parser.parse_args()
    found = dict(digests(args.backend, args.names or sorted(registry.operators()), args.examples, args.seed))
    if args.write:
        args.write.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} digests")
        return 0
    before = json.loads(args.compare.read_text())
    wrong = [case for case, value in found.items() if before.get(case) != value]
    print(f"{len(found)} digests, {len(wrong)} differ", *wrong[:20], sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
