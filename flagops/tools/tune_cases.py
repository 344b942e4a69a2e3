"""What `flagops tune` measures: calls of operators, torch's own calls with and without us, and whole models."""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING, Any

from flagops import arrays, order, registry
from flagops.errors import Unsupported
from flagops.tools import demo, measure, workloads

if TYPE_CHECKING:
    import torch

    from flagops.operator import Operator

TORCH = "torch's own"
ROWS = {"one": 1, "few": 8, "many": 128}
SHAPES = ((576, 1536), (2048, 2048), (1024, 6144))
"""Inner and outer sizes of the products that are timed: what models of 100 million to a billion parameters have."""
MOST_FLOPS = 3e9
"""Operations of the largest workload that is timed."""
SIZES = 2
"""Workloads of a key that are timed."""
Times = dict[str, float]
"""Seconds a call, by candidate."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Race:
    """What is timed against each other, as `measure.alternate` takes it."""

    calls: Mapping[str, measure.Call]
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)
    sets: Sequence[Sequence[Any]] = ((),)
    out: Any = None

    def times(self, settings: measure.Settings) -> dict[str, list[float]]:
        """Seconds a call of each candidate, one number for each round."""
        return measure.alternate(self.calls, self.sets, self.out, settings, poisoned=False, within=self.within)


@dataclass(frozen=True)
class Case:
    """One measurement for a key of the table: of our kernels (`run`), or of torch's call without and with us."""

    what: str
    key: str
    size: str
    make: Callable[[], Race]
    settings: measure.Settings

    @property
    def title(self) -> str:
        return f"{self.what} {self.key} {self.size}"

    def measure(self) -> Times:
        """Seconds of each candidate that can compute it."""
        return {name: median(found) for name, found in self.make().times(self.settings).items()}


def usable(device: str) -> list[str]:
    """The backends that compute there as fast as they can, and do not merely hold the meaning."""
    return [name for name in measure.usable(device) if name != "numpy"]


LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
)  # fmt: skip
"""What tells a library to use less than the processor has, in the environment."""


def circumstances() -> dict[str, Any]:
    """What else a table was made under."""
    found = measure.machine()
    told = {name: os.environ[name] for name in LIMITS if name in os.environ}
    names = "cores", "threads", "torch cpu capability", "torch bfloat16", "system"
    return {name: found[name] for name in names} | ({"told": told} if told else {})


def cases(backends: Sequence[str], device: str, quick: bool = False) -> Iterator[Case]:
    """Every measurement, cheap ones first."""
    import torch

    others = [name for name in backends if name != "torch"]
    settings = measure.Settings(seconds=0.06 if quick else 0.3, rounds=3 if quick else 5, device=device)
    for (op, call), dtype, (rows, count), size in itertools.product(
        _torch_calls().items(), arrays.FLOATS, ROWS.items(), SHAPES
    ):
        if dtype in ("float16", "float64") and (rows == "many" or size != SHAPES[0]):
            continue
        make = partial(_replaced, op, call, others, count, size, getattr(torch, dtype), device)
        name = op.partition("/")[0]
        key = f"{name}.training" if op.endswith("/training") else f"{name}.{dtype}.{rows}"
        yield Case("replace", key, f"{op.partition('/')[2]} {dtype} {count} x {size[0]} x {size[1]}", make, settings)
    for op in registry.operators().values():
        able = [name for name in backends if registry.written(op.name, name)]
        seen: Counter[str] = Counter()
        for name, dtype in itertools.product(op.workloads, ("float32", "bfloat16")) if len(able) > 1 else ():
            key = _key(op, name, dtype)
            seen.update([key])
            if key and seen[key] <= SIZES:
                make = partial(_explicit, op, name, dtype, able, device)
                yield Case("run", key, f"{name} {dtype}", make, settings)


def _key(op: Operator, workload: str, dtype: str) -> str:
    """Of a workload in a dtype; "" if the operator has not got it, or if it is too large."""
    try:
        of = workloads.case(op, workload, dtype)
    except Unsupported:
        return ""
    dims = dict(of.dims)
    if op.flops(dims, of.batch) > MOST_FLOPS:
        return ""
    result = op.result_dtype(dict(of.dtypes), dict(of.scalars))
    return f"{op.name}.{result}.{order.rows_of(op, op.shape(op.result, dims, of.batch))}"


def _explicit(op: Operator, workload: str, dtype: str, backends: Sequence[str], device: str) -> Race:
    trial = measure.prepare(op, workload, device, dtype)
    able: dict[str, measure.Call] = {}
    for name, kernel in measure.candidates(op, backends).items():
        with suppress(Unsupported):
            kernel(*trial.sets[0], trial.out)
            able[name] = kernel
    return Race(able, sets=trial.sets, out=trial.out)


