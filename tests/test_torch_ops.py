"""Gradients, and torch.ops.flagops.* under tracing."""

import os
import sys

import pytest
import torch
from torch.library import opcheck

import flagops
from flagops import registry, testing, torch_ops

sys.path.insert(0, os.path.dirname(__file__))
from drawing import small_call


def _has_backward(name):
    return bool(registry.written(name, "torch")) and registry.find(name, "torch").backward is not None


DIFFERENTIABLE = [name for name in registry.operators() if _has_backward(name)]


def _floats(name, result):
    """The results that carry a gradient."""
    return [x for x in registry.operator(name).each(result) if x.is_floating_point()]


def _total(name, result):
    """A number that depends on every result, and on each element differently."""
    return sum((x.double() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in _floats(name, result))


@pytest.mark.drawn
@pytest.mark.parametrize("name", registry.operators())
def test_opcheck(name):
    opcheck(getattr(torch.ops.flagops, name).default, small_call(name, grad=name in DIFFERENTIABLE))


@pytest.mark.operators(*DIFFERENTIABLE)
def test_gradients_reach_only_what_asks(kernel):
    name, backend = kernel
    full = small_call(name)
    everything = _total(name, getattr(flagops, name)(*full, backend=backend))
    wanted = torch.autograd.grad(everything, [x for x in full if isinstance(x, torch.Tensor) and x.requires_grad])
    for position, x in enumerate(x for x in full if isinstance(x, torch.Tensor) and x.requires_grad):
        args = [y if y is x or not isinstance(y, torch.Tensor) else y.detach() for y in full]
        (got,) = torch.autograd.grad(_total(name, getattr(flagops, name)(*args, backend=backend)), [x])
        testing.assert_near(got, wanted[position], 1000, wanted[position].abs().max())  # sums in another order


@pytest.mark.drawn
@pytest.mark.operators(*DIFFERENTIABLE)
def test_half_gradients_have_the_inputs_dtype_and_are_near(kernel):
    torch.manual_seed(0)  # always the same: a draw beside a kink, such as a clamp's, has another slope once rounded
    name, backend = kernel
    args = small_call(name, dtype=torch.bfloat16)
    wide = [
        x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    ]
    _total(name, getattr(flagops, name)(*args, backend=backend)).backward()
    _total(name, getattr(flagops, name)(*wide, backend="torch")).backward()
    pairs = [(x, y.grad) for x, y in zip(args, wide, strict=True) if isinstance(x, torch.Tensor) and x.requires_grad]
    largest = max(float(slope.abs().max()) for _, slope in pairs)  # one element's own may be what cancelling left
    for x, slope in pairs:
        assert x.grad.dtype == x.dtype
        assert torch.allclose(x.grad.double(), slope, rtol=0.1, atol=0.05 * largest)


def test_what_has_no_gradient_raises_before_running():
    scale = torch.ones(1, 1, requires_grad=True)
    with pytest.raises(flagops.Unsupported, match="no backward"):
        flagops.fp8_dequantize(torch.zeros(3, 3, dtype=torch.uint8), scale)
    with torch.no_grad():
        assert flagops.fp8_dequantize(torch.zeros(3, 3, dtype=torch.uint8), scale).shape == (3, 3)


def test_out_is_refused_where_a_gradient_is_recorded():
    a, out = torch.randn(3, 3, requires_grad=True), torch.empty(3, 3)
    with pytest.raises(ValueError, match="out= cannot be used where a gradient is recorded"):
        flagops.matmul(a, a, out=out)
    with torch.no_grad():
        flagops.matmul(a, a, out=out)
    assert not out.requires_grad


@pytest.mark.drawn
@pytest.mark.parametrize("name", registry.operators())
def test_compile_keeps_the_call_in_one_graph(name):
    args = small_call(name, grad=False, dtype=torch.float32)
    function, several = getattr(flagops, name), registry.operator(name).several

    def run(*args):
        results = function(*args)
        return [x.float() * 1 for x in (results if several else (results,))]

    torch._dynamo.reset()  # it compiles one function only so many times
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args), run(*args), strict=True):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_compile_trains():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.compile(lambda a, b: flagops.matmul(a, b).sum(), fullgraph=True, backend="aot_eager")(a, b).backward()
    testing.assert_near(a.grad, b.detach().sum(1).expand(3, 4), 10, b.detach().abs().sum(1).expand(3, 4))


@pytest.mark.drawn
def test_inductor_runs_our_kernel():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    before = flagops.coverage("matmul")["calls"].get("numba", 0)
    with flagops.using(backend="numba"):
        got = torch.compile(lambda a, b: flagops.matmul(a, b) + 1, fullgraph=True)(a, b)
    testing.assert_near(got, a @ b + 1, 10, a.abs() @ b.abs() + 1)
    assert flagops.coverage("matmul")["calls"]["numba"] == before + 1


def test_transforms_and_subclasses_go_through_torch():
    a, b = torch.randn(6, 3, 4), torch.randn(4, 5)
    testing.assert_of("matmul", torch.func.vmap(lambda x: flagops.matmul(x, b))(a), a, b)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = flagops.matmul(mode.from_tensor(a), mode.from_tensor(b))
    assert fake.shape == (6, 3, 5)
    assert flagops.matmul(a.to("meta"), b.to("meta")).device.type == "meta"


def test_schema_names_what_the_card_names():
    for op in registry.operators().values():
        arguments = getattr(torch.ops.flagops, op.name).default._schema.arguments
        assert [argument.name for argument in arguments] == [*op.inputs, "backend"]
        assert len(getattr(torch.ops.flagops, op.name).default._schema.returns) == len(op.results)
        assert torch_ops.schema(op).endswith(")" if op.several else "-> Tensor")
