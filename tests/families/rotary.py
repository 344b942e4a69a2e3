"""The rotary family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    wide = t(0).dtype == torch.float64
    cos, sin = (t(3, 2) if wide else t(3, 2).detach().float().requires_grad_(t(0).requires_grad) for _ in range(2))
    return {
        "rotary_embedding": (t(2, 3, 2, 6), cos, sin),
        "yarn_table": (torch.tensor([0, 1, 100000], device=t(0).device), 8),
    }


MUTANTS = {}
