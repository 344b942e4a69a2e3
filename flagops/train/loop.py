"""The training: a step is a function of the state before it, so that an interrupted run ends with the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import flagops
from flagops.optim import Muon, split_parameters

from .corpus import KINDS, KNOWN, RANDOM, Corpus
from .model import build, csa_layers
from .narrow import straight_through
from .objective import balance, index_loss, watching

STAGES = ((0.0, 128, False), (0.12, 256, False), (0.25, 512, False), (0.4, 1024, False), (0.55, 2048, True))
"""From which share of all steps on: the length of documents, and whether the indexer selects or all is visible."""
DECAY, NARROW, WARMUP = 0.7, 0.8, 50
"""From which share of all steps on the rate falls, to a tenth, and weights are those of the checkpoint; steps in which
the rate rises."""
BALANCE = 0.001
LENGTH = 2048
"""Of documents that a model is judged by."""


@dataclass(frozen=True)
class Options:
    """What determines a run, together with its corpus and sizes.

    tokens: of one step. rate: the peak learning rate of both optimisers. decay: the weight decay of both. patched:
    whether flagops computes.
    """

    steps: int = 1800
    seed: int = 0
    tokens: int = 4096
    rate: float = 4e-3
    optimizer: str = "muon"
    decay: float = 0.1
    patched: bool = True


class Training:
    """A model, its optimisers, and the number of steps that it has taken."""

    def __init__(self, corpus: Corpus, options: Options, **sizes: Any) -> None:
        self.corpus, self.options, self.step = corpus, options, 0
        self.identity = json.dumps({"options": asdict(options), "sizes": sizes, "corpus": corpus.digest})
        self.model = build(options.seed, **sizes)
        self._selected = self.model.config.index_topk
        matrices, others = split_parameters(self.model)
        if options.optimizer == "adamw":
            matrices, others = [], [*matrices, *others]
        self._optimizers: list[Any] = [Muon(matrices, weight_decay=options.decay)] if matrices else []
        self._optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-20, weight_decay=options.decay))

    def run(self, until: int | None = None) -> Iterator[dict[str, float]]:
        """Take steps up to a number of them, all by default, and say what each found."""
        patch = flagops.patch(self.model) if self.options.patched else nullcontext()
        with patch, watching(self.model) as seen:
            while self.step < (self.options.steps if until is None else until):
                yield self._once(seen)

    def _once(self, seen: dict[Any, Tensor]) -> dict[str, float]:
        options, done = self.options, self.step / self.options.steps
        length, sparse = [(length, sparse) for start, length, sparse in STAGES if done >= start][-1]
        for layer in csa_layers(self.model):
            layer.compressor.indexer.index_topk = self._selected if sparse else length
        drawn = self.corpus.batch(options.seed, self.step, options.tokens // length, length)
        ids, sayable = (torch.from_numpy(x) for x in drawn)
        rng = np.random.default_rng([options.seed, self.step, 2])
        queries = torch.from_numpy(rng.choice(np.arange(4, length), length // 16, replace=False))
        with straight_through(self.model) if done >= NARROW else nullcontext():
            loss = losses(self.model, ids)[0][sayable[:, 1:] > RANDOM].mean()
            index = torch.stack([index_loss(layer, seen[layer], queries) for layer in csa_layers(self.model)]).mean()
            torch.autograd.backward(loss + index)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = options.rate * min(1.0, (self.step + 1) / WARMUP)
        rate *= 1.0 if done < DECAY else 1 - 0.9 * (done - DECAY) / (1 - DECAY)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        for layer in self.model.model.layers:
            balance(layer.mlp, seen[layer.mlp], ids, BALANCE)
        self.step += 1
        return {"step": self.step, "loss": loss.item(), "index": index.item(), "norm": norm.item(), "rate": rate}

    def judge(self, rows: int = 1) -> dict[str, dict[str, float]]:
        """On held-out documents of each kind: nats of a token of which something can be said, and of those known alone,
        and what share of these is right."""
        narrow = self.step > NARROW * self.options.steps
        with straight_through(self.model) if narrow else nullcontext(), flagops.patch(self.model):
            return judged(self.model, self.corpus, rows)

    def save(self, folder: Path) -> Path:
        """A checkpoint, whole or not at all; the one before the last goes."""
        tensors = {f"model/{name}": x for name, x in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            for optimizer in self._optimizers:
                for part, x in optimizer.state.get(p, {}).items():
                    tensors[f"{part}/{name}"] = x
        path = folder / f"checkpoint-{self.step:07d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"run": json.dumps([self.step, self.identity])})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        for old in checkpoints(folder)[:-2]:
            old.unlink()
        return path

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError for one of another run."""
        with safe_open(path, "pt") as file:
            step, identity = json.loads((file.metadata() or {}).get("run", "[0, null]"))
            if identity != self.identity:
                raise ValueError(f"{path} is of another run: {differences(identity, self.identity)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.step = step
        self.model.load_state_dict({name[6:]: x for name, x in tensors.items() if name.startswith("model/")})
        of_name = {p: name for name, p in self.model.named_parameters()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    parts = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")
                    optimizer.state[p] = {
                        part: tensors[f"{part}/{of_name[p]}"] for part in parts if f"{part}/{of_name[p]}" in tensors
                    }


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def differences(found: str | None, wanted: str) -> str:
    """In which options two runs differ."""
    theirs, ours = (
        {**x.get("options", {}), "sizes": x.get("sizes"), "corpus": x.get("corpus")}
        for x in (json.loads(found or "{}"), json.loads(wanted))
    )
    return ", ".join(f"{n} {theirs.get(n)!r} instead of {ours[n]!r}" for n in ours if theirs.get(n) != ours[n])


def losses(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each token but the first, and whether it was the likeliest."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = ids[:, 1:]
    nats = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    return nats, logits.argmax(-1) == wanted


@torch.no_grad()
def judged(model: Any, corpus: Corpus, rows: int) -> dict[str, dict[str, float]]:
    """What `Training.judge` says, of a model as it is, over so many documents of each kind."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        ids, sayable = (torch.from_numpy(x) for x in corpus.batch(0, 0, rows, LENGTH, (kind,), held=True))
        nats, right = losses(model, ids)
        known = sayable[:, 1:] == KNOWN
        found[kind] = {"loss": nats[sayable[:, 1:] > RANDOM].mean().item()}
        if known.any():
            found[kind] |= {"known": nats[known].mean().item(), "right": right[known].float().mean().item()}
    return found
