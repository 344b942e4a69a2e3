"""The words of numba kernels: loads and stores by dtype, and arithmetic on whole vectors.

`load(tag, address)` gives a scalar and `vload(tag, address)` a vector of `lanes(tag)` elements; halves are computed
with as float32, everything else as itself, and `store` and `vstore` round to nearest even. A comparison of
vectors is a mask, one of bool; a number beside a vector is repeated in every lane, in the vector's dtype. Nothing is
contracted: `a * b + c` is rounded twice, `fma(a, b, c)` once, so that a kernel's text decides its bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model, type_callable

from flagops.backends._numba_internals import Conversion, signature, unliteral

from . import _ir
from ._ir import LANES as LANES
from ._ir import TAGS as TAGS
from ._ir import Kind, constant, generic, storage

FLOAT32, INT32, BYTE = np.float32(0), np.int32(0), np.uint8(0)


class Vector(types.Type):
    """A register of elements; a numba type that lives inside kernels only."""

    def __init__(self, element: Kind, lanes: int = 0) -> None:
        self.element = element
        self.lanes = lanes or _ir.lanes_of(element)
        super().__init__(f"vector({self.lanes} x {element})")

    def can_convert_from(self, typingctx, other):
        return Conversion.unsafe if isinstance(other, (types.Number, types.Boolean)) else None

    @property
    def mask(self) -> Vector:
        return Vector(types.boolean, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(_ir.register(vector.element), vector.lanes))


def _arithmetic(tag):
    return storage(unliteral(tag)).arithmetic


@intrinsic
def lanes(typingctx, tag):
    """Elements in a vector."""
    count = Vector(_arithmetic(tag)).lanes
    return types.int64(tag), lambda context, builder, signature, arguments: _ir.i64(count)


@intrinsic
def size(typingctx, tag):
    """Bytes of an element in memory."""
    count = storage(tag).size
    return types.int64(tag), lambda context, builder, signature, arguments: _ir.i64(count)


@intrinsic
def wide(typingctx, tag):
    """The tag of the arithmetic dtype, which is its zero."""
    element = _arithmetic(tag)
    return element(tag), lambda context, builder, signature, arguments: constant(_ir.register(element), 0)


@intrinsic
def cast(typingctx, tag, value):
    """A number in the arithmetic dtype of a tag."""
    result = _arithmetic(tag)

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], value, result)

    return result(tag, value), generate


@intrinsic
def load(typingctx, tag, address):
    """The element at an address."""

    def generate(context, builder, signature, arguments):
        return _ir.load(builder, tag, arguments[1])

    return _arithmetic(tag)(tag, types.int64), generate


@intrinsic
def store(typingctx, tag, address, value):
    """Round a scalar to the tag's dtype and write it."""

    def generate(context, builder, signature, arguments):
        _ir.store(builder, tag, arguments[2], arguments[1])
        return context.get_dummy_value()

    return types.none(tag, types.int64, _arithmetic(tag)), generate


@intrinsic
def vload(typingctx, tag, address):
    """A vector of elements at an address of any alignment."""
    vector = Vector(_arithmetic(tag))

    def generate(context, builder, signature, arguments):
        return _ir.load(builder, tag, arguments[1], lanes=vector.lanes)

    return vector(tag, types.int64), generate


@intrinsic
def vload_mask(typingctx, tag, address):
    """Which of the bytes at an address are not 0, as many as a vector of the tag has lanes."""
    vector = Vector(_arithmetic(tag))

    def generate(context, builder, signature, arguments):
        found = _ir.read(builder, ir.VectorType(_ir.i8, vector.lanes), arguments[1])
        return builder.icmp_signed("!=", found, constant(found.type, 0))

    return vector.mask(tag, types.int64), generate


@intrinsic
def below(typingctx, tag, count):
    """The lanes of a vector of the tag whose numbers are less than a count."""
    vector = Vector(_arithmetic(tag))

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(_ir.i32, vector.lanes)
        most = builder.trunc(arguments[1], _ir.i32)
        numbers = ir.Constant(kind, list(range(vector.lanes)))
        return builder.icmp_signed("<", numbers, _ir.splat(builder, most, vector.lanes))

    return vector.mask(tag, types.int64), generate


