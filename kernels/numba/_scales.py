"""Blocks under one scale on the CPU: found from the largest magnitude, and what is divided by it in a small float."""

import numpy as np

from flagops.backends.numba import jit

from ._blocks import at, vget, vput
from ._formats import INFINITY, NO_SCALE, SINGLE, floor, full, inverse, per_byte, vencode, vround
from ._vectors import BYTE, FLOAT32, INT32, bits, from_bits, lanes, maximum, store, vhighest, vsplat

_MANTISSA, _BIAS, _NAN = SINGLE.mantissa, SINGLE.bias, np.float32(np.nan)
_ALL_BUT_ONE = 2**_MANTISSA - 1  # added to a float's bits, it carries into the exponent unless the mantissa is 0


@jit
def _power(code):
    """The scale that a code of e8m0 stands for; 0 and NaN have others."""
    return from_bits(FLOAT32, code << _MANTISSA)


@jit
def block_scale(form, x, count, power_of_two):
    """The scale of a row of whole vectors and its e8m0 code, 0 unless it is a power of two; NaN if not all is finite.

    Magnitudes are compared as integers, where NaN is above infinity: one comparison finds both.
    """
    highest = vsplat(INT32)
    for i in range(0, count, lanes(x.tag)):
        highest = maximum(highest, bits(abs(vget(x, 0, i))))
    top = np.int64(vhighest(highest))
    if top >= INFINITY:
        return _NAN, NO_SCALE
    scale = max(from_bits(FLOAT32, top), floor(form)) * inverse(form)
    if power_of_two:
        code = (bits(scale) + _ALL_BUT_ONE) >> _MANTISSA
        return _power(code), code
    return scale, 0


@jit
def _divisor(scale, code):
    """Whether a scale's inverse is exact, as that of a power of two is, and then that: a product costs less."""
    exact = 0 < code < NO_SCALE
    return exact, _power(2 * _BIAS - code) if exact else scale


@jit
def encode(form, x, count, power_of_two, codes):
    """The codes of a row of whole vectors, those of most magnitude where it is not finite; and as `block_scale`."""
    scale, code = block_scale(form, x, count, power_of_two)
    if code == NO_SCALE:
        for i in range(count // per_byte(form)):
            store(BYTE, at(codes, 0, i), full(form))
    else:
        exact, divisor = _divisor(scale, code)
        for i in range(0, count, lanes(x.tag)):
            value = vget(x, 0, i)
            vencode(form, at(codes, 0, i // per_byte(form)), value * divisor if exact else value / divisor)
    return scale, code


@jit
def fake(form, x, count, power_of_two, target):
    """A row of whole vectors to the format and back; NaN if not all is finite."""
    scale, code = block_scale(form, x, count, power_of_two)
    exact, divisor = _divisor(scale, code)
    for i in range(0, count, lanes(x.tag)):
        value = vget(x, 0, i)
        vput(target, 0, i, vround(form, value * divisor if exact else value / divisor) * scale)
