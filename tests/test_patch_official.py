"""The official numerics under `flagops.patch`, against transformers' code with NumPy quantisers between its steps."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.deepseek_v4.examples import random_deepseek_v4  # noqa: E402
from flagops.transformers import OPS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BACKENDS, continued, gradients, logits, rows, same_gradients, small_deepseek_v4, tokens  # noqa: E402

HEAD, INDEX, ROTATED = 96, 64, 32


@pytest.fixture(scope="module")
def model():
    return random_deepseek_v4(
        0,
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=HEAD,
        qk_rope_head_dim=ROTATED,
        q_lora_rank=32,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=4,  # every expert: no routing to flip
        index_n_heads=8,
        index_head_dim=INDEX,
        index_topk=4,
        sliding_window=8,
        max_position_embeddings=1024,
        compress_ratios=[0, 4, 128, 0],
        compress_rate_hca=8,
        initializer_range=0.1,
    )


@contextlib.contextmanager
def quantised():
    """transformers' rotation, and then what the inference code does to keys, entries and the indexer's operands."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    rotate = modeling.apply_rotary_pos_emb

    def both(x, cos, sin, unsqueeze_dim=1):
        y = rotate(x, cos, sin, unsqueeze_dim)
        if x.shape[-1] == INDEX:
            return flagops.fp4_fake_quantize(flagops.hadamard(y.detach(), backend="numpy"), 32, backend="numpy")
        if x.shape[1] == 1 and x.shape[-1] == HEAD:
            plain = y[..., : HEAD - ROTATED]
            rounded = flagops.fp8_fake_quantize(plain.detach().contiguous(), 64, backend="numpy")
            return torch.cat([plain + (rounded - plain).detach(), y[..., HEAD - ROTATED :]], -1)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "apply_rotary_pos_emb", both)
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_numerics(model, backend):
    """A key that rounds the other way moves all that follows it, so not every draw must agree; almost all do."""
    near = []
    for seed in range(5):
        ids = tokens(48, 1, seed)
        with quantised():
            expected = logits(model, ids)
        with flagops.patch(model, backend=backend, numerics="official") as handle:
            near.append(float((continued(model, ids, (40, *[1] * 8)) - expected).abs().max()))
        assert handle.report().share == 1
    with flagops.patch(model, backend=backend):
        plain = float((logits(model, ids) - expected).abs().max())
    assert sorted(near)[2] < 1e-4, near
    assert plain > 1e-2, "the numerics differ"
    assert {"fp8_fake_quantize", "fp4_fake_quantize", "hadamard"} <= rows(handle).keys()


@pytest.mark.drawn
@pytest.mark.parametrize("op", OPS)
def test_numerics_are_a_switch_of_their_own(model, op):
    """Whichever operators are replaced, and wherever transformers' own code runs: with a cache and without."""
    ops, near = ["compress_kv", op] if op == "lightning_indexer" else [op], []
    for seed in range(5):
        ids = tokens(48, 1, seed)
        with quantised():
            expected = logits(model, ids)
        with flagops.patch(model, ops=ops, backend="torch", numerics="official") as handle:
            alone = logits(model, ids, use_cache=False)
            near.append(float((continued(model, ids, (40, *[1] * 8)) - expected).abs().max()))
            near.append(float((alone - expected).abs().max()))
        assert rows(handle).keys() >= {*ops, "fp8_fake_quantize", "fp4_fake_quantize", "hadamard"}
        assert handle.report().share == 1
    assert sorted(near)[4] < 1e-4, near


def test_numerics_where_a_hook_watches(model):
    """A compressor that must run its own layers rounds its entries all the same."""
    near, compressors = [], [layer.self_attn.compressor for layer in model.model.layers[1:]]
    watched = [m for part in compressors for m in (part.kv_proj, getattr(part, "indexer", part).kv_proj)]
    hooks = [module.register_forward_hook(lambda *_: None) for module in watched]
    try:
        for seed in range(5):
            ids = tokens(48, 1, seed)
            with quantised():
                expected = logits(model, ids)
            with flagops.patch(model, backend="torch", numerics="official") as handle:
                near.append(float((continued(model, ids, (40, *[1] * 8)) - expected).abs().max()))
            assert rows(handle)["compress_kv"].passed == {"a hook watches a linear layer": 27}
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(near)[2] < 1e-4, near


@pytest.mark.parametrize("ops", ["swiglu", "rms_norm"])
def test_the_norm_of_single_heads_is_rounded_step_by_step(model, ops):
    half = copy.deepcopy(model).bfloat16()
    norm = half.model.layers[0].self_attn.q_b_norm
    x = torch.randn(2, 3, HEAD, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = flagops.rms_norm(x, None, norm.eps, True, backend="numpy")
    assert not torch.equal(norm(x), expected)
    with flagops.patch(half, ops=ops, backend="torch", numerics="official"):
        assert torch.equal(norm(x), expected)
    with flagops.patch(half, ops=ops, backend="torch"):
        assert not torch.equal(norm(x), expected)


def test_a_backend_without_the_quantisers_rounds_with_another(model, monkeypatch):
    """The rounding is not left out; what is asked for in vain is counted."""
    real, refused = flagops.fp8_fake_quantize, []

    def quantize(*args, backend=None, **kwargs):
        if backend == "torch":
            refused.append(backend)
            raise flagops.Unsupported("not today")
        return real(*args, backend=backend, **kwargs)

    ids = tokens(30)
    with flagops.patch(model, backend="torch", numerics="official"):
        expected = logits(model, ids)
    monkeypatch.setattr(flagops, "fp8_fake_quantize", quantize)
    with flagops.patch(model, backend="torch", numerics="official") as handle:
        assert torch.equal(logits(model, ids), expected)
    assert refused
    assert rows(handle)["fp8_fake_quantize"].passed == {"not today": len(refused)}


def test_rotary_tables_stay_float32(model):
    half = copy.deepcopy(model).bfloat16()
    x, places = torch.zeros(1, dtype=torch.bfloat16), torch.arange(20)[None]
    with flagops.patch(half, backend="torch", numerics="official"):
        cos, _ = half.model.rotary_emb(x, places, "compress")
        assert cos.dtype == torch.float32
        assert logits(half, tokens(30)).isfinite().all()
    assert half.model.rotary_emb(x, places, "compress")[0].dtype == torch.bfloat16


def test_bad_numerics():
    with pytest.raises(ValueError, match="did you mean 'official'"):
        flagops.patch(small_deepseek_v4(), numerics="oficial")


def test_gradients_pass_straight_through(model):
    """Of the first draw in which no key rounds the other way."""
    for seed in range(8):
        ids = tokens(32, 1, seed)
        with quantised():
            expected, exact = gradients(model, ids, use_cache=False), logits(model, ids)
        with flagops.patch(model, backend="torch", numerics="official") as handle:
            got, near = gradients(model, ids, use_cache=False), logits(model, ids)
        assert handle.report().share == 1
        if (near - exact).abs().max() < 1e-4:
            break
    same_gradients(got, expected)
