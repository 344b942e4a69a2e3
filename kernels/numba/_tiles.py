"""Matrix tiles for numba kernels, whose sums stay in registers.

They take Blocks and mask nothing: the caller pads. `outer_tile(a, b, k, c, add)`: C[OUTER_ROWS, OUTER_VECTORS * lanes]
= A[.., k] B[k, ..], plus C if add, each sum in the order of k; `outer_turned` takes A[k, ..], the transpose.
`narrow_tile`, `narrow_turned`: the same sums, NARROW_ROWS of them and NARROW_VECTORS wide.
`dot_tile(x, w, rows, k, c, add)`: C[DOT_ROWS, DOT_WIDTH] = X[.., k] W[rows <= DOT_COLUMNS, k]^T, plus C if add; zero
past DOT_COLUMNS, W's last row repeated past `rows`; k is a multiple of lanes. `outer_row`, `dot_row` do one row,
ROW_VECTORS * lanes or DOT_ROW_COLUMNS wide, with the same sums. A, X and C are in the arithmetic dtype of B's and W's
tag: a bfloat16 matrix used once is widened in registers.

Where A or X is bfloat16 itself (`PAIRS`), so is the other factor, products are added in pairs along k, in float32, a
vector along K has twice as many elements, and row k / 2 of B holds rows k and k + 1, column by column (`zip_rows`).
In `dot_tile` and `dot_row` X may be int16, or int8 where there is an instruction for four of them (`QUADS`), W is then
int8, and C int32: the sums are exact.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._ir import (
    LANES,
    MANY,
    SIZE,
    constant,
    dot_pairs,
    dot_quads,
    dot_words,
    f32,
    fma,
    i8,
    i16,
    i32,
    i64,
    lanes_of,
    like,
    load,
    loop,
    pointer,
    read,
    register,
    shuffle,
    splat,
    storage,
    store,
)

OUTER_ROWS, OUTER_VECTORS, ROW_VECTORS = 6, 4 if MANY else 2, 8
NARROW_ROWS, NARROW_VECTORS = (12, 2) if MANY else (6, 2)
DOT_ROWS, DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_WIDTH = (4, 6, 8, 8) if MANY else (3, 4, 8, 8)


def places(builder, block):
    """The address and the leading dimension of a Block."""
    return [builder.extract_value(block, i) for i in (1, 2)]


class Product(NamedTuple):
    """How factors of a tag are multiplied: so many of one sum side by side, in vectors of sums of a kind."""

    pair: int
    kind: Any
    take: Any
    repeat: Any
    add: Any


def _integers(tag):
    """Codes of eight bits: four of them side by side as they are, or two widened to 16 bits."""
    pair, add, element = (4, dot_quads, i8) if tag.name == "int8" else (2, dot_words, i16)

    def take(builder, tag, base, index):
        stored = storage(tag)
        place = pointer(builder, base, index, stored.size)
        value = builder.load(place, align=1, typ=ir.VectorType(stored.memory, pair * LANES))
        return value if stored.memory == element else builder.sext(value, like(value.type, element))

    return Product(pair, ir.VectorType(i32, LANES), take, None, add)


def _product(tag):
    if tag.name in ("int8", "int16"):
        return _integers(tag)
    if tag.name != "bfloat16":
        kind = ir.VectorType(register(tag), lanes_of(tag))

        def take(builder, tag, base, index):
            return load(builder, tag, base, index, kind.count)

        return Product(
            1, kind, take, lambda builder, base, index: splat(builder, load(builder, tag, base, index), kind.count), fma
        )
    kind, halves = ir.VectorType(f32, LANES), ir.VectorType(i16, 2 * LANES)

    def place(builder, base, index):
        return builder.add(base, builder.shl(index, i64(1)))

    def repeat(builder, base, index):
        return builder.bitcast(splat(builder, read(builder, i32, place(builder, base, index)), LANES), halves)

    return Product(
        2, kind, lambda builder, tag, base, index: read(builder, halves, place(builder, base, index)), repeat, dot_pairs
    )


def initial(builder, kind, base, index, add):
    """What a tile's sums start with: those in memory if add, else zeros."""
    element = kind.element
    old = builder.load(pointer(builder, base, index, SIZE[element]), align=SIZE[element], typ=kind)
    return builder.select(add, old, _zero(kind))


def _zero(kind):
    return constant(kind, 0 if _whole(kind) else 0.0)


def _added(builder, a, b):
    return builder.add(a, b) if _whole(a.type) else builder.fadd(a, b)


def _whole(kind):
    return isinstance(kind.element, ir.IntType)


