"""What the bare device owns, and what it says of the rest: run by test_bare.py in a process of its own."""

import copy
import io
import itertools

import pytest
import torch

import bare
import flagops
from bare import models, run
from flagops import testing

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


@pytest.fixture(scope="module", autouse=True)
def device():
    bare.load()


@pytest.fixture
def counted():
    bare.fallback("count")
    bare.fallen(clear=True)
    yield bare.fallen
    bare.fallback("none")


def same(got, expected):
    """The elements, dtype and strides of a tensor on bare, which none but a copy has touched."""
    assert got.device == torch.device("bare:0")
    assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
    got = got.cpu()
    wide = torch.complex128 if got.is_complex() else torch.float64
    assert torch.equal(got.to(wide), expected.to(wide))


def drawn(*shape, dtype=torch.float32):
    x = torch.randint(-9, 10, shape)
    return torch.complex(x.float(), -2 * x.float()) if dtype.is_complex else x.to(dtype)


def test_memory_is_aligned_and_of_the_device():
    for size in (0, 1, 3, 1000):
        x = torch.empty(size, device="bare")
        assert x.is_bare
        assert x.data_ptr() % 64 == 0
        assert x.untyped_storage().device == torch.device("bare:0")
    assert torch.empty(2, 3, 4, 5, device="bare", memory_format=torch.channels_last).stride() == (60, 1, 15, 3)
    with pytest.raises(RuntimeError, match="only memory of the CPU can be pinned"):
        torch.empty(2, device="bare", pin_memory=True)
    assert drawn(3).pin_memory().is_pinned()
    assert not drawn(3).is_pinned()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_of_any_dtype_and_strides(dtype):
    x = drawn(4, 6, 5, dtype=dtype)
    y = x.to("bare")
    same(y, x)
    for view in (
        lambda t: t[1:3, ::2],
        lambda t: t.permute(2, 0, 1),
        lambda t: t.expand(2, 4, 6, 5),
        lambda t: t[:, :, 1],
        lambda t: t[:0],
    ):
        same(view(y), view(x))
        same(view(y).contiguous(), view(x).contiguous())
        same(view(y).clone(), view(x).clone())
    same(y.mT.to("cpu").to("bare"), x.mT)
    target, expected = (torch.empty(4, 5, 6, dtype=dtype, device=device).mT for device in ("bare", "cpu"))
    same(target.copy_(y), expected.copy_(x))
    if not dtype.is_complex:
        for other in (torch.float32, torch.int32):
            same(y.to(other), x.to(other))
            same(x.to("bare", other), x.to(other))


def test_copies_resolve_conjugates_and_negatives():
    x = drawn(3, 4, dtype=torch.complex64)
    y = x.to("bare")
    assert y.conj().is_conj()
    same(y.conj().clone(), x.conj().clone())
    same(y.conj().resolve_conj(), x.conj().resolve_conj())
    same(y.conj().imag.clone(), x.conj().imag.clone())
    same(torch.view_as_real(y), torch.view_as_real(x))
    same(torch.view_as_complex(torch.view_as_real(y)), x)


def test_an_overlapping_copy_is_refused_as_on_the_cpu():
    for device in ("cpu", "bare"):
        x = drawn(8).to(device)
        with pytest.raises(RuntimeError, match="single memory location"):
            x[1:].copy_(x[:-1])


def test_views_share_memory():
    x = drawn(4, 6)
    y = x.to("bare")
    for view in (
        lambda t: t.view(3, 8),
        lambda t: t.unfold(1, 3, 2),
        lambda t: t.as_strided((2, 2), (5, 3), 1),
        lambda t: t.reshape(2, 2, 6).transpose(0, 1),
        lambda t: t.view(torch.int32),
    ):
        assert view(y).untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        same(view(y), view(x))
    y[2].copy_(torch.full((6,), 5.0))
    assert y.view(-1)[12:18].tolist() == [5.0] * 6


def test_storages_are_resized_set_and_saved():
    x = drawn(6)
    y = x.to("bare")
    assert y.resize_(2, 5).shape == (2, 5)
    assert y.view(-1)[:6].tolist() == x.tolist()
    z = torch.empty(0, device="bare")
    same(z.set_(y.untyped_storage(), 1, (2, 2), (2, 1)), x[1:5].view(2, 2))
    z.set_(x.to("bare"))
    same(z, x)
    z.untyped_storage().resize_(0)
    assert z.untyped_storage().device == torch.device("bare:0")
    file = io.BytesIO()
    torch.save({"x": x.to("bare")}, file)
    for place in ("bare", "cpu"):
        file.seek(0)
        read = torch.load(file, map_location=place)["x"]
        assert read.device.type == place
        assert torch.equal(read.cpu(), x)
    same(copy.deepcopy(x.to("bare")), x)


