"""`flagops.patch` itself: what it takes, its exact undo, several handles, its report, and what it leaves alone."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.deepseek_v4.examples import random_deepseek_v4  # noqa: E402
from flagops.transformers import NAME, OPS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BOUND, LAYERS, logits, rows, small_deepseek_v4, state, tokens  # noqa: E402

CALLS = {
    "sparse_attention": LAYERS,
    "grouped_output_projection": LAYERS,
    "compress_kv": 3,  # CSA with its indexer, HCA
    "lightning_indexer": 1,
    "rms_norm": 6 * LAYERS - 1 + 2,
    "rotary_embedding": 3 * LAYERS + 3 + 1,
    "hc_pre": 2 * LAYERS,
    "hc_post": 2 * LAYERS,
    "hc_head": 1,
    "moe_gate": LAYERS,
    "moe_experts": LAYERS,
    "swiglu": LAYERS,
}


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


def test_every_operator_is_replaced(model):
    ids = tokens(24)
    expected = logits(model, ids)
    with flagops.patch(model, backend="torch") as handle:
        close(logits(model, ids), expected)
    assert {op: row.replaced for op, row in rows(handle).items()} == {op: {"torch": n} for op, n in CALLS.items()}
    assert handle.report().share == 1
    assert not handle.report().bypassed
    assert "sparse_attention" in str(handle.report())


@pytest.mark.parametrize("op", OPS)
def test_one_operator_alone(model, op):
    ids, ops = tokens(24), ["compress_kv", op] if op == "lightning_indexer" else op
    expected = logits(model, ids)
    before = state(model)
    with flagops.patch(model, ops=ops, backend="torch") as handle:
        close(logits(model, ids), expected)
    assert rows(handle).keys() == ({ops} if isinstance(ops, str) else set(ops))
    assert all(row.replaced.keys() == {"torch"} and not row.passed for row in rows(handle).values())
    assert state(model) == before


def test_undo_is_exact(model):
    ids = tokens(30)
    before, expected = state(model), logits(model, ids)
    handle = flagops.patch(model, backend="torch")
    assert state(model) != before
    assert model.config._attn_implementation == "eager"
    assert list(model.state_dict()) == before[-1]
    handle.disable()
    handle.disable()
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_handles_end_in_any_order(model):
    ids = tokens(30)
    before, expected = state(model), logits(model, ids)
    outer = flagops.patch(model, backend="torch")
    inner = flagops.patch(model, ops=["sparse_attention", "rms_norm"], backend="numpy")
    close(logits(model, ids), expected)
    assert {op for op, row in rows(inner).items() if row.replaced.keys() == {"numpy"}} == {
        "sparse_attention",
        "rms_norm",
    }
    assert rows(outer).keys() == set(OPS) - {"sparse_attention", "rms_norm"}
    outer.disable()
    close(logits(model, ids), expected)
    assert rows(inner)["sparse_attention"].calls == 2 * LAYERS
    inner.disable()
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_undo_after_an_exception(model):
    before = state(model)
    with pytest.raises(KeyError), flagops.patch(model):
        raise KeyError
    assert state(model) == before


def test_a_part_of_a_model(model):
    """A single layer is patched under its model's own masks; the model alone, without its head, is one too."""
    ids = tokens(30)
    expected, before = logits(model, ids), state(model)
    with flagops.patch(model.model.layers[1], backend="torch") as handle:
        close(logits(model, ids), expected)
    assert rows(handle)["sparse_attention"].replaced == {"torch": 1}
    with flagops.patch(model.model, backend="torch") as handle:
        close(logits(model, ids), expected)
    assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS}
    assert state(model) == before


def test_a_name_given_to_transformers_by_hand(model):
    """The registered functions also serve a model that names them itself."""
    ids = tokens(30)
    expected = logits(model, ids)
    flagops.patch(model).disable()
    model.config._attn_implementation_internal = NAME
    model.config._experts_implementation_internal, experts = NAME, model.config._experts_implementation
    try:
        close(logits(model, ids), expected)
        with flagops.patch(model, backend="torch") as handle:
            close(logits(model, ids), expected)
        assert handle.report().share == 1
    finally:
        model.config._attn_implementation_internal = "eager"
        model.config._experts_implementation_internal = experts


