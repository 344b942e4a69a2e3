"""Matrix tiles for numba kernels, whose sums stay in registers.

They take Blocks and mask nothing: the caller pads. `outer_tile(a, b, k, c, add)`: C[OUTER_ROWS, OUTER_VECTORS * lanes]
= A[.., k] B[k, ..], plus C if add, each sum in the order of k. `dot_tile(x, w, rows, k, c, add)`: C[DOT_ROWS,
DOT_WIDTH] = X[.., k] W[rows <= DOT_COLUMNS, k]^T, plus C if add; zero past DOT_COLUMNS, W's last row repeated past
`rows`; k is a multiple of lanes. `outer_row`, `dot_row` do one row, ROW_VECTORS * lanes or DOT_ROW_COLUMNS wide, with
the same sums. A, X and C are in the arithmetic dtype of B's and W's tag: a bfloat16 matrix used once is widened in
registers.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ._ir import MANY, SIZE, constant, fma, i64, lanes_of, load, loop, pointer, register, shuffle, splat, store

OUTER_ROWS, OUTER_VECTORS, ROW_VECTORS = 6, 4 if MANY else 2, 8
DOT_ROWS, DOT_COLUMNS, DOT_ROW_COLUMNS, DOT_WIDTH = (4, 6, 8, 8) if MANY else (3, 4, 8, 8)


def places(builder, block):
    """The address and the leading dimension of a Block."""
    return [builder.extract_value(block, i) for i in (1, 2)]


def initial(builder, kind, base, index, add):
    """What a tile's sums start with: those in memory if add, else zeros."""
    element = kind.element
    old = builder.load(pointer(builder, base, index, SIZE[element]), align=SIZE[element], typ=kind)
    return builder.select(add, old, constant(kind, 0.0))


def _outer(rows, vectors):
    def typed(typingctx, a, b, k, c, add):
        tag, tag_a = b[0], a[0]
        lanes = lanes_of(tag_a)
        kind = ir.VectorType(register(tag_a), lanes)

        def generate(context, builder, signature, arguments):
            (a, lda), (b, ldb), (c, ldc) = (places(builder, arguments[i]) for i in (0, 1, 3))
            k, add = arguments[2], arguments[4]
            row = [builder.mul(lda, i64(i)) for i in range(rows)]
            at = [builder.add(builder.mul(ldc, i64(i)), i64(v * lanes)) for i in range(rows) for v in range(vectors)]

            def step(index, sums):
                first = builder.mul(index, ldb)
                right = [load(builder, tag, b, builder.add(first, i64(v * lanes)), lanes) for v in range(vectors)]
                result = []
                for i in range(rows):
                    left = splat(builder, load(builder, tag_a, a, builder.add(row[i], index)), lanes)
                    result += [fma(builder, left, right[v], sums[i * vectors + v]) for v in range(vectors)]
                return result

            sums = loop(builder, k, [initial(builder, kind, c, index, add) for index in at], step)
            for index, value in zip(at, sums, strict=True):
                store(builder, tag_a, value, c, index)
            return context.get_dummy_value()

        return types.none(a, b, types.int64, c, types.boolean), generate

    return intrinsic(typed)


outer_tile = _outer(OUTER_ROWS, OUTER_VECTORS)
outer_row = _outer(1, ROW_VECTORS)


def fold(builder, vectors):
    """DOT_WIDTH vectors to one vector of their sums: halves down to DOT_WIDTH lanes, then pairs in a tree."""
    while vectors[0].type.count > DOT_WIDTH:
        half = vectors[0].type.count // 2
        vectors = [builder.fadd(*(shuffle(builder, v, v, range(i, i + half)) for i in (0, half))) for v in vectors]
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
                level = [builder.fadd(shuffle(builder, p, q, even), shuffle(builder, p, q, odd)) for p, q in pairs]
        sums += level
    while len(sums) > 1:
        sums = [shuffle(builder, p, q, range(2 * p.type.count)) for p, q in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _dot(rows, columns):
    def typed(typingctx, x, w, valid, k, c, add):
        tag, tag_x = w[0], x[0]
        lanes = lanes_of(tag_x)
        zero = constant(ir.VectorType(register(tag_x), lanes), 0.0)

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
                xs = [load(builder, tag_x, x, builder.add(row, first), lanes) for row in left]
                result = list(sums)
                for j in range(columns):
                    weight = load(builder, tag, w, builder.add(right[j], first), lanes)
                    for i in range(rows):
                        result[i * columns + j] = fma(builder, xs[i], weight, sums[i * columns + j])
                return result

            sums = loop(builder, builder.sdiv(k, i64(lanes)), [zero] * (rows * columns), step)
            for i in range(rows):
                row = sums[i * columns : (i + 1) * columns] + [zero] * (DOT_WIDTH - columns)
                folded, at = fold(builder, row), builder.mul(ldc, i64(i))
                store(builder, tag_x, builder.fadd(folded, initial(builder, folded.type, c, at, add)), c, at)
            return context.get_dummy_value()

        return types.none(x, w, types.int64, types.int64, c, types.boolean), generate

    return intrinsic(typed)


dot_tile = _dot(DOT_ROWS, DOT_COLUMNS)
dot_row = _dot(1, DOT_ROW_COLUMNS)
