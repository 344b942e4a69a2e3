"""Measure what backends, number formats and conversions cost a model: held-out loss to transformers' own in float32."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import registry, tables
from flagops.deepseek_v4.examples import read
from flagops.errors import suggestion
from flagops.tools import contract

from . import published
from .rows import REFERENCE, ROWS, Row
from .statistics import BEYOND, Estimate

if TYPE_CHECKING:
    from .documents import Document
    from .measure import Measured
    from .models import Models

_EXAMPLES = """examples:
  flagops accuracy                               the trained DeepSeek-V4 that comes with flagops, 200,000 tokens
  flagops accuracy V4 --row numba --row int8     a checkpoint of yours, two rows
  flagops accuracy smollm2 --tokens 20000        real weights, operators replaced by flagops.enable()
  TRITON_INTERPRET=1 flagops accuracy --row triton --tokens 1 --length 128
"""
COLUMNS = (
    "row", "computed by", "replaced", "nats a token", "difference", "allowed", "KL", "same token", "known, right", ""
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """The command; 1 if a row differs by more than it may."""
    options = _parser().parse_args(argv)
    rows = _chosen(options.row)
    for needed, name in (("transformers", "transformers"), ("matplotlib", "bench" if options.plot else "")):
        if name and importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"flagops accuracy needs {needed} (pip install flagops[{name}])")
    if options.plot:
        _drawable(options.plot)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from flagops.deepseek_v4.examples import TRAINED
    from flagops.tools.results import write_markdown
    from flagops.train.corpus import Corpus, shipped

    from .documents import documents
    from .measure import measured, steps
    from .models import Models

    corpus = Corpus(options.text.read_bytes() if options.text else shipped())
    with tempfile.TemporaryDirectory(prefix="flagops-accuracy-") as place:
        models = Models(options.model or TRAINED, Path(place))
        left = {row.name: reason for row in rows if (reason := models.lacks(row))}
        for name in left if options.row else ():
            raise ValueError(f"row {name} does not apply to {models.name}: {left[name]}")
        rows = [row for row in rows if row.name not in left]
        found = documents(corpus, options.seed, options.tokens, options.length, models.tokenizer)
        with contract.Progress(steps(rows, found)) as begin:
            results, missing = measured(models, rows, found, begin)
        facts = _facts(models, found, results, left | missing, options)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.plot:
        draw(options.plot, results, _title(facts))
    if options.markdown:
        write_markdown(options.markdown, COLUMNS, [cells(x) for x in results], f"{_title(facts)}. {_meaning(facts)}")
    return _said(facts, results, options.greedy, beside=not options.row)


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(
        prog="flagops accuracy", description=__doc__, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a checkpoint's folder, or smollm2 (default: a small trained V4)")
    add("--tokens", type=contract.natural, default=200_000, metavar="N", help="at least so many (default: 200000)")
    add("--length", type=contract.natural, default=2048, metavar="N", help="tokens of a document (default: 2048)")
    add("--seed", type=int, default=0, metavar="S", help="of the documents (default: 0)")
    add("--text", type=contract.existing, metavar="FILE", help="in place of the Python reference; a tenth is held out")
    add("--row", action="append", metavar="ROW", help=f"only this, repeatable: {', '.join(row.name for row in ROWS)}")
    add("--greedy", action="store_true", help="also show how each row goes on after a held-out text")
    add("--json", type=contract.output, metavar="FILE", help="write every number, and the texts")
    add("--markdown", type=contract.output, metavar="FILE", help="write the table, with the machine it was made on")
    add("--plot", type=contract.output, metavar="FILE", help="write the differences with their errors as a picture")
    return parser


def _chosen(names: Sequence[str] | None) -> list[Row]:
    """The rows that were named, or all that need no naming. Raises ValueError for one that cannot run here."""
    if not names:
        return [row for row in ROWS if not row.asked]
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no row {name!r}{suggestion(name, known)}")
        backend = known[name].backend
        reason = registry.backend(backend).unavailable() if backend else None
        if reason:
            raise ValueError(f"row {name}: {reason}")
    return [replace(known[name], asked=True) for name in dict.fromkeys(names)]


def _drawable(path: Path) -> None:
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise ValueError(f"--plot {path}: no picture's name ends so; known: {', '.join(sorted(known))}")


def _facts(
    models: Models, found: Sequence[Document], results: Sequence[Measured], left: dict[str, str],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """What `--json` writes."""
    import torch
    import transformers

    from flagops import __version__
    from flagops.train.corpus import KNOWN

    from .measure import SUMS, prompt

    kinds = list(dict.fromkeys(x.kind for x in found))
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"flagops": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": models.name,
        "documents": len(found),
        "tokens": sum(x.ids.shape[1] for x in found),
        "counted": sum(int(x.counted.sum()) for x in found),
        "known": sum(int((x.sayable[1:] == KNOWN).sum()) for x in found),
        "length": options.length,
        "seed": options.seed,
        "text": str(options.text) if options.text else "shipped",
        "prompt": words(models.tokenizer, prompt(found)),
        "rows": [
            {
                "name": x.row.name,
                "about": x.row.about,
                "allowed": x.row.allowed,
                "why": x.row.why,
                "wrong": x.wrong,
                **{what: _numbers(x.estimate(what)) for what in SUMS},
                "replaced": min(x.shares, default=None),
                "passed": x.passed,
                "perplexity": math.exp(x.estimate("nats").value),
                "kinds": {kind: {what: _numbers(x.estimate(what, kind)) for what in SUMS} for kind in kinds},
                "goes_on": words(models.tokenizer, x.continuation),
            }
            for x in results
        ],
        "left_out": left,
        "published": published.facts(),
    }


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    """Without NaN, which JSON lacks."""
    return {name: x if math.isfinite(x) else None for name, x in asdict(estimate).items()}


def words(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text; without a tokenizer they are bytes, and what is above them is none."""
    if tokenizer is not None:
        return str(tokenizer.decode(ids))
    return read(ids)


