"""Torch's own operators by their cards: each kernel against its reference, and each lowering against torch."""

import itertools
import warnings

import numpy as np
import pytest
import torch

import flagops
from flagops import registry, testing
from flagops.errors import Unsupported

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
SHAPES = ((), (1,), (17,), (3, 5), (2, 1, 7), (4, 33), (0, 3))


@pytest.mark.drawn
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kernel_equals_its_reference(aten_kernel, times, request):
    """A few cases of each run, since each compiles; ``flagops check aten.add`` takes as many as one likes."""
    name, backend = aten_kernel
    few = 2 if backend == "numba" else 1
    ran, refused = testing.check(registry.operator(name), backend, few * times, seed=request.config.option.seed)
    assert ran > 0, refused


def draw(rng, shape, dtype):
    if dtype == torch.bool:
        return torch.from_numpy(np.asarray(rng.random(shape) < 0.5))
    if not dtype.is_floating_point:
        return torch.from_numpy(np.asarray(rng.integers(0, 5, shape))).to(dtype)
    x = torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(dtype)
    return torch.where(x.abs() < 0.05, torch.tensor(float(rng.choice([np.nan, np.inf, -0.0, 1])), dtype=dtype), x)


def laid(rng, x):
    """The same values with other strides."""
    way = rng.integers(4)
    if way == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if way == 2 and x.dim():
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if way == 3 and x.dim():
        return x[:1].expand_as(x) if x.shape[0] else x
    return x


def same(got, expected, what):
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride()), what
    if not expected.dtype.is_floating_point:
        assert torch.equal(got, expected), what
        return
    testing.assert_near(got, expected, 40, 1 + expected.double().abs().nan_to_num(posinf=0, neginf=0), label=what)


def under(call, *args):
    """What a call gives when everything is replaced, and that nothing of it was left to torch."""
    with flagops.enable("all", backend="numba", strict=True):
        return call(*args)


def held(call, drawn):
    """Compare a call on operands, each with what they are, with torch's own; how many torch takes.

    What it refuses is refused with its error. All under two replacements: to put one in place costs as much as a
    hundred calls.
    """
    taken, refused = [], []
    for operands, what in drawn:
        try:
            taken.append((operands, what, call(*operands)))
        except Exception as error:
            refused.append((operands, error))
    got = under(lambda: [call(*operands) for operands, _, _ in taken])
    for made, (_, what, expected) in zip(got, taken, strict=True):
        same(made, expected, what)
    with flagops.enable("all", backend="numba"):
        for operands, error in refused:
            with pytest.raises((type(error), Unsupported)):
                call(*operands)
    return len(taken)


BINARY = {
    "add": lambda x, y: torch.add(x, y, alpha=2) if x.dtype != torch.bool else x + y,
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: 3 - x,
    "mul": torch.mul,
    "div": torch.div,
    "pow": lambda x, y: (x.abs() + 0.0) ** y,
    "power of a number": lambda x, y: 2.5 ** (y + 0.0),
    "gt": torch.gt,
    "eq": torch.eq,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "maximum": torch.maximum,
    "logical_and": torch.logical_and,
    "number": lambda x, y: x * 2.5,
    "integer": lambda x, y: x + 2,
    "clamp": lambda x, y: x.clamp(0, 2),
    "least": lambda x, y: x.clamp(min=0.5),
    "no less than a number": lambda x, y: x.clamp_min(1),
    "no less": lambda x, y: torch.clamp_min(x, y),
    "no more": lambda x, y: torch.clamp_max(x, y),
    "masked": lambda x, y: x.masked_fill(x > 0, 1),
    "to": lambda x, y: x.to(torch.float32) + y.to(torch.int64),
    "in place": lambda x, y: x.clone().mul_(2),
    "full": lambda x, y: torch.full_like(x, 3),
}


@pytest.mark.drawn
@pytest.mark.parametrize("name", BINARY)
def test_types_are_promoted_as_torch_does(name, rng):
    """Pairs of dtypes, numbers of Python's and tensors of one number; what torch refuses is refused with its error."""
    call, drawn = BINARY[name], []
    pairs = list(itertools.product(DTYPES, DTYPES))
    for one, two in (pairs[i] for i in rng.permutation(len(pairs))[:20]):
        shape = SHAPES[rng.integers(len(SHAPES))]
        other = shape[-1:] if rng.random() < 0.5 else shape
        x, y = laid(rng, draw(rng, shape, one)), laid(rng, draw(rng, () if rng.random() < 0.2 else other, two))
        what = f"{name} of {one} {tuple(x.shape)} {x.stride()} and {two} {tuple(y.shape)} {y.stride()}"
        drawn.append(((x, y), what))
    assert held(call, drawn) > 4


