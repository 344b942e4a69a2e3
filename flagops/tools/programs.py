"""What operators launch on chips that need not be here: kernels are called as dispatch calls them, and none runs."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from flagops import arrays, chips, registry
from flagops.operator import Operator

COMMON: Any = importlib.import_module("flagops.kernels.triton._common")


def described(chip: chips.Chip) -> tuple[GPUTarget, Any]:
    """A chip to Triton's compiler, and to the kernels' wrappers."""
    if chip.target.startswith("sm_"):
        return GPUTarget("cuda", int(chip.target[3:]), chip.width), COMMON.Chip.of(chip)
    return GPUTarget("hip", chip.target, chip.width), COMMON.Chip.of(chip)


CHIPS = {
    chip.target: chip for chip in reversed(chips.CHIPS) if chip.target.startswith(("sm_", "gfx")) and chip.processors
}
"""The first chip of each target that Triton may compile for."""


@cache
def _kernel(name: str) -> registry.Kernel:
    op, module = registry.operator(name), importlib.import_module(registry.home(name, "triton"))
    return registry.describe(op, getattr(module, op.function), module)


def ready(op: Operator, made: Sequence[Any]) -> Callable[[], None] | None:
    """What launches the kernels of a call with these inputs; None where its kernel does not take them."""
    bound = op.bind(op.fill(tuple(made), {}))
    coded = {op.positions[name] for name, tensor in op.tensors.items() if tensor.codes}
    outs = [torch.empty(s, dtype=getattr(torch, d)) for s, d in zip(bound.shapes, bound.results, strict=True)]
    made = [arrays.codes(x) if at in coded and x is not None else x for at, x in enumerate(made)]
    outs = [arrays.codes(x) if at in op.coded_results else x for at, x in enumerate(outs)]
    kernel = _kernel(op.name)
    if kernel.unsupported and kernel.unsupported(*made):
        return None
    return lambda: kernel.function(*made, tuple(outs) if op.several else outs[0])


def zeros(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with nothing in it: memory that is never touched is none, and torch.zeros touches it."""
    count = math.prod(shape)
    raw = np.zeros(max(count, 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype)[:count].reshape(tuple(shape))


class Program(NamedTuple):
    """What Triton compiles for one launch, with types, constants and options as it has found them itself."""

    source: ASTSource
    target: GPUTarget
    options: Any

    @property
    def kernel(self) -> str:
        return f"{self.source.fn.__module__.rpartition('.')[2]}.{self.source.fn.__name__}"

    @property
    def key(self) -> tuple[str, ...]:
        """Programs of one key are one program."""
        return self.source.hash(), str(self.target), self.options.hash()

    @property
    def parameters(self) -> dict[str, str]:
        """Each parameter's type, ``16|`` before it where it is divisible by 16, or ``=`` and its value if constant."""
        names = {(at,): name for at, name in enumerate(self.source.signature)}
        divided = {path for path, found in self.source.attrs.items() if ["tt.divisibility", 16] in found}
        return {
            name: f"={self.source.constants[path]}" if path in self.source.constants
            else f"{'16|' * (path in divided)}{self.source.signature[name]}"
            for path, name in names.items()
        }  # fmt: skip

    def compiled(self) -> Any:
        """As Triton's launch does it, from its cache or anew."""
        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


class Absent:
    """Stands for the driver of a chip that is not here, as far as a launch asks it before it runs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> GPUTarget:
        """Kernels keep what they know of a target by the device."""
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def standing_in(chip: chips.Chip) -> Iterator[None]:
    """Triton and the kernels' wrappers believe to be on a chip. Their launches fail at the driver, which is none."""
    target, measure = described(chip)
    driver = triton.runtime.driver
    before, driver._active, COMMON.pretended = driver._active, Absent(target), measure
    try:
        yield
    finally:
        driver._active, COMMON.pretended = before, None


@contextlib.contextmanager
def asked_for(chip: chips.Chip) -> Iterator[list[Program]]:
    """The programs that launches made within would need on a chip; none is compiled or runs.

    What Triton hands to its compiler is taken where it does so, after its own specialisation.
    """
    programs: list[Program] = []

    def note(
        kernel: JITFunction, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, *_: Any
    ) -> None:
        programs.append(Program(ASTSource(kernel, signature, constants, attrs), device, options))

    original, JITFunction._do_compile = JITFunction._do_compile, note
    try:
        with standing_in(chip):
            yield programs
    finally:
        JITFunction._do_compile = original
