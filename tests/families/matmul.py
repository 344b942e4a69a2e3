"""The matmul family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    return {
        "matmul": (t(2, 1, 3, 4), t(3, 4, 5)),
        "linear": (t(2, 3, 4), t(5, 4), t(5)),
    }


MUTANTS = {
    "numba/_gemm.py": [
        ("matmul", "blocks[term, A] + first * ak", "blocks[term, A]", 0),
        ("matmul", "blocks[term, A] + first * ak", "blocks[term, A]", 1),
        ("matmul", "column * bn + first) * size(tag)", "column * bn) * size(tag)", 0),
        ("matmul", "column * bn + first * bk", "column * bn", 0),
        ("matmul", "depth = min(span, k - first)", "depth = min(span, k - first, 512)", 0),
        ("matmul", "shifted(sums, 0, j), part + at > 0", "shifted(sums, 0, j), at > 0", 0),
        ("matmul", "shifted(sums, 0, j), part > 0", "shifted(sums, 0, j), part > 1", 0),
        ("matmul", "(padded_rows, round_up(depth, step))", "(padded_rows, depth)", 0),
        ("matmul", "column, c, blocks[block, C]", "column, c, blocks[block, A]", 0),
        ("matmul", "column, c, blocks[block, C]", "column, c, blocks[block, A]", 1),
        ("matmul", "offset + column * column_step", "offset + column", 0),
        ("matmul", "w, columns, depth, shifted(c, i, 0), add", "w, columns, depth, c, add", 0),
        ("matmul", "b, depth, shifted(c, i, 0), add", "b, depth, c, add", 0),
        ("matmul", "elif sb == 0 and", "elif True and", 0),
        ("matmul", "extent = extent_b if extent_a == 1 else extent_a", "extent = extent_a", 0),
        ("matmul", "if k == 0:", "if k == -1:", 0),
        ("matmul", "if rows <= OUTER_ROWS and bn == 1", "if rows <= OUTER_ROWS", 0),
        ("matmul", "most * am, 0, most * cm", "most * am, 0, most * am", 0),
        ("grouped_matmul", "group * b_group", "0 * b_group", 0),
        ("grouped_matmul", "row = start + place * most", "row = start + place", 0),
        ("linear", "shift += column * shift_step * size(tag)", "shift += 0", 0),
    ],
    "numba/_blocks.py": [
        ("rms_norm", "i * steps[0] + j * steps[1] + k", "j * steps[0] + i * steps[1] + k", 0),
        ("rms_norm", "if task < sizes[2]:", "if task <= sizes[2]:", 0),
        ("matmul", "store(tag, goal + c * column * item, scalar)", "store(tag, goal + c * item, scalar)", 0),
        ("linear", "scalar += load(tag, bias + c * bias_step * item)", "scalar += load(tag, bias + c * item)", 0),
        ("linear", "value += vload(tag, bias + c * item)", "value = vload(source.tag, origin + c * unit)", 0),
        ("matmul", "if padded_columns > columns:", "if False:", 0),
    ],
    "numba/_ir.py": [
        ("matmul", "constant(bits.type, 0x7FFF)", "constant(bits.type, 0x8000)", 0),
        ("matmul", "builder.and_(high, constant(bits.type, 1))", "high", 0),
        ("linear", "result, end)", "result, before)", 0),
    ],
    "numba/_vectors.py": [
        ("rms_norm", "for i in (0, half))", "for i in (0, 0))", 0),
        ("rotary_embedding", "[lane ^ 1 for lane", "[lane for lane", 0),
        ("hadamard", "lane ^ step for lane", "(lane + step) % count for lane", 0),
        ("swiglu", '"minimum", "smin"', '"maximum", "smin"', 0),
        ("sparse_attention", '"maximum", "smax"', '"minimum", "smax"', 0),
        ("swiglu", '"fdiv", None', '"fmul", None', 0),
        ("lightning_indexer", "builder.lshr(sign, kind(1))", "sign", 0),
        ("lightning_indexer", "least, number", "number, least", 0),
    ],
    "numba/_functions.py": [
        ("moe_gate", "1 / (2 * i + 1)", "1 / (2 * i + 3)", 0),
        ("sparse_attention", "1 / math.factorial(i)", "1 / math.factorial(i + 1)", 0),
    ],
    "numba/_tiles.py": [
        ("matmul", "builder.select(add, old, constant(kind, 0.0))", "old", 0),
        ("linear", "builder.select(inside, i64(j), last)", "i64(0)", 0),
        ("linear", "odd = [lane + step for lane in even]", "odd = even", 0),
        ("matmul", "builder.add(first, i64(v * lanes))", "first", 0),
    ],
    "torch/matmul.py": [
        ("linear", "total += bias", "total += 0", 0),
        ("linear", "torch.addmm(bias, matrix(x), weight.mT, out=", "torch.mm(matrix(x), weight.mT, out=", 0),
        ("matmul", "a[..., :step].float()", "a[..., :step].bfloat16()", 0),
    ],
    "triton/matmul.py": [
        ("matmul", "depth.to(tl.int64)[None, :] * a_k", "depth.to(tl.int64)[None, :]", 0),
        ("matmul", "inside_m[:, None] & inside_n[None, :]", "inside_m[:, None] | inside_n[None, :]", 0),
        ("matmul", "left = tl.arange(0, BK) < end - k", "left = tl.arange(0, BK) <= end - k", 0),
        ("matmul", "EVEN=k % tile[\"BK\"] == 0", "EVEN=True", 0),
        ("matmul", "within * b_inner", "within * a_inner", 0),
        ("linear", "columns.to(tl.int64) * bias_n", "columns.to(tl.int64)", 0),
    ],
    "triton/_common.py": [
        ("matmul", "a, b = widen(a), widen(b)", "a, b = a, b", 0),
        ("matmul", "+ 0x7FFF + (kept & 1)", "+ 0x8000", 0),
        ("matmul", "+ 0x7FFF + (kept & 1)", "", 0),
        ("sparse_attention", "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", 0),
        ("sparse_attention", "acc * fade[:, None], precision", "acc, precision", 0),
        ("scaled_dot_product_attention", "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", 0),
    ],
}  # fmt: skip
