"""Compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory, matrix instructions.

What is compiled is what the operators would launch on each chip of `flagops.chips`: at the named workloads of their
cards in each of their dtypes, and for what those leave out at small drawn cases. A chip's assembler refuses what the
chip lacks, so what compiles holds no such instruction. `portability.py` is the command.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import io
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would turn the kernels into Python functions

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from flagops import arrays, registry, testing
from flagops.errors import Unsupported
from flagops.tools import workloads
from flagops.tools.contract import Progress
from flagops.tools.programs import CHIPS, COMMON, described, ready, zeros

TARGETS = {target: described(CHIPS[target]) for target in reversed(CHIPS)}
FLAT = {target for target, chip in CHIPS.items() if not chip.matrix}
"""Chips for which only cards under torch's operators are compiled: unrolled into multiply-adds, the tiles of products,
which are made for matrix instructions, take minutes to compile each and spill."""
DTYPES = ("bfloat16", "float16", "float32", "float64")
ELEMENTS = {"bool": "i1", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
ELEMENTS |= {f"{sign}int{bits}": f"{sign or 'i'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
DRAWS = 60
Place = tuple[int, ...]
"""An argument's position, and that in a tuple."""


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would specialise it for one call: types, constants (a stride of 1 is one), divisible by 16."""

    kernel: JITFunction
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Place, Any], ...]
    divisible: tuple[Place, ...]
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        values = given(kernel, args, kwargs)
        constants, divisible = [], []

        def described(value: Any, param: Any, path: Place) -> Any:
            if isinstance(value, tuple) and not param.is_constexpr:
                return tuple(described(x, param, (*path, i)) for i, x in enumerate(value))
            free = type(value) is not int or not param.do_not_specialize
            if param.is_constexpr or value is None or (type(value) is int and value == 1 and free):
                constants.append((path, value))
                return "constexpr"
            kind, number = _kind(value)
            if number % 16 == 0 and not isinstance(value, float) and free:
                divisible.append(path)
            return kind

        signature = tuple((p.name, described(values[p.name], p, (at,))) for at, p in enumerate(kernel.params))
        options = tuple((k, v) for k, v in kwargs.items() if k not in kernel.arg_names)
        return cls(kernel, signature, tuple(constants), tuple(divisible), options)

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def dtypes(self) -> str:
        """Element types of the tensors, each once."""
        return " ".join(dict.fromkeys(kind[1:] for kind in _flat(self.signature) if kind.startswith("*")))

    @property
    def tile(self) -> dict[str, Any]:
        """What the call fixes: constants and launch options."""
        params = self.kernel.params
        named = {params[path[0]].name: value for path, value in self.constants if params[path[0]].is_constexpr}
        return named | dict(self.options)

    @property
    def program(self) -> Any:
        """What makes it another program but for strides, of which the first seen stand for all."""
        return self.kernel, self.dtypes, tuple(self.tile.items())

    def key(self, target: str) -> str:
        """Changes with whatever the compiler is given."""
        given = [part for _, value in self.constants for part in (value if isinstance(value, tuple) else (value,))]
        sources = [source(part) for part in (self.kernel, *given) if isinstance(part, JITFunction)]
        text = repr((triton.__version__, target, sources, self.signature, self.constants, self.divisible, self.options))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def features(self) -> set[Any]:
        """What of the kernel's code it runs, with which functions, and over how many axes."""
        missing = tuple(path for path, value in self.constants if value is None)
        axes = tuple(len(kind) for _, kind in self.signature if isinstance(kind, tuple))
        chosen = tuple((k, v) for k, v in self.constants if isinstance(v, bool))
        given = [v for _, v in self.constants if isinstance(v, (JITFunction, tuple))]
        return {(self.kernel, *given), (self.kernel, missing, chosen), (self.kernel, axes)}


