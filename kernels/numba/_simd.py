"""Vectors and matrix tiles for numba kernels, emitted as LLVM IR.

Addresses are int64. A *tag* is a scalar whose numba type names the dtype in memory: float32, float64, uint16 (bfloat16)
or int16 (float16); arithmetic is float32, or float64 for the float64 tag. `load(tag, address)` gives a scalar and
`vload(tag, address)` a vector of `lanes(tag)` elements; `store`, `vstore`, `vstream` round to nearest even.

The tiles take row-major blocks with leading dimensions in elements and mask nothing: the caller pads.
`outer_tile(tag, a, lda, b, ldb, k, c, ldc, add)`: C[OUTER_ROWS, OUTER_VECTORS * lanes] = A[.., k] B[k, ..], plus C if
add, each sum in the order of k. `dot_tile(tag, x, ldx, w, ldw, rows, k, c, ldc, add)`: C[DOT_ROWS, DOT_WIDTH] =
X[.., k] W[rows <= DOT_COLUMNS, k]^T, plus C if add; zero past DOT_COLUMNS, W's last row repeated past `rows`; k is a
multiple of lanes. `outer_row`, `dot_row` do one row, ROW_VECTORS * lanes or DOT_ROW_COLUMNS wide, with the same sums.
A, X and C are in the arithmetic dtype, B and W in the tag's: a bfloat16 matrix used once is widened in registers (pass
`wide(tag)` for a B or W widened before).
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from flagops.backends.numba import features

_X86 = "+sse2" in features()
_FUSED = not _X86 or "+fma" in features()
_MANY = not _X86 or "+avx512f" in features()  # 32 registers rather than 16
LANES = 16 if "+avx512f" in features() else 8 if "+avx" in features() else 4
OUTER_ROWS, OUTER_VECTORS, ROW_VECTORS = 6, 4 if _MANY else 2, 8
DOT_ROWS, DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_WIDTH = (4, 6, 8, 8) if _MANY else (3, 4, 8, 8)

_i16, _i32, _i64 = (ir.IntType(bits) for bits in (16, 32, 64))
_SIZE = {ir.DoubleType(): 8, ir.FloatType(): 4, ir.HalfType(): 2, _i16: 2}
_MEMORY = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint16: _i16,
    types.int16: ir.HalfType(),
}


class Vector(types.Type):
    """A register of `lanes` floats; a numba type that lives inside kernels only."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        self.lanes = LANES * 32 // element.bitwidth
        super().__init__(f"vector({self.lanes} x {element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(_MEMORY[vector.element], vector.lanes))


def _arithmetic(tag):
    return types.float64 if tag is types.float64 else types.float32


def _vector(element, lanes):
    return ir.VectorType(element, lanes)


def _like(value_type, element):
    return _vector(element, value_type.count) if isinstance(value_type, ir.VectorType) else element


def _constant(value_type, value):
    many = isinstance(value_type, ir.VectorType)
    return ir.Constant(value_type, [value] * value_type.count if many else value)


def _pointer(builder, base, index, element):
    """The address `base` moved by `index` elements, as a pointer."""
    offset = builder.mul(_i64(index) if isinstance(index, int) else index, _i64(_SIZE[element]))
    return builder.inttoptr(builder.add(base, offset), ir.PointerType())


def _widen(builder, tag, value):
    if tag is types.uint16:
        wide = builder.zext(value, _like(value.type, _i32))
        return builder.bitcast(builder.shl(wide, _constant(wide.type, 16)), _like(value.type, ir.FloatType()))
    if tag is types.int16:
        return builder.fpext(value, _like(value.type, ir.FloatType()))
    return value


def _narrow(builder, tag, value):
    if tag is types.uint16:
        bits = builder.bitcast(value, _like(value.type, _i32))
        sixteen = _constant(bits.type, 16)
        high = builder.lshr(bits, sixteen)
        even = builder.add(builder.and_(high, _constant(bits.type, 1)), _constant(bits.type, 0x7FFF))
        rounded = builder.lshr(builder.add(bits, even), sixteen)
        quiet = builder.or_(high, _constant(bits.type, 0x40))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, quiet, rounded), _like(value.type, _i16))
    if tag is types.int16:
        return builder.fptrunc(value, _like(value.type, ir.HalfType()))
    return value