def _torch_calls() -> dict[str, Callable[..., Call]]:
    """What reaches the operators that `enable` replaces by itself, as ``make(rows, (k, n), randn)``."""
    import torch
    import torch.nn.functional as F

    def mm(m: int, size: tuple[int, int], randn: Any) -> Call:
        k, n = size
        turn = _turn(lambda: (randn(m, k), randn(n, k).t()))
        return lambda: torch.mm(*next(turn))

    def bmm(m: int, size: tuple[int, int], randn: Any) -> Call:
        turn = _turn(lambda: (randn(8, m, 64), randn(8, size[0], 64).transpose(1, 2)))
        return lambda: torch.bmm(*next(turn))

    def addmm(m: int, size: tuple[int, int], randn: Any) -> Call:
        k, n = size
        turn = _turn(lambda: (randn(m, k), randn(n, k), randn(n)))
        return lambda: F.linear(*next(turn))

    def rms_norm(m: int, size: tuple[int, int], randn: Any) -> Call:
        turn = _turn(lambda: (randn(m, size[0]), (size[0],), randn(size[0])))
        return lambda: F.rms_norm(*next(turn))

    def attention(m: int, size: tuple[int, int], randn: Any) -> Call:
        turn = _turn(lambda: (randn(1, 8, m, 64), randn(1, 8, max(m, 128), 64), randn(1, 8, max(m, 128), 64)))
        return lambda: F.scaled_dot_product_attention(*next(turn))

    def trained(m: int, size: tuple[int, int], randn: Any) -> Call:
        turn = _turn(lambda: [randn(1, 8, m, 64).requires_grad_() for _ in range(3)])

        def call() -> None:
            given = next(turn)
            torch.autograd.grad(F.scaled_dot_product_attention(*given).sum(), given)

        return call

    def grouped(m: int, size: tuple[int, int], randn: Any) -> Call:
        ends = torch.tensor([m, 2 * m, 3 * m, 4 * m], dtype=torch.int32)
        turn = _turn(lambda: (randn(4 * m, size[0]), randn(4, size[0], size[1])))

        def call() -> Any:
            a, b = next(turn)
            return torch._grouped_mm(a, b, offs=ends)

        return call

    attend = "scaled_dot_product_attention"
    return {
        "matmul/mm": mm,
        "matmul/bmm": bmm,
        "linear": addmm,
        "rms_norm": rms_norm,
        attend: attention,
        f"{attend}/training": trained,
        "grouped_matmul": grouped,
    }


