"""DeepSeek-V4's grouped output projection in tensor parallel, up to and beyond the number of groups.

`GroupedOutputProjectionParallel` is a style for ``torch.distributed.tensor.parallel.parallelize_module``; `Layout` says
how weights are divided and what that costs. All communication is torch.distributed's.
"""

import importlib
from typing import Any

_HOMES = {
    "SCHEMES": "layout",
    "Cost": "layout",
    "Layout": "layout",
    "Sizes": "layout",
    "GroupedOutputProjection": "projection",
    "GroupedOutputProjectionParallel": "projection",
    "ParallelProjection": "projection",
    "PeerFailed": "projection",
    "gather": "projection",
    "shard": "projection",
    "unshard": "projection",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """`flagops plan` needs no torch, so names load on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
