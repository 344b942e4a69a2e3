"""Mutations of checkpoints counted by what comes of them.

``python checkpoint_judge.py SEED FIRST LAST`` tries those of these numbers that follow from a seed. What is right is
known without flagops: the safetensors library and the definitions of the formats say what a source means, a
conversion that nobody disturbed what comes of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_data as data
import checkpoint_mutations as mutations
from checkpoint_crash import interrupted, tree
from checkpoint_mutations import ACCEPT, REFUSE, Base, World

from flagops import checkpoint
from flagops.checkpoint.source import CONFIG, INDEX, JOURNAL, MANIFEST

SIZE = 1000
PATIENCE = 10.0  # seconds; a world is converted in a tenth of one
SPOKEN = {"quantization_config", "expert_dtype", "torch_dtype", "dtype", "weight_block_size", "scale_fmt",
          "scale_dtype", "activation_scheme"}  # fmt: skip


def base(folder):
    rng = np.random.default_rng(7)
    pairs, rest = [], {"norm.weight": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0, 5)}
    for i in range(3):
        weight, scale, _ = data.fp4(rng, 4, 64)
        pairs.append(((f"layers.0.ffn.experts.{i}.w1.weight", weight), (f"layers.0.ffn.experts.{i}.w1.scale", scale)))
    weight, scale, _ = data.fp8(rng, 20, 30)
    pairs.append((("layers.0.attn.wq_a.weight", weight), ("layers.0.attn.wq_a.scale", scale)))
    src = data.write(folder / "src", data.spread(pairs, rest, 2, 7))
    convert(src, folder / "finished")
    reference = tree(folder / "finished")
    return Base(src, folder / "finished", interrupted(convert, src, folder / "stopped"), reference)


def convert(src, dst):
    return checkpoint.convert(src, dst, shard_size=SIZE, workers=1, backend="numpy")


def verify(src, dst):
    return checkpoint.verify(src, dst, workers=1, backend="numpy")


def meaning(src):
    """The tensors of a source in BF16, by the safetensors library and the definitions of the formats."""
    index = json.loads((src / INDEX).read_text())["weight_map"]
    config = json.loads((src / CONFIG).read_text()) if (src / CONFIG).exists() else {}
    height, width = (config.get("quantization_config") or {}).get("weight_block_size", [128, 128])
    height, width = min(height, 1 << 20), min(width, 1 << 20)
    tensors = {}
    for shard in sorted(set(index.values())):
        held = load_file(src / shard)
        assert set(held) == {name for name, file in index.items() if file == shard}
        tensors |= held
    found = dict(tensors)
    for name, scale in tensors.items():
        weight = name.removesuffix(".scale") + ".weight"
        if not name.endswith(".scale") or weight not in tensors or tensors[weight].element_size() > 1:
            continue
        codes = tensors[weight]
        factors = np.exp2(scale.view(torch.uint8).numpy() - 127.0)
        rows, columns = codes.shape
        if codes.dtype == torch.float8_e4m3fn:
            wide = np.repeat(np.repeat(factors, height, 0)[:rows], width, 1)[:, :columns]
            values = codes.float().numpy() * wide
        else:
            packed = codes.view(torch.uint8).numpy()
            values = data.E2M1[np.stack([packed & 15, packed >> 4], -1).reshape(rows, 2 * columns)]
            values = values * np.repeat(factors, 32, 1)
        found[weight] = data.bf16(values.astype(np.float32))
        del found[name]
    return found


def without(config):
    """A configuration but for what says how weights are stored."""
    if isinstance(config, dict):
        return {key: without(value) for key, value in config.items() if key not in SPOKEN}
    return [without(value) for value in config] if isinstance(config, list) else config


def judged(mutate, world):
    """What is wrong with how a mutated world is treated, in words, or None; and what was said."""
    expected = mutate(world)
    before, strangers = tree(world.outside), strange(world)
    finished = (world.dst / MANIFEST).is_file() and not (world.dst / JOURNAL).exists()
    with reading(world.during):
        outcome, said = tried(convert, world)
        if finished and outcome == "accepted":
            outcome, said = tried(verify, world)
    if tree(world.outside) != before or not strangers.items() <= strange(world).items():
        return "wrong accept", f"a file of somebody else was written or removed; {said}"
    if outcome == "traceback":
        return outcome, said
    if outcome == "refused":
        if expected == ACCEPT:
            return "wrong refusal", said
        if "\n" in said or (world.names and not any(name in said for name in world.names)):
            return "wrong refusal", f"names none of {world.names}: {said}"
        if not finished and (world.dst / INDEX).exists() and mutate is not mutations.output_odd:
            return "wrong accept", f"an index in spite of: {said}"
        return None, said
    if expected == REFUSE:
        return "wrong accept", "should be refused"
    for again in (verify, convert) if world.meant and not finished else ():
        outcome, said = tried(again, world)
        if outcome != "accepted":
            return "wrong accept", f"converted, but then {again.__name__} says: {said}"
    return disagreement(mutate, world), ""


def strange(world):
    """Files of a destination that no conversion makes."""
    ours = {JOURNAL, MANIFEST, *world.base.reference}
    ours |= {f"{name}.partial" for name in ours}
    return {name: text for name, text in tree(world.dst).items() if name not in ours}


def disagreement(mutate, world):
    """How an output differs from what its source means, None if it does not."""
    if not world.meant or (mutate not in mutations.MEANT and tree(world.src) == tree(world.base.src)):
        extra = tree(world.dst).keys() - world.base.reference.keys()
        found = {name: text for name, text in tree(world.dst).items() if name not in extra}
        same = found == world.base.reference or mutate is mutations.manifest
        return None if same else "wrong accept"
    try:
        data.same(data.read(world.dst)[0], meaning(world.src))
        had, has = (json.loads((folder / CONFIG).read_text()) for folder in (world.src, world.dst))
        assert without(had) == without(has), "config.json"
    except Exception:
        traceback.print_exc()
        return "wrong accept"
    return None


def tried(work, world):
    try:
        work(world.src, world.dst)
    except (checkpoint.Refused, checkpoint.Difference) as refusal:
        return "refused", str(refusal)
    except OSError as error:
        return ("refused" if error.filename else "traceback"), str(error)
    except BaseException:
        return "traceback", traceback.format_exc()
    return "accepted", ""


@contextlib.contextmanager
def reading(during):
    """Does what is to happen at the n-th read of a source."""
    read, count = os.preadv, 0

    def preadv(*args):
        nonlocal count
        count += 1
        for at, change in during:
            if at == count:
                change()
        return read(*args)

    os.preadv = preadv
    try:
        yield
    finally:
        os.preadv = read


def one(seed, number, base, work):
    """One mutation in a process of its own; its kind, its fault or None, and what was said."""
    rng = random.Random(f"{seed} {number}")
    mutate = rng.choices(list(mutations.WEIGHTS), mutations.WEIGHTS.values())[0]
    folder = Path(tempfile.mkdtemp(dir=work))
    world = World(folder / "src", folder / "dst", folder / "outside", rng, base)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            shutil.copytree(base.src, world.src)
            world.outside.mkdir()
            (world.outside / "file").write_text("mine")
            fault, said = judged(mutate, world)
        except BaseException:
            fault, said = "traceback", f"of the mutator: {traceback.format_exc()}"
        with open(into, "wb", closefd=False) as file:
            file.write(json.dumps([fault, said[-2000:]]).encode())
        os._exit(0)
    os.close(into)
    ready, _, _ = select.select([out], [], [], PATIENCE)
    fault, said = "hang", ""
    with open(out, "rb") as file:
        if ready:
            fault, said = json.loads(file.read() or '["traceback", "the process died"]')
        else:
            os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    subprocess.run(["rm", "-rf", folder], check=True)  # folders deeper than Python removes
    return mutate.__name__, fault, said


def main(seed, first, last):
    """Counts of faults, and each with what repeats it; the exit code says whether there was one."""
    counts, kinds = Counter(), Counter()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where a sync takes no time
    with tempfile.TemporaryDirectory(dir=memory) as work:
        made = base(Path(work))
        for number in range(int(first), int(last)):
            kind, fault, said = one(seed, number, made, work)
            kinds[kind] += 1
            counts[fault or "right"] += 1
            if fault:
                print(f"{fault}: {kind}; checkpoint_judge.py {seed} {number} {number + 1}\n  {said}", file=sys.stderr)
    print(json.dumps({"counts": counts, "kinds": kinds}))
    return 1 if counts.keys() - {"right"} else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
