"""`flagops.enable`: kernels of ours under torch's own operators, and what became of each call."""

from .fuel import spent
from .handle import COMPILED, UNSEEN, WATCHED, Handle, enable

__all__ = ["COMPILED", "UNSEEN", "WATCHED", "Handle", "enable", "spent"]
