"""``flagops convert`` and ``flagops verify``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from flagops.errors import Unsupported
from flagops.tools.contract import Parser

from .conversion import Summary
from .documents import line
from .plan import TARGETS
from .progress import amount, watcher
from .runs import convert as convert_checkpoint
from .runs import verify as verify_checkpoint
from .verification import Difference

_CONVERT = """examples:
  flagops convert DeepSeek-V4-Flash V4-Flash-BF16 --dry-run        what would be done, and is there room
  flagops convert DeepSeek-V4-Flash V4-Flash-BF16                  the same command goes on after an interruption
  flagops convert DeepSeek-V4-Flash V4-Flash-FP8 --to fp8          FP4 experts to FP8, without loss or not at all
  flagops convert DeepSeek-V4.1-Flash V41-BF16 --keep '*.engram.embed.*'   the tables as they are stored, and said so
  flagops convert Qwen3-8B Qwen3-8B-W8A8 --to int8 --keep '*.down_proj.*'     the worst layers stay wide
  flagops convert DeepSeek-V3 V3-BF16 --memory 2GiB --workers 4 --json > summary.json
"""
_VERIFY = """examples:
  flagops verify DeepSeek-V4-Flash V4-Flash-BF16                   every tensor and every file
  flagops verify DeepSeek-V4-Flash V4-Flash-BF16 --sample 0.01 --backend numpy
                                                                   one tensor in 100 by the NumPy reference
"""
_CODES = """exit codes:
  0    done; or finished before, which is said after every bit was made again and compared
  1    verify: a difference; the first tensor or file is named
  2    refused: the source, the destination or an option; named with the remedy. Interrupted; the same command goes on
  3    reading or writing failed, or the disk is full or too small; the same command goes on
"""


def convert(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    parser = _parser("convert", "Write narrow weights of safetensors in BF16 or FP8, or any in INT8 or W4A8.", _CONVERT)
    parser.add_argument(
        "--to", choices=TARGETS, default="bf16", help="bf16 (default), FP4 to fp8 without loss, int8 or w4a8"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN",
        help="leave tensors of such names as they are stored, a weight with its scale (repeatable)",
    )  # fmt: skip
    parser.add_argument("--shard-size", default="5GiB", metavar="SIZE", help="tensors in a file (default 5GiB)")
    parser.add_argument("--dry-run", action="store_true", help="plan, check sizes and disk, write nothing")
    args = _parsed(parser, argv)
    return _guarded(
        args,
        lambda: convert_checkpoint(
            args.src,
            args.dst,
            to=args.to,
            keep=args.keep,
            shard_size=args.shard_size,
            memory=args.memory,
            workers=args.workers,
            backend=args.backend,
            dry_run=args.dry_run,
            progress=watcher(args.quiet),
        ),
    )


def verify(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    parser = _parser("verify", "Make a conversion again, in memory, and compare it with DST.", _VERIFY)
    parser.add_argument("--sample", type=float, default=1.0, metavar="SHARE", help="share of tensors (default 1: all)")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat a sample")
    args = _parsed(parser, argv)
    return _guarded(
        args,
        lambda: verify_checkpoint(
            args.src,
            args.dst,
            sample=args.sample,
            seed=args.seed,
            memory=args.memory,
            workers=args.workers,
            backend=args.backend,
            progress=watcher(args.quiet),
        ),
    )


def _parser(name: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"flagops {name}",
        description=text,
        epilog=examples + "\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="folder with safetensors and their index")
    parser.add_argument("dst", metavar="DST", help="folder of the converted checkpoint")
    return parser


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("--memory", metavar="SIZE", help="most memory of the process (default 4GiB)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one a processor)")
    parser.add_argument("--backend", metavar="B", help="of the kernels: numba, torch, triton, numpy (default: fastest)")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.add_argument("--json", action="store_true", help="a summary for machines on standard output")
    return parser.parse_args(list(argv))


def _guarded(args: argparse.Namespace, run: Callable[[], Summary]) -> int:
    """Run, print the summary or the error, and choose the exit code."""
    try:
        summary = run()
    except KeyboardInterrupt:
        return _failed(args, 2, "interrupted; repeat the same command to go on")
    except Difference as error:
        return _failed(args, 1, str(error))
    except (ValueError, Unsupported, ModuleNotFoundError) as error:
        if os.environ.get("FLAGOPS_LOG", "").upper() == "DEBUG":
            raise
        return _failed(args, 2, str(error))
    except OSError as error:
        return _failed(args, 3, f"{error}; repeat the same command to go on once that is put right")
    if args.json:
        print(json.dumps(summary.as_dict(), indent=2))
    elif not args.quiet:
        print(report(summary))
    return 0


def _failed(args: argparse.Namespace, code: int, text: str) -> int:
    print(f"flagops: {line(text)}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text, "exit_code": code}, indent=2))
    return code


def report(summary: Summary) -> str:
    """A summary in words."""
    total = summary.total_size
    declared = "no total" if total["source"] is None else f"{total['source']:,} bytes"
    tensors = ", ".join(f"{count} {action}" for action, count in summary.tensors.items())
    lines = [
        f"{summary.source} -> {summary.destination}: {summary.state}",
        f"tensors: {tensors}; {summary.dropped_scales} scales dropped",
        *_kept(summary),
        *_errors(summary),
        f"output: {amount(summary.output_bytes)} in {summary.shards} shards and {len(summary.copied)} copied files",
        f"index: {declared} -> {total['output']:,} bytes",
        f"config.json: {'; '.join(summary.config_changes) or 'unchanged'}",
    ]
    if summary.state == "planned":
        lines += [
            f"disk: {amount(summary.needed_disk)} needed, {amount(summary.free_disk)} free",
            f"memory: {amount(summary.planned_memory)} of {amount(summary.memory)}, {summary.workers} workers, "
            f"kernels of {summary.backend}",
        ]
    elif summary.seconds:
        lines.append(
            f"{summary.seconds:.1f} s, {amount(summary.rate)}/s; memory at its peak {amount(summary.peak_memory)} "
            f"of {amount(summary.memory)}; {summary.workers} workers, kernels of {summary.backend}"
        )
    if summary.resumed_shards:
        lines.append(f"{summary.resumed_shards} shards were finished before")
    return "\n".join(map(line, lines + summary.notes))


def _errors(summary: Summary) -> list[str]:
    if not summary.errors:
        return []
    listed = ", ".join(f"{name} {error:.2%}" for name, error in list(summary.errors.items())[:8])
    return [f"relative error, {len(summary.errors)} weights, the worst: {listed}"]


def _kept(summary: Summary) -> list[str]:
    if not summary.keep:
        return []
    names = ", ".join(summary.kept[:4]) + (", ..." if len(summary.kept) > 4 else "")
    return [f"kept as stored by --keep {' '.join(map(repr, summary.keep))}: {len(summary.kept)} tensors ({names})"]
