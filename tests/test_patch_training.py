"""Training under `flagops.patch`: gradients, gradient checkpointing, optimizer steps, frozen parts."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flagops  # noqa: E402
from flagops.transformers import OPS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from patching import (  # noqa: E402
    BACKENDS,
    BOUND,
    Exact,
    caching,
    exact_twin,
    gradients,
    returned,
    rows,
    same_gradients,
    small_deepseek_v4,
    tokens,
)


@pytest.fixture(scope="module")
def model():
    return small_deepseek_v4().train()


@pytest.fixture(scope="module")
def exact(model):
    """The float64 model and its gradients by transformers' own code."""
    twin = exact_twin(model)
    with Exact():
        return twin, gradients(twin, tokens(40, 2, 3))


def errors(got, exact):
    """The largest error of each parameter's gradient, relative to its largest element."""
    assert got.keys() == exact.keys()
    return {name: float((got[name].double() - x).abs().max() / x.abs().max()) for name, x in exact.items()}


@pytest.mark.drawn
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_float64(exact, backend):
    """What differs is the order of summation, so nothing but a wrong formula exceeds this."""
    twin, expected = exact
    with Exact(), flagops.patch(twin, backend=backend) as handle:
        got = gradients(twin, tokens(40, 2, 3))
    assert rows(handle).keys() == set(OPS)
    assert all(row.replaced.keys() == {backend} and not row.passed for row in rows(handle).values())
    assert max(errors(got, expected).values()) < 1e-9
    leaves = {part for name in got for part in name.split(".")}
    assert {"sinks", "o_a_proj", "position_bias", "gate_up_proj", "fn", "hc_fn", "kv_norm"} <= leaves
    assert not any("indexer" in name for name in got), "a selection has no gradient, as in transformers"


@pytest.mark.drawn
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_float32(model, exact, backend):
    """No further from the float64 gradient than a small multiple of what transformers' own are."""
    ids, expected = tokens(40, 2, 3), exact[1]
    own = max(errors(gradients(model, ids), expected).values())
    with flagops.patch(model, backend=backend) as handle:
        got = gradients(model, ids)
    assert handle.report().share == 1
    assert max(errors(got, expected).values()) < 4 * own


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    ids = tokens(32, 2)
    expected = gradients(model, ids, use_cache=False)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    try:
        with flagops.patch(model, backend="torch") as handle:
            got = gradients(model, ids, use_cache=False)
    finally:
        model.activation_checkpointing_disable()
    same_gradients(got, expected)
    found = rows(handle)
    assert found.pop("hc_post").passed == {"transformers checkpoints its own layer": 3}
    assert found["sparse_attention"].replaced == {"torch": 6}, "once forward, once again for the gradient"
    assert not any(row.passed for row in found.values())


def test_steps_of_an_optimizer():
    """Weights that change under the patch are the ones it computes with; a patch may end between two steps."""
    ids, losses = tokens(32, 2), []
    for patched in (False, True):
        model = small_deepseek_v4().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        handle = flagops.patch(model, backend="torch") if patched else None
        losses.append([])
        for step in range(4):
            if handle and step == 3:
                handle.disable()
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert all(abs(got - expected) < BOUND * expected for got, expected in zip(losses[1], losses[0], strict=True))
    assert losses[0][-1] < losses[0][0]


def test_a_frozen_model_with_one_trained_part(model):
    """As with adapters: keys without a gradient beside queries that have one."""
    ids = tokens(32, 2)
    trained = model.model.layers[1].self_attn.q_b_proj.weight
    try:
        model.requires_grad_(False)
        trained.requires_grad_(True)
        expected = gradients(model, ids)
        with flagops.patch(model, backend="torch") as handle:
            got = gradients(model, ids)
    finally:
        model.requires_grad_(True)
    assert len(expected) == 1
    same_gradients(got, expected)
    assert handle.report().share == 1


def test_a_gradient_through_several_tokens_of_a_cache(model):
    """The cache of a forward that records gradients is never written in place."""
    ids = tokens(30)

    def run():
        model.zero_grad()
        cache, loss = None, 0.0
        for part in (ids[:, :20], *ids[:, 20:].split(1, 1)):
            out = model(input_ids=part, **caching(cache), use_cache=True)
            cache, loss = returned(out), loss + out.logits.square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    with flagops.patch(model, backend="torch"):
        got = run()
    same_gradients(got, expected)


def test_router_losses(model):
    """The auxiliary loss reads the logits of routers, and trains through them."""
    ids = tokens(32, 2)
    expected = gradients(model, ids, output_router_logits=True)
    with flagops.patch(model, backend="torch") as handle:
        got = gradients(model, ids, output_router_logits=True)
    same_gradients(got, expected)
    assert handle.report().share == 1
