"""Newton-Schulz in plain torch: three batched products a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._muon import iterate


def newton_schulz(a: Tensor, steps: int, out: Tensor) -> None:
    """As many matrices at a time as the byte budget allows."""
    iterate(a, steps, out, _step)


def _step(x: Tensor, a: float, b: float, c: float) -> Tensor:
    gram = torch.bmm(x, x.mT)
    return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
