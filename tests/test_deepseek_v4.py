"""The stand-in for the official kernel module: its functions, and a model that is written to them."""

import contextlib
import importlib
import inspect
import itertools
import pathlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch

import flagops
from flagops import arrays, deepseek_v4, registry, testing

E4M3, E8M0, FP4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2
BACKENDS = [b for b in ("numba", "torch", "numpy") if registry.backend(b).unavailable() is None]
SIGNATURES = {
    "act_quant": "(x, block_size=128, scale_fmt=None, scale_dtype=torch.float32, inplace=False)",
    "fp4_act_quant": "(x, block_size=32, inplace=False)",
    "fp8_gemm": "(a, a_s, b, b_s, scale_dtype=torch.float32)",
    "fp4_gemm": "(a, a_s, b, b_s, scale_dtype=torch.float32)",
    "sparse_attn": "(q, kv, attn_sink, topk_idxs, softmax_scale)",
    "hc_split_sinkhorn": "(mixes, hc_scale, hc_base, hc_mult=4, sinkhorn_iters=20, eps=1e-06)",
    "hadamard_transform": "(x, scale=1.0)",
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with flagops.using(backend=request.param):
        yield request.param


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(deepseek_v4, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]
    assert set(deepseek_v4.__all__) == set(SIGNATURES)


def test_act_quant_modes(backend):
    x = torch.randn(2, 3, 256).bfloat16()
    codes, scale = deepseek_v4.act_quant(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (2, 3, 2))
    blocks = x.float().unflatten(-1, (2, 128))
    assert torch.equal(scale, blocks.abs().amax(-1) * torch.tensor(1 / 448, dtype=torch.float32))
    codes, scale = deepseek_v4.act_quant(x, 64, "ue8m0", E8M0)
    assert (scale.dtype, scale.shape) == (E8M0, (2, 3, 4))
    powers = deepseek_v4.act_quant(x, 64, "ue8m0")[1]
    assert torch.equal(powers, scale.float())
    expected = codes.float().unflatten(-1, (4, 64)) * powers[..., None]
    assert deepseek_v4.act_quant(x, 64, "ue8m0", E8M0, True) is x
    assert torch.equal(x.float(), expected.flatten(-2))


def test_vectors_of_act_quant(backend):
    x = torch.zeros(1, 64).bfloat16()
    x[0, :6] = torch.tensor([1, -2.5, 3.296875, 100, 448, 0.000999])
    codes, scale = deepseek_v4.act_quant(x, 64, "ue8m0", E8M0)
    assert codes.view(torch.uint8)[0, :6].tolist() == [0x38, 0xC2, 0x45, 0x6C, 0x7E, 0x01]
    assert scale.tolist() == [[1.0]]
    deepseek_v4.act_quant(x, 64, "ue8m0", inplace=True)
    assert x[0, :6].tolist() == [1, -2.5, 3.25, 96, 448, 2.0**-9]


def test_fp4_act_quant_modes(backend):
    x = torch.randn(2, 3, 64).bfloat16()
    x[0, 0, :7] = torch.tensor([0.3, -0.75, 1.75, -3.5, 5, -0.2, 6])
    x[0, 0, 7:].clamp_(-1, 1)
    packed, scale = deepseek_v4.fp4_act_quant(x)
    assert (packed.dtype, packed.shape, scale.dtype, scale.shape) == (FP4, (2, 3, 32), E8M0, (2, 3, 2))
    assert packed.view(torch.uint8)[0, 0, :3].tolist() == [0xA1, 0xE4, 0x86]
    expected = flagops.fp4_dequantize(packed.view(torch.uint8).flatten(0, 1), scale.flatten(0, 1)).view(x.shape)
    assert deepseek_v4.fp4_act_quant(x, inplace=True) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("quantise", [deepseek_v4.act_quant, deepseek_v4.fp4_act_quant])
def test_in_place_writes_a_slice_and_nothing_beside_it(backend, quantise):
    kv = torch.randn(2, 5, 128).bfloat16()
    before = kv.clone()
    part = kv[..., :64]
    scaling = ("ue8m0", torch.float32) if quantise is deepseek_v4.act_quant else ()
    assert quantise(part, 32, *scaling, inplace=True).data_ptr() == kv.data_ptr()
    assert torch.equal(kv[..., 64:], before[..., 64:])
    assert not torch.equal(kv[..., :64], before[..., :64])


def test_a_scale_that_e8m0_cannot_hold():
    with pytest.raises(ValueError, match="set scale_fmt"):
        deepseek_v4.act_quant(torch.zeros(1, 128), scale_dtype=E8M0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("four", [False, True])
def test_products_have_the_default_dtype(backend, dtype, four):
    x, w = torch.randn(2, 3, 256).bfloat16(), torch.randn(128, 256)
    a, a_s = deepseek_v4.act_quant(x, 128, "ue8m0", E8M0)
    if four:
        b, b_s = deepseek_v4.fp4_act_quant(w)
        b = torch.nn.Parameter(b, requires_grad=False)
        values = flagops.fp4_dequantize(b.detach(), b_s, "float32").double()
    else:
        b, b_s = deepseek_v4.act_quant(w, 128)
        b_s = b_s[:1].clone()
        values = flagops.fp8_dequantize(b, b_s, (128, 128), "float32").double()
    left = (a.double().unflatten(-1, (-1, 128)) * a_s.double()[..., None]).flatten(-2)
    with default_dtype(dtype):
        got = (deepseek_v4.fp4_gemm if four else deepseek_v4.fp8_gemm)(a, a_s, b, b_s, E8M0)
    assert got.dtype == dtype
    exact, absolute = left @ values.T, left.abs() @ values.abs().T
    error = 262 * 2.0**-24 * absolute + (2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0)
    assert ((got.double() - exact).abs() <= error).all()


def test_vector_of_sparse_attn(backend):
    q = torch.zeros(1, 1, 2, 16).bfloat16()
    kv = torch.stack((torch.full((16,), 7.0), torch.ones(16), torch.full((16,), 3.0)))[None].bfloat16()
    got = deepseek_v4.sparse_attn(q, kv, torch.zeros(2), torch.tensor([[[1, -1, 2]]], dtype=torch.int32), 16**-0.5)
    assert (got == 1.3359375).all()
    nothing = torch.full((1, 1, 3), -1, dtype=torch.int32)
    assert (deepseek_v4.sparse_attn(q, kv, torch.zeros(2), nothing, 16**-0.5) == 0).all()


def test_vectors_of_hc_split_sinkhorn(backend):
    base = torch.tensor([0, 1, -1, 2] * 2 + [2, 0, 0, 0, 0, 0, 1, 0, 0, 3, 0, 0, 1, 0, 0, -1], dtype=torch.float32)
    pre, post, comb = deepseek_v4.hc_split_sinkhorn(torch.zeros(2, 3, 24), torch.ones(3), base)
    rows = [
        [0.505938, 0.065131, 0.144911, 0.284019],
        [0.084374, 0.080257, 0.485388, 0.349980],
        [0.037923, 0.724518, 0.080257, 0.157301],
        [0.371765, 0.130093, 0.289443, 0.208699],
    ]
    for got, expected in (
        (pre, [0.500001, 0.7310596, 0.2689424, 0.8807980]),
        (post, [1, 1.4621172, 0.5378829, 1.7615941]),
        (comb, rows),
    ):
        expected = torch.tensor(expected)
        assert got.shape == (2, 3, *expected.shape)
        assert (got - expected).abs().max() < 1e-6  # six digits, the last of them rounded, and float32


def test_hadamard_transform(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", deepseek_v4)
    from fast_hadamard_transform import hadamard_transform

    matrix = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert torch.equal(hadamard_transform(torch.eye(4)), matrix)
    assert torch.equal(hadamard_transform(torch.eye(4).bfloat16(), scale=0.5), matrix.bfloat16() / 2)


# A model that imports `kernel`


def _rounded(x, block, largest, floor, dtype):
    """Blocks of x over their scales in a narrow format, as float64; and the scales."""
    blocks = x.numpy().astype(np.float64).reshape(*x.shape[:-1], -1, block)
    scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(blocks).max(-1), floor) / largest)))
    quotient = np.clip(blocks / scale[..., None], -largest, largest).astype(np.float32)
    return quotient.astype(dtype).reshape(x.shape), scale


