"""The words of numba kernels against NumPy: every dtype, every operator, whole vectors; blocks and scratch."""

import ast
import operator
from pathlib import Path

import numpy as np
import pytest

from flagops import arrays, testing

numba = pytest.importorskip("numba")
blocks = pytest.importorskip("flagops.kernels.numba._blocks")
vectors = pytest.importorskip("flagops.kernels.numba._vectors")

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
vload, vstore, lanes, size = vectors.vload, vectors.vstore, vectors.lanes, vectors.size


def each(word, dtype, result, *inputs):
    """A word of vectors over arrays of a dtype that are some vectors long."""
    word = numba.njit(word)
    tag, to = vectors.TAGS[dtype], vectors.TAGS[result]

    def one(tag, to, count, a, out):
        for i in range(0, count, lanes(tag)):
            vstore(to, out + i * size(to), word(vload(tag, a + i * size(tag))))

    def two(tag, to, count, a, b, out):
        for i in range(0, count, lanes(tag)):
            x, y = vload(tag, a + i * size(tag)), vload(tag, b + i * size(tag))
            vstore(to, out + i * size(to), word(x, y))

    out = np.empty(inputs[0].shape, arrays.numpy_dtype(result) if result in arrays.FLOATS else result)
    addresses = [x.__array_interface__["data"][0] for x in (*inputs, out)]
    numba.njit(one if len(inputs) == 1 else two)(tag, to, out.size, *addresses)
    return out


