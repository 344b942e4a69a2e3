"""What Triton kernels ask of a chip that is not here, against what their operators need, and the time that both bound.

    python benchmarks/kernel_roofline.py                            every kernel and workload, for sm_90 and gfx942
    python benchmarks/kernel_roofline.py --target sm_89 matmul.     what holds the words, on another target
    python benchmarks/kernel_roofline.py --save                     keep the results, with what they were before

Each named workload is called as dispatch calls it on the chip; of each launch a few programs are walked through the
compiled code (`triton_count.py`), and the table of chips says what the sum takes. `docs/chips.md` says what is assumed.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_compile as compiler
from triton_count import INTEGERS, Counts, Memory, Program, Traffic, Uncounted, parsed

from flagops import arrays, chips, registry, tables
from flagops.operator import Operator
from flagops.tools import workloads
from flagops.tools.contract import Progress
from flagops.tools.programs import CHIPS, ready, zeros

RESULTS = Path(__file__).parent / "results" / "kernel_roofline.json"
TARGETS = ("sm_90", "gfx942")
SAMPLE = 16
"""Programs of a launch that are walked, spread over its grid; of a smaller grid all."""
WORK = 2 << 20
"""Elements of accesses after which no further program is walked."""
WORST = 15
"""Rows of the page for each target."""
NOT_MENDED = """\
- `newton_schulz`: many products in a row, each through memory, against an ideal that keeps all on the chip.
- `hc_pre` of many tokens, `grouped_output_projection` in FP8: several launches, by the byte budget and by group; one
  over all groups would be another kernel.
- `native_layer_norm_backward`, `_softmax`, `native_layer_norm` of long rows: a row is read again because no program
  holds it; that the L2 has it is not counted.
- packed weights for 128 rows on many processors: split sums take more bytes than the weights, and shorter tiles would
  decode each weight several times, which is not counted either."""
LAUNCH = 2e-6
"""Seconds that a launch is taken to cost, and an operator to need; what is far below it is not worth mending."""
SHARE = 2
"""Times its share of the bandwidth that one processor can take."""


@dataclass
class Kernel:
    """One launch on one chip: what all its programs issue together.

    read, written: bytes of each access. traffic: bytes of the memory. operations: of products, as the matrix units
    carry them out; tile: as the tiles have them. filled: share of the processors that work, by the waves of programs.
    occupancy: share of a processor's warps, or None where the chip's registers are unknown.
    """

    kernel: str
    tile: str
    programs: int
    sampled: int
    read: float
    written: float
    traffic: float
    tiled: float
    operations: float
    eight: bool
    data: int
    registers: int
    spilled: int
    shared: int
    resident: int | None
    occupancy: float | None
    memory: float = 0
    matrix: float = 0

    @property
    def bound(self) -> float:
        return max(self.memory, self.matrix)


@dataclass
class Row:
    """An operator at a workload on a chip. needed, work: bytes and operations that it needs, each byte once."""

    operator: str
    workload: str
    target: str
    needed: float = 0
    work: float = 0
    least: float = 0
    kernels: list[Kernel] = field(default_factory=list)
    uncounted: str = ""

    @property
    def at(self) -> str:
        return f"{self.operator} {self.workload} {self.target}"

    @property
    def bound(self) -> float:
        return sum(kernel.bound + LAUNCH for kernel in self.kernels)

    @property
    def waste(self) -> float:
        return self.bound / (self.least + LAUNCH)

    @property
    def longest(self) -> Kernel:
        return max(self.kernels, key=lambda kernel: kernel.bound)

    @property
    def reason(self) -> str:
        """What most of the waste is."""
        kernel, launches = self.longest, (len(self.kernels) - 1) * LAUNCH
        if self.waste < 1.1:
            return "-"
        if launches > self.bound - launches - self.least - LAUNCH:
            return f"{len(self.kernels)} launches"
        if kernel.memory >= kernel.matrix:
            moved = sum(each.traffic for each in self.kernels) / max(self.needed, 1)
            return f"{moved:.1f} times the bytes" if moved > 1.1 else "few programs"
        padded = kernel.operations / max(self.work, 1)
        return f"{padded:.1f} times the operations" if padded > 1.1 else "waves of programs"

    def saved(self) -> dict[str, Any]:
        figures = {"bound": self.bound, "waste": self.waste, "reason": self.reason} if self.kernels else {}
        return rounded(dataclasses.asdict(self) | figures)


def rounded(value: Any) -> Any:
    """To four digits, which is more than a sample of programs gives."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def spread(programs: int) -> Iterator[int]:
    """Numbers of programs in the order in which they are walked: any first few lie all over the grid."""
    if programs <= SAMPLE:
        yield from range(programs)
        return
    golden, seen = 0.6180339887498949, set()
    for i in range(SAMPLE):
        at = int((0.5 + i * golden) % 1 * programs)
        if at not in seen:
            seen.add(at)
            yield at


