"""One call of a kernel, and all that is asked of it: the result, its memory, the inputs, repeats, rows on their own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagops import arrays, config, registry
from flagops.call import of
from flagops.cases import Case, as_kind
from flagops.errors import Unsupported
from flagops.layouts import Allocate, Place, bits, heap, poison, writable
from flagops.operator import Operator, Tensor

from .comparison import assert_bits, compare
from .memory import Guarded

Array = NDArray[Any]


class Call:
    """The arguments of a case in memory, ready to be called as often as one likes.

    allocate: where they lie; with `Guarded` memory inputs are read-only during a call.
    """

    def __init__(self, op: Operator, backend: str, case: Case, allocate: Allocate = heap) -> None:
        self.op, self.backend, self.case = op, backend, case
        self.paired = registry.find(op.name, backend).paired
        places = case.places(allocate)
        self.inputs = {n: x for n, x in places.items() if isinstance(x, Place)}
        self.arguments = {n: x.view if isinstance(x, Place) else x for n, x in places.items()}
        self.given = given(case, places)
        self.protected = allocate if isinstance(allocate, Guarded) else None
        self.outs: list[Place] = []
        self.given_outs: list[Any] = []
        self.shared: list[tuple[Place, str]] = []
        """Results that take the place of an input."""
        leads = [
            lead for n, t in op.tensors.items() if t.axes.startswith("...") and (lead := _batch(t, self.arguments[n]))
        ]
        batch, dims, dtypes = np.broadcast_shapes(*leads), dict(case.dims), dict(case.dtypes)
        around = Guarded(allocate.front) if isinstance(allocate, Guarded) else heap
        for name, tensor in op.results.items():
            shape, dtype = op.shape(tensor, dims, batch), op.result_dtype(dtypes, dict(case.scalars), tensor)
            place = writable(shape, dtype, dict(case.layouts).get("out", "contiguous"), around)
            out, source = in_place(place, case.kind, dtype), op.inplace.get(name)
            same = source and self.arguments[source].shape == shape and self.arguments[source].dtype == place.view.dtype
            if case.inplace and source and same:
                place.view[...] = self.arguments[source]
                self.given[source] = out
                self.shared.append((place, source))
            self.outs.append(place)
            self.given_outs.append(out)
        self._outside = [bits(x.room).copy() for x in self.outs]
        self._before = {n: bits(x.room).copy() for n, x in self.inputs.items()}

    @property
    def out(self) -> Any:
        return tuple(self.given_outs) if self.op.several else self.given_outs[0]

    def renew(self, redrawn: int | None = None) -> None:
        """Make `out` unlike any result again; give the inputs other values at the same addresses, if asked to."""
        if redrawn is not None:
            for name, x in dataclasses.replace(self.case, redrawn=redrawn).values_drawn().items():
                if name in self.inputs:
                    self.inputs[name].fill(x)
        self._before = {n: bits(x.room).copy() for n, x in self.inputs.items()}
        for place in self.outs:
            poison(place.room)
        for place, source in self.shared:
            place.view[...] = self.arguments[source]

    def run(self) -> list[Array]:
        """Call the kernel; returns copies of what it wrote, taken at once."""
        protected = self.protected.read_only() if self.protected else _NOTHING
        with config.using(budget=self.case.budget), switched(self.case.mode), protected:
            of(self.op)(*self.given.values(), out=self.out, backend=self.backend)
        return [x.view.copy() for x in self.outs]

    def hold(self, got: list[Array]) -> float:
        """Everything that must be so after a call; returns the share of its bound that the worst error takes."""
        name, case = f"{self.op.name} on {self.backend}", self.case
        self.hold_memory()
        share = compare(self.op, self.arguments, tuple(got) if self.op.several else got[0], str(case), self.paired)
        for place, result in zip(self.outs, got, strict=True):
            late = bits(place.view) == bits(result)
            assert late.all(), f"{name} wrote to out after it had returned\n{case}"
        return share

    def hold_memory(self) -> None:
        """What no call may change: the inputs, and what lies around the results."""
        name, case = f"{self.op.name} on {self.backend}", self.case
        for n, place in self.inputs.items():
            assert np.array_equal(bits(place.room), self._before[n]), f"{name} changed its input {n}\n{case}"
        for place, outside in zip(self.outs, self._outside, strict=True):
            mask = np.zeros(place.room.shape, bool)
            place.cut(mask)[...] = True
            assert (bits(place.room)[~mask] == outside[~mask]).all(), f"{name} wrote outside of out\n{case}"


def given(case: Case, places: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a kernel gets them."""
    dtypes = dict(case.dtypes)
    return {n: in_place(x, case.kind, dtypes.get(n)) if isinstance(x, Place) else x for n, x in places.items()}


