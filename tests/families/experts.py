"""The experts family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    weights = t(2, 2) if t(0).dtype == torch.float64 else t(2, 2).float().detach().requires_grad_(t(0).requires_grad)
    indices = torch.tensor([[0, 2], [2, 2]])
    return {
        "grouped_matmul": (t(6, 3), t(4, 3, 2), torch.tensor([2, 2, 3, 5], dtype=torch.int32)),
        "moe_experts": (t(2, 3), weights, indices, t(3, 4, 3), t(3, 3, 2), None, None, 0.8, t(2, 3)),
    }


MUTANTS = {
    "numba/experts.py": [
        ("grouped_matmul", "as_numpy(out)[bounds[-1] :] = 0", "pass", 0),
        ("moe_experts", "some // slots", "some % slots", 0),
        ("moe_experts", "bounds - first", "bounds", 0),
    ],
    "torch/experts.py": [
        ("grouped_matmul", "out[start:].zero_()", "pass", 0),
        ("moe_experts", "chosen // indices.shape[1]", "chosen % len(x)", 0),
        ("moe_experts", "_fake(h) if packed else h", "h", 0),
        ("moe_experts", "largest * (1 / 448)", "largest * (1 / 1000)", 0),
        ("moe_experts", "scale[start // BLOCK : -(-stop // BLOCK)]", "scale[: -(-stop // BLOCK)]", 0),
    ],
    "triton/experts.py": [
        ("grouped_matmul", "tl.where(expert < E, K, 0)", "K", 0),
        ("grouped_matmul", "(tile - after[known] + tiles[known])", "(tile - after[known])", 0),
        ("moe_experts", "column % 2 * 64 + column // 2", "column", 0),
        ("moe_experts", "at // 128 * scale_n", "0 * scale_n", 0),
        ("moe_experts", "pair % slots * weights_k", "pair % slots", 0),
    ],
}  # fmt: skip
