"""Softmax, layer normalisation, the likelihood loss, and their backwards: a whole row before its first result.

Bound by memory while a row stays in cache, where it is kept in the arithmetic between its passes.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import math
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

from flagops.arrays import HALF, arithmetic, dtype_name, numpy_dtype
from flagops.backends.numba import jit
from flagops.registry import kernel

from ._functions import exp_flushed as exp
from ._functions import log
from ._ir import STORAGE, TAGS
from ._reduce import reduce
from ._routines import WIDTH, routine, wide_words
from ._row_loops import Rows, rowwise, tasks_of
from ._vectors import cast, fma, load, size, store, vhighest, vstore, vsum, where
from .reductions import ADD

_WIDE = 64
_LONG = np.int64(0)
_NONE = np.zeros(1, np.float64)
_ONES = {name: np.ones(1, name) for name in ("float32", "float64")}
_ZEROS = {name: np.zeros(1, name) for name in ("float32", "float64")}


def _tag(x: Any, acc: str) -> str:
    """What rows are read and written as: halves as they are."""
    own = dtype_name(x)
    return own if own in HALF and acc == "float32" else acc


@cache
def _words(lanes: int) -> dict[str, Any]:
    """The words of bodies for vectors of so many lanes: many where arithmetic bounds them, else as few as a register
    has, since reading several lines of each operand in turn is slower."""
    many, read, numbered = wide_words(lanes)
    words: dict[str, Any] = {"LANES": lanes, "many": many, "read": read, "numbered": numbered}
    for source in (_rest, _put, _top):
        made = FunctionType(source.__code__, source.__globals__ | words, f"{source.__name__}_{lanes}")
        made.__module__ = __name__
        words[source.__name__] = jit(made, source)
    return words


@cache
def _body(body: Any, state: str, **tags: str) -> int:
    """A body for dtypes of its arithmetic and its slots."""
    wide = body in (_softmax, _log_softmax) or any(tag in HALF for tag in tags.values())
    words = _words(_WIDE if wide else WIDTH) | {"S": TAGS[state], "S_SIZE": STORAGE[state].size}
    for name, tag in tags.items():
        words |= {name: TAGS[tag], f"{name}_SIZE": STORAGE[tag].size}
    return routine(body, "_".join((state, *tags.values())), **words)


def _rest(tag, n, x, spare, filler):
    """The last few elements of a row, and a filler behind them."""
    for i in range(n):
        store(tag, spare + i * size(tag), load(tag, x + i * size(tag)))
    for i in range(n, LANES):
        store(tag, spare + i * size(tag), cast(tag, filler))
    return read(tag, spare)


def _put(tag, n, out, spare, values):
    """As few elements of a row's end."""
    vstore(tag, spare, values)
    for i in range(n):
        store(tag, out + i * size(tag), load(tag, spare + i * size(tag)))


@jit
def _greater(a, b):
    return where((b > a) | (b != b), b, a)


def _top(tag, n, x, spare):
    """The greatest of a row, NaN if there is one."""
    whole = n - n % LANES
    tops = many(cast(tag, -np.inf))
    for i in range(0, whole, LANES):
        tops = _greater(tops, read(tag, x + i * size(tag)))
    if whole < n:
        tops = _greater(tops, _rest(tag, n - whole, x + whole * size(tag), spare, -np.inf))
    return vhighest(tops)


def _softmax(n, table, room, fresh, part, more):
    out, x, spare = load(_LONG, table), load(_LONG, table + 8), room + n * S_SIZE
    whole = n - n % LANES
    rest = n - whole
    top, masses = _top(X, n, x, spare), many(cast(S, 0))
    for i in range(0, whole, LANES):
        e = exp(read(X, x + i * X_SIZE) - top)
        vstore(S, room + i * S_SIZE, e)
        masses = masses + e
    if rest:
        e = exp(_rest(X, rest, x + whole * X_SIZE, spare, -np.inf) - top)
        _put(S, rest, room + whole * S_SIZE, spare, e)
        masses = masses + where(numbered(whole) < n, e, 0)
    share = cast(S, 1) / vsum(masses)
    for i in range(0, whole, LANES):
        vstore(OUT, out + i * OUT_SIZE, read(S, room + i * S_SIZE) * share)
    if rest:
        _put(OUT, rest, out + whole * OUT_SIZE, spare, _rest(S, rest, room + whole * S_SIZE, spare, 0) * share)
    return 0


