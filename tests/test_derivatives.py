"""Derivatives of explicit calls in every mode that torch has, held to finite differences in float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import flagops
from flagops import registry
from flagops.call import of

sys.path.insert(0, str(Path(__file__).parent))
from drawing import small_call
from test_torch_ops import DIFFERENTIABLE

OTHERS = [name for name in registry.operators() if name not in DIFFERENTIABLE]


def function(name, backend=None, seed=0):
    """A call as a function of its real tensors in float64, which gives its real results, and those tensors."""
    torch.manual_seed(seed)
    op, args = registry.operator(name), list(small_call(name, grad=False))
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def call(*given):
        full = list(args)
        for place, x in zip(places, given, strict=True):
            full[place] = x
        return tuple(x for x in op.each(of(op)(*full, backend=backend)) if x.is_floating_point())

    return call, tuple(args[place] for place in places)


def weighed(call):
    """One number of all results, each element weighed differently."""

    def total(*given):
        return sum((x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in call(*given))

    return total


def close(got, expected):
    """Two float64 computations of one derivative, in sums of some hundred terms that may cancel."""
    weight = expected.abs().max().clamp_min(1)
    return bool(((got - expected).abs() <= 2.0**-53 * 2**16 * weight).all())


@pytest.mark.drawn
@pytest.mark.operators(*DIFFERENTIABLE)
def test_first_derivatives(kernel):
    call, given = function(*kernel)
    given = tuple(x.requires_grad_() for x in given)
    assert gradcheck(
        call,
        given,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_element_of_the_first_derivatives(name):
    call, given = function(name, "torch")
    assert gradcheck(call, tuple(x.requires_grad_() for x in given), check_forward_ad=True)


@pytest.mark.operators(*DIFFERENTIABLE)
def test_forward_derivatives_of_each_argument(kernel):
    """A level of duals and `torch.func.jvp` agree with the sum over the arguments, one at a time."""
    call, given = function(*kernel)
    tangents = [torch.randn_like(x) for x in given]
    results, whole = jvp(call, given, tuple(tangents))
    parts = []
    for place, tangent in enumerate(tangents):
        with forward.dual_level():
            duals = [forward.make_dual(x, tangent) if i == place else x for i, x in enumerate(given)]
            parts.append([forward.unpack_dual(y).tangent for y in call(*duals)])
    for i, (result, expected) in enumerate(zip(results, call(*given), strict=True)):
        assert torch.equal(result, expected)
        found = [part[i] for part in parts if part[i] is not None]
        assert close(torch.stack(found).sum(0), whole[i])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_half_tangents_have_the_dtype_of_results_and_are_near(name):
    op = registry.operator(name)
    torch.manual_seed(0)
    args = small_call(name, grad=False, dtype=torch.bfloat16)
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def tangents(inputs):
        def call(*given):
            full = list(inputs)
            for place, x in zip(places, given, strict=True):
                full[place] = x
            return tuple(x for x in op.each(of(op)(*full)) if x.is_floating_point())

        given = tuple(inputs[place] for place in places)
        return call(*given), jvp(call, given, given)[1]

    wide = [x.double() if i in places else x for i, x in enumerate(args)]
    for result, got, expected in zip(*tangents(args), tangents(wide)[1], strict=True):
        assert got.dtype == result.dtype
        assert (got.double() - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name):
    call, given = function(name)
    given = tuple(x.requires_grad_() for x in given)
    assert gradgradcheck(call, given, fast_mode=True, atol=1e-6)
    assert gradgradcheck(
        call,
        given,
        fast_mode=True,
        atol=1e-6,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_of_torch_func(name):
    call, given = function(name)
    total, every = weighed(call), tuple(range(len(given)))
    recorded = [x.clone().requires_grad_() for x in given]
    expected = torch.autograd.grad(total(*recorded), recorded)
    by_grad = grad(total, argnums=every)(*given)
    _, pull = vjp(total, *given)
    for found in (by_grad, pull(torch.ones((), dtype=torch.float64)), jacrev(total, argnums=every)(*given)):
        assert all(map(close, found, expected))
    stacked = [torch.stack([x, x]) for x in given]
    assert all(close(x[1], y) for x, y in zip(vmap(grad(total, argnums=every))(*stacked), expected, strict=True))
    pushed, moved = linearize(total, *given)
    assert close(pushed, total(*given))
    along = tuple(torch.randn_like(x) for x in given)
    assert close(moved(*along), sum((g * t).sum() for g, t in zip(expected, along, strict=True)))
    assert close(jvp(total, given, along)[1], moved(*along))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_through_nested_transforms(name):
    """Whatever is inside of what, the product of the Hessian with a direction is that of two plain backwards."""
    call, given = function(name)
    total, every = weighed(call), tuple(range(len(given)))
    along = tuple(torch.randn_like(x) for x in given)
    recorded = [x.clone().requires_grad_() for x in given]
    first = torch.autograd.grad(total(*recorded), recorded, create_graph=True)
    wanted = torch.autograd.grad(first, recorded, along, allow_unused=True, materialize_grads=True)

    def slope(*xs):
        return jvp(total, xs, along)[1]

    by_grad, gradient = grad(total, argnums=every), [x.clone().requires_grad_() for x in given]
    _, pull = vjp(by_grad, *given)
    torch.autograd.backward(by_grad(*gradient), along)
    found = {
        "forward over reverse": jvp(by_grad, given, along)[1],
        "reverse over reverse": pull(along),
        "reverse over forward": grad(slope, argnums=every)(*given),
        "a backward over torch.func.grad": [torch.zeros_like(x) if x.grad is None else x.grad for x in gradient],
    }
    for how, parts in found.items():
        assert all(map(close, parts, wanted)), how


@pytest.mark.parametrize("name", ["rms_norm", "moe_gate"])
def test_jacobians_and_hessians(name):
    call, given = function(name)
    total = weighed(call)
    backward, moving = jacrev(call)(*given), jacfwd(call)(*given)
    assert all(map(close, backward, moving))
    for strategy in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(call, given, vectorize=True, strategy=strategy)
        assert all(close(x[0], y) for x, y in zip(found, backward, strict=True))
    expected = torch.autograd.functional.hessian(total, given)[0][0]
    for found in (hessian(total)(*given), jacrev(jacrev(total))(*given), jacrev(jacfwd(total))(*given)):
        assert close(found, expected)


def test_batched_gradients():
    a, b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    basis = torch.eye(15, dtype=torch.float64).view(15, 3, 5)
    (rows,) = torch.autograd.grad(flagops.matmul(a, b), a, basis, is_grads_batched=True)
    assert close(rows, torch.einsum("bmn,kn->bmk", basis, b))


def test_what_there_is_no_derivative_of_raises():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def total(x):
        return flagops.rms_norm(x).square().sum()

    with pytest.raises(NotImplementedError, match=r"flagops\.rms_norm has no third derivative"):
        jacrev(hessian(total))(a)
    with pytest.raises(NotImplementedError, match=r"flagops\.rms_norm has no second derivative in forward mode"):
        jacfwd(jacfwd(total))(a)
    assert hessian(lambda x: flagops.matmul(x, b).square().sum())(a).shape == (3, 4, 3, 4)


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_forward_derivative_raises_before_anything_runs(name):
    op, args = registry.operator(name), small_call(name, grad=False, dtype=torch.float32)
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    ran = sum(flagops.coverage(name)["calls"].values())
    for place in places:
        with forward.dual_level():
            duals = [forward.make_dual(x, torch.ones_like(x)) if i == place else x for i, x in enumerate(args)]
            if all(tensor.dtypes == ("int32",) for tensor in op.results.values()):
                of(op)(*duals)  # indices have no tangent
                continue
            with pytest.raises(NotImplementedError, match=rf"flagops\.{name} has no forward derivative"):
                of(op)(*duals)
            assert sum(flagops.coverage(name)["calls"].values()) == ran


def test_out_is_refused_where_a_tensor_has_a_tangent():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with forward.dual_level():
        dual, out = forward.make_dual(a, torch.ones_like(a)), forward.make_dual(torch.empty(3, 5), torch.ones(3, 5))
        with pytest.raises(ValueError, match="out= cannot be used where a tensor has a tangent"):
            flagops.matmul(dual, b, out=torch.empty(3, 5))
        with pytest.raises(ValueError, match="out= cannot be used where a tensor has a tangent"):
            flagops.matmul(a, b, out=out)
        flagops.matmul(a, b, out=torch.empty(3, 5))
