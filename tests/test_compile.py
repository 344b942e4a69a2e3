"""Explicit calls under `torch.compile`: numbers that change, settings within, and ``out=`` as in eager calls."""

import sys
from pathlib import Path

import pytest
import torch

import flagops
from flagops import registry
from flagops.call import of

sys.path.insert(0, str(Path(__file__).parent))
from drawing import small_call

A, B = torch.arange(12.0).view(3, 4) / 7, torch.arange(20.0).view(4, 5) / 9


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", **({"fullgraph": True} | options))


def reals(op):
    return [name for name, scalar in op.scalars.items() if scalar.torch == "float"]


@pytest.mark.drawn
@pytest.mark.parametrize("name", [name for name, op in registry.operators().items() if reals(op)])
def test_numbers_may_change_under_dynamic_shapes(name):
    torch.manual_seed(0)
    op = registry.operator(name)
    args = list(op.fill(tuple(small_call(name, grad=False, dtype=torch.float32)), {})[:-1])
    call = compiled(of(op), dynamic=True)
    for factor in (1.0, 0.5, 0.25):
        given = [x * factor if op.inputs[i] in reals(op) else x for i, x in enumerate(args)]
        for got, expected in zip(op.each(call(*given)), op.each(of(op)(*given)), strict=True):
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_a_default_number_under_dynamic_shapes():
    assert torch.equal(compiled(lambda x: flagops.rms_norm(x), dynamic=True)(A), flagops.rms_norm(A))


def test_a_number_that_does_not_fit_is_refused_under_compile():
    call = compiled(lambda x, eps: flagops.rms_norm(x, None, eps), dynamic=True)
    call(A, 1e-5)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="eps must be a finite number"):
        call(A, float("inf"))


def test_settings_within_a_compiled_function_hold():
    def function(x):
        with flagops.using(backend="numpy"):
            y = flagops.matmul(x, B)
        return y + 1

    before = flagops.coverage("matmul")["calls"]
    got = compiled(function, fullgraph=False)(A)
    after = flagops.coverage("matmul")["calls"]
    assert {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)} == {"numpy": 1}
    assert torch.equal(got, flagops.matmul(A, B, backend="numpy") + 1)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"flagops\.using cannot be part of a graph"):
        compiled(function)(A)


def test_settings_around_a_compiled_function_hold():
    function = compiled(lambda x: flagops.matmul(x, B) + 1)
    for backend in ("numpy", "numba", "numpy"):
        before = flagops.coverage("matmul")["calls"].get(backend, 0)
        with flagops.using(backend=backend):
            function(A)
        assert flagops.coverage("matmul")["calls"][backend] == before + 1


@pytest.mark.drawn
@pytest.mark.parametrize("name", registry.operators())
def test_out_is_written_to(name):
    torch.manual_seed(0)
    op, args = registry.operator(name), small_call(name, grad=False, dtype=torch.float32)
    expected = op.each(of(op)(*args))
    outs = [torch.empty_like(x) for x in expected]

    def call(args, outs):
        result = of(op)(*args, out=tuple(outs) if op.several else outs[0])
        return op.each(result)[0]

    got = compiled(call)(args, outs)
    for x, y in zip((got, *outs), (expected[0], *expected), strict=True):
        bits = [z.view(torch.uint8) if z.dtype.itemsize == 1 else z.nan_to_num() for z in (x, y)]
        assert torch.equal(*bits)


@pytest.mark.drawn
def test_inductor_writes_to_out():
    out = torch.empty(3, 5)
    got = torch.compile(lambda a, b, out: flagops.matmul(a, b, out=out) + 1, fullgraph=True)(A, B, out)
    assert torch.equal(got, flagops.matmul(A, B) + 1)
    assert torch.equal(out, flagops.matmul(A, B))


def test_a_result_may_take_the_place_the_card_gives_it():
    gate = A.clone()
    compiled(lambda gate, up: flagops.swiglu(gate, up, out=gate))(gate, A)
    assert torch.equal(gate, flagops.swiglu(A, A))


SQUARE = torch.ones(4, 4)
REFUSED = {
    "shape": (lambda: (A, B, torch.empty(5, 3)), r"out has shape \(5, 3\), expected \(3, 5\)"),
    "dtype": (lambda: (A, B, torch.empty(3, 5).half()), "out is float16, expected float32"),
    "expanded": (lambda: (A, B, torch.empty(1, 5).expand(3, 5)), "stride of 0"),
    "the input": (lambda: (SQUARE, SQUARE.clone(), SQUARE), "out shares memory with a"),
    "a view of it": (lambda: (SQUARE, SQUARE.clone(), SQUARE.t()), "out shares memory with a"),
    "a gradient": (lambda: (A.clone().requires_grad_(), B, torch.empty(3, 5)), "out= cannot be used where a gradient"),
    "a history": (lambda: (A, B, torch.empty(3, 5).requires_grad_()), "out requires a gradient"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_out_is_checked_as_in_eager_calls(what):
    make, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words):
        flagops.matmul(*make())
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=words):
        compiled(lambda a, b, out: flagops.matmul(a, b, out=out))(*make())


def test_memory_shared_within_the_graph_is_seen():
    def function(a, b):
        return flagops.matmul(a[:4], b, out=a[2:6])

    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="out shares memory with a"):
        compiled(function)(torch.ones(8, 4), torch.ones(4, 4))
    compiled(lambda a, b: flagops.matmul(a[:4], b, out=a[4:]))(torch.ones(8, 4), torch.ones(4, 4))
