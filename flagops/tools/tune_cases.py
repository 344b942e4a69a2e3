"""What `flagops tune` measures: calls of operators, torch's own calls with and without us, and whole models."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from flagops import arrays, order, registry
from flagops.errors import Unsupported
from flagops.tools import demo, measure

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
SECONDS, ROUNDS = 0.3, 5

Times = dict[str, float]
"""Seconds a call, by candidate."""

Call = Callable[[], Any]

Candidates = Mapping[str, tuple[Callable[[], AbstractContextManager[Any]], Call]]
"""By name a call, and the context that it is made in."""


@dataclass(frozen=True)
class Case:
    """One measurement for a key of the table: of our kernels (`run`), or of torch's call without and with us."""

    what: str
    key: str
    size: str
    make: Callable[[], Candidates]
    quick: bool = False

    @property
    def title(self) -> str:
        return f"{self.what} {self.key} {self.size}"

    def measure(self) -> Times:
        """Seconds of each candidate that can compute it, none where torch refuses."""
        try:
            candidates = self.make()
        except (Unsupported, RuntimeError, NotImplementedError):
            return {}
        times = interleaved(candidates, SECONDS / 5 if self.quick else SECONDS, 3 if self.quick else ROUNDS)
        return {name: median(found) for name, found in times.items()}


def interleaved(candidates: Candidates, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each candidate, a number for each round; forwards, then backwards, each within its context."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, repeats = list(candidates), dict.fromkeys(candidates, 1)
    for count in range(-1, rounds):  # the first round compiles, and finds out how often to call
        for name in names if count % 2 else reversed(names):
            context, call = candidates[name]
            with context():
                call()
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    call()
                elapsed = (time.perf_counter() - start) / repeats[name]
            if count < 0:
                repeats[name] = max(1, min(2000, int(seconds / rounds / elapsed)))
            else:
                times[name].append(elapsed)
    return times


def usable(device: str) -> list[str]:
    """The backends that compute there as fast as they can, and do not merely hold the meaning."""
    return [name for name in measure.usable(device) if name != "numpy"]


def circumstances() -> dict[str, Any]:
    """What else a table was made under."""
    found = measure.machine()
    return {name: found[name] for name in ("cores", "threads", "torch cpu capability", "torch bfloat16", "system")}


def cases(backends: Sequence[str], device: str, quick: bool = False) -> Iterator[Case]:
    """Every measurement, cheap ones first."""
    import torch

    others = [name for name in backends if name != "torch"]
    for (op, call), dtype, (rows, count), size in itertools.product(
        _torch_calls().items(), arrays.FLOATS, ROWS.items(), SHAPES
    ):
        if dtype in ("float16", "float64") and (rows == "many" or size != SHAPES[0]):
            continue
        make = partial(_replaced, op, call, others, count, size, getattr(torch, dtype), device)
        name = op.partition("/")[0]
        key = f"{name}.training" if op.endswith("/training") else f"{name}.{dtype}.{rows}"
        yield Case("replace", key, f"{op.partition('/')[2]} {dtype} {count} x {size[0]} x {size[1]}", make, quick)
    for op in registry.operators().values():
        able = [name for name in backends if registry.written(op.name, name)]
        seen: Counter[str] = Counter()
        for name, dtype in itertools.product(op.workloads, ("float32", "bfloat16")) if len(able) > 1 else ():
            key = _key(op, name, dtype)
            seen.update([key])
            if key and seen[key] <= SIZES:
                yield Case("run", key, f"{name} {dtype}", partial(_explicit, op, name, dtype, able, device), quick)


def _key(op: Operator, workload: str, dtype: str) -> str:
    """Of a workload in a dtype; "" if the operator has not got it, or if it is too large."""
    try:
        of = measure.case(op, workload, dtype)
    except Unsupported:
        return ""
    dims = dict(of.dims)
    if op.flops(dims, of.batch) > MOST_FLOPS:
        return ""
    result = op.result_dtype(dict(of.dtypes), dict(of.scalars))
    return f"{op.name}.{result}.{order.rows_of(op, op.shape(op.result, dims, of.batch))}"


def _explicit(op: Operator, workload: str, dtype: str, backends: Sequence[str], device: str) -> Candidates:
    trial = measure.prepare(op, workload, device, dtype)
    turn = itertools.cycle(trial.sets)

    def call(kernel: measure.Call) -> Call:
        return lambda: kernel(*next(turn), trial.out)

    found: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Call]] = {}
    for name, kernel in measure.candidates(op, backends).items():
        with suppress(Unsupported):
            kernel(*trial.sets[0], trial.out)
            found[name] = (nullcontext, call(kernel))
    return found


def _torch_calls() -> dict[str, Callable[..., Call | None]]:
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
    return itertools.cycle([first, *(make() for _ in range(min(63, measure.COLD // max(used, 1))))])


def _replaced(
    op: str,
    make: Callable[..., Call],
    backends: Sequence[str],
    rows: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> Candidates:
    import torch

    from flagops import enable

    name = op.partition("/")[0]
    generator = torch.Generator(device).manual_seed(rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    call = make(rows, size, randn)
    call()  # torch may refuse the dtype
    found: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Call]] = {TORCH: (nullcontext, call)}
    for backend in backends:
        with enable(name, backend=backend) as handle:
            call()
            if handle.report().replaced:
                found[backend] = (partial(enable, name, backend=backend), call)
    return found


@dataclass
class Model:
    """A whole model at one task."""

    title: str
    make: Callable[[], Call]
    call: Call | None = None

    def ratio(self, table: order.Table, quick: bool = False) -> tuple[float, list[str]]:
        """How many times as fast it is under ``enable()`` with a table, and the operators that it then calls, as the
        median of interleaved runs."""
        from flagops import enable

        self.call = call = self.call or self.make()
        with order.forced(table):
            call()
            with enable() as handle:
                call()
                report = handle.report()
            candidates: Candidates = {TORCH: (nullcontext, call), "enable": (enable, call)}
            times = interleaved(candidates, 1 if quick else 4, 3 if quick else 7)
        ratios = [one / other for one, other in zip(times[TORCH], times["enable"], strict=True)]
        called = {by.partition("/")[0] for row in report.rows for by in row.replaced}
        return median(ratios), sorted(called)


def models(device: str) -> Iterator[Model]:
    """Real and small models of transformers, as far as they are installed, each at what it is used for."""
    if find_spec("transformers") is None:
        return
    if not demo.missing_weights():
        for dtype in ("float32", "bfloat16"):
            yield Model(f"SmolLM2-135M {dtype}, 12 tokens", partial(_generate, _smollm2, dtype, device))
            yield Model(f"SmolLM2-135M {dtype}, prompt of 128", partial(_forward, _smollm2, dtype, device, 1, 128))
        yield Model("SmolLM2-135M float32, training", partial(_train, _smollm2, "float32", device, 64))
    yield Model("MiniLM-L6 float32, 4 x 64 tokens", partial(_forward, _minilm, "float32", device, 4, 64))
    yield Model("random DeepSeek-V4 float32, 12 tokens", partial(_generate, _deepseek_v4, "float32", device))
    yield Model("random DeepSeek-V4 float32, prompt of 128", partial(_forward, _deepseek_v4, "float32", device, 1, 128))
    yield Model("random DeepSeek-V4 float32, training", partial(_train, _deepseek_v4, "float32", device, 64))


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
    """The larger example: in one of 60 000 parameters no kernel matters, but the Python around each call."""
    from flagops.deepseek_v4 import examples

    return examples.long_deepseek_v4()


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
