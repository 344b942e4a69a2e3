"""The quantize family: one call of each operator, and edits of its kernels that the suite must notice."""

import torch


def calls(t, codes):
    x = torch.randn(2, 3, 64)
    return {
        "fp8_quantize": (x, 32),
        "fp8_fake_quantize": (x, 32),
        "fp4_quantize": (x, 32),
        "fp4_fake_quantize": (x, 32),
        "fp4_to_fp8": (codes(128, 64), codes(128, 4)),
        "hadamard": (t(2, 3, 8),),
    }


MUTANTS = {}
