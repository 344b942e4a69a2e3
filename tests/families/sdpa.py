"""The sdpa family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/sdpa.py": [
        ("scaled_dot_product_attention", "min(found, t + 1 - begin)", "min(found, t - begin)", 0),
        ("scaled_dot_product_attention", "places[matrix] + row * step", "places[matrix] + row", 0),
        ("scaled_dot_product_attention", "vput(target, i, j, vget(target, i, j) * factor)", "pass", 0),
        ("scaled_dot_product_attention", "(first + here - 1) % length + 1)", "(first + here - 1) % length)", 0),
        ("scaled_dot_product_attention", "seen = 0 if top == -np.inf else reach", "seen = reach", 0),
        ("scaled_dot_product_attention", "is_causal and first // length ==", "is_causal or first // length ==", 0),
        ("scaled_dot_product_attention", "some = min(length - t, here - i)", "some = here - i", 0),
        ("scaled_dot_product_attention", "max(0, begin - first % length)", "max(0, begin + 24 - first % length)", 0),
        ("scaled_dot_product_attention", "_scaled(real, sums.base, (sums.row, 1), (here, width), scale, sums)", "pass", 0),
        ("scaled_dot_product_attention", "(vget(slope, tile * high, j) - middle)", "vget(slope, tile * high, j)", 0),
        ("scaled_dot_product_attention", "found, shifted(sums, i, c), tile > 0)", "found, shifted(sums, i, c), False)", 0),
        ("scaled_dot_product_attention", "max(0, begin + j - first) if is_causal", "max(0, begin + j + 1 - first) if is_causal", 0),
        ("scaled_dot_product_attention", "clear(real, by_keys.base, held * wide_key)", "pass", 0),
        ("scaled_dot_product_attention", "range(run, shared * blocks, runs)", "range(run, blocks, runs)", 0),
        ("scaled_dot_product_attention", "1 / total if total != 0 else 0.0", "1 / total", 0),
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
