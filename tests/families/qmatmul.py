"""The qmatmul family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/_qmatmul.py": [
        ("fp8_matmul", "first // BLOCK * scale_step", "first // BLOCK", 0),
        ("fp8_matmul", "above + first // BLOCK * scale_step", "above", 0),
        ("fp8_matmul", "padded, into = round_up(deep, PAIR)", "padded, into = deep", 0),
        ("fp4_matmul", "column + j, first, (valid, deep)", "column + j, 0, (valid, deep)", 0),
        ("moe_experts", "base + group * group_step", "base", 0),
        ("moe_experts", "_bytes(s, group, above", "_bytes(s, 0, above", 0),
        ("fp8_matmul", "else (column // BLOCK, 1)", "else (0, 1)", 0),
        ("fp8_matmul", "column // BLOCK * row_step", "0", 0),
        ("fp8_matmul", "column_step == 1 and shape[1] == padded", "column_step == 1", 0),
        ("fp4_matmul", "GROUP * deep, into, first > 0", "GROUP * deep, into, first > deepest", 0),
        ("fp4_matmul", "unit * deep, into, first > 0", "unit * deep, into, first > deepest", 0),
        ("fp8_matmul", "part * most[1]", "0 * most[1]", 0),
        ("fp4_matmul", "first * unit * width)", "0)", 0),
    ],
    "numba/_coded_tiles.py": [
        ("fp4_matmul", "+ 4 * (lane // 4) for lane in range(16)]", "+ 4 * (lane // 8) for lane in range(16)]", 0),
        ("fp8_matmul", "~(1 << HALF.bits - 2)", "~0", 0),
        ("fp8_matmul", "builder.select(any_nan, constant(total.type, float(\"nan\")), total)", "total", 0),
        ("fp8_matmul", "range(part * LANES, (part + 1) * LANES)", "range(0, LANES)", 0),
    ],
    "numba/_coded_pairs.py": [
        ("fp4_matmul", "_SCALES.values[:, None] * values", "2 * _SCALES.values[:, None] * values", 0),
        ("fp4_matmul", "np.tile(_E2M1.values, 2)", "np.repeat(_E2M1.values, 2)", 0),
        ("fp4_matmul", "[4 * (lane // 8) for lane in range(GROUP)]", "[0 for lane in range(GROUP)]", 0),
        ("fp4_matmul", "4 * word + nibble for", "8 * nibble + word for", 0),
        ("fp8_matmul", "constant(_OCTETS, -_CODES)", "constant(_OCTETS, 0)", 0),
        ("fp8_matmul", "[products & 0xFF, products >> 8]", "[products >> 8, products >> 8]", 0),
        ("fp8_matmul", "16 * lane + 8 * half + byte for", "32 * half + 8 * lane + byte for", 0),
        ("fp8_matmul", "start = builder.mul(block, i64(BLOCK))\n            further", "start = i64(0)\n            further", 0),
        ("fp8_matmul", "_fp8_products(builder, builder.add(scales, block), table)\n            start = builder.mul(block, i64(BLOCK))\n            further", "_fp8_products(builder, scales, table)\n            start = builder.mul(block, i64(BLOCK))\n            further", 0),
        ("fp4_matmul", "result.append(dot_pairs(builder, own, weight, total))", "result.append(dot_pairs(builder, own, weight, totals[0]))", 0),
        ("fp4_matmul", "order = [FP8_ORDER.index(place) for place in wanted]", "order = wanted", 0),
    ],
    "torch/qmatmul.py": [
        ("fp8_matmul", "rows // 128", "rows // 64", 0),
        ("fp4_matmul", "b_scale[first:last]", "b_scale[: last - first]", 0),
        ("fp8_matmul", "x.copy_(codes[down])", "x.copy_(codes[: len(x)])", 0),
        ("fp4_matmul", "fp8_dequantize(codes[down], factors[down]", "fp8_dequantize(codes[down], factors[: len(x)]", 0),
    ],
    "triton/qmatmul.py": [
        ("fp8_matmul", "column // 128 * b_scale_n", "column * 0", 0),
        ("fp8_matmul", "b_scale += b_scale_k", "b_scale += 0", 0),
        ("fp8_matmul", "tl.where(size == 0x7F, 0x7E00, bits)", "bits", 0),
        ("fp4_matmul", "weight(packed & 15, scale)", "weight(packed >> 4, scale)", 0),
        ("fp4_matmul", "tl.load(a_tile + a_k, left, other=0)", "tl.load(a_tile, left, other=0)", 0),
        ("fp8_matmul", "PRECISION) * shift * scale", "PRECISION) * shift", 0),
        ("fp4_matmul", "acc = multiplied(odd, high, acc, PRECISION)", "acc = multiplied(odd, low, acc, PRECISION)", 0),
        ("fp4_matmul", "(start // 32 + group)", "(start // 32 + 0 * group)", 0),
    ],
}  # fmt: skip

PAIRED = {("numba/_qmatmul.py", i) for i in (5, 6)} | {("numba/_coded_pairs.py", i) for i in range(11)}
IN_VECTORS = {("numba/_qmatmul.py", 10)}
IN_TILES = {("numba/_qmatmul.py", 12)}
