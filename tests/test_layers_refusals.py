"""Calls of attention layers that do not fit: an error that names what came, and the cache as it was."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import flagops
from flagops import AttentionCache, AttentionConfig
from flagops.deepseek_v4.cache import KINDS

sys.path.insert(0, str(Path(__file__).parent))
from layer_data import (
    TINY,
    D,
    hidden_states,
    in_chunks,
    layer,
    of_every_kind,
    weights,
)  # fmt: skip


def _state(cache):
    """Everything that later calls can read."""
    rows = cache.config.window + (cache.position // cache.config.ratio(cache.kind) if cache.kind != "sliding" else 0)
    return [cache.position, cache.keys.all(rows).clone(), copy.deepcopy(cache.states)]


def _broken(kind, made, cache, monkeypatch):
    x = hidden_states(2, 3, D)
    other = next(k for k in KINDS if k != kind)
    yield r"the cache is one of a \w+ layer, expected", lambda: layer(other)(x, weights(other), cache)
    for start in (cache.position - 1, cache.position + 1, 0):
        yield "expected 13", lambda start=start: layer(kind)(x, made, cache, start=start)
    yield "x has batch 3, the cache holds batch 2", lambda: layer(kind)(hidden_states(3, 3, D), made, cache)
    double = weights(kind, dtype=torch.float64)
    yield "x has dtype float64, the cache holds dtype float32", lambda: layer(kind)(x.double(), double, cache)
    yield "x has device meta, the cache holds device cpu", lambda: layer(kind)(x.to("meta"), made, cache)
    yield "x has 31 channels", lambda: layer(kind)(x[..., 1:], made, cache)
    yield r"expected 3 dimensions \[b, s, D\]", lambda: layer(kind)(x[0], made, cache)
    narrow = copy.copy(made)
    narrow.wo_b = made.wo_b[:, 1:]
    yield "wo_b", lambda: layer(kind)(x, narrow, cache)
    if kind != "sliding":
        bare = copy.copy(made)
        bare.compressor = None
        yield "the weights hold no compressor", lambda: layer(kind)(x, bare, cache)


@of_every_kind
def test_a_call_that_does_not_fit_leaves_the_cache_as_it_was(kind, monkeypatch):
    made, x = weights(kind), hidden_states(2, 20, D)
    cache, untouched = AttentionCache(TINY, kind), AttentionCache(TINY, kind)
    for each in (cache, untouched):
        in_chunks(kind, x, made, [13], "numba", each)
    before = _state(cache)
    for message, call in _broken(kind, made, cache, monkeypatch):
        with pytest.raises(ValueError, match=message):
            call()
    after = _state(cache)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    for size in (1, 4, 7):  # a kernel that fails at the end, where windows close or not

        def fail(*args, **kwargs):
            raise RuntimeError("out of luck")

        with monkeypatch.context() as patched:
            patched.setattr(flagops, "grouped_output_projection", fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                layer(kind)(x[:, 13 : 13 + size], made, cache, backend="numba")
    got, want = (in_chunks(kind, x, made, [1, 2, 4], "numba", each) for each in (cache, untouched))
    assert torch.equal(got, want)


def test_refusals():
    with pytest.raises(ValueError, match=r"kind must be one of sliding, csa, hca, got 'dense'"):
        AttentionCache(TINY, "dense")
    with pytest.raises(ValueError, match="layout must be one of plain, fp8"):
        AttentionCache(TINY, "csa", layout="int8")
    with pytest.raises(ValueError, match="exact for quantised keys only; this config has official=False"):
        AttentionCache(AttentionConfig(official=False), "csa", layout="fp8")
    with pytest.raises(ValueError, match="the fp8 layout keeps bfloat16, x is float32"):
        layer("csa")(hidden_states(1, 3, D), weights("csa"), AttentionCache(TINY, "csa", layout="fp8"))
    with pytest.raises(ValueError, match="blocks of 64 do not divide the 40 channels"):
        AttentionConfig(head_dim=104)
    with pytest.raises(ValueError, match="holds no sequence yet"):
        AttentionCache(TINY, "csa").reorder([0])
    with pytest.raises(TypeError, match="must be a torch tensor or a NumPy array, got list"):
        layer("csa")([1.0], weights("csa"), AttentionCache(TINY, "csa"))
    x = hidden_states(1, 3, D).requires_grad_()
    with pytest.raises(flagops.Unsupported, match="csa_attention has no backward"):
        layer("csa")(x, weights("csa"), AttentionCache(TINY, "csa"))
    with torch.no_grad():
        layer("csa")(x, weights("csa"), AttentionCache(TINY, "csa"))
