"""Wrong kernels, made by kind from right ones: what tired engineers and language models write, and how they cheat.

Each kind is a function from a right kernel to a wrong one, applied to some operators of two backends. The judge knows
nothing of them. Sources of the published ways to cheat a benchmark: the issues and write-ups of KernelBench, the field
guides of KernelArena and Makora, gpu-mode's exploits of its own harness (2025 and 2026).
"""

from . import cheats, gradients, shapes, state, values
from .making import KINDS, every, make

__all__ = ["KINDS", "cheats", "every", "gradients", "make", "shapes", "state", "values"]
