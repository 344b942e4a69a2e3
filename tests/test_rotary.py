"""Laws of the rotary embedding and its tables, on every backend."""

import math

import numpy as np
import pytest
import torch
from flagops.reference.rotary import _theta
from hypothesis import given
from hypothesis import strategies as st

import flagops
from flagops import registry, testing

rotate = registry.operators()["rotary_embedding"].reference
table = registry.operators()["yarn_table"].reference


def test_check_values_of_the_specification():
    theta = _theta(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    expected = {0: 1, 1: 0.68765604, 15: 0.0036355385, 16: 0.0022656249, 20: 2.9697779e-4, 24: 1.9531253e-5}
    expected |= {25: 5.3723124e-6, 31: 5.6805294e-7}
    for i, value in expected.items():
        assert theta[i] == np.float32(value)


def test_transformers_frequencies_to_the_bit():
    """`factor=1` and YaRN, with the official configuration."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    scaling = {"rope_type": "yarn", "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536}
    config = modeling.DeepseekV4Config(
        rope_theta=10000.0, compress_rope_theta=160000.0, qk_rope_head_dim=64, rope_scaling=scaling,
        max_position_embeddings=1 << 20, layer_types=["sliding_attention"], num_hidden_layers=1,
    )  # fmt: skip
    rotary = modeling.DeepseekV4RotaryEmbedding(config)
    assert np.array_equal(rotary.main_inv_freq.numpy(), _theta(64, 10000.0, 1.0, 65536, 32.0, 1.0))
    assert np.array_equal(rotary.compress_inv_freq.numpy(), _theta(64, 160000.0, 16.0, 65536, 32.0, 1.0))


@given(st.integers(0, 2**32), st.integers(0, 500), st.integers(0, 500))
def test_products_depend_on_the_distance_alone(seed, p, distance):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 1, 12))
    theta = rng.random(4)

    def score(a, b):
        angles = [np.array([[n]]) * theta for n in (a, b)]
        x, y = (rotate(v[None], np.cos(t), np.sin(t)) for v, t in zip((q, k), angles, strict=True))
        return float((x * y).sum())

    scores = [np.float64(score(*at)) for at in ((p + distance, p), (distance, 0))]
    roundings = 4 * (p + distance) + 40  # an angle in radians is off by half a unit of its own
    testing.assert_near(*scores, roundings, np.linalg.norm(q) * np.linalg.norm(k))


@pytest.mark.operators("rotary_embedding")
def test_inverse_undoes_it_and_pairs_keep_their_length(kernel):
    backend = kernel[1]
    cos, sin = flagops.yarn_table(torch.tensor([0, 1, 77, 70000]), 8, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 3, 20).to(dtype)
        y = flagops.rotary_embedding(x, cos, sin, backend=backend)
        back = flagops.rotary_embedding(y, cos, sin, True, backend=backend)
        lengths = [t[..., 12:].float().unflatten(-1, (4, 2)).norm(dim=-1).to(dtype) for t in (x, y)]
        testing.assert_near(*lengths, 8)  # products, a sum, a rounding; the table; the length itself
        testing.assert_near(back[..., 12:], x[..., 12:], 12, lengths[0].float().repeat_interleave(2, -1))
        assert torch.equal(back[..., :12], x[..., :12])
        assert torch.equal(y[..., :12], x[..., :12])
        assert torch.equal(y[:, 0], x[:, 0])
        assert flagops.rotary_embedding(x, cos, sin, out=x, backend=backend) is x
        assert torch.equal(x, y)


@pytest.mark.operators("yarn_table")
def test_tables_of_far_positions(kernel):
    """A float32 angle of 10^6 has its own cosine; one from float64 arithmetic differs by more."""
    positions = torch.tensor([1048575, 65536, 3])
    cos, sin = flagops.yarn_table(positions, factor=1, backend=kernel[1])
    testing.assert_of("yarn_table", (cos, sin), positions, factor=1)
    testing.assert_near(cos[0, 0], np.float64(math.cos(1048575)), 2, 1)
    testing.assert_near(cos**2 + sin**2, torch.ones_like(cos), 8)


def test_refusals():
    x, cos = torch.ones(1, 2, 1, 6), torch.ones(2, 4)
    with pytest.raises(ValueError, match="rotate 4 pairs of channels, but x has only 6"):
        flagops.rotary_embedding(x, cos, cos)
    with pytest.raises(ValueError, match="even whole number"):
        flagops.yarn_table(torch.arange(3), 5)
    with pytest.raises(TypeError, match="float32"):
        flagops.rotary_embedding(x, cos[:, :3].double(), cos[:, :3].double())
