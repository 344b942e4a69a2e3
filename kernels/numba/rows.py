"""Softmax, layer normalisation, the likelihood loss, and their backwards: a whole row before its first result.

Bound by memory while a row stays in cache, where it is kept in the arithmetic between its passes.
"""

# ruff: noqa: F821
# mypy: disable-error-code="name-defined, no-untyped-def"

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from flagops.reference._cards import arithmetic

from flagops.arrays import HALF, dtype_name, numpy_dtype
from flagops.registry import kernel

from ._functions import exp, log
from ._ir import STORAGE, TAGS
from ._reduce import reduce
from ._routines import WIDTH, repeated, routine, vread
from ._row_loops import Rows, rowwise, tasks_of
from ._vectors import cast, fma, load, store, vhighest, vstore, vsum, where
from .reductions import ADD

_LONG = np.int64(0)
_NONE = np.zeros(1, np.float64)
_ONES = {name: np.ones(1, name) for name in ("float32", "float64")}
_ZEROS = {name: np.zeros(1, name) for name in ("float32", "float64")}


def _tag(x: Any, acc: str) -> str:
    """What rows are read and written as: halves as they are."""
    own = dtype_name(x)
    return own if own in HALF and acc == "float32" else acc


@cache
def _body(body: Any, state: str, **tags: str) -> int:
    """A body for dtypes of its arithmetic and its slots."""
    words: dict[str, Any] = {"S": TAGS[state], "S_SIZE": STORAGE[state].size}
    for name, tag in tags.items():
        words |= {name: TAGS[tag], f"{name}_SIZE": STORAGE[tag].size}
    return routine(body, "_".join((state, *tags.values())), **words)


def _softmax(n, table, room, fresh, part, more):
    out, x = load(_LONG, table), load(_LONG, table + 8)
    whole = n - n % WIDTH
    tops = repeated(cast(S, -np.inf))
    for i in range(0, whole, WIDTH):
        a = vread(X, x + i * X_SIZE)
        vstore(S, room + i * S_SIZE, a)
        tops = where((a > tops) | (a != a), a, tops)
    top = vhighest(tops)
    for i in range(whole, n):
        b = load(X, x + i * X_SIZE)
        store(S, room + i * S_SIZE, b)
        top = where((b > top) | (b != b), b, top)
    masses = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        e = exp(vread(S, room + i * S_SIZE) - top)
        vstore(S, room + i * S_SIZE, e)
        masses = masses + e
    mass = vsum(masses)
    for i in range(whole, n):
        f = exp(load(S, room + i * S_SIZE) - top)
        store(S, room + i * S_SIZE, f)
        mass += f
    share = cast(S, 1) / mass
    for i in range(0, whole, WIDTH):
        vstore(OUT, out + i * OUT_SIZE, vread(S, room + i * S_SIZE) * share)
    for i in range(whole, n):
        store(OUT, out + i * OUT_SIZE, load(S, room + i * S_SIZE) * share)
    return 0


def _log_softmax(n, table, room, fresh, part, more):
    out, x = load(_LONG, table), load(_LONG, table + 8)
    whole = n - n % WIDTH
    tops = repeated(cast(S, -np.inf))
    for i in range(0, whole, WIDTH):
        a = vread(X, x + i * X_SIZE)
        vstore(S, room + i * S_SIZE, a)
        tops = where((a > tops) | (a != a), a, tops)
    top = vhighest(tops)
    for i in range(whole, n):
        b = load(X, x + i * X_SIZE)
        store(S, room + i * S_SIZE, b)
        top = where((b > top) | (b != b), b, top)
    masses = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        masses = masses + exp(vread(S, room + i * S_SIZE) - top)
    mass = vsum(masses)
    for i in range(whole, n):
        mass += exp(load(S, room + i * S_SIZE) - top)
    size = log(mass)
    for i in range(0, whole, WIDTH):
        vstore(OUT, out + i * OUT_SIZE, vread(S, room + i * S_SIZE) - top - size)
    for i in range(whole, n):
        store(OUT, out + i * OUT_SIZE, load(S, room + i * S_SIZE) - top - size)
    return 0


def _softmax_backward(n, table, room, fresh, part, more):
    out, g, y = load(_LONG, table), load(_LONG, table + 8), load(_LONG, table + 16)
    whole = n - n % WIDTH
    sums = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        sums = fma(vread(G, g + i * G_SIZE), vread(Y, y + i * Y_SIZE), sums)
    total = vsum(sums)
    for i in range(whole, n):
        total += load(G, g + i * G_SIZE) * load(Y, y + i * Y_SIZE)
    for i in range(0, whole, WIDTH):
        vstore(OUT, out + i * OUT_SIZE, (vread(G, g + i * G_SIZE) - total) * vread(Y, y + i * Y_SIZE))
    for i in range(whole, n):
        store(OUT, out + i * OUT_SIZE, (load(G, g + i * G_SIZE) - total) * load(Y, y + i * Y_SIZE))
    return 0


