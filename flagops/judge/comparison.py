"""Whether a result is right: bit for bit, within a computed bound, or as the operator's own judge says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops import arrays, registry
from flagops.layouts import bits
from flagops.operator import Operator

Array = NDArray[Any]
_WITH_NAN = (*arrays.FLOATS, "float8_e4m3fn", "float8_e8m0fnu")


def compare(op: Operator, arguments: dict[str, Any], got: Any, label: str = "", paired: bool = False) -> float:
    """Hold a result to the reference: bit for bit, within the operator's bound, or as its judge says.

    got: the array, of an operator with several results a tuple of them. paired: as the kernel declares. Returns the
    largest share of its bound that an error takes, 0 where there is no bound. Raises AssertionError.
    """
    if op.judge:
        try:
            op.judge(got, arguments)
        except AssertionError as error:
            raise AssertionError(f"{op.name}: {error}\n{label}") from None
        return 0.0
    from flagops.reference._rounding import pairing, round_to

    inputs = [arguments[name] for name in op.inputs]
    with np.errstate(all="ignore"):
        exact = op.reference(*inputs)
    if op.several:
        dtypes = tuple(x.dtype.name for x in got)
        with np.errstate(all="ignore"), pairing(paired):
            bounds = (None,) * len(got) if op.exact else op.bound(exact, arguments, dtypes)
        bounds = _certain(op, inputs, exact, bounds)
        worst = 0.0
        for result, x, value, bound in zip(op.results, got, exact, bounds, strict=True):
            if bound is None:
                assert_bits(x, value, f"{result}, {label}")
            else:
                worst = max(worst, _near(op, x, value, bound, f"{result}, {label}"))
        return worst
    if op.exact or got.dtype.name not in arrays.FLOATS:
        assert_bits(got, exact, label)
        return 0.0
    dtype = got.dtype.name
    if op.integral and _are_integers(inputs):
        sums = op.rounded(*(np.abs(x) if isinstance(x, np.ndarray) else x for x in inputs))
        if sums.max(initial=0) < 2**24:
            exact = round_to(op.rounded(*inputs), dtype)
            wrong = np.asarray(got != exact)
            _report(op.name, wrong, got, exact, np.zeros(wrong.shape), label)
            return 0.0
    with np.errstate(all="ignore"), pairing(paired):
        bound = op.bound(exact, arguments, dtype)
    (bound,) = _certain(op, inputs, (exact,), (bound,))
    return _near(op, got, exact, bound, label)


def _certain(op: Operator, inputs: Sequence[Any], exact: Sequence[Array], bounds: Sequence[Any]) -> list[Any]:
    """The bounds, finite where a NaN among the inputs makes the result one whatever the other numbers are.

    A bound is infinite where roundings may decide what comes of infinities and overflow; but a NaN that is there
    already stays one, and a kernel that takes it for a number is wrong. Which these are the reference says of the same
    inputs with ones in place of all other floats: those that it does not make with ones in place of the NaNs too. Where
    an overflow may hide even a NaN, the bound is minus infinity.
    """

    def open_at(value: Array, bound: Any) -> Any:
        return False if bound is None else np.isnan(value) & ~np.isfinite(bound) & ~np.isneginf(bound)

    unclear = [open_at(value, bound) for value, bound in zip(exact, bounds, strict=True)]
    if not any(np.any(x) for x in unclear):
        return list(bounds)
    floats = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.dtype.name in _WITH_NAN]

    def nan(kept: bool) -> list[Any]:
        some = list(inputs)
        for i in floats:
            one = np.ones((), inputs[i].dtype)
            some[i] = np.where(np.isnan(inputs[i]), inputs[i] if kept else one, one)
        with np.errstate(all="ignore"):
            found = op.reference(*some)
        return [np.isnan(x) if x.dtype.kind not in "biu" else np.False_ for x in (found if op.several else (found,))]

    forced = [with_nan & ~without for with_nan, without in zip(nan(True), nan(False), strict=True)]
    return [
        bound if bound is None else np.where(where & sure, 0.0, bound)
        for bound, where, sure in zip(bounds, unclear, forced, strict=True)
    ]


def _near(op: Operator, got: Array, exact: Array, bound: Array, label: str) -> float:
    from flagops.reference._rounding import unit

    assert got.shape == exact.shape, f"{op.name}: got shape {got.shape}, expected {exact.shape}\n{label}"
    with np.errstate(all="ignore"):
        value = got.astype(exact.dtype)
        finite = np.isfinite(exact)
        largest = unit(got.dtype.name).largest
        near_overflow = finite & (np.abs(exact) + bound >= largest)
        overflowed = near_overflow & ~np.isfinite(value)
        error = np.abs(value - exact)
        wrong = finite & ~overflowed & ~(error <= bound)
        wrong |= np.isnan(exact) & ~np.isnan(value)
        wrong |= np.isinf(exact) & (value != exact)
        taken = np.where(finite & ~overflowed & np.isfinite(bound) & (bound > 0), error / bound, 0)
    _report(op.name, wrong & np.isfinite(bound), value, exact, bound, label)
    return float(np.nanmax(taken, initial=0))


def _are_integers(inputs: Sequence[Any]) -> bool:
    present = [x for x in inputs if isinstance(x, np.ndarray)]
    if any(x.dtype.itemsize == 1 for x in present):  # codes
        return False
    floats = [x.astype(np.float64) for x in present]
    with np.errstate(invalid="ignore"):
        return all(bool(np.all(np.isfinite(x) & (np.abs(x) <= 256) & (x == np.rint(x)))) for x in floats)


def _report(what: str, bad: Array, value: Array, exact: Array, bound: Array, label: str = "") -> None:
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} elements are off, first at {where}: got {value[where]!s}, "
            f"expected {exact[where]!s} within {bound[where]!s}\n{label}"
        )


def assert_of(name: str, got: Any, *args: Any, **kwargs: Any) -> None:
    """Hold a result that is there already to the operator's reference for these arguments, within its bound."""
    op = registry.operator(name)
    given = dict(zip(op.inputs, map(_array, op.fill(args, kwargs)), strict=False))
    compare(op, given, tuple(map(_array, op.each(got))) if op.several else _array(got), name)


