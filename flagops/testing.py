"""The parity suite: cases drawn from an operator's card, and the comparison that every kernel must pass.

A case is plain data, so whoever chooses it (a seeded generator in ``flagops check``, hypothesis in the tests) the same
numbers come out. Nothing here needs a test framework; the helpers raise.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flagops import arrays, config, registry
from flagops.backends import missing
from flagops.errors import Unsupported
from flagops.operator import Dims, Operator, Tensor

Array = NDArray[Any]
T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]


@dataclass(frozen=True)
class Scope:
    """How large drawn cases are: sizes of an axis, elementary products in all, and how many examples."""

    sizes: tuple[int, ...]
    volume: int
    examples: int


FULL = Scope((1, 2, 3, 0, 7, 16, 17, 33, 64, 65, 130, 520, 1030), 1 << 20, 100)
INTERPRETED = Scope((1, 2, 3, 0, 16, 17, 33, 130), 1 << 13, 20)
BATCHES = ((), (1,), (3,), (2, 3), (0,), (2, 1, 2))
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded", "reversed")
VALUES = ("normal", "large range", "special", "integers")
SPECIAL = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, "max", "-max", "subnormal", "-subnormal", "tiny")


@dataclass(frozen=True)
class Case:
    """One call of an operator: everything that decides its arguments, and nothing else."""

    operator: str
    dims: tuple[tuple[str, int], ...]
    batch: tuple[int, ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    scalars: tuple[tuple[str, Any], ...] = ()
    absent: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    values: str = "normal"
    kind: str = "torch"
    budget: int = 256 << 20
    inplace: bool = False
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The inputs by name, as NumPy arrays in the drawn layouts (absent tensors are None)."""
        op, dims = registry.operator(self.operator), dict(self.dims)
        dtypes, layouts, scalars = dict(self.dtypes), dict(self.layouts), dict(self.scalars)
        made: dict[str, Any] = {}
        for name in op.inputs:
            if name in op.scalars:
                made[name] = scalars[name]
            elif name in self.absent:
                made[name] = None
            else:
                rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
                tensor = op.tensors[name]
                shape = op.shape(tensor, dims, self._batch_of(name, rng))
                made[name] = _draw(rng, tensor, shape, dtypes[name], dims, self.values)
        if op.fit:
            op.fit(made, dims, np.random.default_rng([self.seed, 1]))
        return {
            name: lay_out(x, layouts.get(name, "contiguous")) if isinstance(x, np.ndarray) else x
            for name, x in made.items()
        }

    def _batch_of(self, name: str, rng: np.random.Generator) -> tuple[int, ...]:
        """The batch axes of one argument; where several have them, some are 1 or left out, to broadcast."""
        op = registry.operator(self.operator)
        if sum(tensor.axes.startswith("...") for tensor in op.tensors.values()) < 2:
            return self.batch
        lead = tuple(1 if rng.random() < 0.3 else size for size in self.batch)
        return lead[rng.integers(0, len(lead) + 1) if rng.random() < 0.3 else 0 :]

    def __str__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return f"Case({', '.join(f'{k}={v!r}' for k, v in fields.items() if v)})"


def scope(backend: str) -> Scope:
    """The scope for a backend here: Triton's interpreter is slow."""
    return INTERPRETED if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else FULL


def draw_case(op: Operator, choose: Choose[Any], within: Scope = FULL, kinds: Sequence[str] = ("torch",)) -> Case:
    """A case of an operator, every decision made by ``choose(options)``; early options are the simple ones."""
    names = {f for t in op.tensors.values() for w in t.axes.split() if w != "..." for f in w.split("*")}
    ordered = sorted(n for n in names if not n.isdecimal())
    first, room = choose(range(len(ordered))), within.volume
    dims: Dims = dict(choose(({}, {}, {}, *op.cases)))
    for name in () if dims else ordered[first:] + ordered[:first]:
        options = op.sizes.get(name, within.sizes)
        dims[name] = choose(tuple(size for size in options if size <= room) or (options[0],))
        room //= max(dims[name], 1)
    batched = any(t.axes.startswith("...") for t in op.tensors.values())
    batch = choose(BATCHES) if batched else ()
    scalars: dict[str, Any] = {}
    for name, scalar in op.scalars.items():
        options = scalar.choices({**dims, **scalars}) if callable(scalar.choices) else scalar.choices
        scalars[name] = dims[scalar.axis] if scalar.axis else choose(tuple(options))
    if op.derived:
        dims |= op.derived(dims, scalars)
    absent = tuple(name for name, t in op.tensors.items() if t.optional and choose((False, True)))
    dtypes: dict[str, str] = {}
    for name in op.tensors:
        if name not in absent:
            dtypes[name] = choose(op.dtype_choices(name, dtypes))
    kind = choose(tuple(kinds))
    drawable = {n: d for n, d in dtypes.items() if kind == "torch" or d != "float4_e2m1fn_x2"}
    dtypes |= {n: "uint8" for n in dtypes if n not in drawable}
    layouts = [layout for layout in LAYOUTS if kind == "numpy" or layout != "reversed"]
    return Case(
        operator=op.name,
        dims=tuple(dims.items()),
        batch=batch,
        dtypes=tuple(dtypes.items()),
        scalars=tuple(scalars.items()),
        absent=absent,
        layouts=tuple((name, choose(tuple(layouts))) for name in (*dtypes, "out")),
        values=choose(VALUES),
        kind=kind,
        budget=choose((256 << 20, 1 << 16)),
        inplace=bool(op.inplace) and choose((False, True)),
        seed=choose(range(2**16)),
    )