def drawn(rng, dtype, count=256):
    if dtype in INTEGERS:
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, count, dtype, endpoint=True)
    x = rng.standard_normal(count).astype(arrays.numpy_dtype(dtype))
    x[:8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-7
    return x


def computed(x):
    """As a kernel computes with it."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_arithmetic_of_vectors_is_that_of_numpy(dtype, rng):
    words = [operator.add, operator.sub, operator.mul, np.maximum, np.minimum]
    words += [operator.truediv] if dtype in FLOATS else [operator.and_, operator.or_, operator.xor]
    ours = {
        np.maximum: lambda a, b: vectors.maximum(a, b),
        np.minimum: lambda a, b: vectors.minimum(a, b),
        operator.add: lambda a, b: a + b,
        operator.sub: lambda a, b: a - b,
        operator.mul: lambda a, b: a * b,
        operator.truediv: lambda a, b: a / b,
        operator.and_: lambda a, b: a & b,
        operator.or_: lambda a, b: a | b,
        operator.xor: lambda a, b: a ^ b,
    }
    a, b = drawn(rng, dtype), drawn(rng, dtype)[::-1].copy()
    for word in words:
        with np.errstate(all="ignore"):
            exact = word(computed(a), computed(b)).astype(a.dtype)
        testing.assert_bits(each(ours[word], dtype, dtype, a, b), exact, f"{word.__name__} of {dtype}")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_shifts_keep_the_sign_of_signed_integers(dtype, rng):
    a, b = drawn(rng, dtype), rng.integers(0, np.iinfo(dtype).bits, 256).astype(dtype)
    testing.assert_bits(each(lambda a, b: a << b, dtype, dtype, a, b), a << b)
    testing.assert_bits(each(lambda a, b: a >> b, dtype, dtype, a, b), a >> b)
    testing.assert_bits(each(lambda a: ~a, dtype, dtype, a), ~a)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float64", "int8", "int64"))
def test_signs_and_magnitudes(dtype, rng):
    a = drawn(rng, dtype)
    testing.assert_bits(each(lambda a: -a, dtype, dtype, a), -a)
    testing.assert_bits(each(lambda a: abs(a), dtype, dtype, a), np.abs(a))


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", ("float32", "float16", "float64", "int8", "uint8", "int32", "uint64"))
def test_a_comparison_is_stored_as_bool_and_chooses(dtype, rng):
    a, b = drawn(rng, dtype), drawn(rng, dtype)
    b[::3] = a[::3]
    words = (
        lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b,
        lambda a, b: a >= b, lambda a, b: a == b, lambda a, b: a != b,
    )  # fmt: skip
    for word, exact in zip(words, COMPARISONS, strict=True):
        assert (each(word, dtype, "bool", a, b) == exact(a, b)).all(), exact
    where = vectors.where
    testing.assert_bits(each(lambda a, b: where(a < b, a, b), dtype, dtype, a, b), np.where(a < b, a, b))
    both = each(lambda a, b: (a < b) | (b < a), dtype, "bool", a, b)
    assert (both == ((a < b) | (b < a))).all()


def test_bool_is_a_dtype_of_memory(rng):
    a, b = rng.random(256) < 0.5, rng.random(256) < 0.5
    assert (each(lambda a, b: a & ~b, "bool", "bool", a, b) == (a & ~b)).all()


def test_a_number_beside_a_vector_is_taken_in_its_dtype(rng):
    x = drawn(rng, "float32")
    got = each(lambda x: (0.1 * x + 1 - 0.3) / 3, "float32", "float32", x)
    one = np.float32
    with np.errstate(all="ignore"):
        testing.assert_bits(got, (one(0.1) * x + one(1) - one(0.3)) / one(3))


def test_nothing_is_contracted_but_what_says_so(rng):
    a, b = (rng.standard_normal(4096).astype(np.float32) for _ in range(2))
    testing.assert_bits(each(lambda a, b: a * b + b, "float32", "float32", a, b), a * b + b)
    fma = vectors.fma
    once = (a.astype(np.float64) * b + b).astype(np.float32)  # a product of float32 is exact in float64
    testing.assert_near(each(lambda a, b: fma(a, b, b), "float32", "float32", a, b), once, 1)
    assert (once != a * b + b).any()


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_halves_come_back_and_are_rounded_to_even(dtype, rng):
    to = arrays.numpy_dtype(dtype)
    every = np.arange(2**16, dtype=np.uint16).view(to)
    with np.errstate(invalid="ignore"):  # NaN
        testing.assert_bits(each(lambda a: a, dtype, dtype, every), every)
        testing.assert_bits(each(lambda a: a, dtype, "float32", every), every.astype(np.float32))
    wide = rng.integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    middle = (every.astype(np.float32).view(np.uint32) | 0x8000).view(np.float32)  # halfway, for bfloat16
    for x in (wide, middle):
        with np.errstate(all="ignore"):
            testing.assert_bits(each(lambda a: a, "float32", dtype, x), x.astype(to))


@pytest.mark.parametrize("dtype", ("bfloat16", "float64", "int8"))
def test_scratch_begins_on_lines_and_does_not_overlap(dtype, rng):
    tag, shapes = vectors.TAGS[dtype], tuple((int(a), int(b)) for a, b in rng.integers(1, 40, (3, 2)))
    scratch, alive = blocks.scratch, blocks.alive

    @numba.njit
    def bounds(tag, shapes):
        memory, (a, b, c) = scratch(tag, shapes)
        found = (a.base, a.row), (b.base, b.row), (c.base, c.row)
        alive(memory)
        return found

    found, item = bounds(tag, shapes), arrays.numpy_dtype(dtype).itemsize if dtype in arrays.FLOATS else 1
    assert all(base % 64 == 0 for base, _ in found)
    assert [row for _, row in found] == [row for _, row in shapes]
    ends = [base + rows * row * item for (base, row), (rows, _) in zip(found, shapes, strict=True)]
    assert all(end <= base for end, (base, _) in zip(ends, found[1:], strict=False))


def test_kernels_keep_their_scratch():
    """numba frees an array after the last line that names it: a kernel that takes scratch returns what keeps it."""
    users = 0
    for path in Path(blocks.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and path.stem != "_blocks":
                takes = [
                    n
                    for n in ast.walk(function)
                    if isinstance(n, ast.Assign)
                    and isinstance(n.value, ast.Call)
                    and ast.unparse(n.value.func) in ("scratch", "cleared")
                ]
                if takes:
                    users += 1
                    names = ", ".join(n.targets[0].elts[0].id for n in takes)
                    assert ast.unparse(function.body[-1]) == f"return alive({names})", f"{path.name}: {function.name}"
    assert users > 8


def test_tasks_walk_over_every_row_of_every_array(rng):
    of_task = numba.njit(lambda tag, x, sizes, task: blocks.of_task(tag, x, sizes, task).base)
    for lead in ((), (5,), (2, 3), (2, 3, 2, 2), (1, 4, 1, 2, 3)):
        base = np.zeros((*[2 * n for n in lead], 3), np.float32)
        x = base[tuple(slice(None, None, 2) for _ in lead)]
        shared = np.zeros((*(1 if i % 2 else n for i, n in enumerate(lead)), 4), np.float32)
        seen = []
        for sizes, (a, b, nothing) in blocks.walk(lead, (1, 1, 1), x, shared, None):
            assert nothing[0] == 0
            seen += [
                tuple(int(of_task(vectors.FLOAT32, y, sizes, task)) for y in (a, b))
                for task in range(np.prod(sizes, dtype=int))
            ]
        both = x, np.broadcast_to(shared, (*lead, 4))
        exact = [tuple(y[place].__array_interface__["data"][0] for y in both) for place in np.ndindex(*lead)]
        assert sorted(seen) == sorted(exact), lead


def test_a_tag_of_its_own_costs_a_call_no_more_than_a_number():
    """Python would be asked about each such argument, and a tuple that holds one, at every call."""
    kernel = numba.njit(lambda tag, both: 1)
    dispatcher = next(kind for kind in type(kernel).__mro__ if "typeof_pyval" in vars(kind))
    tag = vectors.TAGS["bfloat16"]
    kernel(tag, (tag, 1))
    asked = []
    original = dispatcher.typeof_pyval
    try:
        dispatcher.typeof_pyval = lambda self, value: asked.append(value) or original(self, value)
        kernel(tag, (tag, 1))
    finally:
        dispatcher.typeof_pyval = original
    assert not asked
