"""The references themselves: worked vectors and laws of the specification."""

import math

import ml_dtypes
import numpy as np
import pytest
from flagops.reference._rounding import round_to, unit
from hypothesis import given
from hypothesis import strategies as st

import flagops
from flagops import registry, testing

fp4 = registry.operators()["fp4_dequantize"].reference
fp8 = registry.operators()["fp8_dequantize"].reference
attention = registry.operators()["sparse_attention"].reference


def test_fp4_vectors():
    packed = np.zeros((1, 16), np.uint8)
    packed[0, :3] = 0x72, 0x8F, 0x19
    got = fp4(packed, np.array([[127]], np.uint8))[0, :6].astype(float)
    assert got.tolist() == [1, 6, -6, 0, -0.5, 0.5]
    assert math.copysign(1, got[3]) == -1


def test_fp4_edges_of_the_scale():
    packed = np.full((1, 16), 0x71, np.uint8)  # 0.5 and 6
    for byte, low, high in ((0, 2.0**-128, 6 * 2.0**-127), (253, 2.0**125, math.inf), (254, 2.0**126, math.inf)):
        got = fp4(packed, np.array([[byte]], np.uint8), "float32")[0, :2].astype(float)
        assert got.tolist() == [low, high]
    assert np.isnan(fp4(0 * packed, np.array([[255]], np.uint8)).astype(float)).all()


@given(st.integers(0, 252), st.binary(min_size=16, max_size=16))
def test_fp4_is_exact_in_bfloat16_up_to_scale_byte_252(byte, raw):
    packed, scale = np.frombuffer(raw, np.uint8)[None], np.array([[byte]], np.uint8)
    assert np.array_equal(fp4(packed, scale, "bfloat16").astype(float), fp4(packed, scale, "float32").astype(float))


def test_fp8_codes_are_those_of_the_format():
    codes = np.arange(256, dtype=np.uint8)[None]
    got = fp8(codes, np.array([[127]], np.uint8), (1, 256), "float32")
    testing.assert_bits(got, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.isnan(got[0, [0x7F, 0xFF]]).all()
    assert got[0, 0x7E] == 448
    assert got[0, 1] == 2.0**-9


def test_fp8_with_float32_scales_rounds_twice():
    weight, scale = np.array([[0x39]], np.uint8), np.array([[1.0 + 2.0**-23]], np.float32)  # 1.125
    product = np.float32(1.125) * scale[0, 0]
    assert fp8(weight, scale)[0, 0] == product.astype(ml_dtypes.bfloat16)


@given(st.floats(-1e39, 1e39), st.sampled_from(["bfloat16", "float16"]))
def test_rounding_is_done_once(value, dtype):
    """The nearest value of the format, the even one on a tie: checked against both neighbours."""
    got = float(round_to(np.array([value]), dtype)[0])
    limit = unit(dtype)
    if abs(value) >= limit.largest * (1 + limit.u):
        assert math.isinf(got)
    elif math.isinf(got):
        assert abs(value) > limit.largest
    else:
        to = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        around = [float(np.nextafter(to(got), to(way))) for way in (-math.inf, math.inf)]
        assert all(abs(value - got) <= abs(value - other) for other in around)


def test_double_rounding_trap():
    value = 1 + 2.0**-8 + 2.0**-40  # float32 rounds it to the tie, which would then go to even, 1
    assert float(round_to(np.array([value]), "bfloat16")[0]) == 1 + 2.0**-7


def test_attention_vector():
    q = np.zeros((1, 1, 1, 4))
    kv = np.stack([np.ones(4), np.full(4, 3.0)])[None]
    got = attention(q, kv, np.zeros(1), np.array([[[0, -1, 1]]]), 1.0)
    testing.assert_near(got, np.full(got.shape, 4 / 3), 8)


def _inputs(seed, n=9, k=5):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((2, 3, 2, 4)),
        rng.standard_normal((2, n, 4)),
        rng.standard_normal(2),
        rng.permuted(np.tile(np.arange(n), (2, 3, 1)), axis=-1)[..., :k],
    )


