"""Sinkhorn's rounds on small matrices on the CPU: a vector holds the same entry of as many of them as it has lanes."""

from __future__ import annotations

from flagops.backends.numba import jit

from ._blocks import Block, shifted, vget, vput
from ._functions import exp
from ._vectors import cast, fma, lanes, vsplat, where


@jit
def pairs(block):
    """The same block, two vectors a row: a distance that the compiler knows."""
    return Block(block.tag, block.base, 2 * lanes(block.tag))


@jit
def sigmoid(x):
    power = exp(-abs(x))
    return where(x < 0, power, 1) / (1 + power)


@jit
def sinkhorn(matrix, n, iters, small, factors):
    """Two vectors of matrices, from logits to comb; `factors` of their rows and columns are worked in."""
    count = lanes(matrix.tag)
    matrix, factors = pairs(matrix), pairs(factors)
    columns = shifted(factors, n, 0)
    softmax(matrix, n, small)
    softmax(shifted(matrix, 0, count), n, small)
    for i in range(2 * n):
        for c in range(0, 2 * count, count):
            vput(factors, i, c, vsplat(cast(matrix.tag, 1.0)))
    balance(matrix, n, 1, n, factors, columns, small)
    for _ in range(iters - 1):
        balance(matrix, n, n, 1, columns, factors, small)
        balance(matrix, n, 1, n, factors, columns, small)
    for j in range(n):
        for k in range(n):
            for c in range(0, 2 * count, count):
                both = vget(factors, j, c) * vget(columns, k, c)
                vput(matrix, j * n + k, c, vget(matrix, j * n + k, c) * both)


@jit
def softmax(matrix, n, small):
    """Softmax of each row, plus eps, for one of the two vectors of an entry."""
    matrix = pairs(matrix)
    for j in range(0, n * n, n):
        top = vget(matrix, j, 0)
        for k in range(j + 1, j + n):
            value = vget(matrix, k, 0)
            top = where(top < value, value, top)
        total = vsplat(cast(matrix.tag, 0.0))
        for k in range(j, j + n):
            value = exp(vget(matrix, k, 0) - top)
            total += value
            vput(matrix, k, 0, value)
        factor = 1 / total
        for k in range(j, j + n):
            vput(matrix, k, 0, fma(vget(matrix, k, 0), factor, small))


@jit
def balance(matrix, n, across, along, others, own, small):
    """own /= own * (sums of the matrix along one axis, weighted by the factors of the other) + eps."""
    count = lanes(matrix.tag)
    matrix, others, own = pairs(matrix), pairs(others), pairs(own)
    for i in range(n):
        p = q = vsplat(cast(matrix.tag, 0.0))
        for j in range(n):
            entry = i * across + j * along
            p = fma(vget(matrix, entry, 0), vget(others, j, 0), p)
            q = fma(vget(matrix, entry, count), vget(others, j, count), q)
        first, second = vget(own, i, 0), vget(own, i, count)
        vput(own, i, 0, first / fma(p, first, small))
        vput(own, i, count, second / fma(q, second, small))


@jit
def sinkhorn_backward(matrix, slope, n, iters, small, history):
    """For one of the two vectors of an entry: the gradient of comb to that of the logits in `matrix`, which become
    softmax; a round's state is made again from the factors of rows and columns in `history`, 2 * iters + 1 of them."""
    real = matrix.tag
    matrix, slope, history = pairs(matrix), pairs(slope), pairs(history)
    softmax(matrix, n, cast(real, 0.0))
    for i in range(2 * n):
        vput(history, i, 0, vsplat(cast(real, 1.0)))
    for step in range(2 * iters - 1):
        across, along = (1, n) if step % 2 == 0 else (n, 1)
        own, others = shifted(history, step * n, 0), shifted(history, (step + 1) * n, 0)
        after = shifted(history, (step + 2) * n, 0)
        for i in range(n):
            total = vsplat(cast(real, 0.0))
            for j in range(n):
                total = fma(vget(matrix, i * across + j * along, 0) + small, vget(others, j, 0), total)
            before = vget(own, i, 0)
            vput(after, i, 0, before / fma(total, before, small))
    for step in range(2 * iters - 2, -1, -1):
        across, along = (1, n) if step % 2 == 0 else (n, 1)
        own, others = shifted(history, step * n, 0), shifted(history, (step + 1) * n, 0)
        after = shifted(history, (step + 2) * n, 0)
        for i in range(n):
            factor = vget(after, i, 0)
            total = vsplat(cast(real, 0.0))
            for j in range(n):
                entry = i * across + j * along
                state = (vget(matrix, entry, 0) + small) * vget(others, j, 0)
                total = fma(vget(slope, entry, 0), state, total)
            total, factor = total * factor, factor / vget(own, i, 0)
            for j in range(n):
                entry = i * across + j * along
                vput(slope, entry, 0, (vget(slope, entry, 0) - total) * factor)
    for j in range(0, n * n, n):
        total = vsplat(cast(real, 0.0))
        for k in range(j, j + n):
            total = fma(vget(slope, k, 0), vget(matrix, k, 0), total)
        for k in range(j, j + n):
            vput(slope, k, 0, vget(matrix, k, 0) * (vget(slope, k, 0) - total))
