"""The moe family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/moe.py": [
        ("moe_gate", "value > highest", "value >= highest", 0),
        ("moe_gate", "taken[best] = 1", "taken[best] = 0", 0),
        ("moe_gate", "score = get(scores, 0, best)", "score = get(biased, 0, best)", 0),
        ("moe_gate", "_index(table, token, slot)", "_index(table, token * 0, slot)", 0),
        ("swiglu", "(0, left.row)", "(0, 1)", 0),
        ("swiglu", "((of_gate, g), (of_up, u))", "((of_gate, u), (of_up, g))", 0),
        ("swiglu", "(0, source.row)", "(0, 1)", 0),
    ],
    "numba/_moe_rows.py": [
        ("swiglu", "maximum(minimum(vget(u, 0, i), limit), -limit)", "minimum(vget(u, 0, i), limit)", 0),
        ("swiglu", "where(gate >= 0, 1, power)", "power", 0),
        ("moe_gate", "where(z > 0, z, 0) + log1p", "z + log1p", 0),
        ("moe_experts", "order[bounds[ids[place] + 1]] = place", "order[place] = place", 0),
        ("moe_experts", "at(source, tokens[i], first * column)", "at(source, i, first * column)", 0),
        ("moe_experts", "at(gates, i, width + first)", "at(gates, i, first)", 0),
        ("moe_experts", "fake(E4M3, single, BLOCK, True, single)", "single.base", 1),
        ("swiglu", "where(abs(right) > limit, 0, slope * silu)", "slope * silu", 0),
        ("swiglu", "(1 + gate * rest)", "(1 - gate * rest)", 0),
        ("moe_experts", "total = fma(slope * silu, up, total)", "total = fma(slope, up, total)", 0),
    ],
    "_moe.py": [("moe_experts", "not in FLOATS", "in FLOATS", 0)],
    "torch/moe.py": [
        ("moe_gate", "descending=True, stable=True", "descending=True, stable=False", 0),
        ("moe_gate", "scores.gather(1, indices), scale", "(scores if bias is None else scores + bias).gather(1, indices), scale", 0),
        ("swiglu", "g.clamp(max=limit)", "g.clamp(-limit, limit)", 0),
        ("swiglu", "weight[..., rows]", "weight[..., :1]", 0),
    ],
    "triton/moe.py": [
        ("moe_gate", "expert, BLOCK - 1), 1)", "BLOCK - 1 - expert, BLOCK - 1), 1)", 0),
        ("moe_gate", "+ 1.0 / (2 * (terms - 1 - i) + 1)", "+ 1.0 / (2 * (terms - i) + 1)", 0),
        ("moe_gate", "slot * weights_k", "slot", 0),
        ("swiglu", "tl.where(up < -limit, -limit, up)", "up", 0),
        ("swiglu", "column * up_n", "column * gate_n", 0),
    ],
}  # fmt: skip