def counted(ttir: Any, memory: Memory, given: Sequence[Any], grid: Sequence[int]) -> tuple[Counts, int]:
    """What all programs of a grid do, from those that are walked, and how many these were."""
    names, body = ttir
    total, walked, work = Counts(), 0, 0
    count = int(np.prod(grid))
    for number in spread(count):
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        program = Program(memory, place, grid)
        total.add(program.run(names, given, body))
        walked, work = walked + 1, work + program.work
        if work > WORK and walked >= 3:
            break
    scaled = Counts()
    scaled.add(total, count / walked)
    return scaled, walked


def argument(kind: str, value: Any) -> Any:
    """As the walk has it: a pointer as its address, an integer in its width; None for a float."""
    if isinstance(value, torch.Tensor):
        return np.int64(value.data_ptr())
    return INTEGERS[kind](value) if kind in INTEGERS else None


def flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that a compiled kernel takes: those that are no constants."""
    if isinstance(kind, tuple):
        for part in zip(kind, value, strict=True):
            yield from flat(*part)
    elif kind != "constexpr":
        yield kind, value


def matrix_shapes(ttgir: str) -> dict[tuple[int, int], float]:
    """Of each product's result, how many times its elements the warps compute: those that a tile has no rows for idle
    or repeat others' work."""
    encodings = {
        name: ([int(x) for x in warps.split(",")], [int(x) for x in shape.split(",")])
        for name, warps, shape in re.findall(
            r"^(#\w+) = #ttg\.\w*m\w*a\w*<\{.*?warpsPerCTA = \[([\d, ]+)\], instrShape = \[([\d, ]+)\]", ttgir, re.M
        )
    }
    found = {}
    for m, n, name in re.findall(r"dot.*-> tensor<(?:\d+x)*?(\d+)x(\d+)x\w+, (#\w+)>", ttgir):
        if name in encodings:
            warps, shape = encodings[name]
            size = shape[:2]
            rows, columns = (-(-int(x) // (w * s)) * w * s for x, w, s in zip((m, n), warps[-2:], size, strict=True))
            found[int(m), int(n)] = rows * columns / (int(m) * int(n))
    return found


def resident(chip: chips.Chip, warps: int, registers: int, shared: int) -> int | None:
    """How many programs a processor holds at once, by its registers, its shared memory and its warps."""
    if not (chip.registers and chip.warps and chip.width and chip.shared):
        return None
    least = 1 << 10 if chip.vendor == "NVIDIA" else 0  # which every program takes besides
    of_warp = -(-registers * chip.width // (8 * chip.width)) * 8 * chip.width
    limits = [chip.warps // warps, chip.registers // max(1, warps * of_warp)]
    if shared:
        limits.append((chip.shared + least) // (shared + least))
    return max(1, min(limits))


@functools.cache
def compiled(target: str, launch: compiler.Launch) -> tuple[compiler.Row, Any, dict[tuple[int, int], float]]:
    row, made = compiler.compiled(compiler.Row(launch.name, "", launch.dtypes, target, ""), launch)
    return row, parsed(made.asm["ttir"]), matrix_shapes(made.asm["ttgir"])


def kernel(
    chip: chips.Chip, launch: compiler.Launch, grid: Sequence[int], values: dict[str, Any], unread: set[int]
) -> tuple[Kernel, dict[int, float]]:
    """A launch's figures, and what it reads of each storage, each byte once; storages that it writes become unread."""
    row, ttir, shapes = compiled(chip.target, launch)
    grid = [*grid, 1, 1][:3]
    given = [pair for name, kind in launch.signature for pair in flat(kind, values[name])]
    memory = Memory([value for _, value in given if isinstance(value, torch.Tensor)], unread)
    counts, sampled = counted(ttir, memory, [argument(*pair) for pair in given], grid)
    unread.update(counts.writes)
    tiled = {shape: 2.0 * shape[0] * shape[1] * shape[2] * count for shape, count in counts.dots.items()}
    halves = {shape: work for shape, work in tiled.items() if shape[3] not in ("f32", "f64")}
    warps = launch.tile.get("num_warps", 4)
    programs = int(np.prod(grid))
    held = resident(chip, warps, row.registers, row.shared)
    found = Kernel(
        launch.name, compiler.words(launch.tile), programs, sampled,
        sum(each.issued for each in counts.reads.values()), sum(each.issued for each in counts.writes.values()),
        sum(moved(each, memory.sizes[start]) for way in (counts.reads, counts.writes) for start, each in way.items()),
        sum(tiled.values()), sum(work * shapes.get(shape[:2], 1.0) for shape, work in halves.items()),
        any(shape[3] == "i8" for shape in halves), counts.data, row.registers, row.spilled, row.shared, held,
        None if held is None else held * warps / chip.warps,
    )  # fmt: skip
    processors = chip.processors or 1
    found.memory = found.traffic / (chip.bandwidth * 1e9) / min(1, SHARE * programs / processors)
    filled = programs / (processors * -(-programs // processors))
    found.matrix = seconds(chip, found.operations, found.eight) / filled
    return found, {start: each.distinct for start, each in counts.reads.items()}


def moved(each: Traffic, size: int) -> float:
    """Bytes of the memory: what programs share comes once, what one program asks for again comes again."""
    return min(each.sectors, size) * each.issued / each.distinct if each.distinct else 0.0


def seconds(chip: chips.Chip, operations: float, eight: bool = False) -> float:
    """Of products at the chip's rate, twice that of halves for integers of eight bits; 0 where it is unknown."""
    return operations / (chip.rate * 1e12 * (2 if eight else 1)) if chip.rate else 0.0


def rows(op: Operator, workload: str, targets: Sequence[str], sizes: Mapping[str, int] | None = None) -> Iterator[Row]:
    """An operator at a named workload on each target; nothing where its kernel does not take the call."""
    case = workloads.case(op, workload, sizes=sizes)
    made = workloads.inputs(op, case, hollow=zeros)
    run = ready(op, made)
    if run is None:
        return
    bound = op.bind(op.fill(tuple(made), {}))
    results = sum(
        int(np.prod(shape)) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(bound.shapes, bound.results, strict=True)
    )
    inputs = {x.untyped_storage().data_ptr(): x.nbytes for x in made if arrays.is_torch(x)}
    for target in targets:
        row = Row(op.name, workload, target, results, float(op.flops(bound.dims, bound.batch)))
        yield judged(row, run, inputs)


def judged(row: Row, run: Callable[[], None], inputs: Mapping[int, int]) -> Row:
    """A row with the launches that a call makes. ``inputs`` are bytes by storage: of what its programs touch of one, at
    most all is needed, and of one that no kernel touches, for torch did, all."""
    chip = CHIPS[row.target]
    launches: list[Any] = []
    with compiler.noted(compiler.TARGETS[row.target][1], lambda *launch: launches.append(launch)):
        run()
    unread: set[int] = set()
    touched: dict[int, float] = {}
    try:
        for launch in launches:
            found, reads = kernel(chip, *launch, unread)
            row.kernels.append(found)
            for start, size in reads.items():
                touched[start] = touched.get(start, 0) + size
    except Uncounted as error:
        row.kernels, row.uncounted = [], str(error)
    row.needed += sum(min(size, touched.get(start) or size) for start, size in inputs.items())
    work = row.work if any(each.operations for each in row.kernels) else 0.0
    eight = any(each.eight for each in row.kernels)
    row.least = max(row.needed / (chip.bandwidth * 1e9), seconds(chip, work, eight))
    return row


def everything(only: str, targets: Sequence[str]) -> list[Row]:
    """All that there is, by waste, the worst first."""
    chosen = [
        (op, workload)
        for op in registry.cards().values()
        if registry.written(op.name, "triton")
        for workload in op.workloads
        if only in f"{op.name}.{workload}"
    ]
    found = []
    with Progress(len(chosen)) as begin:
        for op, workload in chosen:
            begin(f"{op.name} {workload}")
            found += rows(op, workload, targets)
    return ordered(found)


def ordered(found: Sequence[Row]) -> list[Row]:
    return sorted(found, key=lambda row: -row.waste if row.kernels else 0.0)


COLUMNS = ("operator", "workload", "target", "longest kernel", "MB needed", "issued", "of memory", "GFLOP needed",
           "issued ", "programs", "occupancy", "needs us", "bound us", "waste", "most of it")  # fmt: skip


def shown(row: Row) -> tuple[str, ...]:
    if not row.kernels:
        return (row.operator, row.workload, row.target, row.uncounted, *[""] * 11)
    longest = row.longest
    figures = (row.needed, sum(k.read + k.written for k in row.kernels), sum(k.traffic for k in row.kernels))
    work = sum(k.operations for k in row.kernels)
    return (
        row.operator, row.workload, row.target, longest.kernel.split(".")[1].removesuffix("_kernel"),
        *(f"{x / 1e6:.4g}" for x in figures),
        f"{row.work / 1e9:.3g}" if work else "-", f"{work / 1e9:.3g}" if work else "-", str(longest.programs),
        "?" if longest.occupancy is None else f"{longest.occupancy:.2f}",
        f"{(row.least + LAUNCH) * 1e6:.1f}", f"{row.bound * 1e6:.1f}", f"{row.waste:.2f}", row.reason,
    )  # fmt: skip


def save(found: Sequence[Row]) -> None:
    """The figures, a line for each row, and a page of the worst; what a row wasted when it was first kept stays."""
    kept = json.loads(RESULTS.read_text())["was"] if RESULTS.exists() else {}
    was = {row.at: kept.get(row.at, round(row.waste, 3)) for row in found if row.kernels}
    words = [each.name for each in dataclasses.fields(Kernel)]
    entries = [row.saved() for row in found]
    lines = ",\n".join(
        f"  {json.dumps(entry | {'kernels': [list(each.values()) for each in entry['kernels']]})}" for entry in entries
    )
    head = f'"was": {json.dumps(was)},\n "of a kernel": {json.dumps(words)}'
    RESULTS.write_text(f'{{{head},\n "rows": [\n{lines}\n ]}}\n')
    RESULTS.with_suffix(".md").write_text(page(found, was))


def page(found: Sequence[Row], was: dict[str, float]) -> str:
    whole = [row for row in found if row.kernels]
    mended = [row for row in whole if row.waste < 0.95 * was[row.at]]
    lost = [f"- {row.at}: {row.uncounted}" for row in found if row.uncounted]
    alike = set()
    parts = [
        f"{len(whole)} workloads on {len({row.target for row in whole})} targets, counted by "
        "`python benchmarks/kernel_roofline.py` from what Triton compiles, without a chip; "
        "[what the figures mean, and what they cannot see](../../docs/chips.md#a-roofline-without-the-chip). "
        "All of them, of each launch, are in kernel_roofline.json.",
        f"## The worst {WORST} on each target, each kernel once where it is the longest",
    ]
    for target in dict.fromkeys(row.target for row in whole):
        worst = []
        for row in whole:
            kind = (target, row.longest.kernel)
            if row.target == target and kind not in alike:
                alike.add(kind)
                worst.append(shown(row))
        parts.append(tables.markdown(COLUMNS, worst[:WORST]))
    columns = ("longest kernel", "target", "workloads", "of which", "waste before", "now")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(mended, key=lambda row: row.waste / was[row.at]):
        groups.setdefault((row.longest.kernel, row.target), []).append(row)
    changes = [
        (
            *at,
            len(group),
            f"{group[0].operator} {group[0].workload}",
            f"{was[group[0].at]:.2f}",
            f"{group[0].waste:.2f}",
        )
        for at, group in groups.items()
    ]
    parts += ["## Mended", "What is better by a twentieth than when it was first counted, the most so of each kernel.",
              tables.markdown(columns, changes)] * bool(mended)  # fmt: skip
    parts += ["## Not mended", NOT_MENDED]
    parts += ["## Not counted", "\n".join(lost)] * bool(lost)
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("only", nargs="?", default="", metavar="PART", help="operators and workloads that hold it, as rms_norm.v4-pro")
    add("--target", default=",".join(TARGETS), help="Triton's targets, with commas (default: %(default)s)")
    add("--top", type=int, default=40, metavar="N", help="rows to show (default: %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="all figures, of each launch")
    group.add_argument("--markdown", action="store_true", help="the table in Markdown")
    group.add_argument("--save", action="store_true", help=f"all into {RESULTS.name} and the page beside it")
    arguments = parser.parse_args()
    targets = arguments.target.split(",")
    unknown = [target for target in targets if target not in CHIPS]
    if unknown or (arguments.save and arguments.only):
        parser.error(f"no target {unknown[0]!r}, only {', '.join(CHIPS)}" if unknown else "--save keeps all or nothing")
    found = everything(arguments.only, targets)
    if arguments.save:
        save(found)
    elif arguments.json:
        print(json.dumps([row.saved() for row in found], indent=1))
    else:
        show = tables.markdown if arguments.markdown else lambda *table: tables.show("by waste", *table)
        text = show(COLUMNS, [shown(row) for row in found[: arguments.top]])
        if arguments.markdown:
            print(text)
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
