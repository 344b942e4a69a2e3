"""Compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory, matrix instructions.

    python benchmarks/triton_compile.py [--only PART] [--write]

``--only`` keeps the rows whose name holds PART; ``--write`` replaces ``results/triton_compile.json`` and ``.md``.
A new kernel is one more entry in `ENTRIES`.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would turn the kernels into Python functions

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

FP4_TILE, FP8_TILE = (
    getattr(importlib.import_module("flagops.kernels.triton.dequantize"), f"FP{n}_TILE") for n in (4, 8)
)
QUANTIZE = importlib.import_module("flagops.kernels.triton.quantize")
QMATMUL = importlib.import_module("flagops.kernels.triton.qmatmul").TILES
HYPER = importlib.import_module("flagops.kernels.triton.hyper")
COMPRESS, INDEXER = (importlib.import_module(f"flagops.kernels.triton.{name}") for name in ("compress", "indexer"))
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), "cuda", 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hip", 64 << 10),
}
RESULTS = Path(__file__).parent / "results"
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int32": "i32"}
HALF = ("bfloat16", "float16")
FLOATS = (*HALF, "float32", "float64")


@dataclass(frozen=True)
class Entry:
    """A kernel and how it is called: what is not a pointer, a unit or a constant is an integer divisible by 16."""

    module: str
    kernel: str
    pointers: dict[str, str]
    """Argument to element type; ``dtype`` stands for the row's own, ``acc`` for its accumulator's."""
    dtypes: tuple[str, ...]
    units: tuple[str, ...] = ()
    """Integer arguments that are 1, as the stride of a contiguous axis."""
    constants: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    label: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    """The one tile of a kernel without a table."""
    widest: int = 1 << 30
    """Leave out tiles whose SLICE is wider."""
    only: str = ""
    """The one target it is for."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.kernel}"

    def tiles(self, kind: str, dtype: str) -> Iterable[dict[str, Any]]:
        """The module's own table: ``TILES[device][dtype class]``, a list of meta-parameters and launch options."""
        if self.fixed:
            return [self.fixed]
        tables = importlib.import_module(f"flagops.kernels.triton.{self.module}").TILES[kind]
        tiles = tables["half" if dtype in HALF else dtype]
        return [tile for tile in tiles if tile.get("SLICE", 0) <= self.widest]


