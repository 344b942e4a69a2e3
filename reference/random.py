"""Random numbers by counters: Philox4x32-10, so that each number follows from a seed and its place alone.

A state is a seed, the key, and an offset, the upper half of the counter; the lower half counts blocks of four words.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS, HALF, NUMBERS, numpy_dtype
from flagops.operator import Operator, Scalar, Tensor, operator
from flagops.scalars import dtype as dtype_scalar
from flagops.scalars import real, whole

from ._rounding import Array, magnitude, round_to, unit

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of a number between 0 and 1 that a dtype holds exactly."""


def philox(counter: Array, key: Array) -> Array:
    """``[..., 4]`` words from counters of four words and keys of two, all uint32."""
    words = [counter[..., i].astype(np.uint64) for i in range(4)]
    keys = [key[..., i].astype(np.uint64) for i in range(2)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(ROUNDS):
        left, right = (words[2 * i] * np.uint64(m) for i, m in enumerate(MULTIPLIERS))
        high = (x >> np.uint64(32) for x in (right, left))
        words = [next(high) ^ words[1] ^ keys[0], right & low, next(high) ^ words[3] ^ keys[1], left & low]
        keys = [(k + np.uint64(w)) & low for k, w in zip(keys, WEYL, strict=True)]
    return np.stack(words, -1).astype(np.uint32)


def _words(state: Array, count: int) -> Array:
    """So many words of a state's stream."""
    key, offset = (np.array([int(v) & 0xFFFFFFFF, int(v) >> 32 & 0xFFFFFFFF], np.uint32) for v in state)
    block = np.arange(-(-count // 4), dtype=np.uint64)
    low, high = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
    counter = np.stack([low, high, *(np.full_like(block, v) for v in offset)], -1).astype(np.uint32)
    return philox(counter, key).reshape(-1)[:count]


def _long_words(state: Array, count: int) -> Array:
    """So many words of 64 bits, the lower half first."""
    pairs = _words(state, 2 * count).reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0] | pairs[:, 1] << np.uint64(32)


STATE = Tensor("2", ("int64",), draw=lambda rng, shape, dtype, dims: rng.integers(-(2**63), 2**63 - 1, shape))
_COUNTS = whole((7, 1, 2, 0, 33, 1030, 5000), least=0)
_LOADS = {"4M.float32": {"n": 1 << 22, "dtype": "float32"}}


def _drawn(
    scalars: dict[str, Scalar], dtypes: tuple[str, ...], within: Any = None, exact: bool = False
) -> Callable[[Callable[..., Any]], Operator]:
    """A card that draws ``[n]`` numbers of a dtype."""
    return lambda function: operator(
        name=f"aten.{function.__name__}",
        tensors={"state": STATE},
        scalars={"n": _COUNTS, **scalars, "dtype": dtype_scalar(dtypes)},
        result=Tensor("n", "dtype"),
        derived=lambda dims, scalars: {"n": scalars["n"]},
        workloads=_LOADS,
        flops=lambda dims, batch: 40.0 * dims["n"],
        separable=False,
        exact=exact,
        within=within,
    )(function)


def _few_roundings(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    """Of float64, in which everything is computed, and one of the result."""
    terms = [abs(arguments[name]) for name in ("low", "high", "mean", "std") if name in arguments]
    error = 32 * unit("float64").u * (magnitude(exact) + 8 * sum(terms))
    return error + unit(dtype).u * (magnitude(exact) + error) + unit(dtype).tiny


@_drawn({"low": real((0, -1)), "high": real((1, 3, 0.5))}, FLOATS, _few_roundings)
def uniform(state: Array, n: int, low: float, high: float, dtype: str) -> Array:
    """Numbers from `low` on and below `high`, as far as rounding keeps them below.

    Args:
        state: ``[2]``, int64: seed and offset.
        n: how many.
        low: the least.
        high: their limit.
        dtype: of the result, a float.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``low + u * (high - low)`` with u of as many bits as the dtype holds: the upper ones of a word each, of float64
        of two.

    Raises:
        TypeError: ``state`` is no array of int64.
        ValueError: ``dtype`` is no float.

    Source: torch's ``aten::uniform_``.
    """
    digits = DIGITS[dtype]
    words = _long_words(state, n) if dtype == "float64" else _words(state, n)
    share = (words >> words.dtype.type(8 * words.itemsize - digits)).astype(np.longdouble) * 2.0**-digits
    return low + share * (np.longdouble(high) - low)


@_drawn({"mean": real((0, 2)), "std": real((1, 0, 0.5), least=0)}, FLOATS, _few_roundings)
def normal(state: Array, n: int, mean: float, std: float, dtype: str) -> Array:
    """Numbers of a normal distribution, two from two words as Box and Muller found.

    Args:
        state: ``[2]``, int64: seed and offset.
        n: how many.
        mean: their mean.
        std: their standard deviation.
        dtype: of the result, a float.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``[n]``, computed in float64 and rounded once.

    Raises:
        TypeError: ``state`` is no array of int64.
        ValueError: ``dtype`` is no float, or ``std`` is less than 0.

    Source: torch's ``aten::normal_``.
    """
    pairs = ((_words(state, 2 * -(-n // 2)).reshape(-1, 2)).astype(np.longdouble) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(pairs[:, 0])), 2 * np.longdouble(math.pi) * pairs[:, 1]
    made = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:n]
    return mean + std * made


@_drawn({"rate": real((1, 0.5), above=0)}, FLOATS, _few_roundings)
def exponential(state: Array, n: int, rate: float, dtype: str) -> Array:
    """Numbers of an exponential distribution, none of them 0 before it is rounded.

    Args:
        state: ``[2]``, int64: seed and offset.
        n: how many.
        rate: one by their mean.
        dtype: of the result, a float.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``-log(u) / rate``, computed in float64 and rounded once; u is the middle of one of 2^32 parts, by a word each.

    Raises:
        TypeError: ``state`` is no array of int64.
        ValueError: ``dtype`` is no float, or ``rate`` is not above 0.

    Source: torch's ``aten::exponential_``.
    """
    return -np.log((_words(state, n).astype(np.longdouble) + 0.5) * 2.0**-32) / rate


@_drawn(
    {
        "low": whole((0, -5, -(2**40)), least=-(2**63)),
        "count": whole((2, 7, 1, 0, 2**40 + 3), least=0, below=2**63),
    },
    NUMBERS,
    exact=True,
)
def random(state: Array, n: int, low: int, count: int, dtype: str) -> Array:
    """Whole numbers, `count` of them from `low` on; all of 64 bits where `count` is 0.

    Args:
        state: ``[2]``, int64: seed and offset.
        n: how many.
        low: the least.
        count: how many different ones.
        dtype: of the result, of integers the low bits, of halves rounded after float32.
        out: ``[n]`` to write into; allocated if None.

    Returns:
        ``low + word % count``, a word of 64 bits each.

    Raises:
        TypeError: ``state`` is no array of int64.
        ValueError: ``dtype`` is no number.

    Source: torch's ``aten::random_``.
    """
    words = _long_words(state, n)
    made = (words % np.uint64(count) if count else words).astype(np.int64) + np.int64(low)
    if dtype not in FLOATS:
        return made.astype(dtype)
    wide = round_to(made, "float64")
    return round_to(round_to(wide, "float32") if dtype in HALF else wide, dtype)  # halves after float32, as in torch


def _weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: dict[str, int]) -> Array:
    made = rng.integers(0, 5, shape) * (rng.random(shape) if rng.random() < 0.5 else 1)
    made[..., :1] += 1
    return made.astype(numpy_dtype(dtype))


@operator(
    name="aten.pick",
    tensors={
        "weights": Tensor("... n", FLOATS, draw=_weights),
        "draws": Tensor("... m", ("float64",), draw=lambda rng, shape, dtype, dims: rng.random(shape)),
    },
    result=Tensor("... m", ("int64",)),
    sizes={"n": (1, 2, 3, 17, 130, 1030)},
    workloads={"vocabulary": {"batch": (64,), "n": 49152, "m": 1, "dtype": ("float32", "float64")}},
    flops=lambda dims, batch: float(math.prod(batch) * (dims["n"] + dims["m"])),
    exact=True,
)
def pick(weights: Array, draws: Array) -> Array:
    """For each draw the place whose share of the weights it falls into.

    Args:
        weights: ``[..., n]``, float16, bfloat16, float32 or float64, none less than 0 and one more, any strides.
        draws: ``[..., m]``, float64, from 0 on and below 1.
        out: ``[..., m]`` to write into, int64; allocated if None.

    Returns:
        ``[..., m]``: the first place up to which the sum of the weights is more than the draw times all; sums are made
        in order in float64.

    Raises:
        TypeError: an argument is no array, or a dtype does not fit.
        ValueError: shapes do not fit.

    Source: torch's ``aten::multinomial`` with replacement.
    """
    sums = np.cumsum(weights.astype(np.float64), -1)
    limit = draws * sums[..., -1:]
    return (sums[..., None, :] <= limit[..., :, None]).sum(-1, dtype=np.int64)
