"""Torch's reductions and rows: their cards, and calls of torch's under `flagops.enable` held to float64."""

import itertools
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flagops
from flagops import testing

sys.path.insert(0, str(Path(__file__).parent))
from overriding import usable

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SHAPES = ((), (5,), (3, 70), (4, 5, 3), (2, 3, 4, 5), (130, 2), (3, 0))

pytestmark = pytest.mark.skipif(not usable("numba"), reason="numba does not run here")


def laid_out(x: Tensor) -> list[Tensor]:
    """The same elements, in several layouts."""
    apart = x.new_empty([2 * n for n in x.shape])[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    axes = tuple(reversed(range(x.dim())))
    return [x, apart, x.permute(axes).contiguous().permute(axes)]


def dims_of(x: Tensor) -> list[int | tuple[int, ...]]:
    return [-1, 0, tuple(range(x.dim()))] + ([(0, -1)] if x.dim() > 2 else [])


def replaced(calls):
    """What torch gives, and what it gives with ours in its place, each of which must have been computed by us."""
    own = [call() for call in calls]
    with flagops.enable("all", backend="numba") as handle:
        made = [call() for call in calls]
        text = str(handle.report())
    assert "numba" in text
    return zip(own, made, strict=True)


def assert_like(own: Tensor, made: Tensor) -> None:
    assert (made.dtype, made.shape) == (own.dtype, own.shape)
    sizes = [i for i, n in enumerate(own.shape) if n > 1]
    if own.numel():
        assert [made.stride(i) for i in sizes] == [own.stride(i) for i in sizes]


EXACT = {
    "amax": lambda x, d, k: torch.amax(x, d, k),
    "amin": lambda x, d, k: torch.amin(x, d, k),
    "all": lambda x, d, k: torch.all(x, d, k),
    "any": lambda x, d, k: torch.any(x, d, k),
    "count_nonzero": lambda x, d, k: torch.count_nonzero(x, d),
    "max": lambda x, d, k: torch.max(x),
    "max_dim": lambda x, d, k: torch.max(x, d if isinstance(d, int) else -1, k),
    "min_dim": lambda x, d, k: torch.min(x, d if isinstance(d, int) else -1, k),
    "argmax": lambda x, d, k: torch.argmax(x, d if isinstance(d, int) else None, k),
    "argmin": lambda x, d, k: torch.argmin(x, d if isinstance(d, int) else None, k),
    "aminmax": lambda x, d, k: torch.aminmax(x, dim=d if isinstance(d, int) else None, keepdim=k),
    "sum": lambda x, d, k: torch.sum(x, d, k),
    "prod": lambda x, d, k: torch.prod(x, d, k) if isinstance(d, int) else torch.prod(x),
    "cumsum": lambda x, d, k: torch.cumsum(x, d if isinstance(d, int) else -1),
}
ROUNDED = {"sum", "prod", "cumsum"}  # of floats


@pytest.mark.drawn
@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_torchs(name, rng):
    calls = []
    for shape in SHAPES:
        for dtype in (*WHOLE, *(() if name in ROUNDED else FLOATS)):
            if dtype == torch.bool and name in ("argmax", "argmin"):
                continue
            values = torch.from_numpy(rng.integers(-3, 4, shape)).to(dtype)
            for x in laid_out(values) if values.numel() or name in ("all", "any", "sum", "count_nonzero") else ():
                for d in dims_of(x) if x.dim() else [-1]:
                    calls.append(partial(EXACT[name], x, d, bool(rng.integers(2))))
    for own, made in replaced(calls):
        pairs = zip(own, made, strict=True) if isinstance(own, tuple) else [(own, made)]
        for one, other in pairs:
            assert_like(one, other)
            assert torch.equal(one, other)


SUMS = {
    "sum": (lambda x, d, k: torch.sum(x, d, k), lambda x, d, k: x.abs().sum(d, k)),
    "nansum": (lambda x, d, k: torch.nansum(x, d, k), lambda x, d, k: x.abs().sum(d, k)),
    "mean": (lambda x, d, k: torch.mean(x, d, k), lambda x, d, k: x.abs().mean(d, k)),
    "cumsum": (lambda x, d, k: x.cumsum(_one(d)), lambda x, d, k: x.abs().cumsum(_one(d))),
    "logsumexp": (lambda x, d, k: x.logsumexp(d, k), lambda x, d, k: 1 + x.abs().amax(d, k)),
    "var": (lambda x, d, k: torch.var(x, d, correction=0, keepdim=k), lambda x, d, k: x.square().mean(d, k)),
    "var_mean": (
        lambda x, d, k: torch.var_mean(x, d, correction=0, keepdim=k)[1],
        lambda x, d, k: x.abs().mean(d, k),
    ),
    **{
        f"norm {p}": (
            lambda x, d, k, p=p: torch.linalg.vector_norm(x, p, d, k),
            lambda x, d, k, p=p: torch.linalg.vector_norm(x, p, d, k),
        )
        for p in (0, 1, 2, 3, float("inf"), -float("inf"))
    },
    "softmax": (lambda x, d, k: x.softmax(_one(d)), lambda x, d, k: (1 + x.abs()) * x.softmax(_one(d))),
    "log_softmax": (lambda x, d, k: x.log_softmax(_one(d)), lambda x, d, k: 1 + x.abs() + x.log_softmax(_one(d)).abs()),
}


def _one(d):
    return d if isinstance(d, int) else -1


@pytest.mark.drawn
@pytest.mark.parametrize("name", SUMS)
def test_what_is_rounded_is_near_float64(name, rng):
    call, weight = SUMS[name]
    calls, exact = [], []
    for shape in (s for s in SHAPES if 0 not in s):
        for dtype in FLOATS:
            for x in laid_out(torch.from_numpy(rng.standard_normal(shape)).to(dtype)):
                for d in dims_of(x) if x.dim() else [-1]:
                    k = bool(rng.integers(2))
                    calls.append(partial(call, x, d, k))
                    wide = x.double()
                    exact.append((call(wide, d, k), weight(wide, d, k), max(x.numel(), 8)))
    for (own, made), (value, size, n) in zip(replaced(calls), exact, strict=True):
        assert_like(own, made)
        testing.assert_near(made, value, 2 * n + 8, size, name)


def test_results_go_where_they_are_asked_to(rng):
    x = torch.from_numpy(rng.standard_normal((4, 6))).float()
    with flagops.enable("all", backend="numba"):
        for out in (torch.empty(6, dtype=torch.float64), torch.empty(12)[::2], torch.empty(0)):
            assert torch.sum(x, 0, out=out) is out
            testing.assert_near(out.float(), x.double().sum(0), 8, x.double().abs().sum(0))
        values, indices = torch.empty(0), torch.empty(0, dtype=torch.int64)
        torch.max(x, 1, out=(values, indices))
        assert torch.sum(x, 1, dtype=torch.float64).dtype == torch.float64
        assert torch.sum(x > 0).item() == int((x.numpy() > 0).sum())
        assert torch.any((x > 0).to(torch.uint8)).dtype == torch.uint8
    assert values.tolist() == x.amax(1).tolist()
    assert indices.tolist() == x.argmax(1).tolist()


def test_a_sum_has_the_same_bits_however_it_lies_and_on_any_number_of_threads(rng):
    threads = torch.get_num_threads()
    x = torch.from_numpy(rng.standard_normal((5, 70_000))).float()
    sums = []
    with flagops.enable("all", backend="numba"):
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                sums += [x.sum(1), x.t().contiguous().sum(0), torch.stack([row.sum() for row in x])]
        finally:
            torch.set_num_threads(threads)
    for other in sums[1:]:
        assert torch.equal(sums[0], other)


def test_what_torch_refuses_is_refused():
    x = torch.zeros(3, 0)
    refused = [lambda: x.amax(1), lambda: torch.max(x, 1), lambda: x.argmax(), lambda: x.sum(2), lambda: x.sum((0, 0))]
    for call in refused:
        errors = []
        for words in ([], ["all"]):
            with pytest.raises((IndexError, RuntimeError)) as caught, flagops.enable(words or "-all", backend="numba"):
                call()
            errors.append(caught.type)
        assert errors[0] is errors[1]


def test_a_row_of_nothing_but_minus_infinity_is_nan():
    x = torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, 0.0]])
    with flagops.enable("all", backend="numba"):
        assert x.softmax(1).isnan().tolist() == [[True] * 3, [False] * 3]
        assert x.log_softmax(1)[1, 1] == -torch.inf
        assert x.logsumexp(1)[0] == -torch.inf


