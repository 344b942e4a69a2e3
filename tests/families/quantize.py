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
        ("fp8_quantize", "store(BYTE, at(beside, group, 0)", "store(BYTE, at(beside, 0, group)", 0),
        ("fp8_quantize", "at(target, group * count, 0)", "at(target, 0, group * count)", 0),
        ("fp8_quantize", "at(source, group * block, 0)", "at(source, 0, group * block)", 0),
        ("fp8_quantize", "unpack(BYTE, coded, (1, count), into, (0, codes_column))", "unpack(BYTE, coded, (1, count), into, (0, 1))", 0),
        ("fp8_fake_quantize", "at(target, group * block, 0)", "at(target, 0, group * block)", 0),
        ("fp4_to_fp8", "_byte(weight, row, BLOCK * first)", "_byte(weight, row, first)", 0),
        ("fp4_to_fp8", "same[block] = tops[block] != NO_SCALE", "same[block] = True", 0),
        ("fp4_to_fp8", "_ABOVE = 6", "_ABOVE = 5", 0),
        ("hadamard", "vput(row, 0, i + apart, low - high)", "vput(row, 0, i + apart, high - low)", 0),
        ("hadamard", "put(result, i, 0, get", "put(result, 0, i, get", 0),
    ],
    "numba/_scales.py": [
        ("fp8_quantize", "if top >= INFINITY:", "if top > INFINITY:", 0),
        ("fp8_quantize", "+ _ALL_BUT_ONE)", "+ _ALL_BUT_ONE // 2)", 0),
        ("moe_experts", "vround(form, value * divisor if exact else value / divisor)", "(value * divisor if exact else value / divisor)", 0),
        ("fp4_quantize", "0, i // per_byte(form)", "0, i // 4", 0),
        ("fp8_fake_quantize", "0 < code < NO_SCALE", "code < NO_SCALE", 0),
        ("fp4_quantize", "full(form)", "0", 0),
    ],
    "numba/_formats.py": [
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