def _expand(codes, scale, block):
    values = codes.reshape(*codes.shape[:-1], -1, block).astype(np.float64) * scale[..., None]
    return values.reshape(codes.shape)


class Oracle:
    """The same interface in float64 NumPy: formulas of the specification, and nothing of flagops."""

    def act_quant(self, x, block, scale_fmt, scale_dtype, inplace=False):
        assert scale_fmt == "ue8m0"
        codes, scale = _rounded(x, block, 448, 1e-4, ml_dtypes.float8_e4m3fn)
        if inplace:
            return x.copy_(torch.from_numpy(_expand(codes, scale, block)))
        return codes, scale

    def fp4_act_quant(self, x, block, inplace):
        codes, scale = _rounded(x, block, 6, 6 * 2.0**-126, ml_dtypes.float4_e2m1fn)
        return x.copy_(torch.from_numpy(_expand(codes, scale, block)))

    def fp8_gemm(self, a, a_s, b, b_s, scale_dtype):
        scale = np.repeat(np.repeat(arrays.as_numpy(b_s).astype(np.float64), 128, 0), 128, 1)
        return self._product(a, a_s, arrays.as_numpy(b).astype(np.float64) * scale)

    def fp4_gemm(self, a, a_s, b, b_s, scale_dtype):
        byte = b.view(torch.uint8).numpy()
        nibbles = np.stack((byte & 15, byte >> 4), -1).reshape(len(byte), -1)
        values = nibbles.view(ml_dtypes.float4_e2m1fn)
        return self._product(a, a_s, _expand(values, arrays.as_numpy(b_s).astype(np.float64), 32))

    def _product(self, a, a_s, b):
        return torch.from_numpy(_expand(a, a_s, 128) @ b.T)

    def sparse_attn(self, q, kv, sink, indices, scale):
        valid = (indices >= 0).numpy()
        rows = np.take_along_axis(kv.numpy()[:, None], np.where(valid, indices.numpy(), 0)[..., None], 2)
        weight = np.exp(np.einsum("bshd,bskd->bshk", q.numpy(), rows) * scale) * valid[:, :, None]
        total = weight.sum(-1, keepdims=True) + np.exp(sink.numpy())[:, None]
        return torch.from_numpy(np.einsum("bshk,bskd->bshd", weight / total, rows))

    def hc_split_sinkhorn(self, mixes, scale, base, mult, iters, eps):
        pre, post, comb = np.split(mixes.numpy(), [mult, 2 * mult], -1)
        (a, b, c), bases = scale.numpy(), np.split(base.numpy(), [mult, 2 * mult])
        pre, post = 1 / (1 + np.exp(-(pre * a + bases[0]))) + eps, 2 / (1 + np.exp(-(post * b + bases[1])))
        comb = np.exp(comb * c + bases[2]).reshape(*comb.shape[:-1], mult, mult)
        comb = comb / comb.sum(-1, keepdims=True) + eps
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
        for _ in range(iters - 1):
            comb = comb / (comb.sum(-1, keepdims=True) + eps)
            comb = comb / (comb.sum(-2, keepdims=True) + eps)
        return tuple(map(torch.from_numpy, (pre, post, comb)))

    def hadamard_transform(self, x, scale):
        i = np.arange(x.shape[-1])
        sign = (-1.0) ** np.array([[bin(a & b).count("1") for b in i] for a in i])
        return torch.from_numpy(scale * (x.numpy() @ sign))