ROWS = 9


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", ((ROWS, 33), (2, 5, 6, 7), (300, 16)), ids=str)
def test_layer_norm_and_its_gradients_are_near_float64(shape, dtype, rng):
    draw = lambda *s: torch.from_numpy(rng.standard_normal(s)).to(dtype)  # noqa: E731
    n = shape[-1]
    x, w, b, g = draw(*shape), draw(n), draw(n), draw(*shape)

    def gradients(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        y = torch.nn.functional.layer_norm(leaves[0], (n,), *leaves[1:])
        y.backward(tensors[3])
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    exact = gradients(*(t.double() for t in (x, w, b, g)))
    with flagops.enable("all", backend="numba") as handle:
        made = gradients(x, w, b, g)
        report = str(handle.report())
    assert "native_layer_norm_backward" in report
    count = x.numel()
    weights = (1 + exact[0].abs(), 20 * (1 + exact[1].abs()), count // n * 9.0, count // n * 9.0)
    for value, got, weight in zip(exact, made, weights, strict=True):
        testing.assert_near(
            got, value, 4 * n + 20, torch.broadcast_to(torch.as_tensor(weight), value.shape), "gradient"
        )


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("shape", ((7, 5), (3, 4, 2, 3)), ids=str)
def test_cross_entropy_and_its_gradient_are_near_float64(shape, reduction, rng):
    x = torch.from_numpy(rng.standard_normal(shape)).float()
    target = torch.from_numpy(rng.integers(0, shape[1], (shape[0], *shape[2:])))
    target.view(-1)[0] = -100
    weight = torch.from_numpy(rng.uniform(0.5, 2, shape[1])).float()

    def losses(x, weight):
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, target, weight, reduction=reduction)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    exact = losses(x.double(), weight.double())
    with flagops.enable("all", backend="numba"):
        made = losses(x, weight)
        with pytest.raises((IndexError, ValueError), match="out of bounds"):
            torch.nn.functional.nll_loss(x, torch.full_like(target, shape[1]))
    for value, got in zip(exact, made, strict=True):
        size = 4 * (1 + float(exact[0].abs().max()))
        testing.assert_near(got, value, 4 * x.numel(), torch.full_like(value, size), "loss")


@pytest.mark.parametrize("train", (True, False))
def test_batch_norm_its_statistics_and_its_gradients_are_torchs(train, rng):
    x = torch.from_numpy(rng.standard_normal((6, 3, 5)))
    g = torch.from_numpy(rng.standard_normal((6, 3, 5)))

    def results():
        layer, leaf = torch.nn.BatchNorm1d(3, dtype=torch.float64).train(train), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    own = results()
    with flagops.enable("all", backend="numba") as handle:
        made = results()
        assert "native_batch_norm_backward" in str(handle.report())
    for value, got in zip(own, made, strict=True):
        testing.assert_near(got.double(), value.double(), 200, torch.full(value.shape, 30.0).double())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_batch_norms_means_have_its_parameters_dtype(dtype, rng):
    """That of whichever there is; torch refuses two of them."""
    x = torch.from_numpy(rng.standard_normal((6, 3, 5))).to(dtype)

    def dtypes(weight, bias, running):
        made = [None if given is None else torch.ones(3, dtype=given) for given in (weight, bias, running, running)]
        try:
            return [y.dtype for y in torch.native_batch_norm(x, *made, True, 0.1, 1e-5)]
        except RuntimeError:
            return RuntimeError

    kinds = list(itertools.product((None, dtype, torch.float32), repeat=3))
    expected = [dtypes(*given) for given in kinds]
    with flagops.enable("native_batch_norm", backend="numba"):
        assert [dtypes(*given) for given in kinds] == expected


def _group_norms(shape, groups, parameters, rng):
    """A group norm of tensors in several layouts, and its gradients, as `gradients(dtype)`."""
    x, g = (torch.from_numpy(rng.standard_normal(shape)) for _ in range(2))
    w, b = (torch.from_numpy(rng.standard_normal(shape[1])) for _ in range(2))

    def results(dtype, kind=None):
        made = []
        for lay in laid_out(x.to(dtype)):
            given = [t.clone().to(kind or dtype).requires_grad_() if parameters else None for t in (w, b)]
            leaf = lay.detach().requires_grad_()
            y = torch.nn.functional.group_norm(leaf, groups, *given)
            y.backward(g.to(dtype))
            made += [y.detach(), leaf.grad, *(t.grad for t in given if t is not None)]
            sizes = shape[0], shape[1], math.prod(shape[2:]), groups
            made += torch.native_group_norm(leaf.detach().contiguous(), *given, *sizes, 1e-5)[1:]
        return [t.detach() for t in made]

    return results


@pytest.mark.parametrize("parameters", (True, False))
@pytest.mark.parametrize("shape", ((3, 6), (2, 6, 5), (2, 6, 5, 3), (2, 6, 2, 3, 2)), ids=str)
@pytest.mark.parametrize("groups", (1, 3, 6))
def test_group_norm_its_means_and_its_gradients_are_torchs(shape, groups, parameters, rng):
    results = _group_norms(shape, groups, parameters, rng)
    for dtype, kind in (
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.half, torch.float),
    ):
        own = results(dtype, kind)
        with flagops.enable("all", backend="numba") as handle:
            made = results(dtype, kind)
            assert "native_group_norm_backward" in str(handle.report())
        for value, got in zip(own, made, strict=True):
            assert_like(value, got)
            if dtype == torch.float64:
                testing.assert_near(got, value, 400, 30 + 30 * value.abs())


