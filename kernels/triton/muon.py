# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Newton-Schulz on Triton: the products of `matmul`, and one kernel that weighs and adds."""

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._muon import iterate
from ._common import launch, too_long
from .matmul import product

BLEND = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def blend_kernel(x, y, a, b, size, BLOCK: tl.constexpr):
    """y = a * x + b * y in one layout without gaps; a and b lie in memory: a float argument would come as float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(a) * tl.load(x + at, inside) + tl.load(b) * tl.load(y + at, inside)
    tl.store(y + at, value, inside)


def _step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    gram = x.new_empty((*x.shape[:-1], x.shape[-2]))
    square, result, weights = torch.empty_like(gram), torch.empty_like(x), x.new_tensor([a, b, c, 1.0])
    product(x, x.mT, None, gram)
    product(gram, gram, None, square)
    _blend(gram, square, weights[1], weights[2])
    product(square, x, None, result)
    _blend(x, result, weights[0], weights[3])
    return result


def _blend(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    launch(blend_kernel, (triton.cdiv(x.numel(), BLEND["BLOCK"]),), x.device, x, y, a, b, x.numel(), **BLEND)


def newton_schulz_unsupported(a: torch.Tensor, steps: int) -> str | None:
    return too_long(a)


@kernel(deterministic=True)
def newton_schulz(a: torch.Tensor, steps: int, out: torch.Tensor) -> None:
    """float32 products are IEEE unless torch was told that TF32 will do."""
    iterate(a, steps, out, _step)
