"""A patched DeepSeek-V4 computes what transformers does: prefill, long decodes, pieces, padding, beams, caches."""

import sys
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.transformers import OPS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import (  # noqa: E402
    BACKENDS,
    BOUND,
    CLEAR,
    caching,
    continued,
    logits,
    returned,
    rows,
    small_deepseek_v4,
    tokens,
    watched,
)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


@pytest.fixture(scope="module")
def models():
    return {seed: small_deepseek_v4(seed) for seed in range(2)}


@settings(max_examples=6)
@given(
    seed=st.integers(0, 1),
    count=st.sampled_from((24, 33, 64, 129, 256, 600)),
    batch=st.integers(1, 2),
    draw=st.integers(0, 99),
)
def test_prefill(models, seed, count, batch, draw):
    model, ids = models[seed], tokens(count, batch, draw)
    with watched(model) as margin:
        expected = logits(model, ids)
    assume(margin() > CLEAR)
    for backend in BACKENDS:
        with flagops.patch(model, backend=backend) as handle:
            close(logits(model, ids), expected)
        assert rows(handle).keys() == set(OPS)
        assert all(row.replaced.keys() == {backend} and not row.passed for row in rows(handle).values())


@pytest.mark.drawn
@settings(max_examples=2)
@given(seed=st.integers(0, 1), draw=st.integers(0, 99))
def test_decode(models, seed, draw):
    """300 tokens, one at a time, after a prompt of 24."""
    model, ids, sizes = models[seed], tokens(324, 1, draw), (24, *[1] * 300)
    with watched(model) as margin:
        expected = continued(model, ids, sizes)
    assume(margin() > CLEAR)
    for backend in BACKENDS:
        with flagops.patch(model, backend=backend) as handle:
            close(continued(model, ids, sizes), expected)
        assert handle.report().share == 1


@settings(max_examples=6)
@given(
    sizes=st.lists(st.sampled_from((1, 1, 2, 3, 5, 8, 13)), min_size=2, max_size=8),
    batch=st.integers(1, 2),
    backend=st.sampled_from(BACKENDS),
)
def test_pieces_and_turns(models, sizes, batch, backend):
    """Any pieces; a patched and an unpatched model continue each other's cache."""
    model, ids = models[0], tokens(sum(sizes), batch, 7)
    expected = continued(model, ids, sizes)
    with flagops.patch(model, backend=backend):
        close(continued(model, ids, sizes), expected)
    for first in (0, 1):
        pieces, cache = [], None
        for turn, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
            handle = flagops.patch(model, backend=backend) if turn % 2 == first else None
            with torch.no_grad():
                out = model(input_ids=ids[:, end - size : end], **caching(cache), use_cache=True)
            cache = returned(out)
            pieces.append(out.logits)
            if handle:
                handle.disable()
        close(torch.cat(pieces, 1), expected)


def test_the_cache_is_as_transformers_leaves_it(models):
    """Tensor by tensor, whatever the sizes of the pieces."""
    from transformers import DynamicCache

    model, ids = models[0], tokens(64, 2)

    def contents(sizes):
        cache = DynamicCache(config=model.config)
        continued(model, ids, sizes, cache)
        found = {}
        for index, layer in enumerate(cache.layers):
            found[index, "length"] = layer.cumulative_length
            for part in ("buffer_kv", "buffer_gate", "compressed_kv", "entry_count", "overlap_kv", "overlap_gate"):
                found |= {(index, part, name): x for name, x in getattr(layer, part, {}).items()}
            found[index, "keys"] = layer.keys
        return found

    for sizes in ((3,), (24,), (9, 1, 1, 1, 4, 7), (*[1] * 19, 32)):
        expected = contents(sizes)
        with flagops.patch(model, backend="torch"):
            got = contents(sizes)
        assert got.keys() == expected.keys()
        for key, x in expected.items():
            if isinstance(x, torch.Tensor):
                assert got[key].dtype == x.dtype, key
                assert got[key].shape == x.shape, key
                close(got[key], x)
            else:
                assert got[key] == x, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [False, True])
def test_padding(models, backend, side, positions):
    """As transformers treats it: padding is masked, but windows count it."""
    model, ids = models[0], tokens(40, 3, 2)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 7, 13)):
        mask[row, : count if side == "left" else 0] = 0
        mask[row, 40 - count if side == "right" else 40 :] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0) if positions else None

    def run():
        found, cache, x, seen, at = [], None, ids, mask, place
        with torch.no_grad():
            for _ in range(12):
                out = model(input_ids=x, attention_mask=seen, position_ids=at, **caching(cache), use_cache=True)
                cache, x = returned(out), ids[:, len(found) : len(found) + 1]
                found.append(out.logits)
                seen = torch.cat([seen, seen.new_ones(3, 1)], 1)
                at = at[:, -1:] + 1 if positions else None
        return torch.cat(found, 1)

    expected = run()
    with flagops.patch(model, backend=backend) as handle:
        close(run(), expected)
    assert handle.report().share == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(models, backend):
    ids = tokens(40, 2, 3)
    places = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    expected = logits(models[0], ids, position_ids=places, use_cache=False)
    assert (expected - logits(models[0], ids, use_cache=False)).abs().max() > 0.1
    with flagops.patch(models[0], backend=backend):
        close(logits(models[0], ids, position_ids=places, use_cache=False), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(models, backend):
    model, prompt = models[0], tokens(24, 2)
    padding = torch.ones_like(prompt)
    padding[1, :5] = 0
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options = greedy | {"output_logits": True, "return_dict_in_generate": True, "attention_mask": padding}
    expected = model.generate(prompt, **options)
    beams = model.generate(prompt, num_beams=3, **greedy)
    with flagops.patch(model, backend=backend) as handle:
        got = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, num_beams=3, **greedy), beams)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))
    assert handle.report().share == 1


