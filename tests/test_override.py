"""`flagops.enable` and torch's products: every form against float64, and what is left to torch, with its reason."""

import itertools
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import flagops
from flagops import config, dispatch
from flagops.calls import replay
from flagops.testing import assert_near, assert_of

sys.path.insert(0, str(Path(__file__).parent))
from overriding import FORMS, PRODUCTS, counted, untouched, usable, whole  # noqa: F401

BACKENDS = usable("numba", "numpy")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
RANKS = {"mm": "mk,kn->mn", "bmm": "bmk,bkn->bmn", "mv": "mk,k->m", "dot": "k,k->"}
RANKS |= {"addmm": RANKS["mm"], "baddbmm": RANKS["bmm"], "addmv": RANKS["mv"]}


# every overload against float64


@st.composite
def tensor(draw, shape, dtype):
    """Small numbers in any layout: dense, permuted, every second element, or repeated along an axis."""
    layout = draw(st.sampled_from(("dense", "permuted", "sliced", "expanded")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        x = torch.from_numpy(rng.standard_normal([shape[i] for i in order])).to(dtype)
        return x.permute([order.index(i) for i in range(len(shape))])
    if layout == "sliced" and shape:
        x = torch.from_numpy(rng.standard_normal([*shape[:-1], 2 * shape[-1] + 1])).to(dtype)
        return x[..., 1::2]
    x = torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(dtype)
    if layout == "expanded" and shape and shape[0]:
        return x[:1].expand(shape)
    return x


def own(x):
    """A copy with the same strides where memory is not shared inside."""
    return x.clone(memory_format=torch.preserve_format)


@st.composite
def case(draw, op, suffix):
    dtype = draw(st.sampled_from(list(UNIT)))
    dims = {axis: draw(st.integers(0, 3 if axis == "b" else 9)) for axis in "bmkn"}
    left, right, result = re.split(",|->", RANKS[op])
    a, b = (draw(tensor([dims[axis] for axis in axes], dtype)) for axes in (left, right))
    shape = [dims[axis] for axis in result]
    added, beta, alpha = None, 0, 1
    if "add" in op:
        beta, alpha = draw(st.sampled_from(((1, 1), (1, 1), (0, 1), (0, -2), (0.5, 1), (1, 0.5), (-2, 0.5), (3.0, 1))))
        shapes = (shape, shape, shape[1:], shape[-1:], [], [*shape[:-1], 1], [1] * len(shape), [1, *shape[1:]])
        narrow = shape if suffix == "_" else draw(st.sampled_from(shapes))
        added = own(draw(tensor(narrow, dtype))) if suffix == "_" else draw(tensor(narrow, dtype))
        if beta == 0 and added.numel() and draw(st.booleans()):
            added = torch.full_like(added, float("nan"))
    out = own(draw(tensor(shape, dtype))) if suffix == ".out" else None
    return SimpleNamespace(
        a=a, b=b, added=added, beta=beta, alpha=alpha, out=out, dtype=dtype, shape=shape, k=dims["k"]
    )


def call(op, suffix, x, added):
    arguments = (x.a, x.b) if added is None else (added, x.a, x.b)
    scalars = {} if added is None else {"beta": x.beta, "alpha": x.alpha}
    if suffix == "_":
        return getattr(added, op + "_")(x.a, x.b, **scalars)
    return getattr(torch, op)(*arguments, **scalars, **({"out": x.out} if suffix else {}))


@pytest.mark.drawn
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "suffix"), [(op, form[len(op) :]) for op in PRODUCTS for form in FORMS[op]])
def test_every_form_against_float64(op, suffix, backend, monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 1)  # the third call is replayed

    @settings(max_examples=100, deadline=None, database=None)
    @given(case(op, suffix))
    def check(x):
        wide = [None if t is None else t.double().numpy().copy() for t in (x.a, x.b, x.added)]
        with flagops.enable(op, backend) as handle:
            for added in [own(x.added) if suffix == "_" else x.added for _ in range(3)]:
                result = call(op, suffix, x, added)
        if op == "addmv" and not x.a.numel():
            assert not counted(handle, op + suffix)[0]
            return
        assert counted(handle, op + suffix) == (3, {})
        assert (result.dtype, list(result.shape)) == (x.dtype, x.shape)
        assert result is {".out": x.out, "_": added}.get(suffix, result)
        exact = x.alpha * np.einsum(RANKS[op], wide[0], wide[1])
        weight = abs(x.alpha) * np.einsum(RANKS[op], abs(wide[0]), abs(wide[1]))
        if x.beta:
            exact, weight = exact + x.beta * wide[2], weight + abs(x.beta * wide[2])
        accumulator, terms = x.dtype if x.dtype.itemsize == 8 else torch.float32, x.k + 3
        rounding = UNIT[x.dtype] * abs(exact) + TINY[x.dtype]
        bound = rounding + terms * (UNIT[accumulator] * weight + TINY[accumulator])
        assert (abs(result.double().numpy() - exact) <= 1.001 * bound).all()

    check()


