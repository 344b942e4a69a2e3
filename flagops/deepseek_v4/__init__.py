"""DeepSeek-V4: its kernel module's interface, and around it attention layers, their cache, indices and small models.

``sys.modules["kernel"] = flagops.deepseek_v4`` lets a model written to that interface run unmodified, see `kernel`.
The functions load when asked for: indices and weights serve NumPy arrays where there is no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernel import (
        act_quant,
        fp4_act_quant,
        fp4_gemm,
        fp8_gemm,
        hadamard_transform,
        hc_split_sinkhorn,
        sparse_attn,
    )

__all__ = [
    "act_quant",
    "fp4_act_quant",
    "fp4_gemm",
    "fp8_gemm",
    "hadamard_transform",
    "hc_split_sinkhorn",
    "sparse_attn",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flagops.deepseek_v4' has no attribute {name!r}")
    from . import kernel

    return getattr(kernel, name)
