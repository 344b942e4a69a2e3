"""Laws of the quantisers, of the recoding and of the Hadamard transform, on every backend."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flagops
from flagops import arrays, registry, testing
from flagops.call import of

E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
BF16 = np.arange(1, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16)
FAKES = ("fp8_fake_quantize", "fp4_fake_quantize")


def run(kernel, *args, **kwargs):
    """A call of the operator on torch tensors, results as NumPy arrays."""
    operator, backend = registry.operator(kernel[0]), kernel[1]
    given_ = [testing.as_kind(np.ascontiguousarray(x), "torch") if isinstance(x, np.ndarray) else x for x in args]
    result = of(operator)(*given_, backend=backend, **kwargs)
    return tuple(map(arrays.as_numpy, result)) if operator.several else arrays.as_numpy(result)


def bytes_of(x):
    return x.view(np.uint8)


def bf16(*values, length=32):
    x = np.zeros((1, length), ml_dtypes.bfloat16)
    x[0, : len(values)] = values
    return x


def same_bits(a, b):
    testing.assert_bits(np.asarray(a), np.asarray(b))


@pytest.mark.operators("fp8_quantize")
def test_vector_of_the_specification_in_fp8(kernel):
    x = bf16(1, -2.5, 3.296875, 100, 448, 0.000999, length=64)
    codes, scale = run(kernel, x, 64)
    assert bytes_of(codes)[0, :6].tolist() == [0x38, 0xC2, 0x45, 0x6C, 0x7E, 0x01]
    assert bytes_of(scale).tolist() == [[127]]


@pytest.mark.operators("fp8_fake_quantize")
def test_vector_of_the_specification_in_fp8_and_back(kernel):
    x = bf16(1, -2.5, 3.296875, 100, 448, 0.000999, length=64)
    assert run(kernel, x)[0, :6].tolist() == [1, -2.5, 3.25, 96, 448, 2.0**-9]


@pytest.mark.operators("fp4_fake_quantize")
@pytest.mark.parametrize(("amax", "expected"), [(6, [0.5, -1, 2, -4, 4, -0.0, 6]), (7, [0, -1, 2, -4, 4, -0.0, 8])])
def test_vectors_of_the_specification_in_fp4_and_back(kernel, amax, expected):
    x = bf16(0.3, -0.75, 1.75, -3.5, 5, -0.2, amax)
    same_bits(run(kernel, x)[:, :7], np.array([expected], ml_dtypes.bfloat16))


@pytest.mark.operators("fp4_quantize")
def test_vector_of_the_specification_in_fp4(kernel):
    packed, scale = run(kernel, bf16(0.3, -0.75, 1.75, -3.5, 5, -0.2, 6))
    assert packed[0, :4].tolist() == [0xA1, 0xE4, 0x86, 0x07]
    assert bytes_of(scale).tolist() == [[127]]


def _check_scales(scale, largest, floor):
    """The least power of two that holds the block; all numbers here are exact in float64."""
    amax = np.maximum(BF16.astype(np.float64), floor)
    s = np.ldexp(1.0, bytes_of(scale)[:, 0].astype(int) - 127)
    assert (largest * s >= amax).all()
    assert (largest * s / 2 < amax).all()


@pytest.mark.operators("fp8_quantize")
def test_every_bfloat16_amax_in_fp8(kernel):
    codes, scale = run(kernel, BF16[:, None], 1)
    _check_scales(scale, 448, np.float64(np.float32(1e-4)))
    above = BF16.astype(np.float64) >= 1e-4
    assert (codes.astype(np.float32)[above] > 223).all()


@pytest.mark.operators("fp4_quantize")
def test_every_bfloat16_amax_in_fp4(kernel):
    packed, scale = run(kernel, np.stack((BF16, -BF16), -1), 2)
    _check_scales(scale, 6, 6 * 2.0**-126)
    above = BF16.astype(np.float64) >= 6 * 2.0**-126
    assert np.isin(packed[above], (0xD5, 0xE6, 0xF7)).all()  # 3, 4 or 6 and its negative


@pytest.mark.operators("fp8_quantize")
@pytest.mark.parametrize("sign", [1, -1])
def test_every_midpoint_of_e4m3_and_its_neighbours(kernel, sign):
    _check_midpoints(lambda x: bytes_of(run(kernel, x, 2)[0])[:, 0], E4M3, sign, 0x80)


@pytest.mark.operators("fp4_quantize")
@pytest.mark.parametrize("sign", [1, -1])
def test_every_midpoint_of_e2m1_and_its_neighbours(kernel, sign):
    _check_midpoints(lambda x: run(kernel, x, 2)[0][:, 0] & 15, E2M1, sign, 8)


def _check_midpoints(encode, values, sign, bit):
    """Ties go to the even code, all else to the nearest; the block's other element sets the scale to 1."""
    code = np.arange(len(values) - 1)
    middle = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))
    for x, expected in ((middle, code + code % 2), (below, code), (above, code + 1), (values[:-1], code)):
        pairs = np.stack((np.float32(sign) * x, np.full_like(x, values[-1])), -1)
        assert encode(pairs).tolist() == (expected + bit * (sign < 0)).tolist()


