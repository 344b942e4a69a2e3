"""What only Triton can get wrong of torch's own operators: its arithmetic, its conversions, its programs for chips."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flagops import arrays, dispatch, registry, testing
from flagops.call import of

sys.path.insert(0, str(Path(__file__).parent))
from test_aten_random import VECTORS, _words

ROOT = Path(__file__).parents[1]

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

INDEXING, RANDOM = (importlib.import_module(f"flagops.kernels.triton.{name}") for name in ("indexing", "random"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _held(name, *args):
    """A result that agrees with the reference, for arguments on the CPU."""
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) and x.dim() else x for x in args]
    got = of(registry.operator(name))(*given, backend="triton").cpu()
    testing.assert_of(name, got, *args)
    return got


def _values(dtype):
    """What conversions stumble on, as far as a dtype holds it."""
    ends = [e + d for b in (7, 8, 15, 16, 31, 32, 62) for e in (2**b, -(2**b)) for d in (-1, 0, 1)]
    if dtype == "bool":
        return torch.tensor([True, False])
    if dtype in arrays.INTEGERS:
        info = torch.iinfo(getattr(torch, dtype))
        kept = {*ends, 0, info.min, info.max, 2**53 + 1, (1 << 40) + (1 << 31) + 1}
        return torch.tensor(sorted(e for e in kept if info.min <= e <= info.max), dtype=getattr(torch, dtype))
    info = torch.finfo(getattr(torch, dtype))
    ties = [1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40, 1 + 2**-11 + 2**-50, 1 + 3 * 2**-11 - 2**-50]
    small = [2.0**-134, 2.0**-134 + 2.0**-160, 2.0**-25, 2.0**-25 + 2.0**-60, 3 * 2.0**-26, info.tiny, info.tiny / 8]
    large = [info.max, 65519.99999999, 65520.0, 3.3961775e38, 3.4e38, 2.0**63, 2.0**64, np.inf, np.nan]
    made = [*ends, *ties, *small, *large, 0.0, 0.5, 1.5, 2.7]
    return torch.tensor([sign * x for x in made for sign in (1, -1)], dtype=torch.float64).to(getattr(torch, dtype))


@pytest.mark.parametrize("source", arrays.DTYPES)
def test_every_conversion_is_the_references(source):
    for dtype in arrays.DTYPES:
        _held("aten.copy", _values(source), dtype)


def test_a_number_of_the_host_is_the_tensor_that_holds_it():
    for name, dtype in itertools.product(("add", "remainder", "eq"), ("int64", "float64", "bfloat16", "int32")):
        x = torch.tensor([3, -7, 2**60 + 1, 100], dtype=torch.int64)
        for number in (torch.tensor(2**60 + 1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(True)):
            rest = (dtype, 3) if name == "add" else (dtype,)
            assert torch.equal(
                _held(f"aten.{name}", x, number, *rest), _held(f"aten.{name}", x, number.expand(4).clone(), *rest)
            )


def test_a_number_of_the_host_does_not_say_where_a_call_computes(monkeypatch):
    class Elsewhere:
        def refuses(self, x):
            return None if x.device.type == "meta" else f"takes meta tensors, not {x.device.type}"

    monkeypatch.setattr(registry, "backend", lambda name: Elsewhere())
    monkeypatch.setattr(registry, "find", lambda *names: registry.Kernel(lambda x, y, dtype, out: None))
    x, number = torch.ones(3, device="meta"), torch.tensor(2.0)
    for args in ((number, x, "float32", None), (x, number, "float32", None), (number, number, "float32", x[0])):
        made = dispatch._choose(registry.operator("aten.mul"), args, "elsewhere", None, {}).makers[0]()
        assert made.device.type == "meta"


def test_zeros_keep_their_signs_and_quotients_are_rounded_once(rng):
    zeros = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0])
    for name in ("neg", "abs", "round", "trunc", "ceil"):
        _held(f"aten.{name}", zeros, "float32")
    x, y = (torch.from_numpy(rng.standard_normal(2000).astype(np.float32)) for _ in range(2))
    assert torch.equal(_held("aten.div", x, y, "float32"), (x.double() / y.double()).float())
    assert torch.equal(_held("aten.sqrt", x.abs(), "float32"), x.abs().double().sqrt().float())


@pytest.mark.parametrize("dtype", ("int64", "int32", "int8", "uint8"))
def test_integers_are_divided_by_everything(dtype):
    info = torch.iinfo(getattr(torch, dtype))
    ends = torch.tensor(sorted({info.min, info.min + 1, info.max, 0, 1, 2, 7} | ({-1, -2, -7} if info.min else set())))
    x, y = torch.meshgrid(ends.to(getattr(torch, dtype)), ends.to(getattr(torch, dtype)), indexing="ij")
    for name in ("floor_divide", "trunc_divide", "remainder", "fmod", "pow"):
        _held(f"aten.{name}", x, y, dtype)


def test_functions_hold_far_from_zero():
    x = torch.linspace(-120, 120, 4001)
    for name in ("exp", "expm1", "tanh", "erf", "sigmoid", "silu", "log1p"):
        _held(f"aten.{name}", x, "float32")
    for name in ("sin", "cos"):
        _held(f"aten.{name}", torch.cat([x, x * 1e4, x * 1e30]), "float32")


def test_bounds_know_which_intermediates_overflow():
    x, one, zero = torch.tensor([3e38, -3e38, 2e38, 1e20]), torch.ones(4), torch.zeros(4)
    _held("aten.addcmul", one, x, zero, "float32", -3)
    _held("aten.addcdiv", one, x, x, "float32", -3)
    _held("aten.gelu_backward", one, x, "float32", True)


def test_axes_are_merged_as_far_as_strides_allow():
    axes = importlib.import_module("flagops.kernels.triton._elementwise").axes
    x = torch.empty(2, 3, 4, 5, 6, 7)
    turned = x.permute(5, 0, 3, 1, 2, 4)
    assert axes(turned, turned) == ((), [(1,), (1,)])
    assert axes(x, x[:, :, :1, :1, :1, :1]) == ((840,), [(1, 840), (0, 840)])
    assert axes(x, torch.ones(5, 1, 7)) == ((7, 6, 5), [(1, 7, 42, 210), (1, 0, 7, 0)])


def test_six_axes_that_do_not_merge_in_place(rng):
    shape = (2, 3, 2, 3, 2, 3)
    x = torch.from_numpy(rng.standard_normal(shape)).permute(5, 3, 1, 4, 2, 0)
    y = torch.from_numpy(rng.standard_normal((3, 1, 3, 2, 1, 2)))
    target = x.to(DEVICE).clone(memory_format=torch.preserve_format)
    room = torch.zeros(*(2 * n for n in target.shape), dtype=target.dtype, device=DEVICE)
    place = room[tuple(slice(0, None, 2) for _ in shape)]
    place.copy_(target)
    of(registry.operator("aten.add"))(place, y.to(DEVICE), "float64", 2, out=place, backend="triton")
    testing.assert_of("aten.add", place.cpu(), x, y, "float64", 2)
    assert not room[1::2].any()


@pytest.mark.parametrize("dtype", ("float32", "int64"))
def test_rows_of_several_parts_and_columns(dtype, rng):
    """Sums of small whole numbers are exact in every order."""
    x = torch.from_numpy(rng.integers(-3, 4, (2, 40000))).to(getattr(torch, dtype))
    for rows in (x, x[:, :500].clone().T.contiguous().T):
        for name in ("sum", "amax", "amin"):
            _held(f"aten.{name}", rows, dtype)
        for name in ("count_nonzero", "argmax", "argmin"):
            _held(f"aten.{name}", rows)
        assert torch.equal(_held("aten.sum", rows, dtype), rows.sum(-1))
        assert torch.equal(_held("aten.argmax", rows), torch.from_numpy(rows.numpy().argmax(-1)))
    x[0, 20000:] = x[1, 39999] = 9
    assert _held("aten.argmax", x).tolist() == [20000, 39999]


@pytest.mark.parametrize("dtype", ("float32", "int64"))
def test_sums_along_rows_go_on_from_part_to_part(dtype, rng, monkeypatch):
    """A row of three parts and columns of three; no program goes through a whole row."""
    module = importlib.import_module(registry.home("aten.cumsum", "triton"))
    launch, grids = module.launch, []

    def noting(kernel, grid, *rest, **options):
        grids.append((kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, *grid))
        launch(kernel, grid, *rest, **options)

    monkeypatch.setattr(module, "launch", noting)
    x = torch.from_numpy(rng.integers(-3, 4, (2, 40000))).to(getattr(torch, dtype))
    for rows in (x, x[:, :1300].clone().T.contiguous().T):
        grids.clear()
        assert torch.equal(_held("aten.cumsum", rows, dtype), rows.cumsum(-1))
        assert max(grid for name, grid in grids if name == "cumsum_kernel") >= 3, grids


def test_rows_keep_what_is_no_number(rng):
    x = torch.from_numpy(rng.standard_normal((3, 20000)).astype(np.float32))
    x[0, 17000], x[1, 18000], x[1, 100], x[2, 5] = np.nan, np.inf, -np.inf, -np.inf
    for name in ("sum", "nansum", "amax", "amin", "logsumexp", "var", "_softmax", "_log_softmax"):
        _held(f"aten.{name}", x, "float32")
    for name in ("argmax", "argmin"):
        _held(f"aten.{name}", x)


def test_long_rows_are_read_again(rng):
    x, y = (torch.from_numpy(rng.standard_normal((2, 9001)).astype(np.float32)) for _ in range(2))
    for name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        _held(f"aten.{name}", x, y.softmax(-1), "float32")
    operator = registry.operator("aten.native_layer_norm")
    got = of(operator)(x.to(DEVICE), y[0].to(DEVICE), None, 1e-5, "float32", backend="triton")
    testing.assert_of(operator.name, tuple(part.cpu() for part in got), x, y[0], None, 1e-5, "float32")


def test_columns_of_many_rows_are_summed_by_parts(rng):
    grad, x = (torch.from_numpy(rng.integers(-2, 3, (300, 70))).float() for _ in range(2))
    mean, rstd = torch.zeros(300), torch.ones(300)
    operator = registry.operator("aten.native_layer_norm_backward")
    args = grad, x, mean, rstd, None, "float32"
    got = of(operator)(*(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args), backend="triton")
    assert torch.equal(got[1].cpu(), (grad * x).sum(0))
    assert torch.equal(got[2].cpu(), grad.sum(0))


def _with_ties(dtype, rng):
    """Rows of several parts in which elements meet, with both zeros, infinities and NaN where there are."""
    x = torch.from_numpy(rng.integers(-9, 9, (2, 101)))
    x = (x > 0) if dtype == "bool" else x.to(getattr(torch, dtype))
    if x.is_floating_point():
        special = torch.tensor([np.nan, np.inf, -np.inf, -0.0, 0.0, -np.nan]).to(x.dtype)
        x[:, 40:70] = special[torch.from_numpy(rng.integers(0, 6, (2, 30)))]
    elif dtype != "bool":
        info = torch.iinfo(x.dtype)
        x[0, 50], x[1, 3] = info.min, info.max
    return x


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_long_rows_are_ordered_by_digits_and_the_first_of_them_chosen(dtype, rng):
    x = _with_ties(dtype, rng).to(DEVICE)
    for descending in (False, True):
        for name, *rest in (("sort", descending), ("topk", int(rng.integers(1, 33)), descending)):
            operator = registry.operator(f"aten.{name}")
            made = of(operator)(x, *rest, backend="triton")
            testing.assert_of(operator.name, tuple(part.cpu() for part in made), x.cpu(), *rest)
        assert [y.shape[-1] for y in of(registry.operator("aten.topk"))(x, 90, descending, backend="triton")] == [
            90
        ] * 2


@pytest.mark.drawn
@pytest.mark.parametrize("reduce", ("assign", "sum", "prod", "amax", "amin"))
def test_places_that_many_indices_name_are_written_once(reduce, rng):
    """Rows of their own indices, and indices of all rows, of which neighbours are written side by side; of floats
    whole numbers, of which sums are exact in every order."""
    for dtype in rng.permutation(["float32", "bfloat16", "float64", "int32", "uint8", "bool"])[:2]:
        kind = getattr(torch, dtype)
        x, src = (torch.from_numpy(rng.integers(0, 3, shape)).to(kind) for shape in ((3, 11), (3, 90)))
        index = torch.from_numpy(rng.integers(-11, 11, (3, 90)))
        for include in (True, False):
            _held("aten.scatter", x, index, src, reduce, include, True)
            _held("aten.scatter", x, index[0], src, reduce, include, True)
            _held(
                "aten.scatter", x.t().contiguous().t(), index[0].int(), src.t().contiguous().t(), reduce, include, True
            )


def test_rows_of_a_table_are_summed_in_registers(rng):
    grad, index = torch.from_numpy(rng.integers(-4, 5, (90, 7))).float(), torch.from_numpy(rng.integers(0, 6, 90))
    for padding, by_frequency in ((-1, False), (2, False), (2, True)):
        _held("aten.embedding_dense_backward", grad, index, 6, padding, by_frequency)
    expected = torch.zeros(6, 7).index_add(0, index, grad)
    assert torch.equal(_held("aten.embedding_dense_backward", grad, index, 6, -1, False), expected)


@pytest.mark.parametrize("wrong", (7, -8, 2**40, -(2**63)))
def test_indices_out_of_range_are_refused_and_move_nothing(wrong):
    room = torch.zeros(3, 21, device=DEVICE)
    x, index = room[:, 7:14], torch.tensor([0, 6, wrong, -7], device=DEVICE)
    gather, scatter, offset = (of(registry.operator(f"aten.{name}")) for name in ("gather", "scatter", "offset"))
    calls = [
        lambda: gather(x, index, True, backend="triton"),
        lambda: scatter(x, index, torch.ones(3, 4, device=DEVICE), "sum", True, True, out=x, backend="triton"),
        lambda: offset(torch.tensor(0), index, 7, 3, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for an axis of size 7"):
            call()
    assert not room.any()
    with pytest.raises(IndexError, match="index -7"):
        gather(x, index[3:], False, backend="triton")
    assert gather(x, index[:2], True, backend="triton").tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("count", (20, 90), ids=("counted", "by digits"))
def test_while_a_graph_is_recorded_an_index_out_of_range_reads_0_and_writes_nothing(count, monkeypatch, rng):
    """Nobody waits for the device then. Rows of few indices are ordered in one way, those of many in another."""
    monkeypatch.setattr(INDEXING, "_recording", lambda device: True)
    index = torch.from_numpy(rng.integers(-9, 17, (2, count))).to(DEVICE)
    index[:, :6] = torch.tensor([8, 20, -9, 2**40, 0, 7])
    inside = (index >= 0) & (index < 8)
    x = torch.from_numpy(rng.integers(-9, 9, (2, 8))).float().to(DEVICE)
    src = torch.from_numpy(rng.integers(-9, 9, (2, count))).float().to(DEVICE)
    gather, scatter = (of(registry.operator(f"aten.{name}")) for name in ("gather", "scatter"))
    expected = torch.where(inside, x.gather(-1, index.clamp(0, 7)), 0)
    assert torch.equal(gather(x, index, False, backend="triton"), expected)
    for reduce in ("sum", "assign", "amax"):
        made, expected = scatter(x, index, src, reduce, True, False, backend="triton"), x.clone()
        for row in range(2):
            for i in range(count):
                if inside[row, i]:
                    there, value = expected[row, index[row, i]], src[row, i]
                    chosen = {"sum": there + value, "assign": value, "amax": torch.maximum(there, value)}
                    expected[row, index[row, i]] = chosen[reduce]
        assert torch.equal(made, expected), reduce


def test_a_graph_is_recorded_where_the_devices_module_says_so(monkeypatch):
    assert not INDEXING._recording(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
    assert INDEXING._recording(torch.device("cpu"))


def test_where_a_row_of_weights_is_zero_nothing_is_picked(rng):
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    draws = torch.tensor([[0.0, 0.24, 0.25, 1 - 2**-53], [0.0, 0.5, 0.9, 1 - 2**-53]], dtype=torch.float64)
    assert _held("aten.pick", weights, draws).tolist() == [[1, 1, 3, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_the_generator_is_philox(counter, key, words):
    """A block's number is the lower half of the counter, the offset the upper, and the seed the key."""
    low, high, seed = (
        int.from_bytes(x.tobytes(), "little", signed=True) for x in np.split(_words(f"{counter} {key}"), 3)
    )
    state, out = torch.tensor([seed, high]), torch.empty(4, dtype=torch.int64)
    target = out.to(DEVICE)
    words_kernel[(1,)](state.to(DEVICE), target, low)
    assert target.tolist() == _words(words).tolist()


