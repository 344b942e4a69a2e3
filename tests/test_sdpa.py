"""What dense attention promises, for every kernel."""

import pytest
import torch
import torch.nn.functional as F

import flagops
from flagops import config, registry
from flagops.testing import assert_near, assert_of

NAME = "scaled_dot_product_attention"
attend = flagops.scaled_dot_product_attention


def draw(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.operators("scaled_dot_product_attention")
def test_as_torch_computes_it(kernel):
    _, backend = kernel
    q, k, v = draw((2, 4, 9, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        for result in (attend(q, k, v, None, causal, backend=backend), expected):
            assert_of(NAME, result, q, k, v, None, causal)


@pytest.mark.operators("scaled_dot_product_attention")
def test_what_is_masked_does_not_matter(kernel):
    """Causal rows ignore later keys, and a bool mask, an added one and the missing keys say the same."""
    _, backend = kernel
    q, k, v = draw((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 5))
    whole = attend(q, k, v, None, True, backend=backend)
    assert_of(NAME, whole[..., :4, :], q[..., :4, :], k[..., :4, :], v[..., :4, :], None, True)
    keep = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    for mask in (keep, added):
        assert_of(NAME, attend(q, k, v, mask, backend=backend), q, k, v, None, True)


@pytest.mark.operators("scaled_dot_product_attention")
def test_a_row_without_keys_is_zero(kernel):
    _, backend = kernel
    q, k, v = draw((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    keep = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    keep[..., 1, :] = False
    got = attend(q, k, v, keep, backend=backend)
    assert (got[..., 1, :] == 0).all()
    assert (got[..., 0, :] != 0).all()
    assert (attend(q, k[..., :0, :], v[..., :0, :], backend=backend) == 0).all()


@pytest.mark.operators("scaled_dot_product_attention")
def test_shared_keys_are_repeated_keys(kernel):
    _, backend = kernel
    q, k, v = draw((2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    assert_of(NAME, attend(q, k, v, backend=backend), q, *(x.repeat_interleave(3, 1) for x in (k, v)))


@pytest.mark.operators("scaled_dot_product_attention")
@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize("length", [1, 3, 13, 150, 200])  # of few queries, of a strip and more, of a task and more
def test_queries_of_heads_that_share_keys(kernel, length, mask):
    """Causal and not, of heads as narrow as a tile and of others, in the memory order that transformers gives."""
    _, backend = kernel
    length, count = (min(length, 14), 40) if backend == "triton" else (length, 270)
    for width, depth in ((32, 64), (20, 40)):
        q, k, v = (
            x.transpose(1, 2)
            for x in draw((1, length, 6, width), (1, count, 2, width), (1, count, 2, depth), dtype=torch.float32)
        )
        masks = {None: None, "bool": torch.rand(1, 1, length, count) < 0.7, "added": torch.randn(1, 6, length, count)}
        for causal in (False, True):
            out = attend(q, k, v, masks[mask], causal, -0.3, backend=backend)
            assert_of(NAME, out, q, k, v, masks[mask], causal, -0.3)


@pytest.mark.operators("scaled_dot_product_attention")
def test_what_meets_an_infinity_is_not_scaled_away(kernel):
    _, backend = kernel
    q, k, v = torch.full((1, 1, 4, 1), 2.0**-149), torch.full((1, 1, 2, 1), -torch.inf), torch.ones(1, 1, 2, 1)
    k[..., 0, :] = 1
    assert (attend(q, k, v, None, False, 0.3, backend=backend) == 1).all()


def test_gradients_do_not_depend_on_the_budget():
    inputs = [
        x.requires_grad_() for x in draw((2, 4, 33, 8), (2, 2, 41, 8), (1, 2, 41, 6), (2, 1, 33, 41))
    ]  # fmt: skip
    for causal in (False, True):
        found = []
        for budget in (1 << 28, 1 << 13):
            with config.using(budget=budget):
                found.append(torch.autograd.grad(attend(*inputs, causal).square().sum(), inputs))
        for whole, tiled in zip(*found, strict=True):
            assert_near(whole, tiled, 4 * (33 + 41 + 8), whole.abs().sum())  # sums in another order


@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize(("batch", "shared"), [(1, 2), (5, 1)])  # in runs of queries, whole
def test_gradients_over_blocks_of_queries(batch, shared, mask):
    """Ours, in several blocks, are those of torch's operations, whatever the sign of the scale."""
    inputs = [x.requires_grad_() for x in draw((batch, 2 * shared, 250, 20), (batch, 2, 300, 20), (batch, 2, 300, 36))]
    masks = {None: None, "bool": torch.rand(batch, 1, 250, 300) < 0.7, "added": draw((1, 250, 300))[0]}
    grad = draw((batch, 2 * shared, 36, 250))[0].mT
    for causal, scale in ((False, None), (True, -0.3)):
        found = []
        for backend in ("numba", "torch"):
            out = attend(*inputs, masks[mask], causal, scale, backend=backend)
            found.append(torch.autograd.grad(out, inputs, grad))
        for ours, theirs in zip(*found, strict=True):
            assert_near(ours, theirs, 4 * (250 + 300 + 36), theirs.abs().sum())  # sums in another order


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [5, 70, 230])  # of a run that begins with all keys, with some, and of several
def test_gradients_of_tokens_lie_as_tokens(length, causal):
    inputs = [
        x.transpose(1, 2).requires_grad_()
        for x in draw((2, length, 6, 32), (2, 230, 2, 32), (2, 230, 2, 32), dtype=torch.float32)
    ]
    grad = torch.randn(2, length, 6, 32).transpose(1, 2)
    backward = registry.find(NAME, "numba").backward
    found = backward(grad, *(x.detach() for x in inputs), None, causal, None, (True, True, True, False))
    expected = torch.autograd.grad(attend(*inputs, None, causal, backend="torch"), inputs, grad)
    for ours, theirs, x in zip(found, expected, inputs, strict=False):
        assert ours.stride() == x.stride()
        assert_near(ours, theirs, 4 * (length + 230 + 32), theirs.abs().sum())  # sums in another order


def test_gradients_of_rows_without_keys_are_zero():
    q, k, v = (x.requires_grad_() for x in draw((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    keep = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    keep[..., 1, :] = False
    attend(q, k, v, keep).square().sum().backward()
    assert (q.grad[..., 1, :] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_masks_that_do_not_fit_are_refused():
    q, k, v = draw((1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with pytest.raises(ValueError, match="attn_mask is for 2 heads, expected 1 or 4"):
        attend(q, k, v, torch.ones(1, 2, 3, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask is float32"):
        attend(q, k, v, torch.ones(1, 1, 3, 5))
