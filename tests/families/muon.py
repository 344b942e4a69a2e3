"""The muon family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/muon.py": [
        ("newton_schulz", "square *= c", "square *= b", 0),
        ("newton_schulz", "x *= a", "x *= 1", 0),
        ("newton_schulz", "np.where(top == 0, 1, top)", "1", 0),
        ("newton_schulz", "places[start : start + some]", "places[:some]", 0),
    ],
    "torch/muon.py": [
        ("newton_schulz", "beta=b, alpha=c", "beta=c, alpha=b", 0),
    ],
    "_muon.py": [
        ("newton_schulz", "torch.where(norm == 0, 1, norm)", "norm", 0),
        ("newton_schulz", "dim=(-2, -1), keepdim=True)", "dim=(-3, -2, -1), keepdim=True)", 0),
    ],
    "triton/muon.py": [
        ("newton_schulz", "square, b, c)", "square, c, b)", 0),
        ("newton_schulz", "inside = at < size", "inside = at < size - 1", 0),
    ],
}  # fmt: skip
