"""`flagops.patch` on a small random DeepSeek-V4: same logits, same gradients, exact undo, counted fallbacks."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.demo import generate  # noqa: E402
from flagops.examples import small_deepseek_v4  # noqa: E402
from flagops.transformers import NAME, OPS, visible_indices  # noqa: E402

BACKENDS = ("numba", "torch")
BOUND = 1e-4
LAYERS = 3


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


def tokens(count, batch=1, seed=0):
    return torch.randint(2, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def rows(handle):
    return {row.op: row for row in handle.report().rows}


def state(model):
    """Everything about a model that a patch could leave behind."""
    return (
        [(name, id(module), sorted(module.__dict__), id(module.forward.__func__), id(module.__dict__.get("config")))
         for name, module in model.named_modules()],
        json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        model.config._attn_implementation,
        list(model.state_dict()),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("count", "batch"), [(24, 1), (37, 2), (64, 1)])
def test_prefill(model, backend, count, batch):
    ids = tokens(count, batch)
    expected = logits(model, ids)
    with flagops.patch(model, backend=backend) as handle:
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=BOUND)
    assert rows(handle).keys() == set(OPS)
    assert all(row.replaced == {backend: LAYERS} and not row.passed for row in rows(handle).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode(model, backend):
    prompt = tokens(25, seed=1)
    expected = generate(model, prompt, 20)
    with flagops.patch(model, backend=backend):
        got = generate(model, prompt, 20)
    assert got.tokens == expected.tokens
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=BOUND)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_padding(model, backend):
    ids = tokens(40, batch=2, seed=2)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with flagops.patch(model, backend=backend) as handle:
        padded = logits(model, ids, attention_mask=mask)
        with torch.no_grad():
            first = model(input_ids=ids[:, :23], use_cache=True)
            second = model(input_ids=ids[:, 23:], past_key_values=first.past_key_values)
    torch.testing.assert_close(padded, logits(model, ids, attention_mask=mask), rtol=0, atol=BOUND)
    chunked = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(chunked, logits(model, ids), rtol=0, atol=BOUND)
    assert handle.report().share == 1


def test_a_row_that_sees_nothing(model):
    ids = tokens(24, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = logits(model, ids, attention_mask=mask)
    with flagops.patch(model, backend="torch"):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    model = small_deepseek_v4().train()
    ids = tokens(32, batch=2)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with flagops.patch(model, backend=backend) as handle:
        got = gradients()
    assert all(row.replaced == {backend: LAYERS} for row in rows(handle).values())
    assert got.keys() == expected.keys()
    assert {"sinks", "o_a_proj", "o_b_proj", "kv_proj"} <= {part for name in got for part in name.split(".")}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_one_operator_alone(model, op):
    ids = tokens(24)
    expected = logits(model, ids)
    with flagops.patch(model, ops=op, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=BOUND)
    assert rows(handle).keys() == {op}
    assert handle.report().replaced == LAYERS


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
    before = state(model)
    outer = flagops.patch(model, backend="torch")
    inner = flagops.patch(model, ops="sparse_attention", backend="numpy")
    logits(model, ids)
    assert {op: row.replaced for op, row in rows(inner).items()} == {"sparse_attention": {"numpy": LAYERS}}
    assert {op: row.replaced for op, row in rows(outer).items()} == {"grouped_output_projection": {"torch": LAYERS}}
    outer.disable()
    logits(model, ids)
    assert inner.report().calls == 2 * LAYERS
    inner.disable()
    assert state(model) == before


def test_undo_after_an_exception(model):
    before = state(model)
    with pytest.raises(KeyError), flagops.patch(model):
        raise KeyError
    assert state(model) == before


def test_deepcopy(model):
    ids = tokens(30)
    expected = logits(model, ids)
    handle = flagops.patch(model, backend="torch")
    twin = copy.deepcopy(model)
    layer = twin.model.layers[0].self_attn
    assert layer.o_b_proj.forward.__self__.second is layer.o_b_proj, "the copy computes with its own weights"
    with torch.no_grad():
        layer.o_b_proj.weight.add_(1)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=BOUND)
    assert (logits(twin, ids) - expected).abs().max() > 1e-2
    handle.disable()
    calls = handle.report().calls
    with torch.no_grad():
        layer.o_b_proj.weight.copy_(model.model.layers[0].self_attn.o_b_proj.weight)
    assert torch.equal(logits(twin, ids), expected), "a copy runs the original code once the handle is disabled"
    assert handle.report().calls == calls


def test_generate(model):
    prompt = tokens(24, batch=2)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    with flagops.patch(model, backend="torch") as handle:
        assert torch.equal(model.generate(prompt, **options), expected)
    assert handle.report().share == 1


def test_save_pretrained_knows_nothing_of_a_patch(model, tmp_path):
    with flagops.patch(model):
        model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again, tokens(24)), logits(model, tokens(24)))


def test_the_mask_comes_from_a_registered_function(model):
    """transformers hands no mask to an attention function whose name has no mask function, and says nothing."""
    from transformers.masking_utils import AttentionMaskInterface

    ids = tokens(30)
    expected = logits(model, ids)
    with flagops.patch(model, backend="torch"):
        assert NAME in AttentionMaskInterface()
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=BOUND)
        model.config._attn_implementation_internal = NAME
        try:
            torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=BOUND)
        finally:
            model.config._attn_implementation_internal = "eager"
    nothing = {"sliding_attention": None}
    assert (logits(model, ids, attention_mask=nothing) - expected).abs().max() > 0.1, "the mask matters"


def test_no_mask_is_left_to_transformers(model):
    ids = tokens(30)
    nothing = {"sliding_attention": None}
    expected = logits(model, ids, attention_mask=nothing)
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, ids, attention_mask=nothing), expected, rtol=0, atol=BOUND)
    ((reason, times),) = rows(handle)["sparse_attention"].passed.items()
    assert "no mask" in reason
    assert times == LAYERS


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


def test_recorded_attentions_are_left_to_transformers(model):
    ids = tokens(24)
    with torch.no_grad():
        expected = model(input_ids=ids, output_attentions=True).attentions
        with flagops.patch(model) as handle:
            got = model(input_ids=ids, output_attentions=True).attentions
    assert len(got) == LAYERS
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)
    assert rows(handle)["sparse_attention"].passed == {"the attention probabilities are asked for": LAYERS}


def test_dropout_is_left_to_transformers():
    model = small_deepseek_v4().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with flagops.patch(model) as handle:
        logits(model, tokens(24))
    assert rows(handle)["sparse_attention"].passed == {"attention dropout": LAYERS}


def test_autocast_is_left_to_transformers_where_it_casts_weights(model):
    ids = tokens(24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids)
        with flagops.patch(model, ops="grouped_output_projection") as handle:
            got = logits(model, ids)
        with flagops.patch(model, ops="sparse_attention", backend="torch") as attention:
            logits(model, ids)
    assert torch.equal(got, expected)
    (reason,) = rows(handle)["grouped_output_projection"].passed
    assert "torch.bfloat16" in reason
    assert "torch.float32" in reason
    assert rows(attention)["sparse_attention"].replaced == {"torch": LAYERS}


def test_compiled(model):
    """The compiler leaves the replaced operators out of its graphs, and sees a patch come and go."""
    ids = tokens(24)
    expected = logits(model, ids)
    twin = small_deepseek_v4()
    twin.model.layers[1].self_attn.compile(backend="eager")
    with flagops.patch(twin, backend="torch") as handle:
        torch.testing.assert_close(logits(twin, ids, use_cache=False), expected, rtol=0, atol=BOUND)
        assert handle.report().replaced == 2 * LAYERS
    assert torch.equal(logits(twin, ids, use_cache=False), expected)
    assert handle.report().calls == 2 * LAYERS


def test_a_backend_that_cannot_run(model, monkeypatch):
    from flagops import registry

    monkeypatch.setattr(type(registry.backend("triton")), "unavailable", lambda self: "no GPU today")
    before = state(model)
    with pytest.raises(flagops.Unsupported, match="triton: no GPU today"):
        flagops.patch(model, backend="triton")
    assert state(model) == before
    flagops.patch(model, backend=("triton", "torch")).disable()


def test_a_backend_without_a_kernel_is_counted(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise flagops.Unsupported("not today")

    monkeypatch.setattr(flagops, "grouped_output_projection", refuse)
    ids = tokens(24)
    expected = logits(model, ids)
    with flagops.patch(model, ops="grouped_output_projection") as handle:
        assert torch.equal(logits(model, ids), expected)
    assert rows(handle)["grouped_output_projection"].passed == {"not today": LAYERS}


def test_foreign_layers_stay_as_they_are():
    model = small_deepseek_v4()
    expected = logits(model, tokens(24))
    attention = model.model.layers[1].self_attn

    class Scaled(torch.nn.Linear):
        pass

    attention.o_b_proj.__class__ = Scaled
    with flagops.patch(model, backend="torch") as handle:
        torch.testing.assert_close(logits(model, tokens(24)), expected, rtol=0, atol=BOUND)
        assert "forward" not in attention.o_a_proj.__dict__
    assert rows(handle)["grouped_output_projection"].replaced == {"torch": LAYERS - 1}
    (untouched,) = handle.report().bypassed
    assert "layer 1" in untouched
    assert "Scaled" in untouched


def test_bfloat16_is_as_near_to_float32_as_eager(model):
    """A bfloat16 rounding can swap two experts, so single logits may jump: compare the usual error."""
    half, ids = copy.deepcopy(model).bfloat16(), tokens(64, batch=4)
    exact = logits(model, ids)
    eager = (logits(half, ids) - exact).abs().median()
    with flagops.patch(half, backend="torch") as handle:
        patched = (logits(half, ids) - exact).abs().median()
    assert patched < 1.25 * eager
    assert handle.report().replaced == 2 * LAYERS


def test_unknown_models_and_operators(model):
    with pytest.raises(TypeError, match="Linear holds no DeepSeek-V4 attention"):
        flagops.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        flagops.patch("deepseek-ai/DeepSeek-V4")
    before = state(model)
    with pytest.raises(ValueError, match="did you mean 'sparse_attention'"):
        flagops.patch(model, ops=["sparse_atention"])
    with pytest.raises(ValueError, match="did you mean 'numba'"):
        flagops.patch(model, backend="nunba")
    assert state(model) == before


def test_visible_indices():
    low, inf = torch.finfo(torch.float32).min, float("-inf")
    mask = torch.tensor([[[0, low, 0, inf], [inf] * 4, [0, 0, 0, 0.0], [low, low, low, 0]]])
    expected = [[[0, 2, -1, -1], [-1] * 4, [0, 1, 2, 3], [3, -1, -1, -1]]]
    assert visible_indices(mask).tolist() == expected
    assert visible_indices(mask).dtype == torch.int32
    assert visible_indices(torch.full((2, 3, 4), inf)).shape == (2, 3, 0)
    assert visible_indices(torch.zeros(1, 0, 4)).shape == (1, 0, 0)
    for value in (-1.0, 1e-30, float("nan"), float("inf")):
        assert visible_indices(torch.tensor([[[0.0, value]]])) is None