# gradients

DIFFERENTIABLE = {
    "linear": (F.linear, [(3, 4), (5, 4), (5,)]),
    "linear without bias": (F.linear, [(2, 3, 4), (5, 4)]),
    "matmul": (torch.matmul, [(2, 3, 4), (2, 4, 5)]),
    "matmul with a vector": (torch.matmul, [(2, 3, 4), (4,)]),
    "einsum": (lambda a, b: torch.einsum("bik,jk->bij", a, b), [(2, 3, 4), (5, 4)]),
    "dot": (torch.dot, [(4,), (4,)]),
    "addmv": (lambda c, a, b: torch.addmv(c, a, b, beta=0.5, alpha=2), [(3,), (3, 4), (4,)]),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=2), [(1, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "addmm_": (lambda c, a, b: (c * 1).addmm_(a, b), [(3, 5), (3, 4), (4, 5)]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_torchs(name):
    function, shapes = DIFFERENTIABLE[name]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn_like(function(*values))

    def gradients():
        leaves = [x.clone().requires_grad_() for x in values]
        first = torch.autograd.grad((function(*leaves) * weight).sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum((g * g).sum() for g in first), leaves, materialize_grads=True)

    plain = gradients()
    with flagops.enable(backend="numpy") as handle:
        ours = gradients()
        leaves = [x.clone().requires_grad_() for x in values]
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert handle.report().replaced > 2
    for x, y in zip(ours, plain, strict=True):
        assert_near(x, y, 200, y.abs().sum() + 1)  # two derivatives, each sum in any order


def test_transforms_of_functions():
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3, 4), (5, 4), (5,)))

    def results():
        batched = torch.vmap(lambda v: F.linear(v, w, b).sin())(x)
        value, tangent = torch.func.jvp(lambda v: F.linear(v, w, b), (x[0],), (x[1],))
        jacobian = torch.func.jacrev(lambda v: (w @ v).cos())(x[0, 0])
        return batched, value, tangent, jacobian

    plain = results()
    with flagops.enable(backend="numpy") as handle:
        ours = results()
        assert handle.report().share == 1
    for u, v in zip(ours, plain, strict=True):
        assert_near(u, v, 40, v.abs().sum() + 1)


def test_half_precision_training_step():
    layer = torch.nn.Linear(8, 5).bfloat16()
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    with flagops.enable(backend="numpy") as handle:
        layer(x).sum().backward()
        assert counted(handle, "addmm") == (1, {})
        assert counted(handle, "mm") == (2, {})
    assert_of("matmul", x.grad, torch.ones(3, 5).bfloat16(), layer.weight)
    assert_of("matmul", layer.weight.grad, torch.ones(5, 3).bfloat16(), x)


