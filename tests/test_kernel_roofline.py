"""What `benchmarks/kernel_roofline.py` counts, held to kernels whose traffic is known by hand, and what it ranks first.

Kernels are compiled, which the interpreter of the suite prevents: one other process computes all figures.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/kernel_roofline.json"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="not a checkout")
N, K = 1 << 22, 4096


@triton.jit
def copy_kernel(x, out, N, step, BLOCK: tl.constexpr):
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    tl.store(out + at, tl.load(x + at * step, at < N, other=0.0), at < N)


@triton.jit
def again_kernel(x, out, N, BLOCK: tl.constexpr):
    """A softmax of blocks that reads its block once for each of three passes."""
    start = tl.program_id(0) * BLOCK
    at = start + tl.arange(0, 256)
    top = float("-inf")
    for k in range(0, BLOCK, 256):
        top = tl.maximum(top, tl.max(tl.load(x + at + k), 0))
    total = 0.0
    for k in range(0, BLOCK, 256):
        total += tl.sum(tl.exp(tl.load(x + at + k) - top), 0)
    for k in range(0, BLOCK, 256):
        tl.store(out + at + k, tl.exp(tl.load(x + at + k) - top) / total)


@triton.jit
def product_kernel(a, b, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row, column, k = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * BN + tl.arange(0, BN),
        tl.arange(0, BK),
    )
    here = (row < M)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + row[:, None] * K + (start + k)[None, :], here, other=0.0)
        acc = tl.dot(x, tl.load(b + (start + k)[:, None] * N + column[None, :]), acc)
    tl.store(out + row[:, None] * N + column[None, :], acc.to(tl.bfloat16), here)


@triton.jit
def listed_kernel(x, ends, out):
    """As long as data say: of those that are given, and of those that another kernel makes."""
    end = tl.load(ends + tl.program_id(0))
    total = 0.0
    for i in range(0, end):
        total += tl.load(x + i)
    tl.store(out + tl.program_id(0), total)


@triton.jit
def ends_kernel(ends):
    tl.store(ends + tl.program_id(0), 7)


def figures():
    """All that is asked of the other process."""
    import kernel_roofline as roofline

    from flagops import registry

    def judged(name, work, inputs, results, *launches):
        row = roofline.Row("case", name, "sm_90", sum(x.nbytes for x in results), work)

        def run():
            for kernel, grid, args, options in launches:
                kernel[grid](*args, **options)

        return roofline.judged(row, run, {x.untyped_storage().data_ptr(): x.nbytes for x in inputs})

    x, out = torch.zeros(N), torch.zeros(N)
    wide = torch.zeros(8 * 1000)
    a, b, c = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, K), (K, K), (1, K)))
    tall = torch.zeros((512, K), dtype=torch.bfloat16)
    ends, made = torch.tensor([3, 5], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)

    def product(name, a, c, rows, warps=4):
        tile = {"BM": rows, "BN": 64, "BK": 64, "num_warps": warps}
        grid = (triton.cdiv(len(a), rows), K // 64)
        launch = product_kernel, grid, (a, b, c, len(a), K, K), tile
        return judged(name, 2.0 * len(a) * K * K, (a, b), (c,), launch)

    def listed(name, *before):
        which = made if before else ends
        return judged(name, 0.0, (x, which), (out,), *before, (listed_kernel, (2,), (x, which, out), {}))

    def saved(row):
        """All figures as they are, and those that follow from them."""
        return dataclasses.asdict(row) | ({"waste": row.waste, "reason": row.reason} if row.kernels else {})

    cases = [
        judged("copy", 0.0, (x,), (out,), (copy_kernel, (N // 1024,), (x, out, N, 1), {"BLOCK": 1024})),
        judged("columns", 0.0, (wide,), (wide,), (copy_kernel, (1,), (wide, out, 1000, 8), {"BLOCK": 1024})),
        judged("again", 0.0, (x,), (out,), (again_kernel, (N // 4096,), (x, out, N), {"BLOCK": 4096})),
        product("16 rows for one", a, c, 16),
        product("128 rows for one", a, c, 128),
        product("512 rows", tall, torch.zeros_like(tall), 64),
        listed("given"),
        listed("made", (ends_kernel, (2,), (made,), {})),
    ]
    of_cards = {
        "rms_norm": ("v4-flash.hidden-4k", {"n": 256}),
        "matmul": ("square-2048.bfloat16", {"m": 256, "n": 512, "k": 256}),
    }
    operators = {
        name: [saved(row) for row in roofline.rows(registry.operator(name), workload, roofline.TARGETS, sizes)]
        for name, (workload, sizes) in of_cards.items()
    }
    idle = roofline.matrix_shapes(
        "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>\n"
        "%1 = tt.dot %2, %3, %4 : tensor<16x64xbf16, #a> * tensor<64x32xbf16, #b> -> tensor<16x32xf32, #mma>\n"
    )
    h100 = roofline.CHIPS["sm_90"]
    held = [roofline.resident(h100, *used) for used in ((4, 128, 0), (8, 32, 0), (4, 32, 113 << 10), (4, 255, 0))]
    return {
        "order": [row.workload for row in roofline.ordered(cases)],
        "cases": {row.workload: saved(row) for row in cases},
        "operators": operators,
        "idle": list(idle.items()),
        "held": held,
        "written": sorted(op.name for op in registry.cards().values() if registry.written(op.name, "triton")),
    }


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = (
        "import json, sys\nsys.path[:0] = ['benchmarks', 'tests']\nimport test_kernel_roofline as here\n"
        "print(json.dumps(here.figures()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def only(row):
    assert len(row["kernels"]) == 1
    return row["kernels"][0]


def whole(kernel, *names):
    """Figures that are whole numbers but for the share of the programs that were walked."""
    return [round(kernel[name]) for name in names]


def test_a_copy_reads_once_and_writes_once(found):
    row = found["cases"]["copy"]
    kernel = only(row)
    assert whole(kernel, "read", "written", "traffic") == [4 * N, 4 * N, 8 * N]
    assert row["needed"] == 8 * N
    assert round(row["waste"], 9) == 1
    assert row["reason"] == "-"


def test_a_masked_lane_costs_nothing_and_a_lonely_element_its_sector(found):
    kernel = only(found["cases"]["columns"])
    assert kernel["read"] == kernel["written"] == 4000
    assert kernel["traffic"] == 1000 * 32 + 4000


def test_what_a_program_reads_again_is_counted_again(found):
    row = found["cases"]["again"]
    kernel = only(row)
    assert whole(kernel, "read", "traffic") == [3 * 4 * N, 4 * 4 * N]
    assert 1.8 < row["waste"] < 2
    assert row["reason"] == "2.0 times the bytes"


def test_a_product_by_its_tiles(found):
    """Rows of a for each tile of columns, columns of b for each tile of rows, each result once."""
    row = found["cases"]["512 rows"]
    kernel = only(row)
    assert kernel["programs"] == 8 * 64
    read = 2 * (512 * K * (K // 64) + K * K * (512 // 64))
    assert whole(kernel, "read", "written", "tiled", "operations") == [read, 2 * 512 * K, *[2 * 512 * K * K] * 2]
    assert row["needed"] == 2 * (2 * 512 * K + K * K)


def test_rows_of_padding_are_operations(found):
    short, tall = (only(found["cases"][f"{rows} rows for one"]) for rows in (16, 128))
    read = 2 * (K * K + K * (K // 64))
    assert whole(short, "tiled", "read") == [16 * 2 * K * K, read]
    assert whole(tall, "tiled", "read") == [128 * 2 * K * K, read]


def test_the_wasteful_come_first(found):
    """And what could not be counted last. Padding is no waste while memory takes longer."""
    order = found["order"]
    assert order[0] == "again"
    assert order.index("512 rows") < order.index("copy")
    assert order[-1] == "made"


def test_loops_over_given_data_are_counted_and_over_made_data_refused(found):
    assert only(found["cases"]["given"])["read"] == 4 * (3 + 5) + 2 * 4
    assert found["cases"]["made"]["uncounted"] == "a loop as long as data say"
    assert not found["cases"]["made"]["kernels"]


def test_a_norm_of_flagops(found):
    for row in found["operators"]["rms_norm"]:
        kernel = only(row)
        x, weight = 2 * 4096 * 256, 2 * 256
        height = x // 512 // kernel["programs"]
        assert whole(kernel, "read", "written", "traffic") == [x + weight * (4096 // height), x, 2 * x + weight]
        assert row["needed"] == 2 * x + weight


def test_a_product_of_flagops(found):
    for row in found["operators"]["matmul"]:
        kernel = next(k for k in row["kernels"] if k["kernel"] == "matmul.product_kernel")
        tile = dict(word.split("=") for word in kernel["tile"].split())
        across, down = 512 // int(tile["BN"]), math.ceil(256 / int(tile["BM"]))
        assert kernel["programs"] % (across * down) == 0
        assert whole(kernel, "read", "tiled") == [2 * 256 * (256 * across + 512 * down), 2 * 256 * 512 * 256]


def test_warps_without_rows_of_their_own(found):
    assert found["idle"] == [[[16, 32], 4.0]]


def test_how_many_programs_a_processor_holds(found):
    """By its 65536 registers, its 64 warps, its shared memory with the kilobyte that each takes besides."""
    assert found["held"] == [4, 8, 2, 2]


def test_every_operator_is_in_the_results(found):
    kept = json.loads(RESULTS.read_text())
    for target in ("sm_90", "gfx942"):
        assert {row["operator"] for row in kept["rows"] if row["target"] == target} == set(found["written"])
    assert not [row for row in kept["rows"] if row["kernels"] and not row["needed"]]