def dtypes_near(op: Operator, dtype: str | None, absent: Sequence[str] = ()) -> dict[str, str]:
    """The dtype of each tensor: the one asked for where the card allows it, else its first."""
    dtypes: dict[str, str] = {}
    for tensor in (name for name in op.tensors if name not in absent):
        allowed = op.dtype_choices(tensor, dtypes)
        dtypes[tensor] = dtype if dtype in allowed else allowed[0]
    return dtypes


def workload(op: Operator, name: str, seed: int = 0) -> Case:
    """A named workload of the card as a case."""
    load = dict(op.workloads[name])
    batch, dtype = load.pop("batch", ()), load.pop("dtype", None)
    transposed, absent = load.pop("transposed", None), tuple(load.pop("absent", ()))
    scalars = {n: load.pop(n) for n in op.scalars if n in load}
    dims: Dims = load
    for scalar_name, scalar in op.scalars.items():
        if scalar.axis:
            dims[scalar.axis] = scalars[scalar_name] = scalars.get(scalar_name) or dims[scalar.axis]
        elif scalar_name not in scalars:
            scalars[scalar_name] = (scalar.choices(dims) if callable(scalar.choices) else scalar.choices)[0]
    if op.derived:
        dims |= op.derived(dims, scalars)
    dtypes = dtypes_near(op, dtype, absent)
    return Case(
        operator=op.name,
        dims=tuple(dims.items()),
        batch=tuple(batch),
        dtypes=tuple(dtypes.items()),
        scalars=tuple(scalars.items()),
        absent=absent,
        layouts=((transposed, "transposed"),) if transposed else (),
        seed=seed,
    )


def _draw(
    rng: np.random.Generator, tensor: Tensor, shape: tuple[int, ...], dtype: str, dims: Dims, values: str
) -> Array:
    if tensor.draw is not None:
        return np.asarray(tensor.draw(rng, shape, dtype, dims))
    if dtype in arrays.ONE_BYTE:
        code = rng.integers(0, 256, shape, dtype=np.uint8)
        if dtype == "float8_e4m3fn" and values != "special":  # else most sums would be NaN
            code[code & 0x7F == 0x7F] = 0x7E
        return code.view(_numpy_dtype(dtype))
    if dtype not in arrays.FLOATS:
        raise TypeError(f"the card must say how to draw {dtype}")
    to = arrays.numpy_dtype(dtype)
    x = rng.standard_normal(shape)
    if values == "integers":
        return rng.integers(-8, 9, shape).astype(to)
    if values == "large range":
        return (x * np.exp2(rng.integers(-12, 6, shape))).astype(to)
    made = x.astype(to)
    if values == "special":
        where = rng.random(shape) < 0.05
        made[where] = _special(dtype)[rng.integers(0, len(SPECIAL), int(where.sum()))]
    return made


def _numpy_dtype(dtype: str) -> Any:
    return np.dtype(np.uint8) if dtype == "float4_e2m1fn_x2" else arrays.numpy_dtype(dtype)


def _special(dtype: str) -> Array:
    import ml_dtypes

    info = ml_dtypes.finfo(arrays.numpy_dtype(dtype))
    named = {
        "max": info.max,
        "-max": -info.max,
        "subnormal": info.smallest_subnormal,
        "-subnormal": -info.smallest_subnormal,
        "tiny": info.tiny,
    }
    return np.array([named.get(str(v), v) for v in SPECIAL], dtype=arrays.numpy_dtype(dtype))