UNARY = (
    "neg abs sign sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tanh erf sigmoid relu floor ceil trunc round"
)
FUNCTIONS = {name: getattr(torch, name) for name in UNARY.split()} | {
    "isnan": torch.isnan, "isinf": torch.isinf, "isneginf": torch.isneginf, "silu": torch.nn.functional.silu,
    # of infinity torch's vectors make NaN, and its scalars infinity
    "gelu": lambda x: torch.nn.functional.gelu(x.clamp(-100, 100)),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "softplus": torch.nn.functional.softplus, "square": lambda x: x**2, "root": lambda x: x.abs() ** 0.5,
    "bitwise_not": torch.bitwise_not, "logical_not": torch.logical_not, "contiguous": lambda x: x.contiguous(),
    "clone": torch.clone, "zeros": torch.zeros_like,
}  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_operand(name, rng):
    operands = [laid(rng, draw(rng, SHAPES[rng.integers(len(SHAPES))], dtype)) for dtype in DTYPES]
    assert held(FUNCTIONS[name], [((x,), f"{name} of {x.dtype} {tuple(x.shape)} {x.stride()}") for x in operands])


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
def test_whole_numbers_to_powers_below_zero(dtype):
    """Of a tensor each has its own; of a number, that one is refused as torch does."""
    x = torch.arange(-3, 4).to(dtype)
    for base, exponent in ((x, x[:, None]), (-1, x), (2, x), (x, torch.tensor(-2))):
        assert torch.equal(under(torch.pow, base, exponent), torch.pow(base, exponent))
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="negative integer powers"):
        torch.pow(x, -1)


def test_bools_have_powers_of_one_number():
    x = torch.tensor([True, False])
    for exponent in (True, False):
        for call in (lambda x, e: x.pow(e), lambda x, e: x.clone().pow_(e)):
            assert torch.equal(under(call, x, exponent), call(x, exponent))
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="pow"):
        torch.pow(x, x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_quotient_of_halves_is_rounded_before_it_is_cut(dtype, rng):
    """But by one number, which stays in float32."""
    x = torch.from_numpy(rng.standard_normal(300) * 100).to(dtype)
    y = torch.from_numpy(rng.standard_normal(300)).to(dtype)
    for other in (y, y[:1], y[0], 0.37):
        expected = torch.div(x, other, rounding_mode="trunc")
        assert torch.equal(under(lambda a, b: torch.div(a, b, rounding_mode="trunc"), x, other), expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.int64))
def test_destinations(dtype, rng):
    """``out=`` of another shape is resized, of another dtype converted or refused, one that overlaps itself refused."""
    x, y = torch.ones(3, 4), torch.full((4,), 2.0)
    for out in (torch.empty(3, 4, dtype=dtype), torch.empty(0, dtype=dtype), torch.empty(4, 3, dtype=dtype).t()):
        copy = out.clone(memory_format=torch.preserve_format)
        if dtype == torch.int64:
            for call in (torch.add, lambda *args, out: under(lambda out: torch.add(*args, out=out), out)):
                with pytest.raises(RuntimeError, match="can't be cast"):
                    call(x, y, out=copy)
            continue
        expected = torch.add(x, y, out=copy)
        got = under(lambda out: torch.add(x, y, out=out), out)
        assert got is out
        same(got, expected, f"out of {dtype}")
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="single memory location"):
        torch.add(x, 1, out=torch.empty(1).expand(3, 4))
    z = torch.arange(6.0)
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="memory location"):
        torch.add(z[1:], 1, out=z[:-1])