def _load(builder, tag, base, index=0, lanes=0):
    element = _MEMORY[tag]
    kind = _vector(element, lanes) if lanes else element
    return _widen(builder, tag, builder.load(_pointer(builder, base, index, element), align=_SIZE[element], typ=kind))


def _store(builder, tag, value, base, index=0):
    element = _MEMORY[tag]
    return builder.store(_narrow(builder, tag, value), _pointer(builder, base, index, element), align=_SIZE[element])


def _call(builder, name, result, *values):
    vector = isinstance(values[0].type, ir.VectorType)
    element = values[0].type.element if vector else values[0].type
    suffix = (f"v{values[0].type.count}" if vector else "") + ("f64" if element == ir.DoubleType() else "f32")
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), values)


def _fma(builder, a, b, c):
    return _call(builder, "fma", a.type, a, b, c) if _FUSED else builder.fadd(builder.fmul(a, b), c)


def _splat(builder, value, lanes):
    one = builder.insert_element(ir.Constant(_vector(value.type, lanes), ir.Undefined), value, _i32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_vector(_i32, lanes), [0] * lanes))


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_i32, len(lanes)), list(lanes)))


def _loop(builder, count, values, body):
    """`values = body(index, values)` for index in range(count), all in registers."""
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", count, _i64(0)), inside, after)
    builder.position_at_end(inside)
    index = builder.phi(_i64)
    index.add_incoming(_i64(0), before)
    carried = [builder.phi(value.type) for value in values]
    results = body(index, carried)
    following = builder.add(index, _i64(1))
    index.add_incoming(following, builder.block)
    for phi, first, result in zip(carried, values, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, builder.block)
    end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    merged = [builder.phi(value.type) for value in values]
    for phi, first, result in zip(merged, values, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, end)
    return merged


@intrinsic
def lanes(typingctx, tag):
    """Elements in a vector."""
    count = Vector(_arithmetic(tag)).lanes
    return types.int64(tag), lambda context, builder, signature, arguments: _i64(count)


@intrinsic
def size(typingctx, tag):
    """Bytes of an element in memory."""
    count = _SIZE[_MEMORY[tag]]
    return types.int64(tag), lambda context, builder, signature, arguments: _i64(count)


@intrinsic
def wide(typingctx, tag):
    """The tag of the arithmetic dtype, zero."""
    element = _arithmetic(tag)
    return element(tag), lambda context, builder, signature, arguments: ir.Constant(_MEMORY[element], 0.0)


@intrinsic
def load(typingctx, tag, address):
    """The element at an address."""

    def generate(context, builder, signature, arguments):
        return _load(builder, tag, arguments[1])

    return _arithmetic(tag)(tag, types.int64), generate


@intrinsic
def store(typingctx, tag, address, value):
    """Round a scalar to the tag's dtype and write it."""

    def generate(context, builder, signature, arguments):
        _store(builder, tag, arguments[2], arguments[1])
        return context.get_dummy_value()

    return types.none(tag, types.int64, _arithmetic(tag)), generate


@intrinsic
def vload(typingctx, tag, address):
    """A vector of elements at an address of any alignment."""
    vector = Vector(_arithmetic(tag))

    def generate(context, builder, signature, arguments):
        return _load(builder, tag, arguments[1], lanes=vector.lanes)

    return vector(tag, types.int64), generate


@intrinsic
def vstore(typingctx, tag, address, value):
    """Round a vector to the tag's dtype and write it."""

    def generate(context, builder, signature, arguments):
        _store(builder, tag, arguments[2], arguments[1])
        return context.get_dummy_value()

    return types.none(tag, types.int64, value), generate


