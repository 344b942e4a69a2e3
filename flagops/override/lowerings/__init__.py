"""Torch's operators by family, each as a lowering to ours; imported in the order in which `enable` names them."""

from . import (  # noqa: F401, I001
    products, fused, attention, pointwise, movement, reductions, rows, indexing, selection, random, convolution,
    optimizer, losses,
)  # fmt: skip
