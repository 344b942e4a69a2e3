"""Which wrong kernels the loss of a trained DeepSeek-V4 tells, and which the parity suite.

``python tests/accuracy_mutants.py`` tries edits of numba's kernels that a V4 uses, so many of each file and operator,
drawn from the seed. With each in place the model's held-out loss is measured as `flagops accuracy` does, paired with
transformers' own, and the parity suite runs. Whatever the model tells, the suite must; the table goes to
benchmarks/results/accuracy_mutants.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mutants

from flagops.judge import mutants as judge
from flagops.judge.derived import mutate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy_mutants.json"
PATCHED = {
    "sparse_attention", "grouped_output_projection", "compress_kv", "lightning_indexer", "rms_norm",
    "rotary_embedding", "hc_pre", "hc_post", "hc_head", "moe_gate", "moe_experts", "swiglu",
}  # fmt: skip
"""Operators of a patched model."""
STORED = {"fp8_matmul", "fp4_matmul", "fp8_quantize", "fp8_fake_quantize", "fp4_fake_quantize", "hadamard"}
"""Operators of a model as it is stored, and of the official numerics."""
CODES = {"numba/_qmatmul.py", "numba/_scales.py"}
"""Where experts are multiplied in one call with codes, which a model does that copies them (`pack`): not these."""
TOKENS, LENGTH = 9600, 400
"""Of all documents and of each: four of a kind, past the window, and the indexer selects 64 of 100 entries."""
PATIENCE = 400
"""Seconds for a mutant: its kernels are compiled anew."""


def used() -> list[tuple[str, int]]:
    """Edits of numba's kernels, or of what they share, that a V4 runs and a result can tell."""
    return [
        (file, index)
        for file, edits in mutants.MUTANTS.items()
        if edits and mutants.backend_of(file) == "numba"
        for index, (operator, *_) in enumerate(edits)
        if operator in STORED or (operator in PATCHED and file not in CODES)
        if (file, index) not in mutants.EQUIVALENT
    ]


def drawn(seed: int, each: int) -> list[tuple[str, int]]:
    """So many of each file and operator."""
    groups = defaultdict(list)
    for file, index in used():
        groups[file, mutants.MUTANTS[file][index][0]].append((file, index))
    rng = random.Random(seed)
    return [x for _, group in sorted(groups.items()) for x in sorted(rng.sample(group, min(each, len(group))))]


@contextlib.contextmanager
def entered(file: str, edited: Path) -> Iterator[None]:
    """Inside, an edited kernel file is loaded, and anew the modules that take anything of it; all others stay compiled,
    and come back so."""
    module = f"flagops.kernels.{file[:-3].replace('/', '.')}"
    importlib.import_module(module)
    kernels = {name: x for name, x in sys.modules.items() if name.startswith("flagops.kernels.") and x.__file__}
    stale, more = set[str](), {module}
    while more:
        stale |= more
        words = "|".join(re.escape(name.rpartition(".")[2]) for name in stale)
        importing = re.compile(rf"^from \.+({words}) import|^from \.+ import .*\b({words})\b", re.MULTILINE)
        more = {name for name, x in kernels.items() if importing.search(Path(x.__file__).read_text())} - stale
    for name in stale:
        del sys.modules[name]
    try:
        judge.enter(module, edited)
        for name in stale:
            importlib.import_module(name)
        yield
    finally:
        sys.modules.update({name: kernels[name] for name in stale})
        judge.forget()


def child(model: str, chosen: list[str]) -> None:
    """Try mutants in this process; a line for each, and one before it."""
    from dataclasses import replace

    import torch

    from flagops.accuracy import measure
    from flagops.accuracy.documents import documents
    from flagops.accuracy.models import Models
    from flagops.accuracy.rows import REFERENCE, ROWS
    from flagops.train.corpus import Corpus, shipped

    row = {x.name: replace(x, dtype="float32", backend="numba") for x in ROWS}
    found = documents(Corpus(shipped()), 0, TOKENS, LENGTH)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        models = Models(model, Path(place) / "models")
        (Path(place) / "models").mkdir()
        with models.under(REFERENCE) as (plain, _):
            expected = [plain(input_ids=x.ids, use_cache=False).logits[0, :-1] for x in found]

        def differs(name: str) -> measure.Measured:
            result = measure.Measured(row[name], found)
            with models.under(row[name]) as (wrong, _):
                for x, right in zip(found, expected, strict=True):
                    logits = wrong(input_ids=x.ids, use_cache=False).logits[0, :-1]
                    result.sums.append(measure.compared(right, logits, x))
            return result

        for name in sorted({name for word in chosen for name in rows(word)}):
            assert not differs(name).wrong, f"the row {name} is wrong without any edit"
        for number, word in enumerate(chosen):
            print(f"begin {word}", flush=True)
            file, _, index = word.partition(":")
            name, *edit = mutants.MUTANTS[file][int(index)]
            edited = Path(place) / f"{number}_{Path(file).name}"
            edited.write_text(mutate((mutants.kernels() / file).read_text(), *edit))
            with contextlib.ExitStack() as edit_there:
                start = time.monotonic()
                try:
                    edit_there.enter_context(entered(file, edited))
                    results = [differs(x) for x in rows(word)]
                    loss = any(x.estimate("difference").beyond(x.row.allowed) for x in results)
                    seen, said = any(x.wrong for x in results), ", ".join(map(described, results))
                except Exception as error:  # an edit may be noticed as early as that
                    loss, seen, said = True, True, type(error).__name__
                print(f"model {json.dumps([loss, seen, said, round(time.monotonic() - start, 1)])}", flush=True)
                try:
                    verdict = judge.verdict(name, "numba")
                except Exception as error:
                    verdict = f"killed by {type(error).__name__}"
                print(f"suite {verdict}", flush=True)