def _draw(seed, dtype, rows=16):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 256)) * np.exp2(rng.integers(-40, 20, (rows, 1)))
    return x.astype(arrays.numpy_dtype(dtype))


@pytest.mark.operators(*FAKES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_idempotent(kernel, dtype, seed):
    once = run(kernel, _draw(seed, dtype))
    same_bits(run(kernel, once), once)


@pytest.mark.operators("fp8_quantize", "fp4_quantize")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fake_is_quantised_and_dequantised(kernel, dtype):
    backend = kernel[1] if registry.written("fp4_dequantize", kernel[1]) else "numpy"
    x = torch.from_numpy(_draw(3, "float32")).to(getattr(torch, dtype))
    codes, scale = of(registry.operator(kernel[0]))(x, 32, backend=kernel[1])
    if kernel[0] == "fp8_quantize":
        back = flagops.fp8_dequantize(codes, scale, (1, 32), dtype, backend=backend)
        fake = flagops.fp8_fake_quantize(x, 32, backend=kernel[1])
    else:
        back = flagops.fp4_dequantize(codes, scale, dtype, backend=backend)
        fake = flagops.fp4_fake_quantize(x, 32, backend=kernel[1])
    same_bits(arrays.as_numpy(back), arrays.as_numpy(fake))


@pytest.mark.operators("fp8_quantize")
def test_scales_of_float32_are_quotients(kernel):
    x = _draw(7, "bfloat16")
    codes, scale = run(kernel, x, 128, False, "float32")
    blocks = x.astype(np.float32).reshape(len(x), 2, 128)
    amax = np.maximum(np.abs(blocks).max(-1), np.float32(1e-4))
    same_bits(scale, amax * np.float32(1 / 448))
    quotient = np.clip(blocks / scale[..., None], -448, 448)
    same_bits(codes, quotient.astype(ml_dtypes.float8_e4m3fn).reshape(x.shape))
    powers = run(kernel, x, 128, True, "float32")[1]
    assert (np.frexp(powers)[0] == 0.5).all()
    assert (powers >= scale).all()
    assert (powers < 2 * scale).all()


@pytest.mark.operators("fp8_quantize")
def test_blocks_at_the_floor_of_fp8(kernel):
    codes, scale = run(kernel, bf16(0, -0.0, 2.0**-32, -(2.0**-32), 2.0**-31, -(2.0**-100)), 32)
    assert bytes_of(scale).tolist() == [[127 - 22]]
    assert bytes_of(codes)[0, :7].tolist() == [0, 0x80, 0, 0x80, 1, 0x80, 0]


@pytest.mark.operators("fp4_quantize")
def test_blocks_at_the_floor_of_fp4(kernel):
    packed, scale = run(kernel, bf16(0, -0.0, 2.0**-126, -(2.0**-133)), 32)
    assert bytes_of(scale).tolist() == [[1]]
    assert packed[0, :3].tolist() == [0x80, 0x82, 0]


@pytest.mark.operators(*FAKES, "fp8_quantize", "fp4_quantize")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_makes_its_block_nan_and_no_other(kernel, bad):
    x = _draw(5, "float32", rows=1)
    x[0, 70] = bad
    result = run(kernel, x, 64)
    clean = run(kernel, np.where(np.isfinite(x), x, 0), 64)
    if kernel[0] in FAKES:
        assert np.isnan(result[0, 64:128]).all()
        same_bits(np.delete(result, np.s_[64:128], 1), np.delete(clean, np.s_[64:128], 1))
        return
    assert bytes_of(result[1])[0, 1] == 255
    codes = bytes_of(result[0])[0].reshape(4, -1)
    assert (codes[1] == (0x7F if kernel[0] == "fp8_quantize" else 0x77)).all()
    same_bits(codes[[0, 2, 3]], bytes_of(clean[0])[0].reshape(4, -1)[[0, 2, 3]])


@pytest.mark.operators(*FAKES)
def test_a_slice_is_quantised_in_place_and_nothing_beside_it(kernel):
    kv = torch.randn(3, 5, 512).bfloat16()
    before, part = kv.clone(), kv[..., :448]
    function = of(registry.operator(kernel[0]))
    assert function(part, 64, out=part, backend=kernel[1]) is part
    assert torch.equal(kv[..., 448:], before[..., 448:])
    assert torch.equal(part, function(before[..., :448], 64, backend=kernel[1]))
    assert not torch.equal(part, before[..., :448])


def _weights(seed, spread, codes=range(16)):
    """One block whose scales reach from a top down by `spread`, both ends included."""
    rng = np.random.default_rng(seed)
    packed = rng.choice(list(codes), (128, 64)) | rng.choice(list(codes), (128, 64)) << 4
    scale = 140 - rng.integers(0, spread + 1, (128, 4))
    scale[0, 0], scale[77, 2] = 140, 140 - spread
    return packed.astype(np.uint8), scale.astype(np.uint8)


def _expanded(packed, scale, recoded):
    old = flagops.fp4_dequantize(packed, scale, "float32", backend="numpy")
    return old, flagops.fp8_dequantize(*recoded[:2], (128, 128), "float32", backend="numpy")


@pytest.mark.operators("fp4_to_fp8")
@pytest.mark.parametrize("spread", range(20))
def test_recoding_is_lossless_up_to_a_spread_of_14(kernel, spread):
    packed, scale = _weights(spread, spread)
    recoded = run(kernel, packed, scale)
    assert recoded[2].tolist() == [[spread <= 14]]
    assert bytes_of(recoded[1]).tolist() == [[134]]
    old, new = _expanded(packed, scale, recoded)
    if spread <= 14:
        same_bits(new, old)
    assert np.abs(new - old).max() <= 2.0 ** (134 - 127 - 10)


@pytest.mark.operators("fp4_to_fp8")
@pytest.mark.parametrize(("code", "limit"), [(0, 255), (8, 255), (2, 15), (5, 15), (12, 16), (7, 16), (6, 17)])
def test_what_can_be_kept_depends_on_the_values(kernel, code, limit):
    for spread in (limit, limit + 1):
        if spread <= 140:
            packed, scale = _weights(1, spread, [code])
            assert run(kernel, packed, scale)[2].tolist() == [[spread <= limit]]


@pytest.mark.operators("fp4_to_fp8")
def test_small_scales_are_recoded_without_a_change(kernel):
    packed, _ = _weights(2, 5)
    for top in range(7):
        scale = np.random.default_rng(top).integers(0, top + 1, (128, 4)).astype(np.uint8)
        scale[5, 1] = top
        recoded = run(kernel, packed, scale)
        assert bytes_of(recoded[1]).tolist() == [[0]]
        assert recoded[2].all()
        old, new = _expanded(packed, scale, recoded)
        same_bits(new, old)


@pytest.mark.operators("fp4_to_fp8")
def test_a_nan_scale_takes_its_block_and_no_other(kernel):
    packed, scale = (np.tile(x, (2, 3)) for x in _weights(3, 9))
    scale[200, 6] = 255
    weight, scales, lossless = run(kernel, packed, scale)
    assert (bytes_of(scales) == [[134] * 3, [134, 255, 134]]).all()
    assert (lossless == [[True] * 3, [True, False, True]]).all()
    nan = np.isnan(weight.astype(np.float32))
    assert nan[128:, 128:256].all()
    assert nan.sum() == 128 * 128


def _matrix(d):
    i = np.arange(d)
    return (-1.0) ** np.array([[bin(a & b).count("1") for b in i] for a in i])


@pytest.mark.operators("hadamard")
@pytest.mark.parametrize("d", [1, 2, 8, 16, 32, 128, 512])
def test_hadamard_matrix(kernel, d):
    same_bits(run(kernel, np.eye(d, dtype=np.float32), 1.0), _matrix(d).astype(np.float32))


@pytest.mark.operators("hadamard")
def test_hadamard_of_integers_is_their_product_with_the_matrix(kernel):
    x = np.random.default_rng(0).integers(-1000, 1000, (33, 256))
    same_bits(run(kernel, x.astype(np.float32), 1.0), (x @ _matrix(256)).astype(np.float32))
    assert (run(kernel, x.astype(np.float32)) == run(kernel, x.astype(np.float32), 1.0) / 16).all()


@pytest.mark.operators("hadamard")
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_hadamard_is_its_own_inverse_and_keeps_products(kernel, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, 5, 128))
    hx, hy = run(kernel, x), run(kernel, y)
    # 7 sums and a product each: their relative errors stay under 9 units of the vector's length
    bound = 9 * 2.0**-53 * np.linalg.norm(x, axis=-1, keepdims=True)
    assert (np.abs(run(kernel, hx) - x) <= 3 * bound).all()
    products = 3 * bound[:, 0] * np.linalg.norm(y, axis=-1) + 128 * 2.0**-53 * np.abs(x * y).sum(-1)
    assert (np.abs((hx * hy).sum(-1) - (x * y).sum(-1)) <= 2 * products).all()


