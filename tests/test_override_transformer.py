"""`flagops.enable` and torch's fused operators: norms, attention, grouped and FP8 products."""

import contextlib
import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flagops
from flagops.override.forms import form_of
from flagops.override.lowering import LOWERINGS, Pass
from flagops.override.steps import Steps
from flagops.testing import assert_near, assert_of

sys.path.insert(0, str(Path(__file__).parent))
from overriding import counted, untouched, usable  # noqa: F401

BACKENDS = usable("numba", "torch")


def attended(got, args, scale=None, is_causal=False, enable_gqa=False):
    """Within the operator's bound of the exact attention."""
    q, k, v, *mask = (x[(None,) * (4 - x.dim())] for x in args)
    mask = mask[0].expand(*mask[0].shape[:-2], q.shape[2], -1) if mask else None
    assert_of("scaled_dot_product_attention", got[(None,) * (4 - got.dim())], q, k, v, mask, is_causal, scale)


def attention_calls(dtype):
    q, k, v = (torch.randn(2, 4, s, 8).to(dtype) for s in (5, 7, 7))
    keep = torch.rand(5, 7) > 0.3
    keep[2] = False
    added = torch.randn(2, 1, 5, 7).to(dtype)
    return {
        "plain": ((q, k, v), {}),
        "causal": ((q, k, v), {"is_causal": True}),
        "bool": ((q, k, v, keep), {}),
        "bool row": ((q, k, v, keep[:1]), {}),
        "added": ((q, k, v, added), {}),
        "scale": ((q, k, v), {"scale": 0.3}),
        "grouped": ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
        "narrow values": ((q, k, v[..., :3]), {}),
        "one batch axis": ((q[0], k[0], v[0]), {}),
        "no batch axis": ((q[0, 0], k[0, 0], v[0, 0], keep), {}),
        "strided": ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention(backend, dtype):
    for name, (args, kwargs) in attention_calls(dtype).items():
        expected = F.scaled_dot_product_attention(*args, **kwargs)
        with flagops.enable(backend=backend) as handle:
            got = F.scaled_dot_product_attention(*args, **kwargs)
            with torch.inference_mode():
                again = F.scaled_dot_product_attention(*args, **kwargs)
        assert counted(handle, "scaled_dot_product_attention") == (2, {}), name
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        attended(got, args, **kwargs)
        assert torch.equal(got, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_attention(backend):
    for name, (args, kwargs) in attention_calls(torch.float64).items():
        found = []
        for enabled in (False, True):
            inputs = [x.detach().clone() for x in args]
            inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
            handle = flagops.enable(backend=backend) if enabled else None
            F.scaled_dot_product_attention(*inputs, **kwargs).square().sum().backward()
            if handle:
                handle.disable()
                assert counted(handle, "scaled_dot_product_attention") == (1, {}), name
            found.append([x.grad for x in inputs if x.is_floating_point()])
        for expected, got in zip(*found, strict=True):
            assert_near(got, expected, 200, expected.abs().sum(), name)  # sums in another order


def test_attention_that_torch_keeps():
    q, k, v = (torch.randn(1, 4, 5, 8) for _ in range(3))
    with flagops.enable(backend=BACKENDS[0]) as handle:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
        F.scaled_dot_product_attention(q, k[:, :1], v[:, :1])
    assert counted(handle, "scaled_dot_product_attention") == (
        0,
        {"dropout": 1, "heads that differ without enable_gqa": 2},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norm(backend, dtype):
    x = torch.randn(3, 4, 16).to(dtype)
    weight = torch.randn(16).to(dtype)
    calls = [((16,), weight, 1e-5), ((16,), None, None), ((4, 16), torch.randn(4, 16).to(dtype), 0.1)]
    tiny = (x * 1e-4, (16,), None, None)
    for args in [*((x, *call) for call in calls), tiny]:
        expected = F.rms_norm(*args)
        with flagops.enable(backend=backend) as handle:
            got = F.rms_norm(*args)
        assert counted(handle, "rms_norm") == (1, {})
        assert got.dtype == expected.dtype
        x, shape, weight, eps = args
        flat = x.flatten(-len(shape)), None if weight is None else weight.flatten()
        least = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # torch's, of what it sums in
        assert_of("rms_norm", got.flatten(-len(shape)), *flat, least if eps is None else eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_axes_that_are_no_view_as_one(backend):
    x, weight = torch.randn(2, 5, 4, 3), torch.randn(4, 3, dtype=torch.float32)
    for y in (x.mT, x.mT.contiguous().mT, x.permute(1, 0, 2, 3), x.to(memory_format=torch.channels_last), x[:, :, ::2]):
        for axes in (2, 3):
            shape = y.shape[-axes:]
            w = weight.T if axes == 2 and shape == (3, 4) else weight if shape == (4, 3) else None
            expected = F.rms_norm(y, shape, w, -0.01)
            with flagops.enable("rms_norm", backend) as handle:
                got = F.rms_norm(y, shape, w, -0.01)
            assert counted(handle, "rms_norm") == (1, {})
            assert got.stride() == expected.stride()
            assert_of("rms_norm", got.flatten(-axes), y.flatten(-axes), None if w is None else w.flatten(), -0.01)


def computed_by(backend, name, *args, **named):
    """What the lowering of an overload that only CUDA has makes, called as a site calls it."""
    overload = getattr(torch.ops.aten, name).default
    steps = Steps(form_of(overload, name), backend, args)
    result = LOWERINGS[name].function(steps, *args, **named)
    assert backend in steps.by("").split("/")
    return result


def test_numbers_of_a_call_in_steps_stay_with_the_host():
    """A device would be waited for, and no kernel that takes one needs it there."""
    x = torch.empty(3, device="meta")
    steps = Steps(form_of(torch.ops.aten.add.Tensor, "add.Tensor"), "triton", (x, x))
    for value in (2, 0.1, True):
        number = steps.number(value)
        assert (number.device.type, number.item()) == ("cpu", value)


@pytest.mark.parametrize("backend", usable("numba", "numpy"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_that_cuda_has_in_one_kernel(dtype, backend):
    """Its two results and its backward: a CPU composes it of parts that are replaced."""

    computed = functools.partial(computed_by, backend)
    wide = torch.promote_types(dtype, torch.float32)
    for shape, weighted, eps in itertools.product(((7,), (3, 7)), (False, True), (None, 0.1)):
        x, w = torch.randn(4, 3, 7).to(dtype), torch.randn(shape).to(dtype) if weighted else None
        leaves = [t.clone().requires_grad_() for t in (x, w) if t is not None]
        rstd = leaves[0].to(wide).square().mean(tuple(range(-len(shape), 0)), keepdim=True)
        rstd = (rstd + (torch.finfo(wide).eps if eps is None else eps)).rsqrt()
        y = (leaves[0].to(wide) * rstd * (leaves[1] if weighted else 1)).to(dtype)
        slope = torch.randn_like(y)
        expected = [y, rstd, *torch.autograd.grad(y, leaves, slope)]
        got = computed("_fused_rms_norm", x, list(shape), w, eps)
        grads = computed("_fused_rms_norm_backward", slope, x, list(shape), got[1], w, [True, weighted])
        assert (grads[1] is not None) is weighted
        for a, b in zip([*got, *grads[: 1 + weighted]], expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert_near(a, b, 100, 1 + b.detach().abs().sum())
        assert computed("_fused_rms_norm_backward", slope, x, list(shape), got[1], w, [False, False]) == (None, None)


@pytest.mark.parametrize("backend", usable("numba", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [1, 2])
def test_the_attention_that_cuda_has_in_one_kernel(shared, dtype, backend):
    """Every result and every gradient of both kernels, held to float64; they lie as torch's shape functions say."""
    computed = functools.partial(computed_by, backend)
    for is_causal, scale, biased in ((False, None, False), (True, 0.3, False), (False, 0.5, True)):
        q, k, v = (torch.randn(2, heads, 5, 8).to(dtype) for heads in (4, 4 // shared, 4 // shared))
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        bias = torch.randn(4, 5, 5).to(dtype) if biased else None
        leaves = [x.double().requires_grad_() for x in (q, k, v, *([bias] if biased else []))]
        wide = [x.repeat_interleave(shared, 1) for x in leaves[1:3]]
        logits = leaves[0] @ wide[0].mT * (8**-0.5 if scale is None else scale)
        logits = logits + leaves[3] if biased else logits
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf) if is_causal else logits
        expected, sums = logits.softmax(-1) @ wide[1], logits.logsumexp(-1)
        slope = torch.randn(expected.shape).to(dtype)
        grads = torch.autograd.grad(expected, leaves, slope.double())

        def near(got, exact, like=None):
            assert (got.shape, got.dtype) == (exact.shape, dtype)
            assert like is None or got.stride() == like.stride()
            assert_near(got, exact.detach(), 60, 1 + exact.detach().abs().sum())

        meta = [x.to("meta") for x in (q, k, v)]
        named, tail = {"scale": scale}, (0.0, is_causal)
        if not biased:
            name = "_scaled_dot_product_flash_attention"
            got = computed(name, q, k, v, *tail, **named)
            like = getattr(torch.ops.aten, name)(*meta, *tail, **named)
            near(got[0], expected, like[0])
            assert_near(got[1], sums.detach(), 60, 1 + sums.detach().abs())
            assert got[2:6] == (None, None, 5, 5)
            assert [(x.shape, x.dtype) for x in got[6:]] == [(x.shape, x.dtype) for x in like[6:]]
            made = computed(f"{name}_backward", slope, q, k, v, *got[:6], *tail, *got[6:8], **named)
            for x, exact, given in zip(made, grads, (q, k, v), strict=True):
                near(x, exact, given)
        name = "_scaled_dot_product_efficient_attention"
        full = None if bias is None else bias.expand(2, 4, 5, 5)
        for wanted in (True, False):
            got = computed(name, q, k, v, full, wanted, *tail, **named)
            like = getattr(torch.ops.aten, name)(*meta, None, wanted, *tail, **named)
            near(got[0], expected, like[0])
            assert [(x.shape, x.dtype, x.stride()) for x in got[1:]] == [
                (x.shape, x.dtype, x.stride()) for x in like[1:]
            ]
            if wanted:
                assert_near(got[1][..., :5], sums.detach(), 60, 1 + sums.detach().abs())
        for needs in ([True, True, True, True], [False, True, False, False]):
            made = computed(f"{name}_backward", slope, q, k, v, bias, *got, 0.0, needs, is_causal, **named)
            exact = [*grads, None][:4]
            for x, there, need in zip(made, exact, needs, strict=True):
                assert (x is not None) == (need and there is not None)
                if x is not None:
                    near(x, there, x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else None)


def test_the_attention_that_cuda_has_is_called_and_differentiated_as_torchs():
    """By name it stands at a CPU too, where torch's own kernel gives the same under another name."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)
    (slope,) = torch.autograd.grad(expected[0].sin().sum(), q)
    with flagops.enable("scaled_dot_product_attention", backend="numba") as handle:
        flash = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True, 0.0, True)
        grads = [torch.autograd.grad(got[0].sin().sum(), q)[0] for got in (flash, efficient)]
    for name in ("flash", "flash_attention_backward", "efficient", "efficient_attention_backward"):
        name = name if "_" in name else f"{name}_attention"
        assert counted(handle, f"_scaled_dot_product_{name}") == (1, {})
    for got, sums, grad in ((flash[0], flash[1], grads[0]), (efficient[0], efficient[1][..., :5], grads[1])):
        for ours, theirs in ((got, expected[0]), (sums, expected[1]), (grad, slope)):
            assert_near(ours.detach(), theirs.detach(), 60, 1 + theirs.detach().abs().sum())


def test_attention_of_cuda_that_is_not_ours_says_why():
    q = torch.randn(1, 2, 3, 4)
    flash = functools.partial(computed_by, "numba", "_scaled_dot_product_flash_attention")
    with pytest.raises(Pass, match="dropout"):
        flash(q, q, q, 0.5)
    with pytest.raises(Pass, match="debugger"):
        flash(q, q, q, 0.0, False, True)
    with pytest.raises(Pass, match="as many keys"):
        flash(q, q[:, :, :2], q[:, :, :2], 0.0, True)
    with pytest.raises(Pass, match="refuses"):
        flash(q, q[:, :, :, :2], q, 0.0)


def test_gradients_of_attention_lie_as_torchs():
    def gradients(inputs, named):
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = F.scaled_dot_product_attention(*leaves, **named)
        return [result, *torch.autograd.grad(result.square().sum(), leaves)]

    for batch, values, grouped in itertools.product(((), (3,), (2, 4), (2, 2, 4)), (8, 5), (1, 2)):
        if grouped > 1 and batch != (2, 4):
            continue
        fewer = (*batch[:-1], batch[-1] // grouped) if batch else ()
        q, k, v = (torch.randn(shape) for shape in ((*batch, 6, 8), (*fewer, 7, 8), (*fewer, 7, values)))
        for turned, named in itertools.product((0, -1, -3), ({}, {"is_causal": True}, {"scale": 0.3})):
            axis = max(turned, -q.dim())  # that lies where the rows do: of columns, or of heads
            given = [
                x.transpose(axis, -2).contiguous().transpose(axis, -2) if turned and batch else x for x in (q, k, v)
            ]
            named = {**named, "enable_gqa": grouped > 1}
            expected = gradients(given, named)
            with flagops.enable("scaled_dot_product_attention", BACKENDS[0]) as handle:
                got = gradients(given, named)
                assert counted(handle, "scaled_dot_product_attention")[0] == 1
            assert [x.stride() for x in got] == [x.stride() for x in expected], (batch, values, grouped, turned)
            for x, y in zip(got, expected, strict=True):
                assert_near(x, y, 100, 1 + y.abs().sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_of_a_module_of_torch(backend):
    """An encoder layer with norms, attention and products in training: same loss, same gradients."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(16)
            self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
            self.out = torch.nn.Linear(16, 3)

        def forward(self, x):
            y = self.norm(x)
            return self.out(x + self.attention(y, y, y, need_weights=False)[0])

    model, x = Block().double(), torch.randn(2, 6, 16).double()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        handle = flagops.enable(backend=backend) if enabled else None
        loss = model(x).square().mean()
        loss.backward()
        if handle:
            handle.disable()
            assert counted(handle, "rms_norm")[0] == 1
            assert counted(handle, "scaled_dot_product_attention")[0] == 1
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, got in zip(*found, strict=True):
        assert_near(got, expected, 200, expected.abs().sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_products(backend):
    a = torch.randn(6, 16).bfloat16().requires_grad_()
    b = torch.randn(3, 16, 8).bfloat16().requires_grad_()
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = torch._grouped_mm(a, b, offs=offsets)
    with flagops.enable(backend=backend) as handle:
        got = torch._grouped_mm(a, b, offs=offsets)
    assert counted(handle, "_grouped_mm") == (1, {})
    assert got.requires_grad
    assert got.dtype == expected.dtype
    assert_of("grouped_matmul", got, a, b, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_every_form_and_their_gradients(dtype):
    """Of small whole numbers, whose sums are exact; gradients are grouped products of other forms."""
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    shapes = [((24, 16), (3, 16, 40), ends), ((3, 8, 16), (3, 16, 40), None), ((8, 24), (24, 40), ends)]
    for left, right, offs in [*shapes, ((3, 8, 16), (16, 24), ends)]:
        a, b = (torch.randint(-2, 3, shape).to(dtype) for shape in (left, right))

        def results():
            leaves = [x.clone().requires_grad_() for x in (a, b)]  # noqa: B023
            made = torch._grouped_mm(*leaves, offs=offs)  # noqa: B023
            return [made, *torch.autograd.grad(made, leaves, torch.ones_like(made))]

        expected = results()
        with flagops.enable("_grouped_mm", BACKENDS[0]) as handle:
            got = results()
            assert counted(handle, "_grouped_mm") == (3, {})
        for x, y in zip(got, expected, strict=True):
            assert x.stride() == y.stride()
            assert torch.equal(x, y), (left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_fp8(backend):
    a, b = torch.randn(16, 256).to(torch.float8_e4m3fn), torch.randn(32, 256).to(torch.float8_e4m3fn)
    one, two = torch.tensor(0.5), torch.tensor(3.0)
    expected = (a.float() * 0.5) @ (b.float() * 3).T
    with flagops.enable(backend=backend) as handle:
        got = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=two, out_dtype=torch.float32)
        assert counted(handle, "_scaled_mm") == (1, {})
        assert_near(got, expected, 2 * 256, (a.float().abs() * 0.5) @ (b.float().abs() * 3).T)
        with contextlib.suppress(RuntimeError, ValueError):  # torch's own
            torch._scaled_mm(a, b.t(), scale_a=torch.rand(2, 1), scale_b=two, out_dtype=torch.float32)
    reason = "scales other than one, one of a row and a column, or of blocks of 1 x 128 and 128 x 128"
    assert counted(handle, "_scaled_mm") == (1, {reason: 1})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, None])
def test_products_of_fp8_with_scales_of_rows_and_a_bias(backend, dtype):
    """Small whole numbers times powers of 2, so that nothing but the result is rounded."""
    a, b = (torch.randint(-4, 5, shape).to(torch.float8_e4m3fn) for shape in ((16, 48), (32, 48)))
    bias, half = torch.randint(-9, 9, (32,)).float(), torch.tensor(0.5)
    rows, columns = 2.0 ** torch.randint(-3, 3, (16, 1)), 2.0 ** torch.randint(-3, 3, (1, 32))
    for scales, more, result in itertools.product(((half, half), (rows, columns)), (None, bias), (None, half)):
        named = {"scale_a": scales[0], "scale_b": scales[1], "bias": more, "scale_result": result, "out_dtype": dtype}
        expected = torch._scaled_mm(a, b.t(), **named)
        with flagops.enable("_scaled_mm", backend) as handle:
            got = torch._scaled_mm(a, b.t(), **named)
            out = torch._scaled_mm(a, b.t(), **named, out=torch.empty(0, dtype=expected.dtype))
            assert {row.op: row.passed for row in handle.report().rows} == {
                "aten::_scaled_mm": {},
                "aten::_scaled_mm.out": {},
            }
        for x in (got, out):
            assert (x.dtype, x.stride()) == (expected.dtype, expected.stride())
            assert torch.equal(x.float(), expected.float()), named


def test_only_what_is_asked_for_and_handles_in_any_order():
    x = torch.randn(3, 8)
    q = torch.randn(1, 2, 3, 8)
    first = flagops.enable(ops="rms_norm", backend=BACKENDS[0])
    second = flagops.enable(ops="default,-rms_norm", backend=BACKENDS[0])
    F.rms_norm(x, (8,))
    F.scaled_dot_product_attention(q, q, q)
    first.disable()
    F.rms_norm(x, (8,))
    F.scaled_dot_product_attention(q, q, q)
    second.disable()
    assert counted(first, "rms_norm") == (1, {})
    assert counted(first, "scaled_dot_product_attention") == (0, {})
    assert counted(second, "rms_norm") == (0, {})
    assert counted(second, "scaled_dot_product_attention") == (2, {})


def test_unasked_products_are_counted_as_bypassing():
    a, b = torch.randn(4, 16).bfloat16(), torch.randn(1, 16, 8).bfloat16()
    with flagops.enable(ops="mm", backend=BACKENDS[0]) as handle:
        torch._grouped_mm(a, b, offs=torch.tensor([4], dtype=torch.int32))
    assert handle.report().bypassed["grouped products (mixture of experts)"] == 1
    assert counted(handle, "_grouped_mm") == (0, {})


def test_compiled_and_transformed_code_sees_what_they_consist_of():
    x, q = torch.randn(3, 8, requires_grad=True), torch.randn(1, 2, 3, 8, requires_grad=True)

    def call(x, q):
        return F.rms_norm(x, (8,)).sum() + F.scaled_dot_product_attention(q, q, q).square().sum()

    expected = torch.autograd.grad(call(x, q), (x, q))
    with flagops.enable(backend=BACKENDS[0]) as handle:
        torch._dynamo.reset()
        compiled = torch.autograd.grad(torch.compile(call, backend="aot_eager")(x, q), (x, q))
        transformed = torch.func.grad(call, argnums=(0, 1))(x.detach(), q.detach())
        mapped = torch.vmap(lambda row: F.rms_norm(row, (8,)))(x.detach())
    for got in (compiled, transformed):
        for a, b in zip(got, expected, strict=True):
            assert_near(a, b, 200, b.abs().sum())
    assert_of("rms_norm", mapped, x, eps=torch.finfo(torch.float32).eps)
    assert counted(handle, "rms_norm") == (0, {"a transform of torch.func is active": 1})
