"""The quantize family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/quantize.py": [
        ("fp8_quantize", "if bits >= _INFINITY:", "if bits > _INFINITY:", 0),
        ("fp8_quantize", "+ 0x7FFFFF) >> 23", "+ 0x400000) >> 23", 0),
        ("fp8_quantize", "beside + group * scale_column, code", "beside + group, code", 0),
        ("fp4_quantize", "target + i // 2, value", "target + i // 4, value", 0),
        ("fp8_fake_quantize", "exact = 0 < code < 255", "exact = code < 255", 0),
        ("fp4_to_fp8", "128 * first * weight_steps[1]", "first * weight_steps[1]", 0),
        ("fp4_to_fp8", "same[block] = tops[block] != 255", "same[block] = True", 0),
        ("hadamard", "vstore(real, row + (i + apart) * unit, vsub(low, high))", "vstore(real, row + (i + apart) * unit, vsub(high, low))", 0),
    ],
    "numba/_quantize_simd.py": [
        ("fp8_quantize", "magnitude, _constant(magnitude.type, (1 << dropped - 1) - 1)", "magnitude, _constant(magnitude.type, 1 << dropped - 1)", 0),
        ("fp4_quantize", '"e2m1": 4}', '"e2m1": 3}', 0),
        ("fp8_fake_quantize", "builder.or_(rounded, sign)", "rounded", 0),
        ("hadamard", "lane ^ step for lane", "(lane + step) % lanes for lane", 0),
    ],
    "torch/quantize.py": [
        ("fp8_quantize", "byte.masked_fill_(infinite, 255)", "", 0),
        ("fp4_quantize", "passed, alpha=2", "passed, alpha=1", 0),
        ("fp4_quantize", ".masked_fill_(s.isnan(), 7)", "", 0),
        ("fp4_fake_quantize", "(size >= 4).float()", "(size >= 3).float()", 0),
        ("fp4_to_fp8", "(top - 6).clamp_min_(0)", "(top - 6).clamp_min_(1)", 0),
        ("hadamard", "(low + high, low - high)", "(low + high, high - low)", 0),
    ],
    "triton/quantize.py": [
        ("fp8_quantize", "tl.where(size < 0x3C800000, small", "tl.where(size < 0x3C000000, small", 0),
        ("fp4_quantize", "low | high << 4", "high | low << 4", 0),
        ("fp4_to_fp8", "tl.maximum(top - 6, 0)", "top - 6", 0),
        ("hadamard", "low - high", "high - low", 0),
    ],
}  # fmt: skip