def test_a_default_dtype_or_budget_changes_nothing():
    x = torch.randn(300, 256).bfloat16()
    calls = {
        "fp8_quantize": (x, 128, False, "float32"),
        "fp4_quantize": (x,),
        "fp4_fake_quantize": (x,),
        "hadamard": (x,),
    }
    expected = {name: getattr(flagops, name)(*args, backend="numpy") for name, args in calls.items()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name, args in calls.items():
            for backend in [b for b in ("torch", "numba") if registry.written(name, b)]:
                with flagops.using(budget=1 << 16):
                    got = getattr(flagops, name)(*args, backend=backend)
                each = registry.operator(name).each
                for a, b in zip(each(got), each(expected[name]), strict=True):
                    same_bits(arrays.as_numpy(a), arrays.as_numpy(b))
    finally:
        torch.set_default_dtype(default)


X = torch.zeros(3, 64)
BAD = {
    "e8m0 holds powers of two": (lambda: flagops.fp8_quantize(X, 32, False), ValueError, "powers of two only"),
    "a block that does not divide": (lambda: flagops.fp8_quantize(X, 48), ValueError, "a multiple of 48"),
    "no channels to share a scale": (
        lambda: flagops.fp8_fake_quantize(X, 0),
        ValueError,
        "whole number of at least 1, got 0",
    ),
    "half a byte": (lambda: flagops.fp4_quantize(X, 1), ValueError, "even whole number of at least 2, got 1"),
    "block of another kind": (lambda: flagops.fp4_fake_quantize(X, 1.5), TypeError, "whole number"),
    "float64": (lambda: flagops.fp8_quantize(X.double(), 32), TypeError, "x is float64, expected bfloat16"),
    "scale dtype": (lambda: flagops.fp8_quantize(X, 32, True, torch.float16), ValueError, "float8_e8m0fnu or float32"),
    "a flag": (lambda: flagops.fp8_quantize(X, 32, 1), TypeError, "True or False"),
    "rows": (
        lambda: flagops.fp4_to_fp8(torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)),
        ValueError,
        "a multiple of 128",
    ),
    "width": (lambda: flagops.hadamard(torch.zeros(2, 48)), ValueError, "48 channels, expected a power of two"),
    "no width": (lambda: flagops.hadamard(torch.zeros(2, 0)), ValueError, "0 channels, expected a power of two"),
    "scale": (lambda: flagops.hadamard(X, float("inf")), ValueError, "a finite number or None"),
    "overlap": (lambda: flagops.fp8_fake_quantize(X[:2], out=X[1:]), ValueError, "out shares memory with x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
