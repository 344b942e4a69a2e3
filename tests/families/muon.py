"""The muon family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    return {"newton_schulz": (t(2, 3, 4).detach(), 10)}


MUTANTS = {}  # fmt: skip