@intrinsic
def vload_one(typingctx, tag, address):
    """The element at an address as a vector of one lane: a formula of it has the bits that it has in whole vectors,
    where numba would compute a scalar float32 times 0.5 in float64, and an int8 in int64."""
    vector = Vector(_arithmetic(tag), 1)

    def generate(context, builder, signature, arguments):
        return _ir.load(builder, tag, arguments[1], lanes=1)

    return vector(tag, types.int64), generate


@intrinsic
def vstore(typingctx, tag, address, value):
    """Round a vector to the tag's dtype and write it."""

    def generate(context, builder, signature, arguments):
        _ir.store(builder, tag, arguments[2], arguments[1])
        return context.get_dummy_value()

    return types.none(tag, types.int64, Vector(_arithmetic(tag), value.lanes)), generate


@intrinsic
def fence(typingctx):
    """Order streaming stores before whatever tells another thread that they are done."""

    def generate(context, builder, signature, arguments):
        if _ir.X86:
            _ir.call(builder, "x86.sse.sfence", result=ir.VoidType())
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def load_index(typingctx, address, size):
    """The signed integer of 4 or 8 bytes at an address: which, is known to a call, not to its compiled code."""

    def generate(context, builder, signature, arguments):
        address, size = arguments
        with builder.if_else(builder.icmp_signed("==", size, _ir.i64(8))) as (then, otherwise):
            with then:
                long = builder.load(_ir.pointer(builder, address), align=4, typ=_ir.i64)
                first = builder.block
            with otherwise:
                short = builder.load(_ir.pointer(builder, address), align=4, typ=_ir.i32)
                extended = builder.sext(short, _ir.i64)
                second = builder.block
        result = builder.phi(_ir.i64)
        result.add_incoming(long, first)
        result.add_incoming(extended, second)
        return result

    return types.int64(types.int64, types.int64), generate


@intrinsic
def vsplat(typingctx, value):
    """A vector of one number repeated."""
    vector = Vector(value)

    def generate(context, builder, signature, arguments):
        return _ir.splat(builder, arguments[0], vector.lanes)

    return vector(value), generate


@lower_cast(types.Number, Vector)
@lower_cast(types.Boolean, Vector)
def _repeat(context, builder, number, vector, value):
    return _ir.splat(builder, context.cast(builder, value, number, vector.element), vector.lanes)


def _common(*kinds: Kind) -> Kind | None:
    """What arguments are brought to: the vector among them, or where all are numbers, the one type of all."""
    found = {kind for kind in kinds if isinstance(kind, Vector)} or set(map(unliteral, kinds))
    return found.pop() if len(found) == 1 else None


def choose(kind: Kind, of_floats: Any, of_signed: Any, of_unsigned: Any) -> Any:
    """What suits an element or a vector's elements; bool is among the unsigned."""
    element = getattr(kind, "element", kind)
    if isinstance(element, types.Float):
        return of_floats
    return of_signed if getattr(element, "signed", False) else of_unsigned


Emit = Callable[..., Any]
"""What a word emits: of the builder, the numba type that the values are brought to, and the values."""


def _give(sign: Any, arity: int, emit: Callable[[Kind], Any], mask: bool = False) -> None:
    """Give Python's operator a meaning for the vectors for which `emit` has one; a `mask` is what it makes."""

    def typer(*kinds):
        vector = _common(*kinds)
        if not isinstance(vector, Vector) or emit(vector) is None:
            return None
        return signature(vector.mask if mask else vector, *[vector] * len(kinds))

    def lower(context, builder, signature, arguments):
        return emit(signature.args[0])(builder, *arguments)

    # numba reads the parameters of a typer
    type_callable(sign)(lambda context: (lambda a: typer(a)) if arity == 1 else lambda a, b: typer(a, b))
    lower_builtin(sign, *[Vector] * arity)(lower)


