"""A backward against the derivative of the reference, by differences in extended precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops import arrays
from flagops.call import of
from flagops.cases import Case
from flagops.errors import Unsupported
from flagops.layouts import Place, put
from flagops.operator import Operator

from . import calls

Array = NDArray[Any]

VALUES = ("normal", "positive", "ties", "integers", "sparse", "large range")
"""Values at which a difference says what a derivative is."""
_STEP = 2.0**-20
_LAYOUTS = ("contiguous", "expanded all", "padded", "transposed", "cut", "expanded", "swapped")


def coded(case: Case) -> bool:
    """Whether a tensor is of codes, whose rounding has no derivative."""
    return any(dtype in arrays.ONE_BYTE for dtype in dict(case.dtypes).values())


def hold_gradient(op: Operator, backend: str, case: Case) -> float:
    """Compare the gradients of a case, each along a direction, with what the reference does along it.

    Some of the tensors require a gradient, as the case's seed says; the gradient of each result has a layout of its
    own; the backward runs three times, for the gradients, for twice as much and for the same again, after another call
    of the same shapes. Returns the largest share of its tolerance that an error takes. Raises AssertionError.
    """
    import torch

    rng = np.random.default_rng([case.seed, 7])
    places, dtypes = case.places(), dict(case.dtypes)
    arguments = {n: x.view if isinstance(x, Place) else x for n, x in places.items()}
    able = [n for n, x in arguments.items() if isinstance(x, np.ndarray) and dtypes.get(n) in arrays.FLOATS and x.size]
    if not able:
        raise Unsupported("no tensor has a gradient")
    if coded(case):
        raise Unsupported("a quantiser passes gradients through, a difference sees its steps")
    needing = [n for n in able if rng.random() < 0.6] or [able[rng.integers(len(able))]]
    given = calls.given(case, places)
    given |= {n: given[n].detach().requires_grad_() for n in needing}
    results = op.each(of(op)(*given.values(), backend=backend))
    kept = {i: y for i, y in enumerate(results) if y.requires_grad and y.numel()}
    if not kept:
        raise Unsupported("no result has a gradient")
    other = calls.given(case, dataclasses.replace(case, redrawn=1).places())
    of(op)(*other.values(), backend=backend)  # what this call leaves behind is not the backward's
    grads = [_grad(rng, y) for y in kept.values()]
    name, leaves = f"the backward of {op.name} on {backend}", [given[n] for n in needing]
    before = {n: x.tobytes() for n, x in arguments.items() if isinstance(x, np.ndarray)}
    seen, twice = [g.clone() for g in grads], [2 * g for g in grads]
    found = torch.autograd.grad([*kept.values()], leaves, grads, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad([*kept.values()], leaves, twice, retain_graph=True, allow_unused=True)
    last = torch.autograd.grad([*kept.values()], leaves, grads, allow_unused=True)
    for n, raw in before.items():
        assert arguments[n].tobytes() == raw, f"{name} changed its input {n}\n{case}"
    unchanged = all(torch.equal(g, same) for g, same in zip(grads, seen, strict=True))
    assert unchanged, f"{name} changed the gradient that it was given\n{case}"
    weights = {i: arrays.as_numpy(g).astype(np.float64) for i, g in zip(kept, grads, strict=True)}
    worst = 0.0
    for n, *each in zip(needing, found, again, last, strict=True):
        at = int(rng.choice([0, 0, 1, 2]))
        slope = each[at] if at != 1 or each[at] is None else each[at] / 2
        wide = np.zeros(arguments[n].shape) if slope is None else arrays.as_numpy(slope).astype(np.float64)
        assert wide.shape == arguments[n].shape, f"{name}: the gradient of {n} has shape {wide.shape}\n{case}"
        worst = max(worst, _along(op, case, arguments, weights, n, wide, rng, name))
    return worst


def _grad(rng: np.random.Generator, like: Any) -> Any:
    """A gradient of a result, as a sum gives it or any other, in some layout."""
    values = (rng.integers(-4, 5, tuple(like.shape)) / 4).astype(arrays.numpy_dtype(arrays.dtype_name(like)))
    return arrays.as_torch(put(values, _LAYOUTS[rng.integers(len(_LAYOUTS))]).view)


def _along(
    op: Operator, case: Case, arguments: dict[str, Any], weights: dict[int, Array], name: str, slope: Array,
    rng: np.random.Generator, label: str,
) -> float:  # fmt: skip
    """Differences of the weighed results, a step up and a step down one input, against the gradient's product with it.

    Allowed is what roundings do to the gradient's own sums, and what two steps of different length disagree by: the
    third derivative, and kinks, where the second difference does not shrink with the square of the step.
    """
    floats = {
        n: x.astype(np.float64)
        for n, x in arguments.items()
        if isinstance(x, np.ndarray) and dict(case.dtypes).get(n) in arrays.FLOATS
    }
    wide, x = arguments | floats, floats[name]
    direction = np.where(np.isfinite(x), rng.integers(0, 2, x.shape) * 2.0 - 1, 0)
    if x.size > 4 and rng.random() < 0.5:
        direction *= rng.random(x.shape) < 4 / x.size
    moved = [x + step * direction for step in (0.0, -_STEP, _STEP, -_STEP / 2, _STEP / 2)]
    made = []
    for at in moved:
        with np.errstate(all="ignore"):
            parts = op.each(op.reference(*(at if n == name else wide[n] for n in op.inputs)))
            made.append(np.concatenate([(parts[i].astype(np.longdouble) * w).reshape(-1) for i, w in weights.items()]))
    with np.errstate(all="ignore"):
        here, below, above, just_below, just_above = made
        exact, nearer = (above - below) / 2, just_above - just_below
        third, bend = exact - nearer, 4 * (just_above - 2 * here + just_below) - (above - 2 * here + below)
        mass = float(max(np.abs(part).sum() for part in made))
        unsure = float((4 * np.abs(third) + 2 * np.abs(bend)).sum()) + 1e-14 * mass
        shift = np.where(direction != 0, moved[2] - moved[1], 0) / 2
        products = np.where(direction != 0, slope.astype(np.longdouble) * shift, 0)
        got, expected = float(products.sum()), float(exact.sum())
    if not np.isfinite(mass + unsure) or unsure > 1e-3 * (abs(expected) + mass * _STEP):
        return 0.0
    largest = max(float(np.abs(y[np.isfinite(y)]).max(initial=0)) for y in floats.values())
    size = float(np.abs(products).sum()) + float(np.abs(exact).sum())
    acc, out = _units(op, case, name)
    terms = 64 + max((size for _, size in case.dims), default=0)
    allowed = unsure + terms * acc * (mass * _STEP * (1 + largest) ** 2)
    if not np.isfinite(got):
        overflow = out > acc and not np.isnan(slope).any()  # of a half float
        assert overflow, f"{label} is not finite along {name}\n{case}"
        return 0.0
    allowed += (terms * acc + 4 * out) * size
    assert abs(got - expected) <= allowed, (
        f"{label} is off: along a direction of {name} it gives {got / _STEP:.9g}, the reference "
        f"{expected / _STEP:.9g} within {allowed / _STEP:.3g}\n{case}"
    )
    return abs(got - expected) / allowed if allowed else 0.0


def _units(op: Operator, case: Case, name: str) -> tuple[float, float]:
    """The roundings of a gradient's arithmetic, and of the gradient itself."""
    from flagops.reference._rounding import accumulator, unit

    floats = [dtype for dtype in dict(case.dtypes).values() if dtype in arrays.FLOATS]
    acc = max(unit(accumulator(dtype)).u for dtype in floats)
    return acc, max(acc, unit(dict(case.dtypes)[name]).u, *(unit(dtype).u for dtype in floats))