@cache
def source(function: JITFunction) -> str:
    """A digest of what a function is made of, wherever it stands in its file: itself, what it calls, constants."""
    tree = ast.parse(function.src)
    text = hashlib.sha256(ast.unparse(tree).encode())
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = function.fn.__globals__.get(name)
        if isinstance(value, JITFunction):
            text.update(f"{name} {source(value)}".encode())
        elif isinstance(value, tl.constexpr):
            text.update(f"{name} {value.value}".encode())
    return text.hexdigest()


def given(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a launch gives to each parameter of a kernel."""
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    return dict(zip(kernel.arg_names, args, strict=False)) | named


def _flat(signature: Any) -> Iterator[str]:
    for kind in signature:
        yield from (kind,) if isinstance(kind, str) else _flat(kind)


def _kind(value: Any) -> tuple[str, int]:
    """Triton's type of an argument, and the number that is divisible by 16 or not."""
    if isinstance(value, torch.Tensor):
        return f"*{ELEMENTS[arrays.dtype_name(value)]}", value.data_ptr()
    if isinstance(value, bool):
        return "i1", 1
    if isinstance(value, float):
        return "fp32", 1
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64", value


@contextlib.contextmanager
def noted(chip: Any, note: Callable[[Launch, Any, dict[str, Any]], None]) -> Iterator[None]:
    """Launches made within go to ``note(launch, grid, values)``, and none runs; wrappers believe to be on `chip`."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        note(Launch.of(self, args, kwargs), grid, given(self, args, kwargs))

    original, JITFunction.run, COMMON.pretended = JITFunction.run, run, chip
    try:
        yield
    finally:
        JITFunction.run, COMMON.pretended = original, None


@contextlib.contextmanager
def recorded(chip: Any) -> Iterator[list[Launch]]:
    """The launches made within."""
    launches: list[Launch] = []
    with noted(chip, lambda launch, *_: launches.append(launch)):
        yield launches


def calls(name: str) -> Iterator[tuple[str, list[Any]]]:
    """What an operator is called with: named workloads, filled with zeros, in every dtype; then small drawn cases."""
    op = registry.operator(name)
    for workload in op.workloads:
        cases = {}
        for dtype in (None, *(() if "dtype" in op.scalars and op.aten else DTYPES)):
            with contextlib.suppress(Unsupported):
                case = workloads.case(op, workload, dtype)
                cases[case] = " ".join(filter(None, (name, workload, dtype)))
        for case, label in cases.items():
            yield label, workloads.made(op, case, zeros)
    for seed in range(DRAWS):
        rng = random.Random(f"{name} {seed}")
        case = testing.draw_case(op, lambda options, rng=rng: options[rng.randrange(len(options))], testing.INTERPRETED)
        if case.values != "special":
            dtypes = dict(case.dtypes)
            yield f"{name} drawn", [testing.as_kind(x, "torch", dtypes.get(n)) for n, x in case.arguments().items()]


def launches(targets: Sequence[str], operators: Iterable[str]) -> dict[str, dict[Launch, str]]:
    """What operators launch on each chip, each with the call that does."""
    found: dict[str, dict[Any, tuple[Launch, str]]] = {target: {} for target in targets}
    shown: dict[str, set[Any]] = {target: set() for target in targets}
    names = [name for name in operators if registry.written(name, "triton")]
    with Progress(len(names)) as begin:
        for name in names:
            begin(f"what {name} launches")
            op = registry.operator(name)
            for label, made in calls(name):
                run = ready(op, made)
                if run is None:
                    continue
                for target in targets:
                    if target in FLAT and not op.aten:
                        continue
                    with recorded(TARGETS[target][1]) as seen:
                        run()
                    for launch in seen:
                        if not label.endswith("drawn") or not launch.features <= shown[target]:
                            found[target].setdefault(launch.program, (launch, label))
                        shown[target] |= launch.features
    return {target: dict(programs.values()) for target, programs in found.items()}


def words(tile: dict[str, Any]) -> str:
    """A tile in words: functions and types by their names."""
    return " ".join(f"{name}={_word(value)}" for name, value in tile.items())


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return value.__name__ if isinstance(value, JITFunction) else str(value)


@dataclass
class Row:
    kernel: str
    label: str
    dtypes: str
    target: str
    tile: str
    registers: int = 0
    spilled: int = 0
    """Bytes of registers spilled per thread; on AMD also registers moved to memory."""
    shared: int = 0
    matrix: str = "-"
    """The matrix instruction found, or "-" where the products run on ordinary multiply-adds."""
    halves: bool = False
    """Whether it multiplies matrices in half precision, for which a chip may have instructions."""
    key: str = ""
    refused: str = ""
    """Why the compiler did not take it."""

    @property
    def at(self) -> tuple[str, ...]:
        """What stays as sources change."""
        return self.target, self.kernel, self.dtypes, self.tile

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.label} {self.dtypes} {self.target} {self.tile}"


def rows(only: str = "", targets: Iterable[str] = TARGETS, names: Iterable[str] = ()) -> Iterator[tuple[Row, Launch]]:
    """What there is to compile, of some operators or of all."""
    for target, programs in launches(list(targets), list(names) or list(registry.cards())).items():
        for launch, label in programs.items():
            row = Row(launch.name, label, launch.dtypes, target, words(launch.tile), key=launch.key(target))
            if only in row.name:
                yield row, launch


def compiled(row: Row, launch: Launch) -> tuple[Row, Any]:
    """A row with what the compiler says, and the compiled kernel."""
    from triton import knobs  # which Ascend's Triton, older, has not

    attributes = {path: [["tt.divisibility", 16]] for path in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    said = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True  # what was compiled before says nothing
        made = triton.compile(source, target=TARGETS[row.target][0], options=dict(launch.options))
    if row.target.startswith("sm_"):
        registers, spilled = _ptxas(said.getvalue())
        found = re.search(r"tcgen05\.mma\.[\w.:]+|(wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]+", made.asm["ptx"])
    else:
        registers, spilled = _amdgcn(made.asm["amdgcn"])
        found = re.search(r"v_w?mf?ma_\w+", made.asm["amdgcn"])
    matrix = found.group(0).replace(".sync.aligned", "") if found else "-"
    halves = bool(re.search(r"tt\.dot .*: tensor<\w+xb?f16> \*", made.asm["ttir"]))
    measured = {"registers": registers, "spilled": spilled, "shared": made.metadata.shared, "matrix": matrix}
    return dataclasses.replace(row, **measured, halves=halves), made


def tried(row: Row, launch: Launch) -> Row:
    """A row as compiled, or with what the compiler had against it."""
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)  # MLIR writes its reasons, and whole programs, past Python
        try:
            return compiled(row, launch)[0]
        except Exception as error:
            said.seek(0)
            reasons = re.findall(r"error: (.*)", said.read().decode(errors="replace")) or str(error).splitlines()[-1:]
            return dataclasses.replace(row, refused=f"{type(error).__name__}: {reasons[0]}"[:200])
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _ptxas(log: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler reports them that Triton calls, with its options."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.search(r"Used (\d+) registers", log).group(1)), max(map(int, spilled.groups()))


def _amdgcn(text: str) -> tuple[int, int]:
    value = {
        k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return value["vgpr_count"], max(4 * value["vgpr_spill_count"], value["private_segment_fixed_size"])


def kernels() -> set[str]:
    """Every kernel of the folder that is launched by itself."""
    folder = Path(COMMON.__file__).parent
    modules = [importlib.import_module(f"flagops.kernels.triton.{path.stem}") for path in folder.glob("[!_]*.py")]
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__
    }


def family(row: Row) -> str:
    return registry.operator(row.label.split()[0]).family


def faults(row: Row) -> str:
    """What a row does that it must not."""
    chip = CHIPS[row.target]
    found = [row.refused] if row.refused else ["spills"] * (row.spilled > 0)
    found += [f"more than {chip.shared >> 10} KB"] * (row.shared > chip.shared)
    lost = row.halves and chip.matrix and row.matrix == "-"
    return ", ".join(found + [f"no {' or '.join(chip.matrix or ())}"] * bool(lost))