def test_reordered_and_copied_caches(models):
    """What beam search does to a cache, and a cache that two generations start from."""
    import copy

    model, ids = models[0], tokens(40, 2)
    order = torch.tensor([1, 0])

    def run():
        with torch.no_grad():
            cache = returned(model(input_ids=ids[:, :22], use_cache=True))
            spare = copy.deepcopy(cache)
            cache.reorder_cache(order)
            swapped = continued(model, ids[order, 22:], [1] * 18, cache)
            return swapped, continued(model, ids[:, 22:], [1] * 18, spare)

    expected = run()
    with flagops.patch(model, backend="torch"):
        swapped, spare = run()
    close(swapped, expected[0])
    close(spare, expected[1])
    close(swapped[order], spare)


def test_a_reset_cache_starts_anew(models):
    model, ids = models[0], tokens(30)
    expected = logits(model, ids)
    with flagops.patch(model, backend="torch"):
        with torch.no_grad():
            cache = returned(model(input_ids=ids[:, :23], use_cache=True))
        cache.reset()
        close(continued(model, ids, (3, 1, 1, 25), cache), expected)


@pytest.mark.parametrize(("count", "crop", "sizes"), [(24, -3, (1, 1)), (24, -3, (5,)), (5, -2, (1,)), (24, 0, (1, 4))])
def test_a_cache_rolled_back(models, count, crop, sizes):
    """The layers of compressors do not record their past: an error, as in transformers, unless nothing was cropped."""
    from transformers import DynamicCache

    model, ids = models[0], tokens(40)

    def run():
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        logits(model, ids[:, :count], **caching(cache), use_cache=True)
        cache.crop(crop)
        return continued(model, ids[:, count + crop :], sizes, cache)

    if not crop:
        expected = run()
        with flagops.patch(model, backend="torch"):
            return close(run(), expected)
    with pytest.raises(RuntimeError):
        run()
    with flagops.patch(model, backend="torch"), pytest.raises(RuntimeError, match="that was cropped"):
        run()


@pytest.mark.parametrize(("count", "crop"), [(3, -1), (3, -3), (2, -1)])
def test_a_cache_cropped_within_its_window(models, count, crop):
    """Where transformers goes on with compressors that have seen what was cropped: its own code, and a reason."""
    from transformers import DynamicCache

    model, ids = models[0], tokens(40)

    def run():
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :count], **caching(cache), use_cache=True)
        cache.crop(crop)
        return continued(model, ids[:, count + crop :], (1, 7, 2), cache)

    expected = run()
    with flagops.patch(model, backend="torch") as handle:
        close(run(), expected)
    (reason,) = rows(handle)["compress_kv"].passed
    assert reason == "the cache was cropped, which the state of transformers' compressors does not follow"


@pytest.mark.parametrize(("method", "argument"), [("batch_select_indices", [1]), ("batch_repeat_interleave", 2)])
def test_a_cache_of_another_batch(models, method, argument):
    """Which transformers' compressors do not follow either."""
    model, ids = models[0], tokens(30, 2)

    def run():
        with torch.no_grad():
            cache = returned(model(input_ids=ids[:, :22], use_cache=True))
            getattr(cache, method)(argument)
        return continued(model, tokens(8, cache.layers[0].keys.shape[0]), (1, 7), cache)

    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        run()
    with flagops.patch(model, backend="torch"), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        run()


def test_a_static_cache():
    """Where all layers slide; transformers has none for compressors."""
    from transformers import StaticCache

    model, ids = small_deepseek_v4(compress_ratios=[0, 0, 0, 0]), tokens(20)

    def run():
        return continued(model, ids, (9, 1, 1, 9), StaticCache(config=model.config, max_cache_len=32))

    expected = run()
    with flagops.patch(model, backend="torch") as handle:
        close(run(), expected)
    assert handle.report().share == 1


def test_inference_mode_and_after(models):
    """Tensors of an inference mode cannot be written outside of it."""
    model, ids = models[0], tokens(60)
    expected = continued(model, ids, (20, *[1] * 40))
    with flagops.patch(model, backend="torch"):
        with torch.inference_mode():
            cache = returned(model(input_ids=ids[:, :20], use_cache=True))
            for at in range(20, 30):
                model(input_ids=ids[:, at : at + 1], **caching(cache))
        close(continued(model, ids[:, 30:], [1] * 30, cache), expected[:, 30:])


def test_triton(models):
    """A tiny case: without a GPU its interpreter runs."""
    pytest.importorskip("triton")
    ids = tokens(12)
    expected = logits(models[0], ids)
    with flagops.patch(models[0], backend=("triton", "torch")) as handle:
        close(logits(models[0], ids), expected)
    assert any("triton" in row.replaced for row in rows(handle).values())