ATTENTION = dict.fromkeys(("q", "kv", "out"), "dtype") | dict.fromkeys(("sink", "maxima", "sums"), "acc")
ATTENTION |= {"indices": "i32"}
COMBINE = dict.fromkeys(("parts", "maxima", "sums", "sink"), "acc") | {"out": "dtype"}
ATTENTION_UNITS = ("q_d", "kv_d", "sink_h", "index_k", "out_d")
ENTRIES = [
    Entry(
        "matmul", "product_kernel", dict.fromkeys(("a", "b", "bias", "out"), "dtype"), FLOATS,
        units=("a_k", "b_k", "out_n", "bias_n"), label="linear",
        constants={"GROUP": 8, "BIAS": True, "EVEN": True, "PRECISION": "ieee"},
    ),
    Entry(
        "matmul", "product_kernel", dict.fromkeys(("a", "b", "bias", "out"), "dtype"), FLOATS,
        units=("a_k", "b_n", "out_n"), label="ragged k",
        constants={"GROUP": 8, "BIAS": False, "EVEN": False, "PRECISION": "ieee"},
    ),
    Entry(
        "matmul", "sum_kernel", {"parts": "acc", "bias": "dtype", "out": "dtype"}, FLOATS,
        units=("out_n", "bias_n"), scalars={"size": "i64"}, label="split k",
        constants={"BIAS": True}, fixed={"BLOCK": 256, "num_warps": 4},
    ),
    Entry(
        "attention", "attention_kernel", ATTENTION, HALF,
        units=ATTENTION_UNITS, scalars={"scale_bits": "i64"}, label="one pass",
        constants={"WHOLE": True, "FULL": True, "SINK": True, "PARTIAL": False, "PRECISION": "ieee"},
    ),
    Entry(
        "attention", "attention_kernel", ATTENTION | {"out": "acc"}, HALF,
        units=ATTENTION_UNITS, scalars={"scale_bits": "i64"}, label="split keys, odd width",
        constants={"WHOLE": True, "FULL": False, "SINK": True, "PARTIAL": True, "PRECISION": "ieee"},
    ),
    Entry(
        "attention", "attention_kernel", ATTENTION, FLOATS,
        units=ATTENTION_UNITS, scalars={"scale_bits": "i64"}, label="in pieces", widest=256,
        constants={"WHOLE": False, "FULL": False, "SINK": True, "PARTIAL": False, "PRECISION": "ieee"},
    ),
    Entry(
        "attention", "combine_kernel", COMBINE, FLOATS,
        units=("sink_h", "out_d"), label="split keys",
        constants={"SINK": True}, fixed={"P": 32, "BLOCK": 128, "num_warps": 4},
    ),
    Entry(
        "dequantize", "fp4_kernel", {"packed": "u8", "scale": "u8", "out": "dtype"}, FLOATS[:3],
        units=("packed_c", "scale_c", "out_c"), label="contiguous", constants={"FLAT": True}, fixed=FP4_TILE,
    ),
    Entry(
        "dequantize", "fp4_kernel", {"packed": "u8", "scale": "u8", "out": "dtype"}, ("bfloat16",),
        units=("packed_c", "scale_c", "out_c"), label="rows", constants={"FLAT": False}, fixed=FP4_TILE,
    ),
    Entry(
        "dequantize", "fp8_kernel", {"weight": "u8", "scale": "u8", "out": "dtype"}, FLOATS[:3],
        units=("weight_c", "scale_c", "out_c"), label="e8m0", constants={"SHARED": True}, fixed=FP8_TILE,
    ),
    Entry(
        "dequantize", "fp8_kernel", {"weight": "u8", "scale": "fp32", "out": "dtype"}, ("bfloat16",),
        units=("weight_c", "scale_c", "out_c"), label="float32 scales", constants={"SHARED": True}, fixed=FP8_TILE,
    ),
    Entry(
        "dequantize", "fp8_kernel", {"weight": "u8", "scale": "u8", "out": "dtype"}, ("bfloat16",),
        units=("weight_c", "scale_c", "out_c"), label="odd blocks", constants={"SHARED": False}, fixed=FP8_TILE,
    ),
    Entry(
        "norm", "norm_kernel", {"x": "dtype", "weight": "fp32", "out": "dtype"}, FLOATS[:3],
        units=("x_n", "weight_n", "out_n"), scalars={"eps_bits": "i64"}, label="hidden states",
        constants={"WHOLE": True, "WEIGHT": True, "STEPWISE": False},
        fixed={"ROWS": 1, "BLOCK": 8192, "num_warps": 8},
    ),
    Entry(
        "norm", "norm_kernel", {"x": "dtype", "weight": "fp32", "out": "dtype"}, HALF,
        units=("x_n", "weight_n", "out_n"), scalars={"eps_bits": "i64"}, label="heads in steps",
        constants={"WHOLE": True, "WEIGHT": False, "STEPWISE": True}, fixed={"ROWS": 8, "BLOCK": 512, "num_warps": 8},
    ),
    Entry(
        "rotary", "rotary_kernel", {"x": "dtype", "cos": "acc", "sin": "acc", "out": "dtype"}, FLOATS,
        units=("x_d", "cos_r", "sin_r", "out_d"), scalars={"sign": "i32"}, constants={"COPY": True},
        fixed={"HEADS": 16, "BLOCK": 128, "num_warps": 4},
    ),
    Entry(
        "rotary", "table_kernel", {"positions": "i32", "theta": "fp32", "cos": "fp32", "sin": "fp32"},
        ("float32",), units=("cos_r", "sin_r"), fixed={"BLOCK": 256, "num_warps": 4},
    ),
    Entry(
        "quantize", "encode_kernel", {"x": "dtype", "codes": "u8", "scales": "u8"}, FLOATS[:3],
        units=("x_c", "codes_c", "scales_c"), label="FP8, 128", fixed={"GROUPS": 32, "BLOCK": 128, "num_warps": 4},
        constants={"POWERS": True, "FOUR": False, "FAKE": False, "LONG": False, "FLAT": True},
    ),
    Entry(
        "quantize", "encode_kernel", {"x": "dtype", "codes": "u8", "scales": "fp32"}, ("bfloat16",),
        units=("x_c", "codes_c", "scales_c"), label="FP8, float32 scales",
        constants={"POWERS": False, "FOUR": False, "FAKE": False, "LONG": False, "FLAT": True},
        fixed={"GROUPS": 32, "BLOCK": 128, "num_warps": 4},
    ),
    Entry(
        "quantize", "encode_kernel", {"x": "dtype", "codes": "dtype", "scales": "dtype"}, ("bfloat16",),
        units=("x_c", "codes_c", "scales_c"), label="FP8 and back, 64",
        constants={"POWERS": True, "FOUR": False, "FAKE": True, "LONG": False, "FLAT": True},
        fixed={"GROUPS": 64, "BLOCK": 64, "num_warps": 4},
    ),
    Entry(
        "quantize", "encode_kernel", {"x": "dtype", "codes": "u8", "scales": "u8"}, ("bfloat16",),
        units=("x_c", "codes_c", "scales_c"), label="FP4, 32", fixed={"GROUPS": 128, "BLOCK": 32, "num_warps": 4},
        constants={"POWERS": True, "FOUR": True, "FAKE": False, "LONG": False, "FLAT": True},
    ),
    Entry(
        "quantize", "encode_kernel", {"x": "dtype", "codes": "dtype", "scales": "dtype"}, ("bfloat16",),
        units=("x_c", "codes_c", "scales_c"), label="FP4 and back, 32",
        constants={"POWERS": True, "FOUR": True, "FAKE": True, "LONG": False, "FLAT": True},
        fixed={"GROUPS": 128, "BLOCK": 32, "num_warps": 4},
    ),
    Entry(
        "quantize", "recode_kernel",
        dict.fromkeys(("packed", "scale", "weight", "scales", "lossless"), "u8"), ("float32",),
        units=("packed_c", "scale_c", "weight_c", "scales_c", "lossless_c"), fixed=QUANTIZE.RECODE_TILE,
    ),
    Entry(
        "quantize", "hadamard_kernel", {"x": "dtype", "out": "dtype"}, FLOATS,
        units=("x_c", "out_c"), scalars={"scale_bits": "i64"}, label="128",
        constants={"STAGES": 7, "LONG": False, "FLAT": True}, fixed={"ROWS": 32, "D": 128, "num_warps": 4},
    ),
    *(
        Entry(
            "qmatmul", f"{kind}_kernel",
            {"a": "u8", "a_scale": "u8", "b": "u8", "b_scale": "u8", "out": "dtype"}, ("bfloat16",),
            units=("a_k", "a_scale_k", "b_k", "b_scale_k", "out_n"), label="converted" if converts else "by bits",
            constants={"GROUP": 8, "EVEN": True, "CONVERT": converts, **more}, fixed=tile,
            only="sm_90" if converts else "gfx942",
        )
        for kind, more in (("fp8", {"PLAIN": False, "PRECISION": "ieee"}), ("fp4", {}))
        for converts, tiles in ((True, QMATMUL["cuda"]), (False, QMATMUL["hip"]))
        for tile in tiles
    ),
    *(
        Entry(
            "qmatmul", "fp8_kernel",
            {"a": "dtype", "a_scale": "u8", "b": "u8", "b_scale": "u8", "out": "dtype"}, ("bfloat16",),
            units=("a_k", "a_scale_k", "b_k", "b_scale_k", "out_n"), label="plain activations",
            constants={"GROUP": 8, "EVEN": True, "CONVERT": kind == "cuda", "PLAIN": True, "PRECISION": "ieee"},
            fixed=tile, only="sm_90" if kind == "cuda" else "gfx942",
        )
        for kind in ("cuda", "hip")
        for tile in QMATMUL[kind]
    ),
    *(
        Entry(
            "sdpa", "dense_kernel", dict.fromkeys(("q", "k", "v", "mask", "out"), "dtype"), dtypes,
            units=("q_d", "k_d", "v_d", "mask_n", "out_v"), scalars={"scale_bits": "i64"}, label=label, widest=widest,
            constants={"CAUSAL": causal, "MASK": mask, "PRECISION": "ieee"},
        )
        for label, causal, mask, dtypes, widest in (
            ("causal", True, 0, HALF, 256), ("added mask", False, 2, FLOATS, 128),
        )
    ),
    Entry(
        "muon", "blend_kernel", dict.fromkeys(("x", "y", "a", "b"), "dtype"), FLOATS[2:],
        scalars={"size": "i64"}, fixed={"BLOCK": 1024, "num_warps": 4},
    ),
    Entry(
        "hyper", "split_kernel", dict.fromkeys(("mix", "scale", "base", "pre", "post", "comb"), "dtype"),
        FLOATS[2:], units=("mix_c",), scalars={"eps_bits": "i64"}, label="four streams",
        constants={"N": 4, "P": 4}, fixed=HYPER.SPLIT,
    ),
    Entry(
        "hyper", "project_kernel", {"x": "dtype", "fn": "acc", "sums": "acc"}, FLOATS,
        units=("x_d", "fn_k"), label="24 columns", constants={"C": 24, "PC": 32, "PRECISION": "ieee"},
        fixed=HYPER.PROJECT,
    ),
    Entry(
        "hyper", "collapse_kernel",
        {"x": "dtype", "y": "dtype"} | dict.fromkeys(("sums", "scale", "base", "post", "comb"), "acc"), FLOATS,
        units=("x_d",), scalars={"eps_bits": "i64", "norm_bits": "i64"}, label="four streams",
        constants={"FULL": True, "C": 24, "N": 4, "P": 4}, fixed=HYPER.COLLAPSE,
    ),
    Entry(
        "hyper", "mix_kernel",
        dict.fromkeys(("x", "y", "out"), "dtype") | dict.fromkeys(("post", "comb"), "acc"), FLOATS,
        units=("y_d", "x_d", "post_n", "comb_k", "out_d"), label="four streams", constants={"N": 4, "P": 4},
        fixed=HYPER.MIX,
    ),
    *(
        Entry(
            "experts", "coded_kernel",
            {"a": "bf16", "b": "u8", "scale": "u8", "out": "dtype", "work": "i32", "rows": "i64"}, ("bfloat16",),
            units=("b_k", "scale_k"), label=f"{'FP4' if four else 'FP8'} {'converted' if converts else 'by bits'}",
            constants={"GATHER": True, "EVEN": True, "FOUR": four, "CONVERT": converts}, fixed=tile,
            only="sm_90" if converts else "gfx942",
        )
        for four in (True, False)
        for converts, tiles in ((True, QMATMUL["cuda"]), (False, QMATMUL["hip"]))
        for tile in tiles
    ),
    *(
        Entry(
            "experts", "grouped_kernel",
            {"a": "dtype", "b": "dtype", "out": "dtype", "work": "i32", "rows": "i64"}, dtypes,
            units=("a_k", "b_k", "out_n"), constants={"GATHER": True, "EVEN": True, "PRECISION": "ieee"},
            fixed={"BM": m, "BN": n, "BK": k, "num_warps": warps, "num_stages": stages},
        )
        for dtypes, m, n, k, warps, stages in (
            (HALF, 16, 64, 128, 4, 2), (HALF, 128, 128, 64, 8, 2), (FLOATS[2:], 64, 64, 16, 8, 2),
        )
    ),
    Entry(
        "experts", "activate_kernel",
        {"both": "dtype", "order": "i64", "weights": "acc", "out": "dtype"}, FLOATS, units=("weights_k",),
        scalars={"limit_bits": "i64"}, constants={"FAKE": False, "FOUR": False}, fixed={"ROWS": 8, "num_warps": 4},
    ),
    Entry(
        "experts", "activate_kernel",
        {"both": "dtype", "order": "i64", "weights": "acc", "out": "bf16"}, FLOATS[:3], units=("weights_k",),
        scalars={"limit_bits": "i64"}, label="to FP8", constants={"FAKE": True, "FOUR": True},
        fixed={"ROWS": 8, "num_warps": 4},
    ),
    Entry(
        "experts", "fake_kernel", {"x": "dtype", "out": "bf16"}, FLOATS[:3], units=("x_d",),
        constants={"FOUR": True}, fixed={"ROWS": 8, "num_warps": 4},
    ),
    Entry(
        "experts", "combine_kernel", {"y": "dtype", "position": "i64", "shared": "dtype", "out": "dtype"},
        FLOATS, units=("shared_d", "out_d"), constants={"SHARED": True}, fixed={"BLOCK": 512, "num_warps": 4},
    ),
    Entry(
        "moe", "route_kernel",
        {"z": "dtype", "bias": "dtype", "table": "i64", "tokens": "i64", "weights": "dtype", "indices": "i32"},
        FLOATS[2:], units=("bias_e", "table_k", "tokens_t", "weights_k", "indices_k"), scalars={"scale_bits": "i64"},
        constants={"K": 6, "SLOTS": 8, "BIAS": True, "TABLE": False}, fixed={"ROWS": 4, "BLOCK": 256, "num_warps": 4},
    ),
    Entry(
        "moe", "swiglu_kernel", {"gate": "dtype", "up": "dtype", "weight": "acc", "out": "dtype"}, FLOATS,
        units=("gate_n", "up_n", "out_n"), scalars={"limit_bits": "i64"}, constants={"WEIGHT": True},
        fixed={"ROWS": 1, "BLOCK": 1024, "num_warps": 4},
    ),
    *(
        Entry(
            "compress", name,
            dict.fromkeys(("kv", "scores", "bias", "kv_state", "score_state"), "acc") | {"entries": "dtype"}, dtypes,
            units=("bias_c", "kv_c", "score_c", *["entry_d"][: name == "pool_kernel"]), fixed=tile,
        )
        for name, dtypes, tile in (
            ("pool_kernel", ("bfloat16", "float32", "float64"), COMPRESS.POOL),
            ("advance_kernel", ("float32", "float64"), COMPRESS.ADVANCE),
        )
    ),
    *(
        Entry(
            "indexer", "score_kernel",
            dict.fromkeys(("q", "keys"), "dtype") | {"weights": "acc", "visible": "i32", "scores": keys}, dtypes,
            units=("q_d", "key_d", "weight_h", "visible_s"), label=label,
            constants={"WHOLE": whole, "VISIBLE": True, "PRECISION": "ieee"},
        )
        for keys, dtypes, label, whole in (
            ("i32", HALF, "whole keys", True),
            ("i32", ("bfloat16", "float32"), "in pieces", False),
            ("i64", ("float64",), "in pieces", False),
        )
    ),
    *(
        Entry(
            "indexer", "select_kernel",
            dict.fromkeys(("places", "visible", "to_places"), "i32") | {"keys": keys, "to_keys": keys}, dtypes,
            units=("visible_s", "to_k"), label="of a list" if listed else "of scores",
            constants={"LISTED": listed, "LAST": listed, "VISIBLE": True}, fixed=INDEXER.SELECT,
        )
        for keys, dtypes in (("i32", ("float32",)), ("i64", ("float64",)))
        for listed in (False, True)
    ),
]  # fmt: skip