def _array(x: Any) -> Any:
    return arrays.as_numpy(x) if arrays.is_torch(x) else x


def assert_near(got: Any, exact: Any, roundings: int, weight: Any = None, label: str = "") -> None:
    """Within so many roundings of the coarser of both formats.

    weight: what a rounding is relative to, in a sum the sum of the magnitudes; the magnitude of ``exact`` if not given.
    """
    from flagops.reference._rounding import unit

    got, exact = _array(got), _array(exact)
    assert got.shape == exact.shape, f"got shape {got.shape}, expected {exact.shape}\n{label}"
    units = [unit("float64" if x.dtype == np.longdouble else x.dtype.name) for x in (got, exact)]
    value, aim = (x.astype(np.longdouble) for x in (got, exact))
    size = np.abs(aim if weight is None else np.asarray(_array(weight)).astype(np.longdouble))
    bound = roundings * (max(u.u for u in units) * size + max(u.tiny for u in units))
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(value - aim) <= bound) | (value == aim) | (np.isnan(value) & np.isnan(aim)))
    _report(label or "result", wrong, value, aim, np.broadcast_to(bound, aim.shape))


def assert_bits(got: Array, expected: Array, label: str = "") -> None:
    """Equal bit for bit, -0 apart from 0; any NaN equals any NaN."""
    assert got.dtype == expected.dtype, f"got {got.dtype}, expected {expected.dtype}\n{label}"
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}\n{label}"
    same = bits(np.ascontiguousarray(got)) == bits(np.ascontiguousarray(expected))
    same |= np.isnan(got.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    if not same.all():
        where = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{int((~same).sum())} of {same.size} elements differ, first at {where}: "
            f"got {got[where]!s}, expected {expected[where]!s}\n{label}"
        )
