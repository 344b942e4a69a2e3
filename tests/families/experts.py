"""The experts family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    weights = t(3, 2) if t(0).dtype == torch.float64 else t(3, 2).float().detach().requires_grad_(t(0).requires_grad)
    indices = torch.tensor([[0, 2], [2, 2], [3, 0]])
    return {
        "grouped_matmul": (t(6, 3), t(4, 3, 2), torch.tensor([2, 2, 3, 5], dtype=torch.int32)),
        "moe_experts": (t(3, 4), weights, indices, t(4, 6, 4), t(4, 4, 3), None, None, 0.8, t(3, 4)),
    }


MUTANTS = {}
