"""The bare device as TorchCTS finds it, and a journal of what each of its tests gave: a plugin of the suite's pytest.

`TORCHCTS_KERNELS` says who computes: a backend of flagops, ``torch`` (the device's fallback to torch's own kernels), or
``host``, where the suite is told to judge torch's CPU. `TORCHCTS_JOURNAL` is the file that lines of JSON are added to.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchcts import op_metadata
from torchcts.core import pytorch_compat

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

KERNELS = os.environ["TORCHCTS_KERNELS"]
JOURNAL = Path(os.environ["TORCHCTS_JOURNAL"])
JUDGED = "2.12.1"  # the newest torch that the suite has contracts of
UNCLAIMED = (
    *("sparse", "nested", "named_tensor", "fp8", "quantized_container_plumbing", "native_quantization", "compile"),
    *("custom_quantized_decode", "multi_device", "streams", "events", "guard_alloc"),
)
CLAIMED = (
    *("inference", "training", "serialization", "rng", "device_generator", "rng_distributions", "double_backward"),
    *("gradcheck", "gradient_checkpointing", "autocast", "fused_optimizer", "dataloader", "module_hooks"),
    *("channels_last", "foreach", "pinned_memory", "deterministic", "device_api", "ieee754"),
)
DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
COMPLEX = ("complex32", "complex64", "complex128", "uint16", "uint32", "uint64")
SAID = 600  # characters of an error that are kept

manifest = {
    "manifest_version": 1,
    "device_name": "cpu" if KERNELS == "host" else "bare",
    "backend_import": None if KERNELS == "host" else __name__,
    "supported_dtypes": {getattr(torch, x): x in DTYPES for x in (*DTYPES, *COMPLEX)},
    "device_count": 1,
    "ieee754_seed": 67,
    "max_samples": 10,
    "max_samples_ieee754": 3,
    "semantic_level": 8,
    "hardware": {
        "memory_model": "unified",
        "device_memory_gb": 4,
        "system_memory_gb": "auto",
        "oom_recoverable": False,
    },
    "resource_limits": {"max_tensor_size_mb": 256},
    "capabilities": dict.fromkeys(CLAIMED, True) | dict.fromkeys(UNCLAIMED, False),
    "skip_ops": [],
    "tolerance_overrides": {},
    "custom_test_dirs": [],
}


def _as_judged(normalize: Any) -> Any:
    """A version, asked for many thousand times; a torch newer than the suite's contracts is held to the newest."""

    @functools.cache
    def normalized(version: str | None = None) -> str | None:
        return JUDGED if version in (None, torch.__version__) else normalize(version)

    return normalized


pytorch_compat.normalize_torch_version = _as_judged(pytorch_compat.normalize_torch_version)
op_metadata.normalize_torch_version = pytorch_compat.normalize_torch_version
_validation = op_metadata._validation_metadata
_known = functools.cache(lambda: _validation(None))
op_metadata._validation_metadata = lambda metadata: _known() if metadata is None else _validation(metadata)


def noted(**what: Any) -> None:
    with JOURNAL.open("a") as file:
        file.write(json.dumps(what, default=str) + "\n")


def _enable() -> None:
    torch.set_num_threads(1)
    if KERNELS == "host":
        return
    import bare

    bare.load()
    if KERNELS == "torch":
        bare.own_copies(True)
        bare.fallback("count")
        return
    import flagops

    flagops.enable(backend=KERNELS)


_enable()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    from torchcts import conftest

    conftest.flush_results_to_disk = lambda: None  # it writes all results after every test
    conftest._declared_diagnostic_probes_enabled = lambda *_: False  # ten processes, which decide nothing


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves what the journal has; says what there is, and why the suite itself left out what it did."""
    from torchcts import conftest

    lines = [json.loads(line) for line in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []
    done = {line["node"] for line in lines if "status" in line}
    if not any("collected" in line for line in lines):
        left = {name(node): skip["skip_reason"] for node, skip in conftest._SESSION_SKIPS.items()}
        noted(collected=[name(item.nodeid) for item in items], left=left)
    only = {line["only"] for line in lines if "only" in line}
    items[:] = [x for x in items if name(x.nodeid) not in done and (not only or name(x.nodeid) in only)]


def name(node: str) -> str:
    """Of a test, from the suite's own folder on."""
    return node.rpartition("torchcts/")[2] if "torchcts/" in node.partition("[")[0] else node


def pytest_runtest_logstart(nodeid: str) -> None:
    noted(began=name(nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    from torchcts import conftest

    record = conftest._SESSION_RESULTS.get(report.nodeid)
    if record is None or (report.when != "call" and report.passed):
        return
    noted(
        node=name(report.nodeid),
        status=record["status"],
        error=f"{record['error_type']}: {record['error_message']}"[:SAID] if record["error_type"] else "",
        said=str(record["error_message"] or "")[-SAID:] if record["status"] != "PASS" else "",
        seconds=round(record["duration_ms"] / 1000, 2),
        **{key: record.get(key) for key in ("suite", "op", "dispatcher_name", "dtype", "semantic_level")},
    )
