"""Laws of rms_norm, on every backend."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flagops
from flagops import registry, testing
from flagops.arrays import as_numpy

reference = registry.operators()["rms_norm"].reference


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_rows_have_unit_mean_square_whatever_their_scale(seed, scale):
    x = np.random.default_rng(seed).standard_normal((3, 17))
    y = reference(scale * x, None, 0.0)
    testing.assert_near((y * y).mean(-1), np.ones(3), 40)  # two sums of 17
    testing.assert_near(y, reference(x, None, 0.0), 8)  # x is rounded when it is scaled


@pytest.mark.operators("rms_norm")
def test_a_row_of_zeros_stays_zero(kernel):
    for stepwise in (False, True):
        x = torch.zeros(3, 64, dtype=torch.bfloat16)
        assert not flagops.rms_norm(x, None, 1e-6, stepwise, backend=kernel[1]).any()


@pytest.mark.operators("rms_norm")
def test_steps_are_those_of_bfloat16_arithmetic(kernel):
    """Against ml_dtypes' own arithmetic, a rounding after every operation."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 512)).astype(ml_dtypes.bfloat16)
    mean = np.square(x).astype(np.float64).mean(-1, keepdims=True).astype(np.float32).astype(x.dtype)
    root = (1 / np.sqrt((mean + x.dtype.type(0)).astype(np.float32))).astype(x.dtype)
    got = flagops.rms_norm(torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16), None, 0.0, True, backend=kernel[1])
    assert np.array_equal(as_numpy(got), x * root)
    once = flagops.rms_norm(got, None, 0.0, backend=kernel[1])
    assert not torch.equal(got, once)


@pytest.mark.operators("rms_norm")
def test_a_number_may_be_taken_from_the_mean(kernel):
    x = torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    got = flagops.rms_norm(x, None, -3.0, backend=kernel[1])
    assert got[0].tolist() == [2, 2]
    assert got[1:].isnan().all()


@pytest.mark.operators("rms_norm")
def test_an_input_may_be_its_own_result(kernel):
    x = torch.randn(5, 3, 33).transpose(0, 1)
    expected = flagops.rms_norm(x, backend=kernel[1])
    assert flagops.rms_norm(x, out=x, backend=kernel[1]) is x
    assert torch.equal(x, expected)


def test_refusals():
    with pytest.raises(ValueError, match="eps must be a finite number, got inf"):
        flagops.rms_norm(torch.ones(3), eps=float("inf"))
    with pytest.raises(TypeError, match="weight is float64"):
        flagops.rms_norm(torch.ones(3), torch.ones(3).double())
