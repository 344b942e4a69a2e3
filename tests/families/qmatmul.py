"""The qmatmul family: one call of each operator, and edits of its kernels that the suite must notice."""


def calls(t, codes):
    return {
        "fp8_matmul": (codes(2, 3, 40) & 0x77, codes(3, 1) & 0x7F, codes(5, 40) & 0x77, codes(1, 1) & 0x7F),
        "fp4_matmul": (codes(2, 3, 64) & 0x77, codes(3, 1) & 0x7F, codes(5, 32), codes(5, 2) & 0x7F),
    }


MUTANTS = {}
