"""Newton-Schulz on the CPU: every product through `contract`, whole batches at a time.

Bound by operations: three products a step, beside which NumPy's passes over the matrices cost little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flagops.reference.muon import coefficients

from flagops import config
from flagops.arrays import as_numpy
from flagops.registry import kernel

from ._gemm import contract, view


@kernel(deterministic=True, batch_invariant=True)
def newton_schulz(a: Any, steps: int, out: Any) -> None:
    """Halves are widened to float32 for all steps; as many matrices at a time as the byte budget allows."""
    source, target = as_numpy(a), as_numpy(out)
    if not source.size:
        return
    if source.shape[-2] > source.shape[-1]:
        source, target = np.swapaxes(source, -1, -2), np.swapaxes(target, -1, -2)
    real = np.dtype(np.float64 if source.dtype == np.float64 else np.float32)
    p, q = source.shape[-2:]
    lead = source.shape[:-2]
    places = list(np.ndindex(*lead))
    some = max(1, config.budget() // 2 // (4 * p * q * real.itemsize))
    for start in range(0, len(places), some):
        chosen = places[start : start + some]
        x = np.empty((len(chosen), p, q), real)
        for i, place in enumerate(chosen):
            x[i] = source[place]
        with np.errstate(all="ignore"):
            _iterate(x, steps)
            for i, place in enumerate(chosen):
                target[place] = x[i].astype(target.dtype)


def _iterate(x: Any, steps: int) -> None:
    name, (count, p, q) = x.dtype.name, x.shape
    top = np.abs(x).max((-2, -1), keepdims=True)
    x /= np.where(top == 0, 1, top)
    norm = np.sqrt(np.einsum("bij,bij->b", x, x))[:, None, None]
    x /= np.where(norm == 0, 1, norm)
    gram, square, product = (np.empty((count, p, size), x.dtype) for size in (p, p, q))
    for a, b, c in coefficients(steps):
        contract(name, view(x), view(x).T, view(gram))
        contract(name, view(gram), view(gram), view(square))
        square *= c
        gram *= b
        gram += square
        contract(name, view(gram), view(x), view(product))
        x *= a
        x += product