def said(call, *args, **named):
    """An error or a warning, without the line of torch's source that it comes from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(*args, **named)
        except Exception as error:
            return type(error), str(error).split("\n")[0]
    return {str(w.message).partition(" (Triggered internally")[0] for w in caught}


@pytest.mark.parametrize(
    ("call", "out"),
    [
        (lambda x, out: torch.add(x, 1, out=out), torch.ones(3, 2)),
        (lambda x, out: torch.add(x, 0.5, out=out), torch.ones(4, dtype=torch.int32)),
        (lambda x, out: torch.abs(x, out=out), torch.ones(4, dtype=torch.float64)),
        (lambda x, out: torch.cat((x, x), out=out), torch.ones(3)),
        (lambda x, out: torch.cat((x, x), out=out), torch.ones(8, dtype=torch.int64)),
        (lambda x, out: torch.nonzero(x, out=out), torch.ones(4, 1, dtype=torch.int32)),
        (lambda x, out: out.add_(0.5), torch.ones(4, dtype=torch.int64)),
        (lambda x, out: torch.arange(0, 3, 0.5, out=out), torch.ones(4, dtype=torch.int64)),
        (lambda x, out: torch.arange(3, out=out), torch.ones(2, 2)),
        (lambda x, out: torch.index_select(out, 0, torch.tensor([1, 0]), out=out), torch.ones(2)),
        (lambda x, out: torch.masked_select(out, out > 0, out=out), torch.ones(3)),
        (lambda x, out: torch.cat((out[:2], x), out=out), torch.ones(6)),
        (lambda x, out: torch.scatter(x, 0, torch.arange(4), out, out=out), torch.ones(4)),
        (lambda x, out: torch.gather(x, 0, torch.tensor([4]), out=out), torch.ones(1)),
        (lambda x, out: torch.gather(x, 0, out[1:], out=out[:1]), torch.tensor([0, 1, 2])),
        (lambda x, out: torch.kthvalue(out, 2, out=(out, torch.tensor(0))), torch.ones(3)),
        (lambda x, out: x.index_put_((torch.tensor([7]),), out), torch.ones(1)),
        (lambda x, out: torch.cat((x, out), out=out), torch.ones(0)),
        (lambda x, out: torch.take(out, torch.tensor([], dtype=torch.int64), out=out), torch.ones(0)),
        (lambda x, out: x[:1].var(), torch.ones(1)),
        (lambda x, out: torch.std_mean(x.view(2, 2), 1, correction=2), torch.ones(1)),
        (lambda x, out: x.scatter(0, torch.tensor([0]), out, reduce="add"), torch.ones(1)),
        (
            lambda x, out: torch.ops.aten.native_batch_norm.out(
                x.view(2, 2), None, None, x[:2], x[:2], False, 0.1, 1e-5, out=x[:0], save_mean=out, save_invstd=x[:0]
            ),
            torch.ones(0, 2),
        ),
        (lambda x, out: torch.nn.functional.gelu(out, approximate="no"), torch.ones(1)),
        (lambda x, out: torch.roll(out, ()), torch.ones(1)),
        (lambda x, out: torch.repeat_interleave(x.long(), output_size=6), torch.ones(1)),
        (lambda x, out: torch.native_group_norm(x.view(1, 2, 2).mT, None, None, 1, 2, 2, 1, 1e-5), torch.ones(1)),
        (lambda x, out: torch.aminmax(out.view([1] * 65), dim=0), torch.ones(1)),
    ],
)
def test_what_torch_says_of_destinations_and_wrong_arguments(call, out):
    torch.set_warn_always(True)
    try:
        expected = said(call, torch.ones(4), out.clone())
        with flagops.enable("all", backend="numba"):
            assert said(call, torch.ones(4), out.clone()) == expected != set()
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("name", ("sum", "prod", "mean", "nansum", "cumsum"))
def test_reductions_compute_in_the_dtype_of_out(name, rng):
    """What float32 would round away is in a float64, and an integer has none of the fractions."""
    x = torch.tensor([[1.0, 2.0**-30], [1.5, 2.0**-40]])
    call = getattr(torch, name)
    for dtype in (torch.float64, torch.int64)[: 1 if name in ("mean", "nansum") else 2]:
        for shape in ((0,), (2, 2) if name == "cumsum" else (2,)):
            made = [torch.empty(shape, dtype=dtype) for _ in range(2)]
            expected = call(x, 1, out=made[0])
            got = under(lambda out: [call(x, 1, out=out) for _ in range(2)], made[1])
            assert got[0] is got[1] is made[1]
            assert torch.equal(made[1], expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.softmax(x, 0, out=x),
        lambda x: torch.cumsum(x, 1, out=x),
        lambda x: torch.tril(x, out=x),
        lambda x: torch.scatter(x, 0, torch.tensor([[2, 0]]), x[:1] + 1, out=x),
        lambda x: torch.fmod(x, 2, out=x),
        lambda x: torch.sort(x, 0, descending=True, out=(x, torch.empty(0, dtype=torch.int64)))[0],
    ],
)
def test_destinations_that_are_an_operand(call):
    x, y = (torch.arange(12.0).view(4, 3) for _ in range(2))
    expected = call(x)
    same(under(call, y), expected, "out")
    same(y, x, "the operand")


def test_all_of_a_tensor_that_repeats_its_elements_is_filled():
    for call in (lambda x: x.fill_(2.5), lambda x: x.zero_()):
        x, y = torch.ones(3), torch.ones(3)
        got = under(lambda y: [call(y.expand(2, 3).t()[1:]) for _ in range(2)], y)  # noqa: B023
        call(x.expand(2, 3).t()[1:])
        assert torch.equal(x, y)
        assert got[1].stride() == (1, 0)
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="single memory location"):
        torch.ones(3).expand(2, 3).fill_(torch.tensor(3))


def test_negated_and_conjugated_views_are_copied_as_what_they_are():
    """Before and after copies of plain tensors of the same shapes, and as destinations."""
    z = torch.complex(torch.ones(3), torch.arange(3.0) + 1)

    def copies():
        made = []
        for source in (z.imag, z.conj().imag, z.imag, z, z.conj()):
            made += [torch.zeros_like(source).copy_(source), source.clone(), torch.zeros(2, 3, dtype=z.dtype) + source]
        negated = torch._neg_view(torch.zeros(3))
        return [*made, negated.copy_(z.imag).clone(), negated.neg_().clone()]

    expected = copies()
    with flagops.enable("all", backend="numba"):
        got = copies()
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128, torch.complex32))
def test_complex_numbers_are_moved(dtype, rng):
    """Between complex dtypes, from real ones, by themselves and in views."""
    z = torch.from_numpy(rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4)))

    def moved():
        made = torch.zeros(4, 3, dtype=dtype)
        made[1:].copy_(z.t()[1:])
        return [made, made.clone(), made.t().contiguous(), z.real.to(dtype), torch.full((2,), 2, dtype=dtype)]

    for ours, theirs in zip(under(moved), moved(), strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(torch.view_as_real(ours), torch.view_as_real(theirs))


def test_sums_of_bools_with_a_factor():
    x, y = torch.tensor([[True], [False]]), torch.tensor([True, False])
    for alpha in (0, 1, 2, False):
        assert torch.equal(under(lambda: torch.add(x, y, alpha=alpha)), torch.add(x, y, alpha=alpha))  # noqa: B023
        args = x, 0, torch.tensor([1, 1]), torch.tensor([[False], [True]])
        expected = torch.index_add(*args, alpha=alpha)
        assert torch.equal(under(lambda: torch.index_add(*args, alpha=alpha)), expected)  # noqa: B023


def test_destinations_that_torch_resizes_are_laid_out_as_the_result():
    x = torch.ones(3, 4)
    for call in (lambda out: torch.nonzero(x, out=out), lambda out: torch.add(x.t(), 1, out=out)):
        outs = [torch.empty(0, dtype=torch.int64 if i < 2 else torch.float32) for i in range(4)]
        pair = outs[:2] if "nonzero" in call.__code__.co_names else outs[2:]
        assert under(call, pair[0]).stride() == call(pair[1]).stride() == (1, len(pair[1]))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ops.aten.fill(x.t()[::2], 2),
        lambda x: torch.fliplr(x.view(3, 2, 2)[:, :0]),
        lambda x: torch.flip(x.view(3, 2, 2).transpose(0, 2)[:, :, :0], (0,)),
        lambda x: torch.flip(x.view(3, 2, 2).transpose(0, 2)[::2], (0, 1)),
        lambda x: x.t().index_fill(0, torch.tensor([1]), 5.0),
        lambda x: x[:1, ::2].index_fill(1, torch.tensor([1]), torch.tensor(5.0)),
        lambda x: x.gather(0, torch.zeros(0, dtype=torch.uint8)),
        lambda x: torch.roll(x[:0, ::2], 1),
        lambda x: torch.roll(x[:0, ::2], 1, 0),
        lambda x: x.view(3, 2, 2).transpose(0, 2)[[0, 1]],
        lambda x: x.view(3, 2, 2).transpose(0, 2)[:, :, torch.tensor([[0, 2], [1, 1]]).t()],
        lambda x: x.t()[torch.tensor([[0, 1], [3, 3]]).t(), 1],
        lambda x: x.view(3, 2, 2).transpose(0, 2)[:, [0]],
        lambda x: x.view(3, 2, 2).transpose(0, 1)[[0], :, [1]],
        lambda x: torch.kthvalue(x, 2, 0, keepdim=True).values,
        lambda x: torch.nonzero(x * 0),
        lambda x: x.t().put(torch.tensor([1]), torch.tensor([5.0])),
        lambda x: x[0, ::2][:1].put(torch.tensor([0]), torch.tensor([5.0])),
    ],
)
def test_results_are_laid_out_as_torchs(call):
    x = torch.arange(12.0).view(3, 4)
    same(under(call, x), call(x), "layout")


def test_strict_names_what_no_kernel_takes():
    x = torch.ones(3)
    with flagops.enable("pointwise", backend="numba", strict=True):
        assert (x + 1).tolist() == [2.0] * 3
        with pytest.raises(Unsupported, match="aten::cumprod"):
            x.cumprod(0)
        with pytest.raises(Unsupported, match=r"aten::add.Tensor: dtype complex64"):
            x.to(torch.complex64) + 1
    assert x.cumprod(0).tolist() == [1.0] * 3


def test_everything_is_undone():
    """Every overload that ``"all"`` stands before is torch's again afterwards."""
    from flagops.override import interpose

    before = {
        name: torch._C._dispatch_dump_table(f"aten::{name}") for name in ("add.Tensor", "sum.dim_IntList", "fill_")
    }
    handle = flagops.enable("all", backend="numba")
    assert len(handle.ops) > 60
    handle.disable()
    interpose.sweep()
    assert not interpose.live
    assert not interpose.buried
    assert before == {name: torch._C._dispatch_dump_table(f"aten::{name}") for name in before}


