"""Train a small DeepSeek-V4 on a CPU, or go on with it; its checkpoints, log and loss curve lie in one folder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import tables
from flagops.tools import contract

if TYPE_CHECKING:
    from .corpus import Corpus
    from .loop import Training

LOG, CURVE, MODEL = "log.jsonl", "curve.png", "model"
ABOUT = """# A small trained DeepSeek-V4

Made by `flagops train` in {steps} steps of {tokens} tokens (this is step {step}; seed {seed}, {optimizer} at {rate}),
in the published checkpoints' names and formats: routed experts in FP4, projections in FP8 blocks, e8m0 scales, the rest
in BF16 and float32. Token 0 to 255 is a byte, 256 begins a document.

It was trained on generated tasks and on the reference of the Python language as `pydoc_data.topics` of Python 3.11.7
has it, copyright of the Python Software Foundation, PSF License Version 2.
"""


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
    if options.grid:
        return _grid(options, corpus)
    chosen = Options(options.steps, options.seed, options.tokens, options.rate, options.optimizer)
    training = Training(corpus, chosen)
    found = checkpoints(options.folder)
    if found:
        training.load(found[-1])
        print(f"{options.folder} has taken {training.step} of {chosen.steps} steps", flush=True)
    elif options.export or options.ablate:
        raise ValueError(f"there is no checkpoint in {options.folder}")
    if options.ablate:
        return _ablate(training)
    if not options.export:
        _train(options, training)
    _export(options.export or options.folder / MODEL, training)
    return 0


def _train(options: argparse.Namespace, training: Training) -> None:
    last = training.options.steps
    options.folder.mkdir(exist_ok=True)
    log = Log(options.folder / LOG, training.step)
    with contract.Progress(last - training.step) as begin:
        begin("the first step")
        for facts in training.run():
            log.append(facts)
            begin(f"step {training.step}, loss {facts['loss']:.3f}")
            if training.step % options.every == 0 or training.step == last:
                log.append({"step": training.step, "judged": training.judge()})
                log.save()
                training.save(options.folder)
                draw(options.folder / CURVE, log.lines)
                print(said(log.lines[-1]), flush=True)


def _export(target: Path, training: Training) -> None:
    from .export import export

    size = export(training.model, target, ABOUT.format(step=training.step, **asdict(training.options)))
    print(f"{target}: {size / 1e6:.2f} MB in FP4, FP8 and BF16, after step {training.step}")


def _ablate(training: Training) -> int:
    """Each part's worth, and how evenly experts are used."""
    import flagops

    from .ablation import PARTS, ablated, entropies
    from .narrow import straight_through

    rows: list[tuple[object, ...]] = []
    whole: dict[str, dict[str, float]] = {}
    with contract.Progress(len(PARTS) + 1) as begin, straight_through(training.model), flagops.patch(training.model):
        for part, found in ablated(training.model, training.corpus, 2):
            begin(part)
            whole = whole or found
            worse = [x["loss"] - (0 if found is whole else whole[kind]["loss"]) for kind, x in found.items()]
            rows.append((part, *(f"{x:.3f}" if found is whole else f"{x:+.3f}" for x in worse)))
        even = entropies(training.model, training.corpus, 2)
    tables.show("held-out nats a token, and how many more without a part", ("without", *whole), rows)
    print("entropy of the experts' shares, of the largest: " + ", ".join(f"{x:.3f}" for x in even))
    return 0


def _grid(options: argparse.Namespace, corpus: Corpus) -> int:
    """Both optimisers at every rate."""
    from . import grid

    options.folder.mkdir(exist_ok=True)
    found = []
    with contract.Progress(len(grid.cells()) * options.steps) as begin:
        for run in grid.runs(corpus, options.folder, options.steps, options.seed, options.tokens, begin):
            found.append(run)
            grid.draw(options.folder / grid.PICTURE, found)
    found.sort(key=grid.held_out)
    columns = ("optimizer", "rate", "held-out nats a token")
    tables.show("best first", columns, [(x["optimizer"], f"{x['rate']:g}", f"{grid.held_out(x):.3f}") for x in found])
    return 0


def _parser() -> argparse.ArgumentParser:
    from .corpus import HELD

    parser = contract.Parser(prog="flagops train", description=__doc__)
    add = parser.add_argument
    add("folder", type=folder, metavar="FOLDER", help="where a run lies; one that has begun goes on")
    add("--steps", type=contract.natural, default=1800, metavar="N", help="of the whole run (default: 1800)")
    add("--seed", type=int, default=0, metavar="S", help="of weights and documents (default: 0)")
    add("--tokens", type=contract.natural, default=4096, metavar="N", help="a step (default: 4096), a multiple of 2048")
    add("--rate", type=float, default=4e-3, metavar="R", help="peak learning rate (default: 0.004)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the matrices (default: muon)")
    add("--every", type=contract.natural, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add(
        "--text", type=contract.existing, metavar="FILE", help=f"in place of the Python reference; 1/{HELD} is held out"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--export", type=folder, metavar="DST", help="write the newest checkpoint's model, as it is")
    other.add_argument("--ablate", action="store_true", help="what each part of the newest checkpoint's model is worth")
    other.add_argument("--grid", action="store_true", help="compare optimisers and rates, in runs of --steps each")
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