def test_copies_within_the_device_can_be_left_to_a_kernel():
    x = drawn(3).to("bare")
    bare.own_copies(False)
    try:
        assert torch.equal(x.cpu().to("bare").cpu(), x.cpu())
        with pytest.raises(NotImplementedError, match="aten::_copy_from"):
            x.clone()
    finally:
        bare.own_copies(True)


def test_what_has_no_kernel_says_so():
    x = drawn(3, 3).to("bare")
    for mode, word in (("none", "bare"), ("raise", "has no kernel on bare")):
        bare.fallback(mode)
        try:
            for call in (lambda: x + 1, lambda: x.mul_(2), lambda: x @ x, lambda: x.sum(), lambda: repr(x)):
                with pytest.raises(NotImplementedError, match=f"aten::.*{word}"):
                    call()
        finally:
            bare.fallback("none")
    with pytest.raises(ValueError, match="'none', 'count' or 'raise', got 'cpu'"):
        bare.fallback("cpu")


def _adamw(x, grad):
    kept = [x.clone(), x.clone()]
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-8}
    torch._fused_adamw_([x], [grad], *([k] for k in kept), [], [x[:1].view(())], **rates, amsgrad=False, maximize=False)


MIXED = {
    "mm": lambda x, y, i: x.view(2, 2) @ y.view(2, 2),
    "addmm": lambda x, y, i: torch.addmm(x.view(2, 2), x.view(2, 2), y.view(2, 2)),
    "dot": lambda x, y, i: x.dot(y),
    "index_select": lambda x, y, i: x.index_select(0, y),
    "gather": lambda x, y, i: x.gather(0, y),
    "scatter": lambda x, y, i: x.scatter(0, i, y),
    "index_add": lambda x, y, i: x.index_add(0, i, y),
    "index_put": lambda x, y, i: x.index_put((i,), y),
    "put": lambda x, y, i: x.put(i, y),
    "masked_scatter": lambda x, y, i: x.masked_scatter(i > 0, y),
    "nll_loss": lambda x, y, i: torch.nn.functional.nll_loss(x.view(2, 2), i[:2], y[:2]),
    "lerp": lambda x, y, i: x.lerp(y, 0.5),
    "multinomial": lambda x, y, i: x.multinomial(9),
    "_fused_adamw_": lambda x, y, i: _adamw(x, y),
}


@pytest.mark.parametrize("name", MIXED)
def test_arguments_that_torch_refuses_raise_its_error(name):
    """Dtypes that differ, most of all, which a kernel of ours would have to be asked for, and torch's has not."""
    x, y, i = drawn(4).abs(), drawn(4).double(), torch.tensor([0, 1, 1, 0])
    with pytest.raises(RuntimeError) as expected:
        MIXED[name](x, y, i)
    torch.bare.host_memory = True
    with flagops.enable(backend="numba"), pytest.raises(RuntimeError) as got:
        MIXED[name](x.to("bare"), y.to("bare"), i.to("bare"))
    assert got.type is expected.type
    assert not isinstance(got.value, NotImplementedError)


def test_nobody_has_to_name_a_backend():
    """What torch computes faster on a CPU is not left to it where it has no kernel."""
    products = (torch.mm, lambda x, y: torch.addmm(x[0], x, y), lambda x, y: (x @ y).softmax(-1))
    for dtype, call in itertools.product((torch.float32, torch.bfloat16), products):
        x, y = drawn(7, 7, dtype=dtype), drawn(7, 7, dtype=dtype)
        there = x.to("bare"), y.to("bare")
        with flagops.enable(strict=True) as handle:
            got = call(*there)
        assert all(by.endswith("/numba") for row in handle.report().rows for by in row.replaced), handle.report()
        assert got.dtype == dtype
        exact = call(x.double(), y.double())
        testing.assert_near(got.cpu(), exact, 64, 1 + exact.abs())


