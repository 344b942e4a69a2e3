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


MUTANTS = {
    "numba/hyper.py": [
        ("hc_split_sinkhorn", "matrix, n, n * pair, pair, columns, factors, small", "matrix, n, pair, n * pair, columns, factors, small", 0),
        ("hc_split_sinkhorn", "for _ in range(iters - 1):", "for _ in range(iters):", 0),
        ("hc_split_sinkhorn", "factor / fma(p, factor, small)", "factor / (p * factor)", 0),
        ("hc_split_sinkhorn", "logit += logit", "logit += small", 0),
        ("hc_split_sinkhorn", "goal + j * comb[2][0] * unit, comb[2][1]", "goal + j * comb[2][1] * unit, comb[2][0]", 0),
        ("hc_split_sinkhorn", ", sizes[2] - token % sizes[2])", ")", 0),
        ("hc_split_sinkhorn", "i * steps[0] + j * steps[1] +", "j * steps[0] + i * steps[1] +", 0),
        ("hc_pre", "address - first * width * size(real)", "address", 0),
        ("hc_post", "(j * comb[2][0] + k * comb[2][1])", "(k * comb[2][0] + j * comb[2][1])", 0),
        ("hc_post", "goal + c * out[2][1] * item", "goal + c * item", 0),
        ("hc_head", "(stream * x_steps[0] + begin * x_steps[1])", "(stream * x_steps[0] + begin)", 0),
        ("hc_head", "begin > 0,", "False,", 0),
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
        ("hc_post", "j * comb_j + k * comb_k", "j * comb_k + k * comb_j", 0),
    ],
}  # fmt: skip
