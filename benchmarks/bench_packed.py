"""A checkpoint of gigabytes as it is stored: load, memory, prefill and tokens a second, beside what expanding it costs.

``python benchmarks/bench_packed.py [--experts 64] [--folder DIR] [--markdown FILE]``. The checkpoint has the widths of
DeepSeek-V4-Flash, three layers (window, CSA, HCA), fewer experts, a smaller vocabulary, and random codes. Each arm is a
process of its own, which loads, reads a prompt, and then makes tokens one at a time; files are dropped from the page
cache before it. Room is what experts may take of the memory, as a share of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import flagops
from flagops import tables
from flagops.checkpoint.memory import peak, resident
from flagops.checkpoint.progress import amount
from flagops.deepseek_v4.examples import packed_deepseek_v4
from flagops.packed.command import greedy
from flagops.tools import results, roofline

SIZES = {
    "vocab_size": 16384, "hidden_size": 4096, "moe_intermediate_size": 2048, "num_attention_heads": 64, "head_dim": 512,
    "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8, "num_experts_per_tok": 6, "index_n_heads": 64,
    "index_topk": 512, "sliding_window": 128, "compress_rate_hca": 128, "max_position_embeddings": 65536,
}  # fmt: skip
ARMS = {
    "packed, mapped": {},
    "packed, activations in bfloat16": {"activations": "none"},
    "packed, experts stacked (pack=True)": {"pack": True},
    "packed, experts on demand, room for 1/4": {"room": 4},
    "packed, experts on demand, room for 1/16": {"room": 16},
    "expanded to bfloat16, patched": {"expanded": True, "patched": True},
    "expanded to bfloat16, transformers": {"expanded": True},
    "transformers expands it": {"theirs": True},
}
PROMPT, TOKENS = 128, 16
HEAD = ("", "load", "memory at its peak", f"{PROMPT} tokens read", "tokens a second", "read a token", "same tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, metavar="N", help="of a layer; 13.4 MB each")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(_arm(ARMS[options.arm[0]], Path(options.arm[1]))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        packed, expanded = Path(place) / "packed", Path(place) / "expanded"
        size = packed_deepseek_v4(packed, n_routed_experts=options.experts, **SIZES)
        flagops.checkpoint.convert(packed, expanded)
        rate = roofline.disk(packed)
        found = {name: _measured(name, packed, expanded) for name in ARMS}
    first = next(iter(found.values()))
    rows = [[name, *_cells(one, first)] for name, one in found.items()]
    said = f"{amount(size)} of weights, {options.experts} experts a layer; the disk reads {rate / 1e9:.2f} GB/s"
    tables.show(said, HEAD, rows)
    if options.markdown:
        results.write_markdown(options.markdown, HEAD, rows, f"{__doc__}\n{said}.")


def _measured(name: str, packed: Path, expanded: Path) -> dict[str, Any]:
    folder = expanded if ARMS[name].get("expanded") else packed
    _forget(folder)
    done = subprocess.run(
        [sys.executable, __file__, "--arm", name, folder], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _arm(how: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What one process finds, kernels compiled before it looks at the clock."""
    with tempfile.TemporaryDirectory() as place:
        packed_deepseek_v4(Path(place) / "tiny")
        list(_greedy(flagops.load(Path(place) / "tiny"), 2))
    before, start = peak(), time.perf_counter()
    model = _model(how, folder)
    load = time.perf_counter() - start
    times, tokens = [time.perf_counter()], []
    for token in _greedy(model, TOKENS):
        times.append(time.perf_counter())
        tokens.append(token)
    report = getattr(model, "flagops_arena", None) and model.flagops_arena.report()
    return {
        "load": load, "peak": peak(), "before": before, "prefill": times[1] - times[0],
        "rate": (len(tokens) - 1) / (times[-1] - times[1]), "tokens": tokens, "arena": report and vars(report),
    }  # fmt: skip


def _model(how: dict[str, Any], folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    if how.get("expanded") or how.get("theirs"):
        given = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if how.get("theirs") else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **given).eval()
        if how.get("patched"):
            flagops.patch(model)
        return model
    options = {key: value for key, value in how.items() if key != "room"}
    if "room" in how:
        sizes = {"experts": 0, "rest": 0}
        for name, x in flagops.load(folder).state_dict().items():
            sizes["experts" if ".experts." in name else "rest"] += x.nbytes
        options["memory"] = resident() + sizes["rest"] + sizes["experts"] // how["room"]
    return flagops.load(folder, **options)


def _greedy(model: Any, count: int) -> Iterator[int]:
    """A prompt of random tokens goes on, past any that ends a text."""
    draw = torch.Generator().manual_seed(0)
    model.generation_config.eos_token_id = None
    return greedy(model, torch.randint(2, model.config.vocab_size, (PROMPT,), generator=draw).tolist(), count)


def _cells(one: dict[str, Any], first: dict[str, Any]) -> list[str]:
    same = sum(a == b for a, b in zip(one["tokens"], first["tokens"], strict=True))
    arena = one["arena"]
    read = f"{amount(arena['read'] / (PROMPT + TOKENS - 1))}, {arena['waited']:.1f} s waited" if arena else ""
    times = [f"{one['load']:.2f} s", amount(one["peak"]), f"{one['prefill']:.2f} s", f"{one['rate']:.2f}"]
    return [*times, read, f"{same} of {TOKENS}"]


def _forget(folder: Path) -> None:
    """Drop files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
