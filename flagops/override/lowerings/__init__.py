"""Torch's operators by family, each as a lowering to ours; imported in the order in which `enable` names them."""

from . import products, fused, pointwise, movement, reductions, rows, indexing, selection, convolution, optimizer  # noqa: F401, I001
