"""Operators that order, choose, count and look for elements: torch's own results, form by form."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flagops

sys.path.insert(0, str(Path(__file__).parent))
from aten_calls import DTYPES, Draw, compared
from overriding import counted

OPS = "movement,indexing,selection,reductions"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def handle():
    with flagops.enable(OPS, backend="numba") as handle:
        yield handle


class Special(Draw):
    """With NaN, infinities and zeros of either sign."""

    def tensor(self, *shape, dtype=None):
        x = super().tensor(*shape, dtype=dtype)
        if not x.is_floating_point() or self.number(0, 1):
            return x
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0])
        where = torch.from_numpy(np.asarray(self.rng.integers(0, 12, shape)))
        return self.laid(torch.where(where < 5, special[where.clamp(max=4)].to(x.dtype), x))


def _row(d):
    shape = list(d.shape())
    dim = d.number(0, max(len(shape) - 1, 0))
    if shape:
        shape[dim] = (1, 4, 33, 130, 700)[d.number(0, 4)]
    return d.tensor(*shape), dim


def sort(d):
    x, dim = _row(d)
    descending = bool(d.number(0, 1))
    return lambda x: x.sort(dim=dim, descending=descending, stable=True), [x]


def argsort(d):
    x, dim = _row(d)
    return lambda x: x.argsort(dim=dim, stable=True), [x]


def topk(d):
    x, dim = _row(d)
    size = x.shape[dim] if x.dim() else 1
    k, largest = d.number(min(1, size), size), bool(d.number(0, 1))

    def values(x):
        made, index = x.topk(k, dim, largest)
        assert torch.equal(*(y.cpu().nan_to_num(9) for y in (x.gather(dim, index), made)))
        return made

    return values, [x if x.dtype != torch.bool else x.to(torch.uint8)]


def kthvalue(d):
    x, dim = _row(d)
    k, keep = d.number(1, x.shape[dim] if x.dim() else 1), bool(d.number(0, 1))
    return lambda x: x.kthvalue(k, dim, keep).values, [x if x.dtype != torch.bool else x.to(torch.uint8)]


def searchsorted(d):
    lead = d.shape(0, 2) if d.number(0, 1) else ()
    rows = Draw.tensor(d, *lead, 17).sort().values
    right, narrow = bool(d.number(0, 1)), bool(d.number(0, 1))
    x = d.tensor(*(lead or d.shape(0, 2)), 5)
    return lambda r, x: torch.searchsorted(r, x, right=right, out_int32=narrow), [d.laid(rows), x]


def bucketize(d):
    x, rows = d.tensor(*d.shape()), Draw.tensor(d, 9).sort().values
    right = bool(d.number(0, 1))
    return lambda x, r: torch.bucketize(x, r, right=right), [x, rows]


def isin(d):
    x, values = d.tensor(*d.shape()), d.tensor((3, 100)[d.number(0, 1)])
    invert = bool(d.number(0, 1))
    number = d.number(0, 3) == 0 and d.dtype != torch.bool
    return lambda x, v: torch.isin(x, 1 if number else v, invert=invert), [x, values]


def histc(d):
    x = Draw.tensor(d, 50, dtype=d.dtype if d.dtype in (torch.float32, torch.float64) else torch.float32)
    bounds = ((0, 0), (-4, 4), (-2, 6))[d.number(0, 2)]
    return lambda x: x.histc(8, *bounds), [x]


def bincount(d):
    dtype = d.dtype if not d.dtype.is_floating_point and d.dtype != torch.bool else torch.int64
    x, weights = d.tensor(d.number(0, 40), dtype=dtype).abs(), bool(d.number(0, 1))
    return lambda x, w: x.bincount(w if weights else None, minlength=3), [x, torch.ones(x.shape[0])]


def repeat_interleave(d):
    x = d.tensor(d.number(1, 6), 3)
    repeats = torch.as_tensor(d.rng.integers(0, 4, x.shape[0])).to((torch.int64, torch.int32)[d.number(0, 1)])
    return lambda x, r: x.repeat_interleave(r, 0), [x, repeats]


def equal(d):
    x = Draw.tensor(d, *d.shape())
    other = x.clone() if d.number(0, 1) else Draw.tensor(d, *x.shape)
    return lambda x, y: torch.tensor(torch.equal(x, y)), [x, other]


FORMS = [sort, argsort, topk, kthvalue, searchsorted, bucketize, isin, histc, bincount, repeat_interleave, equal]


def computes(form, dtype):
    """Whether torch has a kernel of a form for a dtype."""
    return form not in (searchsorted, bucketize, isin) or dtype != torch.bool


@pytest.mark.drawn
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_results_are_torchs(form, rng):
    draws = [Special(rng, dtype) for dtype in DTYPES if computes(form, dtype) for _ in range(6)]
    for got, expected in compared(form, draws, OPS):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert ((got == expected) | (got.isnan() & expected.isnan())).all()


@pytest.mark.drawn
@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=needs_triton)])
def test_a_device_without_kernels_gets_them_all(backend, rng):
    """Also those of indexing: what is left to torch has nobody there. Triton's need no memory of the host's."""
    script = Path(__file__).with_name("aten_device.py")
    command = [sys.executable, "-W", "ignore", str(script), str(rng.integers(2**31)), backend]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_experts_are_counted(rng, handle):
    index = torch.from_numpy(rng.integers(0, 16, 300)).int()
    assert torch.equal(index.histc(16, 0, 15), index.bincount(minlength=16).int())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bool])
def test_what_is_searched_for_and_where_are_promoted(dtype):
    """A number, a tensor of one and one of several: whether 1.5 is cut before it is looked for hangs on it."""
    bounds = torch.tensor([0, 1, 2, 100]).to(dtype)
    few = (torch.tensor(1.5), torch.tensor([[1.5, 99], [-1, 1]]))
    sought = [1.5, 1, *(x.to(other) for other in DTYPES for x in few)]

    def results():
        for x in sought:
            yield torch.bucketize(x, bounds), torch.bucketize(x, bounds, right=True, out_int32=True)
            yield torch.searchsorted(bounds, x), torch.searchsorted(bounds, x, side="right")

    expected = list(results())
    with flagops.enable(OPS, backend="numba", strict=True):
        got = list(results())
    for ours, theirs in zip(got, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("bounds", ((0.0, 5e-324), (-1.7e308, 1.7e308)))
def test_parts_that_float64_has_no_width_for_are_left_to_torch(bounds, handle):
    """Places would be whole numbers from what is no number."""
    x = torch.tensor([0.0, 1e308, -1e308, 5e-324], dtype=torch.float64)
    assert x.histc(7, *bounds).shape == (7,)
    assert counted(handle, "histc") == (0, {"parts of a range whose width float64 does not hold": 1})
    with pytest.raises(ValueError, match="no width"):
        flagops.aten.histc(x, 7, *bounds)


def test_refusals_are_torchs():
    x = torch.arange(4.0)
    calls = (
        (lambda: x.topk(5), RuntimeError, "selected index k out of range"),
        (lambda: x.kthvalue(0), RuntimeError, "selected number k out of range"),
        (lambda: torch.tensor([1, -1]).bincount(), RuntimeError, "non-negative"),
        (lambda: (x / 0).histc(4), RuntimeError, "is not finite"),
    )
    for call, kind, words in calls:
        with pytest.raises(kind, match=words):
            call()
        with flagops.enable(OPS, backend="numba"), pytest.raises(kind, match=words):
            call()


def test_boundaries_and_what_is_sought_meet_in_one_dtype():
    narrow, whole = torch.tensor([0.1, 0.2]), torch.tensor([1, 2, 3])
    calls = (
        lambda: torch.searchsorted(narrow, narrow.double(), right=True),
        lambda: torch.searchsorted(narrow.double(), narrow),
        lambda: torch.searchsorted(whole, torch.tensor([2.5, 1.0])),
        lambda: torch.searchsorted(whole, torch.tensor(2.5)),
        lambda: torch.searchsorted(whole, 2.5),
        lambda: torch.searchsorted(narrow, 0.1, right=True),
        lambda: torch.searchsorted(narrow, torch.tensor(0.1, dtype=torch.float64)),
        lambda: torch.bucketize(torch.tensor([True, False]), narrow),
    )
    expected = [call() for call in calls]
    with flagops.enable(OPS, backend="numba", strict=True):
        found = [call() for call in calls]
    assert all(map(torch.equal, found, expected))


def test_results_are_brought_to_what_is_given_for_them(handle):
    x = torch.tensor([[3.0, 1, 2], [0, 5, 4]])
    values, indices = torch.empty(0), torch.empty(0, dtype=torch.int64)
    torch.sort(x, 1, out=(values, indices))
    assert values.tolist() == [[1, 2, 3], [0, 4, 5]]
    assert indices.tolist() == [[1, 2, 0], [0, 2, 1]]
    torch.topk(x, 1, out=(values, indices))
    assert values.tolist() == [[3], [5]]
    with pytest.raises(RuntimeError, match="Expected out tensor to have dtype"):
        torch.topk(x, 1, out=(torch.empty(0, dtype=torch.int64), indices))