def described(found: Any) -> str:
    from flagops.accuracy.command import plus_minus

    difference, kl = found.estimate("difference"), found.estimate("kl")
    return f"{found.row.name} {plus_minus(difference)}, KL {plus_minus(kl, '')}"


def rows(word: str) -> tuple[str, ...]:
    """The rows of `flagops accuracy` that run a mutant."""
    file, _, index = word.partition(":")
    return ("packed", "packed-official") if mutants.MUTANTS[file][int(index)][0] in STORED else ("numba",)


def tried(model: str, chosen: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What both said of each mutant, from as many processes as they end: ending one is being noticed too."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGOPS_", "TRITON_"))}
    environment |= {"FLAGOPS_CACHE": os.devnull, "NUMBA_OPT": "0"}  # an edited kernel must never meet compiled code
    todo = list(chosen)
    while todo:
        command = [sys.executable, "-W", "ignore", __file__, "--model", model, "--child", *todo]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        at, found = "", {}
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        for line in process.stdout:
            kind, _, said = line.rstrip("\n").partition(" ")
            if kind not in ("begin", "model", "suite"):
                continue
            timer.cancel()
            timer = threading.Timer(PATIENCE, process.kill)
            timer.start()
            if kind == "begin":
                at, found = said, {}
                todo.remove(at)
            elif kind == "model":
                found = dict(zip(("loss", "model", "said", "seconds"), json.loads(said), strict=True))
            else:
                yield at, found | {"suite": said}
        timer.cancel()
        code = process.wait()
        if code and not at:
            raise SystemExit(f"no mutant could be tried: exit code {code}")
        if code:
            ended = f"ended its process ({code})"
            yield at, found | {"suite": ended} if found else {
                "loss": True, "model": True, "said": ended, "seconds": None, "suite": alone(at),
            }  # fmt: skip


def alone(word: str) -> str:
    """What the parity suite says of a mutant by itself."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("mutants.py")), "numba", word]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    said = done.stdout.partition(" ")[2].strip()
    return said or f"ended its process ({done.returncode})"


def caught(verdict: object) -> bool:
    return str(verdict).startswith(("killed", "ended"))


def told(found: Iterable[dict[str, object]]) -> tuple[int, ...]:
    """How many the loss tells, the loss or KL, and the suite."""
    each = [(bool(x["loss"]), bool(x["model"]), caught(x["suite"])) for x in found]
    return tuple(map(sum, zip(*each, strict=True)))


def write(kept: dict[str, object]) -> None:
    """The table by file, and every edit with what was said of it."""
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    files: dict[str, list[dict[str, object]]] = defaultdict(list)
    for word, found in kept["mutants"].items():
        files[word.partition(":")[0]].append(found)
    loss, model, suite = told(kept["mutants"].values())
    lines = [
        "Wrong kernels that a trained DeepSeek-V4 tells by its held-out loss, and that the parity suite tells",
        "(`python tests/accuracy_mutants.py`).", "",
        f"{kept['date']}, {kept['commit']}, seed {kept['seed']}: of {len(kept['mutants'])} edits of numba's kernels",
        f"the loss of {kept['model']} over {kept['tokens']:,} tokens tells **{loss}** (its paired difference exceeds",
        f"what the row may have by three standard errors, or the model fails), with KL divergence **{model}**, the",
        f"parity suite **{suite}**.", "",
        "| kernels | edits | told by the loss | with KL | by the parity suite |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for file, found in files.items():
        lines.append(f"| {file} | {len(found)} | {' | '.join(map(str, told(found)))} |")
    lines += ["", "| edit | operator | difference, nats a token | told by | parity suite |", "| --- " * 5 + "|"]
    for word, found in kept["mutants"].items():
        file, _, index = word.partition(":")
        name, old, new, _ = mutants.MUTANTS[file][int(index)]
        edit = f"{file}: `{old}` to `{new}`".replace("|", "\\|").replace("\n", " ")
        by = "loss" if found["loss"] else "KL" if found["model"] else ""
        lines.append(f"| {edit} | {name} | {found['said']} | {by} | {found['suite']} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    from flagops.deepseek_v4.examples import TRAINED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TRAINED), help="a checkpoint of `flagops train`")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=2, help="edits of each file and operator")
    parser.add_argument("--files", nargs="+", help="of these alone, such as numba/norm.py")
    args = parser.parse_args()
    if args.child:
        child(args.model, args.child)
        return 0
    chosen = [f"{file}:{index}" for file, index in drawn(args.seed, args.each) if file in (args.files or [file])]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    found: dict[str, dict[str, Any]] = {}
    kept = {
        "date": datetime.date.today().isoformat(), "commit": commit.strip(), "seed": args.seed,
        "model": Path(args.model).name, "tokens": TOKENS, "length": LENGTH, "mutants": found,
    }  # fmt: skip
    for word, said in tried(args.model, chosen):
        found[word] = said
        print(f"{len(found)} of {len(chosen)}, {word}: {said}", flush=True)
        write(kept)
    missed = [word for word, x in found.items() if x["model"] and not caught(x["suite"])]
    print("{} edits: the loss tells {}, with KL {}, the parity suite {}".format(len(found), *told(found.values())))
    for word in missed:
        print(f"only the model tells {word}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
