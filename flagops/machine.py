"""What computes here: the classes of machines that tables of speeds are made for."""

from __future__ import annotations

import functools
import os
import platform
import sys
from typing import Any

from flagops import arrays


def kind(x: Any) -> str:
    """The class of machine that fits where an array lies: ``cpu-avx512-bf16-amx``, ``cpu-avx512-bf16``, ``cpu-avx512``,
    ``cpu-avx2``, ``cpu``, ``cuda``, or torch's name of another device."""
    if arrays.is_torch(x) and x.device.type != "cpu":
        return str(x.device.type)
    return cpu_kind()


def torchs_own(kind: str) -> bool:
    """Whether a class is one of the devices that torch itself has kernels for, and not a vendor's."""
    return kind.split("-")[0] in ("cpu", "cuda")


def cpu_kind() -> str:
    """By the instructions that torch's kernels use: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can tell it not to."""
    torch = sys.modules.get("torch")
    return "cpu" if torch is None else _cpu_kind(torch)


@functools.cache
def _cpu_kind(torch: Any) -> str:
    units = torch.backends.cpu.get_cpu_capability().lower().partition("_")[0]
    named = units.startswith("avx"), _native_bf16(torch), _tiles(torch)
    return "-".join(["cpu", *(unit for unit, there in zip((units, "bf16", "amx"), named, strict=True) if there)])


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
