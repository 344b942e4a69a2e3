"""Models on the bare device, every kernel from flagops, held to torch on the CPU: ``python tests/bare/run.py --help``.

A row is ``ok`` where logits are within 1e-3 (or 10 times what torch's own float32 is off from float64, if that is more;
under autocast, 4 times what the CPU's own autocast is off), tokens are the same, and the losses of 20 AdamW steps are
within 1e-3 of torch's, relatively.
"""

import argparse
import contextlib
import copy
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # this package, by its own name

import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import bare
import flagops
from bare import models
from flagops.tools import demo

LOGITS, LOSSES = 1e-3, 1e-3
EXACT, AUTOCAST = 10, 4  # times what torch's own float32, and its own autocast, are off


@dataclass
class Subject:
    """A model on the CPU and its inputs, with what torch answers there, computed once."""

    model: Any
    inputs: models.Inputs

    @cached_property
    def exact(self) -> Tensor:
        """`forward` in float64."""
        model = copy.deepcopy(self.model).double()
        model.set_experts_implementation("eager")  # torch has no grouped product in float64
        return models.forward(model, {k: x.double() if x.is_floating_point() else x for k, x in self.inputs.items()})

    def unpadded(self, result: Tensor) -> Tensor:
        """What is said of tokens; what padding has for logits means nothing."""
        mask = self.inputs.get("attention_mask")
        return result if mask is None else result[mask.bool()]

    def expected(self, phase: str) -> Tensor:
        return models.PHASES[phase](self.model, self.inputs)

    def on(self, device: str) -> "Subject":
        model = copy.deepcopy(self.model).to(device)
        return Subject(model, {name: x.to(device) for name, x in self.inputs.items()})


def judged(phase: str, subject: Subject, got: Tensor) -> str:
    """How far a phase's result is from torch's on the CPU, as ``ok ...`` or what is wrong."""
    expected, got = subject.expected(phase), got.cpu()
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if phase in ("greedy", "sampled"):
        wrong = int((got != expected).sum())
        return f"{wrong} of {got.numel()} tokens differ" if wrong else "ok"
    if phase.startswith("train"):
        off, bound = float(((got - expected) / expected).abs().max()), LOSSES
    else:
        exact, expected, got = (subject.unpadded(x) for x in (subject.exact.float(), expected, got))
        own = float((expected - exact).abs().max())
        against = exact if phase == "autocast" else expected
        off = float((got - against).abs().max())
        bound = AUTOCAST * own if phase == "autocast" else max(LOGITS, EXACT * own)
    return f"ok {off:.1e} / {bound:.0e}" if off <= bound else f"off by {off:.2g}, more than {bound:.2g}"


def attempted(phase: str, subject: Subject, options: argparse.Namespace) -> str:
    """A phase's verdict on a device, or what stopped it."""
    if not models.applies(phase, subject.model):
        return "-"
    try:
        there = subject.on(options.device)
        with flagops.enable(backend=options.backend) if options.backend else contextlib.nullcontext():
            got = models.PHASES[phase](there.model, there.inputs)
    except NotImplementedError as error:
        missing = re.search(r"(?<=aten::)[\w.]+|\w+(?= not implemented)", str(error))
        return f"no {missing[0]}" if missing else str(error).partition("\n")[0]
    except Exception as error:  # one model's failure is a row, and the next model is still tried
        if options.verbose:
            traceback.print_exc()
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    if phase == "greedy" and hasattr(subject.model, "tokenizer"):
        for row in subject.model.tokenizer.batch_decode(got.cpu(), skip_special_tokens=True):
            Console().print(f"[dim]{escape(row.strip())}[/dim]", highlight=False)
    return judged(phase, subject, got)


def table(names: list[str], phases: list[str], options: argparse.Namespace) -> bool:
    """Prints a row for each model; whether all is well."""
    shown = Table(title=f"{options.device}, flagops' {options.backend or 'nothing'}, fallback: {options.fallback}")
    for heading in ("model", *phases):
        shown.add_column(heading, overflow="fold")
    well = True
    for name in names:
        verdicts = []
        try:
            subject = Subject(*models.FAMILIES[name]())
        except demo.Missing as missing:
            well = False
            shown.add_row(name, f"[red]{escape(str(missing))}[/red]")
            continue
        for phase in phases:
            print(f"{name}, {phase} ...", file=sys.stderr, flush=True)
            verdicts.append(attempted(phase, subject, options))
        well &= all(verdict.startswith(("ok", "-")) for verdict in verdicts)
        shown.add_row(name, *map(_coloured, verdicts))
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    return well


def _coloured(verdict: str) -> str:
    colour = "green" if verdict.startswith("ok") else "dim" if verdict == "-" else "red"
    return f"[{colour}]{escape(verdict)}[/{colour}]"


def _among(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if strange := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(strange)}; known: {', '.join(known)}")
        return names

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=_among(models.FAMILIES), default=list(models.FAMILIES), help="joined by commas; default: all")
    add("--phases", type=_among(models.PHASES), default=list(models.PHASES), help="joined by commas; default: all")
    add("--device", default="bare", help="bare, cpu, or a device that torch has, such as npu")
    add("--backend", default="numba", help="of flagops.enable; empty: flagops is not enabled")
    add("--fallback", choices=("none", "count", "raise"), default="none", help="what serves calls without a kernel")
    add("--own-copies", action="store_true", help="copies within the device need no kernel, as with --fallback count")
    add("--verbose", action="store_true", help="print the traceback of a failure")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.device == "bare":
        try:
            bare.load()
        except bare.Unbuildable as problem:
            sys.exit(str(problem))
        bare.fallback(options.fallback)
        bare.own_copies(options.own_copies or options.fallback == "count")
    well = table(options.models, options.phases, options)
    if options.device == "bare" and options.fallback == "count":
        calls = sorted(bare.fallen().items(), key=lambda item: -item[1])
        print(f"{len(calls)} overloads were served by the CPU, in {sum(times for _, times in calls)} calls:")
        for name, times in calls:
            print(f"  {times:8} {name}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
