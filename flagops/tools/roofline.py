"""``flagops bench --roofline``: the figures of this machine that `flagops plan` counts with.

Products are called as packed models call them, activations quantised first, on weights that together exceed the caches.
What a call costs besides is taken out of them, by the same call on a small weight. In a model it costs more, for
between two calls weights go through the caches: so it is what the layers of a small model take beyond their products.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import flagops
from flagops import packed
from flagops.checkpoint.memory import resident
from flagops.deepseek_v4.examples import packed_deepseek_v4
from flagops.machine import cpu_model
from flagops.packed.command import greedy
from flagops.packed.products import POWERS, Weight, linear
from flagops.plan import checkpoint
from flagops.plan.cost import Step, loads
from flagops.plan.machine import ATTENTION_KINDS, Machine
from flagops.plan.model import Model, Role, parts
from flagops.tools import measure, workloads
from flagops.tools.contract import Progress
from flagops.tools.measure import Settings

SIDE = 4096
"""Rows and columns of a weight."""
SMALL = 128
"""Those of a weight that costs its call alone."""
ROWS = 128
"""Of a prompt; rows beyond the first are what multiplying costs."""
KEYS = 1024
"""Entries of the cache that a query sees."""
_BLOCK = 4 << 20
_READERS = 4
_SIZES: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 6, "compress_ratios": [0, 4, 128] * 2, "compress_rate_hca": 128, "num_attention_heads": 8,
    "head_dim": 512, "q_lora_rank": 256, "o_lora_rank": 512, "index_n_heads": 64, "sliding_window": 128,
    "index_topk": 512,
}  # fmt: skip
_TOKENS = 40
_PROMPTS = 6
_TOKEN = Step(1, 8 + _TOKENS // 2)
"""The token that a layer's time is taken of."""

Product = Callable[[Any, Any], Any]
"""Of a row or several, and a weight."""


def machine(settings: Settings, path: Path | None = None) -> Machine:
    """Measure this machine, and the disk that a file or the largest file of a folder lies on. Takes a minute."""
    device, products = settings.device, list(kinds(settings.device))
    with Progress(5 + len(products)) as begin:
        begin("memory")
        process = resident()
        bandwidth, single = _bandwidth(settings)
        reads, rates = dict[str, float](), dict[str, float]()
        for kind, make, call in products:
            begin(f"products of {kind}")
            reads[kind], rates[kind] = product(make, call, settings)
        begin("attention")
        rates |= attention(settings)
        reads |= dict.fromkeys(("attention", "scores"), bandwidth)
        products_alone = Machine("", bandwidth, reads=reads, rates=rates)
        begin("a model, its experts apart")
        apart, rest, _ = layers(False, products_alone, settings)
        begin("a model, its experts stacked")
        stacked, step, rows = layers(True, products_alone, settings)
        more = sum(apart[kind] - stacked[kind] for kind in stacked) / len(stacked)
        experts = max(0.0, more) / _SIZES["num_experts_per_tok"]
        begin("disk")
        speed = None if path is None else disk(path)
    threads = torch.get_num_threads()
    name = f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device
    found = dataclasses.replace(
        products_alone, name=name, layers=stacked, rows=rows, experts=experts, step=(rest + step) / 2,
        process=process, disk=speed, single=single,
    )  # fmt: skip
    if not found.whole:
        raise ValueError(f"something disturbed this, of which came {found}; repeat it when nothing else runs")
    return found


def _bandwidth(settings: Settings) -> tuple[float, float]:
    """Bytes a second that all threads read, and one."""
    one = torch.ones(64 << 20, device=settings.device)
    threads = torch.get_num_threads()

    def best() -> float:
        times = measure.alternate({"read": lambda out: one.sum()}, [()], one.new_empty(1), settings, poisoned=False)
        return one.nbytes / min(times["read"])

    everybody = best()
    torch.set_num_threads(1)
    try:
        return everybody, best()
    finally:
        torch.set_num_threads(threads)


