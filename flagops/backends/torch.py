"""Kernels written with torch's own operators: they run on every device that torch has."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

from flagops import arrays


class _Torch:
    name = "torch"
    kernels = "flagops.kernels"
    dispatch_keys = ("CPU", "CUDA", "PrivateUse1")

    @functools.cache  # noqa: B019 - one instance, for the life of the process
    def unavailable(self) -> str | None:
        if find_spec("torch") is None:
            return "torch is not installed (pip install torch)"
        try:
            import torch  # noqa: F401
        except Exception as error:  # a broken installation raises anything; it is the reason that doctor shows
            return f"torch failed to import: {type(error).__name__}: {error}"
        return None

    def refuses(self, array: Any) -> str | None:
        return None if arrays.is_torch(array) else "takes torch tensors"

    def facts(self) -> dict[str, str]:
        import torch

        facts = {"version": torch.__version__, "threads": str(torch.get_num_threads())}
        facts["cpu bfloat16"] = "native" if arrays.torch_has_native_bf16() else "emulated"
        for index in range(torch.cuda.device_count()):
            facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
        return facts

    def synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


backend = _Torch()
