"""Triton: GPUs, and its interpreter on CPU tensors for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from flagops import config
from flagops.arrays import is_torch
from flagops.backends import missing


@cache
def _device(interpreting: bool) -> tuple[str, str | None]:
    """The kind of device whose tensors the kernels take, and why there is none."""
    reason = missing("torch") or missing("triton")
    if reason:
        return "", reason
    import triton

    if interpreting:
        return "cpu", _interpreter_fails(triton.__version__)
    if hasattr(triton, "knobs"):
        from . import _built

        _built.serve()  # before a driver is made: the module in C that it needs may have been built
    elif config.current().jit == "error":
        return "", f"FLAGOPS_JIT=error needs triton >= 3.6: {triton.__version__} does not say that it compiles"
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
    dispatch_keys: tuple[str, ...] = ("CPU",) if config.interpreting() else ("CUDA", "PrivateUse1")

    def unavailable(self) -> str | None:
        return _device(config.interpreting())[1]

    def refuses(self, array: Any) -> str | None:
        if not is_torch(array):
            return "takes torch tensors"
        kind, reason = _device(config.interpreting())
        if reason or array.device.type == kind:
            return reason
        if array.device.type == "cpu":
            return "takes CPU tensors only under TRITON_INTERPRET=1"
        return f"takes {kind} tensors, not {array.device.type}"

    def facts(self) -> dict[str, str]:
        import torch
        import triton

        if config.interpreting():
            return {"triton": triton.__version__, "device": "interpreter on CPU"}
        target = triton.runtime.driver.active.get_current_target()
        facts = {"triton": triton.__version__, "target": f"{target.backend} {target.arch}"}
        for index in range(torch.cuda.device_count()):
            facts[f"device {index}"] = torch.cuda.get_device_name(index)
        return facts

    def synchronize(self) -> None:
        import torch

        kind, _ = _device(config.interpreting())
        if kind not in ("", "cpu"):
            torch.get_device_module(kind).synchronize()


backend = _Triton()
