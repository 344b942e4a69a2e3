"""The rotary family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/rotary.py": [
        ("rotary_embedding", "put(s, 2 * p, 0, -sine)", "put(s, 2 * p, 0, sine)", 0),
        ("rotary_embedding", "-get(sines, p, 0) if inverse", "get(sines, p, 0) if inverse", 0),
        ("rotary_embedding", "at(rows, h, 0)", "at(rows, 0, h * d)", 0),
        ("rotary_embedding", "of_task(real, sin, sizes", "of_task(real, (*sin[:2], cos[2]), sizes", 0),
        ("rotary_embedding", "a * cosine - b * sine", "a * cosine + b * sine", 0),
        ("rotary_embedding", "fma(vswap(value),", "fma(value,", 0),
        ("yarn_table", "of_task(FLOAT32, cos, sizes", "of_task(FLOAT32, (*cos[:2], (1,)), sizes", 0),
        ("yarn_table", "np.float64(np.float32(position * theta[p]))", "np.float64(position) * np.float64(theta[p])", 0),
    ],
    "_rotary.py": [
        ("yarn_table", "min(math.ceil(edges[1]), dim - 1)", "math.ceil(edges[1])", 0),
        ("yarn_table", "math.floor(edges[0])", "math.ceil(edges[0])", 0),
        ("yarn_table", "plain * (one - ramp)", "plain * ramp", 0),
    ],
    "torch/rotary.py": [
        ("rotary_embedding", "s = -s if inverse else s", "s = s", 0),
        ("rotary_embedding", "(a * c - b * s, a * s + b * c)", "(a * c - b * s, a * c + b * s)", 0),
        ("rotary_embedding", "if not same and first:", "if same and first:", 0),
    ],
    "triton/rotary.py": [
        ("rotary_embedding", "x + (at + 1) * x_d", "x + at * x_d", 0),
        ("rotary_embedding", "* sign", "", 0),
        ("rotary_embedding", "head[:, None] * x_h", "head[:, None] * D", 0),
        ("yarn_table", "row // N2 % N1", "row // N1 % N2", 1),
    ],
}  # fmt: skip