@pytest.mark.parametrize(
    "options", ({"fused": True}, {"fused": True, "amsgrad": True}, {"foreach": True}, {"foreach": False})
)
@pytest.mark.parametrize("kind", (torch.optim.AdamW, torch.optim.Adam))
def test_optimizers_step_as_torch_does(kind, options, rng):
    def train():
        torch.manual_seed(0)
        layer = torch.nn.Linear(17, 5)
        optimizer = kind(layer.parameters(), lr=1e-2, weight_decay=0.1, **options)
        for _ in range(5):
            for p in layer.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in layer.parameters()])

    expected = train()
    with flagops.enable("all", backend="numba"):
        got = train()
    testing.assert_near(got, expected, 64, 1 + expected.abs())


def test_a_gradient_that_lies_otherwise_than_its_parameter_steps_it_alike(rng):
    """Whose elements torch's own fused kernel takes in the order in which they lie."""
    start, grads = (torch.from_numpy(rng.standard_normal((2, 3, 4))).float() for _ in range(2))

    def stepped(laid):
        parameters = [x.clone().requires_grad_() for x in start]
        for x, grad in zip(parameters, grads, strict=True):
            x.grad = grad.t().contiguous().t() if laid and x is parameters[1] else grad.clone()
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        return torch.stack([x.detach() for x in parameters])

    with flagops.enable("all", backend="numba"):
        assert torch.equal(stepped(laid=True), stepped(laid=False))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_gradients_are_unscaled_as_torch_does(dtype):
    def unscaled(*values):
        grads = [torch.tensor(x, dtype=dtype) for x in values]
        found = torch.zeros(1)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.tensor([1 / 3]))
        return found.item(), [x.tolist() for x in grads]

    calls = ([1.0, 2.0, 3e4], []), ([1.0], [[float("inf"), 1.0]]), ([float("-inf")], [0.0])
    expected = [unscaled(*values) for values in calls]
    assert under(lambda: [unscaled(*values) for values in calls]) == expected
    assert [found for found, _ in expected] == [0, 1, 1]


def test_a_dot_product_of_real_numbers_is_vdot(rng):
    x, y = (torch.from_numpy(rng.integers(-9, 9, 17)).float() for _ in range(2))
    assert under(torch.vdot, x, y) == torch.vdot(x, y)
