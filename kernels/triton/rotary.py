# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Rotary embedding on Triton: a program rotates the pairs of one position's heads and copies their other channels."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from flagops.registry import kernel

from .._rotary import frequencies
from .._rows import rows
from ._common import launch, narrow, too_long, widen

TILE: dict[str, Any] = {"HEADS": 16, "BLOCK": 128, "num_warps": 4}


@triton.jit
def rotary_kernel(
    x, cos, sin, out, N1, N2, H, D, R, sign,
    x_0, x_1, x_2, x_h, x_d, cos_0, cos_1, cos_2, cos_r, sin_0, sin_1, sin_2, sin_r, out_0, out_1, out_2, out_h, out_d,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k, j, i = row % N2, row // N2 % N1, row // N2 // N1
    head = (tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    here = (head < H)[:, None]
    x += i * x_0 + j * x_1 + k * x_2 + head[:, None] * x_h
    out += i * out_0 + j * out_1 + k * out_2 + head[:, None] * out_h
    cos += i * cos_0 + j * cos_1 + k * cos_2
    sin += i * sin_0 + j * sin_1 + k * sin_2
    first = D - 2 * R
    if COPY:
        for start in range(0, first, BLOCK):
            at = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            value = tl.load(x + at * x_d, here & (at < first), other=0.0)
            tl.store(out + at * out_d, value, here & (at < first))
    for start in range(0, R, BLOCK // 4):
        pair = (start + tl.arange(0, BLOCK // 4)).to(tl.int64)
        inside = here & (pair < R)[None, :]
        c = tl.load(cos + pair * cos_r, pair < R, other=0.0)[None, :]
        s = tl.load(sin + pair * sin_r, pair < R, other=0.0)[None, :] * sign
        at = (first + 2 * pair)[None, :]
        a = widen(tl.load(x + at * x_d, inside, other=0.0))
        b = widen(tl.load(x + (at + 1) * x_d, inside, other=0.0))
        tl.store(out + at * out_d, narrow(a * c - b * s, out.dtype.element_ty), inside)
        tl.store(out + (at + 1) * out_d, narrow(a * s + b * c, out.dtype.element_ty), inside)


@triton.jit
def table_kernel(
    positions, theta, cos, sin, count, N1, N2, R,
    p_0, p_1, p_2, cos_0, cos_1, cos_2, cos_r, sin_0, sin_1, sin_2, sin_r, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, pair = at // R, at % R
    here = row < count
    k, j, i = row % N2, row // N2 % N1, row // N2 // N1
    position = tl.load(positions + i * p_0 + j * p_1 + k * p_2, here, other=0).to(tl.float32)
    angle = position * tl.load(theta + pair, here, other=0.0)
    tl.store(cos + i * cos_0 + j * cos_1 + k * cos_2 + pair * cos_r, tl.cos(angle), here)
    tl.store(sin + i * sin_0 + j * sin_1 + k * sin_2 + pair * sin_r, tl.sin(angle), here)


def _at(x: torch.Tensor, offset: int) -> torch.Tensor:
    return x.as_strided((1,), (1,), x.storage_offset() + offset) if offset else x


def rotary_embedding_unsupported(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> str | None:
    return too_long(x)


@kernel(deterministic=True)
def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor) -> None:
    """Sixteen heads a program."""
    *lead, heads, d = out.shape
    x = x.expand(out.shape)
    cos, sin = (t.expand(*lead, t.shape[-1]) for t in (cos, sin))
    copied = x.data_ptr() != out.data_ptr() or x.stride() != out.stride()
    tile = TILE | {"HEADS": min(TILE["HEADS"], triton.next_power_of_2(max(heads, 1)))}
    leads = [x.stride()[:-2], cos.stride()[:-1], sin.stride()[:-1], out.stride()[:-2]]
    for offsets, sizes, steps in rows(lead if heads * d else (0,), *leads):
        grid = (sizes[0] * sizes[1] * sizes[2] * triton.cdiv(heads, tile["HEADS"]),)
        launch(
            rotary_kernel, grid, out.device,
            *(_at(t, offset) for t, offset in zip((x, cos, sin, out), offsets, strict=True)),
            sizes[1], sizes[2], heads, d, cos.shape[-1], -1 if inverse else 1,
            *steps[0], *x.stride()[-2:], *steps[1], cos.stride(-1), *steps[2], sin.stride(-1),
            *steps[3], *out.stride()[-2:], COPY=copied, **tile,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _frequencies(device: torch.device, *scalars: Any) -> torch.Tensor:
    """Kept on the device: a copy in each call would wait, and spoil a graph that is recorded."""
    return torch.from_numpy(frequencies(*scalars)).to(device)


@kernel(deterministic=True)
def yarn_table(
    positions: torch.Tensor,
    dim: int,
    base: float,
    factor: float,
    original: float,
    beta_fast: float,
    beta_slow: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """An element a thread; the library's full reduction of the angle."""
    theta = _frequencies(positions.device, dim, base, factor, original, beta_fast, beta_slow)
    cos, sin = out
    leads = [positions.stride(), cos.stride()[:-1], sin.stride()[:-1]]
    for offsets, sizes, steps in rows(positions.shape if dim else (0,), *leads):
        count = sizes[0] * sizes[1] * sizes[2]
        launch(
            table_kernel, (triton.cdiv(count * (dim // 2), 256),), cos.device,
            _at(positions, offsets[0]), theta, _at(cos, offsets[1]), _at(sin, offsets[2]), count, *sizes[1:], dim // 2,
            *steps[0], *steps[1], cos.stride(-1), *steps[2], sin.stride(-1), BLOCK=256,
        )  # fmt: skip
