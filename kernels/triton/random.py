# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Random numbers by counters, bound by operations: a lane makes a block of four words, and the numbers of them."""

import math

import torch
import triton
import triton.language as tl
from flagops.reference.random import DIGITS

from flagops.arrays import FLOATS
from flagops.registry import kernel

from ._common import LONGEST, keeping_subnormals, launch
from ._elementwise import TYPES, axes, bits, cast, number, numbered, offset
from ._order import search
from ._words import WORDS, sqrt
from .reductions import cumsum

BLOCK = 256
"""Blocks of four words that a program makes."""
UNIT, TURN = tl.constexpr(2.0**-32), tl.constexpr(2 * math.pi)
log, sin, cos = WORDS["log"], WORDS["sin"], WORDS["cos"]


@triton.jit
def words(state, state_step, block):
    """The four words of each block of a state's stream: Philox4x32-10."""
    seed, offset = tl.load(state), tl.load(state + state_step)
    low, high = block.to(tl.int64), block.to(tl.int64) >> 32
    return tl.philox(
        seed, low.to(tl.uint32), high.to(tl.uint32), (low * 0 + offset).to(tl.uint32),
        (low * 0 + (offset >> 32)).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def _long(low, high):
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _middle(word):
    """The middle of one of 2^32 parts of what is between 0 and 1."""
    return (word.to(tl.float64) + 0.5) * UNIT


@triton.jit
def uniform_lane(a, b, c, d, low, scale, DIGITS: tl.constexpr):
    SHIFT: tl.constexpr = 32 - DIGITS
    return (
        low + (a >> SHIFT).to(tl.float64) * scale, low + (b >> SHIFT).to(tl.float64) * scale,
        low + (c >> SHIFT).to(tl.float64) * scale, low + (d >> SHIFT).to(tl.float64) * scale,
    )  # fmt: skip


@triton.jit
def long_uniform_lane(a, b, c, d, low, scale, DIGITS: tl.constexpr):
    near, far = _long(a, b) >> (64 - DIGITS), _long(c, d) >> (64 - DIGITS)
    return low + near.to(tl.float64) * scale, low + far.to(tl.float64) * scale


@triton.jit
def normal_lane(a, b, c, d, mean, std, DIGITS: tl.constexpr):
    """Two from two words."""
    near, far = sqrt(log(_middle(a)) * -2), sqrt(log(_middle(c)) * -2)
    turn, other = _middle(b) * TURN, _middle(d) * TURN
    return (
        mean + std * (near * cos(turn)), mean + std * (near * sin(turn)),
        mean + std * (far * cos(other)), mean + std * (far * sin(other)),
    )  # fmt: skip


@triton.jit
def exponential_lane(a, b, c, d, rate, unused, DIGITS: tl.constexpr):
    return (
        log(_middle(a)) * -1 / rate, log(_middle(b)) * -1 / rate,
        log(_middle(c)) * -1 / rate, log(_middle(d)) * -1 / rate,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "second"])
