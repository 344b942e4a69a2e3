"""Words of numba kernels that are functions of numbers: how near they are, and the same bits however they run."""

import itertools
import operator

import mpmath
import numpy as np
import pytest
import torch

from flagops import arrays, testing

numba = pytest.importorskip("numba")
functions = pytest.importorskip("flagops.kernels.numba._functions")
numbers = pytest.importorskip("flagops.kernels.numba._numbers")
vectors = pytest.importorskip("flagops.kernels.numba._vectors")

FLOATS = ("float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint32", "uint64")
load, vload, vload_one = vectors.load, vectors.vload, vectors.vload_one
store, vstore, lanes, size = vectors.store, vectors.vstore, vectors.lanes, vectors.size

NEAR = {
    "exp": 1.25, "exp2": 1.25, "expm1": 1.4, "log": 1, "log2": 1.4, "log10": 1.4, "log1p": 1.5, "sin": 1.4, "cos": 1.4,
    "tanh": 2, "erf": 1.5, "rsqrt": 1.5,
}  # fmt: skip
"""Units in the last place; where the processor fuses no products, too."""

EXACT = {
    **{name: (getattr(np, name, None), getattr(mpmath, name, None)) for name in NEAR},
    "exp2": (np.exp2, lambda x: mpmath.mpf(2) ** x),
    "log2": (np.log2, lambda x: mpmath.log(x, 2)),
    "erf": (lambda x: torch.erf(torch.from_numpy(x)).numpy(), mpmath.erf),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x: 1 / mpmath.sqrt(x)),
}
"""In float64 and far beyond it."""


def addresses(*values):
    return [x.__array_interface__["data"][0] for x in values]


def stored(dtype):
    return arrays.numpy_dtype(dtype) if dtype in arrays.FLOATS else np.dtype(dtype)


def run(word, to, *inputs):
    """A word over arrays, which has the same bits in whole vectors, in vectors of one lane and of scalars."""
    tags, out = vectors.TAGS[inputs[0].dtype.name], vectors.TAGS[to]

    def one(tag, to, count, a, out):
        for i in range(0, count, lanes(tag)):
            vstore(to, out[0] + i * size(to), word(vload(tag, a + i * size(tag))))
        for i in range(count):
            vstore(to, out[1] + i * size(to), word(vload_one(tag, a + i * size(tag))))
            store(to, out[2] + i * size(to), word(load(tag, a + i * size(tag))))

    def two(tag, to, count, a, b, out):
        for i in range(0, count, lanes(tag)):
            vstore(to, out[0] + i * size(to), word(vload(tag, a + i * size(tag)), vload(tag, b + i * size(tag))))
        for i in range(count):
            x, y = vload_one(tag, a + i * size(tag)), vload_one(tag, b + i * size(tag))
            vstore(to, out[1] + i * size(to), word(x, y))
            store(to, out[2] + i * size(to), word(load(tag, a + i * size(tag)), load(tag, b + i * size(tag))))

    results = [np.empty(inputs[0].shape, stored(to)) for _ in range(3)]
    kernel = numba.njit(one if len(inputs) == 1 else two)
    kernel(tags, out, inputs[0].size, *addresses(*inputs), tuple(addresses(*results)))
    for other, label in zip(results[1:], ("one lane", "a scalar"), strict=True):
        testing.assert_bits(other, results[0], label)
    return results[0]


def special(dtype):
    most = np.finfo(dtype)
    found = (0, 1, 2, 0.5, 1.5, 3, 4, 7, most.tiny, most.smallest_subnormal, most.max, np.inf, 2.0**24, 2.0**53, 1e-20)
    return np.array([sign * x for x in found for sign in (1, -1)] + [np.nan, np.nan], dtype)


def drawn(rng, dtype, count):
    """Of all bits, of usual sizes, near 1, and special ones."""
    bits = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), count, f"uint{8 * np.dtype(dtype).itemsize}")
    most = np.log(np.finfo(dtype).max) * 1.1
    usual = (rng.standard_normal(count), rng.uniform(-most, most, count), rng.uniform(0.6, 1.6, count))
    return np.concatenate([bits.view(dtype), *(x.astype(dtype) for x in usual), special(dtype)])


def assert_within(units, got, exact64, exact, *inputs):
    """So many units in the last place; zeros, infinities and NaN as they are."""
    with np.errstate(all="ignore"):
        nearest = exact64.astype(got.dtype)
    ordinary = np.isfinite([*inputs, nearest, got]).all(0) & (nearest != 0)
    testing.assert_bits(got[~ordinary], nearest[~ordinary])
    error = np.zeros(got.size)
    gap = np.spacing(np.abs(nearest[ordinary])).astype(np.float64)
    if got.dtype == np.float32:
        error[ordinary] = np.abs(got[ordinary] - exact64[ordinary]) / gap
    else:
        with mpmath.workprec(200):
            for i, step in zip(np.flatnonzero(ordinary), gap, strict=True):
                true = exact(*(mpmath.mpf(float(x[i])) for x in inputs))
                error[i] = (mpmath.mpf(float(got[i])) - true) / mpmath.mpf(float(step))
    error, worst = np.abs(error), np.abs(error).argmax()
    assert error[worst] <= units, f"{error[worst]} units, of {[x[worst] for x in inputs]}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NEAR)
