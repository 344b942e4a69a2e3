"""The parity suite: the comparison that every kernel must pass, on cases drawn from an operator's card.

Nothing here needs a test framework; the helpers raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flagops import arrays, config, registry
from flagops.backends import missing
from flagops.call import of
from flagops.cases import INTERPRETED, Case, Scope, as_kind, bits, draw_case, dtypes_near, scope, workload, writable
from flagops.errors import Unsupported
from flagops.operator import Operator, Tensor

Array = NDArray[Any]
T = TypeVar("T")


def assert_parity(op: Operator, backend: str, case: Case) -> None:
    """Run one case on a backend and hold it to the reference.

    Raises AssertionError with the case when the result is wrong, an input was changed, or memory around ``out`` was;
    raises Unsupported when the backend says it cannot run the case.
    """
    arguments = case.arguments()
    dims = dict(case.dims)
    bound_batch = np.broadcast_shapes(*_leads(op, arguments)) if _leads(op, arguments) else ()
    given = {n: as_kind(x, case.kind, dict(case.dtypes).get(n)) for n, x in arguments.items()}
    views, outs, rooms = [], [], []
    for name, tensor in op.results.items():
        shape = op.shape(tensor, dims, bound_batch)
        dtype = op.result_dtype(dict(case.dtypes), dict(case.scalars), tensor)
        view, room = writable(shape, dtype, dict(case.layouts).get("out", "contiguous"))
        out = as_kind(view, case.kind, dtype)
        source = op.inplace.get(name)
        if case.inplace and source and view.shape == arguments[source].shape and view.dtype == arguments[source].dtype:
            view[...] = arguments[source]
            given[source] = out
        views.append(view)
        outs.append(out)
        rooms.append((room, bits(room).copy()))
    before = {n: x.tobytes() for n, x in arguments.items() if isinstance(x, np.ndarray)}
    with config.using(budget=case.budget):
        of(op)(*given.values(), out=tuple(outs) if op.several else outs[0], backend=backend)
    for name, raw in before.items():
        assert arguments[name].tobytes() == raw, f"{op.name} on {backend} changed its input {name}\n{case}"
    compare(op, arguments, tuple(views) if op.several else views[0], str(case))
    for view, (room, outside) in zip(views, rooms, strict=True):
        written = np.zeros(room.shape, bool)
        _same_view(written, room, view)[...] = True
        untouched = bits(room)[~written] == outside[~written]
        assert untouched.all(), f"{op.name} on {backend} wrote outside of out\n{case}"


def _same_view(mask: Array, room: Array, view: Array) -> Array:
    step = room.itemsize
    start = view.__array_interface__["data"][0] - room.__array_interface__["data"][0]
    flat = mask.reshape(-1)
    return np.lib.stride_tricks.as_strided(
        flat[start // step :] if view.size else flat[:0], view.shape, tuple(s // step for s in view.strides)
    )


def _leads(op: Operator, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    return [
        arguments[name].shape[: arguments[name].ndim - len(tensor.axes.split()) + 1]
        for name, tensor in op.tensors.items()
        if tensor.axes.startswith("...") and arguments[name] is not None
    ]


def compare(op: Operator, arguments: dict[str, Any], got: Any, label: str = "") -> None:
    """Hold a result to the reference: bit for bit, within the operator's bound, or as its judge says.

    got: the array, of an operator with several results a tuple of them. Raises AssertionError.
    """
    if op.judge:
        try:
            op.judge(got, arguments)
        except AssertionError as error:
            raise AssertionError(f"{op.name}: {error}\n{label}") from None
        return
    inputs = [arguments[name] for name in op.inputs]
    with np.errstate(all="ignore"):
        exact = op.reference(*inputs)
    if op.several:
        dtypes = tuple(x.dtype.name for x in got)
        with np.errstate(all="ignore"):
            bounds = (None,) * len(got) if op.exact else op.bound(exact, arguments, dtypes)
        for result, x, value, bound in zip(op.results, got, exact, bounds, strict=True):
            if bound is None:
                assert_bits(x, value, f"{result}, {label}")
            else:
                _near(op, x, value, bound, f"{result}, {label}")
        return
    if op.exact:
        assert_bits(got, exact, label)
        return
    from flagops.reference._rounding import round_to

    dtype = got.dtype.name
    if op.integral and _are_integers(inputs):
        sums = op.rounded(*(np.abs(x) if isinstance(x, np.ndarray) else x for x in inputs))
        if sums.max(initial=0) < 2**24:
            exact = round_to(op.rounded(*inputs), dtype)
            wrong = np.asarray(got != exact)
            _report(op.name, wrong, got, exact, np.zeros(wrong.shape), label)
            return
    with np.errstate(all="ignore"):
        bound = op.bound(exact, arguments, dtype)
    _near(op, got, exact, bound, label)


def _near(op: Operator, got: Array, exact: Array, bound: Array, label: str) -> None:
    from flagops.reference._rounding import unit

    assert got.shape == exact.shape, f"{op.name}: got shape {got.shape}, expected {exact.shape}\n{label}"
    with np.errstate(all="ignore"):
        value = got.astype(exact.dtype)
        finite = np.isfinite(exact)
        largest = unit(got.dtype.name).largest
        near_overflow = finite & (np.abs(exact) + bound >= largest)
        overflowed = near_overflow & ~np.isfinite(value)
        wrong = finite & ~overflowed & ~(np.abs(value - exact) <= bound)
        wrong |= np.isnan(exact) & ~np.isnan(value)
        wrong |= np.isinf(exact) & (value != exact)
    _report(op.name, wrong & np.isfinite(bound), value, exact, bound, label)


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


def assert_facts(op: Operator, backend: str, case: Case, repeats: int = 20) -> None:
    """Check bit by bit what the kernel declares: equal repeats, and rows of a batch equal to the row alone."""
    kernel = registry.find(op.name, backend)
    given = {n: as_kind(x, case.kind, dict(case.dtypes).get(n)) for n, x in case.arguments().items()}
    with np.errstate(all="ignore"):
        first = _run(op, backend, given)
        if kernel.deterministic:
            for _ in range(repeats - 1):
                for x, again in zip(first, _run(op, backend, given), strict=True):
                    assert_bits(again, x, f"{op.name} on {backend} differs between repeats\n{case}")
        if kernel.batch_invariant and not op.exact:
            for index, row in rows(op, given):
                for x, alone in zip(first, _run(op, backend, row), strict=True):
                    assert_bits(x[index], alone, f"{op.name} on {backend}: row {index} differs alone\n{case}")


def _run(op: Operator, backend: str, given: dict[str, Any]) -> list[Array]:
    return [arrays.as_numpy(x) for x in op.each(of(op)(*given.values(), backend=backend))]


def rows(op: Operator, given: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Slices of a call along its outermost axis: (index into the result, arguments of that row alone)."""
    first = next(iter(op.tensors))
    words = op.tensors[first].axes.split()
    x = given[first]
    if op.name == "matmul":
        for i in range(x.shape[-2]):
            yield (..., slice(i, i + 1), slice(None)), given | {first: x[..., i : i + 1, :]}
    elif words[0] == "...":
        leads = {n: lead for n, t in op.tensors.items() if t.axes.startswith("...") and (lead := _lead(t, given[n]))}
        longest = max(map(len, leads.values()), default=0)
        outer = {n: lead[0] for n, lead in leads.items() if len(lead) == longest}
        for i in range(0 if 0 in outer.values() else max(outer.values(), default=0)):
            yield slice(i, i + 1), given | {n: given[n][i : i + 1] for n, size in outer.items() if size > 1}
    else:
        shared = [n for n, t in op.tensors.items() if words[0] in t.axes.split()[:1] and given[n] is not None]
        for i in range(x.shape[0]):
            yield slice(i, i + 1), given | {n: given[n][i : i + 1] for n in shared}


def _lead(tensor: Tensor, x: Any) -> tuple[int, ...]:
    """The batch axes of an argument, none if it is absent."""
    return () if x is None else tuple(x.shape[: len(x.shape) - len(tensor.axes.split()) + 1])


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


def kinds_of(backend: str) -> list[str]:
    """The kinds of array that a backend takes on the CPU."""
    present = ("numpy",) if missing("torch") else ("torch", "numpy")
    taken = [k for k in present if registry.backend(backend).refuses(as_kind(np.zeros(1, np.float32), k)) is None]
    if not taken:
        raise Unsupported(f"{backend} takes no array on the CPU")
    return taken


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
