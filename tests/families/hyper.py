"""The hyper family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    def parameter(*shape):
        made = t(*shape)
        double = made.dtype == torch.float64
        return made if double else made.detach().float().requires_grad_(made.requires_grad)

    return {
        "hc_split_sinkhorn": (parameter(3, 8), parameter(3), parameter(8), 2, 3, 1e-6),
        "hc_pre": (t(3, 2, 5), parameter(8, 10), parameter(8), parameter(3), 3, 1e-6, 1e-6),
        "hc_post": (t(3, 5), t(3, 2, 5), parameter(3, 2), parameter(2, 2)),
        "hc_head": (t(3, 2, 5), parameter(2, 10), parameter(2), parameter(1), 1e-6, 1e-6),
    }


MUTANTS = {}  # fmt: skip
