"""Laws of quantisation to integers of eight bits and of the products with exact sums."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from flagops.reference._rounding import round_to

import flagops
from flagops import arrays, registry, testing
from flagops.backends import numba

DEEPEST = 131_071


def call(operator, backend, *inputs):
    given = [testing.as_kind(x, "torch") if isinstance(x, np.ndarray) else x for x in inputs]
    return getattr(flagops, operator)(*given, backend=backend)


def drawn(rng, m, n, k):
    a, b = (rng.integers(-128, 128, (rows, k), np.int8) for rows in (m, n))
    return (
        a,
        np.ldexp(1, rng.integers(-3, 4, (m, 1))).astype("f"),
        b,
        np.ldexp(1, rng.integers(-3, 4, (n, 1))).astype("f"),
    )


@pytest.mark.operators("int8_matmul")
def test_sums_are_exact(kernel, rng):
    """Under powers of two only the result is rounded."""
    _, backend = kernel
    small = testing.scope(backend) is testing.INTERPRETED
    for m, n, k in [(3, 70, 130)] if small else [(1, 300, 4100), (2, 131, 2048), (133, 260, 640), (70, 9, 1)]:
        a, a_scale, b, b_scale = drawn(rng, m, n, k)
        exact = (a.astype(np.int64) @ b.T.astype(np.int64)) * a_scale.astype(float) * b_scale.T
        for dtype in ("bfloat16", "float16", "float32"):
            got = arrays.as_numpy(call("int8_matmul", backend, a, a_scale, b, b_scale, dtype))
            testing.assert_bits(got, round_to(round_to(exact, "float32"), dtype), f"{dtype} {(m, n, k)}")


@pytest.mark.operators("int8_matmul")
@pytest.mark.parametrize("code", [-128, 127])
def test_the_longest_sums_fit(kernel, code):
    _, backend = kernel
    if testing.scope(backend) is testing.INTERPRETED:
        pytest.skip("a thousand steps of the interpreter")
    a, one = np.full((2, DEEPEST), -128, np.int8), np.ones((2, 1), np.float32)
    got = arrays.as_numpy(call("int8_matmul", backend, a, one, np.full_like(a, code), one, "float32"))
    assert (got == np.float32(-128 * code * DEEPEST)).all()


def test_a_longer_sum_is_refused():
    a, one = np.zeros((1, DEEPEST + 1), np.int8), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="k is 131072, expected at most 131071"):
        flagops.int8_matmul(a, one, a, one)


@pytest.mark.operators("int8_quantize")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_code_is_kept(kernel, dtype):
    """Whole numbers up to 127 are their own codes under a scale of 1, and ties go to the even one."""
    _, backend = kernel
    x = np.concatenate([np.arange(-127, 128), [0.5, 1.5, 2.5, -0.5, -1.5]]).astype(arrays.numpy_dtype(dtype))[None]
    codes, scale = map(arrays.as_numpy, call("int8_quantize", backend, x))
    assert scale.tolist() == [[1]]
    assert codes[0].tolist() == [*range(-127, 128), 0, 2, 2, 0, -2]


@pytest.mark.operators("int8_quantize")
def test_the_error_is_half_a_step(kernel, rng):
    _, backend = kernel
    x = (rng.standard_normal((5, 67)) * np.exp2(rng.integers(-140, 100, (5, 1)))).astype(np.float32)
    codes, scale = map(arrays.as_numpy, call("int8_quantize", backend, x))
    scale = scale.astype(float)
    assert (abs(x - codes * scale) <= scale * (0.5 + 2.0**-16)).all()


def test_a_product_of_what_is_quantised(rng):
    """The error of a whole layer is that of its steps, half of one for each factor."""
    x, w = rng.standard_normal((4, 256)).astype("f"), rng.standard_normal((9, 256)).astype("f")
    (a, a_scale), (b, b_scale) = flagops.int8_quantize(x), flagops.int8_quantize(w)
    got = flagops.int8_matmul(a, a_scale, b, b_scale, "float32")
    steps = a_scale.astype(float) * abs(w).sum(1) + abs(x).sum(1, keepdims=True) * b_scale.T.astype(float)
    assert (abs(got - x.astype(float) @ w.T.astype(float)) <= 0.51 * steps + 64 * a_scale * b_scale.T).all()


@pytest.mark.drawn
@pytest.mark.skipif("+avx512vnni" not in numba.features(), reason="no AVX512-VNNI")
@pytest.mark.parametrize("masked", [False, True])
def test_the_instruction_is_used_unless_it_is_masked(masked, tmp_path):
    script = f"""
import flagops, numpy
from flagops.kernels.numba import int8
rng = numpy.random.default_rng({int.from_bytes(os.urandom(3))})
one = numpy.ones((70, 1), "f")
a, b = (rng.integers(-128, 128, (70, 2500), numpy.int8) for _ in range(2))
for rows in (1, 70):
    got = flagops.int8_matmul(a[:rows], one[:rows], b, one, "float32", backend="numba")
    assert (got == a[:rows].astype("d") @ b.T.astype("d")).all()
code = "".join(int8._multiply.inspect_asm().values())
assert ("vpdpwssd" in code) == {not masked}
"""
    mask = {"NUMBA_CPU_NAME": "x86-64-v4", "NUMBA_CPU_FEATURES": "+avx512f,+avx512bw,+avx512vl"} if masked else {}
    environment = os.environ | {"FLAGOPS_CACHE": os.devnull} | mask
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_sums_of_one_product(rng):
    """torch's own are wrong on a CPU."""
    a, b = rng.integers(-128, 128, (3, 1), np.int8), rng.integers(-128, 128, (5, 1), np.int8)
    one = torch.ones(5, 1)
    got = flagops.int8_matmul(torch.from_numpy(a), one[:3], torch.from_numpy(b), one, "float32", backend="torch")
    assert (got.numpy() == a.astype(float) @ b.T).all()


def test_a_row_of_any_stride(rng):
    """torch's own product goes by the stride of an axis of one element."""
    a, b = rng.integers(-128, 128, (257, 1), np.int8), rng.integers(-128, 128, (130, 257), np.int8)
    row, one = torch.from_numpy(a).mT, torch.ones(130, 1)
    got = flagops.int8_matmul(row, one[:1], torch.from_numpy(b), one, "float32", backend="torch")
    assert row.stride() == (1, 1)
    assert (got.numpy() == a.T.astype(float) @ b.T).all()


def test_the_bound_allows_three_roundings_and_the_result(rng):
    operator = registry.operator("int8_matmul")
    a, _, b, _ = drawn(rng, 5, 7, 300)
    a_scale, b_scale = (rng.uniform(0.5, 1, (rows, 1)).astype("f") for rows in (5, 7))
    named = dict(zip(operator.tensors, (a, a_scale, b, b_scale), strict=True))
    exact = operator.reference(*named.values())
    bound = operator.bound(exact, named, "float32")
    assert (bound <= 5 * 2.0**-24 * abs(exact) + 1e-30).all()
