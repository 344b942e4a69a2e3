"""Other versions of transformers: a module that is not the one that flagops knows runs its own code, and says so."""

import inspect
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.transformers._kinds import HOMES, KINDS, MODELING  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BOUND, LAYERS, caching, continued, logits, rows, small_deepseek_v4, tokens  # noqa: E402

SIZES = (20, 1, 3)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


@pytest.fixture(scope="module")
def modeling():
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    return modeling_deepseek_v4


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


@pytest.fixture(scope="module")
def expected(model):
    return continued(model, tokens(24), SIZES)


def renamed(real):
    """A forward as another version may have it: the first argument under another name."""
    known = list(inspect.signature(real).parameters.values())

    def forward(self, *args, **kwargs):
        if "novel" in kwargs:
            kwargs[known[1].name] = kwargs.pop("novel")
        return real(self, *args, **kwargs)

    forward.__signature__ = inspect.Signature([known[0], known[1].replace(name="novel"), *known[2:]])
    return forward


def extended(real):
    """With an argument more, which nobody gives yet."""
    known = list(inspect.signature(real).parameters.values())
    at = len(known) - (known[-1].kind is inspect.Parameter.VAR_KEYWORD)

    def forward(self, *args, novel=None, **kwargs):
        return real(self, *args, **kwargs)

    more = inspect.Parameter("novel", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = inspect.Signature([*known[:at], more, *known[at:]])
    return forward


@pytest.mark.parametrize("change", [renamed, extended])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.forwards and HOMES[name] == MODELING])
def test_an_unknown_signature(model, expected, modeling, monkeypatch, name, change):
    cls = getattr(modeling, name)
    monkeypatch.setattr(cls, "forward", change(cls.forward))
    with flagops.patch(model, backend="torch") as handle:
        close(continued(model, tokens(24), SIZES), expected)
    left = [line for line in handle.report().bypassed if f"the forward of {name} takes (" in line]
    assert left
    assert all("novel" in line and "flagops knows (" in line for line in left)


def test_an_unknown_part(expected):
    """A version that adds a norm to a class computes with it; what stands for the class does not."""
    model = small_deepseek_v4()
    model.model.layers[1].mlp.shared_experts.novel = torch.nn.Identity()
    with flagops.patch(model, ops="swiglu", backend="torch") as handle:
        close(continued(model, tokens(24), SIZES), expected)
    assert rows(handle)["swiglu"].replaced == {"torch": len(SIZES) * (LAYERS - 1)}
    (left,) = handle.report().bypassed
    assert left == "model.layers.1.mlp.shared_experts: it has parts that flagops does not know: novel"
    del model.model.layers[2].attn_hc.hc_eps
    (left,) = flagops.patch(model, ops="hc_pre").report().bypassed
    assert left == "model.layers.2.attn_hc: it lacks what flagops reads: hc_eps"


def test_an_unknown_function(model, expected, modeling, monkeypatch):
    real = modeling.apply_rotary_pos_emb

    def rotation(x, cos, sin, axis=1):
        return real(x, cos, sin, axis)

    def call(x, cos, sin, unsqueeze_dim=1, axis=None):
        return real(x, cos, sin, unsqueeze_dim if axis is None else axis)

    call.__signature__ = inspect.signature(rotation)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", call)
    with flagops.patch(model, backend="torch") as handle:
        close(continued(model, tokens(24), SIZES), expected)
    reason = (
        "apply_rotary_pos_emb takes (x, cos, sin, axis=1), and flagops calls it with (x, cos, sin, unsqueeze_dim=1)"
    )
    assert f"model.layers.0.self_attn: {reason}" in handle.report().bypassed
    assert "sparse_attention" not in rows(handle)


@pytest.mark.parametrize("how", ["positional", "keyword", "older name"])
def test_a_cache_by_every_name(model, how):
    """As a layer and an attention layer may be called directly."""
    from transformers import DynamicCache

    (name,) = caching(None)
    x, places = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12)[None]
    attention = model.model.layers[1].self_attn

    def run():
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            for part in (slice(0, 9), slice(9, 10), slice(10, 12)):
                tables = {kind: model.model.rotary_emb(x, places[:, part], kind) for kind in ("main", "compress")}
                mask = torch.zeros(1, 1, part.stop - part.start, min(part.start, 3) + part.stop - part.start)
                more = {"older name": {"past_key_values": cache}, "keyword": {name: cache}}.get(how, {})
                given = (cache,) if how == "positional" else ()
                found.append(attention(x[:, part], tables, places[:, part], mask, *given, **more)[0])
        return torch.cat(found, 1), cache.layers[1].entry_count

    expected, entries = run()
    with flagops.patch(model, backend="torch") as handle:
        got, same = run()
    close(got, expected)
    assert same == entries == {"compressor": 3, "indexer": 3}
    assert handle.report().share == 1


def test_what_is_not_used_is_handed_on(model):
    """To the cache and to the attention function what transformers gives them."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import eager_mask
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    seen = []

    class Cache(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            seen.append(("cache", layer_idx, args, sorted(kwargs), sorted(kwargs.get("kwargs", ()))))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    def watched(module, *args, **kwargs):
        seen.append(("attention", module.layer_idx, len(args), sorted(kwargs)))
        return eager_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", eager_mask)
    model.config._attn_implementation_internal = "watched"
    try:
        logits(model, tokens(9), **caching(Cache(config=model.config)), novel=1)
        expected = seen.copy()
        seen.clear()
        with flagops.patch(model, ops=["rotary_embedding"], backend="torch"):
            logits(model, tokens(9), **caching(Cache(config=model.config)), novel=1)
    finally:
        model.config._attn_implementation_internal = "eager"
    assert seen == expected
    assert any("novel" in entry[-1] for entry in seen)