def in_place(place: Place, kind: str, dtype: str | None) -> Any:
    """An array of a kind; a tensor's storage is the whole room, so that it begins anywhere in it."""
    view, room = place.view, place.room
    if kind == "numpy" or not view.size:
        return as_kind(view, kind, dtype)
    item = room.itemsize
    flat = np.lib.stride_tricks.as_strided(room, (arrays.span(room)[1] // item,), (item,))
    begin = (arrays.address(view) - arrays.address(room)) // item
    return as_kind(flat, kind, dtype).as_strided(view.shape, [step // item for step in view.strides], begin)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def switched(mode: str) -> Iterator[None]:
    """What a program may have switched on in torch when it calls, one of `flagops.cases.MODES`."""
    if not mode:
        yield
        return
    import torch

    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        elif mode == "no gradient":
            stack.enter_context(torch.no_grad())
        elif mode == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        else:
            torch.set_default_dtype(getattr(torch, mode.removeprefix("default ")))
            stack.callback(torch.set_default_dtype, before)
        yield


def _batch(tensor: Tensor, x: Any) -> tuple[int, ...]:
    """The batch axes of an argument, none if it is absent."""
    return () if x is None else tuple(x.shape[: len(x.shape) - len(tensor.axes.split()) + 1])


def assert_parity(op: Operator, backend: str, case: Case, allocate: Allocate = heap) -> float:
    """Run one case on a backend and hold it to the reference; returns the share of its bound that the error takes.

    Raises AssertionError with the case when the result is wrong, an input was changed, or memory around ``out`` was;
    raises Unsupported when the backend says it cannot run the case.
    """
    call = Call(op, backend, case, allocate)
    return call.hold(call.run())


def assert_facts(op: Operator, backend: str, case: Case, repeats: int = 20) -> None:
    """Check bit by bit what the kernel declares: equal repeats, and rows of a batch equal to the row alone."""
    kernel = registry.find(op.name, backend)
    given = {n: as_kind(x, case.kind, dict(case.dtypes).get(n)) for n, x in case.arguments().items()}
    with np.errstate(all="ignore"), switched(case.mode):
        first = run(op, backend, given)
        if kernel.deterministic:
            for _ in range(repeats - 1):
                for x, again in zip(first, run(op, backend, given), strict=True):
                    assert_bits(again, x, f"{op.name} on {backend} differs between repeats\n{case}")
        if kernel.batch_invariant and not op.exact:
            for index, row in rows(op, given):
                for x, alone in zip(first, run(op, backend, row), strict=True):
                    assert_bits(x[index], alone, f"{op.name} on {backend}: row {index} differs alone\n{case}")


def assert_refused(op: Operator, backend: str, case: Case, allocate: Allocate = heap) -> None:
    """Call with one index of a case out of range: an IndexError, and all memory as it was. Raises AssertionError."""
    call, label = Call(op, backend, case, allocate), f"{op.name} on {backend}"
    assert op.astray
    name, values = op.astray(*(call.arguments[n] for n in op.inputs))
    view = call.inputs[name].view
    if not view.size:
        raise Unsupported("no index is out of range where there is none")
    rng = np.random.default_rng([case.seed, 3])
    value = values[rng.integers(len(values))]
    view[np.unravel_index(rng.integers(view.size), view.shape)] = value
    call.renew()
    try:
        call.run()
    except IndexError:
        call.hold_memory()
        return
    raise AssertionError(f"{label} takes {value} in {name}, which is out of range, without an IndexError\n{case}")


def run(op: Operator, backend: str, given: dict[str, Any]) -> list[Array]:
    """The results of a call that allocates them itself."""
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
        leads = {n: lead for n, t in op.tensors.items() if t.axes.startswith("...") and (lead := _batch(t, given[n]))}
        longest = max(map(len, leads.values()), default=0)
        outer = {n: lead[0] for n, lead in leads.items() if len(lead) == longest}
        for i in range(0 if 0 in outer.values() else max(outer.values(), default=0)):
            yield slice(i, i + 1), given | {n: given[n][i : i + 1] for n, size in outer.items() if size > 1}
    else:
        shared = [n for n, t in op.tensors.items() if words[0] in t.axes.split()[:1] and given[n] is not None]
        for i in range(x.shape[0]):
            yield slice(i, i + 1), given | {n: given[n][i : i + 1] for n in shared}
