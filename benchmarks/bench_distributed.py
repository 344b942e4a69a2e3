"""Bytes and times of the schemes of the grouped output projection in tensor parallel, over gloo on this machine.

``python benchmarks/bench_distributed.py [--ranks 2,4,8] [--tokens 1,256] [--markdown FILE]``. Processes share the
cores, so times compare schemes at one number of ranks and say nothing about other machines. Bytes are those that each
rank sends in ring algorithms, counted by `flagops.distributed.Layout`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from flagops import tables
from flagops.distributed import SCHEMES, GroupedOutputProjection, GroupedOutputProjectionParallel, Sizes
from flagops.tools import results

SIZES = Sizes(heads=32, head_dim=128, groups=2, rank=256, hidden=1024)
HEAD = ("ranks", "tokens", "scheme", "weights a rank", "sent a token", "time", "of replicate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=_numbers, default=(2, 4, 8))
    parser.add_argument("--tokens", type=_numbers, default=(1, 256))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    rows = [row for ranks in options.ranks for row in measure(ranks, options.tokens)]
    title = "{heads} heads of {head_dim} in {groups} groups, rank {rank}, to {hidden}; bfloat16"
    tables.show(title.format(**vars(SIZES)), HEAD, rows)
    if options.markdown:
        results.write_markdown(options.markdown, HEAD, rows, __doc__ or "")


def measure(ranks: int, tokens: tuple[int, ...]) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (ranks, tokens, folder), ranks)
        found: list[list[str]] = torch.load(Path(folder, "rows"))
    return found


def _rank(rank: int, ranks: int, tokens: tuple[int, ...], folder: str) -> None:
    os.environ.setdefault("FLAGOPS_BACKEND", "torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    built: dict[str, Any] = {}
    for scheme in SCHEMES:
        torch.manual_seed(0)
        wo_a = torch.randn(SIZES.groups * SIZES.rank, SIZES.width).bfloat16()
        wo_b = torch.randn(SIZES.hidden, SIZES.groups * SIZES.rank).bfloat16()
        module = GroupedOutputProjection(wo_a, wo_b, SIZES.groups, SIZES.head_dim)
        built[scheme] = GroupedOutputProjectionParallel(scheme=scheme)._apply(module, mesh)
    rows = []
    with torch.no_grad():
        for count in tokens:
            o = torch.randn(count, SIZES.heads // ranks, SIZES.head_dim).bfloat16()
            times: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
            for turn in range(13):
                for scheme in SCHEMES if turn % 2 else reversed(SCHEMES):
                    dist.barrier()
                    start = time.perf_counter()
                    built[scheme](o)
                    dist.barrier()
                    times[scheme].append(time.perf_counter() - start)
            for scheme in SCHEMES:
                cost = built[scheme].parallel.layout.cost()
                spent = times[scheme][1:]
                ratio = median(a / b for a, b in zip(spent, times["replicate"][1:], strict=True))
                numbers = [f"{cost.weights / 1e6:.2f} MB", f"{cost.sent / 1e3:.2f} kB"]
                rows.append([f"{ranks}", f"{count}", scheme, *numbers, results.seconds(median(spent)), f"{ratio:.2f}"])
    if rank == 0:
        torch.save(rows, Path(folder, "rows"))
    dist.barrier()
    dist.destroy_process_group()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
