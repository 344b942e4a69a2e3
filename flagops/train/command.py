"""Train a small DeepSeek-V4 on a CPU, or go on with it; its checkpoints, log and loss curve lie in one folder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagops import contract

LOG, CURVE = "log.jsonl", "curve.png"


def run(argv: Sequence[str]) -> int:
    """The command."""
    options = _parser().parse_args(argv)
    for needed, name in (("transformers", "transformers"), ("matplotlib", "bench")):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"flagops train needs {needed} (pip install flagops[{name}])")
    from .corpus import Corpus, shipped
    from .loop import LENGTH, Options, Training, checkpoints

    if options.tokens % LENGTH or not options.rate > 0:
        raise ValueError(f"--tokens must be a multiple of {LENGTH} and --rate above 0")
    corpus = Corpus(options.text.read_bytes() if options.text else shipped())
    chosen = Options(options.steps, options.seed, options.tokens, options.rate, options.optimizer)
    training = Training(corpus, chosen)
    options.folder.mkdir(exist_ok=True)
    found = checkpoints(options.folder)
    if found:
        training.load(found[-1])
        print(f"going on after step {training.step} of {chosen.steps}", flush=True)
    log = Log(options.folder / LOG, training.step)
    with contract.Progress(chosen.steps - training.step) as begin:
        begin("the first step")
        for facts in training.run():
            log.append(facts)
            begin(f"step {training.step}, loss {facts['loss']:.3f}")
            if training.step % options.every == 0 or training.step == chosen.steps:
                log.append({"step": training.step, "judged": training.judge()})
                log.save()
                training.save(options.folder)
                draw(options.folder / CURVE, log.lines)
                print(said(log.lines[-1]), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    from .corpus import HELD

    parser = contract.Parser(prog="flagops train", description=__doc__)
    add = parser.add_argument
    add("folder", type=folder, metavar="FOLDER", help="where a run lies; one that has begun goes on")
    add("--steps", type=natural, default=4000, metavar="N", help="of the whole run (default: 4000)")
    add("--seed", type=int, default=0, metavar="S", help="of weights and documents (default: 0)")
    add("--tokens", type=natural, default=4096, metavar="N", help="a step (default: 4096), a multiple of 2048")
    add("--rate", type=float, default=4e-3, metavar="R", help="peak learning rate (default: 0.004)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the matrices (default: muon)")
    add("--every", type=natural, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add(
        "--text", type=contract.existing, metavar="FILE", help=f"in place of the Python reference; 1/{HELD} is held out"
    )
    return parser


def folder(text: str) -> Path:
    """A folder that is there or can be made, for `argparse`."""
    path = Path(text)
    if not path.is_dir():
        if path.exists():
            raise argparse.ArgumentTypeError(f"{path} is no folder")
        return contract.output(text)
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def natural(text: str) -> int:
    """A whole number above zero, for `argparse`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


class Log:
    """What every step found, a line each; on disk up to the last checkpoint, and no further than `step` at first."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: list[dict[str, Any]] = [x for x in map(json.loads, lines) if x["step"] <= step]
        self._start = time.time() - max((x.get("seconds", 0.0) for x in self.lines), default=0.0)

    def append(self, facts: dict[str, Any]) -> None:
        self.lines.append({**facts, "seconds": round(time.time() - self._start, 1)})

    def save(self) -> None:
        """The whole file anew: it appears at once."""
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        partial.replace(self._path)


def said(line: dict[str, Any]) -> str:
    """A judgement in one line."""
    kinds = (
        f"{kind} {x['loss']:.2f}" + (f" (known {x['known']:.2f}, {x['right']:.0%} right)" if "right" in x else "")
        for kind, x in line["judged"].items()
    )
    return f"step {line['step']}, {line['seconds']:.0f} s, held-out nats a token: {', '.join(kinds)}"


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The losses of a run as a picture: of training, smoothed, and of each kind of held-out document."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [x for x in lines if "loss" in x]
    smooth, mean = [], steps[0]["loss"]
    for x in steps:
        mean += 0.05 * (x["loss"] - mean)
        smooth.append(mean)
    left.plot([x["step"] for x in steps], [x["loss"] for x in steps], linewidth=0.4, color="lightgray")
    left.plot([x["step"] for x in steps], smooth, label="training")
    left.plot([x["step"] for x in steps], [x["index"] for x in steps], linewidth=0.6, label="indexer")
    judged = [x for x in lines if "judged" in x]
    for kind in judged[-1]["judged"] if judged else ():
        left.plot([x["step"] for x in judged], [x["judged"][kind]["loss"] for x in judged], "--", label=kind)
        if "right" in judged[-1]["judged"][kind]:
            right.plot([x["step"] for x in judged], [x["judged"][kind].get("right") for x in judged], label=kind)
    left.set_xlabel("step")
    left.set_ylabel("nats a token")
    right.set_xlabel("step")
    right.set_ylabel("of tokens that a memory knows, predicted")
    right.set_ylim(0, 1)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)
