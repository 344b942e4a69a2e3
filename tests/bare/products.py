"""Products on the bare device, where nobody but flagops computes them, held to the CPU: run by test_bare.py."""

import itertools
import warnings

import pytest
import torch

import bare
import flagops
from flagops.testing import assert_near

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]
SHAPES = {"mm": ((3, 4), (4, 5)), "bmm": ((2, 3, 4), (2, 4, 5)), "mv": ((3, 4), (4,)), "dot": ((4,), (4,))}
SHAPES |= {"addmm": SHAPES["mm"], "baddbmm": SHAPES["bmm"], "addmv": SHAPES["mv"]}


@pytest.fixture(scope="module", autouse=True)
def device():
    bare.load()


def drawn(*shape, dtype=torch.float32):
    """Small whole numbers, whose sums are exact in every order."""
    return torch.randint(0, 5, shape).to(dtype)


def outcome(call, *args, **named):
    """The result on the CPU with its strides and the warnings, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = call(*args, **named)
        except Exception as error:
            return type(error), str(error).split("\n")[0]
    said = [str(w.message).partition(" (Triggered")[0] for w in caught]
    return made, said


def held(call, *args, **named):
    """A call gives on bare what it gives on the CPU."""
    there = [x.to("bare") if isinstance(x, torch.Tensor) else x for x in args]
    named_there = {k: x.to("bare") if isinstance(x, torch.Tensor) else x for k, x in named.items()}
    expected, warned = outcome(call, *args, **named)
    with flagops.enable():
        made, said = outcome(call, *there, **named_there)
    assert said == warned
    if not isinstance(expected, torch.Tensor):
        assert made == expected
        return
    assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(made.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", SHAPES)
def test_products_of_every_dtype(op, dtype):
    a, b = (drawn(*shape, dtype=dtype) for shape in SHAPES[op])
    function = getattr(torch, op)
    if not op.startswith(("add", "badd")):
        held(function, a, b)
        held(function, a, b, out=torch.empty(7, dtype=dtype))
        return
    full = function(torch.zeros(1, dtype=dtype), a, b)
    rows = drawn(*full.shape, dtype=dtype), drawn(full.shape[-1], dtype=dtype), drawn(1, dtype=dtype)
    for added, (beta, alpha) in itertools.product(rows, ((1, 1), (2, 3), (0, 1), (2, 0), (0, 0))):
        held(function, added, a, b, beta=beta, alpha=alpha)
    held(getattr(torch.Tensor, f"{op}_"), rows[0], a, b)
    held(function, rows[0], a, b, out=torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_added_to_halves_is_rounded_with_the_product(dtype):
    added, a, b = (torch.randn(shape).to(dtype) for shape in ((17, 9), (17, 65), (65, 9)))
    exact = 0.5 * added.double() + 2 * (a.double() @ b.double())
    there = [x.to("bare") for x in (added, a, b)]
    with flagops.enable():
        got = torch.addmm(*there, beta=0.5, alpha=2)
    assert_near(got.cpu(), exact, 1, exact.abs() + 2**-10 * (a.double().abs() @ b.double().abs()))


def test_what_torch_refuses_is_refused_with_its_words():
    a, b, c = drawn(3, 3), drawn(3, 3), drawn(3, 3)
    held(torch.mm, a, b, out=torch.empty(3, 3, dtype=torch.float64))
    held(torch.addmm, c, a, b, out=torch.empty(3, dtype=torch.int64))
    held(torch.Tensor.addmm_, c[0], a, b)
    held(lambda row, a, b: row.expand(3, 3).addmm_(a, b), c[:1], a, b)
    held(torch.mm, a, drawn(4, 3))


def test_out_over_a_factor_is_the_result_of_memory_apart():
    x, y = drawn(3, 3), drawn(3, 3)
    for place in (0, 1):
        there = [x.to("bare"), y.to("bare")]
        with flagops.enable():
            got = torch.mm(*there, out=there[place])
        assert torch.equal(got.cpu(), x @ y)


def test_grouped_products_and_their_gradients():
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    for left, right, offs in (
        ((24, 16), (3, 16, 40), ends),
        ((3, 8, 16), (3, 16, 40), None),
        ((8, 24), (24, 40), ends),
        ((3, 8, 16), (16, 24), ends),
    ):
        held(lambda a, b, o: torch._grouped_mm(a, b, offs=o), drawn(*left), drawn(*right), offs)

    def gradients(a, b, offs):
        leaves = [x.detach().requires_grad_() for x in (a, b)]
        made = torch._grouped_mm(*leaves, offs=offs)
        return torch.cat([x.flatten() for x in torch.autograd.grad(made, leaves, torch.ones_like(made))])

    held(gradients, drawn(24, 16), drawn(3, 16, 40), ends)


def test_norms_over_axes_that_are_no_view_as_one_and_with_a_negative_eps():
    x = torch.randn(2, 5, 3, 4).mT
    expected = torch.nn.functional.rms_norm(x, (4, 3), None, -0.01)
    there = x.to("bare")
    with flagops.enable():
        got = torch.nn.functional.rms_norm(there, (4, 3), None, -0.01)
    assert_near(got.cpu(), expected, 20)


def test_a_transposed_convolution_may_be_padded_beyond_a_stride():
    def gradients(x, weight):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        made = torch.nn.functional.conv_transpose2d(*leaves, stride=2, padding=1, output_padding=(2, 1), dilation=3)
        return torch.cat([y.flatten() for y in (made, *torch.autograd.grad(made, leaves, made.detach()))])

    held(gradients, drawn(2, 3, 4, 5), drawn(3, 4, 3, 2))
