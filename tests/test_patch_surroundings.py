"""What else happens to a patched model: saving, copies, accelerate's hooks, torch's hooks, compilation, autocast."""

import copy
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.transformers import NAME, OPS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BOUND, LAYERS, continued, gradients, logits, rows, same_gradients, small_deepseek_v4, state, tokens  # noqa: E402


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


@pytest.fixture
def own():
    """A model that a test may change."""
    return small_deepseek_v4()


def test_deepcopy(model):
    ids = tokens(30)
    expected = logits(model, ids)
    handle = flagops.patch(model, backend="torch")
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        binding = module.__dict__.get("_flagops")
        assert binding is None or binding.module is module, f"{name} computes with its own weights"
    assert twin.model.config.__dict__ is twin.config.__dict__ is not model.config.__dict__
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_b_proj.weight.add_(1)
    close(logits(model, ids), expected)
    assert (logits(twin, ids) - expected).abs().max() > 1e-2
    handle.disable()
    calls = handle.report().calls
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_b_proj.weight.copy_(model.model.layers[0].self_attn.o_b_proj.weight)
    assert torch.equal(logits(twin, ids), expected), "a copy runs the original code once the handle is disabled"
    assert torch.equal(continued(twin, ids, (20, 1, 9)), continued(model, ids, (20, 1, 9)))
    assert handle.report().calls == calls


def test_a_copied_configuration_is_a_plain_one(model):
    with flagops.patch(model):
        for config in (copy.deepcopy(model.model.config), copy.copy(model.model.config)):
            assert type(config) is type(model.config)
            assert config._attn_implementation == config._experts_implementation.replace("grouped_mm", "eager")
        model.model.config.use_cache = False
        assert model.config.use_cache is False, "one configuration, seen twice"
        model.config.use_cache = True
        assert model.model.config.use_cache is True


def test_save_pretrained_knows_nothing_of_a_patch(model, tmp_path):
    with flagops.patch(model):
        names = list(model.state_dict())
        model.save_pretrained(tmp_path / "whole")
        model.model.save_pretrained(tmp_path / "inner")
    assert names == list(model.state_dict())
    for folder in ("whole", "inner"):
        assert NAME not in (tmp_path / folder / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "whole", attn_implementation="eager")
    assert torch.equal(logits(again, tokens(24)), logits(model, tokens(24)))


def test_a_state_dict_is_loaded_into_a_patched_model(model, own):
    ids = tokens(24)
    other = small_deepseek_v4(1)
    with flagops.patch(own, backend="torch"):
        own.load_state_dict(other.state_dict())
        close(logits(own, ids), logits(other, ids))


