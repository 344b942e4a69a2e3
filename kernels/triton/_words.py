# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What lanes are written in, in Triton: quotients and roots are rounded once, functions are the vendor's libraries'.

Triton's own exponential and logarithms are off by more than a unit in the last place, its ``/`` and ``sqrt`` are
approximate, and its ``-x`` is ``0 - x``, which loses the sign of a zero.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

from ._common import INTERPRET

try:  # by Triton's own names where it knows the vendor's functions, which Ascend's does not
    from triton.language.extra.ascend import libdevice
except ImportError:
    from triton.language.extra import libdevice


def _in_the_interpreter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of NumPy as a word: the interpreter has no libraries of machine code."""
    from triton.runtime.interpreter import TensorHandle

    def word(*operands: Any) -> Any:
        dtype, own = operands[0].dtype, operands[0].handle.data.dtype
        data = np.asarray(function(*(x.handle.data.astype(np.float64) for x in operands)), own)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if data.ndim else dtype)

    return word


def _erf(x: Any) -> Any:
    import math

    return np.vectorize(math.erf, otypes=[np.float64])(x)


LIBRARY = ("exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "trunc", "rint", "fmod", "copysign")
OWN = {name: getattr(tl, name) for name in ("exp", "log", "log2", "sin", "cos", "erf")} | {"rint": libdevice.nearbyint}
"""For those that the vendor's library lacks, as Ascend's does."""
_FUNCTIONS: dict[str, Any] = (
    {name: _in_the_interpreter(getattr(np, name)) for name in LIBRARY}
    | {"erf": _in_the_interpreter(_erf), "pow": _in_the_interpreter(np.power)}
    if INTERPRET.value
    else {name: getattr(libdevice, name, OWN.get(name)) for name in (*LIBRARY, "erf", "pow")}
)
_exact_rest, _power, _trunc, _copysign = (_FUNCTIONS[name] for name in ("fmod", "pow", "trunc", "copysign"))


@triton.jit
def same(x):
    return x


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def negative(x):
    return x * -1


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def ceil(x):
    return tl.ceil(x)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        x = tl.sqrt_rn(x)
    else:
        x = tl.sqrt(x)
    return x


@triton.jit
def divide(x, y):
    """``x / y`` rounded once; one of both may be a number in the source."""
    if (x + y).dtype == tl.float32:
        x = tl.div_rn(x, y)
    else:
        x = x / y
    return x


@triton.jit
def pow(x, y):
    """In float64: the library's own in float32 is off by up to four units in the last place."""
    return _power(x.to(tl.float64), y.to(tl.float64)).to(x.dtype)


@triton.jit
def _quotient(x, y):
    """Of integers, towards 0: an integer divided by 0 is 0, the least one divided by -1 itself."""
    whole = x // tl.where((y == 0) | (y == -1), 1, y)
    return tl.where(y == 0, 0, tl.where(y == -1, -x, whole))


@triton.jit
def _apart(rest, y):
    """Whether there is a rest whose sign is not the divisor's."""
    return (rest != 0) & ((y < 0) != (rest < 0))


@triton.jit
def fmod(x, y):
    if x.dtype.is_floating():
        rest = _exact_rest(x, y)
    else:
        rest = x - _quotient(x, y) * y
    return rest


@triton.jit
def remainder(x, y):
    rest = fmod(x, y)
    return tl.where(_apart(rest, y), rest + y, rest)


@triton.jit
def trunc_divide(x, y):
    if x.dtype.is_floating():
        quotient = _trunc(divide(x, y))
    else:
        quotient = _quotient(x, y)
    return quotient


@triton.jit
def floor_divide(x, y):
    """Of floats the exact quotient rounded down, not the rounded one."""
    rest = fmod(x, y)
    if x.dtype.is_floating():
        ratio = divide(x, y)
        quotient = divide(x - rest, y)
        quotient = tl.where(_apart(rest, y), quotient - 1, quotient)
        whole = tl.floor(quotient)
        whole = tl.where(quotient - whole > 0.5, whole + 1, whole)
        whole = tl.where(quotient == 0, _copysign(quotient * 0, ratio), whole)
        quotient = tl.where(y == 0, ratio, whole)
    else:
        quotient = _quotient(x, y)
        quotient = tl.where(_apart(rest, y), quotient - 1, quotient)
        quotient = tl.where(y == 0, 0, quotient)
    return quotient


WORDS: dict[str, Any] = {
    **{name: _FUNCTIONS[name] for name in ("exp", "expm1", "log", "log1p", "log2", "sin", "cos", "tanh", "erf")},
    **{"trunc": _trunc, "round": _FUNCTIONS["rint"], "abs": absolute, "neg": negative},
    **{word.__name__: word for word in (where, maximum, minimum, floor, ceil, sqrt, divide, pow)},
    **{word.__name__: word for word in (fmod, remainder, trunc_divide, floor_divide)},
}
"""By the names that lanes know them by; `divide` is what their ``/`` means."""
