"""`flagops convert` against a plain parallel copy that reads and writes as many bytes, on a generated checkpoint.

    python benchmarks/bench_checkpoint.py --size 8GB --folder /a/disk > benchmarks/results/checkpoint.md

The checkpoint has the matrices of DeepSeek-V4-Flash in their proportions. Both arms run in processes of their own with
equal numbers of threads, write files of the same sizes and sync each, and its folder, once it is written. Before each,
the source is put out of the page cache. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXPERT = {"w1": (2048, 4096), "w3": (2048, 4096), "w2": (4096, 2048)}
ATTENTION = {
    "wq_a": (1024, 4096),
    "wq_b": (32768, 1024),
    "wkv": (512, 4096),
    "wo_a": (8192, 4096),
    "wo_b": (4096, 8192),
}
EXPERTS_A_SHARD = 64
PIECE = 4 << 20
PROMISED = 0.6


def generate(folder: Path, size: int) -> None:
    """About `size` bytes: routed experts in FP4, attention in FP8, an embedding in BF16."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 127, 40 << 20, dtype=np.uint8))  # no NaN of e4m3, any FP4
    scales = torch.from_numpy(rng.integers(110, 130, 4 << 20, dtype=np.uint8))

    def bytes_of(source: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        start = int(rng.integers(0, len(source) - count + 1))
        return source[start : start + count].clone().view(dtype).view(shape)

    def fp8(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": bytes_of(codes, torch.float8_e4m3fn, rows, columns),
            f"{name}.scale": bytes_of(scales, torch.float8_e8m0fnu, rows // 128, columns // 128),
        }

    weights, written, shard = {}, 0, 0
    while written < size:
        tensors: dict[str, torch.Tensor] = {}
        if shard % 4 == 0:
            for name, (rows, columns) in ATTENTION.items():
                tensors |= fp8(f"layers.{shard}.attn.{name}", rows, columns)
            tensors[f"layers.{shard}.ffn.gate.weight"] = torch.randn(256, 4096).bfloat16()
        total = sum(x.nbytes for x in tensors.values())
        for expert in range(EXPERTS_A_SHARD):
            if written + total >= size:
                break
            for name, (rows, columns) in EXPERT.items():
                stem = f"layers.{shard}.ffn.experts.{expert}.{name}"
                tensors[f"{stem}.weight"] = bytes_of(codes, torch.int8, rows, columns // 2)
                tensors[f"{stem}.scale"] = bytes_of(scales, torch.float8_e8m0fnu, rows, columns // 32)
                total += tensors[f"{stem}.weight"].nbytes + tensors[f"{stem}.scale"].nbytes
        name = f"model-{shard:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weights |= dict.fromkeys(tensors, name)
        written += total
        shard += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    os.sync()


def evict(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(src: Path, dst: Path, sizes: list[int], threads: int) -> None:
    """Write files of the given sizes, reading every byte of the source once on the way, in proportion."""
    dst.mkdir()
    files = sorted(src.glob("*.safetensors"))
    ends = list(itertools.accumulate(path.stat().st_size for path in files))
    handles = [os.open(path, os.O_RDONLY) for path in files]

    def read(start: int, stop: int, buffer: memoryview) -> None:
        for handle, end, path in zip(handles, ends, files, strict=True):
            first = end - path.stat().st_size
            while start < min(stop, end) and start >= first:
                start += os.preadv(handle, [buffer[: min(stop, end) - start]], start - first)

    def one(number: int) -> None:
        before, size, done, position = sum(sizes[:number]), sizes[number], 0, -1
        buffer = memoryview(bytearray(PIECE))
        file = os.open(dst / f"{number}.partial", os.O_WRONLY | os.O_CREAT, 0o666)
        position = before * ends[-1] // sum(sizes)
        while done < size:
            count = min(PIECE, size - done)
            following = (before + done + count) * ends[-1] // sum(sizes)
            read(position, following, buffer)
            position = following
            done += os.write(file, buffer[:count])
        os.fsync(file)
        os.close(file)
        os.replace(dst / f"{number}.partial", dst / str(number))
        folder = os.open(dst, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(sizes))))


def idiom() -> float:
    """Output bytes a second of the lookup in torch, from memory to memory, without any file."""
    import torch
    from baselines import fp4_dequantize

    packed = torch.randint(-128, 128, (2048, 2048), dtype=torch.int8)
    scale = torch.randint(110, 130, (2048, 128), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    out = torch.empty(2048, 4096, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fp4_dequantize(packed, scale, "bfloat16", out)
        times.append(time.perf_counter() - start)
    return out.nbytes / min(times)


def timed(src: Path, command: list[str]) -> tuple[float, str]:
    os.sync()
    evict(src)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="8GB", help="of the checkpoint, such as 8GB (default) or 300MB")
    parser.add_argument("--memory", default="1GiB", help="given to flagops convert (default 1GiB)")
    parser.add_argument("--shard-size", default="2GiB", help="of the output (default 2GiB)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads of both arms")
    parser.add_argument("--rounds", type=int, default=1, help="alternate the arms so often")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--copy", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copy:
        src, dst, sizes, threads = args.copy
        copy(Path(src), Path(dst), json.loads(sizes), int(threads))
        return
    unit = {"MB": 10**6, "GB": 10**9}[args.size[-2:]]
    with tempfile.TemporaryDirectory(prefix="flagops-bench-", dir=args.folder) as name:
        report(Path(name), float(args.size[:-2]) * unit, args)


def report(folder: Path, size: float, args: argparse.Namespace) -> None:
    from flagops import checkpoint
    from flagops.tools import measure

    src = folder / "src"
    generate(src, int(size))
    converting, copying, summary, rates = [], [], {}, []
    for _ in range(args.rounds):
        rates.append(idiom())
        dst = folder / "converted"
        words = ["--memory", args.memory, "--shard-size", args.shard_size, "--workers", str(args.workers)]
        convert = [sys.executable, "-m", "flagops", "convert", str(src), str(dst), *words, "--quiet", "--json"]
        seconds, text = timed(src, convert)
        converting.append(seconds)
        summary = json.loads(text)
        sizes = [path.stat().st_size for path in sorted(dst.glob("*.safetensors"))]
        checked = checkpoint.verify(src, dst, sample=0.02, seed=0)
        shutil.rmtree(dst)
        words = ["--copy", str(src), str(folder / "copied"), json.dumps(sizes), str(args.workers)]
        copying.append(timed(src, [sys.executable, __file__, *words])[0])
        shutil.rmtree(folder / "copied")
    written = summary["output_bytes"]
    ratio = min(copying) / min(converting)
    peak, limit = summary["peak_memory"], summary["memory"]
    ours, copied, theirs = written / min(converting), written / min(copying), max(rates)
    machine = ", ".join(f"{name} {value}" for name, value in measure.machine().items())
    print(f"# Converting a checkpoint\n\n{machine}\n")
    checked_tensors = checked.compared_tensors
    print(f"{summary['bytes_read'] / 1e9:.2f} GB read, {written / 1e9:.2f} GB written by {args.workers} threads each;")
    print(f"every file synced once, then its folder; best of {args.rounds}; {checked_tensors} tensors verified.\n")
    rows = {
        "flagops convert, start of the process included": f"{min(converting):.1f} s, {ours / 1e9:.2f} GB/s written",
        "plain parallel copy of as many bytes, the same": f"{min(copying):.1f} s, {copied / 1e9:.2f} GB/s written",
        f"rate to the copy's (promised {PROMISED})": f"{ratio:.2f}",
        f"memory at its peak (limit {limit >> 20} MiB)": f"{peak >> 20} MiB",
        "the table lookup in torch, memory to memory, no files": f"{theirs / 1e9:.3f} GB/s",
        "rate to the lookup's": f"{ours / theirs:.1f}",
    }
    print("| | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    print(f"\n{'kept' if ratio >= PROMISED and peak <= limit else 'MISSED'}")


if __name__ == "__main__":
    main()
