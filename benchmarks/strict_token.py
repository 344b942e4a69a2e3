"""What a token of SmolLM2-135M takes: torch alone, with an empty override before each replaced kernel, and with ours.

    python benchmarks/strict_token.py --dtype float32 --rounds 5

The weights are random; greedy tokens, one thread, its processor time. The empty overrides are functions of Python that
hand each call on to torch's own kernel: what they take no kernel behind them can win back, so that their line is the
limit of a strict replacement here. Ours are those of ``enable(ops="all", backend="numba", strict=True)``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

import flagops
from flagops import machine
from flagops.override import interpose
from flagops.override.forms import Form

FEW, MANY = 4, 20  # tokens of the two runs whose difference is taken: the prompt counts in neither


def model(dtype: str) -> Any:
    """SmolLM2-135M's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def token(generate: Callable[[int], Any]) -> float:
    """Milliseconds of one token."""
    taken = []
    for count in (FEW, MANY):
        start = time.process_time()
        generate(count)
        taken.append(time.process_time() - start)
    return 1e3 * (taken[1] - taken[0]) / (MANY - FEW)


def ours() -> Any:
    return flagops.enable(ops="all", backend="numba", strict=True)


def called(generate: Callable[[int], Any]) -> list[str]:
    """The overloads that our kernels compute, but for composites, whose parts are in the list."""
    with ours():
        generate(FEW)
        return [name for (name, key), site in interpose.live.items() if key == "CPU" and getattr(site, "plans", None)]


@contextlib.contextmanager
def empty(overloads: Sequence[str]) -> Iterator[None]:
    """Python functions before torch's kernels, which they call."""
    library = torch.library.Library("aten", "IMPL")
    for name in overloads:
        library.impl(name, handing_on(Form(name)), "CPU", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


def handing_on(form: Form) -> Callable[..., Any]:
    """A number where torch's kernel asks for a tensor comes to an override as such."""
    kernel, numbers = torch.library.get_kernel(f"aten::{form.name}", "CPU"), (int, float)
    places = [i for i in form.tensors if i < form.positional]

    def call(keyset: Any, *args: Any, **named: Any) -> Any:
        for i in places:
            if args[i].__class__ in numbers:
                args = tuple(form.with_tensors(args))
                break
        return kernel.call_boxed(keyset, *args, **named)

    return call


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="each takes the three in turn (default 5)")
    chosen = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    llama, prompt = model(chosen.dtype), torch.arange(100, 112)[None]

    def generate(count: int) -> Any:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    overloads = called(generate)
    blocks = {"torch": contextlib.nullcontext, "empty overrides": lambda: empty(overloads), "flagops": ours}
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(chosen.rounds):
        for name, block in blocks.items():
            with block():
                generate(2)
                taken[name].append(token(generate))
    print(f"{machine.cpu_model()}, torch {torch.__version__}, {chosen.dtype}, {len(overloads)} overloads")
    print("| a token by | ms | torch's to it |\n| --- | --- | --- |")
    for name, times in taken.items():
        ratio = median(one / other for one, other in zip(taken["torch"], times, strict=True))
        print(f"| {name} | {median(times):.1f} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