def _outer(rows, vectors, turned=False):
    def typed(typingctx, a, b, k, c, add):
        tag, tag_c, product = b[0], c[0], _product(a[0])
        kind, lanes = product.kind, product.kind.count

        def generate(context, builder, signature, arguments):
            (a, lda), (b, ldb), (c, ldc) = (places(builder, arguments[i]) for i in (0, 1, 3))
            k, add = arguments[2], arguments[4]
            row = [i64(i) if turned else builder.mul(lda, i64(i)) for i in range(rows)]
            at = [builder.add(builder.mul(ldc, i64(i)), i64(v * lanes)) for i in range(rows) for v in range(vectors)]

            def step(index, sums):
                first, depth = builder.mul(index, ldb), builder.mul(index, lda if turned else i64(product.pair))
                places = [builder.add(first, i64(v * lanes * product.pair)) for v in range(vectors)]
                right = [product.take(builder, tag, b, place) for place in places]
                result = []
                for i in range(rows):
                    left = product.repeat(builder, a, builder.add(row[i], depth))
                    result += [product.add(builder, left, right[v], sums[i * vectors + v]) for v in range(vectors)]
                return result

            sums = loop(
                builder,
                builder.sdiv(k, i64(product.pair)),
                [initial(builder, kind, c, index, add) for index in at],
                step,
            )
            for index, value in zip(at, sums, strict=True):
                store(builder, tag_c, value, c, index)
            return context.get_dummy_value()

        return types.none(a, b, types.int64, c, types.boolean), generate

    return intrinsic(typed)


outer_tile = _outer(OUTER_ROWS, OUTER_VECTORS)
outer_turned = _outer(OUTER_ROWS, OUTER_VECTORS, True)
outer_row = _outer(1, ROW_VECTORS)
narrow_tile = _outer(NARROW_ROWS, NARROW_VECTORS)
narrow_turned = _outer(NARROW_ROWS, NARROW_VECTORS, True)


def fold(builder, vectors):
    """DOT_WIDTH vectors to one vector of their sums: halves down to DOT_WIDTH lanes, then pairs in a tree."""
    while vectors[0].type.count > DOT_WIDTH:
        half = vectors[0].type.count // 2
        vectors = [_added(builder, *(shuffle(builder, v, v, range(i, i + half)) for i in (0, half))) for v in vectors]
    lanes, unit = vectors[0].type.count, 16 // SIZE[vectors[0].type.element]
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
                level = [_added(builder, shuffle(builder, p, q, even), shuffle(builder, p, q, odd)) for p, q in pairs]
        sums += level
    while len(sums) > 1:
        sums = [shuffle(builder, p, q, range(2 * p.type.count)) for p, q in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _dot(rows, columns):
    def typed(typingctx, x, w, valid, k, c, add):
        tag, tag_x, tag_c, product = w[0], x[0], c[0], _product(x[0])
        lanes, zero = product.kind.count * product.pair, _zero(product.kind)

        def generate(context, builder, signature, arguments):
            (x, ldx), (w, ldw), (c, ldc) = (places(builder, arguments[i]) for i in (0, 1, 4))
            valid, k, add = arguments[2], arguments[3], arguments[5]
            last = builder.sub(valid, i64(1))
            left = [builder.mul(ldx, i64(i)) for i in range(rows)]
            right = []
            for j in range(columns):
                inside = builder.icmp_signed("<", i64(j), last)
                right.append(builder.mul(builder.select(inside, i64(j), last), ldw))

            def step(index, sums):
                first = builder.mul(index, i64(lanes))
                xs = [product.take(builder, tag_x, x, builder.add(row, first)) for row in left]
                result = list(sums)
                for j in range(columns):
                    weight = product.take(builder, tag, w, builder.add(right[j], first))
                    for i in range(rows):
                        result[i * columns + j] = product.add(builder, xs[i], weight, sums[i * columns + j])
                return result

            sums = loop(builder, builder.sdiv(k, i64(lanes)), [zero] * (rows * columns), step)
            for i in range(rows):
                row = sums[i * columns : (i + 1) * columns] + [zero] * (DOT_WIDTH - columns)
                folded, at = fold(builder, row), builder.mul(ldc, i64(i))
                store(builder, tag_c, _added(builder, folded, initial(builder, folded.type, c, at, add)), c, at)
            return context.get_dummy_value()

        return types.none(x, w, types.int64, types.int64, c, types.boolean), generate

    return intrinsic(typed)


dot_tile = _dot(DOT_ROWS, DOT_COLUMNS)
dot_row = _dot(1, DOT_ROW_COLUMNS)
