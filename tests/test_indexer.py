"""Laws of the lightning indexer: ties, visibility, NaN, memory."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flagops
from flagops import config, registry, testing
from flagops.tools import measure

INDEXERS = pytest.mark.operators("lightning_indexer")
SLOW = "triton"


def scored(scores, dtype=torch.float32):
    """A call whose scores are those given, ``[s, n]``: a channel for each query, with a head for either sign."""
    keys = torch.as_tensor(np.array(scores), dtype=dtype).mT[None]
    s = keys.shape[2]
    q = torch.eye(s, dtype=dtype)[None, :, None] * torch.tensor([[1], [-1]], dtype=dtype)
    return q, keys, torch.tensor([1, -1], dtype=dtype).expand(1, s, 2)


def chosen(backend, scores, k, visible=None, offset=0):
    visible = None if visible is None else torch.tensor([visible], dtype=torch.int32)
    return flagops.lightning_indexer(*scored(scores), k, visible, offset, backend=backend)[0].tolist()


@INDEXERS
def test_equal_scores_choose_the_lowest_entries(kernel):
    _, backend = kernel
    for n, k in ((5, 2), (40, 7), (700, 300)):
        for value in (0.0, 1.5, -2.0):
            assert chosen(backend, [[value] * n] * 2, k, [n, n - 1]) == [list(range(k))] * 2
    mixed = [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    assert chosen(backend, [mixed], 4) == [[0, 1, 2, 3]]
    assert chosen(backend, [mixed[::-1]], 3) == [[0, 2, 4]]


@INDEXERS
def test_zero_equals_minus_zero(kernel):
    _, backend = kernel
    q, keys = torch.ones(1, 1, 1, 1), torch.zeros(1, 6, 1)
    for sign in (1.0, -1.0):
        weights = torch.full((1, 1, 1), sign)  # 0 or -0
        assert flagops.lightning_indexer(q, keys, weights, 2, backend=backend).tolist() == [[[0, 1]]]
    assert chosen(backend, [[-1.0, 0.0, -0.0, 1.0, 0.0]], 3) == [[1, 2, 3]]


@INDEXERS
def test_nan_is_chosen_after_every_number(kernel):
    _, backend = kernel
    nan, inf = np.nan, np.inf
    assert chosen(backend, [[nan, 1.0, nan, -3.0, -inf, inf]], 4) == [[1, 3, 4, 5]]
    assert chosen(backend, [[nan, 1.0, nan, -3.0, -inf, nan]], 5) == [[0, 1, 2, 3, 4]]


@INDEXERS
def test_queries_see_the_windows_that_are_closed(kernel, rng):
    """With windows of 4 tokens the first three queries see nothing; the others what they can, then -1."""
    _, backend = kernel
    s, k = 13, 2
    visible = [(t + 1) // 4 for t in range(s)]
    rows = chosen(backend, rng.permuted([[1.0, 2.0, 3.0]] * s, axis=1), k, visible, offset=s)
    for seen, row in zip(visible, rows, strict=True):
        assert row[min(seen, k) :] == [-1] * (k - min(seen, k))
        assert all(s <= index < s + seen for index in row[: min(seen, k)])
    assert rows[3:7] == [[s, -1]] * 4
    assert rows[7] == [s, s + 1]


@INDEXERS
def test_more_than_there_is_and_nothing_at_all(kernel):
    _, backend = kernel
    assert chosen(backend, [[3.0, 1.0, 2.0]], 9, offset=5) == [[5, 6, 7]]
    q, weights = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
    assert flagops.lightning_indexer(q, torch.ones(1, 0, 4), weights, 5, backend=backend).shape == (1, 2, 0)


def test_what_fits_is_not_scored(monkeypatch):
    import flagops.kernels.torch.indexer as module

    monkeypatch.setattr(module, "_best", lambda *_: pytest.fail("scored"))
    q, keys, weights = torch.ones(1, 2, 1, 1), torch.ones(1, 5, 1), torch.ones(1, 2, 1)
    visible = torch.tensor([[2, 3]], dtype=torch.int32)
    assert flagops.lightning_indexer(q, keys, weights, 3, visible, backend="torch").tolist() == [
        [[0, 1, -1], [0, 1, 2]]
    ]
    assert flagops.lightning_indexer(q, keys, weights, 5, backend="torch").tolist() == [[[0, 1, 2, 3, 4]] * 2]


@INDEXERS
def test_negative_weights_and_exact_ties_are_those_of_the_reference(kernel, rng):
    """Small integers: every score is exact, most tie, and each list is the reference's."""
    operator, backend = registry.operator("lightning_indexer"), kernel[1]
    shapes = [(2, 9, 3, 4, 77, 20)] if backend == SLOW else [(2, 9, 3, 4, 777, 50), (1, 2, 64, 8, 9000, 100)]
    for b, s, h, d, n, k in shapes:
        visible = rng.integers(0, n + 1, (b, s)).astype(np.int32)
        visible[0, 0] = n
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = [rng.integers(-2, 3, shape).astype(float) for shape in ((b, s, h, d), (b, n, d), (b, s, h))]
            expected = operator.reference(*x, k, visible, 3)
            given_ = [torch.tensor(y).to(dtype) for y in x]
            got = flagops.lightning_indexer(*given_, k, torch.tensor(visible), 3, backend=backend)
            assert np.array_equal(got.numpy(), expected), dtype