def kinds(device: str) -> Iterator[tuple[str, Callable[[int], Any], Product]]:
    """Each kind of weight: how to make a square one, and the product that a model calls with it."""

    def codes(size: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
        return workloads.random_values((size, columns), dtype, torch.Generator().manual_seed(0)).to(device)

    def fp8(size: int) -> Weight:
        scale = codes(-(-size // 128), torch.float8_e8m0fnu, -(-size // 128))
        return Weight(codes(size, torch.float8_e4m3fn, size), scale)

    def fp4(size: int) -> Weight:
        return Weight(codes(size, torch.uint8, size // 2), codes(size, torch.float8_e8m0fnu, size // 32))

    def int8(size: int) -> Weight:
        return Weight(codes(size, torch.uint8, size).view(torch.int8), torch.rand(size, 1, device=device))

    def quantised(x: Any, weight: Weight) -> Any:
        return linear(x, weight, None, POWERS)

    def floats(x: Any, weight: Any) -> Any:
        """One row as torch multiplies it with the head, several as operators multiply those of compressors."""
        return torch.nn.functional.linear(x, weight) if len(x) == 1 else flagops.matmul(x, weight.T)

    def whole(x: Any, weight: Weight) -> Any:
        return flagops.int8_matmul(*flagops.int8_quantize(x), *weight)

    yield (
        "f32",
        lambda size: torch.randn(size, size, device=device),
        lambda x, w: torch.nn.functional.linear(x.float(), w),
    )
    yield "bf16", lambda size: torch.randn(size, size, device=device).bfloat16(), floats
    yield "fp8", fp8, quantised
    yield "fp4", fp4, quantised
    yield "int8", int8, whole


def undisturbed(times: Sequence[float]) -> float:
    """The time that a tenth stays below: what else runs only ever adds to it."""
    return sorted(times)[len(times) // 10]


@torch.no_grad()
def product(make: Callable[[int], Any], call: Product, settings: Settings) -> tuple[float, float]:
    """Bytes a second of the weights of one row's product, FLOP a second of each further row."""
    first, small = make(SIDE), make(SMALL)
    size = sum(x.nbytes for x in _tensors(first))
    sets = [(first,), *((_copy(first),) for _ in range(measure.turns(size) - 1))]
    x = torch.randn(ROWS, SIDE, device=settings.device).bfloat16()
    calls: dict[str, measure.Call] = {
        "small": lambda weight, out: call(x[:1, :SMALL], small),
        "one": lambda weight, out: call(x[:1], weight),
        "many": lambda weight, out: call(x, weight),
    }
    found = measure.alternate(calls, sets, x, settings, poisoned=False)
    times = {name: undisturbed(each) for name, each in found.items()}
    return size / (times["one"] - times["small"]), 2.0 * (ROWS - 1) * SIDE**2 / (times["many"] - times["one"])


def _tensors(weight: Any) -> Sequence[torch.Tensor]:
    return weight if isinstance(weight, Weight) else (weight,)


def _copy(weight: Any) -> Any:
    copies = [x.view(torch.uint8).clone().view(x.dtype) for x in _tensors(weight)]
    return Weight(*copies) if isinstance(weight, Weight) else copies[0]


@torch.no_grad()
def attention(settings: Settings) -> dict[str, float]:
    """FLOP a second of one query's attention and of its scores for the indexer, at the sizes of V4-Flash."""
    heads, dim, index_dim, entries = 64, 512, 128, 16 * KEYS
    q, kv = (
        torch.randn(1, n, *shape).bfloat16().to(settings.device) for n, shape in ((1, (heads, dim)), (KEYS, (dim,)))
    )
    listed = torch.arange(KEYS, dtype=torch.int32, device=settings.device).view(1, 1, KEYS)
    sink = torch.zeros(heads, device=settings.device)
    index_q = torch.randn(1, 1, heads, index_dim).bfloat16().to(settings.device)
    keys = torch.randn(1, entries, index_dim).bfloat16().to(settings.device)
    weights = torch.randn(1, 1, heads, device=settings.device)
    calls: dict[str, measure.Call] = {
        "attention": lambda out: flagops.sparse_attention(q, kv, sink, listed, dim**-0.5),
        "little": lambda out: flagops.sparse_attention(q, kv, sink, listed[..., :1], dim**-0.5),
        "scores": lambda out: flagops.lightning_indexer(index_q, keys, weights, 512),
    }
    found = measure.alternate(calls, [()], q, settings, poisoned=False)
    times = {name: undisturbed(each) for name, each in found.items()}
    return {
        "attention": 4.0 * heads * dim * (KEYS - 1) / (times["attention"] - times["little"]),
        "scores": 2.0 * heads * index_dim * entries / times["scores"],
    }


@torch.no_grad()
def layers(pack: bool, on: Machine, settings: Settings) -> tuple[dict[str, float], float, float]:
    """Seconds of a layer of each kind of a small model, and of what is no layer, beyond what products take; and of a
    number of each further row of a prompt in a layer."""
    begun, spent = dict[int, float](), dict[int, list[float]]()
    with tempfile.TemporaryDirectory(prefix="flagops-") as place:
        folder = Path(place) / "model"
        packed_deepseek_v4(folder, **_SIZES)
        sizes, _ = checkpoint.of_folder(folder, "checkpoint")
        model = packed.load(folder, pack=pack).to(settings.device)
        wait = measure.synchronizer(settings.device)

        def before(layer: Any, *_: Any) -> None:
            wait()
            begun[id(layer)] = settings.clock()

        def after(layer: Any, *_: Any) -> None:
            wait()
            spent.setdefault(id(layer), []).append(settings.clock() - begun[id(layer)])

        for layer in model.model.layers:
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
        whole = [settings.clock()]
        model.generation_config.eos_token_id = None  # no token ends it
        for _ in greedy(model, [1, 2, 3, 4, 5, 6, 7, 8], _TOKENS):
            wait()
            whole.append(settings.clock())
        decoded = {layer: list(taken) for layer, taken in spent.items()}
        spent.clear()
        for turn in range(_PROMPTS):
            ids = torch.arange(turn, turn + ROWS) % model.config.vocab_size
            model(ids[None].to(settings.device), logits_to_keep=1)
    times = [undisturbed(decoded[id(layer)][2:]) for layer in model.model.layers]
    alone = {
        kind: dataclasses.replace(sizes, **dict.fromkeys(ATTENTION_KINDS, 0) | {kind: 1}) for kind in ATTENTION_KINDS
    }
    each = {
        kind: (times[i] + times[i + 3]) / 2 - _products(alone[kind], on, inside=True)
        for i, kind in enumerate(ATTENTION_KINDS)
    }
    steps = [end - start for start, end in itertools.pairwise(whole[2:])]
    prompt = sum(min(spent[id(layer)][1:]) for layer in model.model.layers)  # the first may compile
    more = prompt - _products(sizes, on, inside=True, step=Step(ROWS, 0)) - 2 * sum(each.values())
    rows = max(0.0, more) / ((ROWS - 1) * sizes.layers * sizes.hidden)
    return each, undisturbed(steps) - sum(times) - _products(sizes, on, inside=False), rows


def _products(model: Model, on: Machine, inside: bool, step: Step = _TOKEN) -> float:
    """Seconds that the products of a step take, inside of layers or outside."""
    found = loads(model, parts(model, "checkpoint"), step)
    outside = (Role.EMBEDDING, Role.HEAD)
    return sum(on.seconds(x.kind, x.read, x.flops, x.once) for x in found if (x.role not in outside) is inside)


def disk(path: Path) -> float:
    """Bytes a second of reads of 4 MiB from all over a file by four threads, none of it in the page cache."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size, default=path)
    size = file.stat().st_size if file.is_file() else 0
    if size < _READERS * _BLOCK:
        raise ValueError(f"--disk {path}: there is no file of {_READERS * _BLOCK} bytes to read; give a larger one")
    blocks = list(range(0, size - _BLOCK + 1, _BLOCK))
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()[:256]
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(_READERS) as pool:
            start = time.perf_counter()
            done = sum(pool.map(lambda i: os.preadv(handle, [bytearray(_BLOCK)], blocks[i]), order))
            return done / (time.perf_counter() - start)
    finally:
        os.close(handle)
