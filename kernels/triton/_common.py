# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What the Triton kernels share: launching on a tensor's own device, exact casts, and the device's measure."""

import threading
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from flagops import chips, config

from ._older import rewritten

INTERPRET = tl.constexpr(config.interpreting())
"""The interpreter multiplies raw bits of bfloat16 in ``dot`` and truncates float32 to bfloat16; the helpers do not."""

LOG2E = tl.constexpr(1.4426950408889634)

OLDER = not hasattr(tl, "tuple")
"""Before Triton 3.3 kernels are rewritten: see `_older`."""

LONGEST = 2**31 - 4096
"""The longest axis whose positions the kernels count in 32 bits; offsets in memory always have 64."""

_interpreter = threading.RLock()  # it patches triton.language while a kernel runs


@triton.jit
def widen(x):
    """A half as the float32 of the same value; float32 and float64 as they are."""
    if INTERPRET and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif (x.dtype == tl.float16) | (x.dtype == tl.bfloat16):  # `or` of these is newer than Triton 3.2, for Ascend
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round an accumulator to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = bits >> 16
        rounded = (bits.to(tl.int64) + 0x7FFF + (kept & 1)) >> 16
        x = tl.where(x == x, rounded.to(tl.uint32), kept | 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """``acc + a @ b`` in the accumulator's precision; tensor cores take halves as they are, and no wide integers."""
    if a.dtype.is_int():
        a, b = a.to(acc.dtype), b.to(acc.dtype)
        acc += tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        if INTERPRET:
            a, b = widen(a), widen(b)
        acc = tl.dot(a, b, acc, input_precision=precision, out_dtype=acc.dtype)
    return acc


@triton.jit
def attend(score, value, top, total, acc, precision: tl.constexpr):
    """A block of keys in an online softmax: the highest score so far, the sum, that of the values; -inf hides a key."""
    higher = tl.maximum(top, tl.max(score, 1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2((top - origin) * LOG2E)
    p = tl.exp2((score - origin[:, None]) * LOG2E)
    total = total * fade + tl.sum(p, 1)
    acc = dot(narrow(p, value.dtype), value, acc * fade[:, None], precision)
    return higher, total, acc


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors, on that device's current stream."""
    if OLDER:
        kernel, options = rewritten(kernel, arguments, options)
        arguments = ()
    if INTERPRET.value:
        with _interpreter, np.errstate(all="ignore"):
            kernel[grid](*arguments, **options)
        return
    run = kernel[grid]
    if config.current().jit == "error":
        from flagops.backends._built import only_compiled

        run = only_compiled(kernel, grid)
    module = torch.get_device_module(device)
    if device.index is None or device.index == module.current_device():
        run(*arguments, **options)
    else:
        with module.device(device):
            run(*arguments, **options)


class Chip(NamedTuple):
    """What launches are shaped by.

    kind: the column of the tile tables: ``"hip"`` on AMD, ``"radeon"`` where its warps have 32 threads and each operand
    of its matrix instructions lies in registers twice, ``"cuda"`` elsewhere and under the interpreter.
    processors: programs that run at once; 1 under the interpreter, where splitting a sum gains nothing.
    shared: bytes on the chip that one program may take.
    converts: whether FP8 becomes float16 by an instruction.
    warps: whether programs run in warps, which keep in registers what they compute; else all lies on the chip.
    direct: whether matrix units read operands where they wait on the chip; else these take registers too.
    """

    kind: str
    processors: int
    shared: int
    converts: bool
    warps: bool = True
    direct: bool = False

    @classmethod
    def of(cls, known: chips.Chip) -> "Chip":
        """A GPU of the table."""
        processors, shared = known.processors or 1, known.shared or chips.LEAST_SHARED
        if known.target.startswith("sm_"):
            direct = {"wgmma", "tcgen05"} & set(known.matrix or ())
            return cls("cuda", processors, shared, int(known.target[3:]) >= 89, direct=bool(direct))
        return cls("radeon" if known.width == 32 else "hip", processors, shared, False)


pretended: Chip | None = None
"""Stands for every device, to see what would be launched on a chip that is not here."""


def chip(device: torch.device) -> Chip:
    return pretended or _measured(device)


@cache
def _measured(device: torch.device) -> Chip:
    if device.type == "cpu":
        return Chip("cuda", 1, 227 << 10, False)
    if device.type != "cuda":
        return Chip("cuda", 1, chips.shared(device.type), False, chips.warps(device.type))
    properties = torch.cuda.get_device_properties(device)
    processors = int(properties.multi_processor_count)
    if torch.version.hip:
        known = chips.by_target(properties.gcnArchName.partition(":")[0])
        kind = "radeon" if properties.warp_size == 32 else "hip"
        return Chip(kind, processors, known.shared if known and known.shared else chips.LEAST_SHARED, False)
    shared = int(getattr(properties, "shared_memory_per_block_optin", chips.LEAST_SHARED))
    capability = torch.cuda.get_device_capability(device)
    known = chips.by_target("sm_{}{}".format(*capability))
    direct = bool(known and Chip.of(known).direct)
    return Chip("cuda", processors, shared, capability >= (8, 9), direct=direct)


def keeping_subnormals(device: torch.device) -> dict[str, Any]:
    """Options of a launch under which NVIDIA's library does not flush subnormals; others have no such option."""
    on = pretended.kind if pretended else "cuda" if device.type == "cuda" and not torch.version.hip else ""
    return {"enable_reflect_ftz": False} if on == "cuda" else {}


def precision() -> str:
    """How float32 operands are multiplied: IEEE unless torch was told that TF32 will do."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def too_long(*tensors: torch.Tensor) -> str | None:
    longest = max(max(tensor.shape, default=0) for tensor in tensors)
    return f"an axis of {longest} elements; at most {LONGEST} can be counted" if longest > LONGEST else None