# reach


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("linear", "addmm"),
        ("linear of a stack", "addmm"),
        ("linear without bias", "mm"),
        ("matmul", "mm"),
        ("matmul out", "mm.out"),
        ("batched matmul", "bmm"),
        ("matrix times vector", "mv"),
        ("vector times vector", "dot"),
        ("vdot", "dot"),
        ("inner", "mm"),
        ("einsum", "bmm"),
        ("tensordot", "mm"),
        ("multi_dot", "mm"),
        ("addbmm", "addmm_"),
        ("grouped", "_grouped_mm"),
    ],
)
def test_what_torch_builds_on_them(name, reached):
    x, w, b = whole(2, 3, 4), whole(5, 4), whole(5)
    grouped = whole(8, 16, dtype=torch.bfloat16), whole(2, 16, 8, dtype=torch.bfloat16)
    calls = {
        "linear": lambda: F.linear(x[0], w, b),
        "linear of a stack": lambda: F.linear(x, w, b),
        "linear without bias": lambda: F.linear(x, w),
        "matmul": lambda: x @ w.t(),
        "matmul out": lambda: torch.matmul(x, w.t(), out=torch.empty(2, 3, 5)),
        "batched matmul": lambda: x @ x.mT,
        "matrix times vector": lambda: x @ w[0],
        "vector times vector": lambda: w[0] @ w[1],
        "vdot": lambda: torch.vdot(w[0], w[1]),
        "inner": lambda: torch.inner(x, w),
        "einsum": lambda: torch.einsum("bik,bjk->bij", x, x),
        "tensordot": lambda: torch.tensordot(x, w, ([2], [1])),
        "multi_dot": lambda: torch.linalg.multi_dot([x[0], w.t(), w]),
        "grouped": lambda: torch._grouped_mm(*grouped, offs=torch.tensor([4, 8], dtype=torch.int32)),
        "addbmm": lambda: torch.addbmm(torch.ones(3, 3), x, x.mT),
    }
    plain = calls[name]()
    with flagops.enable(backend="numpy") as handle:
        ours = calls[name]()
        replaced, passed = counted(handle, reached)
    assert replaced >= 1
    assert not passed
    assert torch.equal(ours, plain)


def test_views_that_torch_resolves_above():
    x = whole(3, 4)
    with flagops.enable(backend="numpy") as handle:
        negative = torch._neg_view(x) @ x.t()
        assert handle.report().replaced == 1
    assert torch.equal(negative, -(x @ x.t()))