def test_the_counting_fallback_is_the_cpu_and_tells(counted):
    x, w = drawn(2, 3, 8, 8), drawn(4, 3, 3, 3)
    y, v = (t.to("bare").requires_grad_() for t in (x, w))
    x.requires_grad_(), w.requires_grad_()
    results = []
    for a, b in ((x, w), (y, v)):
        out = torch.nn.functional.conv2d(a, b)
        (out * 2).sum().backward()
        results.append([out.detach().cpu(), a.grad.cpu(), b.grad.cpu()])
    for expected, got in zip(*results, strict=True):  # sums of small whole numbers
        assert torch.equal(got, expected)
    assert counted()["aten::convolution_overrideable"] == 1
    assert counted(clear=True)["aten::mul.out"] == 2
    assert counted() == {}


def test_random_numbers_have_a_seed(counted):
    draw = lambda: torch.rand(5, device="bare").tolist()  # noqa: E731
    torch.manual_seed(3)
    assert torch.bare.initial_seed() == 3
    state = torch.bare.get_rng_state()
    first, second = draw(), draw()
    assert first != second
    torch.bare.set_rng_state(state)
    assert [draw(), draw()] == [first, second]
    generator = torch.Generator("bare").manual_seed(4)
    assert generator.device == torch.device("bare:0")
    draws = [torch.rand(5, device="bare", generator=generator).tolist() for _ in range(2)]
    assert draws[0] != draws[1]
    with torch.random.fork_rng(devices=[0], device_type="bare"):
        torch.manual_seed(5)
    assert torch.bare.initial_seed() == 3


def test_autocast_casts_as_torch_lists(counted):
    layer, x = torch.nn.Linear(4, 4).to("bare"), drawn(2, 4).to("bare")
    functional = torch.nn.functional
    with torch.autocast("bare", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == (out @ out.T).dtype == torch.bfloat16
        assert out.softmax(-1).dtype == functional.layer_norm(out, (4,)).dtype == out.exp().dtype == torch.float32
        assert functional.cross_entropy(out, torch.tensor([1, 2], device="bare")).dtype == torch.float32
        assert (out + out).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_tied_parameters_stay_tied():
    model, _ = models.bert()
    count = len(list(model.parameters()))
    assert len(list(model.to("bare").parameters())) == count


def test_injected_draws_pick_by_cumulative_probability():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0]] * 4000)
    with models.injected(seed=1):
        picked = torch.multinomial(weights, 1)
    assert set(picked.flatten().tolist()) == {1, 3}
    with models.injected(seed=1):
        assert torch.equal(torch.multinomial(weights, 1), picked)


def test_the_judge_of_models_sees_what_is_off(counted):
    subject = run.Subject(*models.vit())
    there = subject.on("bare")
    logits = models.forward(there.model, there.inputs)
    assert run.judged("forward", subject, logits).startswith("ok")
    assert run.judged("forward", subject, logits.cpu() + 0.01).startswith("off by 0.01")
    assert run.judged("forward", subject, logits.cpu() * float("nan")).startswith("off by nan")
    losses = models.train(subject.model, subject.inputs)
    assert run.judged("train", subject, losses * 1.002).startswith("off by 0.002")
    subject = run.Subject(*models.FAMILIES["qwen2"]())
    tokens = models.greedy(subject.model, subject.inputs)
    assert run.judged("greedy", subject, tokens) == "ok"
    tokens[0, -1] += 1
    assert run.judged("greedy", subject, tokens) == "1 of 64 tokens differ"


def test_integers_of_64_bits_are_drawn_from_all_of_their_range():
    low = -(1 << 63)
    ranges = (
        (),
        (0, None),
        (-1, None),
        (low, None),
        (low, 0),
    )  # of others, as in torch, some numbers come twice as often
    with flagops.enable(backend="numba"):
        for given in ranges:
            x = torch.empty(4000, dtype=torch.int64, device="bare").random_(*given).cpu()
            begin, end = (*given, None)[:2] if given else (0, None)
            end = -low if end is None else end
            assert int(x.min()) >= begin
            assert int(x.max()) < end
            middle = (float(x.double().mean()) - (begin + end) / 2) / (end - begin)
            assert abs(middle) < 6 / (12 * 4000) ** 0.5  # six standard deviations


def test_draws_and_lines_into_other_dtypes():
    with flagops.enable(backend="numba"):
        for dtype in (torch.bool, torch.int32, torch.float64):
            half = torch.full((400,), 0.5).to("bare")
            out = torch.bernoulli(half, out=torch.empty(400, dtype=dtype, device="bare")).cpu()
            assert out.unique().tolist() == [0, 1]
        for count in (0, 1, 2, 6):
            same(
                torch.linspace(-5, 5, count, dtype=torch.int16, device="bare"),
                torch.linspace(-5, 5, count, dtype=torch.int16),
            )
        with pytest.raises(NotImplementedError, match="linspace"):
            torch.linspace(0, 1, 3, dtype=torch.complex64, device="bare")


