"""The indexer family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/indexer.py": [
        ("lightning_indexer", "(best[i] == least and equal > 0)", "best[i] == least", 0),
        ("lightning_indexer", "remaining -= counts[digit]", "remaining -= 1", 0),
        ("lightning_indexer", "(digit ^ _NEGATIVE) - _NEGATIVE", "digit", 0),
        ("lightning_indexer", "i < count else -1", "i <= count else -1", 0),
        ("lightning_indexer", "range(whole, heads)", "range(whole, heads - 1)", 0),
        ("lightning_indexer", "min(limits[i], row + OUTER_ROWS)", "row + OUTER_ROWS", 0),
        ("lightning_indexer", "(key_row, key_channel)", "(key_row, 1)", 0),
        ("lightning_indexer", "(0, weight)", "(0, 1)", 0),
        ("lightning_indexer", "where(value < 0, 0, value)", "value", 0),
    ],
    "torch/indexer.py": [
        ("lightning_indexer", "entry >= limit.unsqueeze(1)", "entry > limit.unsqueeze(1)", 0),
        ("lightning_indexer", "held.shape[1] - 1, -1, -1, device", "held.shape[1], device", 0),
        ("lightning_indexer", "kept.sort(1).values", "kept", 0),
        ("lightning_indexer", "scores.isnan()", "scores.isinf()", 0),
    ],
    "triton/indexer.py": [
        ("lightning_indexer", "product < 0", "product < -1", 0),
        ("lightning_indexer", "tl.program_id(0) % blocks * BN", "tl.program_id(0) // blocks * BN", 0),
        ("lightning_indexer", "some % groups * queries", "some // groups * queries", 0),
        ("lightning_indexer", "tl.cumsum(equal, 0) <= remaining", "tl.cumsum(equal, 0) < remaining", 0),
        ("lightning_indexer", "(digit - 128)", "digit", 0),
        ("lightning_indexer", "entry.to(tl.int64)[:, None] * key_n", "entry.to(tl.int64)[:, None] * key_d", 0),
    ],
}  # fmt: skip