def test_foreign_modules_stay_as_they_are():
    model = small_deepseek_v4()
    expected = logits(model, tokens(24))
    attention = model.model.layers[1].self_attn

    class Scaled(torch.nn.Linear):
        pass

    class Own(type(attention.kv_norm)):
        def forward(self, x):
            return super().forward(x)

    attention.o_b_proj.__class__ = Scaled
    attention.kv_norm.__class__ = Own
    attention.q_a_norm.forward = attention.q_a_norm.forward
    with flagops.patch(model, backend="torch") as handle:
        close(logits(model, tokens(24)), expected)
    assert rows(handle)["grouped_output_projection"].passed == {"a Scaled is no plain linear layer": 1}
    assert rows(handle)["rms_norm"].replaced == {"torch": CALLS["rms_norm"] - 1}
    (left,) = handle.report().bypassed
    assert left == "model.layers.1.self_attn.kv_norm: a Own has a forward of its own"
    assert str(handle.report()).splitlines()[-2:] == ["modules left as they are:", f"  {left}"]


def test_a_bound_forward_stays():
    model = small_deepseek_v4()
    ids = tokens(24)
    attention = model.model.layers[1].self_attn
    own = type(attention).forward
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return own(attention, *args, **kwargs)

    attention.forward = forward
    expected = logits(model, ids)
    with flagops.patch(model, backend="torch") as handle:
        close(logits(model, ids), expected)
    assert len(calls) == 2
    assert attention.forward is forward
    assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS - 1}, "by dense masks, which its code reads"
    (left,) = handle.report().bypassed
    assert "somebody else has bound" in left


def test_a_subclass_without_a_forward_of_its_own():
    model = small_deepseek_v4()
    expected = logits(model, tokens(24))
    for layer in model.model.layers:
        cls = type(layer.self_attn)
        layer.self_attn.__class__ = type("Attention", (cls,), {"__module__": __name__})
    with flagops.patch(model, ops="sparse_attention", backend="torch") as handle:
        close(logits(model, tokens(24)), expected)
    assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS}


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"scoring_func": "sigmoid"}])
def test_other_functions_than_deepseeks(change):
    model = random_deepseek_v4(
        0,
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_lora_rank=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        compress_ratios=[0],
        max_position_embeddings=1024,
        **change,
    )
    expected = logits(model, tokens(12))
    with flagops.patch(model, backend="torch") as handle:
        close(logits(model, tokens(12)), expected)
    assert handle.report().bypassed
    assert rows(handle).keys() >= {"sparse_attention", "hc_pre"}


def test_a_backend_that_cannot_run(model, monkeypatch):
    from flagops import registry

    monkeypatch.setattr(type(registry.backend("triton")), "unavailable", lambda self: "no GPU today")
    before = state(model)
    with pytest.raises(flagops.Unsupported, match="triton: no GPU today"):
        flagops.patch(model, backend="triton")
    assert state(model) == before
    flagops.patch(model, backend=("triton", "torch")).disable()


@pytest.mark.parametrize("op", OPS)
def test_a_backend_without_a_kernel_is_counted(model, monkeypatch, op):
    def refuse(*args, **kwargs):
        raise flagops.Unsupported("not today")

    monkeypatch.setattr(flagops, op, refuse)
    ids = tokens(24)
    expected = logits(model, ids)
    with flagops.patch(model, backend="torch") as handle:
        close(logits(model, ids), expected)
    assert rows(handle)[op].passed == {"not today": CALLS[op]}
    assert not rows(handle)[op].replaced


def test_what_it_is_not_for(model):
    with pytest.raises(TypeError, match="Linear holds no DeepSeek-V4 attention"):
        flagops.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        flagops.patch("deepseek-ai/DeepSeek-V4")
    before = state(model)
    with pytest.raises(ValueError, match="did you mean 'sparse_attention'"):
        flagops.patch(model, ops=["sparse_atention"])
    with pytest.raises(ValueError, match="did you mean 'numba'"):
        flagops.patch(model, backend="nunba")
    with pytest.raises(ValueError, match="name both"):
        flagops.patch(model, ops="lightning_indexer")
    assert state(model) == before
