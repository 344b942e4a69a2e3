"""The gradient of `sparse_attention` on the CPU, which takes rows together or gathers them for each query."""

import pytest

torch = pytest.importorskip("torch")

import flagops  # noqa: E402
from flagops.testing import assert_near  # noqa: E402

WAYS = {"together": (80, 40, 24), "gathered": (80, 700, 3)}  # queries, rows, indices


def drawn(way, seed):
    """Queries near each other whose indices repeat, and miss; row 0 is read by the first query alone."""
    queries, rows, count = WAYS[way]
    rng = torch.Generator().manual_seed(seed)
    q, grad = (torch.randn(2, queries, 3, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    kv, sink = torch.randn(2, rows, 8, generator=rng, dtype=torch.float64), torch.randn(3, generator=rng).double()
    indices = torch.randint(-1, rows, (2, queries, count), generator=rng)
    indices[indices == 0] = 1
    indices[:, 0, 0] = 0
    indices[:, 1, :] = -1
    return q, kv, sink, indices.to(torch.int32), grad


def formula(q, kv, sink, indices):
    """The definition over all rows, each as often as a query names it."""
    times = torch.zeros(*indices.shape[:2], kv.shape[1] + 1, dtype=q.dtype)
    times.scatter_add_(
        2, torch.where(indices < 0, kv.shape[1], indices).long(), torch.ones_like(indices, dtype=q.dtype)
    )
    weights = torch.exp(torch.einsum("bqhd,bnd->bqhn", q, kv) / 2) * times[:, :, None, :-1]
    return weights @ kv[:, None] / (weights.sum(-1, keepdim=True) + sink.exp().view(1, 1, -1, 1))


def gradients(function, q, kv, sink, indices, grad):
    leaves = [x.clone().requires_grad_() for x in (q, kv, sink)]
    return torch.autograd.grad(function(*leaves, indices), leaves, grad)


def same(got, wanted):
    """Sums in another order."""
    assert float((got - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def ours(q, kv, sink, indices):
    return flagops.sparse_attention(q, kv, sink.to(torch.float64), indices, 0.5)


@pytest.mark.drawn
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_are_the_formulas_gradient(way, seed):
    arguments = drawn(way, seed)
    for got, wanted in zip(gradients(ours, *arguments), gradients(formula, *arguments), strict=True):
        same(got, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_reaches_only_who_reads_it(way, value):
    q, kv, sink, indices, grad = drawn(way, 5)
    clean = gradients(ours, q, kv, sink, indices, grad)
    kv[:, 0] = value
    got = gradients(ours, q, kv, sink, indices, grad)
    assert not got[0][:, 0].isfinite().any()
    same(got[0][:, 1:], clean[0][:, 1:])
    untouched = torch.ones(2, kv.shape[1], dtype=torch.bool)
    for b in range(2):
        untouched[b, indices[b, 0].long().clamp(min=0)] = False
    same(got[1][untouched], clean[1][untouched])


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.7])
def test_gradients_of_any_scale(scale):
    """Slots without a row have no score, which a scale below zero would turn into the highest."""
    torch.manual_seed(0)
    q, kv, sink = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 2, 3, 5), (1, 4, 5), (3,)))
    indices = torch.tensor([[[0, -1, 3], [-1, -1, 2]]])
    found = []
    for backend in ("numba", "torch"):
        given = [x.clone().requires_grad_() for x in (q, kv, sink)]
        out = flagops.sparse_attention(*given, indices, scale, backend=backend)
        found.append(torch.autograd.grad(out.square().sum(), given))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1000, 1.0)