# An operator's name in Python; the builder's instruction for floats, for signed and for unsigned integers.
_ARITHMETIC = (
    ("add", "fadd", "add", "add"), ("sub", "fsub", "sub", "sub"), ("mul", "fmul", "mul", "mul"),
    ("truediv", "fdiv", None, None), ("and_", None, "and_", "and_"), ("or_", None, "or_", "or_"),
    ("xor", None, "xor", "xor"), ("lshift", None, "shl", "shl"), ("rshift", None, "ashr", "lshr"),
    ("neg", "fneg", "neg", "neg"), ("invert", None, "not_", "not_"),
)  # fmt: skip
for _name, *_instructions in _ARITHMETIC:

    def _instruction(kind: Kind, names: Any = tuple(_instructions)) -> Emit | None:
        name = choose(kind, *names)
        return name and (lambda builder, *values: getattr(builder, name)(*values))

    _unary = _name in ("neg", "invert")
    for _sign in (_name,) if _unary else (_name, f"i{_name.strip('_')}"):
        _give(getattr(operator, _sign), 1 if _unary else 2, _instruction)

for _name, _predicate in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():

    def _compared(kind: Kind, predicate: str = _predicate) -> Emit:
        of_floats = "fcmp_unordered" if predicate == "!=" else "fcmp_ordered"  # NaN differs from all, and is not less
        name = choose(kind, of_floats, "icmp_signed", "icmp_unsigned")
        return lambda builder, a, b: getattr(builder, name)(predicate, a, b)

    _give(getattr(operator, _name), 2, _compared, mask=True)


def _magnitude(kind: Kind) -> Emit:
    return choose(
        kind,
        lambda builder, a: generic(builder, "fabs", a),
        lambda builder, a: generic(builder, "abs", a, _ir.i1(0)),
        lambda builder, a: a,
    )


_give(abs, 1, _magnitude)


def word(arity: int, result: Callable[[Kind], Kind | None] = lambda kind: kind) -> Callable[[Emit], Any]:
    """A word of vectors, numbers among them repeated, or of scalars of one type; written as what it emits. There is
    none for a type of which `result` is None."""

    def made(emit: Emit) -> Any:
        def typed(*kinds):
            kind = _common(*kinds)
            given = result(kind) if kind else None

            def generate(context, builder, signature, arguments):
                return emit(builder, kind, *arguments)

            return (given(*[kind] * len(kinds)), generate) if given else None

        shapes = (lambda c, a: typed(a), lambda c, a, b: typed(a, b), lambda c, a, b, d: typed(a, b, d))
        chosen = shapes[arity - 1]
        chosen.__name__, chosen.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(chosen)

    return made


@word(3)
def fma(builder, kind, a, b, c):
    """a * b + c rounded once, where the processor can."""
    return _ir.fma(builder, a, b, c)


@word(2)
def maximum(builder, kind, a, b):
    """The greater of each lane; NaN if either is."""
    return generic(builder, choose(kind, "maximum", "smax", "umax"), a, b)


@word(2)
def minimum(builder, kind, a, b):
    """The less of each lane; NaN if either is."""
    return generic(builder, choose(kind, "minimum", "smin", "umin"), a, b)


@word(2)
def higher(builder, kind, a, b):
    """The greater of each lane in one instruction, `b` where either is NaN: for what is looked through for the highest
    from a number on, and shows its NaN elsewhere."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@word(1)
def sqrt(builder, kind, a):
    return generic(builder, "sqrt", a)


@intrinsic
def where(typingctx, mask, yes, no):
    """Lanes of `yes` where the mask is true, else of `no`; of scalars of one type, one of the two."""
    numbers = not isinstance(yes, Vector) and not isinstance(no, Vector)
    kind = Vector(unliteral(yes), mask.lanes) if numbers and isinstance(mask, Vector) else _common(yes, no)

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return (kind(mask, kind, kind), generate) if kind else None


def _bits_of(kind):
    element = {32: types.int32, 64: types.int64}[getattr(kind, "element", kind).bitwidth]
    return Vector(element, kind.lanes) if isinstance(kind, Vector) else element


@word(1, _bits_of)
def bits(builder, kind, a):
    """The bits of floats, as signed integers."""
    return _ir.bits(builder, a)


@intrinsic
def from_bits(typingctx, tag, integer):
    """The float of the low bits of an integer, in the arithmetic dtype of a tag."""
    element = _arithmetic(tag)

    def generate(context, builder, signature, arguments):
        return _ir.floats(builder, arguments[1])

    if isinstance(integer, Vector):
        return Vector(element, integer.lanes)(tag, integer), generate
    return element(tag, _bits_of(element)), generate


@intrinsic
def rounded(typingctx, tag, a):
    """Each lane, or a scalar, rounded to the tag's dtype and widened again."""

    def generate(context, builder, signature, arguments):
        return storage(tag).widen(builder, storage(tag).narrow(builder, arguments[1]))

    return a(tag, a), generate