def _log_softmax(n, table, room, fresh, part, more):
    out, x, spare = load(_LONG, table), load(_LONG, table + 8), room
    whole = n - n % LANES
    rest = n - whole
    top, masses = _top(X, n, x, spare), many(cast(S, 0))
    for i in range(0, whole, LANES):
        masses = masses + exp(read(X, x + i * X_SIZE) - top)
    if rest:
        e = exp(_rest(X, rest, x + whole * X_SIZE, spare, -np.inf) - top)
        masses = masses + where(numbered(whole) < n, e, 0)
    mass = log(vsum(masses))
    for i in range(0, whole, LANES):
        vstore(OUT, out + i * OUT_SIZE, read(X, x + i * X_SIZE) - top - mass)
    if rest:
        _put(OUT, rest, out + whole * OUT_SIZE, spare, _rest(X, rest, x + whole * X_SIZE, spare, 0) - top - mass)
    return 0


def _softmax_backward(n, table, room, fresh, part, more):
    out, g, y, spare = load(_LONG, table), load(_LONG, table + 8), load(_LONG, table + 16), room
    whole = n - n % LANES
    rest = n - whole
    sums = many(cast(S, 0))
    for i in range(0, whole, LANES):
        sums = fma(read(G, g + i * G_SIZE), read(Y, y + i * Y_SIZE), sums)
    if rest:
        grad = _rest(G, rest, g + whole * G_SIZE, spare, 0)
        sums = fma(grad, _rest(Y, rest, y + whole * Y_SIZE, spare, 0), sums)
    total = vsum(sums)
    for i in range(0, whole, LANES):
        vstore(OUT, out + i * OUT_SIZE, (read(G, g + i * G_SIZE) - total) * read(Y, y + i * Y_SIZE))
    if rest:
        grad = _rest(G, rest, g + whole * G_SIZE, spare, 0) - total
        _put(OUT, rest, out + whole * OUT_SIZE, spare, grad * _rest(Y, rest, y + whole * Y_SIZE, spare, 0))
    return 0


def _log_softmax_backward(n, table, room, fresh, part, more):
    out, g, y, spare = load(_LONG, table), load(_LONG, table + 8), load(_LONG, table + 16), room
    whole = n - n % LANES
    rest = n - whole
    sums = many(cast(S, 0))
    for i in range(0, whole, LANES):
        sums = sums + read(G, g + i * G_SIZE)
    if rest:
        sums = sums + _rest(G, rest, g + whole * G_SIZE, spare, 0)
    total = vsum(sums)
    for i in range(0, whole, LANES):
        vstore(OUT, out + i * OUT_SIZE, read(G, g + i * G_SIZE) - exp(read(Y, y + i * Y_SIZE)) * total)
    if rest:
        share = exp(_rest(Y, rest, y + whole * Y_SIZE, spare, 0)) * total
        _put(OUT, rest, out + whole * OUT_SIZE, spare, _rest(G, rest, g + whole * G_SIZE, spare, 0) - share)
    return 0


@kernel(deterministic=True, batch_invariant=True)
def softmax(x: Any, dtype: str, out: Any) -> None:
    _of_one(_softmax, x, dtype, out)


@kernel(deterministic=True, batch_invariant=True)
def log_softmax(x: Any, dtype: str, out: Any) -> None:
    _of_one(_log_softmax, x, dtype, out)


def _of_one(body: Any, x: Any, dtype: str, out: Any) -> None:
    acc = arithmetic(dtype)
    slots = Rows(out, _tag(out, acc), True), Rows(x, _tag(x, acc))
    *lead, n = out.shape
    rowwise(_body(body, acc, OUT=slots[0].tag, X=slots[1].tag), lead if n else (0,), n, slots, _NONE, 8)


@kernel(deterministic=True, batch_invariant=True)
def softmax_backward(grad: Any, output: Any, dtype: str, out: Any) -> None:
    _of_two(_softmax_backward, grad, output, dtype, out)


@kernel(deterministic=True, batch_invariant=True)
def log_softmax_backward(grad: Any, output: Any, dtype: str, out: Any) -> None:
    _of_two(_log_softmax_backward, grad, output, dtype, out)


def _of_two(body: Any, grad: Any, output: Any, dtype: str, out: Any) -> None:
    acc = arithmetic(dtype)
    slots = Rows(out, _tag(out, acc), True), Rows(grad, _tag(grad, acc)), Rows(output, _tag(output, acc))
    *lead, n = out.shape
    tags = {name: slot.tag for name, slot in zip(("OUT", "G", "Y"), slots, strict=True)}
    rowwise(_body(body, acc, **tags), lead if n else (0,), n, slots, _NONE, 4)


