"""The command ``flagops plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from flagops import config
from flagops.distributed import plan as schemes
from flagops.errors import suggestion
from flagops.tools import contract

from . import checkpoint, machine, report
from .cost import ENTRIES, Step, cache_held, loads
from .machine import Machine
from .model import FORMATS, MODELS, Model, Part, parts
from .report import Phase
from .times import residence, terms

_EXAMPLES = """examples:
  flagops plan --model v4-flash --tp 32 --memory 32GiB                what each scheme of tensor parallelism holds
  flagops plan --model v4-flash --chip H200 --context 65536           what a token takes, by published figures
  flagops bench --roofline --json here.json                           this machine, measured
  flagops plan --model DeepSeek-V4-Flash --machine here.json --memory 24GiB --disk 3GB --watts 120 --price 0.3
"""
_TOKENS = ("machine", "chip", "bandwidth", "rate", "disk", "hit-rate", "watts", "price", "rent")


def run(argv: Sequence[str]) -> int:
    """The command; 0 if the model fits, 1 if not. Raises ValueError for arguments that make no plan."""
    options = _parser().parse_args(argv)
    if options.tp is not None:
        return _schemes(options)
    on = _machine(options)
    if options.model in MODELS:
        model = MODELS[options.model]
        found = parts(model, options.format)
    else:
        model, found = checkpoint.of_folder(_folder(options.model), options.format)
    cache = cache_held(model, max(options.context, options.prompt), options.batch, options.cache)
    decode, prefill = (
        _phase(options, model, found, step, cache, on)
        for step in (Step(1, options.context, options.batch), Step(options.prompt, 0))
    )
    fits = decode.held.whole or (decode.held.room > 0 and (options.disk or (on and on.disk)) is not None)
    document = report.document(options, found, cache, on, decode, prefill) | {"fits": fits}
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        report.show(options, model, on, decode, prefill, document)
    return 0 if fits else 1


def _phase(
    options: argparse.Namespace, model: Model, found: Sequence[Part], step: Step, cache: float, on: Machine | None
) -> Phase:
    of_step = loads(model, found, step, options.cache)
    beside = cache + (on.process if on else 0)
    held = residence(model, found, beside, options.memory, step.rows, options.hit_rate)
    able = on is not None and (held.whole or (held.room > 0 and on.disk is not None))
    return Phase(step, of_step, held, terms(model, of_step, step, on, held, options.pack) if on and able else None)


def _folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise ValueError(f"--model {word}: no such folder{suggestion(word, MODELS)}")
    return Path(word)


def _machine(options: argparse.Namespace) -> Machine | None:
    """The machine that options name, with the disk that they give; None where they name none."""
    for option, value, other, needed in (
        ("price", options.price, "watts", options.watts),
        ("hit-rate", options.hit_rate, "memory", options.memory),
    ):
        if value is not None and needed is None:
            raise ValueError(f"--{option} counts with --{other}: give both, or neither")
    bandwidth, rate = options.bandwidth, options.rate and options.rate * 1e12
    if options.machine:
        if options.chip or bandwidth or rate:
            raise ValueError("--machine has its figures: leave --chip, --bandwidth and --rate out")
        on = machine.of_file(options.machine)
    elif options.chip:
        on = machine.of_chip(options.chip, bandwidth, rate)
    elif bandwidth and rate:
        on = Machine("a machine as given", bandwidth, rate)
    elif bandwidth or rate or options.disk or options.watts or options.rent:
        raise ValueError("times need a machine: give --machine FILE, --chip NAME, or --bandwidth and --rate")
    else:
        return None
    return dataclasses.replace(on, disk=options.disk) if options.disk else on


def _schemes(options: argparse.Namespace) -> int:
    """Tensor parallelism of the output projection, of a model by name."""
    form = options.format
    for option in _TOKENS:
        if getattr(options, option.replace("-", "_")) is not None:
            raise ValueError(f"--tp plans ranks, and no tokens: leave --{option} out")
    if options.model not in MODELS:
        raise ValueError(f"--tp plans {' and '.join(MODELS)}, got --model {options.model}")
    if form not in schemes.FORMATS:
        raise ValueError(f"--tp plans {', '.join(schemes.FORMATS)}, got --format {form}")
    model = MODELS[options.model]
    found = schemes.rows(model, options.tp, options.memory, form)
    if options.json:
        print(json.dumps([vars(row) for row in found], indent=1))
    else:
        schemes.show(options.model, model.layers, found, options.tp, options.memory, form)
    return 0 if any(row.fits for row in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(
        prog="flagops plan",
        description="What a token of a DeepSeek-V4 takes on a machine; with --tp what tensor parallelism of its "
        "grouped output projection costs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|FOLDER", help=f"{' or '.join(MODELS)}, or a folder with a checkpoint")
    add("--tp", type=int, metavar="N", help="ranks that share a layer: plan their projections in place of tokens")
    add(
        "--memory",
        type=size,
        metavar="SIZE",
        help="that weights must fit, with --tp of one chip, such as 32GiB; "
        "without --tp routed experts beyond it are read from --disk",
    )
    add("--format", choices=FORMATS, default="checkpoint", help="of the weights (default: as released or stored)")
    add("--context", type=whole, default=4096, metavar="N", help="tokens in the cache when one is made (default 4096)")
    add("--prompt", type=contract.natural, default=512, metavar="N", help="tokens of a prompt (default 512)")
    add("--batch", type=contract.natural, default=1, metavar="N", help="sequences that are decoded at once (default 1)")
    add("--cache", choices=ENTRIES, default="bf16", help="format of the cache (default bf16)")
    add("--pack", action="store_true", help="experts of a layer in one tensor, as flagops.load(pack=True) has them")
    on = parser.add_argument_group("the machine: measured, published, or given")
    on.add_argument("--machine", type=contract.existing, metavar="FILE", help="of flagops bench --roofline --json FILE")
    on.add_argument("--chip", metavar="NAME", help="of flagops chips, by its published figures, which are limits")
    on.add_argument("--bandwidth", type=size, metavar="SIZE", help="bytes that its memory reads in a second, as 186GB")
    on.add_argument("--rate", type=positive, metavar="X", help="TFLOP/s of its products")
    on.add_argument("--disk", type=size, metavar="SIZE", help="bytes that its disk reads in a second, as 3GB")
    on.add_argument(
        "--hit-rate",
        type=share,
        metavar="X",
        help="of the experts chosen, those in memory already "
        "(default: of a cache of those used last, under uniform routing)",
    )
    on.add_argument("--watts", type=positive, metavar="W", help="that it draws: energy per million tokens")
    on.add_argument("--price", type=positive, metavar="P", help="of a kWh, in any currency")
    on.add_argument("--rent", type=positive, metavar="P", help="of an hour of the machine, in that currency")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def size(text: str) -> int:
    """Bytes, for `argparse`; 32 alone would be bytes, which nobody means."""
    try:
        return config.size("" if text.strip().isdecimal() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size with its unit, such as 32GiB, got {text!r}") from None


def whole(text: str) -> int:
    """A whole number, for `argparse`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above zero, for `argparse`."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return found


def share(text: str) -> float:
    """A number from 0 to 1, for `argparse`."""
    found = 0.0 if text == "0" else positive(text)
    if found > 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return found
