"""Lists of keys in place of masks: what transformers' masks say, and no tensor of their size."""

import copy
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.transformers import visible_indices  # noqa: E402
from flagops.transformers._binding import Binding, view  # noqa: E402
from flagops.transformers._masks import dense, first_rows, index_mask, joined  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BOUND, LAYERS, caching, logits, rows, small_deepseek_v4, tokens  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


class _Awake:
    active, ops = True, frozenset({"sparse_attention"})


class _Held:
    """A module with a configuration, for a view of it."""

    def __init__(self, config):
        self.config = config


@settings(max_examples=60)
@given(data=st.data())
def test_lists_are_the_dense_mask(data):
    """Any window, padding, packing and position in a cache: visible in one exactly when listed in the other."""
    from transformers import DeepseekV4Config, DynamicCache
    from transformers.masking_utils import AttentionMaskInterface, create_sliding_window_causal_mask

    AttentionMaskInterface.register("flagops", index_mask)
    config = DeepseekV4Config(
        num_hidden_layers=1,
        compress_ratios=[0],
        sliding_window=data.draw(st.sampled_from((1, 2, 4, 7))),
        attn_implementation="eager",
    )
    binding = Binding(_Held(config), _Awake.ops, None, "attn")
    binding.handles.append(_Awake())
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 17))
    past = data.draw(st.sampled_from((None, 0, 1, 3, 6, 20)))
    cache = None
    if past is not None:
        cache = DynamicCache(config=config)
        if past:
            cache.update(torch.zeros(batch, 1, past, 2), torch.zeros(batch, 1, past, 2), 0)
    kind = data.draw(st.sampled_from(("none", "padded", "packed")))
    mask, places = None, None
    if kind == "padded":
        width = (past or 0) + length
        mask = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width),
                                               min_size=batch, max_size=batch)))  # fmt: skip
    elif kind == "packed" and past is None:
        cut = data.draw(st.integers(0, length))
        places = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(batch, -1)
    arguments = {"inputs_embeds": torch.zeros(batch, length, 2), "attention_mask": mask, "position_ids": places}
    expected = create_sliding_window_causal_mask(config=config, **caching(cache), **arguments)
    lists = create_sliding_window_causal_mask(config=view(binding), **caching(cache), **arguments)
    assert lists.dtype == torch.int32
    assert lists.shape[:2] == (batch, length)
    assert lists.shape[2] <= config.sliding_window
    assert torch.equal(dense(lists, expected.shape[-1], torch.float32), expected)


def test_visible_indices():
    low, inf = torch.finfo(torch.float32).min, float("-inf")
    mask = torch.tensor([[[0, low, 0, inf], [inf] * 4, [0, 0, 0, 0.0], [low, low, low, 0]]])
    expected = [[[0, 2, -1, -1], [-1] * 4, [0, 1, 2, 3], [3, -1, -1, -1]]]
    assert visible_indices(mask).tolist() == expected
    assert visible_indices(mask).dtype == torch.int32
    assert torch.equal(dense(visible_indices(mask), 4, torch.float32)[:, 0] == 0, mask == 0)
    assert visible_indices(torch.full((2, 3, 4), inf)).shape == (2, 3, 0)
    assert visible_indices(torch.zeros(1, 0, 4)).shape == (1, 0, 0)
    for value in (-1.0, 1e-30, float("nan"), float("inf")):
        assert visible_indices(torch.tensor([[[0.0, value]]])) is None


def test_joined():
    """A layer's mask in all its forms, with the entries of its compressor behind."""
    window = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32)
    entries = torch.tensor([[[-1], [0]]])
    assert joined(window, 2, entries, 1)[0].tolist() == [[[0, -1, -1], [0, 1, 2]]]
    assert joined(window, 2, None, 0)[0] is window
    assert joined(window, 2, None, 2)[0].tolist() == [[[0, -1, 2, 3], [0, 1, 2, 3]]]
    additive = dense(window, 2, torch.float32)
    assert joined(additive, 2, entries, 1)[0].tolist() == [[[0, -1, -1], [0, 1, 2]]]
    whole = torch.tensor([[[[0.0, -torch.inf, 0.0]] * 2]])
    assert joined(whole, 2, entries, 1)[0].tolist() == [[[0, 2], [0, 2]]], "a mask over the entries counts alone"
    block = dense(entries, 1, torch.float32, float("-inf"))
    assert joined(window, 2, block, 1)[0].tolist() == [[[0, -1, -1], [0, 1, 2]]]
    soft, reason = joined(additive + 0.5 * (additive == 0), 2, entries, 1)
    assert reason == "the mask is more than visible or hidden"
    assert soft[0, 0].tolist() == [[0.5, torch.finfo(torch.float32).min, -torch.inf], [0.5, 0.5, 0]]
    assert "no mask came" in joined(None, 2, entries, 1)[1]
    assert "shape (1, 2, 2, 2)" in joined(additive.expand(1, 2, 2, 2), 2, None, 0)[1]
    assert first_rows(torch.tensor([[0, 3, 1]]), 2).tolist() == [[[-1, -1], [0, 1], [0, -1]]]


