"""Rotary position embedding of DeepSeek-V4: interleaved pairs in the last channels, and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flagops.arrays import FLOATS
from flagops.operator import Dims, Tensor, operator
from flagops.scalars import flag, real, whole

from ._rounding import Array, contraction_bound, magnitude, unit, wide


def _angles(dtypes: Mapping[str, str]) -> tuple[str, ...]:
    return ("float64",) if dtypes["x"] == "float64" else ("float32",)


def _fits(dims: Dims, arguments: Mapping[str, Any]) -> str | None:
    if 2 * dims["r"] <= dims["d"]:
        return None
    return f"cos and sin rotate {dims['r']} pairs of channels, but x has only {dims['d']} channels"


@operator(
    tensors={
        "x": Tensor("... s h d", FLOATS),
        "cos": Tensor("... s r", _angles),
        "sin": Tensor("... s r", _angles),
    },
    scalars={"inverse": flag()},
    result=Tensor("... s h d", "x"),
    workloads={
        "v4-flash.queries-1": {"batch": (1,), "s": 1, "h": 64, "d": 512, "r": 32, "dtype": "bfloat16"},
        "v4-flash.queries-1k": {"batch": (1,), "s": 1024, "h": 64, "d": 512, "r": 32, "dtype": "bfloat16"},
        "v4-flash.keys-4k": {"batch": (1,), "s": 4096, "h": 1, "d": 512, "r": 32, "dtype": "bfloat16"},
        "v4-pro.queries-1": {"batch": (1,), "s": 1, "h": 128, "d": 512, "r": 32, "dtype": "bfloat16"},
    },
    flops=lambda dims, batch: 6.0 * math.prod(batch) * dims["s"] * dims["h"] * dims["r"],
    inplace={"out": "x"},
    integral=True,
    sizes={"r": (4, 1, 0, 3, 8, 17), "d": (34, 64, 35, 130), "s": (1, 2, 3, 0, 7), "h": (1, 2, 3, 0, 5)},
    cases=(
        {"s": 3, "h": 2, "d": 512, "r": 32},
        {"s": 2, "h": 2, "d": 10, "r": 5},
        {"s": 33, "h": 1, "d": 128, "r": 32},
    ),
    check=_fits,
)
def rotary_embedding(x: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
    """Rotate pairs of neighbouring channels, the last ``2 r`` of each head, by the angles of its position.

    ``y0 = x0 cos - x1 sin`` and ``y1 = x0 sin + x1 cos`` for channels (2i, 2i + 1); the first channels stay.

    Args:
        x: ``[..., s, h, d]``, float16, bfloat16, float32 or float64, any strides; a tensor without heads is
            ``x[..., None, :]``.
        cos, sin: ``[..., s, r]`` float32 (float64 when ``x`` is), with ``2 r <= d``; see `yarn_table`.
        inverse: rotate back, ``sin`` negated.
        out: ``[..., s, h, d]`` to write into, dtype of ``x``; may be ``x`` itself; allocated if None.

    Returns:
        ``[..., s, h, d]``; the products and their sum are float32 (float64 for float64), rounded once.

    Raises:
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        ValueError: more channels are to be rotated than there are, or ranks, sizes or devices do not fit.

    Source: DeepSeek-V4's inference code. transformers rounds cos and sin to the dtype of the activations.
    """
    sign = -1 if inverse else 1
    return _rotate(wide(x), wide(cos), sign * wide(sin), np.subtract)


def _rotate(x: Array, cos: Array, sin: Array, minus: Any) -> Array:
    r = cos.shape[-1]
    x = np.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-3], cos.shape[:-2], sin.shape[:-2]), *x.shape[-3:]))
    y, (c, s) = x.copy(), (t[..., None, :] for t in (cos, sin))
    first = x.shape[-1] - 2 * r
    x0, x1 = x[..., first::2], x[..., first + 1 :: 2]
    with np.errstate(all="ignore"):
        y[..., first::2] = minus(x0 * c, x1 * s)
        y[..., first + 1 :: 2] = x0 * s + x1 * c
    return y


def rotary_embedding_bound(exact: Array, arguments: Mapping[str, Any], dtype: str) -> Array:
    x, cos, sin = (magnitude(wide(arguments[name])) for name in ("x", "cos", "sin"))
    bound = contraction_bound(exact, _rotate(x, cos, sin, np.add), 3, dtype)
    bound[..., : x.shape[-1] - 2 * cos.shape[-1]] = 0
    return bound


def _some_positions(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, dims: Dims) -> Array:
    return rng.integers(0, rng.choice([300, 1 << 20]), shape).astype(dtype)


@operator(
    tensors={"positions": Tensor("... s", ("int32", "int64"), draw=_some_positions)},
    scalars={
        "dim": whole((64, 8, 2, 0, 130), least=0, even=True),
        "base": real((160000.0, 100.0), above=0),
        "factor": real((16.0, 1.0, 40.0), above=0),
        "original": real((65536.0, 64.0), above=0),
        "beta_fast": real((32.0, 1.0), above=0),
        "beta_slow": real((1.0,), above=0),
    },
    result={"cos": Tensor("... s r", ("float32",)), "sin": Tensor("... s r", ("float32",))},
    workloads={"v4.prefill-4k": {"batch": (), "s": 4096}, "v4.decode-64": {"batch": (), "s": 64}},
    flops=lambda dims, batch: 3.0 * math.prod(batch) * dims["s"] * dims["r"],
    derived=lambda dims, scalars: {"r": scalars["dim"] // 2},
)
def yarn_table(
    positions: Array,
    dim: int = 64,
    base: float = 160000.0,
    factor: float = 16.0,
    original: float = 65536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> tuple[Array, Array]:
    """Cosines and sines for `rotary_embedding`, with YaRN's slower angles for channels of long wavelength.

    ``theta_i = base^(-2i/dim)``; with ``corr(n) = dim ln(original / (2 pi n)) / (2 ln base)``, ``low = floor
    corr(beta_fast)``, ``high = ceil corr(beta_slow)`` (clipped to 0..dim-1, ``high = low + 0.001`` if equal) and
    ``ramp_i = clip((i - low) / (high - low), 0, 1)`` the angle of position p is
    ``p (theta_i / factor ramp_i + theta_i (1 - ramp_i))``.

    Args:
        positions: ``[..., s]``, int32 or int64.
        dim: channels that are rotated, even.
        base: of the wavelengths.
        factor: by which the longest waves are stretched; 1 gives the plain table.
        original: positions that the model was trained on before stretching.
        beta_fast, beta_slow: turns within ``original`` above and below which a channel is left or stretched.
        out: a pair of ``[..., s, dim / 2]`` float32 to write into; allocated if None.

    Returns:
        ``(cos, sin)``, each ``[..., s, dim / 2]`` float32. Every step up to the angle is float32, correctly rounded, as
        are ``float32(position)`` and the angle itself; cos and sin are those of that float32 number.

    Raises:
        TypeError: ``positions`` is no array of whole numbers.
        ValueError: a scalar is out of range.

    Source: DeepSeek-V4's inference code and configuration; YaRN, arXiv 2309.00071.
    """
    theta = _theta(dim, base, factor, original, beta_fast, beta_slow)
    angle = (positions.astype(np.float32)[..., None] * theta).astype(np.float64)
    return np.cos(angle), np.sin(angle)


def _theta(dim: int, base: float, factor: float, original: float, fast: float, slow: float) -> Array:
    one = np.float32(1)
    channel = np.arange(dim // 2)
    theta = one / np.power(np.float64(np.float32(base)), 2 * channel / max(dim, 1)).astype(np.float32)
    if factor == 1:
        return theta

    def corrected(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(corrected(fast)), 0), min(math.ceil(corrected(slow)), dim - 1)
    width = np.float32(high - low if high != low else 0.001)
    ramp = np.clip((channel.astype(np.float32) - np.float32(low)) / width, 0, 1).astype(np.float32)
    return (theta / np.float32(factor) * ramp + theta * (one - ramp)).astype(np.float32)


def yarn_table_bound(
    exact: tuple[Array, Array], arguments: Mapping[str, Any], dtype: tuple[str, str]
) -> tuple[Array, Array]:
    """Two units of the last place of 1: a float32 library's own error, and its reduction of the angle."""
    cos, sin = (np.full(x.shape, 4 * unit("float32").u) for x in exact)
    return cos, sin
