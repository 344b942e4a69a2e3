"""The command line: ``flagops doctor | chips | ops | check | coverage | demo | warmup | bench | convert | ...``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from flagops import __version__, chips, config, registry, tables
from flagops.errors import Unsupported, said
from flagops.tools import contract

LIBRARIES = ("numpy", "ml_dtypes", "torch", "numba", "triton", "transformers", "safetensors", "rich")


def doctor(args: argparse.Namespace) -> int:
    """Versions, devices, each backend available or why not, and whether it and its library are as expected."""
    backends: dict[str, dict[str, Any]] = {}
    for name in registry.backend_names():
        backend = registry.backend(name)
        reason = backend.unavailable()
        found: dict[str, Any] = {"available": reason is None, "reason": reason, "facts": {}, "self_test": {}}
        found["faults"] = {"descriptor": reason} if isinstance(backend, registry.Broken) else {}
        if reason is None:
            try:
                found["facts"] = backend.facts()
                found["self_test"] = backend.self_test() if hasattr(backend, "self_test") else {}
            except Exception as error:
                if name in registry.BUILT_IN:
                    raise
                found["faults"]["facts"] = f"it raised in facts() or self_test(): {said(error)}"
            found["faults"] |= registry.faults(name)
        backends[name] = found
    settings = {
        f"FLAGOPS_{name.upper()}": value
        for name, value in vars(config.current()).items()
        if f"FLAGOPS_{name.upper()}" in os.environ
    }
    report: dict[str, Any] = {
        "flagops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": chips.here(),
        "cache": config.cache_folder(),
        "settings": settings,
        "backends": backends,
        "operators": dict(registry.faulty_operators()),
    }
    faults = [(name, what, wrong) for name, b in backends.items() for what, wrong in b["faults"].items()]
    faults += [(name, "operators", wrong) for name, wrong in registry.faulty_operators().items()]
    unknown = [name for name in config.current().backend if name not in registry.backend_names()]
    faults += [(name, "FLAGOPS_BACKEND", "there is no such backend") for name in unknown]
    failed = bool(faults) or any(wrong for b in backends.values() for wrong in b["self_test"].values())
    if args.json:
        print(json.dumps(report, indent=2))
        return int(failed)
    print(f"flagops {__version__}, Python {report['python']}, {report['platform']}, {report['cpu']}")
    print("libraries: " + ", ".join(f"{n} {v or 'missing'}" for n, v in report["libraries"].items()))
    print("devices: " + ", ".join(f"{device}, see {page}" for device, page in report["devices"].items()))
    print(f"compiled kernels are kept in {report['cache']}")
    print("settings: " + (", ".join(f"{n}={v}" for n, v in settings.items()) or "none in the environment"))
    rows = [
        (name, "yes" if b["available"] else "no", b["reason"] or ", ".join(f"{k} {v}" for k, v in b["facts"].items()))
        for name, b in backends.items()
    ]
    tables.show("backends", ("backend", "available", "why, or what it found"), rows)
    tests = [
        (name, test, wrong or "as expected") for name, b in backends.items() for test, wrong in b["self_test"].items()
    ]
    if tests:
        tables.show("self-tests", ("backend", "what it relies on", "found"), tests)
    if faults:
        tables.show("faults, of the packages named", ("backend or module", "part", "what is wrong"), faults)
    return int(failed)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def ops(args: argparse.Namespace) -> int:
    """The coverage table: operator x backend, what its kernel declares and what is tested."""
    names = registry.backend_names()
    if args.families:
        return _families(args, names)
    chosen = registry.named(["aten"]) if args.aten else registry.operators().values()
    table = {op.name: {name: _coverage(op.name, name) for name in names} for op in chosen}
    if args.report:
        from flagops.judge.command import certificates

        for (op, name), judged in certificates(args.report).items():
            if name in table.get(op, {}):
                table[op][name]["judged"] = judged
    if args.json:
        print(json.dumps(table, indent=2))
        return 0
    columns = ("operator", *names, "tested")
    rows = []
    for op, row in table.items():
        card = registry.operator(op)
        held = "bit for bit" if card.exact else "computed bound"
        gradient = any(cell.get("backward") for cell in row.values())
        rows.append((op, *(_cell(row[name]) for name in names), held + (", gradients" if gradient else "")))
    if args.markdown:
        print(tables.markdown(columns, rows))
        return 0
    tables.show("kernels", columns, rows)
    print("det: repeats are equal bit by bit. inv: a row of a batch equals the row alone. grad: the backward is the")
    print("kernel's own; grad=torch: torch's serves it. Each is checked by `flagops check`.")
    notes = [(op, name, cell["note"]) for op, row in table.items() for name, cell in row.items() if cell.get("note")]
    if notes:
        tables.show("notes", ("operator", "backend", "note"), notes)
    return 0


def _families(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Where operators live: the module of a family's references, and where each backend's kernels are looked for."""
    table: dict[str, dict[str, Any]] = {}
    for card in registry.cards().values():
        row = table.setdefault(card.reference.__module__, {"operators": [], "kernels": {}})
        row["operators"].append(card.name)
        row["kernels"] |= {name: registry.home(card.name, name) for name in names if registry.home(card.name, name)}
    if args.json:
        print(json.dumps(table, indent=2))
        return 0
    homes = [name for name in names if any(name in row["kernels"] for row in table.values())]
    rows = [
        (
            module.rpartition(".")[2],
            "\n".join(textwrap.wrap(", ".join(row["operators"]), 60)),
            module,
            *(row["kernels"].get(name, "") for name in homes),
        )
        for module, row in table.items()
    ]
    columns = ("family", "operators", "references", *(f"kernels of {name}" for name in homes))
    if args.markdown:
        print(tables.markdown(columns, rows))
    else:
        tables.show("families", columns, rows)
    return 0


