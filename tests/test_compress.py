"""Laws of the key-value compressor: chunks, windows, states."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flagops
from flagops import config, registry
from flagops.testing import assert_near, assert_of
from flagops.tools import measure

COMPRESSORS = pytest.mark.operators("compress_kv")
WIDTH, DEPTH = 3, 5


def fresh(o, m, batch=1, d=WIDTH, dtype=torch.float64):
    return torch.zeros(batch, o * m, o * d, dtype=dtype), torch.full((batch, o * m, o * d), -torch.inf, dtype=dtype)


def problem(o, m, tokens, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(o * 1000 + m * 100 + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(batch, tokens, DEPTH), normal(o * WIDTH, DEPTH), normal(o * WIDTH, DEPTH), normal(m, o * WIDTH)


def chunked(backend, x, wkv, wgate, bias, state, cuts):
    """The entries and the state after chunks that end at the cuts, the states kept in place."""
    m, entries, at = len(bias), [], 0
    state = tuple(s.clone() for s in state)
    for cut in (*cuts, x.shape[1]):
        out = x.new_empty(len(x), (at % m + cut - at) // m, state[0].shape[2] // (state[0].shape[1] // m)), *state
        got = flagops.compress_kv(x[:, at:cut], wkv, wgate, bias, *state, at % m, out=out, backend=backend)
        assert all(given is taken for given, taken in zip(got[1:], state, strict=True))
        entries.append(got[0])
        at = cut
    return torch.cat(entries, 1), *state


def same(backend, got, inputs, state):
    """What one call for the whole sequence gives: bit for bit on numba, elsewhere what the reference gives."""
    assert_of("compress_kv", got, *inputs, *state)
    if backend == "numba":
        whole = flagops.compress_kv(*inputs, *state, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(got, whole, strict=True))


@COMPRESSORS
@pytest.mark.parametrize(("o", "m"), [(2, 4), (1, 3)])
def test_prefill_is_a_shorter_prefill_and_steps(kernel, o, m):
    _, backend = kernel
    tokens = 3 * m + 2
    inputs, state = problem(o, m, tokens, batch=2), fresh(o, m, batch=2)
    same(backend, flagops.compress_kv(*inputs, *state, backend=backend), inputs, state)
    for first in range(1, 2 * m + 2) if backend != "triton" else (m - 1, 2 * m + 1):
        same(backend, chunked(backend, *inputs, state, range(first, tokens)), inputs, state)


@settings(max_examples=30)
@given(st.data())
def test_chunks_of_any_size_give_the_bits_of_one_call(data):
    o, m = data.draw(st.sampled_from([(2, 4), (1, 3), (1, 1), (2, 1)]))
    tokens = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=5)) - {tokens})
    inputs, state = problem(o, m, tokens), fresh(o, m)
    with config.using(budget=data.draw(st.sampled_from([1 << 20, 1 << 11]))):
        same("numba", chunked("numba", *inputs, state, cuts), inputs, state)
    same("numba", chunked("numba", *inputs, state, cuts), inputs, state)


@COMPRESSORS
@pytest.mark.parametrize(("o", "m"), [(2, 4), (1, 3)])
def test_an_entry_knows_its_own_tokens_alone(kernel, o, m):
    """Entry w is not changed by later tokens, nor by those before its window (HCA) or the one before that (CSA)."""
    _, backend = kernel
    x, *others = problem(o, m, 4 * m)
    state = fresh(o, m)
    entries = flagops.compress_kv(x, *others, *state, backend=backend)[0]
    for token in (0, m, 2 * m - 1):
        changed = x.clone()
        changed[:, token] += 1
        got = flagops.compress_kv(changed, *others, *state, backend=backend)[0]
        differs = (got != entries).any(-1)[0].tolist()
        window = token // m
        assert differs == [w in range(window, window + o) for w in range(4)]


@COMPRESSORS
@pytest.mark.parametrize(("o", "m"), [(2, 4), (1, 4)])
def test_fewer_tokens_than_a_window_emit_nothing(kernel, o, m):
    _, backend = kernel
    inputs = problem(o, m, m - 1)
    entries, kv, score = flagops.compress_kv(*inputs, *fresh(o, m), backend=backend)
    assert entries.shape == (1, 0, WIDTH)
    rows = (score > -torch.inf).all(-1)[0]
    assert rows.tolist() == [(o - 1) * m <= i < o * m - 1 for i in range(o * m)]
    assert kv[0, ~rows].eq(0).all()


@COMPRESSORS
def test_worked_decode_of_csa(kernel):
    """Tokens 0-3 fill the current rows, which move up as entry 0 closes; entry 1 pools tokens 0-3 and 4-7."""
    _, backend = kernel
    x, wkv, wgate, bias = problem(2, 4, 8)
    kv, z = x[0] @ wkv.T, x[0] @ wgate.T + bias.repeat(2, 1)
    sizes = x[0].abs() @ wkv.T.abs(), x[0].abs() @ wgate.T.abs() + bias.repeat(2, 1).abs()
    state, emitted = fresh(2, 4), []
    for t in range(8):
        entries, *state = flagops.compress_kv(x[:, t : t + 1], wkv, wgate, bias, *state, t % 4, backend=backend)
        emitted += [entries[0, i] for i in range(entries.shape[1])]
        assert len(emitted) == (t + 1) // 4
        current = [max(i for i in range(t + 1) if i % 4 == j) if t >= j else None for j in range(4)]
        for of_state, tokens, size in zip(state, (kv, z), sizes, strict=True):
            for j, token in enumerate(current):
                assert token is None or assert_near(of_state[0, 4 + j], tokens[token], 2 * DEPTH, size[token]) is None
            if t >= 3:
                last = slice((t + 1) // 4 * 4 - 4, (t + 1) // 4 * 4)
                assert_near(of_state[0, :4], tokens[last], 2 * DEPTH, size[last])
    one = (torch.softmax(z[:4, WIDTH:], 0) * kv[:4, WIDTH:]).sum(0)
    scores, values = (torch.cat([s[:4, :WIDTH], s[4:, WIDTH:]]) for s in (z, kv))
    two = (torch.softmax(scores, 0) * values).sum(0)
    for entries in (emitted, [one, two]):
        assert_of("compress_kv", (torch.stack(entries)[None], *state), x, wkv, wgate, bias, *fresh(2, 4))


@COMPRESSORS
def test_a_fresh_state_forgets_the_sequence_before(kernel):
    """A prompt shorter than a window must not leave the previous sequence's window in place."""
    _, backend = kernel
    inputs = problem(2, 4, 6)
    x, *others = inputs
    _, *stale = flagops.compress_kv(*inputs, *fresh(2, 4), backend=backend)
    assert_of("compress_kv", chunked(backend, x, *others, fresh(2, 4), [3]), *inputs, *fresh(2, 4))
    with pytest.raises(AssertionError, match="elements are off"):
        assert_of("compress_kv", chunked(backend, x, *others, stale, [3]), *inputs, *fresh(2, 4))


