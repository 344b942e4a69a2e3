"""Weights of attention layers: what a checkpoint or a caller left out, or has too much, is named and never run."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flagops
from flagops import AttentionCache, AttentionConfig, AttentionWeights
from flagops.deepseek_v4.cache import KINDS

sys.path.insert(0, str(Path(__file__).parent))
from layer_data import TINY, D, hidden_states, layer, of_every_kind, weights

PREFIX = "layers.3.attn."
COMPRESSOR = ["wkv.weight", "wgate.weight", "ape", "norm.weight"]
NAMES = {
    "sliding": [f"{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "q_norm", "kv_norm")]
    + ["attn_sink"],
}
NAMES["hca"] = NAMES["sliding"] + [f"compressor.{name}" for name in COMPRESSOR]
NAMES["csa"] = (
    NAMES["hca"]
    + ["indexer.wq_b.weight", "indexer.weights_proj.weight"]
    + [f"indexer.compressor.{name}" for name in COMPRESSOR]
)


def test_its_help_lists_what_is_read():
    """The four of a compressor are written out once."""
    said = AttentionWeights.of_checkpoint.__doc__
    for name in NAMES["csa"]:
        assert f"``{name}``" in said or name.startswith("indexer.compressor."), name
    assert "``indexer.compressor.``" in said


def stored(kind):
    """The tensors of a layer by the names of section 13 of the specification, beside those of others."""
    made, tensors = weights(kind), {"layers.3.attn_norm.weight": torch.ones(D), "layers.30.attn.odd": torch.ones(1)}
    for name in NAMES[kind]:
        part = made
        for word in name.removesuffix(".weight").split("."):
            part = getattr(part, word)
        tensors[PREFIX + name] = part
    return tensors


def fp8(tensors, name):
    """A projection in codes, with its scale."""
    codes = torch.zeros(tensors[f"{PREFIX}{name}.weight"].shape, dtype=torch.float8_e4m3fn)
    return tensors | {f"{PREFIX}{name}.weight": codes, f"{PREFIX}{name}.scale": torch.ones(1, 1)}


@of_every_kind
def test_what_a_layer_has_is_read(kind):
    tensors = stored(kind)
    for wanted in (None, kind):
        read = AttentionWeights.of_checkpoint(tensors, PREFIX, wanted)
        x = hidden_states(1, 20, D)
        got = layer(kind)(x, read, AttentionCache(TINY, kind))
        assert torch.equal(got, layer(kind)(x, weights(kind), AttentionCache(TINY, kind)))
    coded = AttentionWeights.of_checkpoint(fp8(tensors, "wo_b"), PREFIX)
    assert coded.wo_b_scale is not None
    assert coded.wo_a_scale is None


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in NAMES[kind]])
def test_what_is_missing_is_named(kind, name):
    tensors = stored(kind)
    del tensors[PREFIX + name]
    with pytest.raises(ValueError, match=f"lacks {PREFIX}{name}, unlike the {kind} layers"):
        AttentionWeights.of_checkpoint(tensors, PREFIX)
    with pytest.raises(ValueError, match=f"lacks {PREFIX}{name}, unlike the {kind} layers"):
        AttentionWeights.of_checkpoint(tensors, PREFIX, kind)


@of_every_kind
@pytest.mark.parametrize(
    "name",
    ["q_head_norm.weight", "k_norm.weight", "wq_b.bias", "q_norm.bias", "wq_a.weight_scale_inv", "kv_norm.scale",
     "compressor.wkv.scale", "indexer.wk.weight", "indexer.k_norm.weight", "x"],
)  # fmt: skip
def test_what_is_unknown_is_named(kind, name):
    tensors = stored(kind) | {PREFIX + name: torch.ones(1)}
    with pytest.raises(ValueError, match=f"holds {PREFIX}{name}(,| and|$)" if "." not in name else name):
        AttentionWeights.of_checkpoint(tensors, PREFIX)


@pytest.mark.parametrize("name", ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b"])
def test_codes_without_a_scale_are_named(name):
    tensors = fp8(stored("csa"), name)
    AttentionWeights.of_checkpoint(tensors, PREFIX)
    del tensors[f"{PREFIX}{name}.scale"]
    with pytest.raises(ValueError, match=f"lacks {PREFIX}{name}.scale"):
        AttentionWeights.of_checkpoint(tensors, PREFIX)


def test_a_csa_layer_without_any_tensor_of_its_indexer_is_no_hca_layer():
    tensors = {name: x for name, x in stored("csa").items() if "indexer" not in name}
    with pytest.raises(ValueError, match=r"lacks layers\.3\.attn\.indexer\.compressor\.ape.*unlike the csa layers"):
        AttentionWeights.of_checkpoint(tensors, PREFIX)


@pytest.mark.parametrize(("held", "kind"), [(a, b) for a in KINDS for b in KINDS if a != b])
def test_tensors_of_another_kind_than_asked_for(held, kind):
    with pytest.raises(ValueError, match=rf"(holds|lacks) {PREFIX}(compressor|indexer).*unlike the {kind} layers"):
        AttentionWeights.of_checkpoint(stored(held), PREFIX, kind)


@pytest.mark.parametrize(
    ("prefix", "kind", "said"),
    [("layers.9.attn.", None, "begins with 'layers.9.attn.'"), ("layers.3.attn", None, "lacks layers.3.attnattn_sink"),
     ("model.", None, "begins with 'model.'"), (PREFIX, "dense", "kind must be one of sliding, csa, hca, got 'dense'")],
)  # fmt: skip
def test_another_prefix_or_kind(prefix, kind, said):
    with pytest.raises(ValueError, match=said):
        AttentionWeights.of_checkpoint(stored("sliding"), prefix, kind)


# Weights made by hand.


def changed(kind, name, value):
    """Weights whose field `name` is what `value` makes of it."""
    made = copy.deepcopy(weights(kind))
    *parts, field = name.split(".")
    part = made
    for word in parts:
        part = getattr(part, word)
    setattr(part, field, value(getattr(part, field)))
    return made


def refused(kind, made, said, config=TINY):
    cache = AttentionCache(config, kind)
    with pytest.raises(ValueError, match=said):
        layer(kind)(hidden_states(1, 3, D), made, cache)
    assert cache.position == 0


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in NAMES[kind]])
def test_a_field_that_is_none_or_of_another_shape(kind, name):
    """Also where a call this short would not come to it."""
    name = name.removesuffix(".weight")
    refused(kind, changed(kind, name, lambda x: None), f"the weights hold no {name}")
    size = "wq_a" if name == "q_norm" else name  # the length of q_norm says how wide the latent is
    refused(kind, changed(kind, name, lambda x: x[1:]), rf"{size} has shape \[.*\], expected \[|wo_b has shape")


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("sliding", "compressor", "the weights hold a compressor, which a sliding layer has not"),
        ("sliding", "indexer", "the weights hold an indexer, which a sliding layer has not"),
        ("hca", "indexer", "the weights hold an indexer, which a hca layer has not"),
    ],
)
def test_parts_of_another_kind(kind, part, said):
    made = weights(kind)
    setattr(made, part, getattr(weights("csa"), part))
    refused(kind, made, said)


@pytest.mark.parametrize("name", ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b"])
def test_a_scale_belongs_to_codes_alone(name):
    refused("csa", changed("csa", f"{name}_scale", lambda x: torch.ones(1, 1)), f"{name} is float32 and has a scale")
    codes = changed("csa", name, lambda x: x.to(torch.float8_e4m3fn))
    refused("csa", codes, f"{name} is float8_e4m3fn and has no scale")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": 4}, r"wo_a has shape \[16, 48\], expected \[16, 24\]"),
        ({"heads": 2}, r"wq_b has shape \[96, 16\], expected \[48, 16\]"),
        ({"csa_ratio": 2}, r"compressor.ape has shape \[4, 48\], expected \[2, 48\]"),
        ({"index_heads": 3, "index_dim": 32}, r"indexer.weights_proj has shape \[6, 32\], expected \[3, 32\]"),
    ],
)
def test_a_configuration_of_another_layer(changes, said):
    refused("csa", weights("csa"), said, replace(TINY, **changes))


# A configuration of transformers.


def transformers_config(**changes):
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    rope = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
    shape = {"num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "o_groups": 2, "num_hidden_layers": 3}
    return modeling.DeepseekV4Config(**shape | {"rope_scaling": rope} | changes)


def test_a_configuration_of_transformers():
    shape = AttentionConfig.of_transformers(transformers_config())
    assert (shape.heads, shape.rope_factor, shape.rope_original, shape.official) == (4, 16, 64, False)
    plain = AttentionConfig.of_transformers(transformers_config(rope_scaling=None))
    assert plain.rope_factor == 1.0
    table = [flagops.yarn_table(torch.arange(9), 8, 160000.0, s.rope_factor, s.rope_original) for s in (shape, plain)]
    assert not torch.equal(table[0][0], table[1][0])


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("compress", {"rope_type": "linear"}, r"\['compress'\]\['rope_type'\] is linear, expected default or yarn"),
        ("compress", {"rope_type": "llama3"}, r"\['compress'\]\['rope_type'\] is llama3"),
        ("main", {"rope_type": "yarn"}, r"\['main'\]\['rope_type'\] is yarn, expected default"),
        ("compress", {"attention_factor": 1.2}, r"attention_factor'\] is 1.2, expected None or 1.0"),
        ("compress", {"attention_factor": None}, r"attention_factor'\] is that of factor 16"),
        ("compress", {"truncate": False}, r"truncate'\] is False, expected True"),
        ("compress", {"partial_rotary_factor": 0.25}, r"rotated channels by rope_parameters is .*expected \{8\}"),
        (None, {"attention_bias": True}, "attention_bias is True, expected False"),
        (None, {"num_key_value_heads": 2}, "num_key_value_heads is 2, expected 1"),
    ],
)
def test_a_configuration_of_transformers_that_is_another_model(part, changes, said):
    config = transformers_config()
    for name, value in changes.items():
        if part:
            config.rope_parameters[part][name] = value
        else:
            setattr(config, name, value)
    with pytest.raises(ValueError, match=said):
        AttentionConfig.of_transformers(config)
