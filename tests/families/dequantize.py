"""The dequantize family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/dequantize.py": [
        ("fp4_dequantize", "group * scale_column", "group", 0),
        ("fp4_dequantize", "row * scale_row + group", "group", 0),
        ("fp4_dequantize", "(0, packed_column), halves", "(0, 1), halves", 0),
        ("fp8_dequantize", "row // block_rows * scale_row", "row * scale_row", 0),
        ("fp8_dequantize", "scale + scales + i * scale_column", "scale + scales", 0),
        ("fp8_dequantize", "row // block_rows != band", "band < 0", 0),
        ("fp8_dequantize", "scales + block * step * size", "scales + block * size", 0),
        ("fp8_dequantize", "target, (0, out_column)", "target, (0, 1)", 1),
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
