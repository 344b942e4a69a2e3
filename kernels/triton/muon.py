# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Newton-Schulz on Triton: the products of `matmul`, and one kernel that weighs and adds."""

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._muon import iterate
from ._common import launch, too_long
from ._elementwise import bits, number
from .matmul import product

BLEND = {"BLOCK": 1024, "num_warps": 4}


@triton.jit(do_not_specialize=["a_bits", "b_bits"])
def blend_kernel(x, y, a_bits, b_bits, size, BLOCK: tl.constexpr):
    """y = a * x + b * y in one layout without gaps; a and b by their bits: a float argument would come as float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    real: tl.constexpr = x.dtype.element_ty
    a, b = number(a_bits, real), number(b_bits, real)
    tl.store(y + at, a * tl.load(x + at, inside) + b * tl.load(y + at, inside), inside)


def _step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    gram = x.new_empty((*x.shape[:-1], x.shape[-2]))
    square, result = torch.empty_like(gram), torch.empty_like(x)
    product(x, x.mT, None, gram)
    product(gram, gram, None, square)
    _blend(gram, square, b, c)
    product(square, x, None, result)
    _blend(x, result, a, 1.0)
    return result


def _blend(x: torch.Tensor, y: torch.Tensor, a: float, b: float) -> None:
    grid = (triton.cdiv(x.numel(), BLEND["BLOCK"]),)
    launch(blend_kernel, grid, x.device, x, y, bits(a, "float64"), bits(b, "float64"), x.numel(), **BLEND)


def newton_schulz_unsupported(a: torch.Tensor, steps: int) -> str | None:
    return too_long(a)


@kernel(deterministic=True)
def newton_schulz(a: torch.Tensor, steps: int, out: torch.Tensor) -> None:
    """float32 products are IEEE unless torch was told that TF32 will do."""
    iterate(a, steps, out, _step)
