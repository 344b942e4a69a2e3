"""Tokens on trial leave no trace: a cache is bit by bit that of a model which has never read what it forgets."""

import copy
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.masking_utils import create_sliding_window_causal_mask  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import caching, small_deepseek_v4, tokens  # noqa: E402

import flagops  # noqa: E402
from flagops.transformers import Trial  # noqa: E402
from flagops.transformers._cache import _Room, _State  # noqa: E402

WINDOW = 8  # of attention; CSA closes one every 4 tokens, HCA every 8
PATCHES = {
    "transformers": None,
    "torch": {"backend": "torch"},
    "numba": {"backend": "numba"},
    "official": {"backend": "numba", "numerics": "official"},
    "compressors of transformers": {"backend": "numba", "ops": ("sparse_attention", "rotary_embedding")},
}


def made(patch, dtype=torch.float32):
    """A model whose keys and entries are sums of small whole numbers: exact in every order, however many rows."""
    model = small_deepseek_v4(sliding_window=WINDOW)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "self_attn" in name and name.endswith(("kv_proj.weight", "gate_proj.weight")):
                x.copy_(torch.randint(-1, 2, x.shape, generator=draw))
    model = model.to(dtype)
    if patch is not None:
        flagops.patch(model, **patch)
    return model


def hidden(count, dtype=torch.float32):
    return torch.randint(-2, 3, (2, count, 32), generator=torch.Generator().manual_seed(1)).to(dtype)


def read(model, x, cache):
    """What each attention layer of a model makes of the same hidden states, after those in its cache."""
    base, start = model.model, cache.get_seq_length()
    positions = torch.arange(start, start + x.shape[1])[None]
    mask = create_sliding_window_causal_mask(base.config, x, None, cache, positions)
    tables = {kind: base.rotary_emb(x, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
    given = {"position_embeddings": tables, "position_ids": positions, "attention_mask": mask} | caching(cache)
    with torch.no_grad():
        return [layer.self_attn(x, **given)[0] for layer in base.layers]


def attempt(model, x, cache, kept):
    """Read on trial, and forget all but the first."""
    with Trial(model, cache) as trial:
        read(model, x, cache)
        trial.keep(kept)


def state(cache):
    """All that a cache holds, by layer and name; of what flagops keeps beside it the states of compressors."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            for key, x in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(x, _State):
                    found |= {(index, key, leaf): getattr(x, leaf) for leaf in ("kv", "scores", "filled")}
                elif not isinstance(x, _Room):
                    found[index, name, key] = x
    return found


def raw(x):
    return (x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).tolist()) if torch.is_tensor(x) else x


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert raw(x) == raw(two[name]), name


@pytest.mark.drawn
@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_what_is_forgotten_was_never_read(patch):
    """At every place between the ends of windows of attention and compression, and where the room of entries is full;
    what the layers make of further tokens is the same, too."""
    model, x = made(patch), hidden(300)
    for start in (*range(2 * WINDOW), 259):
        before = DynamicCache(config=model.config)
        if start:
            read(model, x[:, :start], before)
        for kept in range(WINDOW - 1):
            tried, never = copy.deepcopy(before), copy.deepcopy(before)
            attempt(model, x[:, start : start + WINDOW - 1], tried, kept)
            if kept:
                read(model, x[:, start : start + kept], never)
            assert_same(state(tried), state(never))
            rest = x[:, start + kept : start + kept + 9]
            for one, two in zip(*(read(model, rest, cache) for cache in (tried, never)), strict=True):
                assert torch.equal(one, two)
            assert_same(state(tried), state(never))


def test_in_bfloat16():
    model, x = made(PATCHES["numba"], torch.bfloat16), hidden(24, torch.bfloat16)
    for kept in range(6):
        tried, never = (DynamicCache(config=model.config) for _ in range(2))
        read(model, x[:, :13], tried)
        read(model, x[:, :13], never)
        attempt(model, x[:, 13:18], tried, kept)
        if kept:
            read(model, x[:, 13 : 13 + kept], never)
        assert_same(state(tried), state(never))


def test_a_whole_model_of_kernels_that_are_batch_invariant():
    """Whose hidden states are the same however many tokens are read: so are logits and cache, of one that was given
    token by token and has forgotten nothing."""
    model = small_deepseek_v4(sliding_window=WINDOW)
    ids, kept = tokens(60), (3, 0, 7, 1, 5, 2, 6, 4) * 2
    tried, plain = (DynamicCache(config=model.config) for _ in range(2))
    with flagops.patch(model, backend="numba"), flagops.enable(backend="numba"), torch.no_grad():
        for count in kept:
            start = tried.get_seq_length()
            with Trial(model, tried) as trial:
                found = model(input_ids=ids[:, start : start + WINDOW - 1], **caching(tried)).logits
                trial.keep(count)
            for at in range(count):
                one = model(input_ids=ids[:, start + at : start + at + 1], **caching(plain)).logits
                assert torch.equal(one[:, 0], found[:, at])
            assert_same(state(tried), state(plain))
    assert tried.get_seq_length() == sum(kept)


def test_an_error_takes_everything_back_and_its_hooks():
    model, x = made(PATCHES["numba"]), hidden(20)
    cache = DynamicCache(config=model.config)
    read(model, x[:, :11], cache)
    before = state(copy.deepcopy(cache))
    with pytest.raises(TypeError):
        attempt(model, x[:, 11:16], cache, None)
    assert_same(state(cache), before)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_all_stays_that_nobody_forgets():
    model, x = made(PATCHES["numba"]), hidden(20)
    tried, plain = (DynamicCache(config=model.config) for _ in range(2))
    with Trial(model, tried):
        read(model, x, tried)
    read(model, x, plain)
    assert_same(state(tried), state(plain))


def test_what_cannot_be_kept():
    model, x = made(None), hidden(20)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="4 tokens of 3 that were read"):
        attempt(model, x[:, :3], cache, 4)
    with pytest.raises(ValueError, match="8 tokens were read, of which a window of 8 remembers 7"):
        attempt(model, x[:, :WINDOW], cache, 2)
    assert cache.get_seq_length() == 0
    attempt(model, x[:, :WINDOW], cache, 0)
    assert cache.get_seq_length() == 0
