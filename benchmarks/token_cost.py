"""What `flagops plan` says of small DeepSeek-V4s, and what they take: tokens/s measured beside planned.

    python benchmarks/token_cost.py --folder /a/disk --markdown benchmarks/results/token_cost.md

Checkpoints of random codes, with the proportions of real ones and larger than the caches, are loaded by `flagops.load`:
mapped, packed, and within a budget of memory, where the page cache is emptied before each token. The figures of the
machine are those of ``flagops bench --roofline``, taken in the same run; they know nothing of these models, but for how
often an expert was in the budget, which hangs on what a router chooses and is given as to `flagops plan --hit-rate`. A
plan is kept where what was measured lies within a quarter of it; the exit code is 1 where one is not.

``--shared`` is for machines that others use meanwhile: one thread, timed by the clock of the process, which stands
while others have the processor. Waiting for a disk is no time to it, so that the budget is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flagops import packed, tables
from flagops.checkpoint.memory import resident
from flagops.checkpoint.progress import amount
from flagops.deepseek_v4.examples import packed_deepseek_v4
from flagops.plan import checkpoint, times
from flagops.plan.cost import Step, loads
from flagops.plan.machine import Machine, described
from flagops.tools import contract, results, roofline
from flagops.tools.measure import Settings

KEPT = 0.25
"""What measured and planned may differ by, of the plan."""
PROMPT, TOKENS, TURNS = 128, 16, 4
_SIZES = {
    "head_dim": 512, "num_experts_per_tok": 6, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
    "sliding_window": 128, "compress_rate_hca": 128, "max_position_embeddings": 65536,
}  # fmt: skip
MODELS = {
    "wide": _SIZES | {
        "hidden_size": 2048, "moe_intermediate_size": 1024, "num_attention_heads": 16, "q_lora_rank": 512,
        "o_groups": 4, "o_lora_rank": 512, "n_routed_experts": 32, "vocab_size": 32768, "num_hidden_layers": 6,
        "compress_ratios": [0, 4, 128, 4, 128, 4],
    },
    "deep": _SIZES | {
        "hidden_size": 1024, "moe_intermediate_size": 512, "num_attention_heads": 8, "q_lora_rank": 256,
        "o_groups": 2, "o_lora_rank": 512, "n_routed_experts": 64, "vocab_size": 16384, "num_hidden_layers": 12,
        "compress_ratios": [0, 0, *[4, 128] * 5],
    },
}  # fmt: skip
HEAD = ("model", "run", "phase", "read", "planned, tokens/s", "measured", "measured to planned", "", "most of it")


@dataclass(frozen=True)
class Run:
    """How a checkpoint is loaded; budget: the part of its experts that fits into memory, None for all."""

    name: str
    pack: bool = False
    budget: float | None = None


RUNS = (Run("mapped"), Run("packed", pack=True), Run("half of the experts in memory", budget=0.5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the checkpoints, on a disk"
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--markdown", type=contract.output)
    parser.add_argument("--shared", action="store_true", help="one thread by the processor's clock, and no disk")
    options = parser.parse_args()
    runs = [run for run in RUNS if run.budget is None or not options.shared]
    place = Path(tempfile.mkdtemp(prefix="flagops-", dir=options.folder))
    try:
        for name in options.models:
            print(f"{name}: {amount(packed_deepseek_v4(place / name, **MODELS[name]))}", flush=True)
        settings = Settings()
        if options.shared:
            torch.set_num_threads(1)
            settings = Settings(clock=time.process_time)
        here = roofline.machine(settings, None if options.shared else place / options.models[0])
        tables.show(here.name, ("figure", "measured", "of"), described(here))
        rows = [row for name in options.models for run in runs for row in measured(place / name, run, here, settings)]
    finally:
        shutil.rmtree(place)
    tables.show("planned and measured", HEAD, rows)
    if options.markdown:
        note = "\n".join(f"- {what or 'bandwidth'}: {how_much}, {of}" for what, how_much, of in described(here))
        results.write_markdown(options.markdown, HEAD, rows, f"{__doc__}\nRun with {' '.join(sys.argv[1:])}:\n\n{note}")
    return int(any(row[7] != "kept" for row in rows))


def measured(folder: Path, run: Run, here: Machine, settings: Settings) -> Iterator[list[str]]:
    """A row for decoding and one for a prompt."""
    model, parts = checkpoint.of_folder(folder, "checkpoint")
    experts = sum(part.held for part in parts if part.role == "routed experts")
    others = sum(part.held for part in parts) - experts
    memory = None if run.budget is None else int(resident() + others + run.budget * experts)
    steps = {"a token": Step(1, PROMPT + TOKENS // 2), "a prompt": Step(PROMPT, 0)}
    loaded = packed.load(folder, pack=run.pack, memory=memory)
    cold = (lambda: _cold(folder)) if run.budget is not None else (lambda: None)
    found = dict(zip(steps, _timed(loaded, cold, settings), strict=True))
    for phase, step in steps.items():
        took, hits = found[phase]
        of_step = loads(model, parts, step)
        room = None if run.budget is None else others + run.budget * experts
        held = times.residence(model, parts, 0, room, step.rows, hits)
        terms = times.terms(model, of_step, step, here, held, run.pack)
        planned, took = step.rows / times.seconds(terms), step.rows / took
        most = sorted(terms, key=lambda term: -term.seconds)[:3]
        row = [
            folder.name, run.name, phase, amount(sum(load.read for load in of_step)), f"{planned:.2f}", f"{took:.2f}",
            f"{took / planned:.2f}", "kept" if abs(took / planned - 1) <= KEPT else "**MISSED**",
            ", ".join(f"{term.what} {term.seconds * 1e3:.1f} ms" for term in most),
        ]  # fmt: skip
        print(" | ".join(row), flush=True)
        yield row
    if loaded.flagops_arena is not None:
        print(f"{folder.name}: {loaded.flagops_arena.report()}", flush=True)


@torch.no_grad()
def _timed(model: Any, cold: Callable[[], None], settings: Settings) -> tuple[tuple[float, float | None], ...]:
    """Seconds of a token and of a prompt, the least disturbed, after one of each that compiles and maps; and how often
    an expert was there, None where all are."""
    random = torch.Generator().manual_seed(0)
    spent: tuple[list[float], list[float]] = ([], [])
    there, asked = [0, 0], [0, 0]  # of tokens and of prompts
    for turn in range(TURNS):
        ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=random)
        cache: Any = None
        for count in range(TOKENS):
            cold()
            before, start = _experts(model), settings.clock()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            took, after = settings.clock() - start, _experts(model)
            if turn and count != 1:
                phase = 0 if count else 1
                spent[phase].append(took)
                there[phase] += after[0] - before[0]
                asked[phase] += sum(after) - sum(before)
            cache, ids = out.past_key_values, torch.randint(0, model.config.vocab_size, (1, 1), generator=random)
    hits = [one / every if every else None for one, every in zip(there, asked, strict=True)]
    return (roofline.undisturbed(spent[0]), hits[0]), (min(spent[1]), hits[1])


def _experts(model: Any) -> tuple[int, int]:
    """Those that were in memory when they were asked for, and those that were read, so far."""
    report = model.flagops_arena and model.flagops_arena.report()
    return (report.hits, report.reads) if report else (0, 0)


def _cold(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
