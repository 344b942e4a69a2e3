"""The interface of DeepSeek-V4's kernel module, on any device: ``sys.modules["kernel"] = flagops.deepseek_v4``.

A model written to that interface then runs unmodified, on the kernels that flagops chooses for where its tensors lie
(``flagops.using(backend=...)`` names others). `hadamard_transform` also makes the module stand for
``fast_hadamard_transform``. Tensors may have any strides and any number of leading axes; those of
``torch.float8_e8m0fnu`` and ``torch.float4_e2m1fn_x2`` are taken and given as they are.

Quantisers and products take no part in autograd; the others do where they are float tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flagops


@torch.no_grad()
def act_quant(
    x: Tensor,
    block_size: int = 128,
    scale_fmt: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    inplace: bool = False,
) -> Any:
    """Activations in FP8, one scale for each block of a row.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32.
        block_size: channels that share a scale; divides k.
        scale_fmt: any name, such as ``"ue8m0"``, rounds scales up to powers of two; None keeps them as they are.
        scale_dtype: ``torch.float32`` or, with scale_fmt, ``torch.float8_e8m0fnu``.
        inplace: write what quantisation leaves of x back into it, in its own dtype.

    Returns:
        codes ``[..., k]`` float8_e4m3fn and scales ``[..., k / block_size]``; x itself if inplace.

    Raises:
        TypeError: x is of another dtype.
        ValueError: block_size does not divide k, or scale_dtype cannot hold the scales.
    """
    power_of_two = scale_fmt is not None
    if inplace:
        return flagops.fp8_fake_quantize(x, block_size, power_of_two, out=x)
    if scale_dtype is torch.float8_e8m0fnu and not power_of_two:
        raise ValueError("act_quant: scale_dtype torch.float8_e8m0fnu holds powers of two only; set scale_fmt")
    return flagops.fp8_quantize(x, block_size, power_of_two, scale_dtype)


@torch.no_grad()
def fp4_act_quant(x: Tensor, block_size: int = 32, inplace: bool = False) -> Any:
    """Activations in FP4, one power of two for each block of a row.

    Args:
        x: ``[..., k]``, bfloat16, float16 or float32.
        block_size: channels that share a scale; even, divides k.
        inplace: write what quantisation leaves of x back into it, in its own dtype.

    Returns:
        codes ``[..., k / 2]`` float4_e2m1fn_x2, the first of a pair in the low nibble, and scales
        ``[..., k / block_size]`` float8_e8m0fnu; x itself if inplace.

    Raises:
        TypeError: x is of another dtype.
        ValueError: block_size is odd or does not divide k.
    """
    if inplace:
        return flagops.fp4_fake_quantize(x, block_size, out=x)
    packed, scale = flagops.fp4_quantize(x, block_size)
    return packed.view(torch.float4_e2m1fn_x2), scale


@torch.no_grad()
def fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """``a @ b.T`` of FP8 codes in torch's default dtype.

    Args:
        a: ``[..., k]`` float8_e4m3fn.
        a_s: ``[..., ceil(k / 128)]``, float32 or float8_e8m0fnu.
        b: ``[n, k]`` float8_e4m3fn.
        b_s: ``[ceil(n / 128), ceil(k / 128)]``, float32 or float8_e8m0fnu.
        scale_dtype: part of the interface; the scales say themselves what they are.

    Returns:
        ``[..., n]``, accumulated in float32 and rounded once.
    """
    return flagops.fp8_matmul(a, a_s, b, b_s, torch.get_default_dtype())


@torch.no_grad()
def fp4_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """``a @ b.T`` of FP8 codes and packed FP4 weights, which are never expanded whole, in torch's default dtype.

    Args:
        a: ``[..., k]`` float8_e4m3fn.
        a_s: ``[..., ceil(k / 128)]``, float32 or float8_e8m0fnu.
        b: ``[n, k / 2]`` float4_e2m1fn_x2, int8 or uint8.
        b_s: ``[n, k / 32]`` float8_e8m0fnu.
        scale_dtype: part of the interface; the scales say themselves what they are.

    Returns:
        ``[..., n]``, accumulated in float32 and rounded once.
    """
    return flagops.fp4_matmul(a, a_s, b, b_s, torch.get_default_dtype())


def sparse_attn(q: Tensor, kv: Tensor, attn_sink: Tensor, topk_idxs: Tensor, softmax_scale: float) -> Tensor:
    """Attention of each query over its own list of keys, which are values too, see `flagops.sparse_attention`.

    Args:
        q: ``[b, s, h, d]``.
        kv: ``[b, n, d]``, dtype of q.
        attn_sink: ``[h]`` float32, logits without a value.
        topk_idxs: ``[b, s, k]`` int32 or int64, rows of kv; -1 is absent.
        softmax_scale: factor of the logits.

    Returns:
        ``[b, s, h, d]``; exactly 0 for a query without a key.
    """
    return flagops.sparse_attention(q, kv, attn_sink, topk_idxs, softmax_scale)


def hc_split_sinkhorn(
    mixes: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int = 4,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of a hyper-connection, see `flagops.hc_split_sinkhorn`.

    Args:
        mixes: ``[..., (hc_mult + 2) * hc_mult]`` float32.
        hc_scale: ``[3]`` float32.
        hc_base: ``[(hc_mult + 2) * hc_mult]`` float32.
        hc_mult: number of streams.
        sinkhorn_iters: rounds of normalisation.
        eps: added as the specification of the operator says.

    Returns:
        pre ``[..., hc_mult]``, post ``[..., hc_mult]`` and comb ``[..., hc_mult, hc_mult]``, float32.
    """
    return flagops.hc_split_sinkhorn(mixes, hc_scale, hc_base, hc_mult, sinkhorn_iters, eps)


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """The Walsh-Hadamard transform of the last axis, whose length is a power of two, times ``scale``."""
    return flagops.hadamard(x, scale)
