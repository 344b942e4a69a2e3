"""Small floats on the CPU: how they are written is one row of `FORMATS`, and everything here follows from it.

`vencode(tag, address, a)` and `vround(tag, a)` take the tags E4M3 and E2M1. Values given to them are finite and lie
within the format's range, or round into it. `decode_fp4` and `decode_fp8` look codes up among the results of a scale.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from flagops.backends.numba import features

from . import _ir
from ._ir import call, constant, floats, i8, i64, like, lookup, named, read, shuffle, storage, write


class Format:
    """A float of few bits: sign, exponent and mantissa; subnormals, no infinity.

    nan: whether all ones of the magnitude are NaN. floor: what a block's largest magnitude is taken for where it is
    less, so that its scale is no smaller.
    """

    def __init__(self, bits: int, mantissa: int, bias: int, *, signed: bool = True, nan: bool, floor: float = 0.0):
        self.bits, self.mantissa, self.bias, self.signed, self.nan = bits, mantissa, bias, signed, nan
        self.floor = np.float32(floor)

    @cached_property
    def values(self) -> Any:
        """float64 of every code."""
        code = np.arange(2**self.bits)
        magnitude = code & self.top if self.signed else code
        exponent, fraction = magnitude >> self.mantissa, magnitude % 2**self.mantissa
        small = (exponent == 0) & self.signed  # a format of scales has no zero
        value = (fraction + np.where(small, 0, 2**self.mantissa)) * np.exp2(
            np.where(small, 1.0, exponent) - self.bias - self.mantissa
        )
        value = np.where(self.nan & (magnitude == self.top), np.nan, value)
        return np.where(self.signed & (code > self.top), -value, value)

    @property
    def top(self) -> int:
        """The code of most magnitude, which a block that is not finite gets."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def full(self) -> int:
        """A byte of `top`."""
        return sum(self.top << place for place in range(0, 8, self.bits))

    @property
    def largest(self) -> float:
        return float(np.nanmax(self.values))

    @property
    def inverse(self) -> Any:
        """1 / largest in float32: a scale is the largest magnitude times this."""
        return np.float32(1 / self.largest)


FORMATS = {
    "e4m3": Format(8, 3, 7, nan=True, floor=1e-4),
    "e2m1": Format(4, 1, 1, nan=False, floor=6 * 2.0**-126),
    "e8m0": Format(8, 0, 127, signed=False, nan=True),
}
HALF, SINGLE = Format(16, 10, 15, nan=True), Format(32, 23, 127, nan=True)  # what codes are made of and into
INFINITY = (2**8 - 1) << SINGLE.mantissa
"""Bits of a float32; those of NaN are more."""
NO_SCALE = FORMATS["e8m0"].top
"""The code of the scale of a block that is not finite."""

(_E4M3, E4M3), (_E2M1, E2M1) = named("e4m3"), named("e2m1")


def _fact(name: str, kind: Any) -> Any:
    """A word that gives what a format says of itself."""

    def fact(typingctx, form):
        value = constant(storage(kind).memory, getattr(FORMATS[form.name], name))
        return kind(form), lambda context, builder, signature, arguments: value

    return intrinsic(fact)


floor, inverse = _fact("floor", types.float32), _fact("inverse", types.float32)
full, per_byte = _fact("full", types.int64), _fact("per_byte", types.int64)


def _is_small(builder, form, magnitude):
    """Whether a magnitude is subnormal in the format."""
    least = SINGLE.bias + 1 - form.bias
    return builder.icmp_signed("<", magnitude, constant(magnitude.type, least << SINGLE.mantissa))


def _magic(form):
    """The float32 whose unit is the format's least step."""
    return 2.0 ** (SINGLE.mantissa - form.mantissa + 1 - form.bias)


def _split(builder, value):
    """Sign and magnitude as integers."""
    both = _ir.bits(builder, value)
    top = constant(both.type, SINGLE.top)
    return builder.and_(both, builder.not_(top)), builder.and_(both, top)


def _to_even(builder, form, magnitude):
    """The magnitude's bits with those that the format lacks rounded away, not yet cleared."""
    dropped = SINGLE.mantissa - form.mantissa
    odd = builder.and_(builder.lshr(magnitude, constant(magnitude.type, dropped)), constant(magnitude.type, 1))
    return builder.add(builder.add(magnitude, constant(magnitude.type, (1 << dropped - 1) - 1)), odd)


def _encode(builder, form, value):
    """Codes, in integers of 32 bits."""
    sign, magnitude = _split(builder, value)
    kind, magic = magnitude.type, _magic(form)
    shifted = builder.lshr(_to_even(builder, form, magnitude), constant(kind, SINGLE.mantissa - form.mantissa))
    normal = builder.sub(shifted, constant(kind, SINGLE.bias - form.bias << form.mantissa))
    near = builder.fadd(floats(builder, magnitude), constant(value.type, magic))
    first = (int(math.log2(magic)) + SINGLE.bias) << SINGLE.mantissa
    small = builder.sub(_ir.bits(builder, near), constant(kind, first))
    code = builder.select(_is_small(builder, form, magnitude), small, normal)
    return builder.or_(code, builder.lshr(sign, constant(kind, SINGLE.bits - form.bits)))


