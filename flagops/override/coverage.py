"""`flagops.coverage`: every computing call that a program makes of torch below autograd, and who served it.

Times and calls are those of torch's profiler, which watches the dispatcher and changes nothing that a call depends on;
a dispatch mode would, since composites step aside under one. Who served a call, or why torch did, is what the handles
in force count at that moment: each count leaves an event of no length inside the call's own.

A watched call takes one to two microseconds more, and the result 0.2 ms a call to make. Not seen: what graphs of
`torch.compile` with other backends than ``"flagops"`` compute, what lies behind one dispatched call (the products of an
LSTM layer), and calls of `flagops.<name>` that do not go through torch's dispatcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagops import dispatch, tables
from flagops.tools import contract

from . import interpose
from .annotations import Fate, fates_of
from .forms import OWN, Form, forms, kind
from .handle import Handle, enable
from .interpose import COMPOSITE
from .lowering import LOWERINGS

NATIVE = "native"
_COLUMNS = ("operator", "calls", "ms", "device ms", "served by")


@dataclass(frozen=True)
class Row:
    """Calls of one overload that one served.

    by: ``"matmul/numba"``; empty where torch's own kernel did, for `reason`.
    seconds: on the CPU, what the call consists of included; `device_seconds` on an accelerator.
    """

    overload: str
    calls: int
    seconds: float
    device_seconds: float
    by: str
    reason: str

    @property
    def served(self) -> str:
        return self.by or f"{NATIVE}: {self.reason}"


@dataclass(frozen=True)
class Coverage:
    """Computing calls by overload and who served them, those that took longest first."""

    rows: tuple[Row, ...]

    @property
    def calls(self) -> int:
        return sum(row.calls for row in self.rows)

    @property
    def seconds(self) -> float:
        """On the device if anything ran on one, else on the CPU."""
        return sum(map(self._time, self.rows))

    @property
    def share_of_calls(self) -> float:
        """The part of the calls that flagops kernels served."""
        return sum(row.calls for row in self.rows if row.by) / self.calls if self.calls else 0.0

    @property
    def share_of_time(self) -> float:
        """The part of the time of all calls that those took which flagops kernels served."""
        return sum(self._time(row) for row in self.rows if row.by) / self.seconds if self.seconds else 0.0

    def _time(self, row: Row) -> float:
        return row.device_seconds if self._device else row.seconds

    @property
    def _device(self) -> bool:
        return any(row.device_seconds for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Rows and totals as plain values."""
        names = ("calls", "seconds", "share_of_calls", "share_of_time")
        return {"rows": [asdict(row) for row in self.rows]} | {name: getattr(self, name) for name in names}

    def _table(self) -> tuple[list[str], list[list[str]]]:
        kept = [i for i, column in enumerate(_COLUMNS) if self._device or column != "device ms"]
        rows = [
            (r.overload, str(r.calls), f"{r.seconds * 1e3:.3f}", f"{r.device_seconds * 1e3:.3f}", r.served)
            for r in self.rows
        ]
        return [_COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows]

    def total(self) -> str:
        """The shares in a line."""
        served = sum(row.calls for row in self.rows if row.by)
        where = "device" if self._device else "CPU"
        return (
            f"{served} of {self.calls} computing calls by flagops ({self.share_of_calls:.0%}), "
            f"{self.share_of_time:.0%} of their {self.seconds * 1e3:.1f} ms of {where} time"
        )

    def __str__(self) -> str:
        columns, rows = self._table()
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (columns, *rows))
        return "\n".join((*lines, self.total()))

    def show(self) -> None:
        """Print the table, in rich's hand where it is installed."""
        tables.show("computing calls below autograd", *self._table())
        print(self.total())


