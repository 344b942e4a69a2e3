"""`flagops tune`: measures on this machine which kernels are fastest, and where they are faster than torch's own.

Operators first, each in rows of one, few and many, then whole models: what gains alone and loses in a model is left to
torch. The table goes into the cache folder, where every later process finds it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean

from flagops import config, machine, order, registry, tables
from flagops.tools import contract, tune_cases
from flagops.tools.tune_cases import TORCH, Case, Times

GAIN = 1.03
"""How much faster than torch's own a kernel must be, called as torch calls it, to take a call from it."""
LEAST = 0.97
"""The least ratio of torch's time to ours of a whole model: below it the table gives up what costs most there."""
MODELS = "models"


def run(argv: Sequence[str]) -> int:
    """The command; 0 when the table is written, or kept."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is said here, not of each file that is loaded
    device = contract.device(options.device)
    for name in options.backend or ():
        registry.backend(name)
    kind = machine.cpu_kind() if device == "cpu" else device
    if options.show:
        return _show(kind)
    if options.check:
        return _checked(kind, device, options.quick)
    target = (options.out or order.tuned(kind, config.cache_folder())).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be made: {error.strerror}") from None
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise ValueError(f"{target} cannot be written")
    backends = options.backend or tune_cases.usable(device)
    journal = _Journal(target.with_name(f"{target.name}.partial"), {**order.identity(), "backends": " ".join(backends)})
    if options.fresh:
        journal.forget()
    cases = list(tune_cases.cases(backends, device, options.quick))
    with contract.Progress(len(cases)) as begin:
        for case in cases:
            begin(case.title)
            if case.title not in journal.times:
                journal.add(case.title, case.measure())
    found = {case: journal.times[case.title] for case in cases}
    table = _table(kind, found, backends)
    if not options.no_models:
        table = _held_to_models(table, device, options.quick)
    target.write_text(written(table))
    journal.forget()
    taken = sum(map(bool, table.replace.values()))
    print(f"{target}: who runs, in {len(table.run)} rows; calls taken from torch, in {taken} of {len(table.replace)}")
    if options.out:
        print(f"used where FLAGOPS_ORDER={target} is set")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = contract.Parser(prog="flagops tune", description=__doc__)
    add = parser.add_argument
    add(
        "--out",
        type=contract.output,
        metavar="FILE",
        help="write there, to be named by FLAGOPS_ORDER, and not where it is found",
    )
    add("--show", action="store_true", help="print the table in force, and measure nothing")
    add("--check", action="store_true", help="hold whole models to the table in force: exit code 1 where one is slower")
    add("--device", default="cpu", metavar="DEV", help="cpu (the default) or a torch device type")
    add("--backend", action="append", metavar="B", help="measure this backend, repeatable (default: all that are fast)")
    add("--no-models", action="store_true", help="operators alone, which whole models may contradict")
    add("--quick", action="store_true", help="a tenth of the time, for a first look")
    add("--fresh", action="store_true", help="forget what an interrupted run has measured")
    return parser


class _Journal:
    """What was measured so far, kept in a file, so that an interrupted run goes on; worthless on another machine."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path, self.identity = path, dict(identity)
        self.times: dict[str, Times] = {}
        try:
            kept = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if kept.get("identity") == self.identity:
            self.times = kept["times"]

    def add(self, title: str, times: Times) -> None:
        self.times[title] = times
        self.path.write_text(json.dumps({"identity": self.identity, "times": self.times}))

    def forget(self) -> None:
        self.times = {}
        self.path.unlink(missing_ok=True)


def _table(kind: str, found: Mapping[Case, Times], backends: Sequence[str]) -> order.Table:
    """The rows that times speak for. A key's sizes count alike."""
    made = {"date": datetime.now(UTC).date().isoformat(), **order.identity(), **tune_cases.circumstances()}
    run: dict[str, tuple[str, ...]] = {"*": _all(backends)}
    own = tuple(name for name in backends if name != "torch")
    replace: dict[str, tuple[str, ...]] = {"*": (), "fp8_matmul": own}  # torch emulates it
    for key, times in _by_key(found, "run").items():
        run[key] = _all(sorted(times, key=times.__getitem__))
    for key, times in _by_key(found, "replace").items():
        gains = {name: times[TORCH] / time for name, time in times.items() if name != TORCH} if TORCH in times else {}
        replace[key] = tuple(sorted((n for n in gains if gains[n] >= GAIN), key=lambda n: -gains[n]))
    return order.Table(kind, _shortest(run), _shortest(replace), made, "this run")


def _all(first: Iterable[str]) -> tuple[str, ...]:
    """Backends in order, and behind them what else can compute a call."""
    return tuple(dict.fromkeys((*first, "torch", "numpy")))


def _by_key(found: Mapping[Case, Times], what: str) -> dict[str, dict[str, float]]:
    """The geometric mean of each candidate's times over the sizes of a key, of those that ran at every size."""
    times: dict[str, list[Times]] = {}
    for case, one in found.items():
        if case.what == what and one:
            times.setdefault(case.key, []).append(one)
    return {
        key: {n: geometric_mean([one[n] for one in several]) for n in several[0] if all(n in one for one in several)}
        for key, several in times.items()
    }


