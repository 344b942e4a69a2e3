"""What is active around an explicit call, and what its tensors have in memory: nothing of it is missed in silence."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flagops
from flagops import arrays, dispatch, registry, testing, torch_ops
from flagops.call import of

sys.path.insert(0, str(Path(__file__).parent))
from drawing import drawn, equal, results, tensors

OPERATORS = list(registry.operators())


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


class Boxed(torch.Tensor):
    """A tensor that keeps its elements in another one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unbox(x):
            return x.inner if isinstance(x, Boxed) else x

        result = function(*map(unbox, args), **{k: unbox(v) for k, v in (kwargs or {}).items()})
        if isinstance(result, torch.Tensor):
            return args[0] if function is torch.ops.aten.copy_.default else Boxed(result)
        return tuple(map(Boxed, result))


class Plain(torch.Tensor):
    """A class of its own with elements of its own."""


class Loud(torch.Tensor):
    """A class that says what is done with it."""

    calls = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_mode_sees_one_call(kernel):
    name, backend = kernel
    op, given = registry.operator(name), drawn(name, backend)
    expected = results(op, given, backend)
    with Seen() as outer, Seen() as inner, SeenFunctions() as functions:
        got = of(op)(*given, backend=backend)
    assert inner.calls == outer.calls == functions.calls == [f"flagops.{name}.default"]
    assert equal(op.each(got), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_modes_get_shapes(name):
    op, given = registry.operator(name), drawn(name)
    expected = op.each(of(op)(*given))
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = op.each(of(op)(*given))
    for fake, real in zip(got, expected, strict=True):
        assert type(fake).__name__ == "FakeTensor"
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_make_fx_and_jit_trace_record_the_call(name):
    op, given = registry.operator(name), drawn(name)
    places = [p for _, p in tensors(op, given)]

    def call(*some):
        full = list(given)
        for place, x in zip(places, some, strict=True):
            full[place] = x
        return of(op)(*full)

    some = [given[place] for place in places]
    traced = make_fx(call)(*some)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets[0] == getattr(torch.ops.flagops, name).default
    assert equal(op.each(traced(*some)), op.each(call(*some)))
    script = torch.jit.trace(call, some, check_trace=False)
    assert f"flagops::{name}" in str(script.graph)
    assert equal(op.each(script(*some)), op.each(call(*some)))


@pytest.mark.parametrize("name", OPERATORS)
def test_flops_are_counted_by_the_card(name):
    op, given = registry.operator(name), drawn(name)
    bound = op.bind((*given, None))
    with FlopCounterMode(display=False) as counter:
        of(op)(*given)
    assert counter.get_total_flops() == int(op.flops(bound.dims, bound.batch))


def test_flops_of_a_backward():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        flagops.matmul(a, b).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5


@pytest.mark.drawn
def test_flops_are_counted_by_a_counter_older_than_our_operators():
    script = """
        import sys, torch
        from torch.utils.flop_counter import FlopCounterMode
        counter = FlopCounterMode(display=False)
        import flagops
        flagops.matmul(torch.ones(3, 4), torch.ones(4, 5))
        assert "flagops.torch_ops" not in sys.modules
        with counter:
            flagops.matmul(torch.ones(3, 4), torch.ones(4, 5))
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "120", done.stderr


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_device_context_is_not_the_kernels(name, backend):
    op, given = registry.operator(name), drawn(name, backend)
    expected = results(op, given, backend)
    with torch.device("meta"):
        got = of(op)(*given, backend=backend)
    assert equal(op.each(got), expected)
    torch.set_default_device("meta")
    try:
        got = of(op)(*given, backend=backend)
    finally:
        torch.set_default_device(None)
    assert equal(op.each(got), expected)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_casts_nothing_inside_of_a_kernel(name, backend):
    op, given = registry.operator(name), drawn(name, backend)
    expected = results(op, given, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(op.each(of(op)(*given, backend=backend)), expected)


def test_autocast_casts_nothing_inside_of_a_backward():
    a, b = (torch.randn(33, 33, requires_grad=True) for _ in "ab")
    expected = torch.autograd.grad(flagops.matmul(a, b, backend="torch").sum(), (a, b))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(flagops.matmul(a, b, backend="torch").sum(), (a, b))
    assert equal(found, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_inference_mode(name):
    op, given = registry.operator(name), drawn(name)
    with torch.inference_mode():
        got = op.each(of(op)(*given))
    assert equal(got, op.each(of(op)(*given)))
    assert all(x.is_inference() for x in got)


def test_hooks_of_saved_tensors_are_called():
    saved = []
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        y = flagops.matmul(a, b)
    y.sum().backward()
    assert saved == [(3, 4), (4, 5)]


@pytest.mark.parametrize("eager_first", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_plans_of_eager_calls_are_not_those_of_transformed_ones(name, eager_first, monkeypatch):
    monkeypatch.setattr(dispatch, "_plans", {})
    op, given = registry.operator(name), drawn(name)
    places = [p for _, p in tensors(op, given)]

    def call(*some):
        full = list(given)
        for place, x in zip(places, some, strict=True):
            full[place] = x
        return of(op)(*full)

    some = [given[place] for place in places]
    other = [x.clone() if x.dtype.itemsize == 1 or not x.is_floating_point() else x.flip(0) * 0.5 for x in some]
    if eager_first:
        call(*some)
    batched = torch.vmap(call)(*[torch.stack([x, y]) for x, y in zip(some, other, strict=True)])
    functional = torch.func.functionalize(call)(*some)
    assert equal(op.each(functional), op.each(call(*some)))
    for i, slices in enumerate((some, other)):
        full = dict(zip(op.inputs, given, strict=True))
        full |= {op.inputs[place]: arrays.as_numpy(x) for place, x in zip(places, slices, strict=True)}
        got = tuple(arrays.as_numpy(x[i]) for x in op.each(batched))
        testing.compare(op, full, got if op.several else got[0], f"slice {i} of {name}")


def test_vmap_over_any_axis():
    a, b = torch.arange(24.0).view(3, 4, 2), torch.arange(20.0).view(4, 5)
    got = torch.vmap(lambda x: flagops.matmul(x, b), in_dims=-1, out_dims=1)(a)
    assert torch.equal(got, torch.einsum("mkj,kn->mjn", a, b))


def test_an_older_operation_notices_that_a_result_took_the_place_of_its_tensor(kernel):
    name, backend = kernel
    op, given = registry.operator(name), drawn(name, backend)
    outs = [torch.empty_like(x) for x in op.each(of(op)(*given, backend=backend))]
    before = [x._version for x in outs]
    of(op)(*given, out=tuple(outs) if op.several else outs[0], backend=backend)
    assert all(x._version > version for x, version in zip(outs, before, strict=True))


@pytest.mark.parametrize("backend", ["numba", "numpy", "torch"])
def test_a_gradient_through_an_overwritten_tensor_raises(backend):
    x, saved = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    loss = (x * saved).sum()
    flagops.swiglu(saved, saved.clone(), out=saved, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_out_with_a_history_is_refused(name):
    op, given = registry.operator(name), drawn(name)
    made = op.each(of(op)(*given))
    if not any(x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) for x in made):
        return  # no result can require a gradient
    for make in (lambda x: x.requires_grad_(), lambda x: x.requires_grad_() * 1):
        outs = [make(torch.empty_like(x)) if x.dtype.itemsize > 1 and x.is_floating_point() else x for x in made]
        out = tuple(outs) if op.several else outs[0]
        for mode in (torch.enable_grad(), torch.device("cpu")):
            with mode, pytest.raises(ValueError, match=f"{name}: out requires a gradient"):
                of(op)(*given, out=out)
        with torch.no_grad():
            of(op)(*given, out=out)
        assert equal(outs, made)


def test_out_that_is_not_what_its_memory_holds():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for backend in ("numba", "numpy", "torch"):
        out = torch.zeros(3, 5, dtype=torch.complex64).conj().imag
        assert flagops.matmul(a, b, out=out, backend=backend) is out
        assert out.is_neg()
        assert torch.equal(out, flagops.matmul(a, b, backend=backend))
    with torch.inference_mode():
        out = torch.empty(3, 5)
    with pytest.raises(ValueError, match="matmul: out is an inference tensor"):
        flagops.matmul(a, b, out=out)
    with torch.inference_mode():
        flagops.matmul(a, b, out=out)


def test_read_only_arrays_are_no_results():
    out = np.zeros((3, 5))
    for writeable in (True, False, True):
        out.flags.writeable = writeable
        if writeable:
            flagops.matmul(np.ones((3, 4)), np.ones((4, 5)), out=out)
        else:
            with pytest.raises(ValueError, match="out is read-only"):
                flagops.matmul(np.ones((3, 4)), np.ones((4, 5)), out=out)


def _lost(x, size):
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


def test_lost_memory_is_refused_before_anything_runs(kernel):
    name, backend = kernel
    op, given = registry.operator(name), drawn(name, backend)
    made = op.each(of(op)(*given, backend=backend))
    for size, words in ((0, "storage was freed"), (1, "storage was made smaller")):
        for argument, place in tensors(op, given):
            if given[place].numel() * given[place].element_size() > size:
                broken = [_lost(x, size) if i == place else x for i, x in enumerate(given)]
                with pytest.raises(ValueError, match=f"{name}: {argument} is a tensor whose {words}"):
                    of(op)(*broken, backend=backend)
        outs = [_lost(x, size) if x.numel() * x.element_size() > size else x for x in made]
        with pytest.raises(ValueError, match=f"{name}: out is a tensor whose {words}"):
            of(op)(*given, out=tuple(outs) if op.several else outs[0], backend=backend)


def test_memory_lost_before_the_backward_is_refused():
    for backend in ("numba", "torch"):
        a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        y = flagops.matmul(a, b, backend=backend)
        b.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="matmul: b is a tensor whose storage was freed"):
            y.sum().backward()


def test_a_view_into_lost_memory_is_refused():
    room = torch.randn(100, 4)
    view = room[90:93]
    room.untyped_storage().resize_(400)
    with pytest.raises(ValueError, match="matmul: a is a tensor whose storage was made smaller"):
        flagops.matmul(view, torch.randn(4, 5))
    assert flagops.matmul(room[:3], torch.randn(4, 5)).shape == (3, 5)


@pytest.mark.parametrize("backend", ["numba", "numpy", "torch"])
def test_tensors_without_memory_are_what_they_stand_for(backend):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(flagops.matmul(torch._efficientzerotensor(3, 4), b, backend=backend), torch.zeros(3, 5))
    functional = flagops.matmul(torch._to_functional_tensor(a), b, backend=backend)
    assert torch.equal(torch._from_functional_tensor(functional), flagops.matmul(a, b, backend=backend))
    escaped = []
    torch.vmap(lambda x: escaped.append(x) or x)(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"matmul: a is a tensor that left the torch\.vmap it belongs to"):
        flagops.matmul(escaped[0], b, backend=backend)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_subclass_in_any_argument(name):
    op, given = registry.operator(name), drawn(name)
    expected = op.each(of(op)(*given))
    for _, place in tensors(op, given):
        boxed = [Boxed(x) if i == place else x for i, x in enumerate(given)]
        got = op.each(of(op)(*boxed))
        assert all(type(x) is Boxed for x in got)
        assert equal([x.inner for x in got], expected)
        for kind in (Plain, Loud):
            Loud.calls.clear()
            own = [x.as_subclass(kind) if i == place else x for i, x in enumerate(given)]
            got = op.each(of(op)(*own))
            assert kind is Plain or Loud.calls == [f"flagops.{name}.default"]
            assert all(type(x) is kind for x in got)
            assert equal([x.as_subclass(torch.Tensor) for x in got], expected)
    outs = [Boxed(torch.empty_like(x)) for x in expected]
    of(op)(*given, out=tuple(outs) if op.several else outs[0])
    assert equal([x.inner for x in outs], expected)


def test_parameters_stay_on_the_short_way(monkeypatch):
    monkeypatch.setattr(torch_ops, "invoke", None)
    weight = torch.nn.Parameter(torch.randn(4))
    with torch.no_grad():
        assert type(flagops.rms_norm(torch.randn(3, 4), weight)) is torch.Tensor
