"""What quantisers and the Hadamard transform need beyond `_simd`: bits of floats, e4m3 and e2m1, butterflies.

Values given to the roundings are finite and lie within the format's range, or round into it.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ._simd import _binary, _constant, _i32, _i64, _like, _shuffle

_i8 = ir.IntType(8)
_SIGN, _MAGNITUDE = 0x80000000, 0x7FFFFFFF
#         mantissa bits, exponent bias, the float32 whose unit is the format's least step
_FORMAT = {"e4m3": (3, 7, 2.0**14), "e2m1": (1, 1, 2.0**22)}


def _integers(builder, value):
    return builder.bitcast(value, _like(value.type, _i32))


def _floats(builder, value):
    return builder.bitcast(value, _like(value.type, ir.FloatType()))


def _split(builder, value):
    """Sign and magnitude as integers."""
    bits = _integers(builder, value)
    return builder.and_(bits, _constant(bits.type, _SIGN)), builder.and_(bits, _constant(bits.type, _MAGNITUDE))


def _is_small(builder, name, magnitude):
    """Whether a magnitude is subnormal in the format."""
    least = 128 - _FORMAT[name][1]
    return builder.icmp_signed("<", magnitude, _constant(magnitude.type, least << 23))


def _to_even(builder, name, magnitude):
    """The magnitude's bits with those that the format lacks rounded away, not yet cleared."""
    dropped = 23 - _FORMAT[name][0]
    odd = builder.and_(builder.lshr(magnitude, _constant(magnitude.type, dropped)), _constant(magnitude.type, 1))
    return builder.add(builder.add(magnitude, _constant(magnitude.type, (1 << dropped - 1) - 1)), odd)


def _encode(builder, name, value):
    """Codes, in integers of 32 bits."""
    mantissa, bias, magic = _FORMAT[name]
    sign, magnitude = _split(builder, value)
    kind = magnitude.type
    shifted = builder.lshr(_to_even(builder, name, magnitude), _constant(kind, 23 - mantissa))
    normal = builder.sub(shifted, _constant(kind, 127 - bias << mantissa))
    near = builder.fadd(_floats(builder, magnitude), _constant(value.type, magic))
    first = (int(math.log2(magic)) + 127) << 23
    small = builder.sub(_integers(builder, near), _constant(kind, first))
    code = builder.select(_is_small(builder, name, magnitude), small, normal)
    width = {"e4m3": 8, "e2m1": 4}[name]
    return builder.or_(code, builder.lshr(sign, _constant(kind, 32 - width)))


def _round(builder, name, value):
    """The format's nearest values, as float32."""
    mantissa, _, magic = _FORMAT[name]
    sign, magnitude = _split(builder, value)
    kept = _constant(magnitude.type, _MAGNITUDE & -(1 << 23 - mantissa))
    normal = builder.and_(_to_even(builder, name, magnitude), kept)
    step = _constant(value.type, magic)
    small = builder.fsub(builder.fadd(_floats(builder, magnitude), step), step)
    rounded = builder.select(_is_small(builder, name, magnitude), _integers(builder, small), normal)
    return _floats(builder, builder.or_(rounded, sign))


def _unary(operation):
    def typed(typingctx, a):
        def generate(context, builder, signature, arguments):
            return operation(builder, arguments[0])

        return a(a), generate

    return intrinsic(typed)


vmagnitude = _unary(lambda builder, a: _floats(builder, _split(builder, a)[1]))
vround_e4m3 = _unary(lambda builder, a: _round(builder, "e4m3", a))
vround_e2m1 = _unary(lambda builder, a: _round(builder, "e2m1", a))


def _larger(builder, a, b):
    left, right = _integers(builder, a), _integers(builder, b)
    return _floats(builder, builder.select(builder.icmp_signed(">", left, right), left, right))


vlarger = _binary(_larger)
"""The larger of two magnitudes by their bits: NaN counts as larger than infinity."""


@intrinsic
def vlargest_bits(typingctx, a):
    """The bits of the largest of a vector's magnitudes."""

    def generate(context, builder, signature, arguments):
        bits = _integers(builder, arguments[0])
        name = f"llvm.vector.reduce.smax.v{bits.type.count}i32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_i32, [bits.type]), name)
        return builder.call(function, [bits])

    return types.int32(a), generate


@intrinsic
def from_bits(typingctx, bits):
    """The float32 of an integer's low 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], _i32), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def to_bits(typingctx, value):
    """The bits of a float32 that is not negative."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], _i32), _i64)

    return types.int64(types.float32), generate


@intrinsic
def put_byte(typingctx, address, value):
    """Write the low byte of an integer."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        builder.store(builder.trunc(value, _i8), builder.inttoptr(address, ir.PointerType()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def vput_e4m3(typingctx, address, a):
    """Write the codes of a vector's lanes, a byte each."""

    def generate(context, builder, signature, arguments):
        code = _encode(builder, "e4m3", arguments[1])
        narrow = builder.trunc(code, _like(code.type, _i8))
        builder.store(narrow, builder.inttoptr(arguments[0], ir.PointerType()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, a), generate


@intrinsic
def vput_e2m1(typingctx, address, a):
    """Write the codes of a vector's lanes, two a byte, the first in the low half."""

    def generate(context, builder, signature, arguments):
        code = _encode(builder, "e2m1", arguments[1])
        half = code.type.count // 2
        low, high = (_shuffle(builder, code, code, range(i, 2 * half, 2)) for i in (0, 1))
        pair = builder.or_(low, builder.shl(high, _constant(high.type, 4)))
        narrow = builder.trunc(pair, _like(pair.type, _i8))
        builder.store(narrow, builder.inttoptr(arguments[0], ir.PointerType()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, a), generate


@intrinsic
def vbutterflies(typingctx, a):
    """Sums and differences of lanes 1 apart, then of those 2, 4, ... half a vector apart."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        lanes, element = value.type.count, value.type.element
        whole, top = (_i64, 63) if element == ir.DoubleType() else (_i32, 31)
        step = 1
        while step < lanes:
            other = _shuffle(builder, value, value, [lane ^ step for lane in range(lanes)])
            flips = ir.Constant(_like(value.type, whole), [(lane & step != 0) << top for lane in range(lanes)])
            signed = builder.bitcast(builder.xor(builder.bitcast(value, flips.type), flips), value.type)
            value = builder.fadd(other, signed)
            step *= 2
        return value

    return a(a), generate