@triton.jit(do_not_specialize=["block"])
def words_kernel(state, out, block):
    a, b, c, d = RANDOM.words(state, 1, tl.cast(block, tl.int64))
    tl.store(out, a.to(tl.int64))
    tl.store(out + 1, b.to(tl.int64))
    tl.store(out + 2, c.to(tl.int64))
    tl.store(out + 3, d.to(tl.int64))


def test_both_backends_draw_the_same_bits(rng):
    state = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 2))
    for name, *rest in (("uniform", 0.0, 1.0, "float32"), ("random", 0, 10, "int64"), ("random", 0, 0, "int64")):
        drawn = [of(registry.operator(f"aten.{name}"))(state, 1001, *rest, backend=b) for b in ("numba", "triton")]
        assert torch.equal(*drawn)


COMPILE = """
import json, sys
sys.path.insert(0, "benchmarks")
import triton_compile as compiler

names = [f"aten.{name}" for name in ("div", "rsqrt", "gelu", "remainder", "copy", "adamw")]
names += ["aten.sum", "aten.max_dim", "aten._softmax", "aten.gather", "aten.scatter", "aten.topk", "aten.normal"]
found = []
for blank, launch in compiler.rows(targets=["sm_75", "sm_90", "gfx942"], names=names):
    if "drawn" in blank.label and (blank.target != "sm_90" or "elementwise" not in blank.kernel):
        continue
    row, made = compiler.compiled(blank, launch)
    text = made.asm.get("ptx", "")
    approximate = [word for word in ("div.full", "sqrt.approx", "add.ftz", "mul.ftz", "fma.rn.ftz") if word in text]
    wide = any(f"ld.global.{words}" in text for words in ("v2", "v4"))
    found.append({"name": row.name, "faults": compiler.faults(row), "approximate": approximate, "wide": wide})
print(json.dumps(found))
"""