@word(1, lambda kind: kind.element)
def vsum(builder, kind, a):
    """The sum of a vector's lanes, in a fixed tree."""
    add = choose(kind, builder.fadd, builder.add, builder.add)
    while a.type.count > 1:
        half = a.type.count // 2
        low, high = (_ir.shuffle(builder, a, a, range(i, i + half)) for i in (0, half))
        a = add(low, high)
    return builder.extract_element(a, _ir.i32(0))


@word(1, lambda kind: kind.element)
def vhighest(builder, kind, a):
    """The largest of a vector's lanes; NaN if any is."""
    name = choose(kind, "fmaximum", "smax", "umax")
    return generic(builder, f"vector.reduce.{name}", a, result=a.type.element)


@word(1, lambda kind: kind.element)
def vhigher(builder, kind, a):
    """The largest of a vector's lanes by `higher`."""
    while a.type.count > 1:
        half = a.type.count // 2
        low, high = (_ir.shuffle(builder, a, a, range(i, i + half)) for i in (0, half))
        a = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(a, _ir.i32(0))


@word(1)
def vswap(builder, kind, a):
    """Neighbouring lanes exchanged."""
    return _ir.shuffle(builder, a, a, [lane ^ 1 for lane in range(a.type.count)])


@word(1)
def vbutterflies(builder, kind, a):
    """Sums and differences of lanes 1 apart, then of those 2, 4, ... half a vector apart."""
    count, whole = a.type.count, _ir.bits(builder, a).type
    step = 1
    while step < count:
        other = _ir.shuffle(builder, a, a, [lane ^ step for lane in range(count)])
        top = whole.element.width - 1
        flips = ir.Constant(whole, [(lane & step != 0) << top for lane in range(count)])
        a = builder.fadd(other, _ir.floats(builder, builder.xor(_ir.bits(builder, a), flips)))
        step *= 2
    return a


@intrinsic
def ordered(typingctx, a):
    """A number as an integer of the same order: -0 equals 0, and NaN comes before every number."""
    if not isinstance(a, types.Float):
        return types.int64(a), lambda context, builder, signature, arguments: context.cast(
            builder, arguments[0], a, types.int64
        )

    def generate(context, builder, signature, arguments):
        value = builder.fadd(arguments[0], constant(arguments[0].type, 0.0))  # -0 becomes 0
        integer = _ir.bits(builder, value)
        kind = integer.type
        sign = builder.ashr(integer, kind(kind.width - 1))
        number = builder.xor(integer, builder.lshr(sign, kind(1)))
        least = kind(1 - 2 ** (kind.width - 1))
        key = builder.select(builder.fcmp_unordered("uno", value, value), least, number)
        return builder.sext(key, _ir.i64) if kind == _ir.i32 else key

    return types.int64(a), generate


@intrinsic
def transpose(typingctx, tag, source, ld, goal, target, target_ld):
    """Rows of one vector's elements, as many as that, to columns, of another tag; leading dimensions in elements."""
    count = Vector(_arithmetic(tag)).lanes

    def generate(context, builder, signature, arguments):
        _, source, ld, _, target, target_ld = arguments
        rows = [_ir.load(builder, tag, source, builder.mul(ld, _ir.i64(i)), count) for i in range(count)]
        span = 1
        while span < count:
            low = [i if not i & span else count + i - span for i in range(count)]
            high = [i + span if not i & span else count + i for i in range(count)]
            for i in range(count):
                if not i & span:
                    pair = rows[i], rows[i + span]
                    rows[i], rows[i + span] = (_ir.shuffle(builder, *pair, order) for order in (low, high))
            span *= 2
        for i, row in enumerate(rows):
            _ir.store(builder, goal, row, target, builder.mul(target_ld, _ir.i64(i)))
        return context.get_dummy_value()

    i = types.int64
    return types.none(tag, i, i, goal, i, i), generate
