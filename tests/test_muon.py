"""Newton-Schulz and the optimiser built on it."""

import copy

import numpy as np
import pytest
import torch

import flagops
from flagops.optim import Muon, split_parameters
from flagops.testing import assert_of


def conditioned(rng, n, m, low=0.05):
    """A matrix whose singular values lie between `low` and 1."""
    p = min(n, m)
    u, _ = np.linalg.qr(rng.standard_normal((n, p)))
    v, _ = np.linalg.qr(rng.standard_normal((m, p)))
    return u, np.linspace(low, 1, p), v


@pytest.mark.operators("newton_schulz")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 7)])
def test_singular_values_become_one(kernel, shape):
    _, backend = kernel
    u, s, v = conditioned(np.random.default_rng(0), *shape)
    got = flagops.newton_schulz(torch.from_numpy((u * s) @ v.T), backend=backend)
    values = torch.linalg.svdvals(got)
    assert values.min() > 1 - 1e-3
    assert values.max() < 1 + 1e-3
    assert (got - torch.from_numpy(u @ v.T)).abs().max() < 1e-3


@pytest.mark.drawn
@pytest.mark.operators("newton_schulz")
def test_transposed_zero_scaled_and_stacked(kernel, rng):
    _, backend = kernel
    a = torch.from_numpy(rng.standard_normal((3, 6, 10)))
    got = flagops.newton_schulz(a, backend=backend)
    for again in (
        got,
        flagops.newton_schulz(a.mT, backend=backend).mT,
        flagops.newton_schulz(a * 2.0**-500, backend=backend),
    ):
        assert_of("newton_schulz", again, a)
    for i in range(3):
        assert_of("newton_schulz", flagops.newton_schulz(a[i], backend=backend), a[i])
    a[1] = 0
    again = flagops.newton_schulz(a, backend=backend)
    assert (again[1] == 0).all()
    assert torch.equal(again[0], got[0])
    a[1, 2, 3] = torch.nan
    again = flagops.newton_schulz(a, backend=backend)
    assert again[1].isnan().all()
    assert torch.equal(again[2], got[2])


def plain_update(w, momentum, g, lr, mu, decay, gamma, nesterov):
    """The specification, in NumPy."""
    momentum[...] = mu * momentum + g
    x = mu * momentum + g if nesterov else momentum.copy()
    norm = np.sqrt((x * x).sum((-2, -1), keepdims=True))
    x = x / np.where(norm == 0, 1, norm)
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + b * gram @ x + c * gram @ gram @ x
    w *= 1 - lr * decay
    w -= lr * gamma * np.sqrt(max(w.shape[-2:])) * x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 5, 8)])
def test_optimiser_against_its_definition(shape, nesterov):
    rng = np.random.default_rng(2)
    w = rng.standard_normal(shape)
    parameter, momentum = torch.nn.Parameter(torch.from_numpy(w.copy())), np.zeros(shape)
    optimiser = Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.3, gamma=0.2, nesterov=nesterov)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 2, gamma=0.5)
    for step in range(6):
        g = rng.standard_normal(shape)
        parameter.grad = torch.from_numpy(g.copy())
        optimiser.step()
        schedule.step()
        plain_update(w, momentum, g, 0.02 * 0.5 ** (step // 2), 0.9, 0.3, 0.2, nesterov)
        assert np.allclose(parameter.detach().numpy(), w, rtol=0, atol=1e-9), step


def test_an_update_has_the_promised_size():
    parameter = torch.nn.Parameter(torch.zeros(48, 64).double())
    optimiser = Muon([parameter], lr=1.0, weight_decay=0.0)
    parameter.grad = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).double()
    optimiser.step()
    assert abs(parameter.detach().square().mean().sqrt() - 0.18) < 1e-4


def test_state_survives_saving():
    torch.manual_seed(0)
    models = [torch.nn.Linear(6, 4, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (Muon(m.parameters(), lr=0.1) for m in models)
    x = torch.randn(8, 6)
    for _ in range(3):
        first.zero_grad()
        models[0](x).square().sum().backward()
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimiser in zip(models, (first, second), strict=True):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    assert torch.equal(models[0].weight, models[1].weight)
    assert second.state[models[1].weight]["momentum_buffer"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_is_learned(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)
    x = torch.randn(64, 8)
    y = torch.sin(x @ torch.randn(8, 4))
    muon, adamw = split_parameters(model)
    optimisers = [Muon(muon, lr=0.05, weight_decay=0.0), torch.optim.AdamW(adamw, lr=0.01)]
    losses = []

    def closure():
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(60):
        for optimiser in optimisers:
            optimiser.zero_grad()
        optimisers[0].step(closure)
        optimisers[1].step()
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="give norms, biases and scales to AdamW"):
        Muon(torch.nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match="reshape it"):
        Muon(torch.nn.Conv2d(3, 2, 3, bias=False).parameters())
    with pytest.raises(ValueError, match="momentum must be"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], momentum=1.0)
    with pytest.raises(ValueError, match="lr must be"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], lr=-1.0)
    sparse = torch.nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Muon(sparse.parameters()).step()


def test_parameters_are_split_by_the_rule():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 4)
            self.experts = torch.nn.Parameter(torch.zeros(3, 4, 4))
            self.hc_fn = torch.nn.Parameter(torch.zeros(24, 16))
            self.hc_base = torch.nn.Parameter(torch.zeros(24))
            self.hc_scale = torch.nn.Parameter(torch.zeros(3))
            self.wq = torch.nn.Linear(4, 4, bias=True)
            self.norm = torch.nn.RMSNorm(4)
            self.frozen = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
            self.head = torch.nn.Linear(4, 10, bias=False)

    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = split_parameters(model)
    assert {names[id(p)] for p in muon} == {"experts", "hc_fn", "wq.weight"}
    assert {names[id(p)] for p in adamw} == {
        "embed.weight", "hc_base", "hc_scale", "wq.bias", "norm.weight", "head.weight",
    }  # fmt: skip