def _turn(make: Callable[[], Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Inputs that take turns, so many that each call finds its own out of the caches."""
    first = make()
    used = sum(x.nbytes for x in first if arrays.is_torch(x))
    return itertools.cycle([first, *(make() for _ in range(1, min(measure.DRAWN, measure.turns(used))))])


def _replaced(
    op: str,
    make: Callable[..., Call],
    backends: Sequence[str],
    rows: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> Race:
    import torch

    from flagops import enable

    name = op.partition("/")[0]
    generator = torch.Generator(device).manual_seed(rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    call = make(rows, size, randn)
    try:
        call()
    except RuntimeError:  # torch has no kernel of this dtype: there is nothing to be faster than
        return Race({})
    calls, within = {TORCH: _anyway(call)}, {}
    for backend in backends:
        with enable(name, backend=backend) as handle:
            call()
            taken = handle.report().replaced
        if taken:
            calls[backend], within[backend] = calls[TORCH], partial(_replacing, call, name, backend)
    return Race(calls, within)


def _anyway(call: Call) -> measure.Call:
    return lambda out: call()


@contextmanager
def _replacing(call: Call, ops: str | None = None, backend: str | None = None) -> Iterator[None]:
    """Under `enable`, with a first call behind it."""
    from flagops import enable

    with enable(ops, backend):
        call()
        yield


@contextmanager
def _by(table: order.Table, call: Call) -> Iterator[None]:
    with order.forced(table), _replacing(call):
        yield


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as torch alone something is, the median of interleaved rounds, and its standard error."""

    middle: float
    error: float = 0.0

    @classmethod
    def of(cls, torchs: Sequence[float], ours: Sequence[float]) -> Ratio:
        """The error is that of a median by distances to it, which a few disturbed rounds do not widen."""
        ratios = [one / other for one, other in zip(torchs, ours, strict=True)]
        middle = median(ratios)
        return cls(middle, 1.86 * median(abs(ratio - middle) for ratio in ratios) / sqrt(len(ratios)))

    def below(self, least: float) -> bool:
        """Whether it was shown to be less: on a machine that others disturb one measurement shows nothing."""
        return self.middle + 2 * self.error < least

    def __str__(self) -> str:
        return f"{self.middle:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Watched(order.Table):
    """A table that remembers what was taken from torch by it."""

    taken: set[str] = field(default_factory=set)

    def replaces(self, operator: str, dtype: str, rows: str, training: bool = False) -> tuple[str, ...]:
        found = super().replaces(operator, dtype, rows, training)
        if found:
            self.taken.add(f"{operator}.training" if training else f"{operator}.{dtype}.{rows}")
        return found


@dataclass
class Model:
    """A whole model at one task."""

    title: str
    make: Callable[[], Call]
    device: str
    call: Call | None = None

    def asked(self, table: order.Table) -> tuple[set[str], set[str]]:
        """The keys of its calls that are taken from torch under ``enable()`` with a table, and the operators that it
        calls through us at all: to leave a call to torch costs time as well."""
        from flagops import enable
        from flagops.override.interpose import live
        from flagops.override.sites import Site

        self.call = call = self.call or self.make()
        watched = Watched(**vars(table))
        with order.forced(watched), enable() as handle:
            call()
            found = {row.op for row in handle.report().rows}
            sites = [site for site in live.values() if isinstance(site, Site) and f"aten::{site.name}" in found]
            return watched.taken, {site.lowering.operator for site in sites if site.lowering}

    def ratios(self, tables: Mapping[str, order.Table], least: float, quick: bool = False) -> dict[str, Ratio]:
        """How many times as fast it is under ``enable()`` with each table, all in one race; longer where the first of
        them looks slower than `least` and was not shown to be."""
        self.call = call = self.call or self.make()
        first, *_ = tables
        within = {name: partial(_by, table, call) for name, table in tables.items()}
        race = Race(dict.fromkeys((TORCH, *tables), _anyway(call)), within)
        times: dict[str, list[float]] = defaultdict(list)
        call()
        for times_as_long in (1, 3):
            settings = measure.Settings(
                seconds=times_as_long * (1 if quick else 4),
                rounds=times_as_long * (3 if quick else 7),
                device=self.device,
            )
            for name, more in race.times(settings).items():
                times[name] += more
            found = {name: Ratio.of(times[TORCH], times[name]) for name in tables}
            if found[first].middle >= least or found[first].below(least):
                break
        return found


def models(device: str) -> Iterator[Model]:
    """Real and small models of transformers, as far as they are installed, each at what it is used for."""
    if find_spec("transformers") is None:
        return

    def at(title: str, task: Callable[..., Call], load: Callable[[], Any], dtype: str, *sizes: int) -> Model:
        return Model(f"{title} {dtype}", partial(task, load, dtype, device, *sizes), device)

    if not demo.missing_weights():
        for dtype in ("float32", "bfloat16"):
            yield at("SmolLM2-135M, 12 tokens,", _generate, _smollm2, dtype)
            yield at("SmolLM2-135M, prompt of 128,", _forward, _smollm2, dtype, 1, 128)
        yield at("SmolLM2-135M, training,", _train, _smollm2, "float32", 64)
    yield at("MiniLM-L6, 4 x 64 tokens,", _forward, _minilm, "float32", 4, 64)
    yield at("small DeepSeek-V4, 12 tokens,", _generate, _deepseek_v4, "float32")
    yield at("small DeepSeek-V4, prompt of 128,", _forward, _deepseek_v4, "float32", 1, 128)
    yield at("small DeepSeek-V4, training,", _train, _deepseek_v4, "float32", 64)


@cache
def _smollm2() -> Any:
    import transformers

    file = demo._weights()
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)


@cache
def _minilm() -> Any:
    """The sizes of all-MiniLM-L6-v2 with random weights: speed does not hang on them."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return transformers.BertModel(transformers.BertConfig(**sizes))


@cache
def _deepseek_v4() -> Any:
    """The trained one: in a model of 60 000 parameters no kernel matters, but the Python around each call."""
    from flagops.deepseek_v4 import examples

    return examples.trained_deepseek_v4()


def _placed(load: Callable[[], Any], dtype: str, device: str) -> Any:
    import torch

    return copy.deepcopy(load()).to(device=device, dtype=getattr(torch, dtype)).eval()


def _tokens(model: Any, rows: int, count: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, model.config.vocab_size, (rows, count), generator=generator).to(model.device)


def _generate(load: Callable[[], Any], dtype: str, device: str) -> Call:
    model = _placed(load, dtype, device)
    ids = _tokens(model, 1, 16)
    return lambda: model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)


def _forward(load: Callable[[], Any], dtype: str, device: str, rows: int, count: int) -> Call:
    import torch

    model = _placed(load, dtype, device)
    ids = _tokens(model, rows, count)

    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return call


def _train(load: Callable[[], Any], dtype: str, device: str, count: int) -> Call:
    model = _placed(load, dtype, device).train()
    ids = _tokens(model, 1, count)

    def call() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return call
