"""The table of chips, ``flagops chips``: what a vendor's device is to torch and Triton, and what was checked on it.

A new chip is a row here. Tiles are chosen by it where the device does not say its measures itself; a figure is as
published at the sources of its row, and where nothing was found published it is `None`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flagops import machine, tables
from flagops.errors import suggestion

STATES = {
    "run": "kernels ran on it and were judged",
    "compiled": "every Triton kernel compiles for it, held by `make portability`; none was run",
    "in part": "the Triton kernels under torch's own operators compile for it; none was run",
    "lowered": "kernels are lowered for it, by tests/lowering.py or `make ascend`, all or in part; none was run",
    "declared": "nothing was checked; what its vendor's torch and Triton call it is all that is known here",
}


@dataclass(frozen=True)
class Chip:
    """A chip, or a class of processors.

    device, key: torch's name of it, and the dispatch key of its kernels.
    target: what Triton compiles for, by upstream's name or that of the vendor's Triton; "" where there is none.
    page: of docs/, without its ending.
    dtypes: floats that it computes in itself; empty where unknown. matrix: the matrix instructions or unit that
    products may run on.
    width: threads of a warp, or float32 of a vector; 1 where there are no warps.
    processors: programs that run at once. shared: bytes on the chip that one program may take.
    registers, warps: of a processor, registers of 32 bits and the most warps that it holds at once.
    bandwidth: of the memory, GB/s. rate: dense products of bfloat16, or of float16 where that is faster, TFLOP/s.
    """

    name: str
    vendor: str
    device: str
    key: str
    target: str
    page: str
    state: str
    dtypes: tuple[str, ...] = ()
    matrix: tuple[str, ...] | None = None
    width: int | None = None
    processors: int | None = None
    shared: int | None = None
    registers: int | None = None
    warps: int | None = None
    bandwidth: float | None = None
    rate: float | None = None
    sources: tuple[str, ...] = ()
    note: str = ""

    @property
    def names(self) -> set[str]:
        """What a command may call it, in lower case."""
        return {name.lower() for name in (self.name, self.vendor, self.device, self.target) if name}


LEAST_SHARED = 64 << 10
"""What every chip is taken to have, where the table does not know."""

_CAPABILITIES = "https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html"
_ROCM = "https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"
_FLAGTREE = "https://github.com/flagos-ai/FlagTree/tree/main/third_party"
_GARDEN = "https://glennklockwood.com/garden/processors"
_OCCUPANCY = "https://indianspeedster.github.io/blog/occupancy-math-mi355x/"
_BOTH = "https://github.com/alpharomercoma/MI300X-vs-H200/blob/main/METHODOLOGY.md"

_HALF = ("float16", "float32", "float64")
_BRAIN = ("float16", "bfloat16", "float32", "float64")
_FP8 = ("float8", *_BRAIN)
_NO_DOUBLE = ("float16", "bfloat16", "float32")


def _cuda(vendor: str, page: str, name: str, target: str, **facts: Any) -> Chip:
    return Chip(name, vendor, "cuda", "CUDA", target, page, **facts)


_nvidia = partial(_cuda, "NVIDIA", "nvidia", state="compiled", width=32, registers=64 << 10, warps=64)
_amd = partial(_cuda, "AMD", "amd", state="compiled", width=64, shared=64 << 10)
_cdna = partial(_amd, matrix=("mfma",), registers=128 << 10)
_ascend = partial(Chip, page="ascend", dtypes=_NO_DOUBLE, matrix=("Cube",), width=1, shared=192 << 10)
_vendor = partial(Chip, page="vendors", state="declared")

# fmt: off
CHIPS = (
    _nvidia("T4", "sm_75", warps=32, state="in part", dtypes=_HALF, matrix=(), processors=40, shared=64 << 10,
            bandwidth=320, rate=65.13, sources=(_CAPABILITIES, "https://sysrqmts.com/en/gpus/nvidia/tesla/t4"),
            note="Triton 3.7 has no matrix instructions for it, and products no tiles for multiply-adds"),
    _nvidia("A100", "sm_80", dtypes=_BRAIN, matrix=("mma",), processors=108, shared=163 << 10, bandwidth=2039, rate=312,
            sources=(_CAPABILITIES, f"{_GARDEN}/A100")),
    _nvidia("L40S", "sm_89", dtypes=_FP8, matrix=("mma",), processors=142, shared=99 << 10, bandwidth=864, rate=362.05,
            warps=48, sources=(_CAPABILITIES, "https://www.mullet.se/product.html?product_id=355414")),
    _nvidia("H100", "sm_90", dtypes=_FP8, matrix=("wgmma", "mma"), processors=132, shared=227 << 10, bandwidth=3350,
            rate=989.4, sources=(_CAPABILITIES, f"{_GARDEN}/h100",
                                 "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html")),
    _nvidia("H200", "sm_90", dtypes=_FP8, matrix=("wgmma", "mma"), processors=132, shared=227 << 10, bandwidth=4800,
            rate=989.4, sources=(_CAPABILITIES, f"{_GARDEN}/h100", _BOTH)),
    _nvidia("B200", "sm_100", dtypes=_FP8, matrix=("tcgen05", "mma"), processors=148, shared=227 << 10,
            bandwidth=8000, rate=2250, sources=(_CAPABILITIES, f"{_GARDEN}/B200",
                                                "https://chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut")),
    _nvidia("RTX 5090", "sm_120", dtypes=_FP8, matrix=("mma",), processors=170, shared=99 << 10, bandwidth=1792,
            warps=48, rate=419.2, sources=(_CAPABILITIES, "https://www.spheron.network/blog/nvidia-rtx-5090-specs/"),
            note="rate: half of the published one with sparsity"),
    _amd("MI50", "gfx906", state="declared", dtypes=_HALF, matrix=(), processors=60, bandwidth=1024, rate=26.5,
         sources=(_ROCM, "https://en.wikipedia.org/wiki/AMD_Instinct"),
         note="Triton 3.7 compiles nothing for it: unsupported target"),
    _cdna("MI100", "gfx908", dtypes=_BRAIN, processors=120, bandwidth=1230, rate=184.6,
         sources=(_ROCM, "https://www.notebookcheck.net/AMD-announces-CDNA-based-Instinct-MI100-GPU-with-120-CUs-for-HPC-"
                  "promises-up-to-2-1x-more-performance-per-dollar-compared-to-the-NVIDIA-A100.504329.0.html"),
         note="rate: of float16, twice that of bfloat16"),
    _cdna("MI250", "gfx90a", dtypes=_BRAIN, processors=104, bandwidth=1600, rate=181.04,
         sources=(_ROCM, "https://rocm.docs.amd.com/en/latest/reference/gpu-arch/mi250.html",
                  "https://hmc-tech.com/gpu/amd-instinct-mi200-vs-amd-instinct-mi250"), note="one of its two dies"),
    _cdna("MI300X", "gfx942", warps=32, dtypes=_FP8, processors=304, bandwidth=5300, rate=1307.4,
         sources=(_ROCM, _BOTH, _OCCUPANCY), note="its FP8 is another than that of checkpoints"),
    _cdna("MI355X", "gfx950", warps=32, dtypes=_FP8, processors=256, shared=160 << 10, bandwidth=8000,
         sources=(_ROCM, _OCCUPANCY, "https://www.tomshardware.com/pc-components/gpus/"
                  "amds-instinct-mi355x-accelerator-will-consume-1-400-watts")),
    _amd("RX 7900 XTX", "gfx1100", dtypes=_BRAIN, matrix=("wmma",), width=32, processors=96, bandwidth=960,
         sources=(_ROCM, "https://guru3d.com/review/xfx-radeon-rx-7900-xtx-magair-review/page-4")),
    _cuda("Hygon", "amd", "BW1000", "gfx936", state="declared", width=64, sources=(f"{_FLAGTREE}/hcu",),
          note="needs Hygon's Triton: upstream's does not know the target"),
    _cuda("Hygon", "amd", "K100-AI", "gfx928", state="declared", width=64, sources=(f"{_FLAGTREE}/hcu",),
          note="needs Hygon's Triton; has no FP8"),
    _ascend("Ascend 910B", "Huawei", "npu", "PrivateUse1", "Ascend910B", state="lowered", rate=280,
            sources=("https://github.com/triton-lang/triton-ascend/pull/1910",
                     "https://ai.gitee.com/docs/compute/clusters_gpu/ascend_gpu"),
            note="54 of 59 Triton kernels lower up to the vendor's last step; on chip: the unified buffer; "
                 "rate: of float16"),
    _ascend("Ascend 910C", "Huawei", "npu", "PrivateUse1", "", state="declared", bandwidth=3200, rate=780,
            sources=("https://github.com/triton-lang/triton-ascend/pull/1910", "https://techpowerup.com/335749/"
                     "huawei-prepares-6-nm-ascend-920c-accelerator-900-teraflops-4000-gb-s-hbm3"),
            note="on chip: the unified buffer"),
    _vendor("MTT S4000", "Moore Threads", "musa", "PrivateUse1", "musa", dtypes=_NO_DOUBLE, width=128, bandwidth=768,
            rate=100, sources=(f"{_FLAGTREE}/mthreads", "https://www.io-tech.fi/uutinen/moore-threads-julkaisi-uuden-"
                               "mtt-s4000-laskentakortin-ja-kuae-intelligent-computing-center-palvelinklusterit/")),
    _vendor("MTT S5000", "Moore Threads", "musa", "PrivateUse1", "musa", dtypes=_FP8, width=32, bandwidth=1600,
            sources=(f"{_FLAGTREE}/mthreads",
                     "https://www.ldeepai.com/tech-hub/moore-threads-mtt-s5000-1000-tflops-fp8-gpu/")),
    _vendor("MLU370-X8", "Cambricon", "mlu", "PrivateUse1", "mlu", dtypes=_NO_DOUBLE, width=1, bandwidth=614.4, rate=96,
            sources=("http://guangxilong.com/c/032129635H022.html",)),
    _vendor("C500", "MetaX", "cuda", "CUDA", "maca", width=64,
            sources=("https://github.com/MetaX-MACA/mcTriton/blob/main/third_party/metax/backend/driver.py",)),
    _vendor("P800", "Kunlunxin", "cuda", "CUDA", "xpu", width=1, sources=(f"{_FLAGTREE}/xpu",)),
    _vendor("BI-V100", "Iluvatar", "cuda", "CUDA", "corex", dtypes=_NO_DOUBLE, width=64, bandwidth=1200, rate=147,
            sources=(f"{_FLAGTREE}/iluvatar", "https://geektopia.es/es/technology/2021/04/05/noticias/amp/la-empresa-china-"
                     "tianshu-zhixin-empieza-la-produccion-de-su-gpgpu-a-7-nm-alcanza-los-37-tflops.html")),
    _vendor("Zhenwu 810E", "T-Head", "cuda", "CUDA", "", sources=("https://servernews.ru/1136036",)),
    Chip("x86 AVX2", "AMD, Intel", "cpu", "CPU", "", "cpu", "run", ("float32", "float64"), (), 8),
    Chip("x86 AVX-512", "AMD, Intel", "cpu", "CPU", "", "cpu", "run", ("float32", "float64"), (), 16,
         note="with products of bfloat16 where the processor has them"),
    Chip("aarch64 Neon", "Arm", "cpu", "CPU", "", "cpu", "lowered", ("float16", "float32", "float64"), (), 4),
    Chip("M3 Ultra", "Apple", "cpu", "CPU", "", "cpu", "lowered", ("float16", "float32", "float64"), (), 4,
         bandwidth=819, sources=("https://techpowerup.com/news-tags/Mac%20Studio",),
         note="its CPU: no kernel takes an mps tensor"),
)
# fmt: on


def by_target(target: str) -> Chip | None:
    """The first chip of a Triton target."""
    return next((chip for chip in CHIPS if target and chip.target == target), None)


def of_device(device: str) -> tuple[Chip, ...]:
    """The chips that have a device of this name in torch."""
    return tuple(chip for chip in CHIPS if chip.device == device)


def shared(device: str) -> int:
    """Bytes that a program may take on any chip of a device name: the least of those known, or `LEAST_SHARED`."""
    return min((chip.shared for chip in of_device(device) if chip.shared), default=LEAST_SHARED)


def warps(device: str) -> bool:
    """Whether chips of a device name run programs in warps, with registers: unless the table knows that none does."""
    widths = {chip.width for chip in of_device(device)}
    return widths != {1}


def named(words: Iterable[str]) -> list[Chip]:
    """The chips that words name, by name, vendor, torch's device or target; a ValueError that suggests the nearest."""
    found: dict[str, Chip] = {}
    for word in words:
        chosen = {chip.name: chip for chip in CHIPS if word.lower() in chip.names}
        if not chosen:
            raise ValueError(f"no chip {word!r}{suggestion(word.lower(), set().union(*(c.names for c in CHIPS)))}")
        found |= chosen
    return list(found.values())


