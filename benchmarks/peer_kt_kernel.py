"""KTransformers' experts for CPUs as a baseline, from one module of its wheel: ``--baseline kt-kernel``."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagops.errors import Unsupported
from flagops.machine import cpu_features
from flagops.tools import baseline, companions
from flagops.tools.baseline import Packed

VERSION = "0.7.2"
BUILDS = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx2": "avx2"}
"""The build for the best of what a processor has, of those with MXFP4."""
MODULE = "kt_kernel_ext"

torchs = companions.load("baselines")


def load(folder: Path) -> dict[str, dict[str, Callable[..., Any]]]:
    """Its experts with FP4 weights, on as many threads as torch has.

    Raises ModuleNotFoundError if the wheel is not in the folder, ValueError if its module cannot run here.
    """
    build = next((build for unit, build in BUILDS.items() if unit in cpu_features()), None)
    if build is None:
        raise ValueError("--baseline kt-kernel: its wheel has no build for a processor without AVX2")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = baseline.member(folder, "kt-kernel", VERSION, f"kt_kernel/_kt_kernel_ext_{build}{suffix}")
    if MODULE not in sys.modules:
        spec = importlib.util.spec_from_file_location(MODULE, path)
        assert spec is not None
        assert spec.loader is not None
        try:
            sys.modules[MODULE] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[MODULE])
        except ImportError as error:  # libraries that it was built against
            sys.modules.pop(MODULE, None)
            raise ValueError(f"--baseline kt-kernel: {path} does not load: {error}") from None
    kt = sys.modules[MODULE]
    experts = getattr(kt.moe, "AMXFP4_KGroup_MOE", None) or kt.moe.AVX2MXFP4_MOE
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [torch.get_num_threads()]
    made = _Experts(kt, experts, kt.CPUInfer(pool))
    differs = "activations stay bfloat16, no shared sum"
    return {"moe_experts": {"kt-kernel MXFP4": Packed(made.pack, made.run, made.held, differs)}}


class _Experts:
    """A layer of experts for each set of weights; tasks of all go through one queue."""

    def __init__(self, kt: Any, experts: Any, queue: Any) -> None:
        self.kt, self.experts, self.queue = kt, experts, queue

    def pack(
        self, x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, gate_up_scale: Any,
        down_scale: Any, limit: float | None, *_: Any,
    ) -> Any:  # fmt: skip
        if gate_up_scale is None or gate_up.shape[2] == x.shape[1] or x.dtype != torch.bfloat16:
            raise Unsupported("kt-kernel is compared with FP4 weights and bfloat16 activations alone")
        experts, both, _ = gate_up.shape
        half = both // 2
        codes = [x.view(torch.uint8).contiguous() for x in (gate_up[:, :half], gate_up[:, half:], down)]
        scales = [_bfloat16(x) for x in (gate_up_scale[:, :half], gate_up_scale[:, half:], down_scale)]
        on_gpu, order = torch.zeros(experts, dtype=torch.bool), torch.arange(experts)
        config = self.kt.moe.MOEConfig(experts, indices.shape[1], x.shape[1], half, on_gpu.data_ptr())
        config.pool, config.max_len, config.swiglu_limit = self.queue.backend_, len(x), limit or 0.0
        for name, x_codes, x_scales in zip(("gate", "up", "down"), codes, scales, strict=True):
            setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in x_codes]])
            setattr(config, f"{name}_scales", [[expert.data_ptr() for expert in x_scales]])
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, 32, False
        layer = self.experts(config)
        self.queue.submit(layer.load_weights_task(order.data_ptr()))
        self.queue.sync()
        return layer, indices.long().contiguous(), torch.tensor([len(x)], dtype=torch.int32), on_gpu

    def run(self, ready: Any, x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> None:
        layer, ids, rows, _ = ready
        self.queue.submit(layer.forward_task(
            rows.data_ptr(), ids.shape[1], ids.data_ptr(), weights.data_ptr(), x.data_ptr(), rest[-1].data_ptr(), False
        ))  # fmt: skip
        self.queue.sync()

    @staticmethod
    def held(x: Tensor, weights: Tensor, indices: Tensor, *rest: Any) -> list[Any]:
        """Bfloat16 products with expanded weights."""
        return [x, weights, indices, *torchs.experts_expanded(x, *rest[:4]), None, None, rest[4], None]


def _bfloat16(scale: Tensor) -> Tensor:
    """Powers of two, whose exponents both formats have."""
    return (scale.contiguous().view(torch.uint8).to(torch.int32) << 7).to(torch.int16).view(torch.bfloat16)
