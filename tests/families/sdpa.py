"""The sdpa family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/sdpa.py": [
        ("scaled_dot_product_attention", "(is_causal and begin + j > t)", "(is_causal and begin + j >= t)", 0),
        ("scaled_dot_product_attention", "places[matrix] + row * step", "places[matrix] + row", 0),
        ("scaled_dot_product_attention", "get(line, 0, j) * cast(line.tag, scale)", "get(line, 0, j)", 0),
        ("scaled_dot_product_attention", "(first + here - 1) % length + 1)", "(first + here - 1) % length)", 0),
        ("scaled_dot_product_attention", "seen = 0 if top == -np.inf else reach", "seen = reach", 0),
        ("scaled_dot_product_attention", "if is_causal and first // length ==", "if is_causal or first // length ==", 0),
    ],
    "torch/sdpa.py": [
        ("scaled_dot_product_attention", "column > row.unsqueeze(1)", "column >= row.unsqueeze(1)", 0),
        ("scaled_dot_product_attention", "mass = mass * fade + p.sum(-1, keepdim=True)", "mass = mass + p.sum(-1, keepdim=True)", 0),
        ("scaled_dot_product_attention", "other = (*place[:-1], place[-1] // shared)", "other = (*place[:-1], place[-1] % len(key.shape[-3:-2]))", 0),
        ("scaled_dot_product_attention", ".masked_fill_(unseen, 0), top", ", top", 0),
    ],
    "triton/sdpa.py": [
        ("scaled_dot_product_attention", "column[None, :] <= row[:, None]", "column[None, :] < row[:, None]", 0),
        ("scaled_dot_product_attention", "(h // SHARED).to(tl.int64)", "(h % SHARED).to(tl.int64)", 0),
        ("scaled_dot_product_attention", "score += given.to(number)", "score -= given.to(number)", 0),
    ],
}  # fmt: skip