@dataclass
class Row:
    kernel: str
    label: str
    dtype: str
    target: str
    tile: dict[str, int]
    registers: int
    spilled: int
    """Bytes of registers spilled per thread; on AMD also registers moved to memory."""
    shared: int
    matrix: str
    """The matrix instruction found, or "-" where the products run on ordinary multiply-adds."""

    @property
    def name(self) -> str:
        tile = " ".join(f"{k}={v}" for k, v in self.tile.items())
        return f"{self.kernel} {self.label} {self.dtype} {self.target} {tile}"


def _source(entry: Entry, dtype: str, tile: dict[str, Any]) -> ASTSource:
    kernel = getattr(importlib.import_module(f"flagops.kernels.triton.{entry.module}"), entry.kernel)
    elements = {"dtype": SHORT[dtype], "acc": "fp64" if dtype == "float64" else "fp32"}
    constants = {**dict.fromkeys(entry.units, 1), **entry.constants}
    constants |= {name: value for name, value in tile.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in entry.scalars:
            signature[name] = elements.get(entry.scalars[name], entry.scalars[name])
        else:
            pointer = entry.pointers.get(name)
            signature[name] = f"*{elements.get(pointer, pointer)}" if pointer else "i32"
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _ptxas(ptx: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler of the target reports them."""
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.search(r"Used (\d+) registers", log).group(1)), max(map(int, spilled.groups()))


def _amdgcn(text: str) -> tuple[int, int]:
    value = {
        k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return value["vgpr_count"], max(4 * value["vgpr_spill_count"], value["private_segment_fixed_size"])


def compile_row(entry: Entry, dtype: str, target: str, tile: dict[str, Any]) -> tuple[Row, Any]:
    """One row and the compiled kernel it describes."""
    source = _source(entry, dtype, tile)
    options = {name: value for name, value in tile.items() if name not in source.fn.arg_names}
    compiled = triton.compile(source, target=TARGETS[target][0], options=options)
    if target.startswith("sm_"):
        registers, spilled = _ptxas(compiled.asm["ptx"])
        found = re.search(r"(wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]+", compiled.asm["ptx"])
    else:
        registers, spilled = _amdgcn(compiled.asm["amdgcn"])
        found = re.search(r"v_mfma_\w+", compiled.asm["amdgcn"])
    matrix = found.group(0).replace(".sync.aligned", "") if found else "-"
    return Row(
        entry.name,
        entry.label,
        dtype,
        target,
        tile,
        registers,
        spilled,
        compiled.metadata.shared,
        matrix,
    ), compiled


def rows(only: str = "") -> Iterator[Row]:
    for entry in ENTRIES:
        for target, (_, kind, _) in TARGETS.items():
            for dtype in entry.dtypes if entry.only in ("", target) else ():
                for tile in entry.tiles(kind, dtype):
                    blank = Row(entry.name, entry.label, dtype, target, tile, 0, 0, 0, "")
                    if only in blank.name:
                        yield compile_row(entry, dtype, target, tile)[0]


def faults(row: Row) -> str:
    """What a row does that it must not."""
    limit = TARGETS[row.target][2]
    return " ".join(["spills"] * (row.spilled > 0) + [f"more than {limit >> 10} KB"] * (row.shared > limit))


def markdown(table: list[Row]) -> str:
    lines = [
        f"Compiled by Triton {triton.__version__} without a GPU: `python benchmarks/triton_compile.py --write`.",
        "Registers are per thread, spills in bytes per thread, shared memory in bytes per program.",
        "",
        "| kernel | case | dtype | target | tile | registers | spills | shared | matrix instruction |",
        "|---|---|---|---|---|---:|---:|---:|---|",
    ]
    for row in table:
        tile = " ".join(f"{name.removeprefix('num_')}={value}" for name, value in row.tile.items())
        lines.append(
            f"| {row.kernel} | {row.label} | {row.dtype} | {row.target} | {tile} | {row.registers} | {row.spilled} "
            f"| {row.shared} | {row.matrix} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    table, bad = [], 0
    for row in rows(arguments.only):
        table.append(row)
        bad += bool(faults(row))
        numbers = f"{row.registers} registers, {row.spilled} spilled, {row.shared} shared, {row.matrix}"
        print(f"{row.name}: {numbers} {faults(row)}", flush=True)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        content = {"triton": triton.__version__, "rows": [vars(row) for row in table]}
        (RESULTS / "triton_compile.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "triton_compile.md").write_text(markdown(table))
    print(f"{len(table)} kernels, {bad} at fault")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
