"""`flagops.enable` among what changes the meaning of a call: modes, transforms, tangents, subclasses, freed memory."""

import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flagops

sys.path.insert(0, str(Path(__file__).parent))
from overriding import counted, everything_taken, untouched, usable  # noqa: F401

BACKENDS = usable("numba", "numpy")
UNIT = 2.0**-53
OPERATORS = {
    "mm": lambda x: x @ x.mT,
    "addmm": lambda x: torch.addmm(x[0], x, x.mT[:, :1].expand(4, 4)),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x.mT[None, :, :1].expand(1, 4, 4), beta=2),
    "mv": lambda x: x @ x[0],
    "dot": lambda x: x[0] @ x[1],
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None]
    ),
}
X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def near(got, expected):
    """Two float64 computations of some dozen terms of about 1."""
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert ((got - expected).abs() <= 1000 * UNIT * (1 + expected.abs().max())).all()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=OPERATORS)
def function(request):
    return OPERATORS[request.param]


def everything(x):
    return [f(x) for f in OPERATORS.values()]


# forward-mode differentiation


def tangent(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def test_tangents_are_torchs(function, backend):
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has none
        plain = tangent(function, X), torch.func.jvp(function, (X,), (X.cos(),))[1], torch.func.jacfwd(function)(X)
        with flagops.enable(backend=backend):
            ours = tangent(function, X), torch.func.jvp(function, (X,), (X.cos(),))[1], torch.func.jacfwd(function)(X)
    for got, expected in zip(ours, plain, strict=True):
        near(got, expected)


def test_attention_refuses_tangents_as_torch_does(backend):
    with flagops.enable(backend=backend) as handle, pytest.raises(NotImplementedError, match="forward AD"):
        tangent(OPERATORS["scaled_dot_product_attention"], X)
    assert list(counted(handle, "scaled_dot_product_attention")[1]) == [
        "a level of forward-mode differentiation is open"
    ]


# modes


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_modes_see_what_they_see_without_us(context, needs_grad, backend):
    def names():
        with context(), Seen() as mode:
            everything(X.clone().requires_grad_(needs_grad))
        return mode.names

    plain = names()
    with flagops.enable(backend=backend):
        assert names() == plain


def test_floating_point_operations_are_counted(backend):
    def total():
        with FlopCounterMode(display=False) as mode:
            everything(X)
        return mode.get_total_flops()

    plain = total()
    with flagops.enable(backend=backend) as handle:
        assert total() == plain > 0
        assert counted(handle, "rms_norm") == (0, {"the dispatch mode _FlopCounterMode is active": 1})


def test_fakes_stay_fake(backend):
    with flagops.enable(backend=backend), FakeTensorMode(allow_non_fake_inputs=True):
        for result in everything(X):
            assert type(result).__name__ == "FakeTensor"


def test_graphs_and_exports_consist_of_what_they_consist_of_without_us(backend):
    class Model(torch.nn.Module):
        def forward(self, x):
            return everything(x)

    def graphs():
        program = torch.export.export(Model(), (X,))
        core = program.run_decompositions()
        return make_fx(everything)(X).code, *([str(n.target) for n in p.graph.nodes] for p in (program, core))

    plain = graphs()
    with flagops.enable(backend=backend):
        assert graphs() == plain


@pytest.mark.parametrize("first", ["eager", "vmap"])
def test_eager_and_mapped_calls_in_either_order(first, backend):
    def eager():
        return [f(X) for f in (OPERATORS["rms_norm"], OPERATORS["mm"])]

    def mapped():
        return [torch.vmap(f)(X[None].expand(2, 3, 4))[1] for f in (OPERATORS["rms_norm"], OPERATORS["mm"])]

    plain = eager()
    order = (eager, mapped) if first == "eager" else (mapped, eager)
    with flagops.enable(backend=backend):
        for results in (order[0](), order[1](), order[0]()):
            for got, expected in zip(results, plain, strict=True):
                near(got, expected)


def test_a_subclass_in_any_argument(backend):
    w = TwoTensor(X[0], X[0])
    q = X[None, None]
    calls = {
        "weight": lambda: F.rms_norm(X, (4,), w),
        "value": lambda: F.scaled_dot_product_attention(q, q, TwoTensor(q, q)),
        "mask": lambda: F.scaled_dot_product_attention(
            q, q, q, TwoTensor(torch.zeros(3, 3).double(), torch.zeros(3, 3).double())
        ),
        "second factor": lambda: X @ TwoTensor(X.mT, X.mT),
        "added": lambda: torch.addmm(w, X[:, :3], X),
    }
    for name, call in calls.items():
        plain = call()
        with flagops.enable(backend=backend):
            got = call()
        assert type(got) is TwoTensor, name
        near(got.a, plain.a)


# memory


def test_tensors_without_memory(backend):
    def freed(x):
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x

    zero = torch._efficientzerotensor((4, 4), dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    with flagops.enable(backend=backend):
        for f in (lambda x: x @ eye, lambda x: eye @ x, lambda x: torch.addmm(x, eye, eye, beta=2)):
            near(f(zero), f(torch.zeros(4, 4, dtype=torch.float64)))
        near(F.rms_norm(zero, (4,)), torch.zeros(4, 4))
        near(F.scaled_dot_product_attention(zero[None], eye[None], eye[None]), torch.full((1, 4, 4), 0.25).double())
        near(torch.func.jvp(lambda v: v @ eye, (eye,), (eye,))[1], eye)
        for f in (lambda x: x @ eye, lambda x: eye @ x, lambda x: torch.mm(eye, eye, out=x)):
            with pytest.raises(RuntimeError):
                f(freed(eye))
        half = eye.bfloat16()
        for _ in range(2):  # what is added in half precision is computed in several steps
            with pytest.raises(RuntimeError):
                torch.addmm(half, freed(half), half, beta=2)
            near(torch.addmm(half, half, half, beta=2).double(), 3 * eye)
        with pytest.raises(RuntimeError):
            eye @ freed(torch.randn(9, 4).double())[5:]  # an address that is not null, of no memory


# what a recipe is made of


def test_arguments_that_are_one_tensor_and_arguments_that_are_not(backend):
    """The first call of a signature multiplies a tensor with itself; the next ones do not."""
    a, b = X.mT @ X, X.mT @ X.cos()

    def results():
        q, k = a[None, None], b[None, None]
        return [
            a @ a,
            a @ b,
            a @ a.mT,
            a @ b.mT,
            *(F.scaled_dot_product_attention(q, x, y) for x in (q, k) for y in (q, k)),
        ]

    plain = results()
    with flagops.enable(backend=backend):
        for got, expected in zip(results(), plain, strict=True):
            near(got, expected)


def test_results_lie_as_torchs_do(backend):
    base = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    layouts = [
        base,
        base.mT,
        base.permute(3, 1, 2, 0),
        base[..., ::2],
        base.transpose(1, 2),
        base[:1].expand(2, 3, 4, 6),
    ]
    layouts += [
        base.to(memory_format=torch.channels_last),
        base[:, :, :1],
        base[:, :1],
        base[0],
        base[0].mT,
        base[0, 0],
    ]
    w = torch.randn(24, dtype=torch.float64)
    for x in layouts:
        calls = [
            lambda: F.rms_norm(x, x.shape[-1:]),  # noqa: B023
            lambda: F.rms_norm(x, x.shape[-1:], w[: x.shape[-1]]),  # noqa: B023
            lambda: F.rms_norm(x, x.shape[-2:]),  # noqa: B023
            lambda: F.scaled_dot_product_attention(x, x, x),  # noqa: B023
            lambda: F.scaled_dot_product_attention(x, x, x[..., :2], is_causal=True),  # noqa: B023
            lambda: x.transpose(-1, -2) @ x,  # noqa: B023
        ]
        for call in calls:
            plain = call()
            with flagops.enable(backend=backend):
                got = call()
            assert got.stride() == plain.stride()
            near(got, plain)
    q = base.transpose(1, 2)
    with flagops.enable(backend=backend):
        assert F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(2, 3, 24).shape == (2, 3, 24)


# autograd


def test_results_written_in_place_are_known_to_autograd(backend):
    eye = torch.eye(3)
    with flagops.enable(backend=backend):
        for write in (lambda out: torch.mm(eye, eye, out=out), lambda out: out.addmm_(eye, eye)):
            x, out = torch.ones(3, 3, requires_grad=True), torch.zeros(3, 3)
            product = (x * out).sum()
            write(out)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
        with pytest.raises(RuntimeError, match="out="):
            torch.mm(eye, eye, out=torch.zeros(3, 3, requires_grad=True) * 2)


def test_second_and_batched_derivatives_of_compositions(backend):
    def second(f):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad((f(x) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    def batched(f):
        x = X.clone().requires_grad_()
        y = f(x)
        grads = torch.stack([y.detach().cos(), y.detach().sin()])
        return torch.autograd.grad(y, x, grads, is_grads_batched=True)[0]

    def vectorized(f):
        return torch.autograd.functional.jacobian(f, X, vectorize=True)

    for f in (OPERATORS["rms_norm"], OPERATORS["scaled_dot_product_attention"]):
        for derive in (second, batched, vectorized, lambda f: torch.func.hessian(lambda x: (f(x) ** 2).sum())(X)):
            with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
                plain = attempt(lambda: derive(f))  # noqa: B023
                with flagops.enable(backend=BACKENDS[0]):
                    got = attempt(lambda: derive(f))  # noqa: B023
            if isinstance(plain, torch.Tensor):
                near(got, plain)
            else:
                assert got == plain


def attempt(function):
    try:
        return function()
    except (RuntimeError, NotImplementedError) as error:
        return type(error), str(error)[:60]


def test_the_kernel_that_sdpa_kernel_asks_for(backend):
    q = X[None, None]
    with flagops.enable("scaled_dot_product_attention", backend=backend) as handle:
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(
                F.scaled_dot_product_attention(q, q, q), torch._scaled_dot_product_attention_math(q, q, q)[0]
            )
        F.scaled_dot_product_attention(q, q, q)
    assert counted(handle, "scaled_dot_product_attention") == (1, {"sdpa_kernel asks for torch's own": 1})


def test_a_disabled_handle_is_not_entered_again():
    handle = flagops.enable(backend=BACKENDS[0])
    handle.disable()
    with pytest.raises(RuntimeError, match="was disabled"), handle:
        pass


def test_nothing_to_multiply_is_nothing_to_scale(backend):
    nan = float("nan")
    with flagops.enable(backend=backend):
        assert torch.addmm(torch.ones(2, 2), torch.ones(2, 0), torch.ones(0, 2), alpha=nan).tolist() == [[1, 1], [1, 1]]
        assert (
            torch.addmm(torch.ones(2), torch.ones(2, 0), torch.ones(0, 2), beta=0, alpha=nan).tolist() == [[0, 0]] * 2
        )


def test_attention_that_is_trained_is_torchs_unless_a_backend_is_named():
    """No kernel has a backward of its own for it yet, and torch's fused one is several times as fast."""
    q = X[None, None].clone().requires_grad_()
    reason = "torch's own kernel and its backward are faster for few rows, says a test"
    for backend, expected in ((None, (1, {reason: 1})), (BACKENDS[0], (2, {}))):
        with everything_taken(), flagops.enable(backend=backend) as handle:
            F.scaled_dot_product_attention(q, q, q)
            F.scaled_dot_product_attention(q.detach(), q.detach(), q.detach())
        assert counted(handle, "scaled_dot_product_attention") == expected