def _layer_norm(n, table, room, fresh, part, more):
    out, x, spare = load(_LONG, table), load(_LONG, table + 8), room
    w, b = load(_LONG, table + 16), load(_LONG, table + 24)
    whole = n - n % LANES
    rest = n - whole
    sums, squares = many(cast(S, 0)), many(cast(S, 0))
    for i in range(0, whole, LANES):
        sums = sums + read(X, x + i * X_SIZE)
    if rest:
        sums = sums + _rest(X, rest, x + whole * X_SIZE, spare, 0)
    mean = vsum(sums) / cast(S, max(n, 1))
    for i in range(0, whole, LANES):
        far = read(X, x + i * X_SIZE) - mean
        squares = fma(far, far, squares)
    if rest:
        far = where(numbered(whole) < n, _rest(X, rest, x + whole * X_SIZE, spare, 0) - mean, 0)
        squares = fma(far, far, squares)
    rstd = cast(S, cast(S, 1) / np.sqrt(vsum(squares) / cast(S, n) + load(S, more)))
    for i in range(0, whole, LANES):
        y = (read(X, x + i * X_SIZE) - mean) * rstd
        vstore(OUT, out + i * OUT_SIZE, fma(y, read(S, w + i * S_SIZE), read(S, b + i * S_SIZE)))
    if rest:
        y = (_rest(X, rest, x + whole * X_SIZE, spare, 0) - mean) * rstd
        y = fma(y, _rest(S, rest, w + whole * S_SIZE, spare, 0), _rest(S, rest, b + whole * S_SIZE, spare, 0))
        _put(OUT, rest, out + whole * OUT_SIZE, spare, y)
    store(S, load(_LONG, table + 32), mean)
    store(S, load(_LONG, table + 40), rstd)
    return 0


def _spread(x: Any, acc: str, otherwise: dict[str, Any]) -> Rows:
    """A row of weights that all rows share, or one number for all that there are none of."""
    return Rows(otherwise[acc] if x is None else x, acc)


@kernel(deterministic=True, batch_invariant=True)
def layer_norm(x: Any, weight: Any, bias: Any, eps: float, stats: str, out: Any) -> None:
    """A row is read once, and gone through twice more in cache."""
    y, mean, rstd = out
    acc = arithmetic(dtype_name(x))
    *lead, n = x.shape
    slots = (
        Rows(y, _tag(y, acc), True), Rows(x, _tag(x, acc)), _spread(weight, acc, _ONES), _spread(bias, acc, _ZEROS),
        Rows(mean, acc, True, single=True), Rows(rstd, acc, True, single=True),
    )  # fmt: skip
    scalars = np.array([eps], numpy_dtype(acc))
    rowwise(_body(_layer_norm, acc, OUT=slots[0].tag, X=slots[1].tag), lead, n, slots, scalars, 4)


def _layer_norm_backward(n, table, room, fresh, part, more):
    out, g, x = load(_LONG, table), load(_LONG, table + 8), load(_LONG, table + 16)
    mean, rstd = load(S, load(_LONG, table + 24)), load(S, load(_LONG, table + 32))
    w, half, spare = load(_LONG, table + 40), part + n * S_SIZE, room
    whole = n - n % LANES
    rest = n - whole
    if fresh:
        for i in range(2 * n):
            store(S, part + i * S_SIZE, cast(S, 0))
    sums, dots = many(cast(S, 0)), many(cast(S, 0))
    for i in range(0, whole, LANES):
        grad, y = read(G, g + i * G_SIZE), (read(X, x + i * X_SIZE) - mean) * rstd
        vstore(S, part + i * S_SIZE, fma(grad, y, read(S, part + i * S_SIZE)))
        vstore(S, half + i * S_SIZE, read(S, half + i * S_SIZE) + grad)
        grad = grad * read(S, w + i * S_SIZE)
        sums, dots = sums + grad, fma(grad, y, dots)
    if rest:
        grad = _rest(G, rest, g + whole * G_SIZE, spare, 0)
        y = (_rest(X, rest, x + whole * X_SIZE, spare, 0) - mean) * rstd
        y = where(numbered(whole) < n, y, 0)
        done = fma(grad, y, _rest(S, rest, part + whole * S_SIZE, spare, 0))
        _put(S, rest, part + whole * S_SIZE, spare, done)
        _put(S, rest, half + whole * S_SIZE, spare, _rest(S, rest, half + whole * S_SIZE, spare, 0) + grad)
        grad = grad * _rest(S, rest, w + whole * S_SIZE, spare, 0)
        sums, dots = sums + grad, fma(grad, y, dots)
    total, dot = vsum(sums) / cast(S, n), vsum(dots) / cast(S, n)
    for i in range(0, whole, LANES):
        grad, y = read(G, g + i * G_SIZE) * read(S, w + i * S_SIZE), (read(X, x + i * X_SIZE) - mean) * rstd
        vstore(OUT, out + i * OUT_SIZE, (grad - total - y * dot) * rstd)
    if rest:
        grad = _rest(G, rest, g + whole * G_SIZE, spare, 0) * _rest(S, rest, w + whole * S_SIZE, spare, 0)
        y = (_rest(X, rest, x + whole * X_SIZE, spare, 0) - mean) * rstd
        _put(OUT, rest, out + whole * OUT_SIZE, spare, (grad - total - y * dot) * rstd)
    return 0


