"""The moe family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    real = t(2, 3) if t(0).dtype == torch.float64 else t(2, 3).float().detach().requires_grad_(t(0).requires_grad)
    return {
        "moe_gate": (t(3, 5), t(7, 5), None, None, None, 4, 1.5),
        "swiglu": (t(2, 3, 4), t(3, 4), real, 0.8),
    }


MUTANTS = {}