def _log_softmax_backward(n, table, room, fresh, part, more):
    out, g, y = load(_LONG, table), load(_LONG, table + 8), load(_LONG, table + 16)
    whole = n - n % WIDTH
    sums = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        sums = sums + vread(G, g + i * G_SIZE)
    total = vsum(sums)
    for i in range(whole, n):
        total += load(G, g + i * G_SIZE)
    for i in range(0, whole, WIDTH):
        vstore(OUT, out + i * OUT_SIZE, vread(G, g + i * G_SIZE) - exp(vread(Y, y + i * Y_SIZE)) * total)
    for i in range(whole, n):
        store(OUT, out + i * OUT_SIZE, load(G, g + i * G_SIZE) - exp(load(Y, y + i * Y_SIZE)) * total)
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
    out, x = load(_LONG, table), load(_LONG, table + 8)
    w, b = load(_LONG, table + 16), load(_LONG, table + 24)
    whole = n - n % WIDTH
    sums = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        v = vread(X, x + i * X_SIZE)
        vstore(S, room + i * S_SIZE, v)
        sums = sums + v
    mean = vsum(sums)
    for i in range(whole, n):
        store(S, room + i * S_SIZE, load(X, x + i * X_SIZE))
        mean += load(X, x + i * X_SIZE)
    mean = mean / cast(S, max(n, 1))
    squares = repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        d = vread(S, room + i * S_SIZE) - mean
        squares = fma(d, d, squares)
    square = vsum(squares)
    for i in range(whole, n):
        square += (load(S, room + i * S_SIZE) - mean) * (load(S, room + i * S_SIZE) - mean)
    rstd = cast(S, cast(S, 1) / np.sqrt(square / cast(S, n) + load(S, more)))
    for i in range(0, whole, WIDTH):
        y = (vread(S, room + i * S_SIZE) - mean) * rstd
        vstore(OUT, out + i * OUT_SIZE, fma(y, vread(S, w + i * S_SIZE), vread(S, b + i * S_SIZE)))
    for i in range(whole, n):
        z = (load(S, room + i * S_SIZE) - mean) * rstd
        store(OUT, out + i * OUT_SIZE, z * load(S, w + i * S_SIZE) + load(S, b + i * S_SIZE))
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
    w, half = load(_LONG, table + 40), part + n * S_SIZE
    whole = n - n % WIDTH
    if fresh:
        for i in range(2 * n):
            store(S, part + i * S_SIZE, cast(S, 0))
    sums, dots = repeated(cast(S, 0)), repeated(cast(S, 0))
    for i in range(0, whole, WIDTH):
        grad = vread(G, g + i * G_SIZE)
        y = (vread(X, x + i * X_SIZE) - mean) * rstd
        vstore(S, part + i * S_SIZE, fma(grad, y, vread(S, part + i * S_SIZE)))
        vstore(S, half + i * S_SIZE, vread(S, half + i * S_SIZE) + grad)
        grad = grad * vread(S, w + i * S_SIZE)
        sums, dots = sums + grad, fma(grad, y, dots)
    total, dot = vsum(sums), vsum(dots)
    for i in range(whole, n):
        a = load(G, g + i * G_SIZE)
        z = (load(X, x + i * X_SIZE) - mean) * rstd
        store(S, part + i * S_SIZE, a * z + load(S, part + i * S_SIZE))
        store(S, half + i * S_SIZE, load(S, half + i * S_SIZE) + a)
        a = a * load(S, w + i * S_SIZE)
        total, dot = total + a, dot + a * z
    total, dot = total / cast(S, n), dot / cast(S, n)
    for i in range(0, whole, WIDTH):
        y = (vread(X, x + i * X_SIZE) - mean) * rstd
        grad = vread(G, g + i * G_SIZE) * vread(S, w + i * S_SIZE)
        vstore(OUT, out + i * OUT_SIZE, (grad - total - y * dot) * rstd)
    for i in range(whole, n):
        z = (load(X, x + i * X_SIZE) - mean) * rstd
        a = load(G, g + i * G_SIZE) * load(S, w + i * S_SIZE)
        store(OUT, out + i * OUT_SIZE, (a - total - z * dot) * rstd)
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
