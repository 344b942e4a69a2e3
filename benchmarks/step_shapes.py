"""Whether two steps of decoding are the same calls: ``python benchmarks/step_shapes.py --markdown FILE``.

A step could be recorded once and replayed by one launcher where a later one makes the same calls with the same shapes.
The small DeepSeek-V4, patched, decodes tokens after a prompt; kept are, of each step, the operators that torch
dispatches, the shapes and strides of what they take, and their numbers. The time of a step beside them is what a replay
could save at most.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flagops
from flagops import machine
from flagops.deepseek_v4 import examples
from flagops.tools import contract

Call = tuple[str, tuple[Any, ...]]


class Calls(TorchDispatchMode):
    """The calls of a block, in order: operator, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((str(func), tuple(_given((args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


def _given(x: Any) -> Iterator[Any]:
    if isinstance(x, torch.Tensor):
        yield x.dtype, tuple(x.shape), x.stride()
    elif isinstance(x, dict):
        yield from _given([*x.values()])
    elif isinstance(x, list | tuple):
        for one in x:
            yield from _given(one)
    else:
        yield repr(x)


def steps(model: Any, prompt: int, count: int) -> tuple[list[list[Call]], list[float]]:
    """The calls of so many steps, and the milliseconds of processor time of as many others."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    out = model(ids, use_cache=True)
    made, times = [], []
    for number in range(2 * count):
        token = out.logits[:, -1:].argmax(-1)
        if number < count:
            with Calls() as calls:
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            made.append(calls.made)
        else:
            start = time.process_time()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(1e3 * (time.process_time() - start))
    return made, times


def lines(made: Sequence[Sequence[Call]], times: Sequence[float]) -> list[str]:
    """What the steps have in common."""
    sequences = {tuple(name for name, _ in calls) for calls in made}
    alike = [(a, b) for a, b in pairwise(made) if [name for name, _ in a] == [name for name, _ in b]]
    other = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in alike]
    calls = median(map(len, made))
    return [
        f"{len(made)} steps, of {calls:.0f} dispatched calls and {median(times):.1f} ms of one thread (medians)",
        f"{len({tuple(calls) for calls in made})} of them differ from all others in a shape, a stride or a number",
        f"{len(sequences)} sequences of operators, {len(alike)} steps with the one of the step before them",
        f"between two such steps {min(other)} to {max(other)} calls differ" if other else "no two such steps",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--markdown", type=contract.output, metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = examples.trained_deepseek_v4().eval()
    flagops.patch(model)
    with torch.no_grad():
        found = lines(*steps(model, args.prompt, args.steps))
    print(*found, sep="\n")
    if args.markdown:
        layers = model.config.num_hidden_layers
        title = f"Decoding by the small DeepSeek-V4 ({layers} layers), patched, after {args.prompt} tokens"
        where = f"{machine.cpu_model()}, torch {torch.__version__}: `python benchmarks/step_shapes.py`."
        args.markdown.write_text(f"{title}; {where}\n\n" + "".join(f"- {line}\n" for line in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
