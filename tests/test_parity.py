"""Every kernel against its reference, on cases that hypothesis draws from the operator's card."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flagops
from flagops import registry, testing
from flagops.call import of
from flagops.errors import Unsupported

PLAIN = ("numpy", "triton")  # one thread at a time, in NumPy's own kernels or Triton's interpreter


def _hold(kernel, judge, share=1):
    operator, backend = registry.operator(kernel[0]), kernel[1]
    within = testing.scope(backend)
    kinds = testing.kinds_of(backend)
    ran = 0
    examples = within.examples * settings().max_examples // (100 * share)  # of those in the backend's scope

    @settings(max_examples=max(1, examples), suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        nonlocal ran
        case = testing.draw_case(operator, lambda options: data.draw(st.sampled_from(options)), within, kinds)
        try:
            judge(operator, backend, case)
            ran += 1
        except Unsupported:
            return

    run()
    assert ran > 0, f"{kernel} refused every case"


def test_kernel_equals_its_reference(kernel):
    _hold(kernel, testing.assert_parity)


def test_kernel_keeps_what_it_declares(kernel):
    repeats = 3 if kernel[1] in PLAIN and not torch.cuda.is_available() else 20
    _hold(kernel, functools.partial(testing.assert_facts, repeats=repeats), share=5)


@pytest.mark.operators("matmul", "linear")
def test_exact_products_of_small_integers_are_equal_bit_for_bit(kernel, rng):
    """Sums of small integers are exact in every order: any wrong index, mask or stride shows without a tolerance."""
    operator, backend = kernel
    large = [(130, 65, 257), (1, 1030, 2100), (300, 2100, 3000)]
    shapes = [(33, 17, 65)] if backend in PLAIN and not torch.cuda.is_available() else large
    for m, n, k in shapes:
        a, b = (torch.from_numpy(rng.integers(-1, 2, shape)) for shape in ((m, k), (n, k)))
        exact = a.double() @ b.double().T
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x, y = a.to(dtype), b.to(dtype)
            got = (
                flagops.matmul(x, y.T, backend=backend)
                if operator == "matmul"
                else flagops.linear(x, y, backend=backend)
            )
            wrong = torch.nonzero(got != exact.to(dtype))
            assert not len(wrong), f"{dtype} {(m, n, k)} differs at {wrong[:3].tolist()}"


@pytest.mark.operators("fp4_dequantize")
def test_every_fp4_byte_with_every_scale_byte(kernel):
    operator, backend = kernel
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    _exhaustive(registry.operator(operator), backend, {"packed": packed, "scale": scale})


@pytest.mark.operators("fp8_dequantize")
def test_every_fp8_byte_with_every_scale_byte(kernel):
    operator, backend = kernel
    weight = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.arange(256, dtype=np.uint8)[:, None]
    _exhaustive(registry.operator(operator), backend, {"weight": weight, "scale": scale, "block": (1, 256)})


def _exhaustive(operator, backend, arguments):
    from flagops.arrays import as_numpy

    for dtype in ("bfloat16", "float16", "float32"):
        inputs = {**arguments, "dtype": dtype}
        given_ = [testing.as_kind(x, "torch") for x in inputs.values()]
        got = as_numpy(of(operator)(*given_, backend=backend))
        testing.assert_bits(got, operator.reference(*inputs.values()), f"{operator.name} on {backend}, {dtype}")