@pytest.mark.drawn
def test_compiled_programs_round_once_and_load_whole_vectors():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) > 40
    for row in rows:
        assert not row["faults"], row
        assert not row["approximate"], row
        if " 4M." in row["name"] and not re.search("gfx|draw_kernel", row["name"]):  # draws load nothing
            assert row["wide"], row


LAUNCHED = """
import importlib
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

common, elementwise = (importlib.import_module(f"flagops.kernels.triton.{n}") for n in ("_common", "_elementwise"))
pointwise = importlib.import_module("flagops.kernels.triton.pointwise")
triton.runtime.driver.set_active(Driver())
common.pretended = common.Chip("cuda", 132, 227 << 10, True)
programs, run = [], JITFunction.run

def compile_alone(self, *args, grid, warmup, **options):
    programs.append(run(self, *args, grid=grid, warmup=True, **options))

JITFunction.run = compile_alone
elementwise.launch = lambda kernel, grid, device, *args, **options: kernel[grid](*args, **options)
x = torch.ones(4096)
for alpha in (0.1, 0.25, 1.0, 16.0):
    pointwise.add(x, torch.tensor(alpha), "float32", alpha, x)
print(len(set(map(id, programs))))
"""


def test_values_of_numbers_make_no_other_programs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", LAUNCHED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["1"]
