"""What computes here: the classes of machines that tables of speeds are made for."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import platform
import sys
from typing import Any

from flagops import arrays


def kind(x: Any) -> str:
    """The class of machine that fits where an array lies: ``cpu-intel-avx512-bf16-amx``, ``cpu-amd-avx2``, ``cpu``,
    ``cuda``, or torch's name of another device."""
    if arrays.is_torch(x) and x.device.type != "cpu":
        return str(x.device.type)
    return cpu_kind()


def torchs_own(kind: str) -> bool:
    """Whether a class is one of the devices that torch itself has kernels for, and not a vendor's."""
    return kind.split("-")[0] in ("cpu", "cuda")


def cpu_kind() -> str:
    """By who made it, since the library that multiplies for torch (MKL) has better code for Intel's, and by the
    instructions that torch's kernels use: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can tell it not to."""
    torch = sys.modules.get("torch")
    return "cpu" if torch is None else _cpu_kind(torch)


@functools.cache
def _cpu_kind(torch: Any) -> str:
    units = torch.backends.cpu.get_cpu_capability().lower().partition("_")[0]
    named = units.startswith("avx"), _native_bf16(torch), _tiles(torch)
    parts = ["cpu", cpu_vendor(), *(unit for unit, there in zip((units, "bf16", "amx"), named, strict=True) if there)]
    return "-".join(part for part in parts if part)


VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "amd"}
"""By what an x86 processor says of itself. Hygon's are AMD's Zen."""


@functools.cache
def cpu_vendor() -> str:
    """``intel``, ``amd`` or, of another's and where nobody says, nothing."""
    said = platform.processor()  # Windows' words hold it
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        said = next((line for line in file if line.startswith("vendor_id")), said)
    return next((vendor for word, vendor in VENDORS.items() if word in said), "")


def torch_has_native_bf16() -> bool:
    """Whether torch multiplies bfloat16 with instructions of this CPU; oneDNN can be told not to."""
    torch = sys.modules.get("torch")
    return torch is not None and _native_bf16(torch)


@functools.cache
def _native_bf16(torch: Any) -> bool:
    limit = _limit()
    if limit and not limit.endswith(("_BF16", "AMX", "FP16")):
        return False
    supported = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False) for unit in ("avx512_bf16", "amx_tile"))
    return any(check() for check in supported)


def _tiles(torch: Any) -> bool:
    """Whether torch multiplies bfloat16 in tile registers, ten times as fast as in vectors."""
    limit = _limit()
    return (not limit or "AMX" in limit) and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _limit() -> str:
    """The instructions that oneDNN must not go beyond, empty for none."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return "" if limit in ("DEFAULT", "ALL") else limit


@functools.cache
def cpu_model() -> str:
    """The processor's name and, since clouds shorten it, the family and model that identify it."""
    try:
        with open("/proc/cpuinfo") as file:
            pairs = (line.partition(":") for line in file)
            fields = {name.strip(): value.strip() for name, _, value in pairs}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip
"""Instructions that products may use, as Linux names them, on x86 and on ARM."""


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Which of `FEATURES` the processor has; none where the system does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            words = next((line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return ()
    return tuple(name for name in FEATURES if name in words)


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest caches of the processors that this process may use, together; 0 where nobody says."""
    found: dict[str, int] = {}
    for core in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        places = glob.glob(f"/sys/devices/system/cpu/cpu{core}/cache/index*")
        for place in sorted(places)[-1:]:
            try:
                with open(f"{place}/size") as size, open(f"{place}/shared_cpu_list") as shared:
                    found[shared.read()] = int(size.read().strip().removesuffix("K")) << 10
            except (OSError, ValueError):
                continue
    return sum(found.values())