def here() -> dict[str, str]:
    """The devices of this process, each with the page that is about it: ``{"npu (Huawei)": "docs/ascend.md"}``."""
    pages = {f"cpu ({machine.cpu_kind()})": "cpu"}
    torch = sys.modules.get("torch")
    if torch is not None:
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            pages[f"cuda:{index} ({name})"] = cuda_page(name, bool(torch.version.hip))
        device = torch._C._get_privateuse1_backend_name()
        if device != "privateuseone":
            known = of_device(device)
            vendor = known[0].vendor if known else "of a vendor that the table of chips does not know"
            pages[f"{device} ({vendor})"] = known[0].page if known else "vendors"
    return {device: f"docs/{page}.md" for device, page in pages.items()}


def cuda_page(name: str, hip: bool) -> str:
    """The page of a device that torch calls cuda, as several vendors' do, by the name that it gives itself."""
    return "nvidia" if "nvidia" in name.lower() else "amd" if hip else "vendors"


def command(args: argparse.Namespace) -> int:
    """Chips: their names in torch and Triton, their measures as published, and what was checked on them."""
    chosen = named(args.names) if args.names else list(CHIPS)
    if args.json:
        print(json.dumps([dataclasses.asdict(chip) for chip in chosen], indent=2))
        return 0
    columns = ("chip", "vendor", "device", "key", "Triton target", "matrix units", "width", "on chip", "GB/s",
               "TFLOP/s", "checked", "page")  # fmt: skip
    rows = [
        (
            c.name, c.vendor, c.device, c.key, c.target or "-",
            "?" if c.matrix is None else ", ".join(c.matrix) or "none", _known(c.width),
            f"{c.shared >> 10} KB" if c.shared else "?", _known(c.bandwidth), _known(c.rate), c.state, f"{c.page}.md",
        )
        for c in chosen
    ]  # fmt: skip
    if args.markdown:
        print(tables.markdown(columns, rows))
        return 0
    tables.show("chips", columns, rows)
    for state in dict.fromkeys(chip.state for chip in chosen):
        print(f"{state}: {STATES[state]}.")
    print("?: not found published. Sources, dtypes and notes of each figure: `flagops chips --json`.")
    return 0


def _known(figure: float | None) -> str:
    return "?" if figure is None else f"{figure:g}"
