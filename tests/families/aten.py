"""Torch's own operators on the CPU: edits of what their lanes, folds and loops compute that the suite must notice."""

MUTANTS = {
    "_lanes.py": [
        ("aten.add", "x + alpha * y", "x - alpha * y", 0),
        ("aten.pow", "1 - 2 * odd", "1 + 2 * odd", 0),
        ("aten.lerp", "(1.0 - weight)", "(1.0 + weight)", 0),
        ("aten.clamp", "minimum(maximum(x, least), most)", "maximum(minimum(x, most), least)", 0),
        ("aten.sign", "(x > 0) | (x < 0), step, 0", "(x > 0) | (x < 0), step, x", 0),
        ("aten.relu", "where(x <= 0, 0, x)", "where(x > 0, x, 0)", 0),
        ("aten.softplus", "where(x * beta > threshold, x", "where(x > threshold, x", 0),
        ("aten.silu_backward", "1.0 + x * (1.0 - s)", "1.0 + x * s", 0),
        ("aten.gelu_backward", "share + x * exp", "share - x * exp", 0),
        ("aten.threshold_backward", "where(x <= threshold, 0, grad)", "where(x > threshold, grad, 0)", 0),
    ],
    "_folds.py": [
        ("aten.argmax", "(x > s) | ((x != x) & (s == s))", "(x > s)", 0),
        ("aten.amax", "(t > s) | (t != t)", "(t > s)", 0),
        ("aten.var", "sqrt(s / a)", "sqrt(s) / a", 0),
        ("aten.logsumexp", "log(s) + p", "log(s)", 0),
    ],
    "numba/movement.py": [
        ("aten.tril", "(0, middle) if lower", "(middle, n - middle) if lower", 0),
        ("aten.linspace", "first + step * convert(real, i) if i < half", "first + convert(real, i) if i < half", 0),
        ("aten.nonzero", "unset += 1", "unset += 0", 0),
    ],
    "numba/reductions.py": [
        ("aten.var", "max(n - correction, 0)", "n - correction", 0),
        ("aten.cumsum", "store(S, carry, total)", "pass", 0),
        ("aten.max_dim", "+ k * x[2][0]", "+ k", 0),
    ],
    "numba/rows.py": [
        ("aten._softmax", "where(numbered(whole) < n, e, 0)", "e * 2", 0),
        ("aten._softmax", "cast(S, 1) / vsum(masses)", "cast(S, 1)", 0),
        ("aten._softmax", "(b > a) | (b != b)", "(b > a)", 0),
        ("aten._softmax", "exp(read(X, x + i * X_SIZE) - top)", "exp(read(X, x + i * X_SIZE))", 0),
    ],
    "numba/indexing.py": [
        ("aten.gather", "j * goal_step, where + j * where_step", "j * goal_step, where", 0),
        ("aten.gather", "k * source_across", "k", 0),
        ("aten.scatter", "np.iinfo(kind).min if least else np.iinfo(kind).max", "0", 0),
        ("aten.scatter", "dtype_name(out) in HALF", "False", 0),
    ],
    "numba/optimizer.py": [
        ("aten.adamw", "if decay != 0:", "if True:", 0),
        ("aten.adamw", "g = g * sign", "g = g", 0),
        ("aten.adamw", "lr / (1.0 - beta1**count)", "lr", 0),
        ("aten.adamw", "vstore(tag, at(new_v, i, 0), one[2])", "pass", 0),
    ],
    "numba/selection.py": [
        ("aten.sort", "if value != value:", "if False:", 0),
        ("aten.sort", "~number if turned else number", "number", 0),
        ("aten.topk", "if count < k or key < limit:", "if count < k:", 0),
        ("aten.sort", "keys[j - 1] > key", "keys[j - 1] >= key", 0),
        ("aten.searchsorted", "side > value if right else side >= value", "side >= value", 0),
        ("aten.isin", "found != invert", "found", 0),
        ("aten.histc", "value <= most", "value < most", 0),
    ],
    "numba/random.py": [
        ("aten.uniform", "each * block + i", "each * block", 0),
        ("aten.normal", "math.sin(angle) if i & 1 else math.cos(angle)", "math.cos(angle)", 0),
        ("aten.exponential", "+ 0.5) * _UNIT) / rate", "+ 0.5) * _UNIT) * rate", 0),
        ("aten.random", "words[i] % count if count > 0 else words[i]", "words[i]", 0),
        ("aten.pick", "total += np.float64", "total = np.float64", 0),
    ],
}

EQUIVALENT = {
    ("numba/rows.py", 2): "a NaN makes the sum of its row NaN, whatever the greatest is",
}
