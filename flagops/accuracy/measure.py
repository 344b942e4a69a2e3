"""The measurement: document by document, the reference and then every row, of which sums alone are kept.

So a vocabulary of any size takes no more memory than one document's logits, and every row sees the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flagops.errors import Unsupported
from flagops.packed.command import greedy
from flagops.train.corpus import KNOWN

from .documents import Document
from .models import Models
from .rows import REFERENCE, Row
from .statistics import Estimate, mean

_CHUNK = 1 << 24
"""Logits that are compared at once, in float64."""
PROMPT, CONTINUATION = 256, 48
"""Tokens of a held-out text, and of what each row goes on with, the likeliest each time."""
SUMS = ("nats", "difference", "kl", "agreement", "right", "right_difference")
Begin = Callable[[str], None]


@dataclass
class Measured:
    """A row's sums by document, ``[documents][SUMS]``, the share of the calls that flagops was asked for and computed
    in each, if for any, why it did not compute all, by operator, and how the row goes on after the prompt.

    nats, difference (to the reference), kl (of the next token's distributions, the reference's from the row's) and
    agreement (the same likeliest token) are of the tokens of which something can be said; right and right_difference
    are of those that were said before, whether they are the likeliest.
    """

    row: Row
    documents: Sequence[Document]
    sums: list[list[float]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)
    continuation: list[int] = field(default_factory=list)

    def estimate(self, what: str, kind: str = "") -> Estimate:
        """The mean over tokens of one of `SUMS`, of all documents or of a kind."""
        known = what.startswith("right")
        chosen = [(x, sums[SUMS.index(what)]) for x, sums in zip(self.documents, self.sums, strict=True)]
        chosen = [(x, total) for x, total in chosen if kind in ("", x.kind)]
        counts = [int((x.sayable[1:] == KNOWN).sum() if known else x.counted.sum()) for x, _ in chosen]
        return mean([total for _, total in chosen], counts, [x.kind for x, _ in chosen])

    @property
    def wrong(self) -> bool:
        """Whether it lies further from the reference than is allowed, by `BEYOND` standard errors: in loss, or in KL,
        which is what it would lose on tokens that the reference draws."""
        return any(self.estimate(what).beyond(self.row.allowed) for what in ("difference", "kl"))


def measured(
    models: Models, rows: Sequence[Row], found: Sequence[Document], begin: Begin = lambda what: None
) -> tuple[list[Measured], dict[str, str]]:
    """The reference and then each row, and of rows that cannot run here the reason, by name.

    A row that was asked for by its name raises its reason instead. begin: called `steps` times, before each step.
    """
    results, left = [Measured(REFERENCE, found)], dict[str, str]()
    for row in (REFERENCE, *rows):
        begin(f"{row.name}: its model")
        try:
            with models.under(row):
                pass  # it can be made
        except (Unsupported, ValueError) as reason:
            if row is REFERENCE or row.asked:
                raise
            left[row.name] = str(reason)
            continue
        if row is not REFERENCE:
            results.append(Measured(row, found))
    for number, document in enumerate(found):
        expected = None
        for result in results:
            begin(f"{result.row.name}, document {number + 1} of {len(found)}")
            with torch.no_grad(), models.under(result.row) as (model, handle):
                logits = model(input_ids=document.ids, use_cache=False).logits[0, :-1]
            if handle is not None:
                report = handle.report()
                result.shares.append(report.share)
                result.passed |= {row.op: [*row.passed] for row in report.rows if row.passed}
            expected = logits if expected is None else expected
            result.sums.append(compared(expected, logits, document))
    for result in results:
        begin(f"{result.row.name}: what it says")
        with torch.no_grad(), models.under(result.row) as (model, _):
            result.continuation = list(greedy(model, prompt(found), CONTINUATION))
    return results, left


def steps(rows: Sequence[Row], found: Sequence[Document]) -> int:
    """How often `measured` calls its `begin`, at most."""
    return (len(rows) + 1) * (len(found) + 2)


def prompt(found: Sequence[Document]) -> list[int]:
    """The beginning of the first natural text."""
    return next(x.ids[0, :PROMPT].tolist() for x in found if x.kind == "text")


def compared(expected: Tensor, logits: Tensor, document: Document) -> list[float]:
    """The sums of a document, in the order of `SUMS`, of logits ``[n - 1, words]`` of the reference and of a row."""
    totals = [0.0] * len(SUMS)
    size = max(1, _CHUNK // logits.shape[-1])
    wanted, known, counted = document.ids[0, 1:], document.sayable[1:] == KNOWN, document.counted
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        p, q = (x[part].double().log_softmax(-1) for x in (expected, logits))
        own, theirs = (-x.gather(1, wanted[part, None])[:, 0] for x in (q, p))
        best, reference = q.argmax(-1), p.argmax(-1)
        right, right_reference = ((x == wanted[part]).double() for x in (best, reference))
        each = (own, own - theirs, (p.exp() * (p - q)).sum(-1), (best == reference).double())
        sums = [x[counted[part]].sum() for x in each]
        sums += [x[known[part]].sum() for x in (right, right - right_reference)]
        totals = [total + float(x) for total, x in zip(totals, sums, strict=True)]
    return totals
