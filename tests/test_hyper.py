"""What hyper-connections promise, for the reference and for every kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flagops
from flagops import registry, testing
from flagops.call import of

VECTOR_BASE = [0, 1, -1, 2, 0, 1, -1, 2, 2, 0, 0, 0, 0, 0, 1, 0, 0, 3, 0, 0, 1, 0, 0, -1]
VECTOR_PRE = [0.500001, 0.7310596, 0.2689424, 0.8807980]
VECTOR_POST = [1, 1.4621172, 0.5378829, 1.7615941]
VECTOR_COMB = [
    [0.505938, 0.065131, 0.144911, 0.284019],
    [0.084374, 0.080257, 0.485388, 0.349980],
    [0.037923, 0.724518, 0.080257, 0.157301],
    [0.371765, 0.130093, 0.289443, 0.208699],
]
PUBLISHED = 1e-6  # six digits, the last of them rounded, and float32
EPS = 1e-6  # what each normalisation adds to the sum that it divides by
BACKENDS = [name for name in ("numba", "torch", "numpy") if registry.backend(name).unavailable() is None]


@pytest.mark.operators("hc_split_sinkhorn")
def test_published_vector(kernel):
    _, backend = kernel
    mix, scale, base = torch.zeros(3, 24), torch.ones(3), torch.tensor(VECTOR_BASE, dtype=torch.float32)
    pre, post, comb = flagops.hc_split_sinkhorn(mix, scale, base, backend=backend)
    testing.assert_of("hc_split_sinkhorn", (pre, post, comb), mix, scale, base)
    for got, expected in ((pre, VECTOR_PRE), (post, VECTOR_POST), (comb, VECTOR_COMB)):
        assert (got - torch.tensor(expected)).abs().max() < PUBLISHED


@pytest.mark.operators("hc_split_sinkhorn")
def test_columns_sum_to_one_and_rows_only_nearly(kernel):
    """Twenty rounds end with columns; the rows of separated logits are still off and must not be put right."""
    _, backend = kernel
    mix = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 24)) * 10)
    *_, comb = flagops.hc_split_sinkhorn(mix, torch.ones(3).double(), torch.zeros(24).double(), backend=backend)
    assert (comb.sum(-2) - 1).abs().max() < 2 * EPS
    assert (comb.sum(-1) - 1).abs().max() > 1e-4
    assert (comb > 0).all()


@pytest.mark.operators("hc_split_sinkhorn")
@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tokens_of_any_strides(kernel, n, dtype):
    """More tokens than several vectors have lanes, with and without a common stride."""
    _, backend = kernel
    rng, m = np.random.default_rng(5), n * (n + 2)
    mix, scale, base = (torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in ((7, 10, m), 3, m))
    apart = torch.stack([mix, mix], -1)[..., 0]
    out = tuple(torch.empty(7, 10, *shape, 2, dtype=dtype)[..., 0] for shape in ((n,), (n,), (n, n)))
    turned = flagops.hc_split_sinkhorn(mix.transpose(0, 1), scale, base, n, backend=backend)
    for got in (
        flagops.hc_split_sinkhorn(mix, scale, base, n, backend=backend),
        flagops.hc_split_sinkhorn(apart, scale, base, n, out=out, backend=backend),
        [x.transpose(0, 1) for x in turned],
    ):
        testing.assert_of("hc_split_sinkhorn", got, mix, scale, base, n)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 12), st.integers(0, 2**16))
def test_sinkhorn_of_a_transposed_problem_is_not_the_transpose(n, iters, spread, seed):
    """The reference against its definition, one entry at a time."""
    rng = np.random.default_rng(seed)
    mix, scale, base = (rng.standard_normal(s) * spread for s in ((1, n * (n + 2)), 3, n * (n + 2)))
    eps = 1e-6
    *_, comb = flagops.hc_split_sinkhorn(mix, scale, base, n, iters, eps, backend="numpy")
    logits = (mix[0, 2 * n :] * scale[2] + base[2 * n :]).reshape(n, n)
    x = np.exp(logits - logits.max(1, keepdims=True))
    x = x / x.sum(1, keepdims=True) + eps
    for round_ in range(iters):
        if round_:
            for j in range(n):
                x[j] = x[j] / (x[j].sum() + eps)
        for k in range(n):
            x[:, k] = x[:, k] / (x[:, k].sum() + eps)
    roundings = 4 * math.ceil(np.abs(logits).max()) + 2 * iters * (n + 2) + n + 8  # in exponents, and in each sum
    testing.assert_near(comb[0], x, roundings)


@pytest.mark.operators("hc_post")
def test_equal_streams_stay_equal_but_for_the_gates(kernel):
    """Columns of comb sum to 1: what is equal in all streams passes, even if rows have not converged."""
    _, backend = kernel
    rng = np.random.default_rng(1)
    mix = torch.from_numpy(rng.standard_normal((5, 24)) * 10)
    _, post, comb = flagops.hc_split_sinkhorn(mix, torch.ones(3).double(), torch.zeros(24).double(), backend="numpy")
    v, y = (torch.from_numpy(rng.standard_normal((5, 33))) for _ in range(2))
    got = flagops.hc_post(y, v.unsqueeze(1).expand(5, 4, 33), post, comb, backend=backend)
    testing.assert_of("hc_post", got, y, v.unsqueeze(1).expand(5, 4, 33), post, comb)
    assert (got - v.unsqueeze(1) - post.unsqueeze(-1) * y.unsqueeze(1)).abs().max() < 2.01 * EPS * v.abs().max()
    turned = flagops.hc_post(y, v.unsqueeze(1).expand(5, 4, 33), post, comb.mT, backend=backend)
    assert (turned - got).abs().max() > 1e-3


@pytest.mark.operators("hc_pre")
def test_pre_is_made_of_its_parts(kernel):
    _, backend = kernel
    rng = np.random.default_rng(2)
    x, fn, base, scale = (torch.from_numpy(rng.standard_normal(s)) for s in ((70, 4, 20), (24, 80), 24, 3))
    fn = fn / 9
    y, post, comb = flagops.hc_pre(x, fn, base, scale, backend=backend)
    flat = x.flatten(1)
    mix = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    pre, *expected = flagops.hc_split_sinkhorn(mix, scale, base, backend="numpy")
    for result in ((y, post, comb), ((pre.unsqueeze(-1) * x).sum(1), *expected)):
        testing.assert_of("hc_pre", result, x, fn, base, scale)


@pytest.mark.operators("hc_head")
def test_head_is_not_normalised(kernel):
    _, backend = kernel
    rng = np.random.default_rng(3)
    x, fn, base = (torch.from_numpy(rng.standard_normal(s)) for s in ((6, 4, 20), (4, 80), 4))
    scale = torch.ones(1).double()
    got = flagops.hc_head(x, fn, base, scale, backend=backend)
    flat = x.flatten(1)
    mix = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    for result in (got, ((torch.sigmoid(mix + base) + 1e-6).unsqueeze(-1) * x).sum(1)):
        testing.assert_of("hc_head", result, x, fn, base, scale)


@pytest.mark.operators("hc_pre", "hc_head")
def test_the_size_of_the_streams_does_not_matter(kernel):
    """Streams are normalised before they are projected: only the collapse sees their size."""
    name, backend = kernel
    rng = np.random.default_rng(4)
    columns = 24 if name == "hc_pre" else 4
    x, fn, base, scale = (
        torch.from_numpy(rng.standard_normal(s))
        for s in ((3, 4, 16), (columns, 64), columns, 3 if columns == 24 else 1)
    )
    operator = registry.operator(name)
    large, *others = operator.each(of(operator)(1024 * x, fn, base, scale, norm_eps=2.0**-20, backend=backend))
    found = (large / 1024, *others)
    testing.assert_of(name, found if operator.several else found[0], x, fn, base, scale, norm_eps=2.0**-40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_said(backend):
    x, base, scale = torch.zeros(2, 4, 8), torch.zeros(24), torch.zeros(3)
    with pytest.raises(ValueError, match="4 streams need 24 coefficients, got 20"):
        flagops.hc_pre(x, torch.zeros(20, 32), base[:20], scale, backend=backend)
    with pytest.raises(ValueError, match="at least 1e-12"):
        flagops.hc_pre(x, torch.zeros(24, 32), base, scale, eps=0.0, backend=backend)
    with pytest.raises(ValueError, match="whole number of at least 1"):
        flagops.hc_pre(x, torch.zeros(24, 32), base, scale, iters=0, backend=backend)
    with pytest.raises(TypeError, match="expected float32"):
        flagops.hc_pre(x.bfloat16(), torch.zeros(24, 32).bfloat16(), base, scale, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_moves_every_parameter(dtype):
    """Gradients of a whole block agree with autograd through plain torch."""
    torch.manual_seed(0)
    parameters = [torch.randn(s) * 0.3 for s in ((24, 64), (24,), (3,))]
    x = torch.randn(5, 4, 16).to(dtype)

    def plain(x, fn, base, scale):
        flat = x.flatten(1).float()
        mix = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
        logits = mix * scale.repeat_interleave(torch.tensor([4, 4, 16])) + base
        comb = torch.softmax(logits[:, 8:].unflatten(1, (4, 4)), -1) + 1e-6
        for axis in [-2, *[-1, -2] * 19]:
            comb = comb / (comb.sum(axis, keepdim=True) + 1e-6)
        y = ((torch.sigmoid(logits[:, :4]) + 1e-6).unsqueeze(-1) * x.float()).sum(1).to(dtype)
        return y, 2 * torch.sigmoid(logits[:, 4:8]), comb

    found = []
    for pre in (plain, flagops.hc_pre):
        inputs = [p.clone().requires_grad_() for p in (x, *parameters)]
        y, post, comb = pre(*inputs)
        out = post.unsqueeze(-1) * y.float().unsqueeze(1) + comb.mT @ inputs[0].float()
        if pre is not plain:
            out = flagops.hc_post(y, inputs[0], post, comb).float()
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([p.grad.float() for p in inputs])
    for expected, got in zip(*found, strict=True):
        size = expected.abs().max()
        assert (got - expected).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-4) * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_that_broadcast_cannot_be_written_in_place(backend):
    """The first of them would be gone before the second token reads it."""
    room, y, post, comb = torch.ones(3, 2, 4), torch.ones(3, 4), torch.ones(3, 2), torch.ones(3, 2, 2)
    with pytest.raises(ValueError, match="out shares memory with x"):
        flagops.hc_post(y, room[:1], post, comb, out=room, backend=backend)
    expected = flagops.hc_post(y, room, post, comb, backend=backend)
    assert torch.equal(flagops.hc_post(y, room, post, comb, out=room, backend=backend), expected)
