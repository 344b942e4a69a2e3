"""The trained DeepSeek-V4 that comes with flagops, through every surface: what random weights hide, its own show."""

import sys
from pathlib import Path

import pytest
import torch

import flagops
from flagops import AttentionCache, AttentionConfig, AttentionWeights, checkpoint
from flagops.deepseek_v4.examples import TRAINED, held_out, read, trained_deepseek_v4

sys.path.insert(0, str(Path(__file__).parent))
import ranks

BOUND = 2e-4
"""Of a logit, in float32: sums in another order."""


@pytest.fixture(scope="module")
def model():
    return trained_deepseek_v4()


@pytest.fixture(scope="module")
def ids():
    """So few that the indexer selects every entry: among entries of one score any choice is right."""
    return held_out(256, "facts")


@pytest.fixture(scope="module")
def expected(model, ids):
    with torch.no_grad():
        return model(ids).logits


def off(found, expected):
    return float((found.float() - expected).abs().max())


def continued(model, ids):
    return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


def test_it_is_what_the_format_says_and_small():
    assert sum(x.stat().st_size for x in TRAINED.iterdir()) < 5_000_000
    kinds = {str(x.dtype) for _, x in checkpoint.load(TRAINED, dtype="bfloat16")}
    assert kinds <= {"torch.bfloat16", "torch.float32", "torch.int64"}


def test_it_has_learned(expected, ids):
    """Bytes of text that it has not seen, at a fourth of what guessing costs (5.5 nats)."""
    nats = torch.nn.functional.cross_entropy(expected[0, 128:-1], ids[0, 129:], reduction="none")
    assert nats.mean() < 2


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_patched(model, ids, expected, backend):
    text = continued(model, ids)
    with flagops.patch(model, backend=backend), torch.no_grad():
        assert off(model(ids).logits, expected) < BOUND
        assert continued(model, ids) == text
    assert read(text).isprintable() or "\n" in read(text)


def test_patched_where_the_indexer_selects(model):
    """Entries of one score, and what follows from another choice among them, are few."""
    ids = held_out(700)
    with torch.no_grad():
        expected = model(ids).logits
        with flagops.patch(model):
            found = model(ids).logits
    far = (found - expected).abs().amax(-1) > BOUND
    nats = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]) for x in (found, expected)]
    assert far.float().mean() < 0.5
    assert abs(nats[0] - nats[1]) < 1e-3


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_packed(ids, expected, backend):
    packed = flagops.load(TRAINED, dtype="float32", activations="none", backend=backend)
    with torch.no_grad():
        assert off(packed(ids).logits, expected) < BOUND


def test_converted_to_fp8(ids, expected, tmp_path):
    """FP4 in FP8 is the same numbers."""
    checkpoint.convert(TRAINED, tmp_path / "fp8", to="fp8")
    packed = flagops.load(tmp_path / "fp8", dtype="float32", activations="none")
    with torch.no_grad():
        assert off(packed(ids).logits, expected) < BOUND


@pytest.mark.parametrize(("number", "kind"), list(enumerate(["sliding", "csa", "hca", "csa"])))
def test_layers_of_the_official_names(model, ids, number, kind):
    attention, seen = model.model.layers[number].self_attn, []
    hook = attention.register_forward_hook(
        lambda _, args, given, out: seen.append(((*args, given.get("hidden_states")), out[0])), with_kwargs=True
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    (given, *_), expected = seen[0]
    config = model.config
    scaling = config.rope_parameters["compress"]
    shape = AttentionConfig(
        heads=config.num_attention_heads, head_dim=config.head_dim, rope_dim=config.qk_rope_head_dim,
        groups=config.o_groups, window=config.sliding_window, index_heads=config.index_n_heads,
        index_dim=config.index_head_dim, top_k=config.index_topk, rope_factor=scaling["factor"],
        rope_original=scaling["original_max_position_embeddings"], official=False,
    )  # fmt: skip
    tensors = {n: x.float() if x.is_floating_point() else x for n, x in checkpoint.load(TRAINED, dtype="float32")}
    weights = AttentionWeights.of_checkpoint(tensors, f"layers.{number}.attn.", kind)
    layer = {"sliding": flagops.sliding_window_attention, "csa": flagops.csa_attention, "hca": flagops.hca_attention}
    with torch.no_grad():
        found = layer[kind](given, weights, AttentionCache(shape, kind))
    assert off(found, expected) < 1e-4


@pytest.mark.drawn
def test_divided_over_two_ranks(ids, expected):
    for result in ranks.launch(2, [("trained", {"ids": ids})])[0]:
        if isinstance(result, Exception):
            raise result
        assert off(result, expected) < BOUND