def trained(module, x, *rest):
    """A result and the gradients of the operand and the parameters, on the CPU."""
    x = x.detach().requires_grad_()
    y = module(x, *rest)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).to(y.device))
    return [t.detach() for t in (y, x.grad, *(p.grad for p in module.parameters()))]


def steps(x):
    """Strides, but along axes that have none to take."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def as_on_the_cpu(module, *operands):
    """Training on the device as near float64 as the CPU's, and laid out alike."""
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) if x.is_floating_point() else x for x in operands]
        exact = trained(copy.deepcopy(module).double(), *(x.double() if x.is_floating_point() else x for x in operands))
        own = trained(copy.deepcopy(module).to(dtype), *given)
        with flagops.enable(backend="numba"):
            got = trained(copy.deepcopy(module).to("bare", dtype), *(x.to("bare") for x in given))
        for ours, theirs, value in zip(got, own, exact, strict=True):
            assert (ours.dtype, ours.shape, steps(ours)) == (theirs.dtype, theirs.shape, steps(theirs))
            size = 1 + float(value.abs().max())
            least = 3 * float((theirs.double() - value).abs().max())
            assert float((ours.cpu().double() - value).abs().max()) <= max(least, 16 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("last", (False, True))
def test_convolutions_and_norms_of_images_are_laid_out_as_on_the_cpu(last):
    """So that a result can be viewed in another shape, and that channels stay last where they are."""
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 4, 6, 5).to(memory_format=form)
    for layer in (
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.Conv2d(4, 8, 3, stride=2, groups=4),
        torch.nn.ConvTranspose2d(4, 6, 3, stride=2),
        torch.nn.GroupNorm(2, 4),
        torch.nn.BatchNorm2d(4),
        torch.nn.InstanceNorm2d(4, affine=True),
    ):
        as_on_the_cpu(layer.to(memory_format=form), x)
    if not last:
        as_on_the_cpu(Call(lambda x: torch.nn.functional.conv1d(x, x[:2].detach(), padding=1).view(-1)), x[0])


LOSSES = {
    "mse": torch.nn.functional.mse_loss,
    "l1": torch.nn.functional.l1_loss,
    "smooth": lambda x, y, reduction: torch.nn.functional.smooth_l1_loss(x, y, beta=0.5, reduction=reduction),
    "huber": lambda x, y, reduction: torch.nn.functional.huber_loss(x, y, delta=0.7, reduction=reduction),
    "bce": lambda x, y, reduction: torch.nn.functional.binary_cross_entropy(
        x.sigmoid(), y.sigmoid(), y.sigmoid(), reduction=reduction
    ),
    "logits": lambda x, y, reduction: torch.nn.functional.binary_cross_entropy_with_logits(
        x, y.sigmoid(), pos_weight=y[0].exp(), reduction=reduction
    ),
    "kl": lambda x, y, reduction: torch.nn.functional.kl_div(
        x.log_softmax(1), y.softmax(1).masked_fill(y > 1, 0), reduction=reduction
    ),
}


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_the_cpus(name, reduction):
    torch.manual_seed(0)
    as_on_the_cpu(Call(lambda x, y: LOSSES[name](x, y, reduction=reduction)), torch.randn(6, 5), torch.randn(6, 5))


def test_a_loss_is_scaled_as_on_the_cpu():
    """Up after some steps, down where a gradient is not finite, which is then not stepped by."""

    def scaled(device):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(6, 3).to(device), torch.linspace(-1, 1, 24).view(4, 6).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**127, growth_interval=2)
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale((layer(x) * 2.0**-120).sum()).backward()
            if step == 3:
                layer.weight.grad[1, 2] = float("nan")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), int(scaler._growth_tracker)))
        return seen, layer.weight.detach().cpu()

    expected, weight = scaled("cpu")
    with flagops.enable(backend="numba"):
        seen, got = scaled("bare")
    assert seen == expected
    assert {scale for scale, _ in seen} == {2.0**127, 2.0**126}  # beyond which there is no float32
    testing.assert_near(got, weight, 16, 1 + weight.abs())