def test_group_norm_of_nothing_and_what_torch_refuses():
    def said(x, groups, *parameters):
        try:
            made = torch.native_group_norm(x, *parameters, *x.shape[:2], math.prod(x.shape[2:]), groups, 1e-5)
            return [(t.dtype, t.shape, t.stride(), t.nan_to_num(9).tolist()) for t in made]
        except RuntimeError:
            return RuntimeError

    ones = torch.ones
    calls = [
        (ones(0, 4, 3), 2, ones(4), ones(4)),
        (ones(2, 4, 0), 2, None, None),
        (ones(2, 4, 0, dtype=torch.bfloat16), 2, ones(4), ones(4)),
        (ones(2, 4, 3), 3, None, None),
        (ones(2, 4, 3), 0, None, None),
        (ones(2, 4, 3), 2, ones(3), None),
        (ones(2, 4, 3), 2, ones(4, dtype=torch.float64), None),
        (ones(2, 4, 3), 2, ones(4, dtype=torch.int64), None),
    ]
    expected = [said(*given) for given in calls]
    with flagops.enable("all", backend="numba"):
        assert [said(*given) for given in calls] == expected
    assert expected.count(RuntimeError) == 5


def test_a_batch_norm_of_equal_elements_without_eps_is_its_bias():
    """As in torch, which makes no NaN of them."""

    def results():
        made = torch.native_batch_norm(torch.full((4, 3), 2.0), None, torch.ones(3), None, None, True, 0.1, 0.0)
        return [x.tolist() for x in made]

    expected = results()
    with flagops.enable("all", backend="numba"):
        assert results() == expected == [[[1.0] * 3] * 4, [2.0] * 3, [0.0] * 3]


