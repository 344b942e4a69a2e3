"""What `make portability` keeps: complete, without new faults, and so again for kernels that have changed since."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flagops import chips

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

COMMON, QMATMUL = (importlib.import_module(f"flagops.kernels.triton.{name}") for name in ("_common", "qmatmul"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = {chip.target for chip in chips.CHIPS if chip.processors}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/portability.json"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="not a checkout")


def in_compiler(code):
    """What a process without the interpreter prints last, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = 'import json, sys\nsys.path.insert(0, "benchmarks")\nimport portability, triton_compile as compiler\n' + code
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kept():
    return json.loads(RESULTS.read_text())


def test_every_kernel_is_compiled_for_every_target_but_those_that_the_compiler_rejects(kept):
    found = {target: {p["kernel"] for p in kept["programs"] if target in p["targets"]} for target in TARGETS}
    assert {target for target, kernels in found.items() if not kernels} == set(kept["rejected"])
    everything = {p["kernel"] for p in kept["programs"]}
    for chip in chips.CHIPS:
        if chip.target in TARGETS:
            whole = found[chip.target] == everything
            assert chip.state == ("compiled" if whole else "in part" if found[chip.target] else "declared"), chip.name


def test_what_is_kept_fits_its_chip_and_runs_on_its_matrix_instructions(kept):
    """Spills are allowed to what spilled before, and listed; a program that does not fit cannot be launched at all."""
    for program in kept["programs"]:
        for target, (_, registers, _, shared, matrix, halves, refused) in program["targets"].items():
            chip, where = chips.by_target(target), f"{program['kernel']} {program['label']} {target} {program['tile']}"
            assert not refused, where
            assert 0 < registers <= 512, where
            assert shared <= chip.shared, where
            if halves and chip.matrix:
                assert re.search("|".join(chip.matrix), matrix), where


CHANGED = """
import random
from flagops import registry

before, now, rng = portability.Record.load(), portability.digests(), random.Random(SEED)
stale = {family for family in now if before.families.get(family) != now[family]}
kept = {row.label.split()[0] for row in before.rows}
names = [name for name in sorted(kept) if registry.operator(name).family in (stale or {"moe"})]
names = rng.sample(names, min(3, len(names)))
own = {row.target for row in before.rows if row.label.split()[0] in names}
targets = rng.sample(sorted(own), min(3, len(own)))
known, was = {(row.target, row.key) for row in before.rows}, {row.at: row for row in before.rows}
found = [entry for entry in compiler.rows(targets=targets, names=names) if entry[0].at in was]
changed = [entry for entry in found if (entry[0].target, entry[0].key) not in known]
rows = []
for row, launch in rng.sample(changed or found, min(4, len(changed or found))):
    made, old = compiler.tried(row, launch), was[row.at]
    same = row.key != old.key or all(getattr(made, m) == getattr(old, m) for m in portability.MEASURES)
    rows.append([row.name, compiler.faults(made), compiler.faults(old), same])
print(json.dumps(rows))
"""


@pytest.mark.drawn
def test_kernels_that_changed_since_compile_as_well_as_before(rng):
    """A few programs of what changed on three targets, or of what did not, which must come out as kept.

    `make portability` compiles all that changed, and what is new; it need not be run with each change of a kernel.
    """
    rows = in_compiler(CHANGED.replace("SEED", str(int(rng.integers(1 << 30)))))
    assert rows
    for name, fault, before, same in rows:
        assert same, f"{name} is made of the same sources and came out otherwise"
        assert not fault or before, f"{name}: {fault}"


def test_a_change_of_what_a_family_shares_makes_it_stale():
    names = in_compiler("print(json.dumps(sorted(path.name for path in portability.sources('experts'))))")
    assert {"_common.py", "experts.py", "matmul.py", "qmatmul.py", "quantize.py"} <= set(names)
    assert "sdpa.py" not in names


@triton.jit
def half_kernel(codes, out, CONVERT: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, QMATMUL.half(tl.load(codes + at), CONVERT))


def test_fp8_by_its_bits_is_what_the_instruction_gives():
    """All 256 codes; by its bits e4m3 is 2^-8 of its value, which the product takes back exactly."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    by_bits, converted = (torch.empty(256, dtype=torch.float16, device=DEVICE) for _ in range(2))
    half_kernel[(1,)](codes, by_bits, CONVERT=False)
    by_bits, expected = by_bits.float() * 256, codes.view(torch.float8_e4m3fn).float()
    assert by_bits.nan_to_num(1e9).tolist() == expected.nan_to_num(1e9).tolist()
    if DEVICE == "cuda" and not COMMON.chip(torch.device(DEVICE)).converts:
        return
    half_kernel[(1,)](codes, converted, CONVERT=True)
    known = codes & 0x7F != 0x7F if DEVICE == "cpu" else codes >= 0  # the interpreter reads the code of NaN as 480
    assert converted.float()[known].nan_to_num(1e9).tolist() == by_bits[known].nan_to_num(1e9).tolist()
