"""The speeds that were promised, each measured against its yardstick in one run: `flagops bench --targets`.

Ratios compare times taken side by side. Products take the best backend, the rest what dispatch picks. The promises are
for a CPU with AVX-512 and no bfloat16 units; ``--no-native-bf16`` makes torch run as on such a one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

import flagops
from flagops import registry, tables
from flagops.call import of
from flagops.tools import companions, contract, measure, results, workloads
from flagops.tools.measure import Call, Settings, Trial

promise, targets_v4 = companions.load("promise"), companions.load("targets_v4")
Result, ratio_of, times_of = promise.Result, promise.ratio, promise.times_of

V4_FLASH_ROWS = (1, 16, 128, 1024)
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


HEAD = ("target", "promised", "measured", "", "detail")


def run(settings: Settings, json_file: Path | None = None, markdown: Path | None = None) -> int:
    """Measure every target; returns 1 if one was missed."""
    measured: list[Result] = []
    with torch.no_grad(), contract.Progress(len(TARGETS)) as begin:
        for target in TARGETS:
            begin(target.__name__)
            for result in target(settings):
                print("; ".join(result.cells()), file=sys.stderr)
                measured.append(result)
    tables.show("targets", HEAD, [result.cells() for result in measured])
    if json_file:
        found = [asdict(result) | {"reached": result.reached} for result in measured]
        run_on = datetime.now(UTC).isoformat(timespec="seconds")
        everything = {"machine_info": measure.machine(), "datetime": run_on, "targets": found}
        json_file.write_text(json.dumps(everything, indent=1) + "\n")
    if markdown:
        results.write_markdown(markdown, HEAD, [result.cells() for result in measured], __doc__ or "")
    return 0 if all(result.reached for result in measured) else 1


def product(settings: Settings) -> Iterator[Result]:
    name, ratio = _best(_trial("matmul", "square-2048.bfloat16", settings), settings)
    yield Result("matmul bfloat16 2048^3 to torch", ratio, 3.0, detail=name)


def weights(settings: Settings) -> Iterator[Result]:
    """Every weight of the V4-Flash table, for each number of rows the slowest against torch."""
    workloads = [n for n in registry.operator("matmul").workloads if n.startswith("v4-flash.")]
    for rows in V4_FLASH_ROWS:
        found = {}
        for workload in (n for n in workloads if n.endswith(f".{rows}")):
            name, ratio = _best(_trial("matmul", workload, settings), settings)
            found[workload] = (ratio, name)
        worst = min(found, key=lambda n: found[n][0])
        above = sum(ratio >= 0.95 for ratio, _ in found.values())
        detail = f"{worst} on {found[worst][1]}; {above} of {len(found)} reach it, median {_middle(found):.2f} x"
        yield Result(f"matmul bfloat16 V4-Flash, {rows} rows, worst to torch", found[worst][0], 0.95, detail=detail)


def dequantize(settings: Settings) -> Iterator[Result]:
    for name in ("fp4_dequantize", "fp8_dequantize"):
        trial = _trial(name, "4096x7168", settings)
        call, out = of(trial.op), trial.out
        source, moved = torch.ones_like(out), 2 * out.nbytes
        calls: dict[str, Call] = {"ours": call, "copy": lambda *args, source=source: args[-1].copy_(source)}
        times = _checked(trial, calls, settings)
        rate, detail = ratio_of(times, "ours", "copy", trial.bytes / moved)
        yield Result(f"{name} 4096x7168 with out, bytes/s to copy_", rate, 0.7, detail=detail)

        fresh: dict[str, Call] = {
            "ours": lambda *args, call=call: call(*args[:-1]),
            "fill": lambda *args: torch.empty(args[-1].shape, dtype=args[-1].dtype).fill_(1),
        }
        times = measure.alternate(fresh, trial.sets, out, settings)
        ratio, detail = ratio_of(times, "ours", "fill")
        yield Result(f"{name} 4096x7168 without out to empty().fill_()", ratio, 0.8, detail=detail)

        idiom, baseline = next(iter(companions.baselines(trial.op).items()))
        times = _checked(trial, {"ours": call, idiom: baseline}, settings)
        ratio, detail = ratio_of(times, "ours", idiom)
        yield Result(f"{name} 4096x7168 to {idiom}", ratio, detail=detail)


def attention(settings: Settings) -> Iterator[Result]:
    trial = _trial("sparse_attention", "v4-flash.prefill-4k", settings)
    a, b, c = (torch.rand(2048, 2048) for _ in range(3))
    calls: dict[str, Call] = {"ours": of(trial.op), "product": lambda *args: torch.matmul(a, b, out=c)}
    times = _checked(trial, calls, settings)
    share, detail = ratio_of(times, "ours", "product", trial.flops / (2 * 2048**3))
    detail += f", {trial.flops / median(times['ours']) / 1e9:.0f} GFLOP/s"
    yield Result("sparse_attention V4-Flash prefill 4k, rate to float32 2048^3", share, 0.55, detail=detail)
    extra = measure.extra_memory(lambda: of(trial.op)(*trial.sets[0], trial.out))
    value = math.nan if extra is None else extra / 2**20
    yield Result("sparse_attention V4-Flash prefill 4k, extra memory", value, 256, most=True, unit="MiB")


def overhead(settings: Settings) -> Iterator[Result]:
    """What a call costs beyond calling the kernel's function on the same tensors, ``out`` given."""
    backend = "numba"
    kernel = registry.find("matmul", backend).function
    a, b, out = (torch.rand(8, 8) for _ in range(3))
    explicit = flagops.matmul
    calls: dict[str, Call] = {
        "kernel": lambda *_: kernel(a, b, out),
        "explicit": lambda *_: explicit(a, b, out, backend=backend),
        "aten": lambda *_: torch.mm(a, b, out=out),
    }
    many = Settings(settings.seconds, max(settings.rounds, 15), settings.most)
    with flagops.enable("matmul", backend=backend):
        times = measure.alternate(calls, [()], out, many, poisoned=False)
    for name, limit in (("explicit", 5.0), ("aten", 8.0)):
        extra = median(t - k for t, k in promise.pairs(times, name, "kernel")) * 1e6
        label = "an explicit call" if name == "explicit" else "an overridden torch.mm"
        yield Result(
            f"{label} beyond the kernel's function", extra, limit, most=True, unit="us", detail=times_of(times)
        )