def test_hooks_of_accelerate(own):
    """Below hooks that were there, above none that come; in any order."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    ids = tokens(30)
    expected = logits(own, ids)
    add_hook_to_module(own.model.layers[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    add_hook_to_module(own.model.layers[1].self_attn, AlignDevicesHook(execution_device="cpu"))
    before = state(own)
    with flagops.patch(own, backend="torch") as handle:
        add_hook_to_module(own.model.layers[2].self_attn, AlignDevicesHook(execution_device="cpu"))
        close(logits(own, ids), expected)
        assert all(not row.passed for row in rows(handle).values())
        assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS}
        assert rows(handle)["hc_post"].replaced == {"torch": 2 * LAYERS}
    assert torch.equal(logits(own, ids), expected)
    remove_hook_from_module(own.model.layers[2].self_attn)
    del own.model.layers[2].self_attn.__dict__["forward"]  # what accelerate leaves: the class's own
    assert state(own) == before
    assert accelerate.__version__


def test_weights_that_accelerate_offloads(own):
    """Where weights come and go with each layer, what needs those of two layers at once is left to transformers."""
    accelerate = pytest.importorskip("accelerate")
    ids = tokens(30)
    expected = logits(own, ids)
    accelerate.cpu_offload(own, execution_device="cpu")
    with flagops.patch(own, backend="torch") as handle:
        close(logits(own, ids), expected)
    found = rows(handle)
    for op in ("grouped_output_projection", "compress_kv"):
        assert not found[op].replaced
        assert set(found[op].passed) == {"weights are on meta"}
    for op in ("sparse_attention", "rms_norm", "hc_pre", "moe_gate", "moe_experts"):
        assert not found[op].passed
    assert torch.equal(logits(own, ids), expected)


def test_hooks_of_torch_see_what_they_saw(own):
    """Inputs and outputs of submodules, none of them changed afterwards."""
    ids, seen = tokens(24), []
    attention = own.model.layers[1].self_attn
    for module in (
        attention.q_b_proj,
        attention.q_b_norm,
        attention.o_a_proj,
        attention.o_b_proj,
        own.model.layers[1].mlp.gate,
        own.model.layers[1].ffn_hc,
    ):
        module.register_forward_hook(
            lambda m, args, out: seen.extend([args[0], out[0] if isinstance(out, tuple) else out])
        )
    expected = logits(own, ids)
    first = [x.clone() for x in seen]
    seen.clear()
    with flagops.patch(own, backend="torch") as handle:
        close(logits(own, ids), expected)
    assert len(seen) == len(first) == 12
    for got, x in zip(seen, first, strict=True):
        close(got.reshape(x.shape), x)
    assert rows(handle)["grouped_output_projection"].passed == {"a hook watches a linear layer": 1}


def test_recorded_outputs(model):
    ids = tokens(24)
    asked = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        expected = model(input_ids=ids, **asked)
        with flagops.patch(model, backend="torch") as handle:
            got = model(input_ids=ids, **asked)
    assert len(got.router_logits) == len(expected.router_logits) > 0
    for name in ("hidden_states", "router_logits"):
        for one, two in zip(got[name], expected[name], strict=True):
            close(one, two)
    assert handle.report().share == 1


def test_recorded_attentions_are_left_to_transformers(model):
    ids = tokens(24)
    with torch.no_grad():
        expected = model(input_ids=ids, output_attentions=True).attentions
        with flagops.patch(model, backend="torch") as handle:
            got = model(input_ids=ids, output_attentions=True).attentions
    assert len(got) == LAYERS
    close(got, expected)
    assert rows(handle)["sparse_attention"].passed == {"the attention probabilities are asked for": LAYERS}


def test_dropout_is_left_to_transformers(own):
    own.train()
    for layer in own.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with flagops.patch(own, backend="torch") as handle:
        logits(own, tokens(24))
    assert rows(handle)["sparse_attention"].passed == {"attention dropout": LAYERS}


def test_autocast_is_left_to_transformers_where_it_casts_weights(model):
    ids = tokens(24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids)
        with flagops.patch(model, ops="grouped_output_projection") as handle:
            got = logits(model, ids)
        with flagops.patch(model, backend="torch") as whole:
            logits(model, ids)
    assert torch.equal(got, expected)
    (reason,) = rows(handle)["grouped_output_projection"].passed
    assert "torch.bfloat16" in reason
    assert "torch.float32" in reason
    found = rows(whole)
    assert found["sparse_attention"].replaced == {"torch": LAYERS}
    assert {op for op, row in found.items() if row.passed} == {
        "grouped_output_projection",
        "compress_kv",
        "moe_gate",
        "moe_experts",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_eager(model, dtype):
    """A rounding can swap two experts, so single logits may jump: compare the usual error."""
    half, ids = copy.deepcopy(model).to(dtype), tokens(64, batch=4)
    exact = logits(model, ids)
    eager = (logits(half, ids) - exact).abs().median()
    with flagops.patch(half, backend="torch") as handle:
        patched = (logits(half, ids) - exact).abs().median()
        decoded = continued(half, ids, (20, *[1] * 20, 24))
    assert patched < 1.25 * eager
    assert (decoded - exact).abs().median() < 1.25 * eager
    assert handle.report().share == 1


def test_a_mixture_of_dtypes(own):
    """As transformers loads a bfloat16 model: norms, sinks, biases and hyper-connections stay float32."""
    strict = own._keep_in_fp32_modules_strict
    for name, parameter in own.named_parameters():
        if not set(strict) & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    ids = tokens(40, 2)
    expected = logits(own, ids)
    with flagops.patch(own, backend="torch") as handle:
        got = continued(own, ids, (30, *[1] * 10))
    assert got.dtype == expected.dtype
    assert (got - expected).abs().median() < 0.1
    assert handle.report().share == 1


@pytest.mark.drawn
def test_a_compiled_layer(model, own):
    """In one graph each; the compiler sees a patch come and go."""
    ids = tokens(24)
    expected = logits(model, ids)
    for layer in own.model.layers[1:]:
        layer.compile(backend="eager", fullgraph=True)
    plain = logits(own, ids, use_cache=False)
    handle = flagops.patch(own, backend="torch")
    flagops.coverage()
    close(logits(own, ids, use_cache=False), expected)
    assert rows(handle)["sparse_attention"].calls == 1, "what lies in graphs is not counted here"
    assert flagops.coverage("sparse_attention")["calls"]["torch"] > 0
    handle.disable()
    assert torch.equal(logits(own, ids, use_cache=False), plain)
    close(plain, expected)


@pytest.mark.drawn
@pytest.mark.parametrize("ops", [["sparse_attention"], [op for op in OPS if op != "sparse_attention"]])
def test_a_compiled_layer_of_some_operators(model, own, ops):
    """No part asks a tensor for a value, whichever operators are replaced."""
    ids = tokens(24)
    expected = logits(model, ids)
    for layer in own.model.layers[1:]:
        layer.compile(backend="eager", fullgraph=True)
    with flagops.patch(own, ops=ops, backend="torch"):
        flagops.coverage()
        close(logits(own, ids, use_cache=False), expected)
    assert flagops.coverage(ops[0])["calls"]["torch"] > 0


@pytest.mark.drawn
@pytest.mark.parametrize("ops", [OPS, ["sparse_attention"], ["compress_kv", "lightning_indexer"]])
def test_an_exported_model(model, ops):
    """The graph calls the operators; other tokens than those it was made with give their own logits."""
    with flagops.patch(model, ops=ops, backend="torch"), torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": tokens(24), "use_cache": False})
    called = {str(node.target) for node in program.graph.nodes}
    assert {f"flagops.{op}.default" for op in ops if op != "lightning_indexer"} <= called
    found = program.module()(input_ids=tokens(24, 1, 7), use_cache=False).logits
    close(found, logits(model, tokens(24, 1, 7)))


def test_a_compiled_layer_in_training(model, own):
    ids = tokens(24, 2)
    expected = gradients(model, ids, use_cache=False)
    own.model.layers[1].compile(backend="aot_eager", fullgraph=True)
    with flagops.patch(own, backend="torch"):
        got = gradients(own, ids, use_cache=False)
    same_gradients(got, expected)


def test_a_compiled_attention_with_a_cache(model, own):
    """Graphs may break and be made again as the cache grows; what comes out is right."""
    ids = tokens(13)
    expected = continued(model, ids, (9, 1, 3))
    own.model.layers[1].self_attn.compile(backend="eager")
    with flagops.patch(own, backend="torch"):
        close(continued(own, ids, (9, 1, 3)), expected)


def test_every_operator_is_named(model):
    from flagops import registry

    assert set(OPS) <= set(registry.operators())