def test_modes_of_torch():
    layer, x = torch.nn.Linear(4, 5), torch.randn(3, 4)
    inputs = x, layer.weight, layer.bias
    with flagops.enable(backend="numpy") as handle:
        with torch.inference_mode():
            assert_of("linear", layer(x), *inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.device("meta"):
            assert_of("linear", layer(x), *inputs)
        assert counted(handle, "addmm") == (3, {})


# what goes to torch

LEFT_TO_TORCH = {
    "complex": (lambda: torch.eye(2, dtype=torch.cfloat) @ torch.eye(2, dtype=torch.cfloat), "mm", "dtype complex64"),
    "out over a row that is added": (lambda: add_row_of_out(), "addmm.out", "out may share memory with an input"),
    "elements that share memory": (
        lambda: torch.ones(1).expand(2).addmv_(torch.ones(2, 2), torch.ones(2)),
        "addmv_",
        "out may overlap itself",
    ),
}


def add_shifted():
    x = torch.arange(12.0)
    return torch.addmm(x[1:10].view(3, 3), torch.eye(3), torch.ones(3, 3), out=x[:9].view(3, 3))


def add_row_of_out():
    x = torch.arange(12.0)
    return torch.addmm(x[1:4], torch.eye(3), torch.ones(3, 3), out=x[:9].view(3, 3))


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_left_to_torch_with_its_reason(name):
    function, op, reason = LEFT_TO_TORCH[name]
    plain = function()
    with flagops.enable(backend="numpy") as handle:
        for times in (1, 2):
            assert torch.equal(function(), plain)
            assert counted(handle, op) == (0, {reason: times})
    assert handle.report().share == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_out_over_a_factor_is_the_result_of_memory_apart(op, backend):
    """Torch's own kernels write over what they still read."""
    axes = {
        "mm": (2, 2),
        "bmm": (3, 3),
        "mv": (2, 1),
        "dot": (1, 1),
        "addmm": (2, 2),
        "baddbmm": (3, 3),
        "addmv": (2, 1),
    }
    shapes = [(2, 3, 3)[-rank:] for rank in axes[op]]
    added = [whole(*shapes[1])] if "add" in op else []
    factors = [whole(*shape) for shape in shapes]
    exact = getattr(torch, op)(*added, *factors)
    for place, shape in enumerate(shapes):
        for shift in (0, 1) if shape == exact.shape else ():
            memory = torch.cat((factors[place].reshape(-1), torch.zeros(1)))
            given = [*factors[:place], memory[: factors[place].numel()].view(shape), *factors[place + 1 :]]
            out = given[place] if not shift else memory[shift:].view(shape)
            with flagops.enable(op, backend) as handle:
                assert torch.equal(getattr(torch, op)(*added, *given, out=out), exact)
                assert counted(handle, f"{op}.out") == (1, {})
    if added and exact.shape == shapes[-1]:
        x = factors[-1].clone()
        exact = x + getattr(torch, op)(torch.zeros(1), factors[0], x)
        with flagops.enable(op, backend) as handle:
            assert torch.equal(getattr(x, f"{op}_")(factors[0], x), exact)
            assert counted(handle, f"{op}_") == (1, {})


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.drawn
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "suffix"), [(op, form[len(op) :]) for op in PRODUCTS for form in FORMS[op]])
def test_integers_are_torchs_and_wrap_around(op, suffix, backend, rng):
    numbers = ((1, 1), (0, 1), (2, -3), (0.5, 2.7), (1, 0), (-2, 0), (0, 0), (True, 1)) if "add" in op else ((1, 1),)
    for dtype, (beta, alpha), size in itertools.product(INTEGERS, numbers, (0, 1, 7)):
        info, dims = torch.iinfo(dtype), {"b": 2, "m": 3, "k": size, "n": 5}
        left, right, result = ([dims[axis] for axis in axes] for axes in re.split(",|->", RANKS[op]))
        if not size and isinstance(beta, float):
            continue  # which torch refuses
        a, b, c = (
            torch.from_numpy(np.asarray(rng.integers(info.min, info.max, shape[::-1], endpoint=True))).to(dtype)
            for shape in (left, right, result)
        )
        a, b, c = (t.permute(tuple(range(t.dim()))[::-1]) for t in (a, b, c))
        x = SimpleNamespace(
            a=a, b=b, added=c, beta=beta, alpha=alpha, out=torch.empty_like(c) if suffix == ".out" else None
        )
        added = c if "add" in op else None
        plain = call(op, suffix, x, added if added is None else added.clone()).clone()
        with flagops.enable(op, backend) as handle:
            got = call(op, suffix, x, added if added is None else added.clone())
            if op != "addmv" or size:
                assert counted(handle, op + suffix) == (1, {})
        assert got.dtype == dtype
        assert torch.equal(got, plain), (dtype, beta, alpha, size)


@pytest.mark.parametrize("op", PRODUCTS)
def test_out_is_resized_as_torch_does(op):
    dims = {"b": 2, "m": 3, "k": 4, "n": 5}
    left, right, result = ([dims[axis] for axis in axes] for axes in re.split(",|->", RANKS[op]))
    inputs = *([whole(*result)] if "add" in op else []), whole(*left), whole(*right)

    def outcome(out):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = getattr(torch, op)(*inputs, out=out)
        return (
            made is out,
            made.stride(),
            made.tolist(),
            [str(w.message).split("(Triggered")[0].strip() for w in caught],
        )

    for out in (torch.empty(0), torch.empty(7), torch.empty(2, 3, 4, 5), torch.empty(7, 9)[::2, ::3]):
        plain = outcome(out.clone())
        with flagops.enable(op, "numpy") as handle:
            assert outcome(out.clone()) == plain
            assert counted(handle, f"{op}.out") == (1, {})


def test_nothing_is_multiplied_by_an_alpha_of_zero():
    """As in BLAS; torch's own kernels agree where they call it, and make NaN of what is not finite elsewhere."""
    nan, one = torch.full((2, 2), torch.nan), torch.ones(2, 2)
    for dtype in UNIT:
        batched = nan[None].to(dtype), nan[None].to(dtype), one[None].to(dtype)
        with flagops.enable(backend="numpy") as handle:
            assert torch.addmm(one.to(dtype), nan.to(dtype), one.to(dtype), alpha=0, beta=3).tolist() == [[3, 3]] * 2
            assert torch.baddbmm(*batched, alpha=0, beta=0).tolist() == [[[0, 0]] * 2]
            rows = torch.addmm(one[0].to(dtype), nan.to(dtype), one.to(dtype), alpha=0, beta=3)
            assert rows.tolist() == [[3, 3]] * 2
            assert handle.report().share == 1