@INDEXERS
def test_scores_that_rise_or_fall(kernel):
    """Every entry, or none after the first, is better than those before it."""
    _, backend = kernel
    n, k = (300, 40) if backend == SLOW else (5000, 333)
    rising = np.arange(n) - n / 3
    assert chosen(backend, [rising, rising[::-1].copy()], k) == [list(range(n - k, n)), list(range(k))]


@INDEXERS
def test_rotating_queries_and_keys_alike_changes_nothing(kernel):
    """A Hadamard transform is orthonormal; with whole numbers it is exact."""
    _, backend = kernel
    rng = torch.Generator().manual_seed(0)
    q, keys, weights = (torch.randint(-4, 5, s, generator=rng).float() for s in ((1, 3, 2, 4), (1, 33, 4), (1, 3, 2)))
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rotation = torch.kron(two, two) / 2
    plain = flagops.lightning_indexer(q, keys, weights, 6, backend=backend)
    assert torch.equal(flagops.lightning_indexer(q @ rotation, keys @ rotation, weights, 6, backend=backend), plain)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1 << 28, 1 << 16]), st.sampled_from(["numba", "torch"]))
def test_few_queries_of_many_entries(seed, budget, backend):
    """Entries shared out among threads, and chosen from block by block, are the reference's."""
    rng = np.random.default_rng(seed)
    n, k, s = int(rng.integers(1, 6000)), int(rng.integers(1, 300)), int(rng.integers(1, 4))
    scores = rng.integers(-40, 40, (s, n)).astype(np.float32) if seed % 2 else rng.standard_normal((s, n))
    visible = rng.integers(n // 2, n + 1, s).tolist()
    operator = registry.operator("lightning_indexer")
    call = [x.numpy() for x in scored(scores)]
    with config.using(budget=budget):
        got = chosen(backend, scores, k, visible)
    assert got == operator.reference(*call, k, np.array([visible], np.int32))[0].tolist()


@pytest.mark.drawn
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_memory_is_flat_in_queries_and_entries(backend):
    """The scores alone would take 244 and 250 MiB; what a process holds is read off, with what its allocator keeps."""
    peaks = []
    for s, n in ((256, 250_000), (16_000, 4_000)):
        q, keys, weights = torch.randn(1, s, 1, 4), torch.randn(1, n, 4), torch.randn(1, s, 1)
        out = torch.zeros(1, s, 64, dtype=torch.int32)
        few = torch.randn(1, 8, 1, 4), torch.randn(1, 2000, 4), torch.randn(1, 8, 1)
        with config.using(budget=8 << 20):
            flagops.lightning_indexer(*few, 64, backend=backend)
            call = lambda: flagops.lightning_indexer(q, keys, weights, 64, out=out, backend=backend)  # noqa: B023, E731
            peaks.append(measure.extra_memory(call, calls=3))
    assert None in peaks or max(peaks) < 60 << 20, [peak >> 20 for peak in peaks]  # a quarter of the scores


def test_the_judge_notices_every_fault():
    operator = registry.operator("lightning_indexer")
    rng = np.random.default_rng(0)
    arguments = {
        "q": rng.standard_normal((1, 2, 3, 4)), "keys": rng.standard_normal((1, 20, 4)),
        "weights": rng.standard_normal((1, 2, 3)), "top_k": 5, "visible": np.array([[20, 3]], np.int32), "offset": 2,
    }  # fmt: skip
    right = operator.reference(*arguments.values())
    testing.compare(operator, arguments, right)
    left = sorted(set(range(2, 22)) - set(right[0, 0].tolist()))
    faults = {
        "swapped": [*right[0, 0, [1, 0]], *right[0, 0, 2:]],
        "repeated": [right[0, 0, 0], *right[0, 0, :4]],
        "unseen": [*right[0, 0, :4], 22],
        "absent": [*right[0, 0, :4], -1],
        "worse": sorted([left[0], *right[0, 0, 1:]]),
    }
    for fault, row in faults.items():
        wrong = right.copy()
        wrong[0, 0] = row
        with pytest.raises(AssertionError):
            testing.compare(operator, arguments, wrong, fault)
    for place, value in itertools.product((0, 4), (1, 7)):
        wrong = right.copy()
        wrong[0, 1, place] = value
        with pytest.raises(AssertionError):
            testing.compare(operator, arguments, wrong)


def test_bad_input_says_what_is_wrong():
    q, keys, weights = torch.ones(1, 2, 1, 1), torch.ones(1, 5, 1), torch.ones(1, 2, 1)
    for seen in (6, -1):
        with pytest.raises(ValueError, match="expected 0 to 5"):
            flagops.lightning_indexer(q, keys, weights, 2, torch.tensor([[1, seen]], dtype=torch.int32))
    with pytest.raises(ValueError, match="whole number of at least 1"):
        flagops.lightning_indexer(q, keys, weights, 0)
    with pytest.raises(ValueError, match="whole number of at least 0 and below"):
        flagops.lightning_indexer(q, keys, weights, 2, None, -1)