@COMPRESSORS
def test_large_scores_stay_finite(kernel):
    _, backend = kernel
    x, wkv, wgate, bias = problem(2, 4, 8, dtype=torch.float32)
    entries = flagops.compress_kv(x, wkv, wgate * 1e8, bias, *fresh(2, 4, dtype=torch.float32), backend=backend)[0]
    assert entries.isfinite().all()
    assert (entries.abs() <= (x @ wkv.T).abs().max() * 1.001).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_projections_are_never_held_whole(backend):
    x, weight = torch.randn(1, 8192, 16), torch.randn(1024, 16)
    inputs = x, weight, weight, torch.zeros(4, 1024), *fresh(2, 4, d=512, dtype=torch.float32)
    out = torch.empty(1, 2048, 512), *fresh(2, 4, d=512, dtype=torch.float32)
    with config.using(budget=8 << 20):
        flagops.compress_kv(*inputs, out=out, backend=backend)
        extra = measure.extra_memory(lambda: flagops.compress_kv(*inputs, out=out, backend=backend), calls=5)
    assert extra is None or extra < 40 << 20, f"{extra >> 20} MiB; both projections have 64"


def test_bad_input_says_what_is_wrong():
    inputs = problem(2, 4, 3)
    with pytest.raises(ValueError, match="a window closes at 4 tokens"):
        flagops.compress_kv(*inputs, *fresh(2, 4), 4)
    with pytest.raises(ValueError, match="whole number of at least 0"):
        flagops.compress_kv(*inputs, *fresh(2, 4), -1)
    x, wkv, wgate, bias = inputs
    with pytest.raises(ValueError, match="windows of 4 tokens"):
        flagops.compress_kv(x, wkv, wgate, bias, *(torch.zeros(1, 12, 6, dtype=torch.float64) for _ in range(2)))


def test_the_bound_is_tight():
    """Half precision's rounding of the entry, not the error of the sums, decides it."""
    operator = registry.operator("compress_kv")
    rng = np.random.default_rng(0)
    x, wkv, wgate = (rng.standard_normal(s).astype(np.float16) for s in ((1, 8, 64), (6, 64), (6, 64)))
    state = np.zeros((1, 8, 6), np.float32), np.full((1, 8, 6), -np.inf, np.float32)
    inputs = dict(zip(operator.inputs, (x, wkv, wgate, np.zeros((4, 6), np.float32), *state, 0), strict=True))
    exact = operator.reference(*inputs.values())
    bound = operator.bound(exact, inputs, ("float16", "float32", "float32"))
    assert (bound[0] < 2.0**-9 * np.abs(exact[0]).max()).all()
    assert max(bound[1].max(), bound[2].max()) < 1e-3