def test_a_mask_of_visible_and_hidden_keys_is_read(model):
    ids = tokens(24)
    mask = torch.zeros(1, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    expected = logits(model, ids, attention_mask=mask)
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=0, atol=BOUND)
    assert handle.report().share == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_a_mask_of_no_floats_is_left_to_transformers(model, dtype):
    """Which adds its numbers to the logits."""
    ids, mask = tokens(24), torch.ones(24, 24).tril()[None, None].to(dtype)
    expected = logits(model, ids, attention_mask=mask)
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=0, atol=BOUND)
    reason = f"a mask of {dtype}, where transformers' own are added to the logits"
    assert rows(handle)["sparse_attention"].passed == {reason: LAYERS}


def test_a_mask_of_three_axes_is_no_list(model):
    """As transformers answers it."""
    ids, mask = tokens(24), {"sliding_attention": torch.ones(1, 24, 24).tril().bool()}
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        logits(model, ids, attention_mask=mask)
    with flagops.patch(model, backend="torch"), pytest.raises(RuntimeError, match="same number of dimensions"):
        logits(model, ids, attention_mask=mask)


def test_an_attention_layer_that_came_after_the_patch(model):
    """It reads no lists, so its model makes dense masks for all of its layers."""
    changed, ids = small_deepseek_v4(), tokens(4)
    expected = logits(changed, ids)
    with flagops.patch(changed, backend="torch") as handle:
        changed.model.layers[0].self_attn = copy.deepcopy(model.model.layers[0].self_attn)
        torch.testing.assert_close(logits(changed, ids), expected, rtol=0, atol=BOUND)
    assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS - 1}


def test_embeddings_without_token_ids(model):
    """Hash layers look experts up by token ids; without such layers embeddings are enough."""
    with torch.no_grad():
        embedded = model.model.embed_tokens(tokens(24))
        with flagops.patch(model, backend="torch"), pytest.raises(ValueError, match="expected input_ids"):
            model(inputs_embeds=embedded)
        scored = small_deepseek_v4(num_hash_layers=0)
        expected = scored(inputs_embeds=embedded).logits
        with flagops.patch(scored, backend="torch") as handle:
            torch.testing.assert_close(scored(inputs_embeds=embedded).logits, expected, rtol=0, atol=BOUND)
    assert handle.report().share == 1


def test_a_bias_in_the_mask_is_left_to_transformers(model):
    ids = tokens(24)
    bias = torch.zeros(1, 1, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    bias[..., 0] = -0.5
    expected = logits(model, ids, attention_mask=bias)
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids, attention_mask=bias), expected, rtol=0, atol=BOUND)
    row = rows(handle)["sparse_attention"]
    assert row.passed == {"the mask is more than visible or hidden": LAYERS}
    assert not row.replaced


def test_no_mask_is_left_to_transformers(model):
    ids, nothing = tokens(30), {"sliding_attention": None}
    expected = logits(model, ids, attention_mask=nothing)
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids, attention_mask=nothing), expected, rtol=0, atol=BOUND)
    ((reason, times),) = rows(handle)["sparse_attention"].passed.items()
    assert "no mask" in reason
    assert times == LAYERS


def test_a_row_that_sees_nothing(model):
    ids = tokens(24, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = logits(model, ids, attention_mask=mask)
    with flagops.patch(model, backend="torch"):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=0, atol=BOUND)


def test_no_tensor_is_as_large_as_a_mask(model):
    """Every tensor that a patched prefill makes is smaller than [s, s], transformers' own included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    count, sizes = 2048, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes() // max(result.element_size(), 1))
            return result

    ids = tokens(count)
    with flagops.patch(model, backend="numba"), Watch():
        logits(model, ids)
    assert len(sizes) > 100
    assert max(sizes) < count * count / 4, "an HCA layer of this model lists s / 8 entries for each query"