def coverage(target: Callable[..., Any] | str | None = None, /, *args: Any, **kwargs: Any) -> Any:
    """Every computing call that ``target(*args, **kwargs)`` makes below autograd, and who served it: a `Coverage`.

    target: a function or model, called once; call it before if compiling its kernels is not to be counted. Where no
        `enable` is in force, one is for that call. Views, allocations and reads of a number are not computing calls.

    With the name of an operator, or nothing: which kernels ran so far and which were refused, as a dict by operator.
    """
    if target is None or isinstance(target, str):
        if args or kwargs:
            raise TypeError(f"coverage of {target!r} takes no further arguments; give a function or model to call")
        return dispatch.coverage(target)
    if not callable(target):
        raise TypeError(f"coverage: expected a function, a model or an operator's name, got {type(target).__name__}")
    with watching() as watched:
        target(*args, **kwargs)
    return watched()


@contextlib.contextmanager
def watching() -> Iterator[Callable[[], Coverage]]:
    """Watch a block; the function it gives makes the `Coverage` of it, afterwards."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = {ProfilerActivity.CPU}
    if torch.cuda.is_available():
        activities.add(ProfilerActivity.CUDA)
    overloads = torch._C._profiler._ExperimentalConfig(capture_overload_names=True)
    with contextlib.ExitStack() as stack:
        if not _in_force():
            stack.enter_context(enable())
        noted = stack.enter_context(_noting())
        handles = _in_force()
        profiled = stack.enter_context(profile(activities=activities, experimental_config=overloads))
        yield lambda: _counted(profiled.events() or [], noted, handles)


def _in_force() -> list[Handle]:
    return list(dict.fromkeys(handle for site in interpose.live.values() for handle in site.handles))


@contextlib.contextmanager
def _noting() -> Iterator[dict[str, Fate]]:
    """Every count of a handle also leaves an event in the profile, whose name says in the result what was counted."""
    import torch

    noted: dict[str, Fate] = {}
    originals: dict[Callable[[], int], Callable[[], int]] = {}
    plain = Handle.counter

    def noting(fate: Fate, count: Callable[[], int]) -> Callable[[], int]:
        name = f"flagops counts {fate}"
        noted[name] = fate

        def counted() -> int:
            with torch._C._profiler._RecordFunctionFast(name):
                return count()

        originals[counted] = count
        return counted

    def counter(self: Handle, name: str, at: str, by: str, reason: str) -> Callable[[], int]:
        return noting((name, by, reason), plain(self, name, at, by, reason))

    with interpose.lock:
        for site in interpose.live.values():
            # known plans are kept: to make one takes longer than many a call
            fates = fates_of(site)
            site.plans = {
                signature: (compute, noting(fates[count], count) if count in fates else count)
                for signature, (compute, count) in site.plans.items()
            }
        Handle.counter = counter  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        with interpose.lock:
            Handle.counter = plain  # type: ignore[method-assign]
            for site in interpose.live.values():
                site.plans = {s: (compute, originals.get(count, count)) for s, (compute, count) in site.plans.items()}


def _counted(events: Sequence[Any], noted: dict[str, Fate], handles: Sequence[Handle]) -> Coverage:
    """The outermost events that are no composition, each with what was noted inside it."""
    fates = {id(e.cpu_parent): noted[e.name] for e in events if e.name in noted and e.cpu_parent is not None}
    found: dict[tuple[str, str, str], list[float]] = {}
    outermost: dict[int, bool] = {}
    left: dict[int, str] = {}  # why the composition that an event is part of was left to torch
    for event in sorted(events, key=lambda e: (e.thread, e.time_range.start, -e.time_range.end)):
        inside = outermost.get(id(event.cpu_parent), False)
        name = _overload(event)
        fate = fates.get(id(event))
        unit = name is not None and (kind(name) != COMPOSITE or bool(fate and fate[1]))
        outermost[id(event)] = inside or unit
        left[id(event)] = f"{fate[0]}: {fate[2]}" if fate and fate[2] else left.get(id(event.cpu_parent), "")
        if inside or not unit or name is None or kind(name) not in ("computing", COMPOSITE):
            continue
        by, reason = fate[1:] if fate else ("", "")
        if not (by or reason):
            by, reason = ("", left[id(event)]) if left[id(event)] else _unnoted(name, handles)
        row = found.setdefault((name, by, reason), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += event.time_range.elapsed_us() / 1e6
        row[2] += event.device_time_total / 1e6
    rows = (Row(n, int(calls), cpu, gpu, by, why) for (n, by, why), (calls, cpu, gpu) in found.items())
    return Coverage(tuple(sorted(rows, key=lambda row: -(row.device_seconds or row.seconds))))


def _overload(event: Any) -> str | None:
    """What an event is a call of: ``"mm.out"`` for aten's, ``"flagops::matmul"`` for ours, None for other events."""
    namespace, _, name = event.name.partition("::")
    if event.name == OWN or (namespace == "flagops" and name.isidentifier()):
        return str(event.name)
    if namespace != "aten":
        return None
    overload = f"{name}.{event.overload_name}" if event.overload_name else name
    return overload if kind(overload) else None