def lay_out(x: Array, layout: str) -> Array:
    """The same values in another memory layout. ``expanded`` repeats the first row with a stride of 0."""
    if layout == "contiguous" or x.ndim == 0:
        return x
    if layout == "transposed":
        return np.ascontiguousarray(x.T).T
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if layout == "expanded":
        axis = next((i for i, size in enumerate(x.shape) if size > 1), 0)
        row = np.ascontiguousarray(x.take([0], axis) if x.shape[axis] else x)
        strides = tuple(0 if i == axis else s for i, s in enumerate(row.strides))
        return np.lib.stride_tricks.as_strided(row, x.shape, strides)
    if layout == "offset":
        room = np.zeros(x.size + 3, x.dtype)
        room[3:] = x.reshape(-1)
        return room[3:].reshape(x.shape)
    room = np.zeros(tuple(2 * size + 1 for size in x.shape), x.dtype)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def writable(shape: tuple[int, ...], dtype: str, layout: str) -> tuple[Array, Array]:
    """A poisoned array to write into, and all the memory around it: a kernel must fill the one and not the rest."""
    to, layout = arrays.numpy_dtype(dtype), "offset" if layout in ("expanded", "contiguous") else layout
    if layout == "offset":
        room = np.empty(int(np.prod(shape)) + 6, to)
        view = room[3:-3].reshape(shape)
    elif layout == "strided":
        room = np.empty(tuple(2 * size + 1 for size in shape), to)
        view = room[tuple(slice(1, None, 2) for _ in shape)]
    else:
        room = np.empty(shape[::-1] if layout == "transposed" else shape, to)
        view = room.T if layout == "transposed" else room[..., ::-1] if shape else room
    _raw(room)[...] = 0x5A5A5A5A5A5A5A5A & (2 ** (8 * to.itemsize) - 1)
    if dtype in arrays.FLOATS:
        room[...] = np.nan
    return view, room


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
        rooms.append((room, _raw(room).copy()))
    before = {n: x.tobytes() for n, x in arguments.items() if isinstance(x, np.ndarray)}
    with config.using(budget=case.budget):
        op.public(*given.values(), out=tuple(outs) if op.several else outs[0], backend=backend)
    for name, raw in before.items():
        assert arguments[name].tobytes() == raw, f"{op.name} on {backend} changed its input {name}\n{case}"
    compare(op, arguments, tuple(views) if op.several else views[0], str(case))
    for view, (room, outside) in zip(views, rooms, strict=True):
        written = np.zeros(room.shape, bool)
        _same_view(written, room, view)[...] = True
        untouched = _raw(room)[~written] == outside[~written]
        assert untouched.all(), f"{op.name} on {backend} wrote outside of out\n{case}"


def _raw(x: Array) -> Array:
    return x.view(f"u{x.dtype.itemsize}")


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


def as_kind(x: Any, kind: str, dtype: str | None = None) -> Any:
    """A NumPy array as the kind of array that a case asks for, on the same memory."""
    if kind == "numpy" or not isinstance(x, np.ndarray):
        return x
    made = arrays.as_torch(x)
    if dtype == "float4_e2m1fn_x2" and x.dtype == np.uint8:
        import torch

        return made.view(torch.float4_e2m1fn_x2)
    return made


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
            _report(op, wrong, got, exact, np.zeros(wrong.shape), label)
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
    _report(op, wrong & np.isfinite(bound), value, exact, bound, label)


def _are_integers(inputs: Sequence[Any]) -> bool:
    present = [x for x in inputs if isinstance(x, np.ndarray)]
    if any(x.dtype.itemsize == 1 for x in present):  # codes
        return False
    floats = [x.astype(np.float64) for x in present]
    with np.errstate(invalid="ignore"):
        return all(bool(np.all(np.isfinite(x) & (np.abs(x) <= 256) & (x == np.rint(x)))) for x in floats)


def _report(op: Operator, bad: Array, value: Array, exact: Array, bound: Array, label: str) -> None:
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{op.name}: {int(bad.sum())} of {bad.size} elements are off, first at {where}: got {value[where]!s}, "
            f"expected {exact[where]!s} within {bound[where]!s}\n{label}"
        )


def assert_bits(got: Array, expected: Array, label: str = "") -> None:
    """Equal bit for bit, -0 apart from 0; any NaN equals any NaN."""
    assert got.dtype == expected.dtype, f"got {got.dtype}, expected {expected.dtype}\n{label}"
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}\n{label}"
    same = _raw(np.ascontiguousarray(got)) == _raw(np.ascontiguousarray(expected))
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
    return [arrays.as_numpy(x) for x in op.each(op.public(*given.values(), backend=backend))]


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
                op.public(*(as_kind(x, "torch", dict(case.dtypes).get(n)) for n, x in given.items()), backend=backend)
                yield 1
            except Unsupported:
                continue


__all__ = ["Case", "assert_bits", "assert_facts", "assert_parity", "check", "compare", "draw_case", "workload"]