def evaluate(kernel, dtype, seed, monkeypatch):
    """Logits of the model with a kernel module, and the margin of its choices."""
    module = types.ModuleType("kernel")
    vars(module).update({name: getattr(kernel, name) for name in SIGNATURES})
    monkeypatch.setitem(sys.modules, "kernel", module if kernel is not deepseek_v4 else deepseek_v4)
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", sys.modules["kernel"])
    monkeypatch.delitem(sys.modules, "deepseek_v4_model", raising=False)
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 64, (2, 26)))
    with default_dtype(dtype), torch.inference_mode():
        model = importlib.import_module("deepseek_v4_model").Model(seed)
        logits = model(ids)
    return logits.double().numpy(), model.margin


@pytest.fixture(scope="module")
def expected():
    """A seed whose choices are no near ties, and the logits of the model in float64."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for seed in itertools.count():
            logits, margin = evaluate(Oracle(), torch.float64, seed, monkeypatch)
            if margin > 1e-3:
                return seed, logits


def test_model_in_float32_equals_its_evaluation_in_float64(backend, expected, monkeypatch):
    """To about 1e-6 of the row's largest; the tolerance leaves room for a code that is rounded the other way."""
    seed, logits = expected
    got, _ = evaluate(deepseek_v4, torch.float32, seed, monkeypatch)
    largest = np.abs(logits).max(-1, keepdims=True)
    assert (largest > 1).all()
    assert (np.abs(got - logits) <= 2.0**-7 * largest).all()


CALLS = {
    "fp8_gemm": lambda a, a_s, b, b_s, dtype: ("fp8_matmul", (a, a_s, b, b_s, "bfloat16")),
    "fp4_gemm": lambda a, a_s, b, b_s, dtype: ("fp4_matmul", (a, a_s, b, b_s, "bfloat16")),
    "fp4_act_quant": lambda x, block, inplace: ("fp4_fake_quantize", (x, block)),
    "sparse_attn": lambda *args: ("sparse_attention", args),
    "hc_split_sinkhorn": lambda *args: ("hc_split_sinkhorn", args),
    "hadamard_transform": lambda x, scale: ("hadamard", (x, scale)),
}


def _act_quant_call(x, block, scale_fmt, scale_dtype, inplace=False):
    name = "fp8_fake_quantize" if inplace else "fp8_quantize"
    return name, (x, block, True) if inplace else (x, block, True, "float8_e8m0fnu")


class Checked:
    """The module under test, each of its results held to the reference."""

    def __init__(self):
        self.calls = dict.fromkeys(SIGNATURES, 0)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            operator, inputs = {**CALLS, "act_quant": _act_quant_call}[name](*args, **kwargs)
            op = registry.operator(operator)
            given = [arrays.as_numpy(x).copy() if isinstance(x, torch.Tensor) else x for x in inputs]
            result = getattr(deepseek_v4, name)(*args, **kwargs)
            got = tuple(map(arrays.as_numpy, result)) if op.several else arrays.as_numpy(result)
            testing.compare(op, dict(zip(op.inputs, given, strict=True)), got, name)
            self.calls[name] += 1
            return result

        return call


@pytest.mark.drawn
def test_every_call_of_the_model_in_bfloat16_is_right(backend, expected, monkeypatch):
    checked = Checked()
    got, _ = evaluate(checked, torch.bfloat16, expected[0], monkeypatch)
    assert min(checked.calls.values()) >= 2
    assert np.isfinite(got).all()
