"""Whoever watches, wraps or copies the modules of a patched model sees what transformers would show."""

import copy
import io
import pickle
import sys
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import BOUND, LAYERS, continued, gradients, logits, rows, same_gradients, small_deepseek_v4, tokens  # noqa: E402

SIZES = (20, 1, 3)
WATCHED = {
    "sparse_attention": "a hook sees the attention probabilities",
    "grouped_output_projection": "a hook watches a linear layer",
    "compress_kv": "a hook watches a linear layer",
    "hc_pre": "a hook watches its input_norm",
    "hc_head": "a hook watches its input_norm",
    "moe_gate": "a hook watches its score_fn",
    "moe_experts": "a hook watches its act_fn",
    "swiglu": "a hook watches its act_fn",
}


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in tensors(part)]


class Watch:
    """What every module was shown, by name: with a hook of each module, or one hook of all."""

    def __init__(self, model, everywhere):
        self.names, self.seen = {module: name for name, module in model.named_modules()}, []
        register = torch.nn.modules.module.register_module_forward_hook
        self.hooks = [register(self)] if everywhere else [m.register_forward_hook(self) for m in self.names]

    def __call__(self, module, args, output):
        if module in self.names:
            self.seen.append((self.names[module], tensors((args, output))))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def by_name(self):
        return sorted(self.seen, key=lambda entry: entry[0])


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("cached", [False, True])
def test_hooks_see_every_module(model, everywhere, cached):
    """Each as often as in transformers, with its tensors, which nobody overwrites afterwards."""
    ids = tokens(24)
    with Watch(model, everywhere) as watch:
        expected = continued(model, ids, SIZES) if cached else logits(model, ids, use_cache=False)
        first = [(name, [x.clone() for x in shown]) for name, shown in watch.by_name()]
    with flagops.patch(model, backend="torch") as handle, Watch(model, everywhere) as watch:
        close(continued(model, ids, SIZES) if cached else logits(model, ids, use_cache=False), expected)
    assert {name for name, _ in first} >= {name for name, m in model.named_modules() if not list(m.children())}
    for (name, shown), (other, again) in zip(first, watch.by_name(), strict=True):
        assert name == other
        for x, y in zip(shown, again, strict=True):
            assert x.dtype == y.dtype, name
            torch.testing.assert_close(y, x, rtol=0, atol=BOUND, msg=name)
    assert {op: next(iter(row.passed)) for op, row in rows(handle).items() if row.passed} == WATCHED


@pytest.mark.parametrize("part", ["indexer.scorer", "indexer.scorer.weights_proj", "indexer.q_b_proj", "indexer"])
def test_a_hook_on_a_part_of_the_indexer(model, part):
    """Where every entry is selected as well, so that no score is needed."""
    module, seen = model.model.layers[1].self_attn.compressor.get_submodule(part), []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        for count in (8, 40):
            expected = logits(model, tokens(count), use_cache=False)
            with flagops.patch(model, backend="torch"):
                close(logits(model, tokens(count), use_cache=False), expected)
            first, again = seen
            close(again, first)
            seen.clear()
    finally:
        hook.remove()


def test_a_hook_that_changes_what_a_compressor_gives(model):
    """Entries of a hook, not those of the cache."""
    compressor, ids = model.model.layers[1].self_attn.compressor, tokens(24)
    hook = compressor.register_forward_hook(lambda module, args, output: (output[0] * 0.5, output[1]))
    try:
        expected = continued(model, ids, SIZES)
        with flagops.patch(model, backend="torch"):
            close(continued(model, ids, SIZES), expected)
    finally:
        hook.remove()
    assert (continued(model, ids, SIZES) - expected).abs().max() > 1e-3


