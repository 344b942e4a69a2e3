"""Laws of the products with FP8 and FP4 weights, and of the projection made of them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from flagops.reference._rounding import round_to
from flagops.reference.qmatmul import along, e2m1, e4m3, tiled
from hypothesis import given
from hypothesis import strategies as st

import flagops
from flagops import arrays, config, layouts, registry, testing
from flagops.tools import measure

WHOLE = np.array([0, 1, 2, 3, 4, -1, -2, -3, -4], ml_dtypes.float8_e4m3fn).view(np.uint8)


def call(operator, backend, *inputs):
    given = [testing.as_kind(x, "torch") for x in inputs]
    return arrays.as_numpy(getattr(flagops, operator)(*given, backend=backend))


def small(backend):
    return testing.scope(backend) is testing.INTERPRETED


def whole(operator, m, n, k, rng):
    """Small whole numbers, and scales near 1: every order of the sums is exact."""
    a = rng.choice(WHOLE, (m, k))
    a_scale = rng.integers(126, 129, (m, -(-k // 128)), dtype=np.uint8)
    if operator == "fp8_matmul":
        b, b_scale = rng.choice(WHOLE, (n, k)), rng.integers(126, 129, (-(-n // 128), -(-k // 128)), dtype=np.uint8)
    else:
        b, b_scale = (
            rng.integers(0, 256, (n, k // 2), dtype=np.uint8),
            rng.integers(126, 129, (n, k // 32), dtype=np.uint8),
        )
    return a, a_scale, b, b_scale


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
def test_exact_sums_are_equal_bit_for_bit(kernel, rng):
    operator, backend = kernel
    shapes = [(3, 130, 160)] if small(backend) else [(1, 300, 1184), (2, 131, 544), (133, 260, 640)]
    for m, n, k in shapes:
        inputs = whole(operator, m, n, k, rng)
        exact = registry.operator(operator).reference(*inputs)
        for dtype in ("bfloat16", "float16", "float32"):
            testing.assert_bits(call(operator, backend, *inputs, dtype), round_to(exact, dtype), f"{dtype} {(m, n, k)}")


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
def test_float_activations_lose_nothing_before_they_are_multiplied(kernel, rng):
    """One in each row, with all the bits of its dtype: a product of few terms is exact in float32."""
    operator, backend = kernel
    _, _, b, b_scale = whole(operator, 1, 33, 160, rng)
    for dtype, bits in (("bfloat16", 8), ("float16", 11), ("float32", 20)):
        a = np.zeros((5, 160))
        a[range(5), rng.integers(0, 160, 5)] = 1 + 2.0 ** (1 - bits)
        a = a.astype(arrays.numpy_dtype(dtype))
        exact = registry.operator(operator).reference(a, None, b, b_scale)
        given = [testing.as_kind(x, "torch") for x in (a, b, b_scale)]
        got = getattr(flagops, operator)(given[0], None, *given[1:], "float32", backend=backend)
        testing.assert_bits(arrays.as_numpy(got), round_to(exact, "float32"), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_scales_belong_to_codes_alone(dtype, rng):
    a, a_scale, b, b_scale = (torch.from_numpy(x) for x in whole("fp8_matmul", 2, 3, 160, rng))
    given = (a.to(torch.bfloat16), a_scale) if dtype == "bfloat16" else (a, None)
    with pytest.raises(TypeError, match="a is"):
        flagops.fp8_matmul(*given, b, b_scale)


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
@pytest.mark.parametrize("name", ["a", "a_scale", "b", "b_scale"])
def test_columns_may_lie_beyond_what_32_bits_count(kernel, rng, name):
    """Steps from block to block along k, whose stride fits 32 bits where four of them do not."""
    operator, backend = kernel
    names = ("a", "a_scale", "b", "b_scale")
    inputs = dict(zip(names, whole(operator, 1, 1, 160, rng), strict=True))
    exact = registry.operator(operator).reference(*inputs.values())
    inputs[name] = layouts.put(inputs[name], "far").view
    got = call(operator, backend, *inputs.values(), "float32")
    testing.assert_bits(got, round_to(exact, "float32"), f"{name} with strides {inputs[name].strides}")


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
def test_unit_vectors_give_every_weight(kernel):
    """Every byte, under scales from one end to the other: what a row that is 1 in one place picks out is the weight."""
    operator, backend = kernel
    a, one = np.zeros((32, 32), np.uint8), np.full((1, 1), 127, np.uint8)
    a[range(32), range(32)] = 0x38
    codes = np.arange(256, dtype=np.uint8)
    if operator == "fp8_matmul":
        codes[codes & 0x7F == 0x7F] = 0
        b, blocks = codes.reshape(8, 32), (1, 1)
    else:
        b, blocks = codes.reshape(16, 16), (16, 1)
    for byte in (1, 60, 127, 128, 200, 244):
        scale = np.full(blocks, byte, np.uint8)
        got = call(operator, backend, a, one, b, scale, "float32")
        exact = (e4m3(b) * tiled(scale, 8, 32)).T if operator == "fp8_matmul" else (e2m1(b) * along(scale, 32, 32)).T
        if registry.find(operator, backend).paired:  # to whose instruction subnormals are zeros
            exact = np.where(np.abs(exact) < 2.0**-126, 0, exact)
        assert np.array_equal(got, exact), byte


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
def test_a_nan_reaches_what_it_takes_part_in_and_nothing_else(kernel, rng):
    operator, backend = kernel
    m, n, k = 3, 150, 288
    zeros = whole(operator, m, n, k, rng)
    zeros[0][:] = 0
    places = [(0, (1, 200), np.s_[1, :]), (1, (2, 1), np.s_[2, :])]
    if operator == "fp8_matmul":
        places += [(2, (7, 280), np.s_[:, 7]), (3, (1, 2), np.s_[:, 128:])]
    else:
        places += [(3, (7, 8), np.s_[:, 7])]
    for which, at, reached in places:
        inputs = [x.copy() for x in zeros]
        inputs[which][at] = 0xFF
        expected = np.zeros((m, n), bool)
        expected[reached] = True
        assert np.array_equal(np.isnan(call(operator, backend, *inputs, "float32")), expected), which


@pytest.mark.operators("fp8_matmul", "fp4_matmul")
def test_the_formats_own_tolerance(kernel, rng):
    """The bound that is computed lies within what tensor cores are allowed."""
    operator, backend = kernel
    m, n, k = (2, 33, 256) if small(backend) else (5, 130, 1024)
    a, a_scale, b, b_scale = whole(operator, m, n, k, rng)
    a = rng.integers(0, 0x7F, a.shape, dtype=np.uint8)
    exact = registry.operator(operator).reference(a, a_scale, b, b_scale)
    weight = e4m3(b) * tiled(b_scale, n, k) if operator == "fp8_matmul" else e2m1(b) * along(b_scale, k, 32)
    absolute = (e4m3(a) * along(a_scale, k)) @ abs(weight).T
    got = call(operator, backend, a, a_scale, b, b_scale, "bfloat16").astype(float)
    assert (abs(got - exact) <= 2.0**-8 * abs(exact) + 2.0**-12 * absolute).all()


@pytest.mark.operators("fp8_matmul", "fp4_matmul", "grouped_output_projection")
def test_weights_are_never_expanded_as_a_whole(kernel):
    operator, backend = kernel
    if backend not in ("numba", "torch"):
        pytest.skip("only what runs at full size here")
    n, k = 4096, 4096
    generator = torch.Generator().manual_seed(0)
    if operator == "grouped_output_projection":
        codes = torch.randint(0, 0x70, (n, k), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
        scale = torch.full((32, 32), 120, dtype=torch.uint8)
        inputs = torch.randn(1, 8, k, generator=generator).bfloat16(), codes, codes, 8, scale, scale
    else:
        packed = 1 + (operator == "fp4_matmul")
        codes = torch.randint(0, 0x70, (n, k // packed), dtype=torch.uint8, generator=generator)
        scale = torch.full((n, k // 32) if packed == 2 else (n // 128, k // 128), 120, dtype=torch.uint8)
        inputs = codes[:1].repeat(1, packed), torch.full((k // 128,), 120, dtype=torch.uint8), codes, scale
    function = getattr(flagops, operator)
    with config.using(budget=4 << 20):
        function(*inputs, backend=backend)
        extra = measure.extra_memory(lambda: function(*inputs, backend=backend), calls=5)
    assert extra is None or extra < 24 << 20, f"{extra >> 20} MiB; expanded to bfloat16 the weight has 32"


@given(st.integers(0, 2**32 - 1))
def test_recoded_weights_give_the_same_product(seed):
    rng = np.random.default_rng(seed)
    a, a_scale, packed, _ = whole("fp4_matmul", 3, 128, 256, rng)
    scale = rng.integers(120, 130, (128, 8), dtype=np.uint8)
    weight, scales, lossless = flagops.fp4_to_fp8(packed, scale, backend="numpy")
    assert lossless.all()
    four, eight = (registry.operator(f"fp{n}_matmul").reference for n in (4, 8))
    assert np.array_equal(four(a, a_scale, packed, scale), eight(a, a_scale, weight.view(np.uint8), scales))


@pytest.mark.operators("grouped_output_projection")
def test_projection_with_fp8_weights_is_its_parts(kernel, rng):
    """Whole numbers keep z exact, so that nothing is left open of what is quantised."""
    _, backend = kernel
    groups, r, width, d = (2, 80, 40, 140)
    o = rng.integers(-2, 3, (3, 2 * groups, width // 2)).astype(np.float32)
    codes = {
        name: rng.choice(WHOLE, shape).view(ml_dtypes.float8_e4m3fn)
        for name, shape in (("wo_a", (groups * r, width)), ("wo_b", (d, groups * r)))
    }
    scale = {
        name: rng.integers(126, 129, shape, dtype=np.uint8) for name, shape in (("wo_a", (2, 1)), ("wo_b", (2, 2)))
    }
    plain = {n: (x.astype(np.float32) * tiled(scale[n], *x.shape)).astype(np.float32) for n, x in codes.items()}
    z = flagops.grouped_output_projection(
        o, plain["wo_a"], np.eye(groups * r, dtype=np.float32), groups, backend="numpy"
    )
    for dtype in ("float16", "bfloat16", "float32"):
        kept = arrays.numpy_dtype(dtype)
        code, factor = flagops.fp8_quantize(np.pad(z, ((0, 0), (0, 96))).astype(kept), backend="numpy")
        a = code[:, : groups * r].copy()
        expected = flagops.fp8_matmul(a, factor, codes["wo_b"], scale["wo_b"], dtype, backend="numpy")
        weights = codes["wo_a"], codes["wo_b"], groups, scale["wo_a"], scale["wo_b"]
        got = call("grouped_output_projection", backend, o.astype(kept), *weights)
        testing.assert_bits(got, expected, dtype)


def test_projection_with_fp8_weights_has_a_gradient_for_the_activations():
    torch.manual_seed(0)
    o = torch.randn(3, 4, 8, requires_grad=True)
    weights = torch.randint(0, 0x70, (2, 6, 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    wo_a, wo_b = weights[0], weights[1, :, :6]
    one = torch.full((1, 1), 120, dtype=torch.uint8)
    for backend in ("torch", "numba"):
        flagops.grouped_output_projection(o, wo_a, wo_b, 2, one, one, backend=backend).sum().backward()
        got, o.grad = o.grad, None
        plain = (w.float() * 2.0**-7 for w in (wo_a, wo_b))
        flagops.grouped_output_projection(o, *plain, 2, backend="torch").sum().backward()
        assert torch.equal(got, o.grad)  # both are the torch backend's
        o.grad = None