@given(st.integers(0, 2**32))
def test_attention_laws(seed):
    q, kv, sink, indices = _inputs(seed)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([indices, np.full((2, 3, 3), -1)], axis=-1)
    again = attention(q, kv, sink, rng.permuted(shuffled, axis=-1), 0.5)
    testing.assert_of("sparse_attention", again.astype(float), q, kv, sink, indices, 0.5)
    assert np.array_equal(attention(q, kv, np.full(2, -np.inf), indices, 0.5), attention(q, kv, None, indices, 0.5))
    assert not attention(q, kv, np.full(2, np.inf), indices, 0.5).any()
    assert not attention(q, kv, sink, np.full_like(indices, -1), 0.5).any()
    rows = np.take_along_axis(kv[:, None], indices[..., :1, None], axis=2)
    logit = 0.5 * np.einsum("bshd,bskd->bshk", q, rows)
    single = rows / (1 + np.exp(sink[:, None] - logit))
    testing.assert_of("sparse_attention", single, q, kv, sink, indices[..., :1], 0.5)


def test_window_indices():
    w = flagops.window_indices
    assert w(6, 4).tolist() == [
        [0, -1, -1, -1],
        [0, 1, -1, -1],
        [0, 1, 2, -1],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
    ]
    assert w(1, 8, 3).tolist() == [[0, 1, 2, 3, -1, -1, -1, -1]]
    assert w(1, 8, 7).tolist() == [list(range(8))]
    assert w(1, 8, 10).tolist() == [[3, 4, 5, 6, 7, 0, 1, 2]]
    assert w(1).tolist() == [[0]]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 255, 256, 257])
def test_window_holds_the_last_128_positions(tokens):
    for t, row in enumerate(flagops.window_indices(tokens)):
        assert sorted(row[row >= 0]) == list(range(max(0, t - 127), t + 1))


@given(st.integers(1, 600))
def test_a_decode_window_is_the_ring_of_the_same_positions(position):
    slots = flagops.window_indices(1, start=position)[0]
    expected = [p % 128 for p in range(max(0, position - 127), position + 1)]
    assert slots[slots >= 0].tolist() == expected


@given(st.integers(0, 40), st.integers(1, 9))
def test_hca_indices_show_complete_entries_only(tokens, ratio):
    for t, row in enumerate(flagops.hca_indices(tokens, ratio)):
        assert row[row >= 0].tolist() == [tokens + w for w in range((t + 1) // ratio)]
        if t:
            decoded = flagops.hca_indices(1, ratio, t)[0] - 128
            assert decoded.tolist() == list(range((t + 1) // ratio))


@pytest.mark.parametrize("call", [(2, 8, 3), (-1, 8, 0), (1, 0, 0), (1, 8, -1)])
def test_index_builders_refuse(call):
    with pytest.raises(ValueError, match="token"):
        flagops.window_indices(*call)


def test_index_builders_agree_on_both_libraries():
    for tokens, start in ((7, 0), (1, 5), (1, 300)):
        for build in (flagops.window_indices, lambda n, start, **kw: flagops.hca_indices(n, 4, start, **kw)):
            assert build(tokens, start=start, device="cpu").tolist() == build(tokens, start=start).tolist()


@given(st.integers(0, 2**32))
def test_projection_is_one_product_per_group(seed):
    rng = np.random.default_rng(seed)
    o, wo_a, wo_b = (rng.standard_normal(s) for s in ((5, 6, 4), (9, 8), (7, 9)))
    z = [o[:, 2 * g : 2 * g + 2].reshape(5, 8) @ wo_a[3 * g : 3 * g + 3].T for g in range(3)]
    testing.assert_of("grouped_output_projection", np.concatenate(z, axis=1) @ wo_b.T, o, wo_a, wo_b, 3)


def test_one_group_is_two_plain_products(rng):
    o, wo_a, wo_b = (rng.standard_normal(s) for s in ((5, 2, 4), (3, 8), (7, 3)))
    testing.assert_of("grouped_output_projection", o.reshape(5, 8) @ wo_a.T @ wo_b.T, o, wo_a, wo_b, 1)


def test_the_comparison_can_fail():
    op = registry.operator("matmul")
    a, b = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    right = a @ b
    testing.compare(op, {"a": a, "b": b}, right)
    for wrong in (right + 1e-5, -right, np.full_like(right, np.nan), np.full_like(right, np.inf)):
        with pytest.raises(AssertionError, match="elements are off"):
            testing.compare(op, {"a": a, "b": b}, wrong)
    with pytest.raises(AssertionError, match="differ"):
        testing.assert_bits(np.array([0.0]), np.array([-0.0]))
