"""Torch's operators by family, each as a lowering to ours; imported in the order in which `enable` names them."""

from . import products, fused, pointwise, movement, indexing, selection, random  # noqa: F401, I001