def _coverage(operator: str, backend: str) -> dict[str, Any]:
    try:
        kernel = registry.find(operator, backend)
    except Unsupported as reason:
        return {"kernel": False, "written": registry.written(operator, backend), "reason": str(reason)}
    backward = "own" if kernel.backward else ""
    if not backward:
        try:
            backward = "torch" if registry.find(operator, "torch").backward else ""
        except Unsupported:
            backward = ""
    return {
        "kernel": True,
        "deterministic": kernel.deterministic,
        "batch_invariant": kernel.batch_invariant,
        "backward": backward,
        "forwards_to": "aten, for some dtypes" if callable(kernel.forwards_to) else kernel.forwards_to,
        "note": kernel.note,
    }


def _cell(cell: dict[str, Any]) -> str:
    if not cell["kernel"]:
        return "(not usable here)" if cell["written"] else "-"
    facts = {
        "det": cell["deterministic"],
        "inv": cell["batch_invariant"],
        "grad": cell["backward"] == "own",
        "grad=torch": cell["backward"] == "torch",
        f"calls {cell['forwards_to']}": cell["forwards_to"],
        f"judged {cell.get('judged')}": cell.get("judged"),
    }
    return ", ".join(["yes", *(word for word, holds in facts.items() if holds)])


def check(args: argparse.Namespace) -> int:
    """Judge kernels against their references: results, layouts, sizes, state, gradients, seldom errors."""
    from flagops.judge import command

    return command.check(args)


