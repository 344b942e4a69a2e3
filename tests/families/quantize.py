"""The quantize family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    x = torch.randn(2, 3, 64)
    return {
        "fp8_quantize": (x, 32),
        "fp8_fake_quantize": (x, 32),
        "fp4_quantize": (x, 32),
        "fp4_fake_quantize": (x, 32),
        "fp4_to_fp8": (codes(128, 64), codes(128, 4)),
        "hadamard": (t(2, 3, 8),),
    }


MUTANTS = {
    "numba/quantize.py": [
        ("fp8_quantize", "if top >= INFINITY:", "if top > INFINITY:", 0),
        ("fp8_quantize", "+ 0x7FFFFF) >> 23", "+ 0x400000) >> 23", 0),
        ("fp8_quantize", "beside + group * scale_column, code", "beside + group, code", 0),
        ("fp4_quantize", "target + i // 2, value", "target + i // 4, value", 0),
        ("fp8_fake_quantize", "exact = 0 < code < 255", "exact = code < 255", 0),
        ("fp4_to_fp8", "128 * first * weight_steps[1]", "first * weight_steps[1]", 0),
        ("fp4_to_fp8", "same[block] = tops[block] != 255", "same[block] = True", 0),
        ("hadamard", "vstore(real, row + (i + apart) * unit, low - high)", "vstore(real, row + (i + apart) * unit, high - low)", 0),
    ],
    "numba/_formats.py": [
        ("moe_experts", "vround(tag, divided(x, i, scale, code))", "divided(x, i, scale, code)", 0),
        ("moe_experts", "if top >= INFINITY:", "if top > INFINITY:", 0),
        ("moe_experts", "+ _ALL_BUT_ONE)", "+ _ALL_BUT_ONE // 2)", 0),
        ("fp8_quantize", "magnitude, constant(magnitude.type, (1 << dropped - 1) - 1)", "magnitude, constant(magnitude.type, 1 << dropped - 1)", 0),
        ("fp4_quantize", "SINGLE.bits - form.bits)", "SINGLE.bits - form.bits + 1)", 0),
        ("fp8_fake_quantize", "builder.or_(chosen, sign)", "chosen", 0),
        ("fp4_dequantize", "for lane in (i, count + i)", "for lane in (count + i, i)", 0),
        ("fp8_dequantize", "constant(typ, 128)), constant(typ, 8 * size - 8)", "constant(typ, 64)), constant(typ, 8 * size - 7)", 0),
        ("fp8_dequantize", "builder.and_(code, i64(127))", "builder.and_(code, i64(63))", 0),
        ("fp4_dequantize", "-value, value)", "0 - value, value)", 0),
        ("fp4_dequantize", '"e8m0": Format(8, 0, 127,', '"e8m0": Format(8, 0, 126,', 0),
        ("fp4_dequantize", 'Format(8, 0, 127, signed=False, nan=True)', 'Format(8, 0, 127, signed=False, nan=False)', 0),
        ("fp8_quantize", "Format(8, 3, 7, nan=True, floor=1e-4)", "Format(8, 3, 7, nan=True)", 0),
        ("fp8_quantize", "np.float32(1 / self.largest)", "np.float32(0.5 / self.largest)", 0),
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
