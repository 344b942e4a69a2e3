"""PyTorch's own samples (OpInfo) of what replaced operators serve: under `flagops.enable` nothing but speed changes.

Values lie about as near to float64 as torch's; dtypes, shapes, strides, errors, ``out=``, gradients of first and second
order and tangents are torch's.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

import flagops

sys.path.insert(0, str(Path(__file__).parent))
from overriding import untouched, usable  # noqa: F401

NAMES = (
    *("mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot", "inner", "matmul", "__rmatmul__"),
    *("einsum", "tensordot", "linalg.multi_dot", "linalg.vecdot"),
    *("nn.functional.linear", "nn.functional.bilinear", "nn.functional.rms_norm"),
    *("nn.functional.scaled_dot_product_attention", "nn.functional.multi_head_attention_forward"),
)
OPS = [op for op in op_db if op.name in NAMES]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64)
CASES = [
    pytest.param(op, dtype, id=f"{op.name}{op.variant_test_name and '-' + op.variant_test_name}-{dtype}"[:80])
    for op in OPS
    for dtype in DTYPES
    if dtype in op.supported_dtypes("cpu")
]
DIFFERENTIABLE = [pytest.param(op, id=f"{op.name}{op.variant_test_name}") for op in OPS if op.supports_autograd]
BACKENDS = usable("numba")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
MOST = 12  # samples of an operator that has hundreds


def samples(op, dtype, **options):
    found = list(op.sample_inputs("cpu", dtype, **options))
    return found[:: max(1, -(-len(found) // MOST))]


def run(op, sample):
    torch.manual_seed(0)  # dropout is torch's
    return op(sample.input, *sample.args, **sample.kwargs)


def outcome(function):
    """What a call gives, or its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except Exception as error:
            return type(error), str(error).split("\n")[0]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def magnitudes(sample):
    """The largest product that one term of a result can be, and how many terms at most: what roundings scale with."""
    leaves = tree_leaves((sample.input, sample.args, sample.kwargs))
    tensors = [x.detach().abs().double() for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    size = 1.0
    for x in tensors:
        finite = x[x.isfinite()]
        size *= max(1.0, finite.max().item() if finite.numel() else 1.0)
    numbers = [abs(x) for x in leaves if isinstance(x, (int, float)) and not isinstance(x, bool)]
    for x in numbers:
        size *= max(1.0, x)
    return size, max([16, *(n for x in tensors for n in x.shape)])


def assert_same(got, expected, exact, sample, dtype):
    if not isinstance(expected, torch.Tensor):
        assert got == expected
        return
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    if not got.is_floating_point():
        torch.testing.assert_close(got, expected, equal_nan=True)
        return
    assert torch.equal(got.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    got, expected, exact = (x.detach().double()[finite] for x in (got, expected, exact))
    size, terms = magnitudes(sample)
    slack = 4 * terms**2 * max(UNIT[torch.float32], UNIT[dtype] / terms) * (1 + size)
    if dtype == torch.float64:
        slack = 4 * terms**2 * UNIT[dtype] * (1 + size)
    assert ((got - exact).abs() <= (expected - exact).abs() + slack).all()


@pytest.mark.drawn
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_values_layouts_and_out(op, dtype, backend):
    for sample in samples(op, dtype):
        plain = outcome(lambda: run(op, sample))  # noqa: B023
        exact = outcome(lambda: run(op, sample.transform(wide)))  # noqa: B023
        with flagops.enable(backend=backend):
            twice = [outcome(lambda: run(op, sample)) for _ in range(2)]  # noqa: B023
        for got in twice:
            tree_map(lambda *each: assert_same(*each, sample, dtype), got, plain, exact)  # noqa: B023
        if op.supports_out and isinstance(plain, torch.Tensor):
            for out in (torch.empty_like(plain), torch.empty(0, dtype=plain.dtype), plain.new_empty(3, 7)[:0]):
                calls = [outcome(lambda: op.op(sample.input, *sample.args, **sample.kwargs, out=out.clone()))]  # noqa: B023
                with flagops.enable(backend=backend):
                    calls.append(outcome(lambda: op.op(sample.input, *sample.args, **sample.kwargs, out=out.clone())))  # noqa: B023
                tree_map(lambda *each: assert_same(*each, sample, dtype), calls[1], calls[0], exact)  # noqa: B023


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS if op.error_inputs_func is not None])
def test_errors(op):
    for case in op.error_inputs("cpu"):
        plain = outcome(lambda: run(op, case.sample_input))  # noqa: B023
        with flagops.enable(backend=BACKENDS):
            got = outcome(lambda: run(op, case.sample_input))  # noqa: B023
        if isinstance(plain, tuple) and isinstance(plain[0], type):
            assert got == plain


def derivatives(op, sample, second):
    leaves = [x for x in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
    leaves = [x for x in leaves if x.requires_grad]
    results = [x for x in tree_leaves(run(op, sample)) if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum((x * x.detach()).sum() for x in results)
    first = torch.autograd.grad(total, leaves, create_graph=second, allow_unused=True)
    if not second:
        return first
    again = sum((g * g).sum() for g in first if g is not None and g.requires_grad)
    if not isinstance(again, torch.Tensor):
        return first
    return *first, *torch.autograd.grad(again, leaves, allow_unused=True)


def tangents(op, sample):
    with forward_ad.dual_level():
        dual = sample.transform(
            lambda x: forward_ad.make_dual(x, x.cos()) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        )
        results = tree_leaves(run(op, dual))
        return [forward_ad.unpack_dual(x).tangent for x in results if isinstance(x, torch.Tensor)]


@pytest.mark.drawn
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_derivatives(op):
    """First and second derivatives and tangents in float64, where torch has them."""
    for sample in samples(op, torch.float64, requires_grad=True)[:8]:
        size, terms = magnitudes(sample)
        near = 2.0**-53 * (4 * terms * (1 + size)) ** 3
        for function in (
            lambda: derivatives(op, sample, False),  # noqa: B023
            lambda: derivatives(op, sample, True),  # noqa: B023
            lambda: tangents(op, sample.transform(lambda x: x.detach() if isinstance(x, torch.Tensor) else x)),  # noqa: B023
        ):
            plain = outcome(function)
            with flagops.enable(backend=BACKENDS):
                got = outcome(function)
            assert len(got) == len(plain)
            for ours, theirs in zip(got, plain, strict=True):
                if not isinstance(theirs, torch.Tensor):
                    assert ours == theirs
                else:
                    scale = 1 + theirs.abs().max().item() if theirs.numel() else 1
                    assert ((ours - theirs).abs() <= near * scale).all()
