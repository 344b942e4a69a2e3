"""The construction of Meta's BackendBench over what flagops replaces: ``python tests/backendbench_judge.py``.

That project (BSD, not on PyPI) judges a backend so: of each OpInfo, by name (none with a dot but nn.functional's, not
nonzero_static), those samples are taken that torch dispatches as one overload, and that this overload, called with the
sample's own arguments, computes again within the tolerances. The backend's operator is called with the same arguments,
after torch's, and both results are compared with atol = rtol = 1e-2 in every dtype, NaN being equal to NaN. A score is
the mean over overloads of the share of samples that are right. (There, both get the same tensors, so what writes in
place is compared with itself; here ours gets copies of what torch's was given, and the same seed.)

``--wrong`` offers the wrong kernels of tests/wrong_kernels of the operators that these overloads reach in place of
ours, one process each, and says which of them the construction lets pass; ``flagops check`` catches every one
(benchmarks/results/judge.md).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import flagops
from flagops import registry
from flagops.judge import files
from flagops.override.forms import forms
from flagops.override.lowering import LOWERINGS

sys.path.insert(0, str(Path(__file__).parent))
from all import processor
from opinfo_judge import served
from opinfo_results import shown
from wrong_kernels import kinds

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "backendbench.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-2
REPLACED = {overload for name in LOWERINGS for overload in forms(name)}
PATIENCE = 300  # seconds for one wrong kernel
WRONG = ("matmul", "linear")  # of tests/wrong_kernels' operators, those under overloads that are reached
SCOPE = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")  # torch's operators that these two compute

Test = tuple[tuple[Any, ...], dict[str, Any]]


class Recorded(TorchDispatchMode):
    """The overloads that calls within are dispatched as."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(call)
        return call(*args, **(kwargs or {}))


def close(one: Any, other: Any) -> bool:
    """Whether results agree as that project's own comparison has it."""
    (ours, shape), (theirs, like) = tree_flatten(one), tree_flatten(other)
    if shape != like:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, torch.Tensor):
            if a != b:
                return False
            continue
        try:
            assert_close(a, b, equal_nan=True, atol=TOLERANCE, rtol=TOLERANCE)
        except (AssertionError, TypeError, ValueError):
            return False
    return True


def tests(dtype: torch.dtype) -> dict[Any, list[Test]]:
    """By overload, the samples that it alone computes."""
    found: dict[Any, list[Test]] = defaultdict(list)
    for op in op_db:
        strange = "." in op.name and "nn.functional" not in op.name
        if strange or op.name == "nonzero_static" or dtype not in op.supported_dtypes("cpu"):
            continue
        for sample in _samples(op, dtype):
            args, named = (sample.input, *sample.args), sample.kwargs
            try:
                with Recorded() as seen:
                    whole = op.op(*args, **named)
                if len(seen.calls) == 1 and close(whole, seen.calls[0](*args, **named)):
                    found[seen.calls[0]].append((args, named))
            except Exception:
                continue
    return found


def _samples(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    try:
        yield from op.sample_inputs("cpu", dtype)
    except Exception as error:
        print(f"{op.name} has no samples: {error}", file=sys.stderr)


def named(overload: Any) -> str:
    """An overload as `forms` calls it: without a name for the default one."""
    return str(overload).removeprefix("aten.").removesuffix(".default")


def score(ops: list[str] | str, backend: Any, found: dict[Any, list[Test]]) -> dict[str, dict[str, Any]]:
    """By overload: samples, those that are right, and those that a kernel of the backend computed."""
    rows: dict[str, dict[str, Any]] = {}
    copies, theirs, ours = {}, {}, {}
    for overload, cases in found.items():
        pairs = [(copy.deepcopy(case), _seeded(overload, case)) for case in cases]  # what samples share may move
        copies[overload], theirs[overload] = zip(*pairs, strict=True)
    with flagops.enable(ops, backend=backend) as handle:
        count: dict[Any, int] = {}
        for overload, cases in copies.items():
            row = rows[named(overload)] = {"samples": len(cases), "right": 0, "ours": 0, "wrong": ""}
            ours[overload] = []
            for case in cases:
                try:
                    ours[overload].append(_seeded(overload, case))
                except Exception as error:  # a kernel's own error is a sample that failed
                    ours[overload].append(error)
                    row["wrong"] = f"{type(error).__name__}: {error}"[:200]
                called, count = served(handle, count)
                row["ours"] += any(by for by, _ in called.values())
    for overload in found:
        rows[named(overload)]["right"] = sum(map(close, theirs[overload], ours[overload]))
    return rows


def _seeded(overload: Any, case: Test) -> Any:
    torch.manual_seed(0)
    args, kwargs = case
    return overload(*args, **kwargs)


def mean(rows: dict[str, dict[str, Any]]) -> float:
    return sum(row["right"] / row["samples"] for row in rows.values()) / max(1, len(rows))


def passes(kind: str, operator: str, base: str, found: list[dict[Any, list[Test]]], answer: Any) -> None:
    """Whether a wrong kernel is right in all samples, of both dtypes, that it computes."""
    warnings.simplefilter("ignore")
    name = files.offer_functions(f"{base}{kind}".replace("_", ""), kinds.make(kind, operator, base))
    registry.backend(name).dispatch_keys = ("CPU",)
    rows = [row for cases in found for row in score(list(SCOPE), [name], cases).values()]
    answer.put((sum(row["samples"] - row["right"] for row in rows), sum(row["ours"] for row in rows)))


def wrong(found: list[dict[Any, list[Test]]]) -> dict[str, str]:
    """By wrong kernel, whether it passed, was caught, or never ran."""
    forking = multiprocessing.get_context("fork")
    verdicts = {}
    scoped = [{o: cases for o, cases in part.items() if named(o).partition(".")[0] in SCOPE} for part in found]
    for kind, operator, base in kinds.every():
        if operator not in WRONG or kinds.KINDS[kind][0] == "gradients":
            continue
        answer = forking.Queue()
        process = forking.Process(target=passes, args=(kind, operator, base, scoped, answer))
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
        failed, ours = answer.get() if not answer.empty() else (1, 1)
        verdict = "caught" if failed else "passed" if ours else "never called"
        verdicts[f"{kind} {operator} {base}"] = verdict
        print(f"{kind}, {operator}, {base}: {verdict}", flush=True)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--wrong", action="store_true", help="judge the wrong kernels too")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    every = {name: tests(dtype) for name, dtype in DTYPES.items()}
    report: dict[str, Any] = {
        "when": datetime.datetime.now().isoformat(timespec="minutes"),
        "torch": torch.__version__,
        "cpu": processor(),
        "backend": options.backend,
    }
    for name, found in every.items():
        covered = {overload: cases for overload, cases in found.items() if named(overload) in REPLACED}
        rows = score("all", options.backend, covered)
        report[name] = {"reached": len(found), "covered": len(rows), "score": mean(rows), "overloads": rows}
        samples, right = (sum(row[key] for row in rows.values()) for key in ("samples", "right"))
        print(f"{name}: {mean(rows):.4f} over {len(rows)} of {len(found)} overloads, {right} of {samples} samples")
        print(*(f"  {name}: {row}" for name, row in rows.items() if row["right"] < row["samples"]), sep="\n")
    if options.wrong:
        report["wrong kernels"] = wrong(list(every.values()))
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    shown(options.json.with_name("coverage.json"))
    return int(any(row["right"] < row["samples"] for name in DTYPES for row in report[name]["overloads"].values()))


if __name__ == "__main__":
    sys.exit(main())