@intrinsic
def vstream(typingctx, tag, address, value):
    """`vstore` past the caches; the address is a multiple of the vector's bytes in memory."""

    def generate(context, builder, signature, arguments):
        instruction = _store(builder, tag, arguments[2], arguments[1])
        instruction.align = value.lanes * _SIZE[_MEMORY[tag]]
        instruction.set_metadata("nontemporal", builder.module.add_metadata([_i32(1)]))
        return context.get_dummy_value()

    return types.none(tag, types.int64, value), generate


@intrinsic
def vsplat(typingctx, value):
    """A vector of one float32 or float64 repeated."""
    vector = Vector(value)

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0], vector.lanes)

    return vector(value), generate


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c of vectors, or of scalars, rounded once where the processor can."""

    def generate(context, builder, signature, arguments):
        return _fma(builder, *arguments)

    return a(a, a, a), generate


def _binary(operation):
    def typed(typingctx, a, b):
        def generate(context, builder, signature, arguments):
            return operation(builder, *arguments)

        return a(a, a), generate

    return intrinsic(typed)


vadd = _binary(lambda builder, a, b: builder.fadd(a, b))
vsub = _binary(lambda builder, a, b: builder.fsub(a, b))
vmul = _binary(lambda builder, a, b: builder.fmul(a, b))
vmax = _binary(lambda builder, a, b: _call(builder, "maximum", a.type, a, b))  # NaN if either is


@intrinsic
def vwhere(typingctx, a, b, yes, no):
    """Lanes of `yes` where a < b, else of `no`."""

    def generate(context, builder, signature, arguments):
        a, b, yes, no = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    return a(a, a, a, a), generate


@intrinsic
def vsum(typingctx, a):
    """The sum of a vector's lanes, in a fixed tree."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = (_shuffle(builder, value, value, range(i, i + half)) for i in (0, half))
            value = builder.fadd(low, high)
        return builder.extract_element(value, _i32(0))

    return a.element(a), generate


@intrinsic
def vhighest(typingctx, a):
    """The largest of a vector's lanes; NaN if any is."""

    def generate(context, builder, signature, arguments):
        return _call(builder, "vector.reduce.fmaximum", arguments[0].type.element, arguments[0])

    return a.element(a), generate


@intrinsic
def transpose(typingctx, tag, source, ld, target, target_ld):
    """Rows of one vector's elements, as many as that, to columns; leading dimensions in elements."""
    count = Vector(_arithmetic(tag)).lanes

    def generate(context, builder, signature, arguments):
        _, source, ld, target, target_ld = arguments
        rows = [_load(builder, tag, source, builder.mul(ld, _i64(i)), count) for i in range(count)]
        span = 1
        while span < count:
            low = [i if not i & span else count + i - span for i in range(count)]
            high = [i + span if not i & span else count + i for i in range(count)]
            for i in range(count):
                if not i & span:
                    pair = rows[i], rows[i + span]
                    rows[i], rows[i + span] = _shuffle(builder, *pair, low), _shuffle(builder, *pair, high)
            span *= 2
        for i, row in enumerate(rows):
            _store(builder, tag, row, target, builder.mul(target_ld, _i64(i)))
        return context.get_dummy_value()

    i = types.int64
    return types.none(tag, i, i, i, i), generate


def _initial(builder, kind, base, index, add):
    element = kind.element
    old = builder.load(_pointer(builder, base, index, element), align=_SIZE[element], typ=kind)
    return builder.select(add, old, ir.Constant(kind, [0.0] * kind.count))


def _outer(rows, vectors):
    def typed(typingctx, tag, a, lda, b, ldb, k, c, ldc, add):
        tag_a = _arithmetic(tag)
        lanes = Vector(tag_a).lanes
        kind = _vector(_MEMORY[tag_a], lanes)

        def generate(context, builder, signature, arguments):
            _, a, lda, b, ldb, k, c, ldc, add = arguments
            row = [builder.mul(lda, _i64(i)) for i in range(rows)]
            at = [builder.add(builder.mul(ldc, _i64(i)), _i64(v * lanes)) for i in range(rows) for v in range(vectors)]

            def step(index, sums):
                first = builder.mul(index, ldb)
                right = [_load(builder, tag, b, builder.add(first, _i64(v * lanes)), lanes) for v in range(vectors)]
                result = []
                for i in range(rows):
                    left = _splat(builder, _load(builder, tag_a, a, builder.add(row[i], index)), lanes)
                    result += [_fma(builder, left, right[v], sums[i * vectors + v]) for v in range(vectors)]
                return result

            sums = _loop(builder, k, [_initial(builder, kind, c, index, add) for index in at], step)
            for index, value in zip(at, sums, strict=True):
                _store(builder, tag_a, value, c, index)
            return context.get_dummy_value()

        i = types.int64
        return types.none(tag, i, i, i, i, i, i, i, types.boolean), generate

    return intrinsic(typed)


