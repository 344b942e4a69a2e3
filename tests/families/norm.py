"""The norm family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/norm.py": [
        ("rms_norm", "put(row, i, 0, get(source, i, 0))", "put(row, i, 0, get(source, 0, i))", 0),
        ("rms_norm", "get(weights, i, 0)", "get(weights, 0, i)", 0),
        ("rms_norm", "c, d = fma(p, p, c), fma(q, q, d)", "c, d = fma(p, p, c), fma(p, q, d)", 0),
        ("rms_norm", "for i in range(four, whole, step):", "for i in range(four + step, whole, step):", 0),
        ("rms_norm", "total += get(x, i, 0) * get(x, i, 0)", "total += get(x, i, 0)", 0),
        ("rms_norm", "vget(factors, i, 0) * value", "vget(factors, 0, 0) * value", 0),
        ("rms_norm", "np.float64(rounded(tag, value * value))", "np.float64(value * value)", 0),
        ("rms_norm", "value = rounded(tag, get(x, i, 0) * root)", "value = get(x, i, 0) * root", 0),
    ],
    "_rows.py": [
        ("rms_norm", "outer == size * inner", "outer >= size * inner", 0),
        ("rms_norm", "if size == 1:", "if size == 2:", 0),
        ("hc_post", "0 if n == 1 else step", "step", 0),
        ("swiglu", "0 if n == 1 else step", "step", 0),
        ("rotary_embedding", "0 if n == 1 else step", "step", 0),
    ],
    "torch/norm.py": [
        ("rms_norm", "mean(-1, keepdim=True).add_(eps).rsqrt_())", "mean(-1, keepdim=True).rsqrt_())", 0),
        ("rms_norm", "(mean.float() + eps).to(dtype)", "(mean.float() + eps)", 0),
        ("rms_norm", "y.to(dtype).float().mul_(weight)", "y.mul_(weight)", 0),
    ],
    "triton/norm.py": [
        ("rms_norm", "square = rounded(square, half).to(tl.float64)", "square = square.to(tl.float64)", 0),
        ("rms_norm", "row // N2 % N1", "row // N1 % N2", 0),
        ("rms_norm", "weight + at.to(tl.int64) * weight_n", "weight + at.to(tl.int64)", 0),
        ("rms_norm", "rounded(mean + eps, half)", "rounded(mean, half)", 0),
    ],
}  # fmt: skip
