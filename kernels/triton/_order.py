# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Rows of whole numbers in order, and where a number stands among those that are: equal ones keep the order they have.

A short row counts, for each of its elements, those before it. A long one is ordered digit by digit, each part of it
counting its digits; of one whose first few alone are asked for, these are found first, by the digits of the last of
them, and counted as a short row. No step needs a sort, an atomic operation or memory that programs share.
"""

import math

import torch
import triton
import triton.language as tl

from ._common import INTERPRET, launch
from ._elementwise import cast
from ._room import fitted
from .reductions import cumsum

COUNTED, PART = (32, 32) if INTERPRET.value else (1024, 512)
"""The longest row in which every element is compared with every other, and elements of a row whose digits a program
counts. The interpreter, whose rows are short, goes all of these ways."""
DIGIT = tl.constexpr(4)
"""Bits of a digit: a block is counted once for each of their values."""
HELD = 104
"""Bytes of an element for each of those values, where a chip holds all."""


@triton.jit
def rank_kernel(keys, among, places, n, k, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The place of an element is the number of those before it; `among` are the places of the elements themselves."""
    tiles = tl.cdiv(n, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    here = at < n
    own = tl.load(keys + row * n + at, here, other=0)
    rank = tl.zeros((TILE,), tl.int32)
    for first in range(0, n, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key = tl.load(keys + row * n + other, other < n, other=0)
        before = (key[None, :] < own[:, None]) | ((key[None, :] == own[:, None]) & (other[None, :] < at[:, None]))
        rank += tl.sum((before & (other < n)[None, :]).to(tl.int32), 1)
    if among is None:
        place = at
    else:
        place = tl.load(among + row * n + at, here, other=0)
    tl.store(places + row * k + rank, place, here & (rank < k))


@triton.jit
def _digits(keys, here, shift, flip, DIGITS: tl.constexpr):
    """A row for each element, with 1 at its digit."""
    digit = (((keys >> shift) & (DIGITS - 1)) ^ flip).to(tl.int32)
    return (here[:, None] & (digit[:, None] == tl.arange(0, DIGITS)[None, :])).to(tl.int32)


@triton.jit
def count_kernel(keys, counts, n, parts, shift, flip, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """How often a part of a row has each digit: those of all parts stand side by side."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + row * n + at, at < n, other=0)
    counted = tl.sum(_digits(key, at < n, shift, flip, DIGITS), 0)
    tl.store(counts + (row * DIGITS + tl.arange(0, DIGITS)) * parts + part, counted)


@triton.jit
def move_kernel(
    keys, places, ends, moved_keys, moved, n, parts, shift, flip, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements of a part behind those of lesser digits, and behind those of the same one in the parts before."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    key = tl.load(keys + row * n + at, here, other=0)
    place = at
    if places is not None:
        place = tl.load(places + row * n + at, here, other=0)
    hot = _digits(key, here, shift, flip, DIGITS)
    so_far = tl.cumsum(hot, 0)
    first = tl.load(ends + (row * DIGITS + tl.arange(0, DIGITS)) * parts + part) - tl.sum(hot, 0)
    goal = tl.sum(hot * (first[None, :] + so_far - 1), 1)
    tl.store(moved_keys + row * n + goal, key, here)
    tl.store(moved + row * n + goal, place, here)


@triton.jit
def select_kernel(
    keys, chosen, places, n, k, ROUNDS: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The k least of a row, as they follow each other in it: by each digit of the greatest of them, the sign in the
    first, fewer are left that may be."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * n
    ZERO: tl.constexpr = keys.dtype.element_ty
    last, left = tl.cast(0, ZERO), k
    for turn in range(0, ROUNDS):
        counted = tl.zeros((DIGITS,), tl.int32)
        shift = BITS * (ROUNDS - 1 - turn)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            high = tl.load(keys + at, at < n, other=0) >> shift
            inside = (at < n) & ((turn == 0) | ((high >> BITS) == last))
            digit = tl.where(turn == 0, high + DIGITS // 2, high & (DIGITS - 1))
            counted += tl.sum((inside[:, None] & (digit[:, None] == tl.arange(0, DIGITS)[None, :])).to(tl.int32), 0)
        fewer = tl.cumsum(counted, 0) < left
        digit = tl.sum(fewer.to(tl.int32), 0).to(ZERO)
        left -= tl.sum(tl.where(fewer, counted, 0), 0)
        last = tl.where(turn == 0, digit - DIGITS // 2, last * DIGITS + digit).to(ZERO)
    taken, equal = 0, 0
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = tl.load(keys + at, at < n, other=0)
        same = (at < n) & (key == last)
        kept = ((at < n) & (key < last)) | (same & (equal + tl.cumsum(same.to(tl.int32), 0) <= left))
        goal = taken + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(chosen + row * k + goal, key, kept & (goal < k))
        tl.store(places + row * k + goal, at, kept & (goal < k))
        taken += tl.sum(kept.to(tl.int32), 0)
        equal += tl.sum(same.to(tl.int32), 0)


@triton.jit
def search(sides, step, low, high, value, here, rounds, RIGHT: tl.constexpr):
    """Where each value stands among elements in order, from `low` on: before those equal to it, or behind them."""
    for _ in range(0, rounds):
        middle = (low + high) // 2
        between = here & (low < high)
        side = cast(tl.load(sides + middle * step, between, other=0), value.dtype)
        if RIGHT:
            above = side > value
        else:
            above = side >= value
        high = tl.where(between & above, middle, high)
        low = tl.where(between & (above == 0), middle + 1, low)
    return low


def order(keys: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """Where the first `k` of each row are, int32; `bits` are those in which the keys differ, which have a sign if these
    are all. `keys` lie row by row, and no row is empty."""
    *shape, n = keys.shape
    rows = math.prod(shape)
    if n <= COUNTED:
        return _counted(keys, None, k)
    if k <= COUNTED:
        chosen = keys.new_empty((*shape, k))
        places = keys.new_empty((*shape, k), dtype=torch.int32)
        if rows and k:
            launch(
                select_kernel, (rows,), keys.device, keys, chosen, places, n, k,
                ROUNDS=8 * keys.element_size() // DIGIT.value, BITS=DIGIT.value, DIGITS=1 << DIGIT.value, BLOCK=PART,
                num_warps=4,
            )  # fmt: skip
        return _counted(chosen, places, k)
    return _by_digits(keys, bits)[..., :k]


def _counted(keys: torch.Tensor, among: torch.Tensor | None, k: int) -> torch.Tensor:
    *shape, n = keys.shape
    places = keys.new_empty((*shape, k), dtype=torch.int32)
    if places.numel():
        tile = min(32, triton.next_power_of_2(n))
        block = min(64, triton.next_power_of_2(n))
        launch(
            rank_kernel, (math.prod(shape) * triton.cdiv(n, tile),), keys.device, keys, among, places, n, k,
            TILE=tile, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return places


def _by_digits(keys: torch.Tensor, bits: int) -> torch.Tensor:
    *shape, n = keys.shape
    rows, digits = math.prod(shape), 1 << DIGIT.value
    tile = fitted({"BLOCK": PART}, keys.device, lambda tile: HELD * digits * tile["BLOCK"], ("BLOCK",))
    parts = triton.cdiv(n, tile["BLOCK"])
    counts = keys.new_empty((*shape, digits * parts), dtype=torch.int32)
    spare = [(torch.empty_like(keys), keys.new_empty(keys.shape, dtype=torch.int32)) for _ in range(2)]
    places = None
    for turn, shift in enumerate(range(0, bits, DIGIT.value) if rows else ()):
        flip = digits // 2 if shift + DIGIT.value == 8 * keys.element_size() else 0
        options = {"DIGITS": digits, **tile, "num_warps": 4}
        launch(count_kernel, (rows * parts,), keys.device, keys, counts, n, parts, shift, flip, **options)
        cumsum(counts, "int64", counts)
        goal = spare[turn % 2]
        launch(move_kernel, (rows * parts,), keys.device, keys, places, counts, *goal, n, parts, shift, flip, **options)
        keys, places = goal
    return spare[0][1] if places is None else places
