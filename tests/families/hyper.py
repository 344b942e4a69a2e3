"""The hyper family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/hyper.py": [
        ("hc_split_sinkhorn", "logit = 2 * sigmoid(logit)", "logit = sigmoid(logit) + small", 0),
        ("hc_split_sinkhorn", "at(goal, j, 0), (column, comb[1][2])", "at(goal, 0, j * column), (row, comb[1][2])", 0),
        ("hc_split_sinkhorn", ", sizes[2] - token % sizes[2])", ")", 0),
        ("hc_pre", "block.base, -width), first, 0)", "block.base, -width), 0, 0)", 0),
        ("hc_post", "get(entries, j, k * comb[2][1])", "get(entries, k, j * comb[2][1])", 0),
        ("hc_post", "at(goal, 0, c * out[2][1])", "at(goal, 0, c)", 0),
        ("hc_head", "stream, begin * channel)", "stream, begin)", 0),
        ("hc_head", "shifted(sums, 0, j), begin > 0)", "shifted(sums, 0, j), False)", 0),
        ("hc_head", "get(mix, i, j) * get(scales, 0, 0)", "get(mix, i, j)", 0),
        ("hc_post", "vput(goal, k, c, fma(fourth, get(weights, k, 4)", "vput(goal, k, c, fma(fourth, get(weights, k, 3)", 0),
    ],
    "numba/_sinkhorn.py": [
        ("hc_split_sinkhorn", "balance(matrix, n, n, 1, columns, factors, small)", "balance(matrix, n, 1, n, columns, factors, small)", 0),
        ("hc_split_sinkhorn", "for _ in range(iters - 1):", "for _ in range(iters):", 0),
        ("hc_split_sinkhorn", "first / fma(p, first, small)", "first / (p * first)", 0),
        ("hc_split_sinkhorn", "for step in range(2 * iters - 2, -1, -1):", "for step in range(2 * iters - 2, 0, -1):", 0),
        ("hc_split_sinkhorn", "total * factor, factor / vget(own, i, 0)", "total * factor, factor", 0),
    ],
    "numba/_hyper_backward.py": [
        ("hc_split_sinkhorn", "cast(real, part + 1)", "cast(real, 1)", 0),
        ("hc_pre", "fma(vget(old, 0, c), inward, value)", "value", 0),
        ("hc_pre", "(row // n) + begin", "d + begin", 0),
        ("hc_pre", "value * part * vget(factor, 0, c)", "value * part", 0),
        ("hc_post", "put(weights, j + 1, k, get(entries, j, k * comb[2][1]))", "put(weights, j + 1, k, get(entries, k, j * comb[2][1]))", 0),
        ("hc_post", "get(products, j + 1, k)", "get(products, k + 1, j)", 0),
        ("hc_post", "part, begin > 0", "part, False", 0),
    ],
    "torch/hyper.py": [
        ("hc_split_sinkhorn", "comb.sum(step % 2, keepdim=True)", "comb.sum(1 - step % 2, keepdim=True)", 0),
        ("hc_split_sinkhorn", "unflatten(0, (n, n)), 1).add_(eps)", "unflatten(0, (n, n)), 1)", 0),
        ("hc_pre", "torch.rsqrt(mean + norm_eps)", "torch.rsqrt(mean)", 0),
        ("hc_post", "torch.baddbmm(added, mixing[rows].mT,", "torch.baddbmm(added, mixing[rows],", 0),
        ("hc_head", "torch.sigmoid(_project(streams, fn, norm_eps)[0] * scale + base) + eps", "torch.sigmoid(_project(streams, fn, norm_eps)[0] * scale + base)", 0),
    ],
    "_tensors.py": [
        ("hc_post", "x if x.is_contiguous() else x.new_empty", "x.new_empty", 0),
        ("hc_post", "if not out.is_contiguous():", "if out.is_contiguous():", 0),
        ("hc_pre", "x.dim() - tail :", "x.dim() - tail - 1 :", 0),
        ("fp8_matmul", "x.flatten(0, -2) if x.dim() > 1", "x.flatten(0, -2) if x.dim() > 2", 0),
    ],
    "triton/hyper.py": [
        ("hc_split_sinkhorn", "column * tl.sum(x * row[:, :, None], 1) + eps", "column * tl.sum(x * row[:, :, None], 1)", 0),
        ("hc_split_sinkhorn", "for _ in range(1, iters):", "for _ in range(0, iters):", 0),
        ("hc_head", "(k // D).to(tl.int64) * x_n", "(k % D).to(tl.int64) * x_n", 0),
        ("hc_post", "row * comb_j + k * comb_k", "row * comb_k + k * comb_j", 0),
    ],
}  # fmt: skip