def warmup(args: argparse.Namespace) -> int:
    """Compile every kernel for every dtype now, into the cache folder."""
    from flagops import testing

    chosen = registry.named(args.operators) or list(registry.operators().values())
    names = args.backend or [
        n for n in registry.backend_names() if n not in ("numpy", "torch") and not registry.backend(n).unavailable()
    ]
    for name in names:
        reason = registry.backend(name).unavailable()
        if reason:
            print(f"{name}: {reason}", file=sys.stderr)
            return 1
        with contract.Progress(len(chosen)) as begin:
            for op in chosen:
                begin(f"{op.name} for {name}")
                start = time.perf_counter()
                calls = sum(testing.touch(op, name))
                if calls:
                    print(f"{name}: {op.name}, {calls} variants, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"compiled kernels are kept in {config.cache_folder()}")
    return 0


def _forward(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        import importlib

        found = getattr(importlib.import_module(f"flagops.{module}"), function)
        return int(found(args.rest) or 0)

    return run


FORWARDED = {
    "demo": ("tools.demo", "run", "a real language model, and a small DeepSeek-V4, generating on replaced operators"),
    "bench": ("tools.bench", "run", "speeds by named workload, verified before they are timed"),
    "train": ("train.command", "run", "a small DeepSeek-V4 trained on a CPU, by these operators and their gradients"),
    "accuracy": ("accuracy.command", "run", "what a backend, a format or a conversion costs a model, and its error"),
    "build": ("tools.build", "run", "Triton's kernels compiled ahead of time, for chips that need not be here"),
    "tune": ("tools.tune", "run", "measure which kernels are fastest on this machine, for all later processes"),
    "plan": ("plan.command", "run", "what a token costs on a machine, or tensor parallelism of the output projection"),
    "coverage": ("override.coverage", "command", "which calls of a model or script flagops serves, and why not others"),
    "run": ("tools.bisect", "run", "run a script with torch's operators replaced, FLAGOPS_OPS of them"),
    "convert": (
        "checkpoint.command",
        "convert",
        "write a checkpoint of narrow weights in BF16 or FP8, or any in integers",
    ),
    "verify": ("checkpoint.command", "verify", "make a conversion again and compare it, bit by bit"),
    "generate": ("packed.command", "generate", "text from a checkpoint of FP4 and FP8 weights as it is stored"),
    "bisect": ("tools.bisect", "bisect", "name the replacement that changed a script's result"),
}


def parser() -> argparse.ArgumentParser:
    top = contract.Parser(prog="flagops", description="Operators of transformer models, replaced and proved.")
    top.add_argument("--version", action="version", version=f"flagops {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], int], name: str = "") -> argparse.ArgumentParser:
        text = function.__doc__ or ""
        added = commands.add_parser(name or function.__name__, help=text, description=text)
        added.set_defaults(run=function)
        return added

    command(doctor).add_argument("--json", action="store_true", help="machine-readable")
    _chips_words(command(chips.command, "chips"))
    listing = command(ops)
    group = listing.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="machine-readable")
    group.add_argument("--markdown", action="store_true", help="the table of docs/operators.md")
    listing.add_argument("--aten", action="store_true", help="torch's own operators (flagops.aten) in place of models'")
    listing.add_argument("--families", action="store_true", help="where each family's references and kernels live")
    listing.add_argument(
        "--report",
        type=contract.existing,
        metavar="FILE",
        help="with what `flagops check --report FILE` found of each kernel",
    )
    _check_words(command(check))
    warming = command(warmup)
    warming.add_argument("operators", nargs="*", metavar="OP", help=_OPERATORS)
    warming.add_argument("--backend", action="append", metavar="B", help="backend, repeatable")
    for name, (module, function, text) in FORWARDED.items():
        forwarded = commands.add_parser(name, help=text, add_help=False)
        forwarded.add_argument("rest", nargs=argparse.REMAINDER)
        forwarded.set_defaults(run=_forward(module, function))
    return top


_OPERATORS = "operators, such as matmul or aten.add; aten or a family of it, such as reductions (default: models')"


def _chips_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="CHIP", help="chips, vendors, torch's devices or Triton's targets (default: all)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="machine-readable, with sources, dtypes and notes")
    group.add_argument("--markdown", action="store_true", help="the table of docs/chips.md")


def _check_words(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("operators", nargs="*", metavar="OP|FILE.py", help=f"{_OPERATORS}, or a file of functions so named")
    add("--backend", action="append", metavar="B", help="backend, repeatable (default: all usable)")
    add(
        "--time",
        default="10s",
        metavar="T",
        help="of the processor for each kernel, and besides what compiles, such as 60s (default: 10s)",
    )
    add("--examples", type=contract.natural, default=0, metavar="N", help="drawn cases alone, in place of a time")
    add("--seed", type=int, metavar="S", help="repeat a run (default: the time)")
    add(
        "--least",
        type=float,
        metavar="X",
        help="share of cases that must run, a fifth of it in each dtype (default: two thirds)",
    )
    add("--mutants", type=int, metavar="N", help="try N small edits of the kernels instead: each must be noticed")
    add("--strict", action="store_true", help="every case that the card allows must run")
    add("--replay", default="", metavar="'STAGE: Case(...)'", help="one case again, as a failure prints it")
    add("--junit", type=contract.output, metavar="FILE", help="write what was found as JUnit XML, for a CI service")
    add("--report", type=contract.output, metavar="FILE", help="write what was found, and what was not tried, as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as `flagops.tools.contract` says; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        if words and words[0] in FORWARDED:  # argparse would take the options of a forwarded command for its own
            args = argparse.Namespace(run=_forward(*FORWARDED[words[0]][:2]), rest=words[1:])
        else:
            args = parser().parse_args(words)
        return int(args.run(args))

    return contract.keep(run)


if __name__ == "__main__":
    sys.exit(main())