def _shortest(rows: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Rows that are alike under the key that they share: dtypes of all classes, operators of all dtypes."""
    found = dict(rows)
    for least in (2, 1):
        groups: dict[str, list[str]] = {}
        for key in found:
            if key.count(".") == least and not key.endswith(".training"):
                groups.setdefault(key.rpartition(".")[0], []).append(key)
        for shared, keys in groups.items():
            if shared not in found and len({found[key] for key in keys}) == 1:
                found[shared] = found[keys[0]]
                for key in keys:
                    del found[key]
    return {key: found[key] for key in sorted(found) if key == "*" or found[key] != found["*"] or "." in key}


def _models(device: str) -> Iterator[tune_cases.Model]:
    """The models that can be run here, one after the other, with a word of how many are left."""
    yield from _said(list(tune_cases.models(device)))


def _said(models: Sequence[tune_cases.Model]) -> Iterator[tune_cases.Model]:
    with contract.Progress(len(models)) as begin:
        for model in models:
            begin(model.title)
            yield model


def _held_to_models(table: order.Table, device: str, quick: bool) -> order.Table:
    """The table without what makes a whole model slower; held to all models again where a later one changed it."""
    models = list(tune_cases.models(device))
    seen: dict[str, tune_cases.Ratio] = {}
    held: dict[str, order.Table] = {}
    while again := [model for model in models if held.get(model.title) != table]:
        for model in _said(again):
            table, seen[model.title] = _held(table, model, quick)
            held[model.title] = table
    if seen:
        _shown(seen)
    return dataclasses.replace(table, made={**table.made, MODELS: {name: str(ratio) for name, ratio in seen.items()}})


def _held(table: order.Table, model: tune_cases.Model, quick: bool) -> tuple[order.Table, tune_cases.Ratio]:
    """The table without what makes one model slower, the costliest first. Calls of one dtype and number of rows before
    whole operators, by whose other calls another model gains; but only those whose every call is torch's cost nothing.
    """
    ratio = model.ratios({MODELS: table}, LEAST, quick)[MODELS]
    for left in model.asked(table) if ratio.below(LEAST) else ():
        while left and ratio.below(LEAST):
            others = model.ratios({MODELS: table} | {key: _without(table, key) for key in sorted(left)}, LEAST, quick)
            now = others.pop(MODELS)
            worst = max(others, key=lambda key: others[key].middle)
            if others[worst].middle <= now.middle:
                break
            table, ratio = _without(table, worst), others[worst]
            left.remove(worst)
            print(f"{model.title}: {worst} is left to torch, which makes it {ratio} times as fast as torch alone")
    if ratio.below(LEAST):
        print(f"{model.title}: {ratio} times as fast as torch alone, no faster whatever is left to torch")
    return table, ratio


def _checked(kind: str, device: str, quick: bool) -> int:
    """0 where no whole model was shown to be slower by the table in force."""
    table = order.table(kind)
    print(f"{kind}: {table.words()}")
    seen = {model.title: model.ratios({MODELS: table}, LEAST, quick)[MODELS] for model in _models(device)}
    if not seen:
        raise ValueError("no model can be run here; pip install transformers")
    _shown(seen)
    slower = [name for name, ratio in seen.items() if ratio.below(LEAST)]
    print(f"slower than {LEAST} of torch alone: {'; '.join(slower) or 'none'}")
    return int(bool(slower))


def _shown(seen: Mapping[str, tune_cases.Ratio]) -> None:
    tables.show("whole models", ("model", "times as fast as torch alone"), [(k, str(v)) for k, v in seen.items()])


def _without(table: order.Table, key: str) -> order.Table:
    """A table that leaves to torch the calls of a key, or all of an operator."""
    whole = {k: names for k, names in table.replace.items() if "." in key or k.split(".")[0] != key}
    return dataclasses.replace(table, replace=whole | {key: ()})


def written(table: order.Table) -> str:
    """A table as its file holds it, a row a line."""
    parts = []
    for name, rows in (("run", table.run), ("replace", table.replace)):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(names)}" for key, names in rows.items())
        parts.append(f'  "{name}": {{\n{lines}\n  }}')
    facts = f'  "kind": {json.dumps(table.kind)},\n  "made": {json.dumps(dict(table.made))}'
    return "{\n" + ",\n".join([facts, *parts]) + "\n}\n"


def _show(kind: str) -> int:
    table = order.table(kind)
    print(f"{kind}: {table.words()}")
    keys = [*dict.fromkeys((*table.run, *table.replace))]
    taken = {key: " ".join(names) or TORCH for key, names in table.replace.items()}
    rows = [(key, " ".join(table.run.get(key, ())), taken.get(key, "")) for key in keys]
    tables.show("", ("call", "kernels, first to last", "of torch's calls"), rows)
    return 0
