"""What the indexer needs beyond `_simd`: a relu, scores as integers of the same order, integer stores."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._simd import _constant, _i32, _i64, _pointer


@intrinsic
def vrelu(typingctx, a):
    """The greater of each lane and 0; NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        zero = _constant(arguments[0].type, 0.0)
        return builder.select(builder.fcmp_ordered("<", arguments[0], zero), zero, arguments[0])

    return a(a), generate


@intrinsic
def ordered(typingctx, a):
    """A float as an integer of the same order: -0 equals 0, and NaN comes before every number."""

    def generate(context, builder, signature, arguments):
        kind = _i32 if a is types.float32 else _i64
        value = builder.fadd(arguments[0], ir.Constant(arguments[0].type, 0.0))  # -0 becomes 0
        bits = builder.bitcast(value, kind)
        sign = builder.ashr(bits, kind(kind.width - 1))
        number = builder.xor(bits, builder.lshr(sign, kind(1)))
        least = kind(1 - 2 ** (kind.width - 1))
        key = builder.select(builder.fcmp_unordered("uno", value, value), least, number)
        return builder.sext(key, _i64) if kind is _i32 else key

    return types.int64(a), generate


@intrinsic
def store_index(typingctx, address, value):
    """Write an integer as an int32."""

    def generate(context, builder, signature, arguments):
        builder.store(builder.trunc(arguments[1], _i32), _pointer(builder, arguments[0], 0, ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate
