"""Random numbers by counters: the published vectors, their distributions, and the device that draws by them."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flagops.kernels.numba._philox import philox as compiled
from flagops.reference.random import philox

import flagops
from flagops import registry
from flagops.call import of

FOLDER = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Random123's known answers: counter, key, words
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_the_generator_is_philox(counter, key, words):
    assert (philox(_words(counter), _words(key)) == _words(words)).all()
    got = compiled(*_words(counter).astype(np.uint64), *_words(key).astype(np.uint64))
    assert np.array(got, np.uint64).tolist() == _words(words).tolist()


def _aten(name, *args):
    return of(registry.operator(f"aten.{name}"))(*args, backend="numba")


def _state(rng):
    return torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 2))


COUNT = 1 << 17
NEAR = 6 / math.sqrt(COUNT)
"""Six standard deviations of a mean: once in half a billion."""


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_distributions_have_their_moments(dtype, rng):
    x = _aten("uniform", _state(rng), COUNT, 0.0, 1.0, dtype)
    assert x.min() >= 0
    assert x.max() < 1
    step = {"float16": 2**-11, "bfloat16": 2**-8}.get(dtype, 0)
    assert abs(x.double().mean() + step / 2 - 0.5) < NEAR * math.sqrt(1 / 12)
    x = _aten("normal", _state(rng), COUNT, 0.0, 1.0, dtype).double()
    assert abs(x.mean()) < NEAR
    assert abs(x.square().mean() - 1) < NEAR * math.sqrt(2) + 2**-8 * (dtype == "bfloat16")
    x = _aten("exponential", _state(rng), COUNT, 2.0, dtype).double()
    assert abs(x.mean() - 0.5) < NEAR / 2 + 2**-9 * (dtype == "bfloat16")


def test_places_are_picked_by_their_weights(rng):
    weights = torch.tensor([0.0, 1, 0, 3])
    draws = torch.from_numpy(rng.random(COUNT))
    counts = _aten("pick", weights, draws).bincount(minlength=4) / COUNT
    assert counts[0] == counts[2] == 0
    assert abs(counts[3] - 0.75) < NEAR * math.sqrt(0.75 * 0.25)


def test_numbers_are_the_same_for_any_number_of_threads(rng):
    state, before, found = _state(rng), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_aten("normal", state, COUNT, 0.0, 1.0, "float32"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_seeded_numbers_of_the_cpu_stay_torchs():
    def drawn():
        torch.manual_seed(3)
        return [torch.rand(9), torch.randn(9), torch.randint(9, (9,)), torch.randperm(9), torch.rand(9).multinomial(3)]

    expected = drawn()
    with flagops.enable("all", backend="numba"):
        assert all(map(torch.equal, drawn(), expected))


DEVICE = """
import math, sys
sys.path.insert(0, sys.argv[1])
import bare, torch, flagops
bare.load()
backend = sys.argv[2]
torch.bare.host_memory = backend == "numba"
COUNT = 1 << (16 if backend == "numba" else 7)
if backend == "triton":
    import aten_device
    aten_device.computing_by_triton()
near = lambda x, mean, deviation: abs(float(x) - mean) < 6 * deviation / math.sqrt(COUNT)
def on(*shape, **kind): return torch.empty(*shape, device="bare", **kind)
weights = torch.tensor([[0.0, 1, 0, 3], [1, 1, 0, 0]]).repeat(COUNT // 2, 1)
CALLS = {
    "rand": lambda: torch.rand(COUNT, device="bare"),
    "randn": lambda: torch.randn(COUNT, device="bare", dtype=torch.bfloat16),
    "strided": lambda: on(COUNT, 2)[:, 0].normal_(),
    "randint": lambda: torch.randint(-3, 4, (COUNT,), device="bare"),
    "random_": lambda: on(COUNT, dtype=torch.uint8).random_(),
    "bool": lambda: on(COUNT, dtype=torch.bool).random_(),
    "to": lambda: on(COUNT, dtype=torch.int32).random_(5),
    "from": lambda: on(COUNT, dtype=torch.int64).random_(5, None),
    "randperm": lambda: torch.randperm(COUNT, device="bare"),
    "exponential_": lambda: on(COUNT).exponential_(0.5),
    "bernoulli_": lambda: on(COUNT).bernoulli_(0.3),
    "bernoulli": lambda: torch.bernoulli(torch.full((COUNT,), 0.3).to("bare")),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(COUNT).to("bare"), 0.3),
    "replaced": lambda: weights.to("bare").multinomial(3, True),
    "multinomial": lambda: weights.to("bare").multinomial(2),
}
with flagops.enable(backend=backend):
    first = {}
    for name, call in CALLS.items():
        torch.manual_seed(5)
        one, two = call().cpu(), call().cpu()
        torch.manual_seed(5)
        assert torch.equal(call().cpu(), one), name
        assert not torch.equal(one, two), name
        first[name] = one.double()
    generator = torch.Generator("bare").manual_seed(4)
    draws = [torch.rand(5, device="bare", generator=generator).tolist() for _ in range(2)]
    assert draws[0] != draws[1] and generator.get_offset() > 0
    x = torch.ones(COUNT).to("bare").requires_grad_()
    y = torch.nn.functional.dropout(x, 0.3)
    y.backward(torch.ones(COUNT).to("bare"))
    assert torch.equal(x.grad.cpu(), y.detach().cpu())
    for call in (lambda: weights.to("bare").mul(-1).multinomial(1), lambda: torch.zeros(4).to("bare").multinomial(1)):
        try:
            call()
        except RuntimeError as error:
            assert "probab" in str(error), error
        else:
            raise AssertionError("weights that are none were taken")
if backend == "triton":  # whose interpreter takes too long for many; the bits are the other's
    sys.exit()
assert near(first["rand"].mean(), 0.5, 1)
assert near(first["randn"].mean(), 0, 1) and near(first["strided"].mean(), 0, 1)
assert near(first["randint"].mean(), 0, 2) and set(first["randint"].tolist()) == set(range(-3, 4))
assert set(first["random_"].tolist()) == set(range(256)) and near(first["bool"].mean(), 0.5, 0.5)
assert set(first["to"].tolist()) == set(range(5)) and first["from"].min() >= 5
assert first["randperm"].sort().values.tolist() == list(range(COUNT))
assert near(first["exponential_"].mean(), 2, 2)
for name in ("bernoulli_", "bernoulli"):
    assert near(first[name].mean(), 0.3, 0.5) and set(first[name].tolist()) == {0, 1}
assert near(first["dropout"].mean(), 1, 0.7)
assert set(first["replaced"][::2].flatten().tolist()) == {1, 3}
assert near((first["replaced"][::2] == 3).double().mean(), 0.75, 1)
assert (first["multinomial"].sort(-1).values[::2] == torch.tensor([1, 3])).all()
assert near((first["multinomial"][::2, 0] == 3).double().mean(), 0.75, 1)
"""


@pytest.mark.drawn
@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=needs_triton)])
def test_a_device_draws_by_its_seed(backend):
    command = [sys.executable, "-c", DEVICE, str(FOLDER), backend]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
