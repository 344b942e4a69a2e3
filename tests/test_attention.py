"""The gradient of `sparse_attention` on the CPU, which takes rows together or gathers them for each query."""

import pytest

torch = pytest.importorskip("torch")

import flagops  # noqa: E402

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