def _round(builder, form, value):
    """The format's nearest values, as float32."""
    sign, magnitude = _split(builder, value)
    kept = constant(magnitude.type, SINGLE.top & -(1 << SINGLE.mantissa - form.mantissa))
    normal = builder.and_(_to_even(builder, form, magnitude), kept)
    step = constant(value.type, _magic(form))
    small = builder.fsub(builder.fadd(floats(builder, magnitude), step), step)
    chosen = builder.select(_is_small(builder, form, magnitude), _ir.bits(builder, small), normal)
    return floats(builder, builder.or_(chosen, sign))


@intrinsic
def vround(typingctx, tag, a):
    """The format's nearest values."""

    def generate(context, builder, signature, arguments):
        return _round(builder, FORMATS[tag.name], arguments[1])

    return a(tag, a), generate


@intrinsic
def vencode(typingctx, tag, address, a):
    """Write the codes of a vector's lanes: of four bits, two a byte, the first in the low half."""

    def generate(context, builder, signature, arguments):
        form = FORMATS[tag.name]
        code = _encode(builder, form, arguments[2])
        if form.bits == 4:
            half = code.type.count // 2
            low, high = (shuffle(builder, code, code, range(i, 2 * half, 2)) for i in (0, 1))
            code = builder.or_(low, builder.shl(high, constant(high.type, 4)))
        write(builder, builder.trunc(code, like(code.type, i8)), arguments[1])
        return context.get_dummy_value()

    return types.none(tag, types.int64, a), generate


def _interleave(builder, a, b):
    count = a.type.count
    return shuffle(builder, a, b, [lane for i in range(count) for lane in (i, count + i)])


@intrinsic
def decode_fp4(typingctx, codes, out, table, streaming, tag):
    """Write the 32 results for the 16 bytes at `codes`; streaming stores need `out` aligned to 16 bytes.

    `table` is the address of 16 results in the bits of `tag`.
    """

    def generate(context, builder, signature, arguments):
        codes, out, table, streaming, _ = arguments
        size = storage(tag).size
        packed = read(builder, ir.VectorType(i8, 16), codes)
        low, high = builder.and_(packed, constant(packed.type, 15)), builder.lshr(packed, constant(packed.type, 4))
        entries = read(builder, ir.VectorType(i8, 16 * size), table)
        planes = [shuffle(builder, entries, entries, range(byte, 16 * size, size)) for byte in range(size)]
        results = []
        for part in (range(8), range(8, 16)):
            index = shuffle(builder, low, high, [lane for i in part for lane in (i, 16 + i)])
            parts = [lookup(builder, plane, index) for plane in planes]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [_interleave(builder, *pair) for pair in zip(parts[:half], parts[half:], strict=True)]
            results += parts
        with builder.if_else(streaming) as branches:
            for branch, aligned in zip(branches, (16, 0), strict=True):
                with branch:
                    for i, result in enumerate(results):
                        write(builder, result, out, 16 * size * i, aligned)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.boolean, tag), generate


@intrinsic
def decode_fp8(typingctx, codes, out, count, table, streaming, tag):
    """Write the results for `count` sign-magnitude bytes; streaming stores need `out` aligned to 64 bytes.

    `table` is the address of the results of the 128 positive codes in the bits of `tag`.
    """

    def generate(context, builder, signature, arguments):
        codes, out, count, table, streaming, _ = arguments
        size = storage(tag).size
        whole_bits, lanes = ir.IntType(8 * size), 64 // size
        typ = ir.VectorType(whole_bits, lanes)
        permute = f"x86.avx512.vpermi2var.{'hi' if size == 2 else 'd'}.512"
        entries = [read(builder, typ, table, 64 * i) for i in range(128 // lanes)]

        def decode(start, aligned):
            code = builder.zext(read(builder, ir.VectorType(i8, lanes), codes, start), typ)
            pairs = zip(entries[::2], entries[1::2], strict=True)
            found = [call(builder, permute, low, code, high) for low, high in pairs]
            bit = 2 * lanes
            while len(found) > 1:
                zero = builder.icmp_unsigned("==", builder.and_(code, constant(typ, bit)), constant(typ, 0))
                found = [builder.select(zero, *pair) for pair in zip(found[::2], found[1::2], strict=True)]
                bit *= 2
            sign = builder.shl(builder.and_(code, constant(typ, 128)), constant(typ, 8 * size - 8))
            target = builder.add(out, builder.mul(start, i64(size)))
            write(builder, builder.xor(found[0], sign), target, 0, aligned)

        whole = i64(0)
        if "+avx512bw" in features():
            whole = builder.and_(count, i64(-lanes))
            with builder.if_else(streaming) as branches:
                for branch, aligned in zip(branches, (64, 0), strict=True):
                    with branch, cgutils.for_range_slice(builder, i64(0), whole, i64(lanes), inc=True) as (start, _):
                        decode(start, aligned)
        with cgutils.for_range_slice(builder, whole, count, i64(1), inc=True) as (i, _):
            code = builder.zext(read(builder, i8, codes, i), i64)
            result = read(builder, whole_bits, table, builder.mul(builder.and_(code, i64(127)), i64(size)))
            sign = builder.shl(builder.trunc(builder.and_(code, i64(128)), whole_bits), whole_bits(8 * size - 8))
            write(builder, builder.xor(result, sign), builder.add(out, builder.mul(i, i64(size))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.boolean, tag), generate