@kernel(deterministic=True)
def layer_norm_backward(grad: Any, x: Any, mean: Any, rstd: Any, weight: Any, sums: str, out: Any) -> None:
    """Gradients of weights are summed over runs of rows, as long as their number says, and then over those."""
    dx, dw, db = out
    acc = arithmetic(dtype_name(dx))
    *lead, n = dx.shape
    slots = (
        Rows(dx, _tag(dx, acc), True), Rows(grad, _tag(grad, acc)), Rows(x, _tag(x, acc)),
        Rows(mean, acc, single=True), Rows(rstd, acc, single=True), _spread(weight, acc, _ONES),
    )  # fmt: skip
    per = max(16, -(-math.prod(lead) // 128))
    tasks = tasks_of(lead, slots, per)
    parts = np.empty((tasks, 2 * n), numpy_dtype(acc))
    tags = {name: slot.tag for name, slot in zip(("OUT", "G", "X"), slots, strict=False)}
    rowwise(_body(_layer_norm_backward, acc, **tags), lead, n, slots, _NONE, 6, per, parts)
    for x, own in ((dw, parts[:, :n]), (db, parts[:, n:])):
        reduce(ADD, own.T, (acc, acc, _tag(x, acc)), x)


def _nll_loss(n, table, room, fresh, part, more):
    target, none = load(_LONG, load(_LONG, table + 24)), load(_LONG, more)
    share, loss = cast(S, 0), cast(S, 0)
    if target != none and not 0 <= target < n:
        share, loss = cast(S, np.nan), cast(S, np.nan)
    elif target != none:
        share = load(S, load(_LONG, table + 32) + target * S_SIZE)
        loss = -share * load(X, load(_LONG, table + 16) + target * X_SIZE)
    store(OUT, load(_LONG, table), loss)
    store(OUT, load(_LONG, table + 8), share)
    return 0


@kernel(deterministic=True, batch_invariant=True)
def nll_loss(x: Any, target: Any, weight: Any, ignore: int, out: Any) -> None:
    losses, shares = out
    acc = arithmetic(dtype_name(losses))
    slots = (
        Rows(losses, _tag(losses, acc), True, single=True), Rows(shares, _tag(shares, acc), True, single=True),
        Rows(x, _tag(x, acc)), Rows(target, "int64", single=True), _spread(weight, acc, _ONES),
    )  # fmt: skip
    body = _body(_nll_loss, acc, OUT=slots[0].tag, X=slots[2].tag)
    rowwise(body, losses.shape, x.shape[-1], slots, np.array([ignore], np.int64), 0.01)


def _nll_loss_backward(n, table, room, fresh, part, more):
    out, target, none = load(_LONG, table), load(_LONG, load(_LONG, table + 16)), load(_LONG, more)
    for i in range(n):
        store(OUT, out + i * OUT_SIZE, cast(S, 0))
    if target != none and 0 <= target < n:
        share = load(S, load(_LONG, table + 24) + target * S_SIZE)
        store(OUT, out + target * OUT_SIZE, -share * load(S, load(_LONG, table + 8)))
    return 0


@kernel(deterministic=True, batch_invariant=True)
def nll_loss_backward(grad: Any, target: Any, weight: Any, classes: int, ignore: int, out: Any) -> None:
    acc = arithmetic(dtype_name(out))
    slots = (
        Rows(out, _tag(out, acc), True), Rows(grad, acc, single=True), Rows(target, "int64", single=True),
        _spread(weight, acc, _ONES),
    )  # fmt: skip
    *lead, n = out.shape
    body = _body(_nll_loss_backward, acc, OUT=slots[0].tag)
    rowwise(body, lead, n, slots, np.array([ignore], np.int64), 1)