def _unnoted(overload: str, handles: Sequence[Handle]) -> tuple[str, str]:
    """Who served a call that no handle counted."""
    if overload == OWN:
        return "gradient of a composite", ""
    if overload.startswith("flagops::"):
        return overload, ""
    base = Form(overload).base
    if base not in LOWERINGS:
        return "", "flagops replaces no operator of this name"
    if overload not in forms(base):
        return "", "a form that is not replaced"
    if not any(base in handle.ops for handle in handles):
        return "", "enable was not asked for it"
    return "", "called where no replacement is: inside a kernel, or on a device that has none"


_SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "n_inner"), 64),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "image_size"), 32),
    **{"num_key_value_heads": 4, "vocab_size": 256, "pad_token_id": 0},
}


def command(argv: Sequence[str]) -> int:
    """`flagops coverage MODEL_CLASS|SCRIPT`: a small random model of a class of transformers in forward, a step of
    training and eight tokens; or a script, which may call `flagops.enable` itself."""
    parser = contract.Parser(
        prog="flagops coverage",
        usage="%(prog)s [options] MODEL_CLASS|SCRIPT [-- ARGUMENT...]",
        description=command.__doc__,
    )
    parser.add_argument("target", metavar="MODEL_CLASS|SCRIPT", help="such as LlamaForCausalLM, or a .py file")
    parser.add_argument("--json", action="store_true", help="machine-readable; the script's own output goes to stderr")
    parser.add_argument("--backend", help="backend of `enable` (default: the best for each call)")
    split = argv.index("--") if "--" in argv else len(argv)
    options, words = parser.parse_args(argv[:split]), argv[split + 1 :]
    script, codes = options.target.endswith(".py"), [0]
    if script and not os.path.isfile(options.target):
        raise ValueError(f"there is no file {options.target}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def watched() -> None:
        codes.append(contract.script(options.target, words))

    run = watched if script else _steps(options.target)
    quiet = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with enable(backend=options.backend) if options.backend else contextlib.nullcontext(), quiet:
        if not script:
            run()
        found = coverage(run)
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        found.show()
    return codes[-1]  # of a script that failed, this is what was seen before


def _steps(name: str) -> Callable[[], None]:
    """What a small random model of that class does: a forward, a step of AdamW, and greedy tokens if it has some."""
    import torch
    import transformers

    found: Any = getattr(transformers, name, None)
    if getattr(found, "config_class", None) is None:
        raise ValueError(f"coverage: {name!r} is no model class of transformers and no .py file")
    whole = found.config_class()
    torch.manual_seed(0)
    model = found(found.config_class(**{key: value for key, value in _SMALL.items() if hasattr(whole, key)}))
    inputs = {"input_ids": torch.randint(1, 256, (2, 24)), "pixel_values": torch.randn(2, 3, 32, 32)}
    if model.main_input_name not in inputs:
        raise ValueError(f"coverage: {name} reads {model.main_input_name}; write a script that calls it")
    given = {model.main_input_name: inputs[model.main_input_name]}
    optimizer = torch.optim.AdamW(model.parameters())

    def run() -> None:
        with torch.no_grad():
            model.eval()(**given)
        first = next(iter(model.train()(**given).values()))
        first.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if found.can_generate():
            model.eval().generate(**given, max_new_tokens=8, do_sample=False)

    return run
