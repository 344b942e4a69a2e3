"""`convert` and `verify`, as users call them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from flagops.config import size as parse_size

from . import store
from .conversion import FINISHED, Conversion, Summary, worst
from .documents import Refused, whole
from .memory import resident
from .plan import RECODED_SCALE, TARGETS, Plan
from .source import JOURNAL, MANIFEST, OURS, resolved
from .verification import Difference, every, hold
from .work import Progress, Silent

_GO_ON = "repeat the command that began it"


def convert(
    src: Any,
    dst: Any,
    *,
    to: str = "bf16",
    keep: str | Iterable[str] = (),
    shard_size: str | int = "5GiB",
    memory: str | int | None = None,
    workers: int | None = None,
    backend: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write a checkpoint of narrow weights in BF16, its FP4 weights in FP8, or linear layers as integers, elsewhere.

    Calling it again with the same arguments goes on after an interruption of any kind; what is finished is compared,
    bit by bit. The files depend on `src`, `to`, `keep` and `shard_size` alone. Tensors that are not narrow are
    copied bit by bit, draft layers (``mtp.*``) are converted like all others.

    Args:
        src: a folder with safetensors and their index.
        dst: the folder to write; missing, empty, or left by the same conversion.
        to: ``"bf16"``; ``"fp8"`` for FP4 weights to FP8 in 128 x 128 blocks without loss; ``"int8"`` for W8A8, a scale
            for each output channel, or ``"w4a8"`` for INT4, one for 32 of a row, both as compressed-tensors.
        keep: patterns (as of `fnmatch`) of the names of tensors to leave as they are stored, a weight and its scale
            together; the configuration then goes on to describe them, and names the modules that were converted.
        shard_size: bytes of tensors in a file, such as ``"5GiB"``; a larger tensor has a file of its own.
        memory: the most bytes of memory that the process may take; None for 4 GiB, or 1 GiB beyond what it holds
            already where that is more.
        workers: threads; None for one a processor, as far as memory goes.
        backend: of the kernels; None for the fastest.
        dry_run: plan and check, write nothing.
        progress: is told how far it is, see `Progress`.

    Returns:
        A `Summary`.

    Raises:
        Refused: (a ValueError) the source, the destination or an option cannot be used; names it and the remedy.
        NoSpace: (an OSError) the disk is too small.
        OSError: reading or writing failed; what is finished stays, and the same call goes on.
        Unsupported: no backend can run.
    """
    conversion = Conversion(src, dst, to, keep, shard_size, _most(memory), workers, backend, progress or Silent())
    summary = conversion.convert(dry_run)
    found = None if dry_run or summary.state != FINISHED else conversion.finished()
    if found is None:
        return summary
    try:  # neither times nor sizes tell a change: what is called finished is made again and compared
        hold(conversion, *found, every(conversion.plan))
    except Difference as error:
        raise Refused(str(error)) from None
    summary.state, summary.compared_tensors = "already finished", len(conversion.plan.outputs)
    return conversion.measured(summary, conversion.total)


def verify(
    src: Any,
    dst: Any,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make every file of a finished conversion again, in memory, and compare: bit by bit, and with the manifest.

    Args:
        src: the folder that was converted.
        dst: the folder that was written; its manifest says with which options.
        sample: share of the tensors to compute again, above 0 and up to 1; all bytes are held to the manifest anyway.
        seed: chooses the sample; drawn if None.
        memory, workers, backend, progress: as for `convert`. ``backend="numpy"`` computes with the reference.

    Returns:
        A `Summary`.

    Raises:
        Difference: (a ValueError) names the first tensor or file that is not right.
        Refused: (a ValueError) the source or an option cannot be used.
        OSError, Unsupported: as for `convert`.
    """
    if not 0 < sample <= 1:
        raise Refused(f"--sample {sample}: expected a share above 0 and up to 1")
    dst = resolved(dst)
    for folder in (resolved(src), dst):
        if not folder.is_dir():
            raise Refused(f"{folder} is no folder; give the SRC and the DST of a finished conversion")
    memory = _most(memory)
    found, going = store.read_manifest(dst, parse_size(memory)), store.place(dst, JOURNAL).exists()
    if found is None:
        if going:
            raise Difference(f"{dst} is not finished", _GO_ON)
        raise Difference(
            f"{dst} has no manifest", "only a finished conversion of flagops can be verified: convert first"
        )
    if going:
        raise Difference(f"{dst} is not finished: {JOURNAL} is still there", _GO_ON)
    identity, entries = found
    to, shard_size, keep = identity.get("to"), identity.get("shard_size", 0), identity.get("keep", [])
    texts = isinstance(keep, list) and all(isinstance(name, str) for name in keep)
    if to not in TARGETS or not whole(shard_size, 1) or not texts:
        raise Difference(f"{dst / MANIFEST} does not say with which options it was made", "empty DST and convert again")
    conversion = Conversion(src, dst, to, keep, shard_size, memory, workers, backend, progress or Silent())
    summary = conversion.summary()
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    chosen = _sample(conversion.plan, sample, seed)
    if sample < 1:
        summary.notes.append(f"sample of {len(chosen)} tensors, seed {seed}")
    files = hold(conversion, identity, entries, chosen)
    extra = sorted(p.name for p in dst.iterdir() if p.name not in files | OURS)
    summary.notes += [f"not of this conversion: {', '.join(extra)}"] if extra else []
    summary.state, summary.compared_tensors, summary.errors = "verified", len(chosen), worst(entries)
    return conversion.measured(summary, conversion.total)


def _most(memory: str | int | None) -> str | int:
    """Of a process that loads models besides, its own size is no reason to refuse what nobody limited."""
    return max(4 << 30, resident() + (1 << 30)) if memory is None else memory


def _sample(plan: Plan, sample: float, seed: int) -> set[str]:
    names = [out.name for out in plan.outputs if out.action != RECODED_SCALE]
    chosen = set(random.Random(seed).sample(names, max(1, round(sample * len(names)))))
    scales = {out.name for out in plan.outputs if out.action == RECODED_SCALE and out.weight.name in chosen}
    return chosen | scales