LOSSES = {
    "mse": torch.nn.functional.mse_loss,
    "l1": torch.nn.functional.l1_loss,
    "smooth": partial(torch.nn.functional.smooth_l1_loss, beta=0.5),
    "huber": partial(torch.nn.functional.huber_loss, delta=0.7),
    "logits": torch.nn.functional.binary_cross_entropy_with_logits,
    "bce": lambda x, y, reduction: torch.nn.functional.binary_cross_entropy(
        x.clamp(0.125, 0.875), y, y, reduction=reduction
    ),
    "kl": lambda x, y, reduction: torch.nn.functional.kl_div(x.log_softmax(1), y.round(), reduction=reduction),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_elements_and_their_gradients_are_near_float64(name, reduction, rng):
    x, y = torch.from_numpy(rng.standard_normal((9, 7)) * 3), torch.from_numpy(rng.random((9, 7)))

    def losses(dtype):
        leaf = x.to(dtype).t().contiguous().t().requires_grad_()
        loss = LOSSES[name](leaf, y.to(dtype), reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    for dtype in (torch.float32, torch.bfloat16):
        x, y = x.to(dtype).double(), y.to(dtype).double()
        exact, own = losses(torch.float64), losses(dtype)
        with flagops.enable("all", backend="numba"):
            made = losses(dtype)
        for value, theirs, got in zip(exact, own, made, strict=True):
            assert_like(theirs, got)
            testing.assert_near(got, value, 64, 8 * (1 + value.abs().max()).expand(value.shape))


def test_a_destination_of_logsigmoid_is_resized_without_a_word():
    x = torch.tensor([-1.0, 2.0])
    out, buffer = torch.ones(3), torch.ones(0)
    with flagops.enable("all", backend="numba"), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.aten.log_sigmoid_forward.output(x, output=out, buffer=buffer)
    testing.assert_near(out, torch.nn.functional.logsigmoid(x.double()), 8, 1 + x.double().abs())
    testing.assert_near(buffer, (-x.double().abs()).exp(), 8, torch.ones(2).double())


def test_a_probability_beyond_one_is_refused():
    with flagops.enable("all", backend="numba"), pytest.raises(RuntimeError, match="between 0 and 1"):
        torch.nn.functional.binary_cross_entropy(torch.tensor([1.5]), torch.ones(1))
