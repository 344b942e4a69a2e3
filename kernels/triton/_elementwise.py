# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Each element of a result from one of each operand: one kernel for all of them, bound by memory.

A program has a block of elements in the order in which the result lies. Axes are merged as far as strides allow, so
what lies side by side is loaded by whole vectors and no index is divided; where axes are left, their number is known to
the compiler.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flagops.arrays import is_number

from .._rows import merged, spread
from ._common import LONGEST, keeping_subnormals, launch, narrow, widen

BLOCK = 1024
NUMBERS = 5
"""The most operands and scalars that a lane takes."""
TYPES = {
    "bool": tl.int1, "int8": tl.int8, "uint8": tl.uint8, "int16": tl.int16, "int32": tl.int32, "int64": tl.int64,
    "float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32, "float64": tl.float64,
}  # fmt: skip


@triton.jit
def cast(x, dtype: tl.constexpr):
    """In another dtype as x86 has it: halves through float32; integers cut off in 32 bits (64 for int64), whose low
    ones narrower ones take, and the least where it does not fit or is NaN."""
    if x.dtype == dtype:
        made = x
    elif dtype == tl.int1:
        made = widen(x) != 0
    elif dtype.is_floating():
        if dtype.primitive_bitwidth > 16:
            made = widen(x).to(dtype)
        else:
            made = narrow(widen(x).to(tl.float32), dtype)
    elif x.dtype.is_floating():
        value = widen(x)
        if dtype == tl.int64:
            made = tl.where((value >= -(2.0**63)) & (value < 2.0**63), value, -(2.0**63)).to(tl.int64)
        else:
            made = tl.where((value >= -(2.0**31)) & (value < 2.0**31), value, -(2.0**31)).to(tl.int32).to(dtype)
    else:
        made = x.to(dtype)
    return made


@triton.jit
def number(bits, dtype: tl.constexpr):
    """A number of the host's from 64 bits: those of an int64, or of the float64 that a float is."""
    bits = tl.cast(bits, tl.int64)
    if dtype.is_floating():
        bits = bits.to(tl.float64, bitcast=True)
    return cast(bits, dtype)


@triton.jit
def offset(at, sizes, steps):
    """Where elements lie by their numbers; sizes and steps of axes from the innermost on."""
    place = at.to(tl.int64) * 0
    for axis in tl.static_range(len(steps)):
        if axis < len(steps) - 1:
            place += (at % sizes[axis]).to(tl.int64) * steps[axis]
            at = at // sizes[axis]
        else:
            place += at.to(tl.int64) * steps[axis]
    return place


@triton.jit
def numbered(count, BLOCK: tl.constexpr, LONG: tl.constexpr, PIECE=0):
    """The numbers of a program's elements, and which of them there are."""
    program = tl.program_id(0)
    if LONG:
        program = program.to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4"])
def elementwise_kernel(
    out, operands, n0, n1, n2, n3, n4, sizes, out_steps, steps, count,
    LANE: tl.constexpr, KINDS: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An operand that is None is a number, of which a tuple would be specialised for the values."""
    numbers = (n0, n1, n2, n3, n4)
    at, here = numbered(count, BLOCK, LONG)
    values = ()
    for i in tl.static_range(len(operands)):
        if operands[i] is None:
            value = number(numbers[i], KINDS[i])
        else:
            value = cast(tl.load(operands[i] + offset(at, sizes, steps[i]), here, other=0), KINDS[i])
        values += (value,)  # type: ignore[assignment]
    tl.store(out + offset(at, sizes, out_steps), cast(LANE(*values), out.dtype.element_ty), here)


def elementwise(lane: Any, out: torch.Tensor, operands: Sequence[Any], kinds: Sequence[str]) -> None:
    """Compute `out` from operands that broadcast to it, tensors or numbers, each brought to its kind."""
    count = out.numel()
    if not count:
        return
    given = [bits(x, kind) for x, kind in zip(operands, kinds, strict=True)]
    sizes, (out_steps, *steps) = axes(out, *(x for x in given if isinstance(x, torch.Tensor)))
    launch(
        elementwise_kernel, (triton.cdiv(count, BLOCK),), out.device, out,
        tuple(x if isinstance(x, torch.Tensor) else None for x in given),
        *(0 if isinstance(x, torch.Tensor) else x for x in given), *(0,) * (NUMBERS - len(given)), sizes, out_steps,
        tuple(steps.pop(0) if isinstance(x, torch.Tensor) else None for x in given), count,
        LANE=lane, KINDS=tuple(TYPES[kind] for kind in kinds), LONG=count > LONGEST, BLOCK=BLOCK, num_warps=4,
        **keeping_subnormals(out.device),
    )  # fmt: skip


def axes(out: torch.Tensor, *tensors: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of all axes but the outermost, and every tensor's steps of all, from the innermost on."""
    rank = out.dim()
    sizes, steps = merged(tuple(out.shape), [spread(tuple(x.shape), x.stride(), rank, 0) for x in (out, *tensors)])
    return tuple(sizes[:0:-1]), [tuple(step[::-1]) for step in steps]


def bits(x: Any, kind: str) -> Any:
    """A number, or a tensor of one number in the host's memory, as `number` reads it; other tensors as they are."""
    if isinstance(x, torch.Tensor):
        if not is_number(x):
            return x
        x = x.as_strided((), ()).to(getattr(torch, kind)).item()
    return int(np.float64(x).view(np.int64)) if "float" in kind else int(x)