def test_backward_hooks_see_every_module():
    model, ids, seen = small_deepseek_v4().train(), tokens(24), []
    names = {module: name for name, module in model.named_modules()}

    def watch(module, given, received):
        seen.append((names[module], [x.clone() for x in tensors((given, received))]))

    hook = torch.nn.modules.module.register_module_full_backward_hook(watch)
    try:
        expected = gradients(model, ids, use_cache=False)
        first = sorted(seen, key=lambda entry: entry[0])
        seen.clear()
        with flagops.patch(model, backend="torch"):
            got = gradients(model, ids, use_cache=False)
    finally:
        hook.remove()
    again = sorted(seen, key=lambda entry: entry[0])
    assert Counter(name for name, _ in again) == Counter(name for name, _ in first)
    same_gradients(got, expected)


class Wrapper(torch.nn.Module):
    """Around any module, as adapters are; keeps what it has seen."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        self.seen.append(tensors((args, output)))
        return output


PARTS = [name for name, _ in small_deepseek_v4().model.layers[1].named_modules() if name and name != "self_attn"]


@pytest.mark.drawn
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", PARTS)
def test_a_wrapped_module(part, when):
    """Wrapped before the patch or after it: the wrapper is called, with transformers' tensors."""
    model = small_deepseek_v4()
    ids, (path, _, leaf) = tokens(24), part.rpartition(".")
    owner = model.model.layers[1].get_submodule(path)
    inner = getattr(owner, leaf)
    wrapper = Wrapper(inner)
    setattr(owner, leaf, wrapper)
    expected = continued(model, ids, SIZES)
    first, wrapper.seen = [[x.clone() for x in shown] for shown in wrapper.seen], []
    if when == "after":
        setattr(owner, leaf, inner)
    with flagops.patch(model, backend="torch"):
        setattr(owner, leaf, wrapper)
        close(continued(model, ids, SIZES), expected)
    for shown, again in zip(first, wrapper.seen, strict=True):
        for x, y in zip(shown, again, strict=True):
            close(y, x)
    wrapper.seen.clear()
    assert torch.equal(continued(model, ids, SIZES), expected)


class Plain(pickle.Unpickler):
    """A process without flagops."""

    def find_class(self, module, name):
        assert not module.startswith("flagops"), f"{module}.{name}"
        return super().find_class(module, name)


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("load", [lambda model: Plain(io.BytesIO(pickle.dumps(model))).load(), saved])
def test_a_pickled_model_is_a_plain_one(model, load):
    """It runs its own code, with one configuration, and can be patched anew."""
    ids = tokens(24)
    expected = continued(model, ids, SIZES)
    handle = flagops.patch(model, backend="torch")
    twin = load(model)
    handle.disable()
    assert torch.equal(continued(twin, ids, SIZES), expected)
    assert handle.report().calls == 0
    assert twin.model.config is twin.config
    assert type(twin.config) is type(model.config)
    with flagops.patch(twin, backend="torch") as handle:
        close(continued(twin, ids, SIZES), expected)
    assert handle.report().share == 1
    assert torch.equal(continued(twin, ids, SIZES), expected)
    again = load(twin)
    assert torch.equal(continued(again, ids, SIZES), expected)


def test_a_shallow_copy_outlives_the_patch(model):
    layer, x = model.model.layers[1], torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    parts = [layer.mlp.shared_experts, layer.input_layernorm, layer.self_attn.q_b_norm]
    expected = [part(x) for part in parts]
    handle = flagops.patch(model, backend="torch")
    copies = [copy.copy(part) for part in parts]
    for part, x0 in zip(copies, expected, strict=True):
        close(part(x), x0)
    handle.disable()
    for part, x0 in zip(copies, expected, strict=True):
        assert torch.equal(part(x), x0)


def test_transformers_own_recorder_does_not_count_as_a_hook(model):
    """It stays on a model that was once asked for its attentions."""
    fresh, ids = small_deepseek_v4(), tokens(24)
    with torch.no_grad():
        fresh(input_ids=ids, output_attentions=True)
    with flagops.patch(fresh, backend="torch") as handle:
        close(logits(fresh, ids), logits(model, ids))
    assert rows(handle)["sparse_attention"].replaced == {"torch": LAYERS}
    assert handle.report().share == 1