outer_tile = _outer(OUTER_ROWS, OUTER_VECTORS)
outer_row = _outer(1, ROW_VECTORS)


def _fold(builder, vectors):
    """DOT_WIDTH vectors to one vector of their sums: halves down to DOT_WIDTH lanes, then pairs in a tree."""
    while vectors[0].type.count > DOT_WIDTH:
        half = vectors[0].type.count // 2
        vectors = [builder.fadd(*(_shuffle(builder, v, v, range(i, i + half)) for i in (0, half))) for v in vectors]
    lanes, unit = vectors[0].type.count, 16 // _SIZE[vectors[0].type.element]
    inside, across = (unit, 1, unit.bit_length() - 1), (lanes, unit, (lanes // unit).bit_length() - 1)
    sums = []
    for group in range(0, DOT_WIDTH, lanes):
        level = vectors[group : group + lanes]
        for span, step, times in (inside, across):  # pairs within 128 bits are the cheapest to shuffle
            even = [
                lane
                for base in range(0, lanes, span)
                for first in (base, lanes + base)
                for start in range(first, first + span, 2 * step)
                for lane in range(start, start + step)
            ]
            odd = [lane + step for lane in even]
            for _ in range(times):
                pairs = zip(level[::2], level[1::2], strict=True)
                level = [builder.fadd(_shuffle(builder, p, q, even), _shuffle(builder, p, q, odd)) for p, q in pairs]
        sums += level
    while len(sums) > 1:
        sums = [_shuffle(builder, p, q, range(2 * p.type.count)) for p, q in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _dot(rows, columns):
    def typed(typingctx, tag, x, ldx, w, ldw, valid, k, c, ldc, add):
        tag_x = _arithmetic(tag)
        lanes = Vector(tag_x).lanes
        element = _MEMORY[tag_x]

        def generate(context, builder, signature, arguments):
            _, x, ldx, w, ldw, valid, k, c, ldc, add = arguments
            last = builder.sub(valid, _i64(1))
            left = [builder.mul(ldx, _i64(i)) for i in range(rows)]
            right = []
            for j in range(columns):
                inside = builder.icmp_signed("<", _i64(j), last)
                right.append(builder.mul(builder.select(inside, _i64(j), last), ldw))

            def step(index, sums):
                first = builder.mul(index, _i64(lanes))
                xs = [_load(builder, tag_x, x, builder.add(row, first), lanes) for row in left]
                result = list(sums)
                for j in range(columns):
                    weight = _load(builder, tag, w, builder.add(right[j], first), lanes)
                    for i in range(rows):
                        result[i * columns + j] = _fma(builder, xs[i], weight, sums[i * columns + j])
                return result

            zero = ir.Constant(_vector(element, lanes), [0.0] * lanes)
            sums = _loop(builder, builder.sdiv(k, _i64(lanes)), [zero] * (rows * columns), step)
            for i in range(rows):
                row = sums[i * columns : (i + 1) * columns] + [zero] * (DOT_WIDTH - columns)
                folded, at = _fold(builder, row), builder.mul(ldc, _i64(i))
                _store(builder, tag_x, builder.fadd(folded, _initial(builder, folded.type, c, at, add)), c, at)
            return context.get_dummy_value()

        i = types.int64
        return types.none(tag, i, i, i, i, i, i, i, i, types.boolean), generate

    return intrinsic(typed)


dot_tile = _dot(DOT_ROWS, DOT_COLUMNS)
dot_row = _dot(1, DOT_ROW_COLUMNS)