def test_functions_are_within_units_of_the_true_ones(name, dtype, rng):
    word, (exact64, exact) = getattr(functions, name), EXACT[name]
    x = drawn(rng, dtype, 2**18 if dtype == "float32" else 2**10)
    with np.errstate(all="ignore"):
        assert_within(NEAR[name], run(word, dtype, x), exact64(x.astype(np.float64)), exact, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ("sin", "cos"))
def test_angles_near_multiples_of_a_right_one(name, dtype, rng):
    """Where what the reduction leaves is least, on both sides of the angles that are left to C's library."""
    word, (exact64, exact) = getattr(functions, name), EXACT[name]
    last = int(functions.REDUCED[dtype] / (np.pi / 2))
    turns = [np.arange(1, 2000), rng.integers(2000, last, 2048), rng.integers(last - 9, last + 9, 64), last * 2**20]
    x = (np.hstack(turns) * (np.pi / 2)).astype(dtype)
    x = np.concatenate([x, np.nextafter(x, 0), x[: -2 * x.size % 64]])
    assert_within(NEAR[name], run(word, dtype, x), exact64(x.astype(np.float64)), exact, x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_powers(dtype, rng):
    """As C has them in every special case; those near the largest ask most of the logarithm."""
    count = 2**16 if dtype == "float32" else 2**10
    x, y = drawn(rng, dtype, count), drawn(rng, dtype, count)
    grid = special(dtype)
    near = np.exp(rng.uniform(-50, 50, count)).astype(dtype)
    large = (rng.uniform(-1, 1, count) * np.log(np.finfo(dtype).max) / np.log(near)).astype(dtype)
    whole = rng.integers(-30, 30, count).astype(dtype)
    x = np.concatenate([x, near, rng.standard_normal(count).astype(dtype), np.repeat(grid, grid.size)])
    y = np.concatenate([y, large, whole, np.tile(grid, grid.size)])
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
        assert_within(1.5, run(functions.power, dtype, x, y), exact, operator.pow, x, y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_told_apart_and_rounded(dtype, rng):
    x = drawn(rng, dtype, 1024)
    x[:64] = np.arange(-16, 16, 0.5)
    with np.errstate(invalid="ignore"):  # NaN that signals
        for name in ("isnan", "isinf", "isfinite", "isneginf", "signbit"):
            testing.assert_bits(run(getattr(numbers, name), "bool", x), getattr(np, name)(x), name)
        for name, exact in (("floor", np.floor), ("ceil", np.ceil), ("trunc", np.trunc), ("round_even", np.rint)):
            testing.assert_bits(run(getattr(numbers, name), dtype, x), exact(x), name)
        testing.assert_bits(run(numbers.copysign, dtype, x, x[::-1].copy()), np.copysign(x, x[::-1]))


def quotients(a, b, name):
    """What NumPy divides, which for floats is what C's fmod leaves."""
    if name == "trunc_divide":
        return np.trunc(a / b) if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b
    return getattr(np, name)(a, b)


DIVISIONS = ("fmod", "remainder", "trunc_divide", "floor_divide")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", DIVISIONS)
def test_floats_are_divided_exactly(name, dtype, rng):
    word, grid, count = getattr(numbers, name), special(dtype), 1024
    a = np.concatenate([drawn(rng, dtype, count), np.repeat(grid, grid.size)])
    b = np.concatenate([drawn(rng, dtype, count)[::-1], np.tile(grid, grid.size)])
    whole = rng.integers(-40, 40, (2, count)).astype(dtype)
    a, b = np.concatenate([a, whole[0]]), np.concatenate([b, whole[1]])
    with np.errstate(all="ignore"):
        exact = quotients(a, b, name)
        if name == "remainder":  # NumPy takes the sign of a divisor that is infinite, as Python; torch adds it
            exact = np.fmod(a, b)
            exact = np.where((exact != 0) & ((exact < 0) != (b < 0)), exact + b, exact)
        if name == "floor_divide":
            exact = torch.div(torch.from_numpy(a), torch.from_numpy(b), rounding_mode="floor").numpy()
        testing.assert_bits(run(word, dtype, a, b), exact)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", DIVISIONS)
def test_integers_are_divided_and_nothing_traps(name, dtype, rng):
    word, bounds = getattr(numbers, name), np.iinfo(dtype)
    a, b = rng.integers(bounds.min, bounds.max, (2, 1024), dtype, endpoint=True)
    b[:512] = rng.integers(max(bounds.min, -9), 9, 512)
    a[:64], b[:64:2], b[1:64:2] = bounds.min, 0, -1 if bounds.min else bounds.max
    got = run(word, dtype, a, b)
    with np.errstate(all="ignore"):
        exact = quotients(a, np.where(b == 0, 1, b).astype(dtype), name).astype(dtype)
    exact = np.where(b == 0, 0 if "divide" in name else a, exact).astype(dtype)
    testing.assert_bits(got, exact)


TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32", "float64")


@pytest.mark.drawn
@pytest.mark.parametrize("source", TYPES)
def test_conversions_are_those_of_torch(source, rng):
    """Floats that no integer type of 32 bits holds are left to the next test, where C++ promises nothing."""
    convert = numbers.convert
    x = torch.from_numpy(np.concatenate([rng.uniform(-300, 300, 192), rng.uniform(-2e9, 2e9, 64)]))
    x = x.to(torch.int64).to(getattr(torch, source)) if "float" not in source else x.to(getattr(torch, source))
    if x.dtype == torch.float16:
        x = x.nan_to_num(posinf=0, neginf=0)

    def one(tag, to, count, a, out):
        for i in range(0, count, lanes(tag)):
            vstore(to, out[0] + i * size(to), convert(to, vload(tag, a + i * size(tag))))
        for i in range(count):
            store(to, out[1] + i * size(to), convert(to, load(tag, a + i * size(tag))))

    kernel = numba.njit(one)
    for target in TYPES:
        exact = x.to(getattr(torch, target))
        got, scalar = torch.empty_like(exact), torch.empty_like(exact)
        outputs = got.data_ptr(), scalar.data_ptr()
        kernel(vectors.TAGS[source], vectors.TAGS[target], x.numel(), x.data_ptr(), outputs)
        for found in (got, scalar):
            assert torch.equal(found, exact), f"{source} to {target}"


def test_floats_that_integers_do_not_hold_become_the_least():
    convert, tags = numbers.convert, vectors.TAGS
    x = np.array([np.nan, np.inf, -np.inf, 2.0**31, 2.0**63, -(2.0**63), 3e9, -3e9] * 8, np.float32)
    least = np.iinfo("int64").min
    exact = {
        "int64": [least, least, least, 2**31, least, least, 3 * 10**9, -3 * 10**9],
        "int32": [np.iinfo("int32").min] * 8,
        "uint8": [0] * 8,  # the low bits of the least in 32
        "bool": [True] * 8,
    }
    for name, values in exact.items():
        to = tags[name]
        testing.assert_bits(run(numba.njit(lambda a, to=to: convert(to, a)), name, x), np.array(values * 8, name), name)


def test_masks_and_choices(rng):
    where, isnan = vectors.where, numbers.isnan
    a, b = rng.random(256) < 0.5, rng.random(256) < 0.5
    for got, exact in (
        (run(numba.njit(lambda a, b: a & ~b), "bool", a, b), a & ~b),
        (run(numba.njit(lambda a, b: where(a, b, a)), "bool", a, b), np.where(a, b, a)),
    ):
        testing.assert_bits(got, exact)
    for dtype, name in itertools.product(("float32", "int64", "bool"), ("logical_and", "logical_or", "logical_xor")):
        x, y = (rng.integers(0, 2, 256).astype(dtype) for _ in range(2))
        testing.assert_bits(run(getattr(numbers, name), "bool", x, y), getattr(np, name)(x, y), name)
    testing.assert_bits(run(numbers.logical_not, "bool", x), np.logical_not(x))
    for dtype in ("float64", "int32", "uint8"):
        x, y = (rng.integers(0, 9, 256).astype(dtype) for _ in range(2))
        testing.assert_bits(run(numba.njit(lambda x, y: where(x < y, x, y)), dtype, x, y), np.minimum(x, y))
    x = drawn(rng, "float32", 64)
    got = run(numba.njit(lambda x: where(isnan(x), x * x, -x)), "float32", x)
    testing.assert_bits(got, np.where(np.isnan(x), x, -x))


def test_a_formula_of_one_lane_has_the_bits_of_vectors(rng):
    """Numbers beside it are taken in its dtype, where numba would take a scalar to theirs."""
    x = rng.standard_normal(64).astype(np.float32)

    def both(tag, a, out):
        for i in range(0, 64, lanes(tag)):
            vstore(tag, out[0] + i * size(tag), vload(tag, a + i * size(tag)) * 0.1 + 0.3)
        for i in range(64):
            vstore(tag, out[1] + i * size(tag), vload_one(tag, a + i * size(tag)) * 0.1 + 0.3)

    whole, single = np.empty_like(x), np.empty_like(x)
    numba.njit(both)(vectors.TAGS["float32"], *addresses(x), tuple(addresses(whole, single)))
    testing.assert_bits(single, whole)
    testing.assert_bits(whole, x * np.float32(0.1) + np.float32(0.3))


@pytest.mark.parametrize("name", (*NEAR, "power", "copysign"))
def test_integers_are_refused_where_a_function_is_of_floats(name):
    word = getattr(functions if name != "copysign" else numbers, name)
    x = np.ones(16, np.int32)
    with pytest.raises(numba.TypingError, match=name):
        run(word, "int32", *([x] if name in NEAR else [x, x]))
