"""The sdpa family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    return {"scaled_dot_product_attention": (t(2, 4, 3, 5), t(2, 2, 4, 5), t(2, 2, 4, 3), t(4, 3, 4), False, 0.7)}


MUTANTS = {}  # fmt: skip
