"""What TorchCTS and BackendBench's construction found, as they keep it, and as coverage.md shows it below OpInfo's."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flagops import tables

VERDICTS = ("passed", "ours", "device", "suite", "unclaimed", "left out")
REASONS = {
    "gelu": "torch's float32 gives NaN for gelu of infinity, its float64 and ours infinity",
    "convolution": "infinity times the padding's zeros: NaN, as in torch's float32; its bfloat16 leaves padding out",
    "_batch_norm_no_update": "torch composes it of the CPU's own batch norm",
    "batch_norm": "on a device the means of halves are float32, as on CUDA; on the CPU halves",
    "[cov-": "its weights are float32, and sums of them cancel",
    "view_as_real": "complex numbers are not claimed; the suite makes some to compare with",
    "mode.values": "torch's own code names the devices that have `mode`",
    "pin_memory": "a device's own tensors are not pinned",
    "attention_overrideable": "torch's place for a device's own attention, which is replaced a step above",
    "bool_causal": "torch's composition refuses a mask beside is_causal, which its CPU kernel takes",
    "stride_and_storage_offset": "`.cpu()` of a view with gaps is dense, but on the CPU itself",
    "_stack.out": "torch's composition for devices is called where `stack` has made views before, and joins without",
}
"""Why a case fails under flagops alone, by a word of its name."""


def kept(facts: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run of TorchCTS found: counts by suite, overloads that nobody claims, and every other case that failed."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in found:
        counts[case["suite"]][case["verdict"]] += 1
    failed = [case for case in found if case["verdict"] in ("ours", "device", "suite")]
    return {
        "facts": facts,
        "suites": {suite: dict(sorted(verdicts.items())) for suite, verdicts in sorted(counts.items())},
        "unclaimed": dict(Counter(case["missing"] for case in found if case["verdict"] == "unclaimed").most_common()),
        "cases": [{"test": case["node"], "verdict": case["verdict"], "reason": reason(case)} for case in failed],
    }


def reason(case: dict[str, Any]) -> str:
    known = next((text for word, text in REASONS.items() if word in case["node"]), "")
    return known if known and case["verdict"] == "ours" else case["error"].partition("\n")[0][:160]


def text(folder: Path) -> Iterable[str]:
    """The sections of what lies beside coverage.json."""
    for name, section in {"torchcts.json": _torchcts, "backendbench.json": _backendbench}.items():
        if (folder / name).exists():
            yield ""
            yield from section(json.loads((folder / name).read_text()))


def _torchcts(found: dict[str, Any]) -> Iterable[str]:
    facts, totals = found["facts"], Counter[str]()
    for counts in found["suites"].values():
        totals.update(counts)
    claimed = totals["passed"] + totals["ours"] + totals["device"]
    run = claimed + totals["suite"] + totals["unclaimed"]
    yield "## TorchCTS on the bare device"
    yield ""
    ran = (
        f"TorchCTS {facts['torchcts']}, level {facts['level']}, {facts['files']} files, by its contracts of torch 2.12"
    )
    yield f"{ran}: torch {facts['torch']}, `enable(backend={facts['backend']!r})`, {facts['cpu']}, {facts['when']}."
    passed = totals["passed"]
    yield f"Of {claimed} cases that the device claims {passed} passed, {passed / max(1, claimed):.2%} strict;"
    yield f"of all {run} that ran {passed / max(1, run):.1%}."
    yield "Again: `python tests/torchcts_judge.py`, whose text explains the columns."
    yield ""
    rows = [(suite, *(counts.get(word, 0) for word in VERDICTS)) for suite, counts in found["suites"].items()]
    yield tables.markdown(("suite", *VERDICTS), [*rows, ("all", *(totals[word] for word in VERDICTS))])
    yield ""
    unclaimed = ", ".join(f"`{overload}` {n}" for overload, n in found["unclaimed"].items())
    yield f"Unclaimed, by the overload without a kernel: {unclaimed}."
    yield ""
    yield "What failed otherwise:"
    yield ""
    cases = [(f"`{case['test']}`", case["verdict"], case["reason"].replace("|", "\\|")) for case in found["cases"]]
    yield tables.markdown(("test", "whose", "reason"), cases)


def _backendbench(found: dict[str, Any]) -> Iterable[str]:
    yield "## BackendBench's construction"
    yield ""
    yield "`python tests/backendbench_judge.py --wrong`, whose text says how it is built:"
    yield f"torch {found['torch']}, {found['cpu']}, {found['when']}."
    yield ""
    rows = []
    for dtype in ("float32", "bfloat16"):
        part = found[dtype]
        samples, right = (sum(row[key] for row in part["overloads"].values()) for key in ("samples", "right"))
        rows.append((dtype, part["reached"], part["covered"], f"{right} of {samples}", f"{part['score']:.4f}"))
    yield tables.markdown(("dtype", "overloads it reaches", "that are replaced", "samples right", "score"), rows)
    verdicts = Counter(found.get("wrong kernels", {}).values())
    if verdicts:
        passed = sorted({name.split()[0] for name, verdict in found["wrong kernels"].items() if verdict == "passed"})
        yield ""
        count = sum(verdicts.values())
        yield f"Of {count} wrong kernels of products it lets {verdicts['passed']} pass, `flagops check` none:"
        yield f"{', '.join(passed)}."
        yield "It sees no layout but a sample's own, no `out=`, no shape beyond some tens, seldom a second call, and no"
        yield "error below a hundredth, absolute or relative: 170,000 roundings of 1 in float32, all of a small result."