def test_added_in_place_may_be_what_is_added():
    x, a = torch.ones(3, 3), torch.arange(9.0).view(3, 3)
    with flagops.enable(backend="numpy") as handle:
        torch.addmm(x, a, a, out=x)
        assert counted(handle, "addmm.out") == (1, {})
    assert torch.equal(x, 1 + a @ a)


def test_calls_that_look_alike():
    """One handle remembers what it chose; nothing that matters may be missing from what it remembers it by."""
    a, b, dense = (whole(*shape, dtype=torch.float64) for shape in ((3, 4), (4, 3), (3, 3)))
    columns = dense[:, :1].expand(3, 3)
    cases = [
        (added, beta, alpha, own)
        for added in (dense[:1].expand(3, 3), dense, columns, dense[0], dense[:1])
        for beta, alpha in ((1, 1), (2, 1), (1, 2), (0, 1), (0, 2))
        for own in (False, True)
        if not own or (added.is_contiguous() and added.shape == (3, 3))
    ]
    with flagops.enable(backend="numpy") as handle:
        for _ in range(2):
            for added, beta, alpha, own in cases:
                added = added.clone() if own else added
                exact = beta * added + alpha * (a @ b)
                out = added if own else torch.empty(3, 3, dtype=torch.float64)
                assert torch.equal(torch.addmm(added, a, b, beta=beta, alpha=alpha), exact)
                assert torch.equal(torch.addmm(added, a, b, beta=beta, alpha=alpha, out=out), exact)
        assert handle.report().share == 1
        for dtype in (torch.float64, torch.float32, torch.long, torch.cfloat):
            assert torch.mm(a.to(dtype), b.to(dtype)).dtype == dtype
        assert counted(handle, "mm")[1] == {"dtype complex64": 1}
        for left, right in ((a.float(), b), (a, b.float())):
            with pytest.raises(RuntimeError, match="same dtype"):
                torch.mm(left, right)


def test_outs_that_look_alike():
    x = torch.arange(12.0)
    with flagops.enable(backend="numpy") as handle:
        torch.mm(x[4:8].view(2, 2), torch.eye(2), out=x[:4].view(2, 2))
        assert counted(handle, "mm.out") == (1, {})
        torch.mm(x[4:8].view(2, 2), torch.eye(2), out=x.as_strided((2, 2), (4, 1)))
        assert counted(handle, "mm.out") == (2, {})
        torch.mm(x[4:8].view(2, 2), torch.eye(2), out=x[:4].view(2, 2))
        exact = torch.eye(2) @ x[3:7].view(2, 2)
        assert torch.equal(torch.mm(torch.eye(2), x[3:7].view(2, 2), out=x[:4].view(2, 2)), exact)
        torch.addmm(x[3:5], torch.eye(2), torch.eye(2), out=x[4:8].view(2, 2).clone())
        assert counted(handle, "mm.out") == (4, {})


INVALID = {
    "inner sizes": lambda: torch.mm(torch.ones(2, 3), torch.ones(2, 3)),
    "ranks": lambda: torch.mm(torch.ones(2, 3), torch.ones(3)),
    "batches": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(3, 4, 3)),
    "dtypes": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2).double()),
    "dtype of the added": lambda: torch.addmm(torch.ones(2).double(), torch.ones(2, 3), torch.ones(3, 2)),
    "shape of the added": lambda: torch.addmm(torch.ones(7), torch.ones(2, 3), torch.ones(3, 2)),
    "in place would grow": lambda: torch.ones(2).addmm_(torch.ones(2, 3), torch.ones(3, 2)),
    "dtype of out": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2), out=torch.empty(2, 2).double()),
    "out overlaps itself": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2), out=torch.empty(1).expand(2, 2)),
    "lengths": lambda: torch.dot(torch.ones(2), torch.ones(3)),
    "vectors": lambda: torch.mv(torch.ones(2, 3), torch.ones(2)),
    "linear": lambda: F.linear(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4)),
    "complex alpha": lambda: torch.addmm(torch.ones(2), torch.ones(2, 3), torch.ones(3, 2), alpha=1j),
    "out over the added": lambda: add_shifted(),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_calls_raise_torchs_own_error(name):
    def outcome():
        try:
            return INVALID[name]()
        except Exception as error:
            return type(error), re.sub("registered at.*", "", str(error), flags=re.DOTALL)

    plain = outcome()
    assert isinstance(plain, tuple), "the case must be invalid"
    with flagops.enable(backend="numpy"):
        assert outcome() == plain


