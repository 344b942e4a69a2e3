"""The attention family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/_attention_backward.py": [
        ("sparse_attention", "if 0 <= row < rows:", "if 0 < row < rows:", 0),
        ("sparse_attention", "shifted(goal, read[k], 0)", "shifted(goal, k, 0)", 0),
        ("sparse_attention", "put(turned, k, count + i, get(slope, i, k))", "put(turned, k, count + i, get(p, i, k))", 0),
        ("sparse_attention", "idle / total * middle", "idle * middle", 0),
        ("sparse_attention", "total += idle", "pass", 0),
        ("sparse_attention", "(vget(slope, 0, j) - middle) * factor", "(vget(slope, 0, j) - middle)", 0),
    ],
    "numba/attention.py": [
        ("sparse_attention", "if 0 <= row < rows:", "if 0 < row < rows:", 0),
        ("sparse_attention", "if 0 <= row < rows:", "if 0 <= row < rows - 1:", 0),
        ("sparse_attention", "t * index_steps[1]", "t", 0),
        ("sparse_attention", "slot * index_steps[2]", "slot", 0),
        ("sparse_attention", "row * kv[1][1]", "row * width", 0),
        ("sparse_attention", "shifted(_query(tag, q, b, t), first, 0)", "_query(tag, q, b, t)", 0),
        ("sparse_attention", "width, sums, seen > 0)", "width, sums, False)", 0),
        ("sparse_attention", "mass += math.exp(", "mass -= math.exp(", 0),
        ("sparse_attention", "*sink), first + i, 0)", "*sink), i, 0)", 0),
        ("sparse_attention", "Block(real, *sink)", "Block(real, sink[0], 1)", 0),
        ("sparse_attention", "shifted(sums, i, 0), width, seen == 0)", "shifted(sums, i, 0), width, True)", 0),
        ("sparse_attention", "at(target, i, 0)", "at(target, 0, i * width)", 0),
    ],
    "numba/_softmax.py": [
        ("sparse_attention", "vget(p, 0, j) * scale", "vget(p, 0, j)", 0),
        ("sparse_attention", "get(masses, 0, 0) * fade + vsum(total)", "get(masses, 0, 0) + vsum(total)", 0),
        ("scaled_dot_product_attention", "if not fresh and fade != 1:", "if False:", 0),
        ("sparse_attention", "if seen == 0:", "if seen == -1:", 0),
        ("sparse_attention", "put(p, 0, j, -np.inf)", "put(p, 0, j, 0.0)", 0),
        ("scaled_dot_product_attention", "shifted(values, 0, j), found, shifted(sums, i, j)", "values, found, shifted(sums, i, j)", 0),
    ],
    "torch/attention.py": [
        ("sparse_attention", "(indices >= 0) & (indices < count)", "(indices > 0) & (indices < count)", 0),
        ("sparse_attention", "mul_(scale)", "mul_(1)", 0),
        ("sparse_attention", "mass = mass * fade + p.sum(-1, keepdim=True)", "mass = mass + p.sum(-1, keepdim=True)", 0),
        ("sparse_attention", "total.mul_(fade), p, values", "total, p, values", 0),
        ("sparse_attention", "mass.double() + torch.exp(", "mass.double() - torch.exp(", 0),
        ("sparse_attention", ".masked_fill_(~valid.any(-1)[:, None, None], 0)", "", 0),
    ],
    "triton/attention.py": [
        ("sparse_attention", "(index >= 0) & (index < N)", "(index > 0) & (index < N)", 0),
        ("sparse_attention", "score * scale", "score", 0),
        ("sparse_attention", "total += tl.exp2((tl.load(sink + head.to(tl.int64) * sink_h, here", "total -= tl.exp2((tl.load(sink + head.to(tl.int64) * sink_h, here", 0),
        ("sparse_attention", "head.to(tl.int64)[:, None] * q_h", "head.to(tl.int64)[:, None] * q_d", 0),
        ("sparse_attention", "tl.max(seen.to(tl.int32), 0) > 0, acc / total[:, None], 0.0", "True, acc / total[:, None], 0.0", 0),
    ],
}  # fmt: skip
