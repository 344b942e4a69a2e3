"""Checkpoints of narrow weights converted to BF16 (or FP8), or any to integers; verified, or loaded tensor by tensor.

`convert` writes a folder that transformers and others load as it is, within a bound of memory, and goes on after any
interruption; `verify` makes it again and compares; `load` yields named tensors. What is not safetensors is not read,
nothing is unpickled and no code of a checkpoint is run.
"""

from .conversion import NoSpace, Summary
from .documents import Refused
from .loading import load
from .runs import convert, verify
from .verification import Difference
from .work import Progress

__all__ = ["Difference", "NoSpace", "Progress", "Refused", "Summary", "convert", "load", "verify"]