def import_time(settings: Settings) -> Iterator[Result]:
    def seconds(module: str) -> float:
        command = [sys.executable, "-c", IMPORT.format(module)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pairs = [(seconds("flagops"), seconds("numpy")) for _ in range(11)][1:]
    detail = f"{median(f for f, _ in pairs) * 1e3:.1f} of {median(n for _, n in pairs) * 1e3:.0f} ms"
    yield Result("import flagops to import numpy", median(f / n for f, n in pairs), 0.3, most=True, detail=detail)


def _trial(name: str, workload: str, settings: Settings) -> Trial:
    return measure.prepare(registry.operator(name), workload, settings.device)


def _best(trial: Trial, settings: Settings) -> tuple[str, float]:
    """The backend with the best ratio to the baseline, all timed side by side."""
    backends = measure.candidates(trial.op, measure.usable(settings.device))
    rows = measure.compare(trial, backends, companions.baselines(trial.op), settings)
    wrong = [f"{row.name}: {row.problem}" for row in rows if row.wrong]
    if wrong:
        raise AssertionError(f"{trial.op.name} {trial.workload} is wrong on {'; '.join(wrong)}")
    return max(((row.name, row.ratio or 0.0) for row in rows if not row.baseline), key=lambda pair: pair[1])


def _checked(trial: Trial, calls: Mapping[str, Call], settings: Settings) -> dict[str, list[float]]:
    """Times of calls of which the first is ours, and is checked before and after."""
    ours: Callable[..., Any] = next(iter(calls.values()))
    times: dict[str, list[float]] = {}
    for given in (trial.sets[0], trial.sets[-1]):
        measure.poison(trial.out)
        ours(*given, trial.out)
        workloads.verify(trial.op, given, trial.out)
        times = times or measure.alternate(calls, trial.sets, trial.out, settings)
    return times


def _middle(found: Mapping[str, tuple[float, str]]) -> float:
    return median(ratio for ratio, _ in found.values())


TARGETS = (import_time, overhead, dequantize, product, attention, weights, *targets_v4.TARGETS)
