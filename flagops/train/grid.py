"""Muon and AdamW over one grid of learning rates, each run from the same weights over the same documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .corpus import Corpus
from .loop import Options, Training

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FILE, PICTURE = "grid.json", "grid.png"


def cells() -> list[tuple[str, float]]:
    """The optimiser and the peak rate of each run."""
    return [(optimizer, rate) for rate in RATES for optimizer in ("muon", "adamw")]


def runs(
    corpus: Corpus, folder: Path, steps: int, seed: int, tokens: int, begin: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Each cell's losses and held-out judgement; what `folder` has of this very grid is not run again."""
    path = folder / FILE
    identity = {"steps": steps, "seed": seed, "tokens": tokens, "corpus": corpus.digest}
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"identity": identity, "runs": []}
    if kept["identity"] != identity:
        raise ValueError(f"{path} is of another grid: {kept['identity']} instead of {identity}")
    for optimizer, rate in cells():
        found = next((x for x in kept["runs"] if (x["optimizer"], x["rate"]) == (optimizer, rate)), None)
        if found is None:
            training = Training(corpus, Options(steps, seed, tokens, rate, optimizer))
            losses = []
            for facts in training.run():
                begin(f"{optimizer} at {rate:g}, loss {facts['loss']:.3f}")
                losses.append(facts["loss"])
            found = {"optimizer": optimizer, "rate": rate, "losses": losses, "judged": training.judge(2)}
            kept["runs"].append(found)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(kept) + "\n")
            partial.replace(path)
        else:
            for _ in range(steps):
                begin(f"{optimizer} at {rate:g}, kept")
        yield found


def held_out(run: dict[str, Any]) -> float:
    """Nats a token over all kinds of held-out documents; a run that diverged is the worst."""
    mean = sum(x["loss"] for x in run["judged"].values()) / len(run["judged"])
    return mean if mean == mean else float("inf")


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """The training losses, smoothed, and the held-out loss by rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for optimizer, style in (("muon", "-"), ("adamw", "--")):
        mine = [x for x in found if x["optimizer"] == optimizer]
        for run in mine:
            smooth = [run["losses"][0]]
            for loss in run["losses"][1:]:
                smooth.append(smooth[-1] + 0.1 * (loss - smooth[-1]))
            color = f"C{RATES.index(run['rate'])}"
            left.plot(range(1, len(smooth) + 1), smooth, style, color=color, label=f"{optimizer} {run['rate']:g}")
        right.plot([x["rate"] for x in mine], [held_out(x) for x in mine], f"o{style}", label=optimizer)
    left.set_xlabel("step")
    left.set_ylabel("nats a token, training")
    left.legend(fontsize=7)
    right.set_xscale("log")
    right.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    right.minorticks_off()
    right.set_xlabel("peak learning rate")
    right.set_ylabel("nats a token, held out")
    right.legend()
    figure.savefig(path, dpi=120)