def test_kernels_of_torch_are_no_replacement():
    x = torch.randn(3, 4)
    with flagops.enable(backend="torch") as handle:
        assert torch.equal(x @ x.t(), torch.mm(x, x.t()))
        assert counted(handle, "mm") == (0, {"torch's own kernel is the choice": 2})


def stub(monkeypatch, run):
    def plan(operator, *rest):
        return SimpleNamespace(
            operator=operator,
            run=run,
            backend="torch",
            forwards_to="",
            check_values=False,
            clean=lambda args: args,
        )

    monkeypatch.setattr(dispatch, "plan", plan)


def test_a_kernel_that_calls_torch_meets_torchs_kernels(monkeypatch):
    stub(monkeypatch, lambda a, b, out: out.copy_(torch.mm(a, b) + 1))
    with flagops.enable(backend="numba") as handle:
        assert torch.mm(torch.eye(2), torch.eye(2)).tolist() == [[2, 1], [1, 2]]
        assert handle.report().calls == 1


def test_a_kernel_that_refuses_while_it_runs(monkeypatch):
    def refuse(a, b, out):
        raise flagops.Unsupported("too odd")

    stub(monkeypatch, refuse)
    with flagops.enable(backend="numba") as handle:
        assert torch.mm(torch.eye(2), torch.eye(2)).tolist() == [[1, 0], [0, 1]]
        assert counted(handle, "mm") == (0, {"too odd": 1})


def test_a_kernel_that_fails_is_not_hidden(monkeypatch):
    def fail(a, b, out):
        raise ZeroDivisionError

    stub(monkeypatch, fail)
    with flagops.enable(backend="numba"):
        with pytest.raises(ZeroDivisionError):
            torch.mm(torch.eye(2), torch.eye(2))
        stub(monkeypatch, lambda a, b, out: out.fill_(3))
        assert torch.mm(torch.ones(1, 2), torch.ones(2, 1)).item() == 3, "the thread is not left in a kernel"


def test_kernels_get_an_out_of_its_own(monkeypatch):
    """`self` of an in-place form is both what is added and the result."""
    shared = []

    def linear(x, weight, bias, out):
        shared.append(bias is not None and bias.data_ptr() == out.data_ptr())
        out.copy_(F.linear(x, weight, bias))

    stub(monkeypatch, linear)
    with flagops.enable(backend="numba"):
        for x in (torch.ones(1, 3), torch.ones(2, 3)):
            assert x.addmm_(torch.ones(len(x), 4), torch.ones(4, 3)).tolist() == [[5] * 3] * len(x)
        assert torch.ones(2).addmv_(torch.ones(2, 4), torch.ones(4)).tolist() == [5, 5]
    assert shared == [False, False, False]


def test_temporaries_stay_in_the_budget():
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    with config.using(budget="47KiB"), flagops.enable(backend="numpy") as handle:
        torch.addmm(x[:32, :32], x[:32], x[:, :32])
        assert counted(handle, "addmm") == (1, {})
        torch.addmm(x, x, x)
        assert counted(handle, "addmm") == (1, {"its temporaries are beyond the budget": 1})


def test_settings_of_a_block_choose_the_backend():
    x = torch.randn(3, 4)
    with flagops.enable("matmul,linear") as handle:
        for backend in ("numpy", "torch"):
            with flagops.using(backend=backend):
                x @ x.t()
                F.linear(x, x, x[:, 0])
        rows = handle.report().rows
    assert [row.replaced for row in rows] == [{"linear/numpy": 1}, {"matmul/numpy": 1}]
    assert [row.passed for row in rows] == [{"torch's own kernel is the choice": 1}] * 2
