"""The norm family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    return {"rms_norm": (t(2, 3, 5), t(5), 1e-6)}


MUTANTS = {}
