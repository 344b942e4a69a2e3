"""Triton: GPUs, and its interpreter on CPU tensors for tests."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from flagops.arrays import is_torch
from flagops.backends import missing


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _device(interpreting: bool) -> tuple[str, str | None]:
    """The kind of device whose tensors the kernels take, and why there is none."""
    reason = missing("torch") or missing("triton")
    if reason:
        return "", reason
    import triton

    if interpreting:
        return "cpu", _interpreter_fails(triton.__version__)
    try:
        if not any(b.driver.is_active() for b in triton.backends.backends.values()):
            return "", "triton needs a GPU, or TRITON_INTERPRET=1 to run its interpreter on the CPU"
        return str(triton.runtime.driver.active.get_active_torch_device().type), None
    except Exception as error:  # a broken driver is a reason, whatever it raises
        return "", f"triton finds no device: {type(error).__name__}: {error}"


def _interpreter_fails(version: str) -> str | None:
    import numpy

    old, new = (tuple(map(int, v.split(".")[:2])) for v in (version, numpy.__version__))
    if old < (3, 7) and new >= (2, 4):
        return f"the interpreter of triton {version} needs numpy < 2.4, not {numpy.__version__}; triton 3.7 takes both"
    return None


class _Triton:
    name = "triton"
    kernels = "flagops.kernels.triton"
    dispatch_keys: tuple[str, ...] = ("CPU",) if _interpreting() else ("CUDA", "PrivateUse1")

    def unavailable(self) -> str | None:
        return _device(_interpreting())[1]

    def refuses(self, array: Any) -> str | None:
        if not is_torch(array):
            return "takes torch tensors"
        kind, reason = _device(_interpreting())
        if reason or array.device.type == kind:
            return reason
        if array.device.type == "cpu":
            return "takes CPU tensors only under TRITON_INTERPRET=1"
        return f"takes {kind} tensors, not {array.device.type}"

    def facts(self) -> dict[str, str]:
        import torch
        import triton

        if _interpreting():
            return {"triton": triton.__version__, "device": "interpreter on CPU"}
        target = triton.runtime.driver.active.get_current_target()
        facts = {"triton": triton.__version__, "target": f"{target.backend} {target.arch}"}
        for index in range(torch.cuda.device_count()):
            facts[f"device {index}"] = torch.cuda.get_device_name(index)
        return facts

    def synchronize(self) -> None:
        import torch

        kind, _ = _device(_interpreting())
        if kind not in ("", "cpu"):
            torch.get_device_module(kind).synchronize()


backend = _Triton()