def draw_kernel(
    state, out, first, second, n, state_step, out_n,
    LANE: tl.constexpr, DIGITS: tl.constexpr, EACH: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, _ = numbered(tl.cdiv(n, EACH), BLOCK, LONG)
    block = block.to(tl.int64)
    a, b, c, d = words(state, state_step, block)
    made = LANE(a, b, c, d, number(first, tl.float64), number(second, tl.float64), DIGITS)
    for i in tl.static_range(EACH):
        tl.store(out + (block * EACH + i) * out_n, cast(made[i], out.dtype.element_ty), block * EACH + i < n)


@triton.jit(do_not_specialize=["low", "choices"])
def random_kernel(
    state, out, low, choices, n, state_step, out_n, REAL: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr
):
    """One from two words; with no number of choices all of their bits."""
    block, _ = numbered(tl.cdiv(n, 2), BLOCK, LONG)
    block = block.to(tl.int64)
    a, b, c, d = words(state, state_step, block)
    low, choices = tl.cast(low, tl.int64), tl.cast(choices, tl.int64)
    some, divisor = choices > 0, tl.maximum(choices, 1).to(tl.uint64)
    near, far = _long(a, b), _long(c, d)
    near, far = tl.where(some, near % divisor, near), tl.where(some, far % divisor, far)
    place = out + block * 2 * out_n
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(place, cast(cast(near.to(tl.int64) + low, REAL), dtype), block * 2 < n)
    tl.store(place + out_n, cast(cast(far.to(tl.int64) + low, REAL), dtype), block * 2 + 1 < n)


def _draw(
    lane: object, state: torch.Tensor, n: int, first: float, second: float, dtype: str, out: torch.Tensor
) -> None:
    each = 2 if lane is long_uniform_lane else 4
    if n:
        launch(
            draw_kernel, (triton.cdiv(n, each * BLOCK),), out.device, state, out, bits(float(first), "float64"),
            bits(float(second), "float64"), n, state.stride(0), out.stride(0), LANE=lane, DIGITS=DIGITS[dtype],
            EACH=each, LONG=n > LONGEST, BLOCK=BLOCK, num_warps=4, **keeping_subnormals(out.device),
        )  # fmt: skip


@kernel(deterministic=True)
def uniform(state: torch.Tensor, n: int, low: float, high: float, dtype: str, out: torch.Tensor) -> None:
    """The upper bits of a word each, of float64 of two."""
    lane = long_uniform_lane if dtype == "float64" else uniform_lane
    _draw(lane, state, n, low, (float(high) - float(low)) * 2.0 ** -DIGITS[dtype], dtype, out)


@kernel(deterministic=True)
def normal(state: torch.Tensor, n: int, mean: float, std: float, dtype: str, out: torch.Tensor) -> None:
    """Two from two words."""
    _draw(normal_lane, state, n, mean, std, dtype, out)


@kernel(deterministic=True)
def exponential(state: torch.Tensor, n: int, rate: float, dtype: str, out: torch.Tensor) -> None:
    """One from a word."""
    _draw(exponential_lane, state, n, rate, 0.0, dtype, out)


@kernel(deterministic=True)
def random(state: torch.Tensor, n: int, low: int, count: int, dtype: str, out: torch.Tensor) -> None:
    """One from two words."""
    if n:
        launch(
            random_kernel, (triton.cdiv(n, 2 * BLOCK),), out.device, state, out, low, count, n, state.stride(0),
            out.stride(0), REAL=TYPES["float64" if dtype in FLOATS else "int64"], LONG=n > LONGEST, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def pick_kernel(
    sums, draws, out, count, n, rounds, sizes, sum_steps, draw_steps, out_steps, LONG: tl.constexpr, BLOCK: tl.constexpr
):
    at, here = numbered(count, BLOCK, LONG)
    sums += offset(at, sizes, sum_steps)
    limit = tl.load(draws + offset(at, sizes, draw_steps), here, other=0.0) * tl.load(sums + n - 1, here, other=0.0)
    low = at.to(tl.int64) * 0
    tl.store(out + offset(at, sizes, out_steps), search(sums, 1, low, low + n, limit, here, rounds, True), here)


@kernel(deterministic=True, batch_invariant=True)
def pick(weights: torch.Tensor, draws: torch.Tensor, out: torch.Tensor) -> None:
    """Sums of weights along each row, among which each draw halves its way."""
    count, n = out.numel(), weights.shape[-1]
    if not count:
        return
    sums = weights.new_empty(weights.shape, dtype=torch.float64)
    cumsum(weights, "float64", sums)
    sizes, (out_steps, draw_steps, sum_steps) = axes(out, draws, sums[..., :1])
    launch(
        pick_kernel, (triton.cdiv(count, 4 * BLOCK),), out.device, sums, draws, out, count, n, n.bit_length(), sizes,
        sum_steps, draw_steps, out_steps, LONG=count > LONGEST, BLOCK=4 * BLOCK, num_warps=4,
    )  # fmt: skip
