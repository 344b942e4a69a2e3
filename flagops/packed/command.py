"""``flagops generate``: a checkpoint answers from its packed weights."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flagops import config, registry
from flagops.checkpoint import Refused
from flagops.checkpoint.memory import peak
from flagops.checkpoint.progress import amount
from flagops.tools.contract import Parser, Progress, natural

from .load import ACTIVATIONS, load

_EXAMPLES = """examples:
  flagops generate DeepSeek-V4-Flash --prompt 'The sea is' --max-new-tokens 32
  flagops generate DeepSeek-V4-Flash --prompt 'The sea is' --memory 24GiB      experts read on demand
  flagops generate DeepSeek-V4-Flash --prompt 'The sea is' --draft 2           two tokens guessed by mtp.0
  flagops generate Qwen3-30B-A3B-FP8 --ids '9707 11' --activations none        16-bit activations
  torchrun --nproc-per-node 4 -m flagops generate DeepSeek-V4-Flash --prompt 'The sea is'      a quarter on each rank
"""


def generate(argv: Sequence[str]) -> int:
    """The sub-command; greedy, so that the same words give the same text."""
    args = _parser().parse_args(list(argv))
    for name in args.backend or ():
        registry.backend(name)
    if not args.path.is_dir():
        raise Refused(f"{args.path} is no folder; give one with safetensors and their index")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer: Any = None if args.ids else _tokenizer(args.path)
    with _ranks() as mesh, Progress(args.max_new_tokens + 1) as begin:
        begin(f"loading {args.path.name}")
        start = time.perf_counter()
        model = _model(args, mesh)
        ids = args.ids or tokenizer(args.prompt)["input_ids"]
        _check(ids, model.config.get_text_config().vocab_size)
        times, found = [time.perf_counter()], []
        if args.draft:
            tokens = model.flagops_draft.generate(ids, args.max_new_tokens, args.draft)
        else:
            tokens = greedy(model, ids, args.max_new_tokens)
        for token in tokens:
            times.append(time.perf_counter())
            found.append(token)
            begin(f"{len(found)} tokens of {args.path.name}")
        if mesh is not None and mesh.get_rank():
            return 0  # the first rank speaks for all
    facts = {
        "text": tokenizer.decode(found) if tokenizer else None,
        "ids": found,
        "load_seconds": times[0] - start,
        "first_token_seconds": times[1] - times[0],
        "tokens_per_second": (len(found) - 1) / (times[-1] - times[1]) if len(found) > 1 else None,
        "peak_memory": peak(),
        "experts": None if model.flagops_arena is None else vars(model.flagops_arena.report()),
        "drafts": None if model.flagops_draft is None else vars(model.flagops_draft.report()),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(facts["text"] if tokenizer else " ".join(map(str, found)))
    rate = facts["tokens_per_second"]
    print(
        f"loaded in {facts['load_seconds']:.1f} s; {len(ids)} tokens read in {facts['first_token_seconds']:.2f} s, "
        f"{len(found)} made{f' at {rate:.1f} a second' if rate else ''}; memory at its peak {amount(peak())}"
    )
    for part in (model.flagops_arena, model.flagops_draft):
        if part is not None:
            print(part.report())
    return 0


def greedy(model: Any, ids: Sequence[int], count: int) -> Iterator[int]:
    """At most `count` tokens after some, each the likeliest; ends after one that ends a text."""
    import torch

    from .draft import ends

    stop = ends(model)
    given, cache = torch.tensor([list(ids)], device=model.device), None
    for _ in range(count):
        with torch.no_grad():
            out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield int(given)
        if int(given) in stop:
            return


@contextmanager
def _ranks() -> Iterator[Any]:
    """A mesh of the processes that torchrun has started; None where there is only this one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    try:
        yield mesh
    finally:
        dist.destroy_process_group()


def _model(args: argparse.Namespace, mesh: Any) -> Any:
    return load(
        args.path, dtype=args.dtype, activations=args.activations, pack=args.pack, memory=args.memory,
        draft=args.draft is not None, backend=args.backend, numerics=args.numerics, mesh=mesh,
    )  # fmt: skip


def _tokenizer(path: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise Refused(f"{path} has no tokenizer that transformers can load ({first}); give --ids") from error


def _check(ids: Sequence[int], vocabulary: int) -> None:
    beyond = [token for token in ids if token >= vocabulary]
    if beyond or not ids:
        what = f"token {beyond[0]} is beyond the model's {vocabulary}" if beyond else "the prompt has no token"
        raise ValueError(f"generate: {what}; give others")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flagops generate",
        description="A quantised checkpoint answers from its weights as they are stored, FP4 and FP8.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="folder with safetensors and their index")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the model goes on from")
    prompt.add_argument("--ids", type=_ids, metavar="'N N ...'", help="the same in tokens, which needs no tokenizer")
    add("--max-new-tokens", type=natural, default=64, metavar="N", help="tokens to make (default 64)")
    add("--memory", type=_size, metavar="SIZE", help="most memory with all weights: experts are read on demand")
    add("--draft", type=natural, metavar="N", help="tokens that DeepSeek-V4's draft layer guesses before each forward")
    add("--activations", choices=ACTIVATIONS, default="fp8", help="FP8 as the official code (default), or 16 bits")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of what is not quantised")
    add("--pack", action="store_true", help="copy experts into one tensor a layer, which is memory and faster")
    add("--numerics", choices=("transformers", "official"), default="transformers", help="as of flagops.patch")
    add("--backend", action="append", metavar="B", help="of the kernels, repeatable (default: the fastest)")
    add("--json", action="store_true", help="one JSON document on standard output")
    return parser


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected numbers of tokens such as '1 2 3', got {text!r}")
    return list(map(int, words))


def _size(text: str) -> int:
    try:
        return config.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