def _said(facts: dict[str, Any], results: Sequence[Measured], texts: bool, beside: bool) -> int:
    """The report on standard output, with published scores beside the whole table; returns the exit code."""
    tables.show(_title(facts), COLUMNS, [cells(x) for x in results])
    print(textwrap.fill(_meaning(facts), 120))
    for name, reason in facts["left_out"].items():
        print(f"left out: {name}, {' '.join(reason.split())}")
    if texts:
        said = [(x["name"], repr(x["goes_on"])) for x in facts["rows"]]
        tables.show(f"what each goes on with, after {facts['prompt'][-60:]!r}", ("row", "text"), said)
    if beside:
        published.show()
        print("The smallest of these errors is what a score can tell; the table above tells as much as its ± says.")
    wrong = [x for x in results if x.wrong]
    for x in wrong:
        print(
            f"{x.row.name} differs by {plus_minus(x.estimate('difference'))} nats a token, KL "
            f"{plus_minus(x.estimate('kl'), sign='')}: more than {x.row.allowed:g} by {BEYOND} standard errors. "
            f"Expected was: {x.row.why}"
        )
    return 1 if wrong else 0


def _title(facts: dict[str, Any]) -> str:
    return f"{facts['model']}: {facts['documents']} held-out documents, {facts['tokens']:,} tokens"


def _meaning(facts: dict[str, Any]) -> str:
    return (
        f"Of {facts['counted']:,} tokens something can be said, {facts['known']:,} of them were said before. ± is a "
        "standard error, documents being drawn anew; a difference is paired, token by token, with the reference. "
        "Replaced is the share, of the calls that flagops was asked for, that it computed."
    )


def cells(found: Measured) -> tuple[str, ...]:
    """A line of the table."""
    compared = ("", "", "", "") if found.row is REFERENCE else (
        plus_minus(found.estimate("difference")),
        f"{found.row.allowed:g}",
        plus_minus(found.estimate("kl"), sign=""),
        f"{found.estimate('agreement').value:.3%}",
    )  # fmt: skip
    right = found.estimate("right")
    recall = "" if math.isnan(right.value) else f"{right.value:.2%} ± {right.error:.2%}"
    nats = found.estimate("nats")
    verdict = "WRONG" if found.wrong else ""
    replaced = f"{min(found.shares):.0%}" if found.shares else ""
    return (
        found.row.name,
        found.row.about,
        replaced,
        f"{nats.value:.4f} ± {nats.error:.4f}",
        *compared,
        recall,
        verdict,
    )


def plus_minus(estimate: Estimate, sign: str = "+") -> str:
    """Two digits of the error, and as many places of the value."""
    return f"{estimate.value:{sign}.1e} ± {estimate.error:.0e}"


def draw(path: Path, results: Sequence[Measured], title: str) -> None:
    """The differences with three standard errors, and what each row may have, on an axis that is linear around zero."""
    from matplotlib.figure import Figure

    found = results[1:]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for at, x in enumerate(found):
        difference = x.estimate("difference")
        axes.barh(at, 2 * x.row.allowed, 0.6, -x.row.allowed, color="tab:red" if x.wrong else "lightgray")
        axes.errorbar(difference.value, at, xerr=BEYOND * difference.error, fmt="o", color="black", capsize=3)
    axes.set_yticks(range(len(found)), [x.row.name for x in found])
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xscale("symlog", linthresh=1e-6)
    axes.set_xlabel(f"nats a token more than the reference, ± {BEYOND} standard errors; bars: what is allowed")
    figure.savefig(path, dpi=120)
