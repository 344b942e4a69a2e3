"""What only Triton can get wrong: the interpreter's raw bits of bfloat16, the compiled code's registers, launching."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from flagops import registry, testing

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter has this trap")
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
COMMON = importlib.import_module("flagops.kernels.triton._common")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CHIP = COMMON.chip(torch.device(DEVICE))


def _kernel(name):
    return importlib.import_module(f"flagops.kernels.triton.{registry.operator(name).family}")


COMPILE = """
import json, sys
sys.path.insert(0, "benchmarks")
import triton_compile as compiler

wanted = {
    "matmul.product_kernel bfloat16 BM=128 BN=256": "wgmma",
    "matmul.product_kernel bfloat16 BM=16": "mma",
    "attention.attention_kernel bfloat16 CHUNK=512": "wgmma",
    "dequantize.fp4_kernel bfloat16": "",
    "dequantize.fp8_kernel bfloat16": "",
}
operators = ["matmul", "sparse_attention", "fp4_dequantize", "fp8_dequantize"]
found = {}
for blank, launch in compiler.rows("bfloat16", ["sm_90"], operators):
    for words, instruction in wanted.items():
        if words not in found and all(word in blank.name for word in words.split()):
            row, compiled = compiler.compiled(blank, launch)
            flushes = ".ftz.f32" in compiled.asm["ptx"]
            found[words] = {**vars(row), "expected": instruction, "flushes": flushes, "faults": compiler.faults(row)}
print(json.dumps(list(found.values())))
"""


@pytest.mark.drawn
def test_compiled_for_sm_90_products_run_on_bf16_tensor_cores_and_nothing_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) == 5
    for row in rows:
        assert not row["faults"], row
        if row["expected"]:
            assert row["matrix"].startswith(row["expected"]), row
            assert ".bf16.bf16" in row["matrix"], row
        else:
            assert not row["flushes"], f"a dequantised subnormal would become zero: {row}"


@interpreted
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_interpreter_multiplies_values_not_bits(dtype):
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(33, 65, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(65, 17, generator=generator, dtype=torch.float64).to(dtype)
    out = torch.empty(33, 17, dtype=dtype)
    _kernel("matmul").matmul(a, b, out)
    exact, sums = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    accumulator = min(ROUNDOFF[dtype], 2**-24)
    assert ((out.double() - exact).abs() <= ROUNDOFF[dtype] * exact.abs() + 66 * accumulator * sums).all()


@interpreted
def test_interpreter_rounds_to_nearest_even():
    """Halfway cases, subnormals, overflow, NaN and both zeros through one product with 1."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x00008000, 0x00018000, 0x7F7FFFFF, 0x80000000, 0x7FC00001]
    bits = np.array(bits, np.uint32)
    scale = torch.from_numpy(np.concatenate([bits, bits ^ 0x80000000]).view(np.float32))[None]
    weight = torch.full((1, 16), 0x38, dtype=torch.uint8)  # 1 in e4m3
    out = torch.empty(1, 16, dtype=torch.bfloat16)
    _kernel("fp8_dequantize").fp8_dequantize(weight, scale, (1, 1), "bfloat16", out)
    expected = scale.to(torch.bfloat16)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all(), (out, expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_fp4_weights_that_are_subnormal_count(dtype):
    """Triton's own conversion of bfloat16, in its interpreter, takes them for others."""
    codes = torch.full((1, 16), 0x11, dtype=torch.uint8, device=DEVICE)  # 0.5
    scale = torch.ones(1, 1, dtype=torch.uint8, device=DEVICE)  # 2^-126
    out = torch.empty(1, 1, device=DEVICE)
    _kernel("fp4_matmul").fp4_matmul(torch.ones(1, 32, dtype=dtype, device=DEVICE), None, codes, scale, "float32", out)
    assert out.item() == 32 * 2.0**-127


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_split_sum_equals_the_whole_one(dtype, monkeypatch):
    module = _kernel("linear")
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (2, 3, 2100), generator=generator).to(DEVICE, dtype)
    weight = torch.randint(-1, 2, (17, 2100), generator=generator).to(DEVICE, dtype)
    bias = torch.arange(17).to(dtype).to(DEVICE)
    parts = []
    launch = module.launch

    def noting(kernel, grid, *rest, **options):
        parts.append(grid)
        launch(kernel, grid, *rest, **options)

    monkeypatch.setattr(module, "launch", noting)
    monkeypatch.setattr(COMMON, "pretended", CHIP._replace(processors=64))
    out = torch.empty(17, 3, 2, dtype=dtype, device=DEVICE).permute(2, 1, 0)
    module.linear(x, weight, bias, out)
    assert len(parts) == 2
    assert parts[0][1] > 1, "the sum was not split"
    assert torch.equal(out, (x.double() @ weight.double().T + bias.double()).to(dtype))


