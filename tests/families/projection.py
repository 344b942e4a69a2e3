"""The projection family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/projection.py": [
        ("grouped_output_projection", "(per_group * by_head, by_head,", "(by_head, per_group * by_head,", 0),
        ("grouped_output_projection", "(r * by_row, c * by_column,", "(r * by_row, by_column,", 0),
        ("grouped_output_projection", "(r * step, 0, *steps, step)", "(step, 0, *steps, step)", 0),
        ("grouped_output_projection", "group * heads * by_head", "group * by_head", 0),
        ("grouped_output_projection", "cut = min(-(-first // BLOCK) * BLOCK, last)", "cut = first", 0),
        ("grouped_output_projection", "z[..., rank:] = 0", "z[..., rank:] = 1e4", 0),
    ],
    "torch/projection.py": [
        ("grouped_output_projection", "(groups, rank // groups)).mT", "(groups, rank // groups)).flip(0).mT", 0),
        ("grouped_output_projection", "x.transpose(0, 1), down", "x.flip(1).transpose(0, 1), down", 0),
        ("grouped_output_projection", "x, first).mT", "x, 0).mT", 0),
        ("grouped_output_projection", "fp8_quantize(inner, 128,", "fp8_quantize(inner, 32,", 0),
    ],
    "triton/projection.py": [
        ("grouped_output_projection", "wo_a.view(groups, rank, width).mT", "wo_a.view(groups, rank, width).flip(0).mT", 0),
        ("grouped_output_projection", "cut = min(-(-group * rank // 128) * 128, last)", "cut = group * rank", 0),
        ("grouped_output_projection", "inner[group], wo_a[part]", "inner[0], wo_a[part]", 0),
    ],
}  # fmt: skip
