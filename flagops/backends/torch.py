"""Kernels written with torch's own operators: they run on every device that torch has."""

from __future__ import annotations

from typing import Any

from flagops import arrays, machine
from flagops.backends import missing


class _Torch:
    name = "torch"
    kernels = "flagops.kernels.torch"
    dispatch_keys = ("CPU", "CUDA", "PrivateUse1")

    def unavailable(self) -> str | None:
        return missing("torch")

    def refuses(self, array: Any) -> str | None:
        if not arrays.is_torch(array):
            return "takes torch tensors"
        return None if str(array.layout) == "torch.strided" else f"takes strided tensors, not {array.layout}"

    def misreads(self, array: Any) -> bool:
        """Products of depth 1 by MKL on Intel's processors (2024.2, in torch 2.13) read elsewhere, or end the process,
        where the elements of a vector lie 2 GiB apart."""
        if array.device.type != "cpu" or (array.dim() > 1 and 1 not in array.shape[-2:]):
            return False
        axes = zip(array.shape, array.stride(), strict=True)
        return any(size > 1 and step * array.itemsize >= 1 << 31 for size, step in axes)

    def facts(self) -> dict[str, str]:
        import torch

        facts = {"version": torch.__version__, "threads": str(torch.get_num_threads())}
        facts["cpu bfloat16"] = "native" if machine.torch_has_native_bf16() else "emulated"
        for index in range(torch.cuda.device_count()):
            facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
        return facts

    def synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


backend = _Torch()
