"""The indexer family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    visible = torch.tensor([[3, 9, 0], [9, 1, 8]], dtype=torch.int32)
    return {"lightning_indexer": (t(2, 3, 2, 4), t(2, 9, 4), t(2, 3, 2), 4, visible, 7)}


MUTANTS = {}
