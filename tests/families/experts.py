"""The experts family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/_experts_backward.py": [
        ("grouped_matmul", "grads[0][bounds[-1] :] = 0", "pass", 0),
        ("grouped_matmul", "out[expert] = 0", "pass", 0),
        ("moe_experts", "token, slot = divmod(pairs[i], slots)", "slot, token = divmod(pairs[i], slots)", 0),
        ("moe_experts", "y), pointer(total), minimum=least", "y), pointer(y), minimum=least", 0),
        ("moe_experts", "put(shares, token, slot, vsum(mass))", "put(shares, token, 0, vsum(mass))", 0),
        ("moe_experts", "at(gates, i, width + first), (0, 1), (1, count), u", "at(gates, i, first), (0, 1), (1, count), u", 0),
    ],
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
