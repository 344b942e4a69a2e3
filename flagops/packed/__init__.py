"""Models of transformers on packed weights: FP4 and FP8 from the files of a checkpoint to the product, never expanded.

`load` builds one of a checkpoint; its layers hold codes and scales, mapped where they lie, and compute by flagops'
operators.
"""

from .load import load
from .modules import PackedExperts, PackedGroupedLinear, PackedLinear, StackedExperts

__all__ = ["PackedExperts", "PackedGroupedLinear", "PackedLinear", "StackedExperts", "load"]