def test_more_processors_take_smaller_tiles_and_compute_the_same(monkeypatch):
    module, heights = _kernel("int8_matmul"), []
    generator = torch.Generator().manual_seed(11)
    a, b = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in ((100, 130), (140, 130))
    )
    a_scale, b_scale = (torch.rand(n, 1, generator=generator) + 0.5 for n in (100, 140))
    given = [x.to(DEVICE) for x in (a, a_scale, b, b_scale)]
    launch = module.launch

    def noting(*given, BM, **options):
        heights.append(BM)
        launch(*given, BM=BM, **options)

    monkeypatch.setattr(module, "launch", noting)
    outs = [torch.empty(100, 140, device=DEVICE) for _ in range(2)]
    for processors, out in zip((1, 16), outs, strict=True):
        monkeypatch.setattr(COMMON, "pretended", CHIP._replace(processors=processors))
        module.int8_matmul(*given, "float32", out)
    assert heights == [128, 32]
    assert torch.equal(*outs)
    testing.assert_of("int8_matmul", outs[0].cpu(), a, a_scale, b, b_scale, "float32")


def test_few_tokens_take_few_heads_at_a_time(monkeypatch):
    """So that there are more programs; of many tokens a program takes many heads, whose keys it reads once."""
    module = _kernel("sparse_attention")
    monkeypatch.setattr(COMMON, "pretended", CHIP._replace(processors=132))
    one, many = (module._choose(tokens, 640, 64, 64, torch.bfloat16, torch.device("cpu"))["BH"] for tokens in (1, 64))
    assert (one, many) == (16, 64)


@pytest.mark.parametrize("sink", (None, 0.5, float("-inf"), float("inf")), ids=str)
def test_attention_over_split_keys_equals_attention_in_one_pass(sink, monkeypatch):
    module = _kernel("sparse_attention")
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, 2, 3, 33, generator=generator, dtype=torch.float64).to(DEVICE)
    kv = torch.randn(1, 130, 33, generator=generator, dtype=torch.float64).to(DEVICE)
    indices = torch.randint(-1, 130, (1, 2, 520), generator=generator).to(DEVICE)
    indices[:, 1] = -1
    sinks = None if sink is None else torch.full((3,), sink, dtype=torch.float64, device=DEVICE)
    whole, split = torch.empty_like(q), torch.empty_like(q)
    monkeypatch.setattr(COMMON, "pretended", CHIP._replace(processors=1))
    module.sparse_attention(q, kv, sinks, indices, 0.17, whole)
    monkeypatch.setattr(COMMON, "pretended", CHIP._replace(processors=64))
    module.sparse_attention(q, kv, sinks, indices, 0.17, split)
    for got in (whole, split):
        testing.assert_of(
            "sparse_attention",
            got.cpu(),
            *(x.cpu() for x in (q, kv)),
            sinks if sinks is None else sinks.cpu(),
            indices.cpu(),
            0.17,
        )
    assert not split[:, 1].any()
    assert bool(split[:, 0].any()) is (sink != float("inf"))


def test_absent_and_foreign_rows_are_never_read():
    """Rows that no index names hold NaN; one reads them only by mistake."""
    module = _kernel("sparse_attention")
    q = torch.ones(1, 1, 2, 17, device=DEVICE)
    kv = torch.full((1, 5, 17), float("nan"), device=DEVICE)
    kv[0, 3] = 2.0
    indices = torch.tensor([[[-1, 3, 9, -7, 2**31 - 1, -1]]], dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(q)
    module.sparse_attention(q, kv, None, indices, 1.0, out)
    assert torch.equal(out, torch.full_like(out, 2.0))


class FromTheHost(TorchFunctionMode):
    """Notes what is brought to a device, for which no graph can be recorded."""

    def __init__(self):
        super().__init__()
        self.brought = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = getattr(result, "is_meta", False)
        if made and (function in (torch.tensor, torch.Tensor.new_tensor) or not getattr(args[0], "is_meta", True)):
            self.brought.append(function.__name__)
        return result


def test_nothing_is_brought_from_the_host_in_each_call(monkeypatch):
    """By what surrounds launches, on a device that computes nothing; the frequencies of a table are kept."""
    for name in ("muon", "matmul", "rotary"):
        module = importlib.import_module(f"flagops.kernels.triton.{name}")
        monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)
    a, out = (torch.empty(3, 40, 24, device="meta") for _ in range(2))
    positions = torch.empty(7, dtype=torch.int64, device="meta")
    tables = tuple(torch.empty(7, 8, device="meta") for _ in range(2))
    table = [16, 10000.0, 4.0, 4096.0, 32.0, 1.0]
    _kernel("yarn_table").yarn_table(positions, *table, tables)
    with FromTheHost() as mode:
        _kernel("newton_schulz").newton_schulz(a, 3, out)
        _kernel("yarn_table").yarn_table(positions, *table, tables)
        assert not mode.brought
        a.new_tensor([1.0])
        torch.ones(2).to(a.device)
        assert mode.brought == ["new_tensor", "to"], "it sees what is"


def test_the_descriptor_names_a_reason_and_loads_nothing():
    code = (
        "import sys; from flagops.backends.triton import backend; assert 'triton' not in sys.modules; "
        "reason = backend.unavailable(); import torch, numpy; "
        "assert (reason is None) == torch.cuda.is_available(), reason; "
        "assert reason is None or 'TRITON_INTERPRET' in reason; "
        "assert backend.refuses(numpy.zeros(1)) == 'takes torch tensors'; assert backend.refuses(torch.zeros(1))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
