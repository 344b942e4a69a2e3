"""The dequantize family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/dequantize.py": [
        ("fp4_dequantize", "(_E2M1, -_E2M1)", "(_E2M1, 0 - _E2M1)", 0),
        ("fp4_dequantize", "np.arange(255) - 127.0", "np.arange(255) - 126.0", 0),
        ("fp4_dequantize", "np.nan)", "np.inf)", 0),
        ("fp4_dequantize", "group * scale_column", "group", 0),
        ("fp4_dequantize", "row * scale_row + group", "group", 0),
        ("fp4_dequantize", "_gather(codes, source, packed_column)", "_gather(codes, source, 1)", 0),
        ("fp8_dequantize", "row // block_rows * scale_row", "row * scale_row", 0),
        ("fp8_dequantize", "table = tables + 128 * size * byte(scales + block * scale_column)", "table = tables + 128 * size * byte(scales)", 0),
        ("fp8_dequantize", "row // block_rows != band", "band < 0", 0),
        ("fp8_dequantize", "_multiply(products, tables, scales, scale_column", "_multiply(products, tables, scales, 1", 0),
    ],
    "numba/_dequantize_simd.py": [
        ("fp4_dequantize", "for lane in (i, 16 + i)", "for lane in (16 + i, i)", 0),
        ("fp8_dequantize", "_splat(bits, lanes, 128)), _splat(bits, lanes, bits.width - 8)", "_splat(bits, lanes, 64)), _splat(bits, lanes, bits.width - 7)", 0),
        ("fp8_dequantize", "builder.and_(code, _I64(127))", "builder.and_(code, _I64(63))", 0),
    ],
    "torch/dequantize.py": [
        ("fp4_dequantize", "values[byte & 15], values[byte >> 4]", "values[byte >> 4], values[byte & 15]", 0),
        ("fp8_dequantize", "row // height", "row // width", 0),
        ("fp8_dequantize", "first // width :", "0 :", 0),
        ("fp8_dequantize", "(code // 8 - 10)", "(code // 8 - 9)", 0),
    ],
    "triton/dequantize.py": [
        ("fp4_dequantize", "tl.join(pair & 15, pair >> 4)", "tl.join(pair >> 4, pair & 15)", 0),
        ("fp4_dequantize", "tl.where(code == 0, 0x400000,", "tl.where(code == 0, 0,", 0),
        ("fp4_dequantize", "tl.where(code == 255, 0x7FC00000, code << 23)", "code << 23", 0),
        ("fp4_dequantize", "(code & 8) << 28", "(code & 8) << 27", 0),
        ("fp8_dequantize", "(row // block_r)", "(row // block_c)", 0),
        ("fp8_dequantize", "(code & 0x7F) == 0x7F", "code == 0x7F", 0),
        ("fp8_dequantize", "(code & 0x80) << 24", "(code & 0x80) << 23", 0),
    ],
}  # fmt: skip
