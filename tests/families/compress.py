"""The compress family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    bias = t(2, 6)
    states = [t(2, 4, 6) for _ in range(2)]
    if bias.itemsize == 2:
        bias, *states = (x.detach().float().requires_grad_(x.requires_grad) for x in (bias, *states))
    return {"compress_kv": (t(2, 5, 3), t(6, 3), t(6, 3), bias, *states, 1)}


MUTANTS = {}
