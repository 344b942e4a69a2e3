"""Operators that move elements and index them: torch's own results, form by form, and what both refuse."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flagops
from flagops.testing import assert_near

sys.path.insert(0, str(Path(__file__).parent))
from aten_calls import DTYPES, Draw, compared


@pytest.fixture
def handle():
    with flagops.enable("movement,indexing", backend="numba") as handle:
        yield handle


def cat(d):
    shape = list(d.shape(1))
    dim = d.number(0, len(shape) - 1)
    parts = [d.tensor(*shape[:dim], d.number(0, 4), *shape[dim + 1 :]) for _ in range(d.number(1, 4))]
    others = [d.tensor(*shape, dtype=torch.int32), torch.empty(0)][: d.number(0, 2)]
    return lambda *x: torch.cat(x, dim - len(shape) * d.number(0, 1)), [*parts, *others]


def stack(d):
    shape = d.shape()
    return lambda *x: torch.stack(x, -1), [d.tensor(*shape) for _ in range(3)]


def pad(d):
    return lambda x: torch.nn.functional.pad(x, (1, 2, 0, 3), value=1), [d.tensor(*d.shape(2))]


def flip(d):
    x = d.tensor(*d.shape())
    dims = d.rng.permutation(x.dim())[: d.number(0, x.dim())].tolist()
    return lambda x: x.flip(dims), [x]


def roll(d):
    x = d.tensor(*d.shape(1))
    dims = list(range(d.number(0, x.dim())))
    return lambda x: x.roll([3 * i - 4 for i in dims], dims) if dims else x.roll(3), [x]


def triangle(d):
    diagonal, name = d.number(-4, 4), ("tril", "triu", "tril_", "triu_")[d.number(0, 3)]
    return lambda x: getattr(x.clone(), name)(diagonal), [d.tensor(*d.shape(2))]


def arange(d):
    start, end, step = d.number(-9, 0), d.number(0, 40), d.number(1, 5)
    if d.dtype == torch.bool:
        return lambda: torch.arange(start, end, step), []
    if d.dtype.is_floating_point:
        start, step = start / 4, step / 8
    start = abs(start) if d.dtype == torch.uint8 else start
    end = max(start, end)
    return lambda: torch.arange(start, end, step, dtype=d.dtype), []


def linspace(d):
    dtype = d.dtype if d.dtype.is_floating_point else torch.float32
    start, steps = d.number(-9, 9), d.number(0, 1) + 2 ** d.number(0, 3)
    return lambda: torch.linspace(start, start + steps - 1, steps, dtype=dtype), []


def eye(d):
    n, m = d.number(0, 5), d.number(0, 5)
    return lambda: torch.eye(n, m, dtype=d.dtype) + torch.eye(n, m, dtype=d.dtype), []


def index_select(d):
    x = d.tensor(*d.shape(1))
    dim = d.number(0, x.dim() - 1)
    dtype = (torch.int64, torch.int32)[d.number(0, 1)]
    return lambda x, i: x.index_select(dim - x.dim(), i), [x, d.index(x.shape[dim], d.number(0, 7), dtype=dtype)]


def embedding(d):
    dtype = d.dtype if d.dtype.is_floating_point else torch.float32
    x, index = d.tensor(9, 5, dtype=dtype), d.index(9, *d.shape(0, 2))
    return torch.nn.functional.embedding, [index, x]


def _indexed(d):
    """A tensor, an axis, and an index that reaches less or all of the others."""
    x = d.tensor(*d.shape())
    dim = d.number(0, max(x.dim() - 1, 0))
    shape = [d.number(1, n) if d.number(0, 1) else n for n in x.shape]
    if shape:
        shape[dim] = d.number(0, 7)
    return x, dim, d.index(x.shape[dim] if shape else 1, *shape)


def gather(d):
    x, dim, index = _indexed(d)
    return lambda x, i: x.gather(dim, i), [x, index]


def _written(d):
    """As `_indexed`, with a source, and no place twice along the axis."""
    x = d.tensor(*d.shape(1))
    dim = d.number(0, x.dim() - 1)
    shape = list(x.shape)
    shape[dim] = d.number(1, shape[dim])
    source = d.tensor(*(n + d.number(0, 2) for n in shape))
    order = torch.from_numpy(d.rng.random(x.shape)).argsort(dim)
    return x, dim, d.laid(order[tuple(slice(n) for n in shape)]), source


def scatter(d):
    x, dim, index, source = _written(d)
    forms = [
        lambda x, i, s: x.scatter(dim, i, s),
        lambda x, i, s: x.clone().scatter_(dim, i, s),
        lambda x, i, s: x.scatter(dim, i, 1),
        lambda x, i, s: torch.scatter(x, dim, i, s, out=torch.empty(0, dtype=x.dtype, device=x.device)),
    ]
    return forms[d.number(0, 3)], [x, index, source]


def _added(d):
    x, dim, index = _indexed(d)
    return x, dim, index, d.tensor(*index.shape)


def scatter_add(d):
    x, dim, index, source = _added(d)
    return (lambda x, i, s: x.scatter_add(dim, i, s)), [x, index, source]


WIDE = (torch.float64, torch.int64, torch.int32)
"""Whose means torch rounds once, as we do."""


def scatter_reduce(d):
    x, dim, index, source = _added(d)
    reduce = ("sum", "prod", "amax", "amin", "mean")[d.number(0, 4 if d.dtype in WIDE else 3)]
    if reduce == "prod":
        source = source.sign() if d.dtype != torch.bool else source
    include = bool(d.number(0, 1))
    return lambda x, i, s: x.scatter_reduce(dim, i, s, reduce, include_self=include), [x, index, source]


def scatter_reduce_word(d):
    x, dim, index, source = _added(d)
    return lambda x, i, s: x.scatter(dim, i, s, reduce="add"), [x, index, source]


def index_add(d):
    x = d.tensor(*d.shape(1))
    dim = d.number(0, x.dim() - 1)
    shape = list(x.shape)
    shape[dim] = d.number(1, 6)
    alpha = d.number(1, 2) if d.dtype != torch.bool else 1
    index = d.index(x.shape[dim], shape[dim])
    return lambda x, i, s: x.clone().index_add_(dim, i, s, alpha=alpha), [x, index, d.tensor(*shape)]


def index_copy(d):
    x = d.tensor(*d.shape(1))
    dim = d.number(0, x.dim() - 1)
    shape = list(x.shape)
    shape[dim] = d.number(1, shape[dim])
    return lambda x, i, s: x.index_copy(dim, i, s), [x, d.distinct(x.shape[dim], shape[dim]), d.tensor(*shape)]


def index_fill(d):
    x = d.tensor(*d.shape(1))
    dim = d.number(0, x.dim() - 1)
    return lambda x, i: x.index_fill(dim, i, 1), [x, d.index(x.shape[dim], d.number(0, 4))]


def _indices(d, x):
    """Indices of some axes: numbers that broadcast, masks, and slices between them."""
    shape, given, axis = d.shape(0, 2), [], 0
    while axis < x.dim():
        kind = d.number(0, 3)
        if kind == 0:
            given.append(slice(None))
        elif kind == 1 and shape == ():
            given.append(d.tensor(*x.shape[axis : axis + 2], dtype=torch.bool))
            axis += given[-1].dim() - 1
        else:
            own = tuple(n if d.number(0, 2) else 1 for n in shape)[d.number(0, len(shape)) if d.number(0, 1) else 0 :]
            given.append(d.index(x.shape[axis], *own, signed=True))
        axis += 1
    masks = [i for i in given if not isinstance(i, slice) and i.dtype == torch.bool]
    if len(masks) > 1 or all(isinstance(i, slice) for i in given):  # whose counts need not agree
        given = [d.index(x.shape[0], 3, signed=True)]
    return tuple(given)


def index(d):
    x = d.tensor(*d.shape(1))
    where = _indices(d, x)
    return lambda x: x[where], [x]


def index_put(d):
    x = d.tensor(*d.shape(1))
    axis = d.number(0, x.dim() - 1)
    where = (*[slice(None)] * axis, d.distinct(x.shape[axis], d.number(1, x.shape[axis])))
    value = d.tensor(*x[where].shape) if d.number(0, 1) else d.tensor()

    def put(x, value):
        x = x.clone()
        x[where] = value
        return x

    return put, [x, value]


def index_put_accumulated(d):
    x = d.tensor(*d.shape(1))
    where = tuple(i if not isinstance(i, slice) else torch.arange(1) for i in _indices(d, x))
    return lambda x, v: x.index_put(where, v, accumulate=True), [x, d.tensor()]


def masked(d):
    x = d.tensor(*d.shape())
    return lambda x, m: x.masked_select(m), [x, d.tensor(*x.shape[d.number(0, x.dim()) :], dtype=torch.bool)]


def masked_scatter(d):
    x = d.tensor(*d.shape())
    return lambda x, m, s: x.clone().masked_scatter_(m, s), [x, d.tensor(*x.shape, dtype=torch.bool), d.tensor(5**4)]


def nonzero(d):
    return torch.nonzero, [d.tensor(*d.shape())]


def take(d):
    x = d.tensor(*d.shape())
    return torch.take, [x, d.index(x.numel(), *d.shape(), signed=True)]


def put(d):
    x = d.tensor(*d.shape(1))
    count = d.number(1, x.numel())
    return lambda x, i, s: x.put(i, s), [x, d.distinct(x.numel(), count), d.tensor(count)]


FORMS = [
    cat, stack, pad, flip, roll, triangle, arange, linspace, eye, index_select, embedding, gather, scatter, scatter_add,
    scatter_reduce, scatter_reduce_word, index_add, index_copy, index_fill, index, index_put, index_put_accumulated,
    masked, masked_scatter, nonzero, take, put,
]  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_results_are_torchs(form, rng):
    draws = [Draw(rng, dtype) for dtype in DTYPES for _ in range(6)]
    for got, expected in compared(form, draws, "movement,indexing"):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_the_gradient_of_an_embedding_is_summed_in_order(dtype, rng, handle):
    draw = Draw(rng, dtype)
    grad, index = draw.tensor(40, 33), draw.index(9, 40)
    for padding, by_frequency in ((-1, False), (3, False), (-1, True)):
        got = torch.ops.aten.embedding_dense_backward(grad, index, 9, padding, by_frequency)
        exact = torch.zeros(9, 33, dtype=torch.float64).index_add(0, index, grad.double())
        if by_frequency:
            exact = exact / index.bincount(minlength=9).clamp(min=1)[:, None]
        if padding >= 0:
            exact[padding] = 0
        assert_near(got, exact, 2)


def test_an_index_out_of_range_is_torchs_error():
    x, ones = torch.arange(12.0).view(3, 4), torch.ones(1, 4)
    calls = [
        lambda x, i: x.gather(0, i.expand(1, 4)),
        lambda x, i: x.index_select(0, i),
        lambda x, i: x[i],
        lambda x, i: x.scatter(0, i.expand(1, 4), ones),
        lambda x, i: x.scatter_add(0, i.expand(1, 4), ones),
        lambda x, i: x.index_add(0, i, ones),
        lambda x, i: x.index_put((i,), torch.zeros(())),
        lambda x, i: torch.take(x, i * 5),
        lambda x, i: torch.nn.functional.embedding(i, x),
    ]
    pairs = [(call, torch.tensor([wrong])) for call in calls for wrong in (-4, 3, 1 << 40)]
    said = []
    for call, index in pairs:
        with pytest.raises((IndexError, RuntimeError)) as theirs:
            call(x, index)
        said.append(theirs)
    with flagops.enable("all", backend="numba", strict=True):
        for call, index in pairs:
            with pytest.raises((IndexError, RuntimeError), match=r"index .* is out of bounds"):
                call(x, index)
    with flagops.enable("movement,indexing", backend="numba"):
        for (call, index), theirs in zip(pairs, said, strict=True):
            with pytest.raises(theirs.type) as ours:
                call(x, index)
            assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
        with pytest.raises(IndexError, match="shape of the mask"):
            x[torch.ones(4, dtype=torch.bool)]
        with pytest.raises(IndexError, match="too many indices"):
            torch.ops.aten.index(x, [torch.tensor(0)] * 3)
        with pytest.raises(IndexError, match="could not be broadcast"):
            x[torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)]


def test_results_are_brought_to_what_is_given_for_them(rng, handle):
    x, index = torch.arange(12.0).view(3, 4), torch.tensor([[2, 0, 1, 1]])
    for call, expected in (
        (lambda out: torch.gather(x, 0, index, out=out), x.gather(0, index)),
        (lambda out: torch.cat((x, x), 1, out=out), x.repeat(1, 2)),
        (lambda out: torch.masked_select(x, x > 4, out=out), x[x > 4]),
        (lambda out: torch.nonzero(x, out=out), x.nonzero()),
        (lambda out: torch.arange(5, out=out), torch.arange(5)),
    ):
        made = torch.empty(0, dtype=expected.dtype)
        assert call(made) is made
        assert torch.equal(made, expected)
    strided = torch.zeros(3, 16)[:, ::2]
    torch.cat((x, x), 1, out=strided)
    assert torch.equal(strided, x.repeat(1, 2))
    same = x.clone()
    same.index_put_((torch.tensor([0, 1]),), same[1:])
    assert same[:2].tolist() == x[1:].tolist()


def test_sums_are_the_same_for_any_number_of_threads(rng, handle):
    index = torch.from_numpy(rng.integers(0, 50, 1 << 22))
    source = torch.from_numpy(rng.standard_normal(1 << 22)).float()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = torch.zeros(50, 128).index_add(0, index[:1024], source[: 1 << 17].view(1024, 128))
            found.append((torch.zeros(50).scatter_add(0, index, source), rows))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_parts_that_are_joined_are_remembered_by_what_they_look_like(rng):
    """A call is noted down after some; others of as many parts must not be taken for it, nor the same part twice."""

    def calls(one, two, wide, whole):
        yield (one, two), 1
        yield (two, one), -2
        yield (one, one), 0
        yield (one[:, ::2], two[:, 1:]), 1
        yield (torch._neg_view(one), two), 1
        yield (one, torch._neg_view(two)), 1
        yield (wide[:, 3:], wide[:, :3], wide), 1
        yield (wide.T, wide.T), 0
        yield (wide, wide.float(), torch.empty(0)), 0
        yield (whole, wide), 1
        yield (torch.empty(0), torch.empty(0)), 0
        yield one.unbind(0), 0

    shapes = (2, 5, 3), (2, 4, 3), (5, 6)
    with flagops.enable("cat", backend="numba") as handle:
        for _ in range(40):
            made = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
            for parts, dim in calls(*made, torch.from_numpy(rng.integers(9, size=(5, 2)))):
                got = torch.cat(parts, dim)
                want = np.concatenate([x.resolve_neg().numpy() for x in parts if x.shape != (0,)] or [[]], dim)
                assert got.is_contiguous()
                assert got.numpy().tobytes() == want.astype(got.numpy().dtype).tobytes()
        assert handle.report().replaced == 40 * 12


def test_a_part_whose_memory_was_freed_is_not_read():
    parts = torch.zeros(2), torch.ones(3)
    with flagops.enable("cat", backend="numba", strict=True):
        for _ in range(40):
            assert torch.cat(parts).tolist() == [0, 0, 1, 1, 1]
        parts[1].untyped_storage().resize_(0)
        with pytest.raises(flagops.Unsupported, match="freed"):  # torch's own kernel would end the process
            torch.cat(parts)
